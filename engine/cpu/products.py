"""Products of packed weights and activations, in integers of 8 bits or in bfloat16.

A program multiplies many rows with each tile of weights, so that a step reads its weights once. The processor's tiles
(AMX), where it has them, compute sixteen rows at once.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.cpu import amx, jit
from engine.cpu.activations import Activations
from engine.cpu.amx import AMXBuilder
from engine.cpu.jit import BYTES, F16, F32, FLOATS, I8, I16, I32, I64, INTS, LANES, Builder, Program, constant, vector
from engine.cpu.packed_weight import BFLOAT16, FOURS, GROUP, PARTS, SUPER_BLOCK, Format, PackedWeight, read_codes

ROWS = 128  # rows of activations that pass a tile of weights while their sums stay in the first-level cache
CHAINS = 4  # sums that do not wait for each other
AMX_ROWS = 12  # so many rows are faster in AMX's tiles of 16 than one by one
PREFETCH = 8192  # bytes ahead; the processor's own prefetching ends with a page
AddBlock = Callable[[jit.Value, jit.Value, jit.Value, jit.Value, jit.Value], None]
AddMinimum = Callable[[jit.Value, jit.Value], jit.Value]


def matmul(
    x: Activations,
    weight: PackedWeight,
    bias: torch.Tensor,
    dtype: torch.dtype,
    program: Program | None = None,
    values: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiplies x by the transposed weight and adds the bias: (rows, weight rows) of `dtype`. bias: float32, padded
    to whole tiles. program, values: for another processor than this one; see `values_for`."""
    program = program or program_for(weight.format, dtype, x.num_rows >= AMX_ROWS and amx.is_available())
    tiles = weight.quants.shape[0]
    output = torch.empty(x.num_rows, tiles * LANES, dtype=dtype)
    values = values_for(weight.format, x) if values is None else values
    addresses = (values.data_ptr(), *x.addresses[1:], *weight.addresses, bias.data_ptr(), output.data_ptr())
    program(*addresses, x.num_rows, x.blocks, tiles, num_threads=torch.get_num_threads())
    return _without_padding(output, weight)


def matmul_experts(
    x: Activations, weight: PackedWeight, counts: torch.Tensor, dtype: torch.dtype, program: Program | None = None
) -> torch.Tensor:
    """Multiplies each row of x by the transposed weight of its expert: (rows, weight rows / experts) of `dtype`.

    x: rows in the order of their experts. weight: those of all experts, one after the other, each of whole tiles.
    counts: (experts,) int64, how many rows each has.
    """
    num_experts = len(counts)
    tiles = weight.quants.shape[0] // num_experts
    ends = counts.cumsum(0)
    groups = torch.stack([ends - counts, ends], dim=1)
    is_many = x.num_rows >= AMX_ROWS * int(counts.count_nonzero())
    program = program or program_for(weight.format, dtype, is_many and amx.is_available(), has_experts=True)
    output = torch.empty(x.num_rows, tiles * LANES, dtype=dtype)
    bias = torch.zeros(tiles * LANES, dtype=torch.float32)
    values = values_for(weight.format, x)
    addresses = (values.data_ptr(), *x.addresses[1:], *weight.addresses, bias.data_ptr(), output.data_ptr())
    counted = (x.num_rows, x.blocks, tiles, groups.data_ptr(), num_experts)
    program(*addresses, *counted, num_threads=torch.get_num_threads())
    return output


def values_for(fmt: Format, x: Activations, features: str = "") -> torch.Tensor:
    """Returns the values that a product reads: whole numbers, as floats for weights that are floats. features: of the
    processor, this machine's unless given."""
    if not fmt.is_float:
        return x.values
    return x.values.bfloat16() if jit.has_dot2(features or jit.host()[1]) else x.values.float()


def matmul_bfloat16(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor, dtype: torch.dtype, program: Program | None = None
) -> torch.Tensor:
    """Computes what `matmul` computes, for a weight of bfloat16. x: (blocks, rows, 32) bfloat16, made by `group`."""
    blocks, num_rows, _ = x.shape
    tiles = weight.quants.shape[0]
    output = torch.empty(num_rows, tiles * LANES, dtype=dtype)
    addresses = (x.data_ptr(), weight.quants.data_ptr(), bias.data_ptr(), output.data_ptr())
    program = program or _matmul_bfloat16(dtype, num_rows >= AMX_ROWS and amx.is_available())
    program(*addresses, num_rows, blocks, tiles, num_threads=torch.get_num_threads())
    return _without_padding(output, weight)


def matmul_floats(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor, dtype: torch.dtype, program: Program | None = None
) -> torch.Tensor:
    """Computes what `matmul` computes, for a weight of float16 or float32. x: (blocks, rows, 32) float32, made by
    `group`."""
    blocks, num_rows, _ = x.shape
    tiles = weight.quants.shape[0]
    output = torch.empty(num_rows, tiles * LANES, dtype=dtype)
    addresses = (x.data_ptr(), weight.quants.data_ptr(), bias.data_ptr(), output.data_ptr())
    program = program or _matmul_floats(weight.format, dtype)
    program(*addresses, num_rows, blocks, tiles, num_threads=torch.get_num_threads())
    return _without_padding(output, weight)


def _without_padding(output: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    return output if output.shape[1] == weight.num_rows else output[:, : weight.num_rows].contiguous()


# --- the programs

_MATMUL = (
    "x",
    "x_scales",
    "x_sums",
    "x_totals",
    *PARTS,
    "bias",
    "output",
    "rows",
    "blocks",
    "tiles",
)
_MATMUL_EXPERTS = (*_MATMUL, "groups", "experts")


@functools.cache
def program_for(fmt: Format, dtype: torch.dtype, has_amx: bool, has_experts: bool = False) -> Program:
    make = amx_matmul_program if has_amx and not fmt.is_float else matmul_program
    return make(fmt, dtype, *jit.host(), has_experts=has_experts)


def matmul_program(fmt: Format, dtype: torch.dtype, cpu: str, features: str, has_experts: bool = False) -> Program:
    """Multiplies ROWS rows at a time with each tile: a block's weights go to eight registers once, for all rows.

    for each tile, block and row:
        products = sum(code * value) over the group's columns    # in integers, for 16 outputs at once
        products -= offset * sum(value)                          # codes are unsigned, `offset` too large
        sums[row] += products * weight scale * row's scale       # in float32
        sums[row] += minimum * sum(value) * row's scale          # in formats with minimums

    Codes that are floats are multiplied in float32.

    has_experts: the rows of each expert have weights of their own; see `matmul_experts`.
    """
    b = Builder("matmul", _MATMUL_EXPERTS if has_experts else _MATMUL, features)
    rows, blocks, tiles = (b.argument[name] for name in ("rows", "blocks", "tiles"))

    def add_block(place: jit.Value, first: jit.Value, count: jit.Value, block: jit.Value, sums: jit.Value) -> None:
        weight = read_block(b, fmt, place)
        numbers = _read_numbers(b, weight) if fmt.is_float else []
        activations = b.add(b.mul(block, rows), first)
        with b.loop(I64(0), count) as row:
            address = b.address(sums, row, 64)
            total = b.read(FLOATS, address, align=64)
            place = b.add(activations, row)
            if fmt.is_float:
                total = _add_numbers(b, numbers, weight.scales[0], place, total)
            else:
                total = _add_block(b, fmt, weight, place, total)
            b.write(total, address, align=64)

    _tiled(b, rows, blocks, tiles, dtype, add_block)
    return jit.compile_program(b, cpu)


def amx_matmul_program(
    fmt: Format,
    dtype: torch.dtype,
    cpu: str,
    features: str,
    builder: type[AMXBuilder] = AMXBuilder,
    has_experts: bool = False,
) -> Program:
    """Computes what `matmul_program` computes, sixteen rows at a time, with the processor's tiles.

    for each tile, block and sixteen rows:
        products = values . codes                                # (16 rows, 16 outputs), in integers; codes are signed
        sums[row] += products[row] * weight scale * row's scale  # in float32
        sums[row] += minimum * sum(value) * row's scale          # in formats with minimums
    """
    b = builder("amx_matmul", _MATMUL_EXPERTS if has_experts else _MATMUL, features)
    rows, blocks, tiles = (b.argument[name] for name in ("rows", "blocks", "tiles"))
    products, activations, weights = range(3)
    b.configure([(amx.ROWS, amx.ROW_BYTES), (amx.ROWS, fmt.group), (fmt.group // 4, amx.ROW_BYTES)])
    codes, stored = b.scratch(FOURS), b.scratch(amx.ROWS)

    def add_block(place: jit.Value, first: jit.Value, count: jit.Value, block: jit.Value, sums: jit.Value) -> None:
        weight = read_block(b, fmt, place)
        for four, vector_ in enumerate(weight.codes):
            signed = b.sub(vector_, constant(BYTES, fmt.offset))
            b.write(signed, b.add(codes, I64(amx.ROW_BYTES * four)), align=64)
        for index, scale in enumerate(weight.scales):
            part, add_minimum = I64(fmt.group * index), _minimum_adder(b, fmt, weight, index)
            b.load_tile(weights, b.add(codes, I64(LANES * fmt.group * index)), I64(amx.ROW_BYTES))
            with b.loop(I64(0), count, amx.ROWS) as row:
                start = b.add(b.add(b.mul(block, rows), first), row)
                b.load_tile(activations, b.add(b.address(b.argument["x"], start, GROUP), part), I64(GROUP))
                b.zero(products)
                b.dot_tiles("tdpbssd", products, activations, weights)
                b.store_tile(products, stored, I64(amx.ROW_BYTES))
                _add_tile(b, stored, scale, add_minimum, start, b.address(sums, row, 64))

    _tiled(b, rows, blocks, tiles, dtype, add_block)
    b.release()
    return jit.compile_program(b, cpu)


def _minimum_adder(b: Builder, fmt: Format, weight: "Block", index: int) -> AddMinimum:
    """Returns what adds to a row's sums, whose activations are at a place, its part of the group's minimum."""
    if not fmt.has_minimum:
        return lambda place, total: total
    minimum = weight.minimums[index]
    return lambda place, total: b.fused(minimum, b.splat(_read_total(b, fmt, place, index)), total)


def _add_tile(
    b: Builder, stored: jit.Value, scale: jit.Value, add_minimum: AddMinimum, start: jit.Value, sums: jit.Value
) -> None:
    """Adds the products of sixteen rows, from row `start` of the block's activations on, to their sums."""
    for row in range(amx.ROWS):
        place, address = b.add(start, I64(row)), b.add(sums, I64(64 * row))
        total = add_minimum(place, b.read(FLOATS, address, align=64))
        products = b.sitofp(b.read(INTS, b.add(stored, I64(amx.ROW_BYTES * row)), align=64), FLOATS)
        row_scale = b.splat(b.read(F32, b.address(b.argument["x_scales"], place, 4)))
        b.write(b.fused(products, b.fmul(scale, row_scale), total), address, align=64)


_MATMUL_BFLOAT16 = ("x", "quants", "bias", "output", "rows", "blocks", "tiles")


@functools.cache
def _matmul_bfloat16(dtype: torch.dtype, has_amx: bool) -> Program:
    return (amx_matmul_bfloat16_program if has_amx else _matmul_bfloat16_program)(dtype, *jit.host())


def amx_matmul_bfloat16_program(
    dtype: torch.dtype, cpu: str, features: str, builder: type[AMXBuilder] = AMXBuilder
) -> Program:
    """Multiplies 32 rows at a time with two tiles of weights, so that each tile of AMX is read for two products."""
    b = builder("amx_matmul_bfloat16", _MATMUL_BFLOAT16, features)
    rows, blocks, tiles = (b.argument[name] for name in ("rows", "blocks", "tiles"))
    b.configure([(amx.ROWS, amx.ROW_BYTES)] * 8)
    stored, sides, row_bytes = b.scratch(amx.ROWS), (0, 1), I64(amx.ROW_BYTES)
    with b.share(b.sdiv(b.add(tiles, I64(1)), I64(2))) as pair:
        # where the number of tiles is odd, the last one is computed twice
        weights = [b.smaller(b.add(b.mul(pair, I64(2)), I64(side)), b.sub(tiles, I64(1))) for side in sides]
        with b.loop(I64(0), rows, 2 * amx.ROWS) as first:
            for product in range(4):
                b.zero(product)
            with b.loop(I64(0), blocks) as block:
                for side, weight in zip(sides, weights, strict=True):
                    place = b.add(b.mul(weight, blocks), block)
                    b.load_tile(6 + side, b.address(b.argument["quants"], place, BFLOAT16.block_bytes), row_bytes)
                    start = b.add(b.add(b.mul(block, rows), first), I64(amx.ROWS * side))
                    b.load_tile(4 + side, b.address(b.argument["x"], start, 2 * GROUP), row_bytes)
                for product in range(4):
                    b.dot_tiles("tdpbf16ps", product, 4 + product // 2, 6 + product % 2)
            for product in range(4):
                b.store_tile(product, stored, row_bytes)
                start = b.add(first, I64(amx.ROWS * (product // 2)))
                bias = b.read(FLOATS, b.address(b.argument["bias"], weights[product % 2], 4 * LANES))
                with b.loop(I64(0), b.smaller(b.sub(rows, start), I64(amx.ROWS))) as row:
                    place = b.add(b.mul(b.add(start, row), tiles), weights[product % 2])
                    total = b.fadd(bias, b.read(FLOATS, b.address(stored, row, amx.ROW_BYTES)))
                    b.write_floats(total, dtype, b.address(b.argument["output"], place, LANES * dtype.itemsize))
    b.release()
    return jit.compile_program(b, cpu)


def _matmul_bfloat16_program(dtype: torch.dtype, cpu: str, features: str) -> Program:
    """Computes what `matmul_program` computes, with sums in float32 from the start and weights in sixteen registers."""
    b = Builder("matmul_bfloat16", _MATMUL_BFLOAT16, features)
    rows, blocks, tiles = (b.argument[name] for name in ("rows", "blocks", "tiles"))
    num_pairs = GROUP // 2

    def add_block(place: jit.Value, first: jit.Value, count: jit.Value, block: jit.Value, sums: jit.Value) -> None:
        start = b.address(b.argument["quants"], place, BFLOAT16.block_bytes)
        for line in range(0, BFLOAT16.block_bytes, 64):
            b.prefetch(b.add(start, I64(PREFETCH + line)))
        weight = [b.read(INTS, b.add(start, I64(64 * pair))) for pair in range(num_pairs)]
        activations = b.address(b.argument["x"], b.add(b.mul(block, rows), first), 2 * GROUP)
        with b.loop(I64(0), count) as row:
            values = b.address(activations, row, 2 * GROUP)
            address = b.address(sums, row, 64)
            total = b.read(FLOATS, address, align=64)
            for pair in range(num_pairs):
                total = b.dot2(total, weight[pair], b.splat(b.read(I32, b.add(values, I64(4 * pair)))))
            b.write(total, address, align=64)

    _tiled(b, rows, blocks, tiles, dtype, add_block)
    return jit.compile_program(b, cpu)


@functools.cache
def _matmul_floats(fmt: Format, dtype: torch.dtype) -> Program:
    return matmul_floats_program(fmt, dtype, *jit.host())


def matmul_floats_program(fmt: Format, dtype: torch.dtype, cpu: str, features: str) -> Program:
    """Computes what `matmul_program` computes, in float32: half a block's weights go to sixteen registers at a time,
    and the sums of a row are in four, so that none waits for the one before."""
    b = Builder("matmul_floats", _MATMUL_BFLOAT16, features)
    rows, blocks, tiles = (b.argument[name] for name in ("rows", "blocks", "tiles"))
    vector_bytes, apart = LANES * fmt.dtype.itemsize, 4

    def add_block(place: jit.Value, first: jit.Value, count: jit.Value, block: jit.Value, sums: jit.Value) -> None:
        start = b.address(b.argument["quants"], place, fmt.block_bytes)
        for line in range(0, fmt.block_bytes, 64):
            b.prefetch(b.add(start, I64(PREFETCH + line)))
        activations = b.address(b.argument["x"], b.add(b.mul(block, rows), first), 4 * GROUP)
        for half in (0, GROUP // 2):
            columns = range(half, half + GROUP // 2)
            weight = [b.read_floats(fmt.dtype, b.add(start, I64(vector_bytes * column))) for column in columns]
            with b.loop(I64(0), count) as row:
                values = b.address(activations, row, 4 * GROUP)
                address = b.address(sums, row, 64)
                parts = [b.read(FLOATS, address, align=64), *[constant(FLOATS, 0.0)] * (apart - 1)]
                for index, column in enumerate(columns):
                    x = b.splat(b.read(F32, b.add(values, I64(4 * column))))
                    parts[index % apart] = b.fused(weight[index], x, parts[index % apart])
                b.write(b.fadd(b.fadd(*parts[:2]), b.fadd(*parts[2:])), address, align=64)

    _tiled(b, rows, blocks, tiles, dtype, add_block)
    return jit.compile_program(b, cpu)


def _tiled(
    b: Builder, rows: jit.Value, blocks: jit.Value, tiles: jit.Value, dtype: torch.dtype, add_block: AddBlock
) -> None:
    """Writes the loops of a product: over ROWS rows at a time, this thread's tiles, and the blocks of their columns."""
    sums = b.scratch(ROWS)
    with _each_expert(b, rows, tiles) as (start, end, before), b.loop(start, end, ROWS) as first:
        count = b.smaller(b.sub(end, first), I64(ROWS))
        with b.share(tiles) as tile:
            bias = b.read(FLOATS, b.address(b.argument["bias"], tile, 4 * LANES))
            with b.loop(I64(0), count) as row:
                b.write(bias, b.address(sums, row, 64), align=64)
            with b.loop(I64(0), blocks) as block:
                add_block(b.add(b.mul(b.add(before, tile), blocks), block), first, count, block, sums)
            with b.loop(I64(0), count) as row:
                index = b.add(b.mul(b.add(first, row), tiles), tile)
                total = b.read(FLOATS, b.address(sums, row, 64), align=64)
                b.write_floats(total, dtype, b.address(b.argument["output"], index, LANES * dtype.itemsize))


@contextmanager
def _each_expert(b: Builder, rows: jit.Value, tiles: jit.Value) -> Iterator[tuple[jit.Value, jit.Value, jit.Value]]:
    """Writes the loop over the experts, if the program has any: the first row of each, the end of its rows, and the
    tiles of weights before its own."""
    if "experts" not in b.argument:
        yield I64(0), rows, I64(0)
        return
    with b.loop(I64(0), b.argument["experts"]) as expert:
        group = b.address(b.argument["groups"], expert, 16)
        yield b.read(I64, group), b.read(I64, b.add(group, I64(8))), b.mul(expert, tiles)


@dataclass(frozen=True)
class Block:
    """The weights of a tile's block, in registers."""

    codes: list[jit.Value]  # 8, each 4 columns of the 16 rows
    scales: list[jit.Value]
    minimums: list[jit.Value]  # as many, or none


def read_block(b: Builder, fmt: Format, place: jit.Value) -> Block:
    start = b.address(b.argument["quants"], place, fmt.block_bytes)
    for line in range(0, fmt.block_bytes, 64):
        b.prefetch(b.add(start, I64(PREFETCH + line)))
    codes = read_codes(b, fmt, start)
    indices = [b.add(b.mul(place, I64(fmt.num_scales)), I64(index)) for index in range(fmt.num_scales)]
    scales = [_read_factors(b, fmt, "scales", index) for index in indices]
    minimums = [_read_factors(b, fmt, "minimums", index) for index in indices] if fmt.has_minimum else []
    if fmt.has_super_blocks:
        num_supers = 1 + fmt.has_minimum
        first = b.mul(b.sdiv(place, I64(SUPER_BLOCK // GROUP)), I64(num_supers))
        supers = [_read_halfs(b, "supers", b.add(first, I64(index))) for index in range(num_supers)]
        scales = [b.fmul(scale, supers[0]) for scale in scales]
        minimums = [b.fmul(minimum, supers[1]) for minimum in minimums]
    return Block(codes, scales, minimums)


def _read_factors(b: Builder, fmt: Format, name: str, index: jit.Value) -> jit.Value:
    """Reads the scales or minimums of sixteen rows."""
    if not fmt.has_super_blocks:
        return _read_halfs(b, name, index)
    whole = b.read(vector(I8), b.address(b.argument[name], index, LANES))
    return b.sitofp(b.sext(whole, INTS), FLOATS)


def _read_halfs(b: Builder, name: str, index: jit.Value) -> jit.Value:
    return b.fpext(b.read(vector(F16), b.address(b.argument[name], index, 2 * LANES)), FLOATS)


def _add_block(b: Builder, fmt: Format, weight: Block, place: jit.Value, total: jit.Value) -> jit.Value:
    """Adds the products with one row's group of 32 to the row's sums."""
    scale = b.splat(b.read(F32, b.address(b.argument["x_scales"], place, 4)))
    values = b.address(b.argument["x"], place, GROUP)
    for index, minimum in enumerate(weight.minimums):
        total = b.fused(minimum, b.splat(_read_total(b, fmt, place, index)), total)
    num_fours = fmt.group // 4
    for index, (part, weight_scale) in enumerate(zip(_offsets(b, fmt, place), weight.scales, strict=True)):
        products = b.splat(part)
        for four in range(index * num_fours, (index + 1) * num_fours):
            x = b.bitcast(b.splat(b.read(I32, b.add(values, I64(4 * four)))), BYTES)
            products = b.dot4(products, weight.codes[four], x)
        total = b.fused(b.sitofp(products, FLOATS), b.fmul(weight_scale, scale), total)
    return total


def _read_total(b: Builder, fmt: Format, place: jit.Value, index: int) -> jit.Value:
    """Returns the sum of a row's values in the block's group `index`."""
    if fmt.num_scales == 1:
        return b.read(F32, b.address(b.argument["x_totals"], place, 4))
    total = b.read(I32, b.add(b.address(b.argument["x_sums"], place, 8), I64(4 * index)))
    return b.fmul(b.sitofp(total, F32), b.read(F32, b.address(b.argument["x_scales"], place, 4)))


def _read_numbers(b: Builder, weight: Block) -> list[jit.Value]:
    """Returns codes that are floats, divided by 256: a vector for each column, in float32, or for each two columns, in
    pairs of bfloat16, which hold them without rounding."""
    numbers = []
    for four in weight.codes:
        for column in range(4):
            moved = b.shl(b.bitcast(four, INTS), constant(INTS, 24 - 8 * column))
            bits = b.and_(b.ashr(moved, constant(INTS, 17)), constant(INTS, 0xBF80))
            numbers.append(b.fpext(b.bitcast(b.trunc(bits, vector(I16)), vector(F16)), FLOATS))
    if not jit.has_dot2(b.features):
        return numbers
    whole = [b.bitcast(number, INTS) for number in numbers]
    half = constant(INTS, 16)
    return [b.or_(b.lshr(low, half), high) for low, high in zip(whole[::2], whole[1::2], strict=True)]


def _add_numbers(
    b: Builder, numbers: list[jit.Value], weight_scale: jit.Value, place: jit.Value, total: jit.Value
) -> jit.Value:
    """Adds the products of floats with one row's group of 32 to the row's sums."""
    has_pairs = jit.has_dot2(b.features)
    values = b.address(b.argument["x"], place, (2 if has_pairs else 4) * GROUP)
    parts = [constant(FLOATS, 0.0)] * CHAINS
    for index, number in enumerate(numbers):
        x = b.splat(b.read(I32 if has_pairs else F32, b.add(values, I64(4 * index))))
        part = parts[index % CHAINS]
        parts[index % CHAINS] = b.dot2(part, number, x) if has_pairs else b.fused(number, x, part)
    while len(parts) > 1:
        parts = [b.fadd(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
    scale = b.splat(b.read(F32, b.address(b.argument["x_scales"], place, 4)))
    return b.fused(parts[0], b.fmul(weight_scale, scale), total)


def _offsets(b: Builder, fmt: Format, place: jit.Value) -> list[jit.Value]:
    """Returns what is to be subtracted from the products of unsigned codes, for each scale of a block."""
    if not fmt.offset:
        return [I32(0)] * fmt.num_scales
    sums = b.address(b.argument["x_sums"], place, 8)
    halves = [b.read(I32, b.add(sums, I64(4 * half))) for half in (0, 1)]
    parts = halves if fmt.num_scales == 2 else [b.add(*halves)]
    return [b.mul(part, I32(-fmt.offset)) for part in parts]
