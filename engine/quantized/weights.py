"""Integers and Floats: one weight as a quantised checkpoint stores it, in codes with a scale for each group of columns.

Each is given to the kernels with its own codes where their format can hold them, and dequantised elsewhere. Formats of
checkpoints differ only in where they put codes, scales and zeros; see the other files of this folder.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.cpu.packed_weight import E4M3, E4M3_SCALE, GROUP, INT8, PART, Codes, Format, can_pack, quantize_weight
from errors import ModelLoadError

MOVED = 0.25  # of a code's step: how far a scale in float16 may move a weight
ROUNDED = 2**-8  # part of a scale: the rounding of bfloat16, a sixteenth of that of numbers of 8 bits
NOT_A_NUMBER = 127  # the code, but for its sign
SCALE_OF_BITS = 127  # the exponent of 1 in scales that are powers of two, of 8 bits


class StoredWeight(Protocol):
    """A weight, (rows, columns), in the form that its file has."""

    def codes_for_kernels(self) -> Codes | None:
        """Returns the file's own codes; None where the kernels have no format for them."""
        ...

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor: ...

    def in_8_bits(self) -> Codes | None:
        """Returns the weight in 8 bits; None where these would round coarser than the file does."""
        ...


@dataclass(frozen=True)
class Groups:
    """The columns that share a scale."""

    of_columns: torch.Tensor  # (columns,) int64, the number of each column's group

    @classmethod
    def even(cls, num_columns: int, num_groups: int, size: int | None = None) -> "Groups":
        """Returns groups of neighbouring columns. size: columns in one; None: all of the same size."""
        size = size or math.ceil(num_columns / num_groups)
        return cls(torch.arange(num_columns) // size)

    @property
    def of_blocks(self) -> torch.Tensor | None:
        """The number of the group of each block of GROUP columns; None where a block has several."""
        if len(self.of_columns) % GROUP:
            return None
        blocks = self.of_columns.view(-1, GROUP)
        return blocks[:, 0] if bool((blocks == blocks[:, :1]).all()) else None

    def that_have(self, is_there: torch.Tensor, num_groups: int) -> torch.Tensor:
        """Returns (rows, groups) bool: whether a group has one of the columns. is_there: (rows, columns) bool."""
        counts = torch.zeros(len(is_there), num_groups, dtype=torch.int32)
        return counts.index_add_(1, self.of_columns, is_there.int()) > 0


@dataclass(frozen=True)
class Integers:
    """A weight is (code - zero) * scale."""

    bits: int
    codes: torch.Tensor  # (rows, columns) uint8
    scales: torch.Tensor  # (rows, groups) float32
    zeros: torch.Tensor  # (rows, groups) int32
    groups: Groups

    def codes_for_kernels(self) -> Codes | None:
        blocks = self.groups.of_blocks
        if blocks is None:
            return None
        largest, offset = 2**self.bits - 1, 2 ** (self.bits - 1)
        step, scales = self.scales.abs() * MOVED, self.scales
        is_beyond = (scales.half().float() - scales).abs() * largest > step  # what float16 holds
        if bool(is_beyond.any()):
            is_used = self._is_used
            if bool((is_beyond & is_used).any()):
                return None
            scales = scales.masked_fill(~is_used, 0.0)
        if bool((self.zeros == offset).all()):
            return Codes(Format(self.bits, offset=offset), self.codes, scales[:, blocks].half(), None)
        offset = offset if self.bits == INT8.bits else 0  # codes of 8 bits are kept as numbers with a sign
        minimums = (offset - self.zeros) * scales
        if not bool(((minimums.half().float() - minimums).abs() <= step).all()):
            return None
        fmt = Format(self.bits, offset, has_minimum=True)
        return Codes(fmt, self.codes, scales[:, blocks].half(), minimums[:, blocks].half())

    @property
    def _is_used(self) -> torch.Tensor:
        """(rows, groups): whether not all weights of a group are zero, so that its scale counts."""
        is_number = self.codes.int() != self.zeros[:, self.groups.of_columns]
        return self.groups.that_have(is_number, self.scales.shape[1])

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        weight = torch.empty(self.codes.shape, dtype=dtype)
        for rows in _parts(self.codes):
            zeros, scales = (part[rows][:, self.groups.of_columns] for part in (self.zeros, self.scales))
            weight[rows] = ((self.codes[rows].int() - zeros) * scales).to(dtype)
        return weight

    def in_8_bits(self) -> Codes | None:
        numbers = self.dequantize(torch.float32)
        if not can_pack(numbers.shape[1]):
            return None
        codes = quantize_weight(numbers, INT8)
        moved = (codes.dequantize() - numbers).abs()
        return codes if bool((moved <= MOVED * self.scales[:, self.groups.of_columns]).all()) else None


@dataclass(frozen=True)
class Floats:
    """A weight is code * scale, where a code is a number of 8 bits with an exponent of its own."""

    codes: torch.Tensor  # (rows, columns), a type of torch's of 8 bits
    scales: torch.Tensor  # (rows, groups) float32
    groups: Groups

    def codes_for_kernels(self) -> Codes | None:
        blocks, codes = self.groups.of_blocks, self.codes.view(torch.uint8)
        if blocks is None or self.codes.dtype != torch.float8_e4m3fn or bool((codes & 127 == NOT_A_NUMBER).any()):
            return None
        scales = self.scales * E4M3_SCALE
        half = scales.half()
        is_beyond = (half.float() - scales).abs() > scales.abs() * ROUNDED
        if bool(is_beyond.any()):
            is_used = self.groups.that_have(codes & NOT_A_NUMBER != 0, scales.shape[1])
            if bool((is_beyond & is_used).any()):
                return None
            half = half.masked_fill(~is_used, 0.0)  # of groups of zeros, whose scale does not count
        return Codes(E4M3, codes, half[:, blocks], None)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        weight = torch.empty(self.codes.shape, dtype=dtype)
        for rows in _parts(self.codes):
            weight[rows] = (self.codes[rows].float() * self.scales[rows][:, self.groups.of_columns]).to(dtype)
        return weight

    def in_8_bits(self) -> Codes | None:
        return None


def _parts(codes: torch.Tensor) -> list[slice]:
    """Cuts a matrix into rows of about PART numbers."""
    num_rows, step = len(codes), max(1, PART // max(1, codes.shape[1]))
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


def check_bits(bits: int) -> None:
    """Raises ModelLoadError for codes that words of 32 bits are not cut into."""
    if bits not in (2, 4, 8):
        raise ModelLoadError(f"Its weights have {bits} bits, but only 2, 4 and 8 are read: take another checkpoint.")


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Cuts words of 32 bits into codes, the lowest bits first: (rows, words) -> (rows, words * 32 / bits) uint8."""
    check_bits(bits)
    data = words.contiguous().view(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes: torch.Tensor = data[..., None] >> shifts & (2**bits - 1)
    return codes.flatten(1)


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Reads scales that are powers of two, of 8 bits: OCP Microscaling Formats, v1.0, section 5.4.1."""
    return torch.ldexp(torch.ones(exponents.shape, dtype=torch.float32), exponents.int() - SCALE_OF_BITS)


def spread(
    scales: torch.Tensor, shape: tuple[int, ...], block: tuple[int | None, int | None]
) -> tuple[torch.Tensor, Groups]:
    """Gives every row its scales, (rows, groups), and the groups of its columns.

    scales: one, one for each row, or one for each block of rows and columns. shape: the weight's. block: rows and
    columns in a block; None where the shapes say it.
    """
    if len(shape) != 2:
        raise ModelLoadError(
            f"Its weights of all experts are one tensor, {shape}, which is not read: take a checkpoint with a "
            "tensor for each expert."
        )
    rows, columns = shape
    values = powers_of_two(scales) if scales.dtype == torch.uint8 else scales.float()
    values = values.view(-1, 1) if values.ndim < 2 else values
    per_row, per_column = values.shape
    if per_row not in (1, rows):
        values = values.repeat_interleave(block[0] or math.ceil(rows / per_row), dim=0)[:rows]
    size = block[1] if per_column > 1 else None
    num_groups = math.ceil(columns / size) if size else per_column
    if len(values) not in (1, rows) or num_groups != per_column:
        raise ModelLoadError(f"Its scales, {tuple(scales.shape)}, do not fit its weight, {shape}.")
    return values.expand(rows, -1), Groups.even(columns, per_column, size)
