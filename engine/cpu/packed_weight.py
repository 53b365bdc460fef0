"""PackedWeight: a weight matrix of 4 to 8 bits, or bfloat16, in the order kernels read it; how it is made.

It knows no kernels and no models. Every group of 32 (or 16) columns of a row has a scale of its own, and in some
formats a minimum, as in the blocks of GGUF files: their codes are kept bit by bit.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

LANES = 16  # rows side by side, one in each lane of a vector
GROUP = 32  # columns in a block


@dataclass(frozen=True)
class Format:
    """A weight is (code - offset) * scale, or code * scale + minimum."""

    bits: int
    offset: int = 0
    has_minimum: bool = False
    group: int = GROUP  # columns that share a scale

    @property
    def num_scales(self) -> int:
        """For each row of a block."""
        return GROUP // self.group

    @property
    def is_quantized(self) -> bool:
        return self.bits < 16

    @property
    def num_planes(self) -> int:
        """Bits of a code beyond four, each stored in a plane of its own."""
        return 0 if self.bits >= 8 else self.bits - 4

    @property
    def block_bytes(self) -> int:
        return LANES * GROUP * self.bits // 8  # whole bytes, or nibbles and planes of bits


INT8 = Format(8, offset=128)
INT4 = Format(4, has_minimum=True)
BFLOAT16 = Format(16)  # no codes and no scales: the numbers themselves
Q4_K_M = (INT4, Format(5, offset=16), Format(6, offset=32, group=16))  # what such files consist of, beside INT8


class Codes(NamedTuple):
    """A weight matrix in its format, not yet in the kernels' order."""

    format: Format
    codes: torch.Tensor  # (rows, columns) uint8
    scales: torch.Tensor  # (rows, columns / format.group)
    minimums: torch.Tensor | None  # (rows, columns / GROUP)

    def dequantize(self) -> torch.Tensor:
        """(rows, columns) in float32."""
        rows, columns = self.codes.shape
        grouped = self.codes.view(rows, -1, self.format.group).float() - self.format.offset
        weight = (grouped * self.scales.float()[..., None]).view(rows, columns)
        if self.minimums is not None:
            weight += self.minimums.float().repeat_interleave(GROUP, dim=1)
        return weight


@dataclass(frozen=True)
class PackedWeight:
    """tiles = rows / LANES, blocks = columns / GROUP; the rows are padded with zeros to whole tiles."""

    format: Format
    num_rows: int
    quants: torch.Tensor  # (tiles, blocks, block_bytes) uint8
    scales: torch.Tensor  # (tiles, blocks, num_scales, LANES) float16
    minimums: torch.Tensor | None  # (tiles, blocks, LANES) float16

    @property
    def num_columns(self) -> int:
        return self.quants.shape[1] * GROUP

    @cached_property
    def addresses(self) -> tuple[int, int, int]:
        """Of quants, scales and minimums; 0 where there are none."""
        minimums = 0 if self.minimums is None else self.minimums.data_ptr()
        return self.quants.data_ptr(), self.scales.data_ptr(), minimums

    @property
    def num_bytes(self) -> int:
        parts = (self.quants, self.scales, *([] if self.minimums is None else [self.minimums]))
        return sum(part.numel() * part.element_size() for part in parts)

    def tiles(self, start: int, num_rows: int) -> "PackedWeight":
        """Its rows from tile `start` on, as a view."""
        part = slice(start, start - (-num_rows // LANES))
        minimums = None if self.minimums is None else self.minimums[part]
        return PackedWeight(self.format, num_rows, self.quants[part], self.scales[part], minimums)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The weights of some rows, (len(index), columns), in float32."""
        tile, lane = index // LANES, index % LANES
        if not self.format.is_quantized:
            pairs = self.quants.view(torch.bfloat16).view(*self.quants.shape[:2], -1, LANES, 2)
            return pairs[tile, :, :, lane].reshape(len(index), -1).float()
        codes = self._codes(self.quants[tile], lane)
        scales = self.scales[tile, :, :, lane].flatten(1)
        minimums = None if self.minimums is None else self.minimums[tile, :, lane]
        return Codes(self.format, codes, scales, minimums).dequantize()

    def dequantize(self) -> torch.Tensor:
        """(rows, columns) in float32."""
        return self.rows(torch.arange(self.num_rows))

    def _codes(self, quants: torch.Tensor, lane: torch.Tensor) -> torch.Tensor:
        """(rows, blocks, block_bytes), of which each row wants one lane -> (rows, columns)."""
        rows, blocks, _ = quants.shape
        each = torch.arange(rows)
        parts = quants.view(rows, blocks, -1, LANES, 4)[each, :, :, lane]  # (rows, blocks, vectors, 4)
        if self.format.bits == 8:
            return parts.reshape(rows, -1)
        low = parts[:, :, :4]
        codes = torch.cat([low & 15, low >> 4], dim=2)  # (rows, blocks, 8 fours, 4)
        shifts = torch.arange(8, dtype=torch.uint8)[:, None]
        for plane in range(self.format.num_planes):
            codes |= ((parts[:, :, 4 + plane, None] >> shifts) & 1) << (4 + plane)
        return codes.reshape(rows, -1)


def can_pack(num_columns: int) -> bool:
    return num_columns % GROUP == 0


def pack(weight: Codes) -> PackedWeight:
    """Sixteen rows side by side, so that a vector holds four columns of each; the fifth and sixth bits after."""
    num_rows, columns = weight.codes.shape
    tiles, blocks, fmt = -(-num_rows // LANES), columns // GROUP, weight.format
    fours = _padded(weight.codes).view(tiles, LANES, blocks, 8, 4).permute(0, 2, 3, 1, 4)
    if fmt.bits == 8:
        quants = fours.reshape(tiles, blocks, -1).contiguous()
    else:
        low = fours & 15
        parts = [(low[:, :, :4] | low[:, :, 4:] << 4).reshape(tiles, blocks, -1)]
        for plane in range(fmt.num_planes):
            bits = fours >> (4 + plane) & 1
            shifted = bits << torch.arange(8, dtype=torch.uint8).view(8, 1, 1)
            parts.append(shifted.sum(2, dtype=torch.uint8).reshape(tiles, blocks, -1))
        quants = torch.cat(parts, dim=-1)
    scales = _padded(weight.scales).view(tiles, LANES, blocks, fmt.num_scales).permute(0, 2, 3, 1)
    minimums = None
    if weight.minimums is not None:
        minimums = _padded(weight.minimums).view(tiles, LANES, blocks).permute(0, 2, 1).half().contiguous()
    return PackedWeight(fmt, num_rows, quants, scales.half().contiguous(), minimums)


def pack_bfloat16(weight: torch.Tensor) -> PackedWeight:
    """weight: (rows, columns) bfloat16. Sixteen rows side by side, two columns of each in a lane."""
    num_rows, columns = weight.shape
    pairs = _padded(weight).view(-1, LANES, columns // GROUP, GROUP // 2, 2).permute(0, 2, 3, 1, 4).contiguous()
    return PackedWeight(BFLOAT16, num_rows, pairs.flatten(2).view(torch.uint8), torch.empty(0, 0, 1, LANES), None)


def _padded(rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[0] % LANES))


def quantize_weight(weight: torch.Tensor, fmt: Format) -> Codes:
    """(rows, columns) to the nearest codes; with a minimum, the range of each group that gives the least error."""
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


def _affine(
    grouped: torch.Tensor, low: torch.Tensor, high: torch.Tensor, fmt: Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    most = 2**fmt.bits - 1
    scales, minimums = ((high - low) / most).half(), low.half()
    steps = (grouped - minimums.float()[..., None]) / scales.float().clamp(min=1e-12)[..., None]
    return steps.round_().clamp_(0, most), scales, minimums


def _squared_error(
    grouped: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor
) -> torch.Tensor:
    rounded = torch.addcmul(minimums.float()[..., None], codes, scales.float()[..., None])
    return (rounded - grouped).square_().sum(-1)
