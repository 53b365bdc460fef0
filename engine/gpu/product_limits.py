"""ProductLimits: from how many tokens on each way to multiply with a packed weight is the fastest one on a device.

See products.py for the ways. They are timed once for every format, on its largest weight, as steps of decodes run: in
CUDA graphs.
"""

import logging
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from engine.cuda_graphs import record_graph
from engine.gpu import products
from engine.gpu.packed_weight import GPUWeight

log = logging.getLogger(__name__)
Way = Callable[[torch.Tensor, GPUWeight, torch.Tensor | None, torch.Tensor], None]
Measure = Callable[[Callable[[], None]], float]  # seconds that a call takes
REPEATS = 5  # of which the median counts
FEW, MANY = (1, 2, 4, 8), (32, 64, 128, 256, 512)  # tokens that are tried


@dataclass(frozen=True)
class ProductLimits:
    """The most tokens for which a product is computed number by number, and by tiles; for more, the weight is
    dequantised."""

    numbers: int = 2
    tiles: int = 128

    def way_for(self, num_tokens: int) -> Way:
        if num_tokens <= self.numbers:
            return products.multiply_numbers
        return products.multiply_tiles if num_tokens <= self.tiles else products.multiply_dequantised


DEFAULT = ProductLimits()
_measured: dict[tuple[object, ...], ProductLimits] = {}  # by format, type of numbers, and device


def multiply(
    x: torch.Tensor, weight: GPUWeight, bias: torch.Tensor | None = None, output: torch.Tensor | None = None
) -> torch.Tensor:
    """Computes x W^T + b, (tokens, rows), in x's type.

    x: (tokens, columns), whose rows may be apart. output: where to put the result, whose rows may be apart.
    """
    if output is None:
        output = torch.empty(len(x), weight.num_rows, dtype=x.dtype, device=x.device)
    _measured.get(_key(weight, x.dtype), DEFAULT).way_for(len(x))(x, weight, bias, output)
    return output


def seconds_in_graph(device: torch.device, run: Callable[[], None], calls: int = 4) -> float:
    """Returns how long a call takes on a GPU that replays several of them."""

    def several() -> torch.Tensor:
        for _ in range(calls):
            run()
        return torch.empty(0)

    times = []
    with torch.cuda.device(device):
        replay = record_graph(several)
        replay()
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
            start.record()
            replay()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) / 1000 / calls)
    return statistics.median(times)


def measure(weights: Iterable[GPUWeight], dtype: torch.dtype, seconds: Measure) -> None:
    """Finds the limits for the formats of these weights, and logs them. dtype: of the activations."""
    largest: dict[tuple[object, ...], GPUWeight] = {}
    for weight in weights:
        key = _key(weight, dtype)
        if key not in _measured and (key not in largest or weight.num_bytes > largest[key].num_bytes):
            largest[key] = weight
    for key, weight in largest.items():
        limits = _measured[key] = limits_of(weight, dtype, seconds)
        log.info(
            "products with weights of %d bits: number by number up to %d tokens, by tiles up to %d, then dequantised",
            weight.format.bits,
            limits.numbers,
            limits.tiles,
        )


def limits_of(weight: GPUWeight, dtype: torch.dtype, seconds: Measure) -> ProductLimits:
    """Returns the fastest way for each number of tokens that is tried; see `ProductLimits`."""

    def time(way: Way, num_tokens: int) -> float:
        device = weight.quants.device
        x = torch.zeros(num_tokens, weight.num_columns, dtype=dtype, device=device)
        output = torch.empty(num_tokens, weight.num_rows, dtype=dtype, device=device)
        return seconds(lambda: way(x, weight, None, output))

    def last_faster(counts: Iterable[int], way: Way, other: Way) -> int:
        """Returns the last of the counts up to which `way` is always faster; 0 if it never is."""
        last = 0
        for count in counts:
            if time(way, count) > time(other, count):
                break
            last = count
        return last

    numbers = last_faster(FEW, products.multiply_numbers, products.multiply_tiles)
    tiles = last_faster(MANY, products.multiply_tiles, products.multiply_dequantised)
    return ProductLimits(numbers, tiles)


def _key(weight: GPUWeight, dtype: torch.dtype) -> tuple[object, ...]:
    return weight.format, dtype, weight.quants.device
