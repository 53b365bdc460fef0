"""Kernels for the CPU: the parts of a forward that torch computes too slowly for a few rows, on torch's own threads.

They compute products of packed weights and activations of 8 bits, embeddings, root mean squares and gates. Their
inputs and outputs are tensors; each is compiled for this machine when it is first used.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from llvmlite import ir

from engine.cpu import amx, jit
from engine.cpu.amx import AMXBuilder
from engine.cpu.jit import BYTES, F16, F32, FLOATS, I8, I32, I64, INTS, LANES, Builder, Program, constant, vector
from engine.cpu.packed_weight import BFLOAT16, FOURS, GROUP, INT8, Q4_K_M, Format, PackedWeight, read_codes

ROWS = 128  # rows of activations that pass a tile of weights while their sums stay in the first-level cache
AMX_ROWS = 12  # so many rows are faster in AMX's tiles of 16 than one by one
PADDING = 2048  # bytes behind activations; tiles read beyond the last row
PREFETCH = 4096  # bytes ahead; the processor's own prefetching ends with a page
FEW_ROWS = 4  # so few rows are not worth waking the other threads
AddBlock = Callable[[jit.Value, jit.Value, jit.Value, jit.Value, jit.Value], None]
DTYPES = (torch.bfloat16, torch.float32)  # of activations


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
        return self.memory[start * groups : (start + size) * groups].view(dtype).view(self.blocks, self.num_rows, -1)


def are_available() -> bool:
    """Returns whether this platform can run these kernels."""
    return jit.is_available()


def quantize(x: torch.Tensor) -> Activations:
    """Rounds activations to 8 bits. x: (rows, columns), contiguous."""
    num_rows, num_columns = x.shape
    result = Activations.empty(num_rows, num_columns // GROUP)
    _quantize(x.dtype)(x.data_ptr(), *result.addresses, num_rows, result.blocks, num_threads=_threads(num_rows))
    return result


def has_bfloat16() -> bool:
    """Returns whether the CPU multiplies bfloat16 in one instruction."""
    return are_available() and "+avx512bf16" in jit.host()[1]


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


def _without_padding(output: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    return output if output.shape[1] == weight.num_rows else output[:, : weight.num_rows].contiguous()


def group(x: torch.Tensor) -> torch.Tensor:
    """Reorders (rows, columns) to (blocks, rows, 32)."""
    padded = torch.empty(x.numel() + PADDING // x.itemsize, dtype=x.dtype)
    grouped = padded[: x.numel()].view(-1, x.shape[0], GROUP)
    return grouped.copy_(x.reshape(x.shape[0], -1, GROUP).transpose(0, 1))


def matmul(
    x: Activations, weight: PackedWeight, bias: torch.Tensor, dtype: torch.dtype, program: Program | None = None
) -> torch.Tensor:
    """Multiplies x by the transposed weight and adds the bias: (rows, weight rows) of `dtype`. bias: float32, padded
    to whole tiles."""
    program = program or _matmul(weight.format, dtype, x.num_rows >= AMX_ROWS and amx.is_available())
    tiles = weight.quants.shape[0]
    output = torch.empty(x.num_rows, tiles * LANES, dtype=dtype)
    addresses = (*x.addresses, *weight.addresses, bias.data_ptr(), output.data_ptr())
    program(*addresses, x.num_rows, x.blocks, tiles, num_threads=torch.get_num_threads())
    return _without_padding(output, weight)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Computes weight * x / sqrt(mean(x * x) + epsilon). x: (..., columns), contiguous; weight: (columns,) float32."""
    output = torch.empty_like(x)
    size = x.shape[-1]
    rows = x.numel() // size
    _rms_norm(x.dtype, epsilon)(
        x.data_ptr(), weight.data_ptr(), output.data_ptr(), rows, size, num_threads=_threads(rows)
    )
    return output


def gate(gate_up: torch.Tensor, activation: str) -> Activations:
    """Computes activation(gate) * up of rows that hold both, (rows, 2 * columns). activation: one of ACTIVATIONS."""
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    result = Activations.empty(num_rows, size // GROUP)
    threads = torch.get_num_threads() if num_rows > 1 else 1
    program = _gate(gate_up.dtype, activation)
    program(gate_up.data_ptr(), *result.addresses, num_rows, result.blocks, num_threads=threads)
    return result


def embed(token_ids: torch.Tensor, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Looks up the rows of a quantised weight with these numbers: (len(token_ids), columns). token_ids: int64, less
    than the weight's number of rows."""
    blocks, rows = weight.num_columns // GROUP, len(token_ids)
    output = torch.empty(rows, weight.num_columns, dtype=dtype)
    addresses = (token_ids.data_ptr(), *weight.addresses, output.data_ptr())
    _embed(weight.format, dtype)(*addresses, rows, blocks, num_threads=_threads(rows))
    return output


def warm_up() -> None:
    """Compiles what most models need, in half a second; a thread can do it while the model loads."""
    if are_available():
        dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
        _quantize(dtype)
        for has_amx in {False, amx.is_available()}:
            _matmul(INT8, torch.float32, has_amx)
            for fmt in (INT8, *Q4_K_M):
                _matmul(fmt, dtype, has_amx)


def _threads(num_rows: int) -> int:
    return torch.get_num_threads() if num_rows > FEW_ROWS else 1


# --- the programs


def compiled(builder: Builder) -> Program:
    return jit.compile_program(builder, jit.host()[0])


@functools.cache
def _quantize(dtype: torch.dtype) -> Program:
    b = Builder("quantize", ("x", "values", "scales", "sums", "totals", "rows", "blocks"), jit.host()[1])
    rows, blocks = b.argument["rows"], b.argument["blocks"]
    with b.share(blocks) as block, b.loop(I64(0), rows) as row:
        start = b.address(b.argument["x"], b.add(b.mul(row, blocks), block), GROUP * dtype.itemsize)
        halves = [b.read_floats(dtype, b.add(start, I64(half * LANES * dtype.itemsize))) for half in (0, 1)]
        _write_quantized(b, halves, b.add(b.mul(block, rows), row))
    return compiled(b)


def _write_quantized(b: Builder, halves: list[jit.Value], place: jit.Value) -> None:
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


_MATMUL = (
    "x",
    "x_scales",
    "x_sums",
    "x_totals",
    "quants",
    "scales",
    "minimums",
    "bias",
    "output",
    "rows",
    "blocks",
    "tiles",
)


@functools.cache
def _matmul(fmt: Format, dtype: torch.dtype, has_amx: bool) -> Program:
    program = amx_matmul_program if has_amx else matmul_program
    return program(fmt, dtype, *jit.host())


def matmul_program(fmt: Format, dtype: torch.dtype, cpu: str, features: str) -> Program:
    """Multiplies ROWS rows at a time with each tile: a block's weights go to eight registers once, for all rows.

    for each tile, block and row:
        products = sum(code * value) over the group's columns    # in integers, for 16 outputs at once
        products -= offset * sum(value)                          # codes are unsigned, `offset` too large
        sums[row] += products * weight scale * row's scale       # in float32
        sums[row] += minimum * sum(value) * row's scale          # in formats with minimums
    """
    b = Builder("matmul", _MATMUL, features)
    rows, blocks, tiles = (b.argument[name] for name in ("rows", "blocks", "tiles"))

    def add_block(place: jit.Value, first: jit.Value, count: jit.Value, block: jit.Value, sums: jit.Value) -> None:
        weight = _read_block(b, fmt, place)
        activations = b.add(b.mul(block, rows), first)
        with b.loop(I64(0), count) as row:
            address = b.address(sums, row, 64)
            total = b.read(FLOATS, address, align=64)
            b.write(_add_block(b, fmt, weight, b.add(activations, row), total), address, align=64)

    _tiled(b, rows, blocks, tiles, dtype, add_block)
    return jit.compile_program(b, cpu)


def amx_matmul_program(
    fmt: Format, dtype: torch.dtype, cpu: str, features: str, builder: type[AMXBuilder] = AMXBuilder
) -> Program:
    """Computes what `matmul_program` computes, sixteen rows at a time, with the processor's tiles.

    for each tile, block and sixteen rows:
        products = values . codes                                # (16 rows, 16 outputs), in integers; codes are signed
        sums[row] += products[row] * weight scale * row's scale  # in float32
        sums[row] += minimum * sum(value) * row's scale          # in formats with minimums
    """
    b = builder("amx_matmul", _MATMUL, features)
    rows, blocks, tiles = (b.argument[name] for name in ("rows", "blocks", "tiles"))
    products, activations, weights = range(3)
    b.configure([(amx.ROWS, amx.ROW_BYTES), (amx.ROWS, fmt.group), (fmt.group // 4, amx.ROW_BYTES)])
    codes, stored = b.scratch(FOURS), b.scratch(amx.ROWS)

    def add_block(place: jit.Value, first: jit.Value, count: jit.Value, block: jit.Value, sums: jit.Value) -> None:
        weight = _read_block(b, fmt, place)
        for four, vector_ in enumerate(weight.codes):
            signed = b.sub(vector_, constant(BYTES, fmt.offset))
            b.write(signed, b.add(codes, I64(amx.ROW_BYTES * four)), align=64)
        for index, scale in enumerate(weight.scales):
            part, minimum = I64(fmt.group * index), weight.minimum if index == 0 else None
            b.load_tile(weights, b.add(codes, I64(LANES * fmt.group * index)), I64(amx.ROW_BYTES))
            with b.loop(I64(0), count, amx.ROWS) as row:
                start = b.add(b.add(b.mul(block, rows), first), row)
                b.load_tile(activations, b.add(b.address(b.argument["x"], start, GROUP), part), I64(GROUP))
                b.zero(products)
                b.dot_tiles("tdpbssd", products, activations, weights)
                b.store_tile(products, stored, I64(amx.ROW_BYTES))
                _add_tile(b, stored, scale, minimum, start, b.address(sums, row, 64))

    _tiled(b, rows, blocks, tiles, dtype, add_block)
    b.release()
    return jit.compile_program(b, cpu)


def _add_tile(
    b: Builder, stored: jit.Value, scale: jit.Value, minimum: jit.Value | None, start: jit.Value, sums: jit.Value
) -> None:
    """Adds the products of sixteen rows, from row `start` of the block's activations on, to their sums."""
    for row in range(amx.ROWS):
        place, address = b.add(start, I64(row)), b.add(sums, I64(64 * row))
        total = b.read(FLOATS, address, align=64)
        if minimum is not None:
            whole = b.splat(b.read(F32, b.address(b.argument["x_totals"], place, 4)))
            total = b.fused(minimum, whole, total)
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
    """Computes what `_matmul` computes, with sums in float32 from the start and weights in sixteen registers."""
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


def _tiled(
    b: Builder, rows: jit.Value, blocks: jit.Value, tiles: jit.Value, dtype: torch.dtype, add_block: AddBlock
) -> None:
    """Writes the loops of a product: over ROWS rows at a time, this thread's tiles, and the blocks of their columns."""
    sums = b.scratch(ROWS)
    with b.loop(I64(0), rows, ROWS) as first:
        count = b.smaller(b.sub(rows, first), I64(ROWS))
        with b.share(tiles) as tile:
            bias = b.read(FLOATS, b.address(b.argument["bias"], tile, 4 * LANES))
            with b.loop(I64(0), count) as row:
                b.write(bias, b.address(sums, row, 64), align=64)
            with b.loop(I64(0), blocks) as block:
                add_block(b.add(b.mul(tile, blocks), block), first, count, block, sums)
            with b.loop(I64(0), count) as row:
                index = b.add(b.mul(b.add(first, row), tiles), tile)
                total = b.read(FLOATS, b.address(sums, row, 64), align=64)
                b.write_floats(total, dtype, b.address(b.argument["output"], index, LANES * dtype.itemsize))


@dataclass(frozen=True)
class _Block:
    """The weights of a tile's block, in registers."""

    codes: list[jit.Value]  # 8, each 4 columns of the 16 rows
    scales: list[jit.Value]
    minimum: jit.Value | None


def _read_block(b: Builder, fmt: Format, place: jit.Value) -> _Block:
    start = b.address(b.argument["quants"], place, fmt.block_bytes)
    for line in range(0, fmt.block_bytes, 64):
        b.prefetch(b.add(start, I64(PREFETCH + line)))
    codes = read_codes(b, fmt, start)
    halves = [b.add(b.mul(place, I64(fmt.num_scales)), I64(index)) for index in range(fmt.num_scales)]
    scales = [_read_halfs(b, b.address(b.argument["scales"], half, 2 * LANES)) for half in halves]
    minimum = _read_halfs(b, b.address(b.argument["minimums"], place, 2 * LANES)) if fmt.has_minimum else None
    return _Block(codes, scales, minimum)


def _read_halfs(b: Builder, address: jit.Value) -> jit.Value:
    return b.fpext(b.read(vector(F16), address), FLOATS)


def _add_block(b: Builder, fmt: Format, weight: _Block, place: jit.Value, total: jit.Value) -> jit.Value:
    """Adds the products with one row's group of 32 to the row's sums."""
    scale = b.splat(b.read(F32, b.address(b.argument["x_scales"], place, 4)))
    values = b.address(b.argument["x"], place, GROUP)
    if weight.minimum is not None:
        whole = b.splat(b.read(F32, b.address(b.argument["x_totals"], place, 4)))
        total = b.fused(weight.minimum, whole, total)
    num_fours = fmt.group // 4
    for index, (part, weight_scale) in enumerate(zip(_offsets(b, fmt, place), weight.scales, strict=True)):
        products = b.splat(part)
        for four in range(index * num_fours, (index + 1) * num_fours):
            x = b.bitcast(b.splat(b.read(I32, b.add(values, I64(4 * four)))), BYTES)
            products = b.dot4(products, weight.codes[four], x)
        total = b.fused(b.sitofp(products, FLOATS), b.fmul(weight_scale, scale), total)
    return total


def _offsets(b: Builder, fmt: Format, place: jit.Value) -> list[jit.Value]:
    """Returns what is to be subtracted from the products of unsigned codes, for each scale of a block."""
    if not fmt.offset:
        return [I32(0)] * fmt.num_scales
    sums = b.address(b.argument["x_sums"], place, 8)
    halves = [b.read(I32, b.add(sums, I64(4 * half))) for half in (0, 1)]
    parts = halves if fmt.num_scales == 2 else [b.add(*halves)]
    return [b.mul(part, I32(-fmt.offset)) for part in parts]


@functools.cache
def _rms_norm(dtype: torch.dtype, epsilon: float) -> Program:
    b = Builder("rms_norm", ("x", "weight", "output", "rows", "columns"), jit.host()[1])
    columns = b.argument["columns"]
    bytes_per_row = b.mul(columns, I64(dtype.itemsize))
    squares = b.variable(constant(FLOATS, 0.0))
    with b.share(b.argument["rows"]) as row:
        start = b.mul(row, bytes_per_row)
        x, output = b.add(b.argument["x"], start), b.add(b.argument["output"], start)
        squares.set(constant(FLOATS, 0.0))
        with b.loop(I64(0), columns, LANES) as column:
            value = b.read_floats(dtype, b.address(x, column, dtype.itemsize))
            squares.set(b.fused(value, value, squares.get()))
        mean = b.fdiv(b.total(squares.get()), b.sitofp(columns, F32))
        root = b.intrinsic("llvm.sqrt.f32", F32, b.fadd(mean, F32(epsilon)))
        scale = b.splat(b.fdiv(F32(1.0), root))
        with b.loop(I64(0), columns, LANES) as column:
            value = b.fmul(b.read_floats(dtype, b.address(x, column, dtype.itemsize)), scale)
            value = b.fmul(value, b.read(FLOATS, b.address(b.argument["weight"], column, 4)))
            b.write_floats(value, dtype, b.address(output, column, dtype.itemsize))
    return compiled(b)


@functools.cache
def _embed(fmt: Format, dtype: torch.dtype) -> Program:
    """Reads a block's weights as a product does, and takes one lane of them."""
    b = Builder("embed", ("ids", "quants", "scales", "minimums", "output", "rows", "blocks"), jit.host()[1])
    blocks, half = b.argument["blocks"], LANES // 4
    with b.share(b.argument["rows"]) as row:
        token = b.read(I64, b.address(b.argument["ids"], row, 8))
        tile, lane = b.sdiv(token, I64(LANES)), b.trunc(b.srem(token, I64(LANES)), I32)
        with b.loop(I64(0), blocks) as block:
            weight = _read_block(b, fmt, b.add(b.mul(tile, blocks), block))
            fours = [b.extract_element(b.bitcast(codes, INTS), lane) for codes in weight.codes]
            for index in (0, 1):
                packed = ir.Constant(vector(I32, half), ir.Undefined)
                for place, four in enumerate(fours[index * half : (index + 1) * half]):
                    packed = b.insert_element(packed, four, I32(place))
                codes = b.zext(b.bitcast(packed, vector(I8)), INTS)
                scale = b.extract_element(weight.scales[index % fmt.num_scales], lane)
                values = b.sitofp(b.sub(codes, constant(INTS, fmt.offset)), FLOATS)
                values = b.fmul(values, b.splat(scale))
                if weight.minimum is not None:
                    values = b.fadd(values, b.splat(b.extract_element(weight.minimum, lane)))
                start = b.address(b.argument["output"], b.add(b.mul(row, blocks), block), GROUP * dtype.itemsize)
                b.write_floats(values, dtype, b.add(start, I64(index * LANES * dtype.itemsize)))
    return compiled(b)


def _silu(b: Builder, x: jit.Value) -> jit.Value:
    return b.fmul(x, b.sigmoid(x))


def _gelu_tanh(b: Builder, x: jit.Value) -> jit.Value:
    """Computes 0.5 x (1 + tanh(u)) = x sigmoid(2 u), where u = sqrt(2 / pi) (x + 0.044715 x**3)."""
    inner = b.fused(b.fmul(x, x), constant(FLOATS, 0.044715), constant(FLOATS, 1.0))
    return b.fmul(x, b.sigmoid(b.fmul(b.fmul(x, inner), constant(FLOATS, 1.5957691216057308))))


ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}


@functools.cache
def _gate(dtype: torch.dtype, activation: str) -> Program:
    b = Builder("gate", ("x", "values", "scales", "sums", "totals", "rows", "blocks"), jit.host()[1])
    rows, blocks = b.argument["rows"], b.argument["blocks"]
    with b.share(blocks) as block, b.loop(I64(0), rows) as row:
        gates = b.add(b.mul(row, b.mul(blocks, I64(2))), block)
        operands = [
            [b.read_floats(dtype, b.add(start, I64(half * LANES * dtype.itemsize))) for half in (0, 1)]
            for start in (b.address(b.argument["x"], g, GROUP * dtype.itemsize) for g in (gates, b.add(gates, blocks)))
        ]
        halves = [b.fmul(ACTIVATIONS[activation](b, g), up) for g, up in zip(*operands, strict=True)]
        _write_quantized(b, halves, b.add(b.mul(block, rows), row))
    return compiled(b)
