"""PackedWeight: a weight matrix of 1 to 8 bits, or of floats, in the order in which kernels read it.

All that depends on how a format stores its codes is in this file: Format, `pack`, and the two readers, `_codes` in
torch and `read_codes` in a kernel. Every group of 32 (or 16) columns of a row has its own scale, and in some formats a
minimum, as in the blocks of GGUF files, whose codes are kept bit by bit. In GGUF's K formats these are whole numbers,
times a float16 that a super-block of 256 columns shares. In some formats of 4 bits a code is no number, but the place
of one in a table.

A tile is LANES rows, a block is GROUP columns of them. A vector of 64 bytes holds four columns of each row of a tile;
eight such "fours" are a block. Codes of 8 bits take eight vectors. Others are cut into fields, for example 6 bits into
4 and 2: a field of 4 bits takes four vectors, of which each byte holds two codes; one of 2 bits takes two vectors, with
four codes in a byte; one of 1 bit takes one vector. See `fields`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch

from engine.cpu import jit
from engine.cpu.jit import BYTES, I64, INTS, LANES, Builder, constant

GROUP = 32  # columns in a block
SUPER_BLOCK = 256  # columns
TABLE_SIZE = 16  # numbers, as many as one instruction looks up
FOURS = GROUP // 4
PART = 2**22  # numbers of a weight that are rounded at a time; each takes some 20 bytes meanwhile


@dataclass(frozen=True)
class Format:
    """What the codes of a weight mean: a weight is (number - offset) * scale, or number * scale + minimum, where
    `number` is the code itself, or table[code]."""

    bits: int
    offset: int = 0
    has_minimum: bool = False
    group: int = GROUP  # columns that share a scale, and a minimum
    has_super_blocks: bool = False  # scales and minimums are whole numbers, times those of their super-block
    table: tuple[int, ...] = ()  # 16 numbers from 0 to 255; see `of_table`
    is_float: bool = False  # codes are numbers with a sign, 4 bits of exponent and 3 of mantissa; see `numbers`
    dtype_name: str = ""  # of weights that have no codes and no scales, such as float16: the numbers themselves

    @classmethod
    def of_table(cls, values: Sequence[int], **more: Any) -> "Format":
        """Returns the format of 4 bits whose code stands for one of 16 whole numbers, which may be negative."""
        assert len(values) == TABLE_SIZE and max(values) - min(values) < 256 and -128 <= min(values) <= 0
        return cls(4, offset=-min(values), table=tuple(value - min(values) for value in values), **more)

    @property
    def num_scales(self) -> int:
        """The number of scales of a row in a block."""
        return GROUP // self.group

    @property
    def is_quantized(self) -> bool:
        return not self.dtype_name

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers of a weight that has no codes."""
        return cast(torch.dtype, getattr(torch, self.dtype_name))

    @property
    def input_dtype(self) -> torch.dtype:
        """The type of the activations that such a weight is multiplied with."""
        if self.is_quantized:
            return torch.int8
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    @property
    def fields(self) -> list[tuple[int, int]]:
        """The parts that a code is cut into, as (first bit, width), such as [(0, 4), (4, 2)] for 6 bits.

        A field's vectors come in the same order, so `first bit` is also the number of its first vector, and `width`
        the number of its vectors. Of these, number i % width has the fours i, from its bit i // width * width on.
        """
        widths = [width for width in (8, 4, 2, 1) if self.bits & width]
        return [(sum(widths[:index]), width) for index, width in enumerate(widths)]

    @property
    def block_bytes(self) -> int:
        return LANES * GROUP * self.bits // 8

    @property
    def bytes_per_weight(self) -> float:
        """Memory of a weight and its part of the scales."""
        if not self.is_quantized:
            return self.bits / 8
        num_factors, per_factor = 1 + self.has_minimum, 2 / self.group
        if self.has_super_blocks:
            per_factor = 1 / self.group + 2 / SUPER_BLOCK
        return self.bits / 8 + num_factors * per_factor


INT8 = Format(8, offset=128)
INT4 = Format(4, has_minimum=True)
BFLOAT16 = Format(16, dtype_name="bfloat16")
FLOATS = {  # the formats without codes, those with fewer bits first
    torch.bfloat16: BFLOAT16,
    torch.float16: Format(16, dtype_name="float16"),
    torch.float32: Format(32, dtype_name="float32"),
}
Q2_K = Format(2, has_minimum=True, group=16, has_super_blocks=True)
Q3_K = Format(3, offset=4, group=16, has_super_blocks=True)
E4M3 = Format(8, is_float=True)  # https://arxiv.org/abs/2209.05433; the scales are 256 times those of such numbers
E4M3_SCALE = 256
Q4_K = Format(4, has_minimum=True, has_super_blocks=True)
Q5_K = Format(5, has_minimum=True, has_super_blocks=True)
Q6_K = Format(6, offset=32, group=16, has_super_blocks=True)
Q4_K_M = (Q4_K, Format(5, offset=16), Q6_K)  # what such files consist of, beside INT8


def format_of(bits: int) -> Format:
    """Returns the format that this server rounds weights to. Few codes are spread over a group's own range, from its
    minimum on; 8 bits are enough to be spread evenly around zero."""
    if bits == BFLOAT16.bits:
        return BFLOAT16
    return INT8 if bits == INT8.bits else Format(bits, has_minimum=True)


class Codes(NamedTuple):
    """A weight matrix in its format, not yet in the kernels' order."""

    format: Format
    codes: torch.Tensor  # (rows, columns) uint8
    scales: torch.Tensor  # (rows, columns / format.group), int8 in super-blocks
    minimums: torch.Tensor | None  # the same
    supers: torch.Tensor | None = None  # (rows, columns / SUPER_BLOCK, 1 or 2): factors of the scales and the minimums

    def dequantize(self) -> torch.Tensor:
        """Returns the weights, (rows, columns) in float32."""
        rows, columns = self.codes.shape
        fmt = self.format
        grouped = self._numbers.view(rows, -1, fmt.group)
        weight = (grouped * self._times_super(self.scales, 0)[..., None]).view(rows, columns)
        if self.minimums is not None:
            weight += self._times_super(self.minimums, 1).repeat_interleave(fmt.group, dim=1)
        return weight

    @property
    def _numbers(self) -> torch.Tensor:
        """What the codes stand for, without their scales, in float32."""
        fmt = self.format
        if fmt.is_float:
            return float_codes(self.codes)
        table = torch.tensor(fmt.table, dtype=torch.uint8, device=self.codes.device)
        return (table[self.codes.int()] if fmt.table else self.codes).float() - fmt.offset

    def _times_super(self, values: torch.Tensor, index: int) -> torch.Tensor:
        if self.supers is None:
            return values.float()
        per_super = values.shape[1] // self.supers.shape[1]
        return values.float() * self.supers[..., index].float().repeat_interleave(per_super, dim=1)

    def select(self, rows: torch.Tensor) -> "Codes":
        """Returns some rows. rows: their numbers."""
        minimums, supers = (None if part is None else part[rows] for part in (self.minimums, self.supers))
        return Codes(self.format, self.codes[rows], self.scales[rows], minimums, supers)


def float_codes(codes: torch.Tensor) -> torch.Tensor:
    """Returns the numbers that codes of E4M3 stand for, divided by 256: the bits of a float16, but for its exponent's
    highest. codes: uint8."""
    return (codes.view(torch.int8).short() << 7 & ~(1 << 14)).view(torch.float16).float()


def concatenated(parts: list[Codes]) -> Codes:
    """Joins the rows of weights of one format."""

    def joined(values: list[torch.Tensor | None]) -> torch.Tensor | None:
        present = [value for value in values if value is not None]
        return torch.cat(present) if present else None

    scales = torch.cat([part.scales for part in parts])
    minimums, supers = joined([part.minimums for part in parts]), joined([part.supers for part in parts])
    return Codes(parts[0].format, torch.cat([part.codes for part in parts]), scales, minimums, supers)


PARTS = ("quants", "scales", "minimums", "supers")


@dataclass(frozen=True)
class PackedWeight:
    """A weight matrix in the kernels' order: tiles = rows / LANES, blocks = columns / GROUP. The rows are padded with
    zeros to whole tiles."""

    format: Format
    num_rows: int
    quants: torch.Tensor  # (tiles, blocks, block_bytes) uint8
    scales: torch.Tensor  # (tiles, blocks, num_scales, LANES) float16, int8 in super-blocks
    minimums: torch.Tensor | None = None  # the same
    supers: torch.Tensor | None = None  # (tiles, super-blocks, 1 or 2, LANES) float16

    @property
    def num_columns(self) -> int:
        return self.quants.shape[1] * GROUP

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that the format has, by their names."""
        tensors = {name: getattr(self, name) for name in PARTS}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """The address of each of PARTS; 0 for what the format lacks."""
        parts = self.parts
        return tuple(parts[name].data_ptr() if name in parts else 0 for name in PARTS)

    def tiles(self, start: int, num_rows: int) -> "PackedWeight":
        """Returns a view of `num_rows` rows from tile `start` on."""
        stop = start - (-num_rows // LANES)
        return PackedWeight(self.format, num_rows, **{name: part[start:stop] for name, part in self.parts.items()})

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Returns the weights of some rows, (len(index), columns), in float32."""
        tile, lane = index // LANES, index % LANES
        if not self.format.is_quantized:
            numbers = self.quants.view(self.format.dtype).unflatten(-1, (-1, LANES, _together(self.format.dtype)))
            chosen: torch.Tensor = numbers[tile, :, :, lane]
            return chosen.reshape(len(index), -1).float()
        codes = self._codes(self.quants[tile], lane)
        scales = self.scales[tile, :, :, lane].flatten(1)
        minimums = None if self.minimums is None else self.minimums[tile, :, :, lane].flatten(1)
        supers = None if self.supers is None else self.supers[tile, :, :, lane]
        return Codes(self.format, codes, scales, minimums, supers).dequantize()

    def dequantize(self) -> torch.Tensor:
        """Returns all weights, (rows, columns) in float32."""
        return self.rows(torch.arange(self.num_rows))

    def unpack(self) -> Codes:
        """Returns a quantised weight in the order of its rows and columns, on its own device."""
        tiles, blocks, _ = self.quants.shape
        vectors = self.quants.view(tiles, blocks, -1, LANES, 4)
        codes = self.quants.new_zeros(tiles, blocks, FOURS, LANES, 4)
        for first, width in self.format.fields:
            shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device).view(-1, 1, 1, 1)
            field = vectors[:, :, None, first : first + width] >> shifts & (2**width - 1)
            codes |= field.flatten(2, 3) << first
        rows = {name: part.movedim(-1, 1).flatten(0, 1)[: self.num_rows] for name, part in self.parts.items()}
        return Codes(
            format=self.format,
            codes=codes.permute(0, 3, 1, 2, 4).reshape(tiles * LANES, -1)[: self.num_rows],
            scales=rows["scales"].flatten(1),
            minimums=rows["minimums"].flatten(1) if "minimums" in rows else None,
            supers=rows.get("supers"),
        )

    def to(self, device: torch.device) -> "PackedWeight":
        return PackedWeight(self.format, self.num_rows, **{name: part.to(device) for name, part in self.parts.items()})

    def _codes(self, quants: torch.Tensor, lane: torch.Tensor) -> torch.Tensor:
        """quants: (rows, blocks, block_bytes), of which each row needs one lane -> its codes, (rows, columns)."""
        rows, blocks, _ = quants.shape
        vectors = quants.view(rows, blocks, -1, LANES, 4)[torch.arange(rows), :, :, lane]  # (rows, blocks, vectors, 4)
        codes = torch.zeros(rows, blocks, FOURS, 4, dtype=torch.uint8)
        for first, width in self.format.fields:
            shifts = torch.arange(0, 8, width, dtype=torch.uint8).view(-1, 1, 1)
            field = vectors[:, :, None, first : first + width] >> shifts & (2**width - 1)
            codes |= field.flatten(2, 3) << first
        return codes.reshape(rows, -1)


def can_pack(num_columns: int) -> bool:
    return num_columns % GROUP == 0


def pack(weight: Codes) -> PackedWeight:
    """Puts sixteen rows side by side, so that a vector holds four columns of each; one field after the other."""
    num_rows, columns = weight.codes.shape
    tiles, blocks, fmt = -(-num_rows // LANES), columns // GROUP, weight.format
    fours = _padded(weight.codes).view(tiles, LANES, blocks, FOURS, 4).permute(0, 2, 3, 1, 4)
    parts = []
    for first, width in fmt.fields:
        field = (fours >> first & (2**width - 1)).unflatten(2, (-1, width))  # (tiles, blocks, 8 / width, width, ...)
        shifts = torch.arange(0, 8, width, dtype=torch.uint8).view(-1, 1, 1, 1)
        parts.append((field << shifts).sum(2, dtype=torch.uint8).reshape(tiles, blocks, -1))
    quants = torch.cat(parts, dim=-1)
    factors = {name: getattr(weight, name) for name in PARTS[1:]}
    side_by_side = {
        name: _side_by_side(values.view(num_rows, -1, values.shape[-1] if name == "supers" else fmt.num_scales))
        for name, values in factors.items()
        if values is not None
    }
    return PackedWeight(fmt, num_rows, quants, **side_by_side)


def _side_by_side(values: torch.Tensor) -> torch.Tensor:
    """Orders scales by tiles: (rows, ...) -> (tiles, ..., LANES), whole numbers as they are, others in float16."""
    tiles: torch.Tensor = _padded(values).unflatten(0, (-1, LANES)).movedim(1, -1)
    return (tiles if values.dtype == torch.int8 else tiles.half()).contiguous()


def read_codes(b: Builder, fmt: Format, start: jit.Value) -> list[jit.Value]:
    """Returns the numbers of a tile's block at address `start`: eight vectors of bytes, each with four columns of the
    16 rows. Their format's offset is not yet subtracted."""
    codes: list[jit.Value] = [constant(BYTES, 0)] * FOURS
    for first, width in fmt.fields:
        vectors = [b.bitcast(b.read(BYTES, b.add(start, I64(64 * (first + i)))), INTS) for i in range(width)]
        for four in range(FOURS):
            shift = four // width * width - first  # from the bit in the vector to the bit in the code
            bits = vectors[four % width]
            moved = b.lshr(bits, constant(INTS, shift)) if shift >= 0 else b.shl(bits, constant(INTS, -shift))
            field = b.and_(b.bitcast(moved, BYTES), constant(BYTES, (2**width - 1) << first))
            codes[four] = b.or_(codes[four], field)
    return [b.look_up(fmt.table, code) for code in codes] if fmt.table else codes


def pack_floats(weight: torch.Tensor) -> PackedWeight:
    """Puts sixteen rows side by side, in the weight's own type. weight: (rows, columns) of a type in FLOATS."""
    num_rows, columns = weight.shape
    together = _together(weight.dtype)
    numbers = _padded(weight).view(-1, LANES, columns // GROUP, GROUP // together, together).permute(0, 2, 3, 1, 4)
    return PackedWeight(
        format=FLOATS[weight.dtype],
        num_rows=num_rows,
        quants=numbers.contiguous().flatten(2).view(torch.uint8),
        scales=torch.empty(0, 0, 1, LANES, dtype=torch.float32),
    )


def _together(dtype: torch.dtype) -> int:
    """Returns how many columns of a row are side by side: instructions multiply pairs of bfloat16."""
    return 2 if dtype == torch.bfloat16 else 1


def narrowest(values: torch.Tensor) -> torch.Tensor:
    """Returns numbers in the type of FLOATS with the fewest bits that has all of them exactly."""
    for dtype in FLOATS:
        if torch.equal(values.to(dtype).float(), values.float()):
            return values.to(dtype)
    return values  # they are not all numbers


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """Adds zeros to whole tiles. rows: (rows, ...)."""
    return torch.cat([rows, rows.new_zeros(-rows.shape[0] % LANES, *rows.shape[1:])])


def quantize_weight(weight: torch.Tensor, fmt: Format) -> Codes:
    """Rounds a weight, (rows, columns), to the nearest codes. For a format with minimums, it tries several ranges for
    each group and keeps the one with the least error."""
    grouped = weight.float().view(weight.shape[0], -1, fmt.group)
    if not fmt.has_minimum:
        scales = (grouped.abs().amax(-1) / (fmt.offset - 1)).half()
        steps = grouped / scales.float().clamp(min=1e-12)[..., None]
        codes = (steps.round() + fmt.offset).clamp(0, 2**fmt.bits - 1)
        return Codes(fmt, codes.to(torch.uint8).view(weight.shape), scales, None)
    low, high = grouped.amin(-1), grouped.amax(-1)
    best = _affine(grouped, low, high, fmt)
    least = _squared_error(grouped, *best)
    for shrink in (0.95, 0.9, 0.85):  # a narrower range: outliers are cut, all others lie on a finer grid
        other = _affine(grouped, low * shrink, high * shrink, fmt)
        error = _squared_error(grouped, *other)
        better = error < least
        least = torch.where(better, error, least)
        best = (
            torch.where(better[..., None], other[0], best[0]),
            torch.where(better, other[1], best[1]),
            torch.where(better, other[2], best[2]),
        )
    return Codes(fmt, best[0].to(torch.uint8).view(weight.shape), best[1], best[2])


def round_and_pack(weight: torch.Tensor, fmt: Format, part: int = PART) -> PackedWeight:
    """Rounds a weight, (rows, columns), and puts it in the kernels' order, about `part` numbers at a time: rounding
    takes many times the memory of the result."""
    num_rows, columns = weight.shape
    step = max(1, part // columns // LANES) * LANES
    whole: dict[str, torch.Tensor] = {}
    for start in range(0, num_rows, step):
        packed = pack(quantize_weight(weight[start : start + step], fmt))
        for name, tensor in packed.parts.items():
            if name not in whole:
                whole[name] = tensor.new_empty(-(-num_rows // LANES), *tensor.shape[1:])
            whole[name][start // LANES : start // LANES + len(tensor)] = tensor
    return PackedWeight(fmt, num_rows, **whole)


def _affine(
    grouped: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fmt: Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    largest_code = 2**fmt.bits - 1
    scales, minimums = ((high - low) / largest_code).half(), low.half()
    steps = (grouped - minimums.float()[..., None]) / scales.float().clamp(min=1e-12)[..., None]
    return steps.round_().clamp_(0, largest_code), scales, minimums


def _squared_error(
    grouped: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor
) -> torch.Tensor:
    rounded = torch.addcmul(minimums.float()[..., None], codes, scales.float()[..., None])
    return (rounded - grouped).square_().sum(-1)
