"""What kernels in Triton have in common, on GPUs and in Triton's interpreter, which runs them on a CPU."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl

from engine.gpu.half_layers import AMPERE

TURING = (7, 5)  # compute capability
F = TypeVar("F", bound=Callable[..., Any])


def _same(value: tl.tensor) -> tl.tensor:
    return value


def _as_it_is(function: Any) -> Any:
    return function


def _whole(value: Any) -> int:
    """Converts a scalar to an integer for the interpreter of Triton 3.6, whose own conversion fails with numpy 2.4."""
    return int(value.handle.data.item()) if isinstance(value, tl.tensor) else int(value)


IS_INTERPRETED = not isinstance(triton.jit(_same), triton.JITFunction)  # by TRITON_INTERPRET=1
# For functions that kernels call: the interpreter would prepare each call anew, which takes longer than the call
inlined = _as_it_is if IS_INTERPRETED else triton.jit
bound = _whole if IS_INTERPRETED else triton.jit(_same)  # makes the bound of a loop


def on_its_device(function: F) -> F:
    """Has a function launch its kernels on the device of its first argument: Triton launches on the current one, which
    is another one where a model is spread over several."""

    @functools.wraps(function)
    def launching(first: torch.Tensor, *others: Any, **options: Any) -> Any:
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return function(first, *others, **options)
        with torch.cuda.device(first.device):
            return function(first, *others, **options)

    return cast(F, launching)


def precision(device: torch.device) -> str:
    """Returns how the products of float32 are computed: exactly enough, on a device that may have tensor cores for
    that."""
    return "tf32x3" if is_ampere(device) else "ieee"


def widens(dtype: torch.dtype) -> bool:
    """Returns whether products are computed in float32 instead: the interpreter has none of bfloat16."""
    return IS_INTERPRETED and dtype == torch.bfloat16


@functools.cache
def is_ampere(device: torch.device) -> bool:
    """Returns whether the device loads ahead and has products of bfloat16 and TF32; so does the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= AMPERE


@functools.cache
def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@inlined
def product(a: tl.tensor, b: tl.tensor, sum_: tl.tensor, PRECISION: tl.constexpr, WIDENS: tl.constexpr) -> tl.tensor:
    """Computes sum_ + a b in float32."""
    if WIDENS:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum_, input_precision="ieee")
    else:
        return tl.dot(a, b, sum_, input_precision=PRECISION)


@inlined
def owner(starts: tl.tensor, number: tl.tensor, count: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Finds which of `count` runs of rows tile `number` belongs to: the last one whose first tile, starts // SIZE + its
    own number, is not beyond it. SIZE: rows of a tile."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // SIZE + middle <= number:
            low = middle
        else:
            high = middle
    return low
