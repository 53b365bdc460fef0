"""Products with packed weights on GPUs, y = x W^T + b, by kernels in Triton that dequantise in registers.

For a token or two a program multiplies a few rows of the weight number by number: reading the weight takes all the
time. For more tokens a program takes a tile of tokens and one of rows, and the tensor cores multiply them; where there
are too few tiles to fill the device, the columns are divided into parts, which a second kernel adds up. For a long
prompt that would dequantise a weight many times: so it is dequantised once, some rows at a time, and torch multiplies.
From how many tokens on each way is the faster one is measured at the start, see product_limits.py.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from engine.cpu.packed_weight import SUPER_BLOCK
from engine.gpu.packed_weight import GPUWeight, groups_of

DEQUANTISED = 2**26  # numbers of a weight that are dequantised at a time
MAX_PARTS = 16
PROGRAMS_PER_PROCESSOR = 2  # columns are divided into parts until there are so many
FEWEST_PASSES = 4  # of a part
INTERPRETED_ROWS = 512


def _same(value: tl.tensor) -> tl.tensor:
    return value


IS_INTERPRETED = not isinstance(triton.jit(_same), triton.JITFunction)  # on the CPU, by TRITON_INTERPRET=1


@dataclass(frozen=True)
class Tiles:
    """What one program computes."""

    tokens: int
    rows: int
    depth: int  # columns that are multiplied at a time, in whole groups
    warps: int = 4
    stages: int = 3  # passes whose weights are loaded ahead
    most_groups: int = 8  # of a chunk: what more of them need does not fit into the registers


# Their state is in registers, as ptxas says for compute capability 8.0 and 9.0; see tests/test_triton_compiles.py
ONE_TOKEN = Tiles(tokens=1, rows=4, depth=512)
SEVERAL_TOKENS = (  # the first one that holds all tokens, else the last
    Tiles(tokens=16, rows=32, depth=64),
    Tiles(tokens=32, rows=64, depth=32),
    Tiles(tokens=64, rows=64, depth=32, warps=8, most_groups=2),
)
DEQUANTISING = Tiles(tokens=1, rows=8, depth=128)


def multiply_numbers(
    x: torch.Tensor,
    weight: GPUWeight,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    tiles: Tiles | None = None,
) -> None:
    """Computes a product number by number. x: (tokens, columns); output: (tokens, rows), whose rows may be apart."""
    tiles = tiles or _usual(ONE_TOKEN)
    _numbers[len(x), triton.cdiv(weight.num_rows, tiles.rows)](
        *(x, output, bias, *_tensors(weight), weight.num_rows, weight.num_columns, weight.num_chunks),
        *(x.stride(0), output.stride(0)),
        ROWS=tiles.rows,
        CHUNKS=_chunks(weight, tiles),
        **_meaning(weight),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def multiply_tiles(
    x: torch.Tensor,
    weight: GPUWeight,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    starts: torch.Tensor | None = None,
    num_parts: int | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Computes a product by tiles, as `multiply_numbers`.

    starts: (experts + 1,) int32, where the tokens of each expert begin; the weight then has the rows of all experts,
    and the output those of one. num_parts: the number of parts that the columns are divided into; None: as many as fill
    the device. tiles: None chooses them by the number of tokens.
    """
    num_experts = 1 if starts is None else len(starts) - 1
    num_rows = weight.num_rows // num_experts
    tiles = tiles or _usual(tiles_for(weight, -(-len(x) // num_experts)))
    chunks = _chunks(weight, tiles)
    grid = len(x) // tiles.tokens + num_experts, triton.cdiv(num_rows, tiles.rows)
    num_passes = triton.cdiv(weight.num_chunks, chunks)
    if num_parts is None:
        num_parts = parts_of(min(grid[0], len(x)) * grid[1], num_passes, num_processors(x.device))
    partial = output
    if num_parts > 1:
        partial = torch.empty(num_parts, len(x), num_rows, dtype=torch.float32, device=x.device)
    _tiles[(*grid, num_parts)](
        *(x, partial, bias if num_parts == 1 else None, *_tensors(weight), starts),
        *(num_rows, weight.num_columns, weight.num_chunks, len(x), num_experts, triton.cdiv(num_passes, num_parts)),
        *(x.stride(0), partial.stride(-2), partial.stride(0) if num_parts > 1 else 0),
        TOKENS=tiles.tokens,
        ROWS=tiles.rows,
        CHUNKS=chunks,
        PRECISION="tf32x3",  # for float32 alone
        WIDENS=IS_INTERPRETED and x.dtype == torch.bfloat16,
        **_meaning(weight),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if num_parts > 1:
        size = 256
        _total[len(x), triton.cdiv(num_rows, size)](
            *(partial, output, bias, num_parts, len(x), num_rows, output.stride(0)), SIZE=size
        )


def multiply_dequantised(x: torch.Tensor, weight: GPUWeight, bias: torch.Tensor | None, output: torch.Tensor) -> None:
    """Computes a product as `multiply_numbers`, by torch."""
    for start, part in _dequantised_parts(weight, x.dtype):
        rows = slice(start, start + len(part))
        if bias is None:
            torch.mm(x, part.T, out=output[:, rows])
        else:
            torch.addmm(bias[rows], x, part.T, out=output[:, rows])


def dequantised(weight: GPUWeight, dtype: torch.dtype, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the numbers of a weight, (rows, columns) of `dtype`. ids: (any,), the rows that are wanted; None: all."""
    num_rows, tiles = weight.num_rows if ids is None else len(ids), _usual(DEQUANTISING)
    output = torch.empty(num_rows, weight.num_columns, dtype=dtype, device=weight.quants.device)
    chunks = _chunks(weight, tiles)
    _dequantise[triton.cdiv(num_rows, tiles.rows), triton.cdiv(weight.num_chunks, chunks)](
        *(output, ids, *_tensors(weight), num_rows, weight.num_columns, weight.num_chunks),
        ROWS=tiles.rows,
        CHUNKS=chunks,
        **_meaning(weight),
        num_warps=tiles.warps,
    )
    return output


def tiles_for(weight: GPUWeight, num_tokens: int) -> Tiles:
    """Returns the tiles for so many tokens."""
    able = [tiles for tiles in SEVERAL_TOKENS if groups_of(weight.format) <= tiles.most_groups]
    return next((tiles for tiles in able if tiles.tokens >= num_tokens), able[-1])


def _usual(tiles: Tiles) -> Tiles:
    """Returns what a device takes: Triton's interpreter few large programs, which take it as long as small ones."""
    return replace(tiles, rows=INTERPRETED_ROWS) if IS_INTERPRETED else tiles


def parts_of(num_programs: int, num_passes: int, num_processors: int) -> int:
    """Returns the number of parts that fills the device, of at least FEWEST_PASSES passes each."""
    enough = PROGRAMS_PER_PROCESSOR * num_processors // num_programs
    return max(1, min(enough, num_passes // FEWEST_PASSES, MAX_PARTS))


@functools.cache
def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _dequantised_parts(weight: GPUWeight, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    step = max(1, DEQUANTISED // weight.num_columns)
    for start in range(0, weight.num_rows, step):
        yield start, dequantised(weight.rows(start, min(start + step, weight.num_rows)), dtype)


def _tensors(weight: GPUWeight) -> tuple[torch.Tensor | None, ...]:
    return weight.quants, weight.scales, weight.minimums, weight.supers, weight.table


def _chunks(weight: GPUWeight, tiles: Tiles) -> int:
    """Returns the chunks of a pass; a power of two."""
    most = triton.next_power_of_2(weight.num_chunks)
    return int(max(1, min(tiles.depth // weight.format.group, most)))


def _meaning(weight: GPUWeight) -> dict[str, Any]:
    """Returns what the kernels are compiled for: how codes are stored, and what they mean."""
    fmt = weight.format
    return {
        "BITS": fmt.bits,
        "GROUPS": groups_of(fmt),
        "GROUP": fmt.group,
        "SHARED": weight.groups_per_scale,
        "OFFSET": fmt.offset,
        "SUPERS": 0 if weight.supers is None else weight.supers.shape[2],
        "PER_SUPER": SUPER_BLOCK // fmt.group,
        "HAS_MINIMUM": fmt.has_minimum,
        "HAS_TABLE": bool(fmt.table),
        "IS_FLOAT": fmt.is_float,
    }


# --- kernels


def _as_it_is(function: Any) -> Any:
    return function


def _whole(value: Any) -> int:
    """Converts a scalar to an integer for the interpreter of Triton 3.6, whose own conversion fails with numpy 2.4."""
    return int(value.handle.data.item()) if isinstance(value, tl.tensor) else int(value)


_bound = _whole if IS_INTERPRETED else triton.jit(_same)  # makes the bound of a loop
# For what kernels call: the interpreter would prepare each call anew, which takes longer than the call
inlined = _as_it_is if IS_INTERPRETED else triton.jit


@triton.jit
def _numbers(
    x: tl.tensor,
    output: tl.tensor,
    bias: tl.tensor,
    quants: tl.tensor,
    scales: tl.tensor,
    minimums: tl.tensor,
    supers: tl.tensor,
    table: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_chunks: tl.tensor,
    x_stride: tl.tensor,
    output_stride: tl.tensor,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    OFFSET: tl.constexpr,
    SUPERS: tl.constexpr,
    PER_SUPER: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    IS_FLOAT: tl.constexpr,
) -> None:
    """Computes some rows of one token's output: sum_g scale_g * (codes_g . x_g) + shift_g * sum(x_g)."""
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    row = row.to(tl.int64)
    total = tl.zeros([ROWS, CHUNKS], tl.float32)
    for begin in range(0, _bound(num_chunks), CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        is_there = is_row[:, None] & (chunk < num_chunks)[None]
        for group in tl.static_range(GROUPS):
            column = ((chunk * GROUPS + group) * GROUP)[:, None] + tl.arange(0, GROUP)[None]
            inputs = tl.load(x + token * x_stride + column, mask=column < num_columns, other=0.0).to(tl.float32)
            codes = _codes(
                *(quants, table, row, chunk, is_there, num_chunks, group),
                *(BITS, GROUPS, GROUP, HAS_TABLE, IS_FLOAT),
            )
            scale, shift = _factors(
                *(scales, minimums, supers, row, chunk, is_there, num_chunks, group),
                *(GROUPS, SHARED, OFFSET, SUPERS, PER_SUPER, HAS_MINIMUM),
            )
            total += tl.sum(codes * inputs[None], 2) * scale
            if HAS_MINIMUM or OFFSET != 0:
                total += tl.sum(inputs, 1)[None] * shift
    result = tl.sum(total, 1)
    if bias is not None:
        result += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(output + token * output_stride + row, result.to(output.dtype.element_ty), mask=is_row)


@triton.jit(do_not_specialize=["num_tokens", "num_experts", "num_passes"])
def _tiles(
    x: tl.tensor,
    output: tl.tensor,
    bias: tl.tensor,
    quants: tl.tensor,
    scales: tl.tensor,
    minimums: tl.tensor,
    supers: tl.tensor,
    table: tl.tensor,
    starts: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_chunks: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    num_passes: tl.tensor,  # of a part
    x_stride: tl.tensor,
    output_stride: tl.tensor,
    part_stride: tl.tensor,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    OFFSET: tl.constexpr,
    SUPERS: tl.constexpr,
    PER_SUPER: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    IS_FLOAT: tl.constexpr,
) -> None:
    """Computes one tile of the output, or its sum over one part of the columns."""
    number, part = tl.program_id(0), tl.program_id(2)
    if starts is None:
        expert, first, end = 0, number * TOKENS, num_tokens
    else:
        expert = _owner(starts, number, num_experts, TOKENS)
        start, end = tl.load(starts + expert), tl.load(starts + expert + 1)
        first = start + (number - start // TOKENS - expert) * TOKENS
    if first >= end:
        return
    token = (first + tl.arange(0, TOKENS)).to(tl.int64)
    own_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_token, is_row = token < end, own_row < num_rows
    row = (expert * num_rows + own_row).to(tl.int64)
    total = tl.zeros([TOKENS, ROWS], tl.float32)
    first_chunk = part * num_passes * CHUNKS
    last_chunk = tl.minimum(first_chunk + num_passes * CHUNKS, num_chunks)
    for begin in range(_bound(first_chunk), _bound(last_chunk), CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        is_there = is_row[:, None] & (chunk < last_chunk)[None]
        for group in tl.static_range(GROUPS):
            column = ((chunk * GROUPS + group) * GROUP)[:, None] + tl.arange(0, GROUP)[None]
            column = tl.where((chunk < last_chunk)[:, None], column, num_columns)
            column = tl.reshape(column, [CHUNKS * GROUP])
            inputs = tl.load(
                x + token[:, None] * x_stride + column[None],
                mask=is_token[:, None] & (column < num_columns)[None],
                other=0.0,
            )
            codes = _codes(
                *(quants, table, row, chunk, is_there, num_chunks, group),
                *(BITS, GROUPS, GROUP, HAS_TABLE, IS_FLOAT),
            )
            scale, shift = _factors(
                *(scales, minimums, supers, row, chunk, is_there, num_chunks, group),
                *(GROUPS, SHARED, OFFSET, SUPERS, PER_SUPER, HAS_MINIMUM),
            )
            weight = tl.reshape(codes * scale[:, :, None] + shift[:, :, None], [ROWS, CHUNKS * GROUP]).to(
                x.dtype.element_ty
            )
            total = _product(inputs, tl.trans(weight), total, PRECISION, WIDENS)
    if bias is not None:
        total += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[None]
    place = output + part * part_stride + token[:, None] * output_stride + own_row[None]
    tl.store(place, total.to(output.dtype.element_ty), mask=is_token[:, None] & is_row[None])


@inlined
def _owner(starts: tl.tensor, number: tl.tensor, num_experts: tl.tensor, TOKENS: tl.constexpr) -> tl.tensor:
    """Finds the expert of tile `number`: the last one whose first tile, starts // TOKENS + expert, is not beyond it."""
    low, high = 0, num_experts
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // TOKENS + middle <= number:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _dequantise(
    output: tl.tensor,
    ids: tl.tensor,
    quants: tl.tensor,
    scales: tl.tensor,
    minimums: tl.tensor,
    supers: tl.tensor,
    table: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    num_chunks: tl.tensor,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED: tl.constexpr,
    OFFSET: tl.constexpr,
    SUPERS: tl.constexpr,
    PER_SUPER: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    IS_FLOAT: tl.constexpr,
) -> None:
    target = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_row = target < num_rows
    row = target if ids is None else tl.load(ids + target, mask=is_row, other=0).to(tl.int64)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    is_there = is_row[:, None] & (chunk < num_chunks)[None]
    for group in tl.static_range(GROUPS):
        codes = _codes(
            *(quants, table, row, chunk, is_there, num_chunks, group),
            *(BITS, GROUPS, GROUP, HAS_TABLE, IS_FLOAT),
        )
        scale, shift = _factors(
            *(scales, minimums, supers, row, chunk, is_there, num_chunks, group),
            *(GROUPS, SHARED, OFFSET, SUPERS, PER_SUPER, HAS_MINIMUM),
        )
        column = ((chunk * GROUPS + group) * GROUP)[None, :, None] + tl.arange(0, GROUP)[None, None]
        weight = codes * scale[:, :, None] + shift[:, :, None]
        place = output + target[:, None, None] * num_columns + column
        tl.store(place, weight.to(output.dtype.element_ty), mask=is_row[:, None, None] & (column < num_columns))


@inlined
def _codes(
    quants: tl.tensor,
    table: tl.tensor,
    row: tl.tensor,
    chunk: tl.tensor,
    is_there: tl.tensor,
    num_chunks: tl.tensor,
    group: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    IS_FLOAT: tl.constexpr,
) -> tl.tensor:
    """Reads one group of some chunks of some rows: (rows, chunks, GROUP) float32."""
    size: tl.constexpr = GROUPS * GROUP * BITS // 8  # bytes of a chunk
    place = quants + (row[:, None] * num_chunks + chunk[None])[:, :, None] * size + tl.arange(0, GROUP)[None, None]
    is_byte = is_there[:, :, None]
    codes = tl.zeros([row.shape[0], chunk.shape[0], GROUP], tl.int32)
    for index in tl.static_range(4):
        if BITS & 8 >> index:
            codes |= _field(place, is_byte, group, 8 >> index, BITS, GROUPS, GROUP)
    if IS_FLOAT:  # the bits of a float16, but for its exponent's highest
        sign = codes >> 7
        return ((codes & 127) << 7 | sign << 15).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif HAS_TABLE:
        return tl.load(table + codes)
    else:
        return codes.to(tl.float32)


@inlined
def _field(
    place: tl.tensor,
    is_byte: tl.tensor,
    group: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """Reads one field of codes, in its place among their bits. The order is that of packed_weight's `place_of`."""
    FIRST: tl.constexpr = BITS // (2 * WIDTH) * (2 * WIDTH)  # wider fields come first
    VECTORS: tl.constexpr = WIDTH * GROUPS // 8
    vector = place + (FIRST * GROUPS // 8 + group % VECTORS) * GROUP
    byte = tl.load(vector, mask=is_byte, other=0).to(tl.int32)
    return (byte >> (group // VECTORS * WIDTH) & (1 << WIDTH) - 1) << FIRST


@inlined
def _factors(
    scales: tl.tensor,
    minimums: tl.tensor,
    supers: tl.tensor,
    row: tl.tensor,
    chunk: tl.tensor,
    is_there: tl.tensor,
    num_chunks: tl.tensor,
    group: tl.constexpr,
    GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    OFFSET: tl.constexpr,
    SUPERS: tl.constexpr,
    PER_SUPER: tl.constexpr,
    HAS_MINIMUM: tl.constexpr,
) -> tl.tuple:
    """Returns the scale and the shift of one group of some chunks, (rows, chunks) each: a weight is code * scale +
    shift."""
    number = chunk * GROUPS + group
    place = row[:, None] * (num_chunks * GROUPS // SHARED) + (number // SHARED)[None]
    scale = tl.load(scales + place, mask=is_there, other=0).to(tl.float32)
    if SUPERS > 0:
        above = supers + (row[:, None] * (num_chunks * GROUPS // PER_SUPER) + (number // PER_SUPER)[None]) * SUPERS
        scale *= tl.load(above, mask=is_there, other=0.0).to(tl.float32)
    shift = scale * -OFFSET
    if HAS_MINIMUM:
        minimum = tl.load(minimums + place, mask=is_there, other=0).to(tl.float32)
        if SUPERS > 0:
            minimum *= tl.load(above + 1, mask=is_there, other=0.0).to(tl.float32)
        shift += minimum
    return scale, shift


@inlined
def _product(a: tl.tensor, b: tl.tensor, sum_: tl.tensor, PRECISION: tl.constexpr, WIDENS: tl.constexpr) -> tl.tensor:
    """Computes sum_ + a b in float32. WIDENS: for the interpreter, which has no products of bfloat16."""
    if WIDENS:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum_, input_precision="ieee")
    else:
        return tl.dot(a, b, sum_, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_parts", "num_tokens"])
def _total(
    partial: tl.tensor,
    output: tl.tensor,
    bias: tl.tensor,
    num_parts: tl.tensor,
    num_tokens: tl.tensor,
    num_rows: tl.tensor,
    output_stride: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    """Adds the parts of one token's output up."""
    token, row = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    is_row = row < num_rows
    total = tl.zeros([SIZE], tl.float32)
    for part in range(0, _bound(num_parts)):
        total += tl.load(partial + (part * num_tokens + token) * num_rows + row, mask=is_row, other=0.0)
    if bias is not None:
        total += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(output + token * output_stride + row, total.to(output.dtype.element_ty), mask=is_row)
