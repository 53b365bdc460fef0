"""A kernel that rounds keys and values to 8 bits and puts them into the cache; see engine/layer_cache.py."""

import functools

import torch

from engine.cpu import jit
from engine.cpu.activations import DTYPES, FEW_ROWS
from engine.cpu.jit import F32, FLOATS, I8, I16, I32, I64, LANES, Builder, Program, constant, vector

SMALLEST = 1e-37  # that numbers are divided by: a head of zeros has the scale 0
NAN = 0x7FC0  # as bfloat16


def can_store(numbers: torch.Tensor, cache: torch.Tensor) -> bool:
    """Returns whether the kernel takes these keys or values."""
    is_here = cache.device.type == "cpu" and numbers.dtype in DTYPES and jit.is_available()
    return is_here and not numbers.shape[-1] % LANES and numbers.stride(2) == 1


def store(
    numbers: torch.Tensor,
    factors: torch.Tensor | None,
    cache: torch.Tensor,
    scales: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """Divides keys or values by the factors, rounds each head to 8 bits, and writes them and their scales.

    numbers: (tokens, kv_heads, dim). factors: (kv_heads, dim) float32. cache: (blocks, block_size, kv_heads, dim) int8;
    scales: (blocks, block_size, kv_heads) bfloat16. slots: (tokens,) int64.
    """
    tokens, heads, dim = numbers.shape
    assert scales.dtype == torch.bfloat16 and cache.is_contiguous() and scales.is_contiguous()
    _store(numbers.dtype, dim, factors is not None)(
        numbers.data_ptr(),
        numbers.stride(0),
        numbers.stride(1),
        0 if factors is None else factors.data_ptr(),
        cache.data_ptr(),
        scales.data_ptr(),
        slots.data_ptr(),
        tokens,
        heads,
        num_threads=torch.get_num_threads() if tokens > FEW_ROWS else 1,
    )


_STORE = ("numbers", "token_stride", "head_stride", "factors", "cache", "scales", "slots", "tokens", "heads")


@functools.cache
def _store(dtype: torch.dtype, dim: int, has_factors: bool) -> Program:
    """Gives each thread some of the tokens."""
    b = Builder("store", _STORE, jit.host()[1])
    argument, parts = b.argument, range(0, dim, LANES)

    def read(source: jit.Value, head: jit.Value, first: int) -> jit.Value:
        part = b.read_floats(dtype, b.add(source, I64(first * dtype.itemsize)))
        if not has_factors:
            return part
        place = b.add(b.address(argument["factors"], head, 4 * dim), I64(4 * first))
        return b.fdiv(part, b.read(FLOATS, place))

    with b.share(argument["tokens"]) as token, b.loop(I64(0), argument["heads"]) as head:
        start = b.add(b.mul(token, argument["token_stride"]), b.mul(head, argument["head_stride"]))
        source = b.address(argument["numbers"], start, dtype.itemsize)
        slot = b.read(I64, b.address(argument["slots"], token, 8))
        place = b.add(b.mul(slot, argument["heads"]), head)
        numbers = [read(source, head, i) for i in parts]
        write_rounded(b, numbers, argument["cache"], argument["scales"], place)
    return jit.compile_program(b)


def write_rounded(b: Builder, numbers: list[jit.Value], cache: jit.Value, scales: jit.Value, place: jit.Value) -> None:
    """Rounds a head, in vectors of floats, to 8 bits, and writes it and its scale. place: which one of all heads in the
    cache."""
    largest = constant(FLOATS, 0.0)
    for part in numbers:
        largest = b.intrinsic("llvm.maximum.v16f32", FLOATS, largest, b.intrinsic("llvm.fabs.v16f32", FLOATS, part))
    largest = b.intrinsic("llvm.vector.reduce.fmaximum.v16f32", F32, largest)
    bits = _bfloat16(b, b.fdiv(largest, F32(127.0)))
    b.write(b.trunc(bits, I16), b.address(scales, place, 2))
    scale = b.bitcast(b.shl(bits, I32(16)), F32)
    # a NaN goes on as the smallest number: it is in the scale already
    divisor = b.splat(b.select(b.fcmp_ordered(">", scale, F32(SMALLEST)), scale, F32(SMALLEST)))
    start = b.address(cache, place, len(numbers) * LANES)
    for i, part in enumerate(numbers):
        _, rounded = b.round(b.fdiv(part, divisor), constant(FLOATS, 1.0))
        b.write(b.trunc(rounded, vector(I8)), b.add(start, I64(i * LANES)))


def _bfloat16(b: Builder, value: jit.Value) -> jit.Value:
    """Rounds a float to bfloat16, to nearest, ties to even: its bits, in an integer of 32 bits. NaN stays NaN."""
    bits = b.bitcast(value, I32)
    odd = b.and_(b.lshr(bits, I32(16)), I32(1))
    rounded = b.lshr(b.add(bits, b.add(odd, I32(0x7FFF))), I32(16))
    return b.select(b.fcmp_unordered("uno", value, value), I32(NAN), rounded)
