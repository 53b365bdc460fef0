"""GPUWeight: a weight matrix in 2 to 8 bits, in the order in which GPU kernels read it, row by row.

What codes mean is Format's matter, in engine/cpu/packed_weight.py. Here a row is cut into chunks of a few groups of
columns. A vector holds a byte for each column of a group. Codes of 8 bits take a vector for a group; others are cut
into fields, for example 6 bits into 4 and 2, and a vector of 4-bit fields holds those of two groups of the chunk. So a
kernel that takes a chunk group by group shifts whole vectors, and needs one scale for each. See `place_of`.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from engine.cpu.packed_weight import PART, Codes, Format, quantize_weight

SHARED = (4, 2)  # groups that may have a scale in common: in many files 128 columns do


@dataclass(frozen=True)
class GPUWeight:
    """A weight, (rows, columns), on any device. The columns are padded with zeros to whole chunks."""

    format: Format
    num_columns: int
    quants: torch.Tensor  # (rows, chunks, vectors, format.group) uint8
    scales: torch.Tensor  # (rows, groups / groups_per_scale) float16, int8 in super-blocks
    minimums: torch.Tensor | None = None  # the same
    supers: torch.Tensor | None = None  # (rows, super-blocks, 1 or 2) float16
    groups_per_scale: int = 1
    table: torch.Tensor | None = None  # (16,) float32, the numbers that codes stand for, where the format has a table

    @property
    def num_rows(self) -> int:
        return len(self.quants)

    @property
    def num_chunks(self) -> int:
        return self.quants.shape[1]

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """The tensors that the format has."""
        return tuple(t for t in (self.quants, self.scales, self.minimums, self.supers) if t is not None)

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def kind(self) -> tuple[object, ...]:
        """What weights have in common whose rows can be joined."""
        return self.format, self.num_columns, self.groups_per_scale, self.quants.device

    def rows(self, start: int, end: int) -> "GPUWeight":
        """Returns a view of some rows."""
        minimums, supers = (None if part is None else part[start:end] for part in (self.minimums, self.supers))
        quants, scales = self.quants[start:end], self.scales[start:end]
        return replace(self, quants=quants, scales=scales, minimums=minimums, supers=supers)


def unpack(weight: GPUWeight) -> Codes:
    """Returns a weight in the order of its rows and columns: what `pack` was given."""
    fmt, num_groups = weight.format, groups_of(weight.format)
    groups = []
    for group in range(num_groups):
        places = [(*place_of(fmt, group, first, width), first, width) for first, width in fmt.fields]
        fields = [(weight.quants[:, :, v] >> shift & 2**width - 1) << first for v, shift, first, width in places]
        groups.append(functools.reduce(torch.bitwise_or, fields))
    codes = torch.stack(groups, dim=2).flatten(1)[:, : weight.num_columns]
    per_row = weight.num_columns // fmt.group
    scales, minimums = (
        None if part is None else part.repeat_interleave(weight.groups_per_scale, dim=1)[:, :per_row]
        for part in (weight.scales, weight.minimums)
    )
    assert scales is not None
    return Codes(fmt, codes, scales, minimums, weight.supers)


def groups_of(fmt: Format) -> int:
    """Returns the groups of columns in a chunk: as many as the codes of which a byte holds the narrowest field."""
    return 8 // min(width for _, width in fmt.fields)


def place_of(fmt: Format, group: int, first: int, width: int) -> tuple[int, int]:
    """Returns the vector of a chunk that has a field of the codes of a group, and the field's first bit in its bytes.

    first, width: the field's first bit in a code, and its bits; see Format.fields.
    """
    num_vectors = width * groups_of(fmt) // 8
    return first * groups_of(fmt) // 8 + group % num_vectors, group // num_vectors * width


def pack(weight: Codes) -> GPUWeight:
    """Orders a weight's codes on their own device."""
    fmt, (rows, columns) = weight.format, weight.codes.shape
    size = groups_of(fmt) * fmt.group
    codes = _padded(weight.codes, -(-columns // size) * size).view(rows, -1, groups_of(fmt), fmt.group)
    vectors: dict[int, torch.Tensor] = {}
    for first, width in fmt.fields:
        for group in range(groups_of(fmt)):
            vector, shift = place_of(fmt, group, first, width)
            field = (codes[:, :, group] >> first & 2**width - 1) << shift
            vectors[vector] = vectors[vector] | field if vector in vectors else field
    num_groups = codes.shape[1] * groups_of(fmt)
    factors = [None if f is None else _factors(f, num_groups) for f in (weight.scales, weight.minimums)]
    shared = next((n for n in SHARED if all(f is None or _is_shared(f, n) for f in factors)), 1)
    scales, minimums = (None if factor is None else factor[:, ::shared].contiguous() for factor in factors)
    assert scales is not None
    return GPUWeight(
        format=fmt,
        num_columns=columns,
        quants=torch.stack([vectors[number] for number in sorted(vectors)], dim=2),
        scales=scales,
        minimums=minimums,
        supers=None if weight.supers is None else weight.supers.half().contiguous(),
        groups_per_scale=shared,
        table=torch.tensor(fmt.table, dtype=torch.float32, device=codes.device) if fmt.table else None,
    )


def round_and_pack(weight: torch.Tensor, fmt: Format, part: int = PART) -> GPUWeight:
    """Rounds a weight, (rows, columns), and orders its codes, about `part` numbers at a time."""
    step = max(1, part // weight.shape[1])
    return joined([pack(quantize_weight(rows, fmt)) for rows in weight.split(step)])


def joined(weights: list[GPUWeight]) -> GPUWeight:
    """Joins the rows of weights of one kind, but for the groups that share a scale."""
    least = min(weight.groups_per_scale for weight in weights)
    alike = [_spread(weight, least) for weight in weights]
    quants, scales, minimums, supers = (
        None if parts[0] is None else torch.cat(parts)
        for parts in zip(*((w.quants, w.scales, w.minimums, w.supers) for w in alike), strict=True)
    )
    assert quants is not None and scales is not None
    return replace(alike[0], quants=quants, scales=scales, minimums=minimums, supers=supers)


def split(weight: GPUWeight, sizes: list[int]) -> Iterator[GPUWeight]:
    """Yields views of neighbouring rows. sizes: the numbers of rows."""
    start = 0
    for size in sizes:
        yield weight.rows(start, start + size)
        start += size


def _spread(weight: GPUWeight, groups_per_scale: int) -> GPUWeight:
    times = weight.groups_per_scale // groups_per_scale
    scales, minimums = (
        None if part is None else part.repeat_interleave(times, dim=1) for part in (weight.scales, weight.minimums)
    )
    assert scales is not None
    return replace(weight, scales=scales, minimums=minimums, groups_per_scale=groups_per_scale)


def _factors(values: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Returns scales or minimums for all groups, whole numbers as they are, others in float16."""
    return _padded(values if values.dtype == torch.int8 else values.half(), num_groups)


def _is_shared(factors: torch.Tensor, groups: int) -> bool:
    """Returns whether so many neighbouring groups have the same factor."""
    if factors.dtype == torch.int8 or factors.shape[1] % groups:
        return False
    first = factors[:, ::groups]
    return all(torch.equal(factors[:, other::groups], first) for other in range(1, groups))


def _padded(values: torch.Tensor, columns: int) -> torch.Tensor:
    """Adds zeros to so many columns. values: (rows, any)."""
    return torch.nn.functional.pad(values, (0, columns - values.shape[1])) if values.shape[1] < columns else values
