"""Products with packed weights alone, in every way that a GPU has, for the layers of two models.

    python -m bench.gpu_products [--formats int8,int4,q4_k,q6_k,e4m3] [--tokens 1,4,16,64,256] [--out DIRECTORY]

A line of JSON for each format, layer, way and number of tokens: microseconds of one call that a CUDA graph replays,
GB/s of the weight, and the part of the bandwidth of a copy that this is. Several weights take turns, so that none is in
the GPU's cache. "bfloat16" is torch's product with the dequantised weight.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.gpu import bandwidth
from bench.packed_model import random_weight
from bench.run import RESULTS
from engine.cpu.packed_weight import E4M3, INT4, INT8, Q4_K, Q6_K
from engine.gpu import products, timing
from engine.gpu.packed_weight import GPUWeight
from errors import first_line

FORMATS = {"int8": INT8, "int4": INT4, "q4_k": Q4_K, "q6_k": Q6_K, "e4m3": E4M3}
LAYERS = {  # (rows, columns), those of the same input joined
    "qwen3-8b qkv": (6144, 4096),
    "qwen3-8b o": (4096, 4096),
    "qwen3-8b gate+up": (24576, 4096),
    "qwen3-8b down": (4096, 12288),
    "gemma-3-27b qkv": (8192, 5376),
    "gemma-3-27b gate+up": (43008, 5376),
    "gemma-3-27b down": (5376, 21504),
}
TINY = {"tiny": (64, 256)}
TOKENS = (1, 4, 16, 64, 256)
MOST_BY_NUMBERS = 16  # tokens: for more of them it is never the fastest way
COLD = 2**28  # bytes of weights between two uses of the same one
Way = Callable[[torch.Tensor, GPUWeight, torch.Tensor], None]


@dataclass(frozen=True)
class Result:
    layer: str
    format: str
    way: str
    tokens: int
    microseconds: float | None
    gb_per_s: float | None = None
    share_of_bandwidth: float | None = None
    note: str = ""


def by_torch(x: torch.Tensor, weight: GPUWeight, output: torch.Tensor, *, numbers: dict[int, torch.Tensor]) -> None:
    torch.mm(x, numbers[id(weight)].T, out=output)


def ways(weights: list[GPUWeight], num_tokens: int) -> Iterator[tuple[str, Way]]:
    if num_tokens <= MOST_BY_NUMBERS:
        yield "numbers", lambda x, weight, output: products.multiply_numbers(x, weight, None, output)
    yield "tiles", lambda x, weight, output: products.multiply_tiles(x, weight, None, output)
    yield "dequantised", lambda x, weight, output: products.multiply_dequantised(x, weight, None, output)
    numbers = {id(weight): products.dequantised(weight, torch.bfloat16) for weight in weights}
    yield "bfloat16", partial(by_torch, numbers=numbers)


def seconds(device: torch.device, run: Callable[[], None]) -> float:
    """Returns how long a call takes: on a GPU replayed from a graph, on a CPU, to see that it runs, once."""
    if device.type == "cuda":
        return timing.seconds(run)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    layer: str, shape: tuple[int, int], name: str, tokens: list[int], device: torch.device, speed: float
) -> Iterator[Result]:
    """Measures one layer in one format. speed: bytes that a copy moves in a second."""
    first = random_weight(FORMATS[name], *shape, device)
    count = min(16, 1 + COLD // first.num_bytes) if device.type == "cuda" else 1
    weights = [first, *(random_weight(FORMATS[name], *shape, device) for _ in range(count - 1))]
    for num_tokens in tokens:
        x = torch.randn(num_tokens, shape[1], device=device).bfloat16()
        output = torch.empty(num_tokens, shape[0], dtype=torch.bfloat16, device=device)
        for way, call in ways(weights, num_tokens):
            place: dict[str, Any] = {"layer": layer, "format": name, "way": way, "tokens": num_tokens}
            try:
                time_of_one = seconds(device, partial(_all, call, x, weights, output)) / count
            except Exception as error:  # one that this device cannot run
                yield Result(**place, microseconds=None, note=f"{type(error).__name__}: {first_line(error)}")
                continue
            size = first.num_bytes if way != "bfloat16" else 2 * shape[0] * shape[1]
            rate = size / time_of_one
            yield Result(**place, microseconds=1e6 * time_of_one, gb_per_s=rate / 1e9, share_of_bandwidth=rate / speed)


def _all(call: Way, x: torch.Tensor, weights: list[GPUWeight], output: torch.Tensor) -> None:
    for weight in weights:
        call(x, weight, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--layers", default="", help="a part of their names")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="to see that it runs, on a CPU too")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a directory")
    a = parser.parse_args()
    device = torch.device(a.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    speed = bandwidth(device, 2**32 if device.type == "cuda" else 2**24)
    layers = TINY if a.tiny else {name: shape for name, shape in LAYERS.items() if a.layers in name}
    a.out.mkdir(parents=True, exist_ok=True)
    with (a.out / f"gpu-products-{machine.slug(gpu)}.jsonl").open("w") as file:
        about = {"device": gpu, "bandwidth_gb_per_s": speed / 1e9, **machine.describe()}
        print(json.dumps(about), file=file, flush=True)
        for (layer, shape), name in itertools.product(layers.items(), a.formats.split(",")):
            for result in measure(layer, shape, name, [int(count) for count in a.tokens.split(",")], device, speed):
                line = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(result).items()}
                print(json.dumps(line), file=file, flush=True)
                print(json.dumps(line), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
