"""ProductLimits: from how many tokens on each way to multiply with a packed weight is the fastest one on a device.

See products.py for the ways. Once for every format each is compared with torch's product, and those that agree are
timed on some of the model's weights, as steps of decodes run: in CUDA graphs.
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from engine.gpu import products
from engine.gpu.packed_weight import GPUWeight, unpack
from errors import ModelLoadError, first_line

log = logging.getLogger(__name__)
Way = Callable[[torch.Tensor, GPUWeight, torch.Tensor | None, torch.Tensor], None]
Agrees = Callable[[Way, GPUWeight, torch.dtype], bool]
WAYS = (products.multiply_numbers, products.multiply_tiles, products.multiply_dequantised)
Measure = Callable[[Callable[[], None]], float]  # seconds that a call takes
FEW, MANY = (1, 2, 4, 8), (4, 16, 32, 64, 128, 256, 512)  # tokens that are timed
COLD = 2**28  # bytes of weights, which no GPU's cache holds
TRIED_ROWS, TRIED_TOKENS = 64, (1, 17, 33)  # of the products that are compared
TOLERANCES = {2: 0.02, 4: 1e-3}  # bytes of a number -> allowed difference, as a part of the result's norm


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


def measure(weights: Iterable[GPUWeight], dtype: torch.dtype, seconds: Measure) -> None:
    """Finds the limits for the formats of these weights, and logs them. dtype: of the activations. Raises
    ModelLoadError where even dequantising a weight is wrong."""
    for key, own in _by_key(weights, dtype).items():
        limits = _measured[key] = limits_of(own, dtype, seconds)
        log.info(
            "products with weights of %d bits: number by number up to %d tokens, by tiles up to %d, then dequantised",
            own[0].format.bits,
            limits.numbers,
            limits.tiles,
        )


def _by_key(weights: Iterable[GPUWeight], dtype: torch.dtype) -> dict[tuple[object, ...], list[GPUWeight]]:
    """Returns weights of each format that is not measured yet: so many that a GPU's cache does not hold them, from
    which they would be read again, faster than from its memory."""
    chosen: dict[tuple[object, ...], list[GPUWeight]] = {}
    for weight in weights:
        own = chosen.setdefault(_key(weight, dtype), [])
        if sum(other.num_bytes for other in own) < COLD:
            own.append(weight)
    return {key: own for key, own in chosen.items() if key not in _measured}


def limits_of(
    weights: list[GPUWeight], dtype: torch.dtype, seconds: Measure, agrees: Agrees | None = None
) -> ProductLimits:
    """Returns the fastest way for each number of tokens that is timed, for weights of one format; see `ProductLimits`.
    Raises ModelLoadError where even dequantising a weight is wrong.

    agrees: tells whether a way gives the right product; tests pass their own.
    """
    able = [way for way in WAYS if (agrees or _agrees)(way, weights[0], dtype)]
    if products.multiply_dequantised not in able:
        raise ModelLoadError(
            f"This GPU computes wrong products with weights of {weights[0].format.bits} bits: set QUANTIZATION=none, "
            "or update Triton and the GPU's driver."
        )

    def time(way: Way, num_tokens: int) -> float:
        try:
            return seconds(_products(way, weights, dtype, num_tokens)) if way in able else math.inf
        except Exception as error:  # any kind, from the compiler or the driver, or memory is short
            log.info("%s is of no use here for %d tokens: %s", way.__name__, num_tokens, first_line(error))
            return math.inf

    def last_faster(counts: Iterable[int], way: Way, other: Way) -> int:
        """Returns the last of the counts up to which `way` is always faster; 0 if it never is."""
        last = 0
        for count in counts if way in able else ():
            if time(way, count) > time(other, count):
                break
            last = count
        return last

    numbers = last_faster(FEW, products.multiply_numbers, products.multiply_tiles)
    tiles = last_faster(MANY, products.multiply_tiles, products.multiply_dequantised)
    return ProductLimits(numbers, tiles)


def _products(way: Way, weights: list[GPUWeight], dtype: torch.dtype, num_tokens: int) -> Callable[[], None]:
    """Returns what multiplies with all weights, one after the other."""
    device = weights[0].quants.device
    inputs = [torch.zeros(num_tokens, weight.num_columns, dtype=dtype, device=device) for weight in weights]
    outputs = [torch.empty(num_tokens, weight.num_rows, dtype=dtype, device=device) for weight in weights]

    def run() -> None:
        for x, weight, output in zip(inputs, weights, outputs, strict=True):
            way(x, weight, None, output)

    return run


def _agrees(way: Way, weight: GPUWeight, dtype: torch.dtype) -> bool:
    """Returns whether a way gives torch's product of random inputs with the weight's first rows, for one token and for
    several."""
    rows = weight.rows(0, TRIED_ROWS)
    numbers = unpack(rows).dequantize()
    x = torch.randn(max(TRIED_TOKENS), weight.num_columns, device=numbers.device, dtype=torch.float32).to(dtype)
    expected = x.float() @ numbers.T
    for count in TRIED_TOKENS:
        output = torch.empty(count, len(numbers), dtype=dtype, device=numbers.device)
        try:
            way(x[:count], rows, None, output)
        except Exception as error:  # any kind, from the compiler or the driver
            log.info("%s is of no use here: %s", way.__name__, first_line(error))
            return False
        difference = (output.float() - expected[:count]).norm()
        if not bool(difference <= TOLERANCES[x.element_size()] * expected[:count].norm()):
            return False
    return True


def _key(weight: GPUWeight, dtype: torch.dtype) -> tuple[object, ...]:
    return weight.format, dtype, weight.quants.device
