"""How long kernels take on a GPU."""

from collections.abc import Callable

import torch

CALLS = 20


def seconds(run: Callable[[], object]) -> float:
    """Measures one call in seconds, as part of a CUDA graph: decodes run in one, and so do not wait for Python. Raises
    RuntimeError where it cannot be recorded, or memory is short."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # torch's own one is of the device that recorded first
        for _ in range(CALLS):
            run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / CALLS
