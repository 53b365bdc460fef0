"""Kernels in Triton that multiply with packed weights, or dequantise them; see products.py."""

import triton
import triton.language as tl

from engine.gpu.triton_tools import bound, inlined, owner, product


@triton.jit
def numbers_kernel(
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
    token, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    row = row.to(tl.int64)
    total = tl.zeros([ROWS, CHUNKS], tl.float32)
    for begin in range(0, bound(num_chunks), CHUNKS):
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


@triton.jit(do_not_specialize=["num_tokens", "num_experts", "num_passes", "part_stride"])
def tiles_kernel(
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
        expert = owner(starts, number, num_experts, TOKENS)
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
    for begin in range(bound(first_chunk), bound(last_chunk), CHUNKS):
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
            total = product(inputs, tl.trans(weight), total, PRECISION, WIDENS)
    if bias is not None:
        total += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[None]
    place = output + part * part_stride + token[:, None] * output_stride + own_row[None]
    tl.store(place, total.to(output.dtype.element_ty), mask=is_token[:, None] & is_row[None])


@triton.jit(do_not_specialize=["num_rows"])  # of looked up rows there are as many as a step has tokens
def dequantise_kernel(
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


@triton.jit(do_not_specialize=["num_parts", "num_tokens"])
def total_kernel(
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
    for part in range(0, bound(num_parts)):
        total += tl.load(partial + (part * num_tokens + token) * num_rows + row, mask=is_row, other=0.0)
    if bias is not None:
        total += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)
    tl.store(output + token * output_stride + row, total.to(output.dtype.element_ty), mask=is_row)
