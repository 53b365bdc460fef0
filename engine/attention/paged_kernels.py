"""Kernels in Triton of attention over the paged cache; see paged_triton.py."""

import triton
import triton.language as tl

from engine.gpu.triton_tools import bound, inlined, owner, product


@triton.jit(  # one compilation for all steps
    do_not_specialize=["window", "num_parts", "num_tokens", "num_sequences", "table_stride"],
    do_not_specialize_on_alignment=["starts", "lengths", "tables", "ranges"],
)
def attend_kernel(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    output: tl.tensor,
    partial: tl.tensor,
    all_top: tl.tensor,
    all_total: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    tables: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    ranges: tl.tensor,
    sinks: tl.tensor,
    factor: tl.tensor,  # converts scores to exponents of two
    cap_factor: tl.tensor,
    cap: tl.tensor,
    window: tl.tensor,  # tokens before its own that a query sees
    num_parts: tl.tensor,
    num_tokens: tl.tensor,
    num_sequences: tl.tensor,
    query_stride: tl.tensor,
    query_head_stride: tl.tensor,
    key_block_stride: tl.tensor,
    key_stride: tl.tensor,
    key_head_stride: tl.tensor,
    value_block_stride: tl.tensor,
    value_stride: tl.tensor,
    value_head_stride: tl.tensor,
    table_stride: tl.tensor,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_PAD: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,  # in a tile
    KEYS: tl.constexpr,
    IS_DECODE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_RANGES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
) -> None:
    """Computes one tile of queries, of the heads of one key, over one part of the keys that they see."""
    head, part = tl.program_id(1), tl.program_id(2)
    if IS_DECODE:
        sequence, tile = tl.program_id(0), 0
        start, count = tl.load(starts + sequence), 1
    else:
        number = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest ones first
        sequence = owner(starts, number, num_sequences, QUERIES)
        start = tl.load(starts + sequence)
        tile = number - start // QUERIES - sequence
        count = tl.load(starts + sequence + 1) - start
        if tile * QUERIES >= count:
            return
    length = tl.load(lengths + sequence)
    row = tl.arange(0, ROWS)
    index = tile * QUERIES + row // GROUP  # of its query in the sequence
    is_row = (row < QUERIES * GROUP) & (index < count)
    token, query_head = (start + index).to(tl.int64), head * GROUP + row % GROUP
    first_query = length - count + tile * QUERIES  # its position in the table
    last_query = tl.minimum(first_query + QUERIES, length) - 1
    low, high = length - count + index - window, length - count + index + 1  # the positions that a row sees
    any_low, any_high = tl.maximum(first_query - window, 0), last_query + 1  # what any row sees is in there
    all_low, all_high = last_query - window, first_query + 1  # all rows see what is in there
    if HAS_RANGES:
        low = tl.load(ranges + 2 * token, mask=is_row, other=0)
        high = tl.load(ranges + 2 * token + 1, mask=is_row, other=0)
        any_low, any_high = tl.min(tl.where(is_row, low, length), 0), tl.max(high, 0)
        all_low, all_high = tl.max(low, 0), tl.min(tl.where(is_row, high, length), 0)

    first = any_low // KEYS  # passes
    last = tl.cdiv(any_high, KEYS)
    size = tl.cdiv(last - first, num_parts)
    first += part * size
    last = tl.minimum(first + size, last)

    key_dims, value_dims = tl.arange(0, KEY_PAD), tl.arange(0, VALUE_PAD)
    q = tl.load(
        query + token[:, None] * query_stride + query_head[:, None] * query_head_stride + key_dims[None],
        mask=is_row[:, None] & (key_dims[None] < KEY_DIM),
        other=0.0,
    )
    key_base = keys + head.to(tl.int64) * key_head_stride + key_dims[None]
    value_base = values + head.to(tl.int64) * value_head_stride + value_dims[None]
    table = tables + sequence.to(tl.int64) * table_stride
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sum_ = tl.zeros([ROWS, VALUE_PAD], tl.float32)
    if HAS_SINKS:  # the first part has them
        sink = tl.load(sinks + query_head, mask=is_row, other=0.0).to(tl.float32) * 1.4426950408889634  # log2(e)
        top, total = tl.where(part == 0, sink, top), tl.where(part == 0, 1.0, total)

    state = (top, total, sum_)
    edge = first
    if not IS_DECODE:  # a mask is needed only where some rows do not see a key that others see
        free = tl.minimum(tl.maximum(tl.cdiv(all_low, KEYS), first), tl.maximum(last, first))
        edge = tl.maximum(tl.minimum(all_high // KEYS, last), free)
        state = _visit(
            *(first, free, state, q, low, high, any_high, key_base, value_base, table),
            *(key_scales + head, value_scales + head, key_block_stride, key_stride, value_block_stride, value_stride),
            *(factor, cap_factor, cap, BLOCK_SIZE, KEY_DIM, VALUE_DIM, KEYS, True, HAS_CAP, HAS_SCALES),
            *(PRECISION, WIDENS),
        )
        state = _visit(
            *(free, edge, state, q, low, high, any_high, key_base, value_base, table),
            *(key_scales + head, value_scales + head, key_block_stride, key_stride, value_block_stride, value_stride),
            *(factor, cap_factor, cap, BLOCK_SIZE, KEY_DIM, VALUE_DIM, KEYS, False, HAS_CAP, HAS_SCALES),
            *(PRECISION, WIDENS),
        )
    top, total, sum_ = _visit(
        *(edge, last, state, q, low, high, any_high, key_base, value_base, table),
        *(key_scales + head, value_scales + head, key_block_stride, key_stride, value_block_stride, value_stride),
        *(factor, cap_factor, cap, BLOCK_SIZE, KEY_DIM, VALUE_DIM, KEYS, True, HAS_CAP, HAS_SCALES),
        *(PRECISION, WIDENS),
    )

    is_element = is_row[:, None] & (value_dims[None] < VALUE_DIM)
    place = token * (tl.num_programs(1) * GROUP) + query_head
    if num_parts == 1:
        result = sum_ / tl.where(is_row, total, 1.0)[:, None]
        tl.store(output + place[:, None] * VALUE_DIM + value_dims[None], result.to(output.dtype.element_ty), is_element)
    else:
        place += part.to(tl.int64) * num_tokens * tl.num_programs(1) * GROUP
        tl.store(partial + place[:, None] * VALUE_DIM + value_dims[None], sum_, is_element)
        tl.store(all_top + place, top, is_row)
        tl.store(all_total + place, total, is_row)


@inlined
def _visit(
    begin: tl.tensor,
    end: tl.tensor,
    state: tl.tuple,  # for each row its largest score, the sum of its weights, and the sum of its weighted values
    q: tl.tensor,
    low: tl.tensor,  # the positions [low, high) that each row sees
    high: tl.tensor,
    limit: tl.tensor,  # what is behind it is not read
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    key_block_stride: tl.tensor,
    key_stride: tl.tensor,
    value_block_stride: tl.tensor,
    value_stride: tl.tensor,
    factor: tl.tensor,
    cap_factor: tl.tensor,
    cap: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENS: tl.constexpr,
) -> tl.tuple:
    """Adds the keys of passes [begin, end) to the state."""
    top, total, sum_ = state
    for i in range(bound(begin), bound(end)):
        position = i * KEYS + tl.arange(0, KEYS)
        is_there = position < limit
        if BLOCK_SIZE % KEYS == 0:
            block = tl.load(table + i * KEYS // BLOCK_SIZE).to(tl.int64)
        elif IS_MASKED:
            block = tl.load(table + position // BLOCK_SIZE, mask=is_there, other=0).to(tl.int64)
        else:
            block = tl.load(table + position // BLOCK_SIZE).to(tl.int64)
        place = position % BLOCK_SIZE
        key_place = block * key_block_stride + place * key_stride
        k = _load(keys + key_place[:, None], is_there, KEY_DIM, IS_MASKED)
        if HAS_SCALES:
            k = _whole_numbers(k, q.dtype, WIDENS)
        scores = product(q, tl.trans(k), tl.zeros([q.shape[0], KEYS], tl.float32), PRECISION, WIDENS)
        if HAS_SCALES:
            scale_place = (block * BLOCK_SIZE + place) * tl.num_programs(1)
            scores *= _load_scales(key_scales + scale_place, is_there, IS_MASKED)[None]
        if HAS_CAP:  # cap * tanh(scale * score / cap)
            scores = cap - 2 * cap / (tl.exp(scores * cap_factor) + 1)
        if IS_MASKED:
            is_seen = (position[None] < high[:, None]) & (position[None] >= low[:, None])
            scores = tl.where(is_seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # 0 for a row that has seen no key yet
        weights = tl.exp2(scores * factor - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(weights, 1)
        value_place = block * value_block_stride + place * value_stride
        v = _load(values + value_place[:, None], is_there, VALUE_DIM, IS_MASKED)
        sum_ *= shrink[:, None]
        if HAS_SCALES:
            scales = _load_scales(value_scales + scale_place, is_there, IS_MASKED)
            v = _whole_numbers(v, q.dtype, WIDENS)
            if q.dtype == tl.float16:  # which has few exponents: the largest weight of a pass stays at most 1
                largest = tl.max(scales, 0)
                largest = tl.where(largest > 0, largest, 1.0)
                weights = (weights * (scales / largest)[None]).to(q.dtype)
                sum_ += largest * product(weights, v, tl.zeros_like(sum_), PRECISION, WIDENS)
            else:
                sum_ = product((weights * scales[None]).to(q.dtype), v, sum_, PRECISION, WIDENS)
        else:
            sum_ = product(weights.to(v.dtype), v, sum_, PRECISION, WIDENS)
        top = new_top
    return top, total, sum_


@inlined
def _load(place: tl.tensor, is_there: tl.tensor, DIM: tl.constexpr, IS_MASKED: tl.constexpr) -> tl.tensor:
    """Loads keys or values: (keys, padded dim)."""
    PAD: tl.constexpr = place.shape[1]
    if DIM != PAD:
        is_element = tl.arange(0, PAD)[None] < DIM
        if IS_MASKED:
            is_element &= is_there[:, None]
        return tl.load(place, mask=is_element, other=0)
    elif IS_MASKED:
        return tl.load(place, mask=is_there[:, None], other=0)
    else:
        return tl.load(place)


@inlined
def _load_scales(place: tl.tensor, is_there: tl.tensor, IS_MASKED: tl.constexpr) -> tl.tensor:
    """Loads the scales of an int8 cache's keys or values: (keys,) float32."""
    if IS_MASKED:
        return tl.load(place, mask=is_there, other=0.0).to(tl.float32)
    else:
        return tl.load(place).to(tl.float32)


@inlined
def _whole_numbers(x: tl.tensor, dtype: tl.constexpr, WIDENS: tl.constexpr) -> tl.tensor:
    """Converts an int8 cache's numbers to the queries' type, which holds them exactly."""
    if WIDENS:
        return x.to(tl.float32)
    else:
        return x.to(dtype)


@triton.jit(do_not_specialize=["num_parts", "num_tokens"])
def join_kernel(
    partial: tl.tensor,
    all_top: tl.tensor,
    all_total: tl.tensor,
    output: tl.tensor,
    num_parts: tl.tensor,
    num_tokens: tl.tensor,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    PARTS_PAD: tl.constexpr,
) -> None:
    """Joins the parts of one head of one token."""
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    parts, dims = tl.arange(0, PARTS_PAD), tl.arange(0, PAD)
    place = parts.to(tl.int64) * num_tokens * HEADS + row
    top = tl.load(all_top + place, mask=parts < num_parts, other=-float("inf"))
    total = tl.load(all_total + place, mask=parts < num_parts, other=0.0)
    weights = tl.exp2(top - tl.max(top, 0))
    is_element = (total > 0)[:, None] & (dims[None] < DIM)  # a part may have no keys
    part = tl.load(partial + place[:, None] * DIM + dims[None], mask=is_element, other=0.0)
    result = tl.sum(part * weights[:, None], 0) / tl.sum(total * weights, 0)
    tl.store(output + row * DIM + dims, result.to(output.dtype.element_ty), dims < DIM)
