"""Kernels for the CPU: norms, gates and embeddings, which torch computes too slowly for a few rows, on torch's threads.

Their inputs and outputs are tensors; each is compiled for this machine when it is first used, as are those of products,
attention and sampling.
"""

import functools
from collections.abc import Callable

import torch
from llvmlite import ir

from engine.cpu import activations, amx, jit, products
from engine.cpu.activations import Activations, threads_for, write_quantized
from engine.cpu.jit import F32, FLOATS, I8, I32, I64, INTS, LANES, Builder, Program, constant, vector
from engine.cpu.packed_weight import GROUP, INT8, PARTS, Q4_K_M, Format, PackedWeight

Sigmoid = Callable[[jit.Value], jit.Value]


def are_available() -> bool:
    """Returns whether this platform can run these kernels."""
    return jit.is_available()


def has_bfloat16() -> bool:
    """Returns whether the CPU multiplies bfloat16 in one instruction."""
    return are_available() and jit.has_dot2(jit.host()[1])


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Computes weight * x / sqrt(mean(x * x) + epsilon). x: (..., columns), contiguous; weight: (columns,) float32."""
    output = torch.empty_like(x)
    size = x.shape[-1]
    rows = x.numel() // size
    _rms_norm(x.dtype, epsilon)(
        x.data_ptr(), weight.data_ptr(), output.data_ptr(), rows, size, num_threads=threads_for(rows)
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


def gate_unrounded(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """Computes what `gate` computes, (rows, columns) in the type of its input."""
    output = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=gate_up.dtype)
    threads = torch.get_num_threads() if len(output) > 1 else 1
    program = _gate_unrounded(gate_up.dtype, activation)
    program(gate_up.data_ptr(), output.data_ptr(), len(output), output.shape[1] // GROUP, num_threads=threads)
    return output


def combine(rows: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Computes sum_j weights[t, j] * rows[places[t, j]]: (tokens, columns) of `dtype`. rows: (any, columns) float32, in
    whole vectors. places: (tokens, terms) int64. weights: (tokens, terms) float32."""
    assert rows.dtype == weights.dtype == torch.float32 and places.is_contiguous() and weights.is_contiguous()
    num_tokens, num_terms = places.shape
    output = torch.empty(num_tokens, rows.shape[1], dtype=dtype)
    addresses = (rows.data_ptr(), places.data_ptr(), weights.data_ptr(), output.data_ptr())
    _combine(dtype)(*addresses, num_tokens, num_terms, rows.shape[1], num_threads=threads_for(num_tokens))
    return output


def embed(token_ids: torch.Tensor, weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Looks up the rows of a quantised weight with these numbers: (len(token_ids), columns). token_ids: int64, less
    than the weight's number of rows."""
    blocks, rows = weight.num_columns // GROUP, len(token_ids)
    output = torch.empty(rows, weight.num_columns, dtype=dtype)
    addresses = (token_ids.data_ptr(), *weight.addresses, output.data_ptr())
    _embed(weight.format, dtype)(*addresses, rows, blocks, num_threads=threads_for(rows))
    return output


def warm_up() -> None:
    """Compiles what most models need, in half a second; a thread can do it while the model loads."""
    if are_available():
        dtype = torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
        activations.program(dtype)
        for has_amx in {False, amx.is_available()}:
            products.program_for(INT8, torch.float32, has_amx)
            for fmt in (INT8, *Q4_K_M):
                products.program_for(fmt, dtype, has_amx)


# --- the programs


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
    return jit.compile_program(b)


@functools.cache
def _combine(dtype: torch.dtype) -> Program:
    b = Builder("combine", ("rows", "places", "weights", "output", "tokens", "terms", "columns"), jit.host()[1])
    terms, columns = b.argument["terms"], b.argument["columns"]
    total = b.variable(constant(FLOATS, 0.0))
    with b.share(b.argument["tokens"]) as token, b.loop(I64(0), columns, LANES) as column:
        total.set(constant(FLOATS, 0.0))
        with b.loop(I64(0), terms) as term:
            index = b.add(b.mul(token, terms), term)
            row = b.read(I64, b.address(b.argument["places"], index, 8))
            value = b.read(FLOATS, b.address(b.argument["rows"], b.add(b.mul(row, columns), column), 4))
            weight = b.splat(b.read(F32, b.address(b.argument["weights"], index, 4)))
            total.set(b.fused(weight, value, total.get()))
        place = b.add(b.mul(token, columns), column)
        b.write_floats(total.get(), dtype, b.address(b.argument["output"], place, dtype.itemsize))
    return jit.compile_program(b)


@functools.cache
def _embed(fmt: Format, dtype: torch.dtype) -> Program:
    """Reads a block's weights as a product does, and takes one lane of them."""
    b = Builder("embed", ("ids", *PARTS, "output", "rows", "blocks"), jit.host()[1])
    blocks, half = b.argument["blocks"], LANES // 4
    with b.share(b.argument["rows"]) as row:
        token = b.read(I64, b.address(b.argument["ids"], row, 8))
        tile, lane = b.sdiv(token, I64(LANES)), b.trunc(b.srem(token, I64(LANES)), I32)
        with b.loop(I64(0), blocks) as block:
            weight = products.read_block(b, fmt, b.add(b.mul(tile, blocks), block))
            fours = [b.extract_element(b.bitcast(codes, INTS), lane) for codes in weight.codes]
            for index in (0, 1):
                packed = ir.Constant(vector(I32, half), ir.Undefined)
                for place, four in enumerate(fours[index * half : (index + 1) * half]):
                    packed = b.insert_element(packed, four, I32(place))
                codes = b.zext(b.bitcast(packed, vector(I8)), INTS)
                scale = b.extract_element(weight.scales[index % fmt.num_scales], lane)
                values = b.sitofp(b.sub(codes, constant(INTS, fmt.offset)), FLOATS)
                values = b.fmul(values, b.splat(scale))
                if weight.minimums:
                    minimum = b.extract_element(weight.minimums[index % fmt.num_scales], lane)
                    values = b.fadd(values, b.splat(minimum))
                start = b.address(b.argument["output"], b.add(b.mul(row, blocks), block), GROUP * dtype.itemsize)
                b.write_floats(values, dtype, b.add(start, I64(index * LANES * dtype.itemsize)))
    return jit.compile_program(b)


def _silu(x: jit.Value, b: Builder, sigmoid: Sigmoid) -> jit.Value:
    return b.fmul(x, sigmoid(x))


def _gelu_tanh(x: jit.Value, b: Builder, sigmoid: Sigmoid) -> jit.Value:
    """Computes 0.5 x (1 + tanh(u)) = x sigmoid(2 u), where u = sqrt(2 / pi) (x + 0.044715 x**3)."""
    inner = b.fused(b.fmul(x, x), constant(FLOATS, 0.044715), constant(FLOATS, 1.0))
    return b.fmul(x, sigmoid(b.fmul(b.fmul(x, inner), constant(FLOATS, 1.5957691216057308))))


ACTIVATIONS = {"silu": _silu, "gelu_tanh": _gelu_tanh}


@functools.cache
def _gate(dtype: torch.dtype, activation: str) -> Program:
    b = Builder("gate", ("x", "values", "scales", "sums", "totals", "rows", "blocks"), jit.host()[1])
    rows, blocks = b.argument["rows"], b.argument["blocks"]
    with b.share(blocks) as block, b.loop(I64(0), rows) as row:
        write_quantized(b, _gated(b, dtype, activation, row, block), b.add(b.mul(block, rows), row))
    return jit.compile_program(b)


@functools.cache
def _gate_unrounded(dtype: torch.dtype, activation: str) -> Program:
    b = Builder("gate_unrounded", ("x", "output", "rows", "blocks"), jit.host()[1])
    rows, blocks = b.argument["rows"], b.argument["blocks"]
    with b.share(blocks) as block, b.loop(I64(0), rows) as row:
        start = b.address(b.argument["output"], b.add(b.mul(row, blocks), block), GROUP * dtype.itemsize)
        for half, value in enumerate(_gated(b, dtype, activation, row, block)):
            b.write_floats(value, dtype, b.add(start, I64(half * LANES * dtype.itemsize)))
    return jit.compile_program(b)


def _gated(b: Builder, dtype: torch.dtype, activation: str, row: jit.Value, block: jit.Value) -> list[jit.Value]:
    """Returns activation(gate) * up of a group of 32 columns, as two vectors."""
    blocks = b.argument["blocks"]
    is_rough = dtype == torch.bfloat16 and {"+avx512f", "+avx512dq"} <= set(jit.features())
    sigmoid = b.sigmoid_bfloat16 if is_rough else b.sigmoid
    gates = b.add(b.mul(row, b.mul(blocks, I64(2))), block)
    operands = [
        [b.read_floats(dtype, b.add(start, I64(half * LANES * dtype.itemsize))) for half in (0, 1)]
        for start in (b.address(b.argument["x"], g, GROUP * dtype.itemsize) for g in (gates, b.add(gates, blocks)))
    ]
    return [b.fmul(ACTIVATIONS[activation](g, b, sigmoid), up) for g, up in zip(*operands, strict=True)]
