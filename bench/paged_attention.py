"""PagedAttention: attention alone over the paged cache of a GPU, with each kernel and with SDPA.

    python -m bench.paged_attention [--heads 32 --kv-heads 8 --dim 128] [--tiles 16,64,4,3]

Prints a line of JSON for each kernel and workload: microseconds of one call, recorded as a CUDA graph; GB/s of the keys
and values that have to be read; TFLOP/s of what the queries see. Several sets of inputs take turns, so that none is in
the GPU's cache. SDPA gets its keys in one piece, which the engine's fallback has to gather first. `--tiles` (rows,
keys, warps, stages) and `--parts` try others than the Triton kernel chooses; both may be repeated.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from engine.attention import flash
from engine.attention.flash import Trial
from engine.layer_spec import AttentionSpec
from errors import first_line

DECODES, CONTEXTS, CHUNKS = (1, 64), (1024, 8192, 32768), (2048, 8192)
MAX_CACHE = 24 * 2**30  # bytes of keys and values in all sets
COLD = 256 * 2**20  # bytes of keys and values between two uses of the same set: more than a GPU's cache holds
REPEATS = 5

Call = Callable[[Trial], torch.Tensor]


@dataclass(frozen=True)
class Workload:
    sequences: int
    queries: int  # of each
    context: int  # tokens of each, the queries included

    def trial(self, spec: AttentionSpec, block_size: int) -> Trial:
        return Trial.of(spec, block_size, [self.queries] * self.sequences, [self.context] * self.sequences)

    def num_seen(self, window: int | None) -> int:
        """Returns the number of pairs of a query and a key that it sees."""
        ends = range(self.context - self.queries + 1, self.context + 1)
        return self.sequences * sum(min(end, window or end) for end in ends)

    def num_read(self, window: int | None) -> int:
        """Returns the number of keys that have to be read."""
        return self.sequences * min(self.context, (window or self.context) + self.queries - 1)


@dataclass(frozen=True)
class Result:
    kernel: str
    sequences: int
    queries: int
    context: int
    microseconds: float | None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    error: float | None = None  # difference from the first kernel that works, over the norm of its result
    note: str = ""


def workloads(is_tiny: bool) -> list[Workload]:
    size = 256 if is_tiny else 1
    contexts, chunks = ([count // size for count in counts] for counts in (CONTEXTS, CHUNKS))
    decodes = [Workload(count, 1, context) for count in DECODES for context in contexts]
    return decodes + [Workload(1, chunk, chunk) for chunk in chunks] + [Workload(1, chunks[0], contexts[-1])]


def calls(spec: AttentionSpec, tiles: list[str], parts: list[int]) -> Iterator[tuple[str, Call]]:
    for candidate in flash.known_kernels({spec}):
        yield candidate.name, partial(_run, candidate.kernel)
    yield "SDPA, without gathering", _sdpa
    if not tiles and not parts:
        return
    from engine.attention.paged_triton import Tiles, paged_attention

    for chosen, count in itertools.product(tiles or [""], parts or [0]):
        own = Tiles(*map(int, chosen.split(","))) if chosen else None
        kernel = partial(paged_attention, tiles=own, num_parts=count or None)
        yield f"Triton {chosen or 'own tiles'} in {count or 'own'} parts", partial(_run, kernel)


def _run(kernel: flash.Kernel, trial: Trial) -> torch.Tensor:
    return trial.run(kernel)


def _sdpa(trial: Trial) -> torch.Tensor:
    """Attends to the blocks in the order of the cache, which takes the same time; for decodes or one whole chunk."""
    batch = trial.batch
    sequences, queries = len(batch.seq_lens), batch.max_query_len
    shape = (sequences, -1, *trial.keys.shape[2:])
    key, value = (cache.view(shape)[:, : batch.max_seq_len].transpose(1, 2) for cache in (trial.keys, trial.values))
    query = trial.query.view(sequences, queries, *trial.query.shape[1:]).transpose(1, 2)
    is_causal = queries > 1 and queries == key.shape[2]
    if trial.softcap or trial.scales or trial.sinks is not None or batch.window or (queries > 1 and not is_causal):
        raise NotImplementedError("SDPA needs a mask for this, or cannot compute it")
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)


def microseconds(call: Call, trials: list[Trial], device: torch.device) -> float:
    """Returns the median time of a call in REPEATS replays, each of all trials."""
    for trial in trials[:2]:
        call(trial)
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for trial in trials:
            call(trial)
    graph.replay()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(start.elapsed_time(end)) * 1000 / len(trials))
    return statistics.median(times)


def measure(
    work: Workload, spec: AttentionSpec, block_size: int, tiles: list[str], parts: list[int]
) -> Iterator[Result]:
    own = work.sequences * work.context * spec.bytes_per_token
    trial = work.trial(spec, block_size)
    count = max(1, min(32, -(-COLD // own), MAX_CACHE // own))
    trials = [trial, *(_copy(trial) for _ in range(count - 1))]
    flops = 2 * work.num_seen(spec.window) * spec.group * spec.num_kv_heads * (spec.key_dim + spec.value_dim)
    num_bytes = work.num_read(spec.window) * spec.bytes_per_token
    expected: torch.Tensor | None = None
    for name, call in calls(spec, tiles, parts):
        place = asdict(work)
        try:
            time = microseconds(call, trials, spec.device)
            output = call(trial).float()
        except Exception as error:  # a kernel that this device or version lacks
            described = f"{type(error).__name__}: {first_line(error)}"
            yield Result(kernel=name, **place, microseconds=None, note=described)
            continue
        expected = output if expected is None else expected
        is_alike = output.shape == expected.shape  # SDPA's blocks are in another order
        rates: dict[str, Any] = {}
        if time:
            rates = {"gb_per_s": num_bytes / time / 1e3, "tflop_per_s": flops / time / 1e6}
        distance = float((output - expected).norm() / expected.norm()) if is_alike else None
        yield Result(kernel=name, **place, microseconds=time, **rates, error=distance)


def _copy(trial: Trial) -> Trial:
    copied = {f.name: getattr(trial, f.name) for f in fields(Trial)}
    return Trial(**{**copied, "keys": trial.keys.clone(), "values": trial.values.clone()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--window", type=int)
    parser.add_argument("--softcap", type=float)
    parser.add_argument("--int8", action="store_true", help="8-bit keys and values, which only Triton's kernel reads")
    parser.add_argument("--sinks", action="store_true")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tiles", action="append", default=[], metavar="ROWS,KEYS,WARPS,STAGES")
    parser.add_argument("--parts", action="append", default=[], type=int, help="that the keys are divided into")
    parser.add_argument("--only", choices=["decodes", "chunks"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="to see that it runs, on a CPU too")
    a = parser.parse_args()
    place = (getattr(torch, a.dtype), torch.device(a.device))
    spec = AttentionSpec(a.kv_heads, a.dim, a.dim, a.window, *place, a.softcap, a.heads // a.kv_heads)
    spec = replace(spec, key_factors=() if a.int8 else None, has_sinks=a.sinks)
    for work in workloads(a.tiny):
        if a.only and (work.queries == 1) != (a.only == "decodes"):
            continue
        if work.sequences * work.context * spec.bytes_per_token > MAX_CACHE:
            continue
        for result in measure(work, spec, a.block_size, a.tiles, a.parts):
            shape = {"heads": a.heads, "kv_heads": a.kv_heads, "dim": a.dim, "window": a.window}
            print(json.dumps({**shape, **asdict(result)}), flush=True)
        if place[1].type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
