"""Activations: the inputs of products with packed weights, in 8 bits or bfloat16, ordered by groups of 32 columns."""

import functools
from dataclasses import dataclass

import torch

from engine.cpu import jit
from engine.cpu.jit import F32, I8, I32, I64, INTS, LANES, Builder, Program, constant, vector
from engine.cpu.packed_weight import GROUP

PADDING = 2048  # bytes behind activations; tiles read beyond the last row
DTYPES = (torch.bfloat16, torch.float32)  # of what is rounded to activations
FEW_ROWS = 4  # so few rows are not worth waking the other threads


@dataclass(frozen=True)
class Activations:
    """Rows of 8 bits with a scale for each group of 32 columns; blocks = columns / 32."""

    memory: torch.Tensor  # the parts below, one after the other
    num_rows: int
    blocks: int

    @classmethod
    def empty(cls, num_rows: int, blocks: int) -> "Activations":
        num_bytes = num_rows * blocks * (GROUP + 4 + 8 + 4) + PADDING
        return cls(torch.empty(num_bytes, dtype=torch.uint8), num_rows, blocks)

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        start, groups = self.memory.data_ptr(), self.num_rows * self.blocks
        return start, start + GROUP * groups, start + (GROUP + 4) * groups, start + (GROUP + 12) * groups

    @property
    def values(self) -> torch.Tensor:
        """(blocks, rows, 32) int8"""
        return self._part(torch.int8, 0, GROUP)

    @property
    def scales(self) -> torch.Tensor:
        """(blocks, rows) float32"""
        return self._part(torch.float32, GROUP, 4)[..., 0]

    @property
    def sums(self) -> torch.Tensor:
        """(blocks, rows, 2) int32, of the values of each half"""
        return self._part(torch.int32, GROUP + 4, 8)

    @property
    def totals(self) -> torch.Tensor:
        """(blocks, rows) float32, the sum of all values times their scale"""
        return self._part(torch.float32, GROUP + 12, 4)[..., 0]

    def _part(self, dtype: torch.dtype, start: int, size: int) -> torch.Tensor:
        """Returns one part of the memory, `size` bytes for every group: (blocks, rows, size / bytes of dtype)."""
        groups = self.num_rows * self.blocks
        part = self.memory[start * groups : (start + size) * groups].view(dtype)
        return part.view(self.blocks, self.num_rows, size // dtype.itemsize)  # also of no rows


def quantize(x: torch.Tensor) -> Activations:
    """Rounds activations to 8 bits. x: (rows, columns), contiguous."""
    num_rows, num_columns = x.shape
    result = Activations.empty(num_rows, num_columns // GROUP)
    program(x.dtype)(x.data_ptr(), *result.addresses, num_rows, result.blocks, num_threads=threads_for(num_rows))
    return result


def group(x: torch.Tensor) -> torch.Tensor:
    """Reorders (rows, columns) to (blocks, rows, 32)."""
    padded = torch.empty(x.numel() + PADDING // x.itemsize, dtype=x.dtype)
    grouped = padded[: x.numel()].view(-1, x.shape[0], GROUP)
    return grouped.copy_(x.reshape(x.shape[0], -1, GROUP).transpose(0, 1))


def threads_for(num_rows: int) -> int:
    return torch.get_num_threads() if num_rows > FEW_ROWS else 1


@functools.cache
def program(dtype: torch.dtype) -> Program:
    b = Builder("quantize", ("x", "values", "scales", "sums", "totals", "rows", "blocks"), jit.host()[1])
    rows, blocks = b.argument["rows"], b.argument["blocks"]
    with b.share(blocks) as block, b.loop(I64(0), rows) as row:
        start = b.address(b.argument["x"], b.add(b.mul(row, blocks), block), GROUP * dtype.itemsize)
        halves = [b.read_floats(dtype, b.add(start, I64(half * LANES * dtype.itemsize))) for half in (0, 1)]
        write_quantized(b, halves, b.add(b.mul(block, rows), row))
    return jit.compile_program(b)


def write_quantized(b: Builder, halves: list[jit.Value], place: jit.Value) -> None:
    """Writes a group of 32, given as two vectors, to index `place` of values, scales and sums. A NaN or an infinity
    becomes the scale, and so reaches all that is computed from the group: as integers, its bits are the largest."""
    absolute = [b.and_(b.bitcast(half, INTS), constant(INTS, 0x7FFFFFFF)) for half in halves]
    largest = b.select(b.icmp_unsigned(">", *absolute), *absolute)
    top = b.bitcast(b.intrinsic("llvm.vector.reduce.umax.v16i32", I32, largest), F32)
    inverse = b.select(b.fcmp_ordered(">", top, F32(0.0)), b.fdiv(F32(127.0), top), F32(0.0))
    scale = b.fdiv(top, F32(127.0))
    b.write(scale, b.address(b.argument["scales"], place, 4))
    sums = []
    for half, values in enumerate(halves):
        _, codes = b.round(values, b.splat(inverse))
        index = b.add(b.mul(place, I64(2)), I64(half))
        b.write(b.trunc(codes, vector(I8)), b.address(b.argument["values"], index, LANES))
        sums.append(b.intrinsic("llvm.vector.reduce.add.v16i32", I32, codes))
    for half, total in enumerate(sums):
        b.write(total, b.add(b.address(b.argument["sums"], place, 8), I64(4 * half)))
    b.write(b.fmul(b.sitofp(b.add(*sums), F32), scale), b.address(b.argument["totals"], place, 4))
