"""Attention over the paged cache on GPUs, by kernels in Triton: decodes and chunks of prompts in one launch.

They compute what `flash.reference` computes, by softmax in passes (Dao, FlashAttention-2, 2023). A tile holds the
heads that share a key and as many queries as fit. If there are too few tiles to fill the device, the keys of each are
divided into parts, whose results a second kernel joins (Flash-Decoding, 2023). Nothing is read back from the device,
so that a step can be recorded. This module needs Triton, which torch installs on GPUs.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from engine.attention import older_gpus
from engine.layer_spec import AttentionSpec

TURING, AMPERE = (7, 5), (8, 0)  # compute capabilities
LOG2E = 1.4426950408889634
FEW_PARTS, MAX_PARTS = 8, 64
NO_WINDOW = 2**30  # tokens
PROGRAMS_PER_PROCESSOR = 4  # keys are divided into parts until there are so many
MIN_KEYS_PER_PART = 256


def _same(value: tl.tensor) -> tl.tensor:
    return value


IS_INTERPRETED = not isinstance(triton.jit(_same), triton.JITFunction)  # on the CPU, by TRITON_INTERPRET=1


@dataclass(frozen=True)
class Tiles:
    """How one shape is computed; see `tiles_of`."""

    rows: int  # pairs of a query and a head; a power of two, at least 16
    keys: int  # keys that a pass reads; a power of two, at least 16
    warps: int
    stages: int  # passes whose keys are loaded ahead


# Bytes of a number -> elements of a head, padded -> its tiles. They need less than 99 KiB of shared memory, which the
# smaller GPUs from compute capability 8.0 on have, and keep their state in registers.
CHUNK_TILES = {  # for several queries of a sequence
    2: {
        64: Tiles(rows=128, keys=64, warps=4, stages=3),
        128: Tiles(rows=128, keys=64, warps=8, stages=3),
        256: Tiles(rows=64, keys=32, warps=8, stages=3),
        512: Tiles(rows=32, keys=32, warps=8, stages=3),
    },
    4: {
        64: Tiles(rows=64, keys=32, warps=4, stages=2),
        128: Tiles(rows=32, keys=32, warps=4, stages=2),
        256: Tiles(rows=16, keys=16, warps=4, stages=2),
        512: Tiles(rows=16, keys=16, warps=8, stages=1),
    },
}
DECODE_TILES = {  # for one query of a sequence
    2: {
        64: Tiles(rows=16, keys=128, warps=4, stages=3),
        128: Tiles(rows=16, keys=64, warps=4, stages=3),
        256: Tiles(rows=16, keys=32, warps=4, stages=3),
        512: Tiles(rows=16, keys=16, warps=4, stages=2),
    },
    4: {
        64: Tiles(rows=16, keys=64, warps=4, stages=3),
        128: Tiles(rows=16, keys=32, warps=4, stages=3),
        256: Tiles(rows=16, keys=16, warps=4, stages=2),
        512: Tiles(rows=16, keys=16, warps=8, stages=1),
    },
}


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    _: None,
    longest_query: int,
    longest: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    softcap: float | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    visible: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    num_parts: int | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Computes attention over the paged cache; the signature is torch's `varlen_attn`, and more as in
    `flash.reference`.

    query (tokens, heads, dim), keys and values (blocks, block_size, kv_heads, dim) -> (tokens, heads, value dim).
    num_parts: the number of parts that each tile's keys are divided into. tiles: the tiles' sizes. None chooses both
    by shape and device.
    """
    num_tokens, num_heads, key_dim = query.shape
    _blocks, block_size, num_kv_heads, value_dim = values.shape
    group, num_sequences, is_decode = num_heads // num_kv_heads, len(seqused_k), longest_query == 1
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == block_table.stride(-1) == 1
    assert all(part is None or part.is_contiguous() for part in (*(scales or ()), visible, sinks))
    tiles = tiles or _tiles_for(query.device, max(key_dim, value_dim), query.element_size(), is_decode, group)
    queries = tiles.rows // group
    num_tiles = num_sequences if is_decode else num_tokens // queries + num_sequences
    if num_parts is None:
        num_parts = parts_of(num_tiles * num_kv_heads, longest, _num_processors(query.device))
    output = query.new_empty(num_tokens, num_heads, value_dim)
    nothing = _nothing(query.device)
    partial = top = total = nothing
    key_scales, value_scales = scales or (nothing, nothing)
    if num_parts > 1:
        sizes = ((value_dim,), (), ())
        partial, top, total = (
            torch.empty(num_parts, num_tokens, num_heads, *size, dtype=torch.float32, device=query.device)
            for size in sizes
        )
    _attend[num_tiles, num_kv_heads, num_parts](
        *(query, keys, values, output, partial, top, total, starts, seqused_k, block_table),
        *(key_scales, value_scales, nothing if visible is None else visible, nothing if sinks is None else sinks),
        scale * LOG2E if softcap is None else LOG2E,
        0.0 if softcap is None else 2 * scale / softcap,
        softcap or 0.0,
        NO_WINDOW if window_size[0] < 0 else window_size[0],
        *(num_parts, num_tokens, num_sequences),
        *(*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], block_table.stride(0)),
        GROUP=group,
        BLOCK_SIZE=block_size,
        KEY_DIM=key_dim,
        KEY_PAD=_padded(key_dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=_padded(value_dim),
        ROWS=tiles.rows,
        QUERIES=queries,
        KEYS=tiles.keys,
        IS_DECODE=is_decode,
        HAS_CAP=softcap is not None,
        HAS_SCALES=scales is not None,
        HAS_RANGES=visible is not None,
        HAS_SINKS=sinks is not None,
        PRECISION="tf32x3" if _is_ampere(query.device) else "ieee",  # for float32 alone
        WIDENS=IS_INTERPRETED and query.dtype == torch.bfloat16,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if num_parts > 1:
        _join[num_tokens, num_heads](
            *(partial, top, total, output, num_parts, num_tokens),
            HEADS=num_heads,
            DIM=value_dim,
            PAD=_padded(value_dim),
            PARTS_PAD=FEW_PARTS if num_parts <= FEW_PARTS else MAX_PARTS,
            num_warps=4 if value_dim <= 256 else 8,
        )
    return output


def can_attend(spec: AttentionSpec) -> bool:
    """Returns whether the kernel can be tried for a layer: Triton's products need a GPU of compute capability 7.5 or
    more, and those of bfloat16 8.0. On a GPU of less than 8.0, a process of its own tries it first."""
    if spec.device.type != "cuda" or spec.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    if max(spec.key_dim, spec.value_dim) > max(CHUNK_TILES[spec.dtype.itemsize]):
        return False
    capability = torch.cuda.get_device_capability(spec.device)
    if capability >= AMPERE:
        return True
    return capability >= TURING and spec.dtype != torch.bfloat16 and older_gpus.ends_well(older_gpus.trial_of(spec))


def tiles_of(dim: int, num_bytes: int, is_decode: bool, group: int) -> Tiles:
    """Chooses the tiles for a shape. num_bytes: of a number; group: heads that share a key, which are in one tile."""
    tiles = (DECODE_TILES if is_decode else CHUNK_TILES)[num_bytes][max(64, triton.next_power_of_2(dim))]
    return replace(tiles, rows=max(tiles.rows, triton.next_power_of_2(group)))


def small_tiles_of(dim: int, num_bytes: int, is_decode: bool, group: int) -> Tiles:
    """Chooses tiles as `tiles_of` does, for GPUs that have 64 KiB of shared memory and load nothing ahead: the sums of
    a tile's rows and the keys of a pass take 16 KiB each, or what the smallest tiles take."""
    tiles, pad = tiles_of(dim, num_bytes, is_decode, group), max(64, triton.next_power_of_2(dim))
    rows = max(min(tiles.rows, 2**14 // (4 * pad)), triton.next_power_of_2(group), 16)
    return replace(tiles, rows=rows, keys=max(min(tiles.keys, 2**14 // (num_bytes * pad)), 16), stages=1)


def _tiles_for(device: torch.device, dim: int, num_bytes: int, is_decode: bool, group: int) -> Tiles:
    return (tiles_of if _is_ampere(device) else small_tiles_of)(dim, num_bytes, is_decode, group)


def parts_of(num_programs: int, longest: int, num_processors: int) -> int:
    """Returns the number of parts that fills the device, of at least MIN_KEYS_PER_PART keys each."""
    enough = PROGRAMS_PER_PROCESSOR * num_processors // num_programs
    return max(1, min(enough, longest // MIN_KEYS_PER_PART, MAX_PARTS))


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def _is_ampere(device: torch.device) -> bool:
    """Returns whether the device loads ahead and has products of bfloat16 and TF32; so does the interpreter."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= AMPERE


@functools.cache
def _nothing(device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.float32, device=device)


def _padded(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))


# --- kernels


def _whole(value: Any) -> int:
    """Converts a scalar to an integer for the interpreter of Triton 3.6, whose own conversion fails with numpy 2.4."""
    return int(value.handle.data.item()) if isinstance(value, tl.tensor) else int(value)


_bound = _whole if IS_INTERPRETED else triton.jit(_same)  # makes the bound of a loop


@triton.jit(  # one compilation for all steps
    do_not_specialize=["window", "num_parts", "num_tokens", "num_sequences", "table_stride"],
    do_not_specialize_on_alignment=["starts", "lengths", "tables", "ranges"],
)
def _attend(
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
        sequence = _owner(starts, number, num_sequences, QUERIES)
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


@triton.jit
def _owner(starts: tl.tensor, number: tl.tensor, num_sequences: tl.tensor, QUERIES: tl.constexpr) -> tl.tensor:
    """Finds the sequence of tile `number`: the last one whose first tile, starts // QUERIES + sequence, is not beyond
    it."""
    low, high = 0, num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // QUERIES + middle <= number:
            low = middle
        else:
            high = middle
    return low


@triton.jit
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
    for i in range(_bound(begin), _bound(end)):
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
        scores = _product(q, tl.trans(k), tl.zeros([q.shape[0], KEYS], tl.float32), PRECISION, WIDENS)
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
                sum_ += largest * _product(weights, v, tl.zeros_like(sum_), PRECISION, WIDENS)
            else:
                sum_ = _product((weights * scales[None]).to(q.dtype), v, sum_, PRECISION, WIDENS)
        else:
            sum_ = _product(weights.to(v.dtype), v, sum_, PRECISION, WIDENS)
        top = new_top
    return top, total, sum_


@triton.jit
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


@triton.jit
def _load_scales(place: tl.tensor, is_there: tl.tensor, IS_MASKED: tl.constexpr) -> tl.tensor:
    """Loads the scales of an int8 cache's keys or values: (keys,) float32."""
    if IS_MASKED:
        return tl.load(place, mask=is_there, other=0.0).to(tl.float32)
    else:
        return tl.load(place).to(tl.float32)


@triton.jit
def _whole_numbers(x: tl.tensor, dtype: tl.constexpr, WIDENS: tl.constexpr) -> tl.tensor:
    """Converts an int8 cache's numbers to the queries' type, which holds them exactly."""
    if WIDENS:
        return x.to(tl.float32)
    else:
        return x.to(dtype)


@triton.jit
def _product(a: tl.tensor, b: tl.tensor, sum_: tl.tensor, PRECISION: tl.constexpr, WIDENS: tl.constexpr) -> tl.tensor:
    """Computes sum_ + a b in float32. WIDENS: for the interpreter, which has no products of bfloat16."""
    if WIDENS:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum_, input_precision="ieee")
    else:
        return tl.dot(a, b, sum_, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_parts", "num_tokens"])
def _join(
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
