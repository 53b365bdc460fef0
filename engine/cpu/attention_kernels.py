"""Kernels for attention over the paged cache on the CPU: for the heads that go in, and for decodes.

They read keys and values in place in the cache, need no masks, and compute in float32 whatever the cache's data type.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.cpu import jit
from engine.cpu.activations import DTYPES, FEW_ROWS
from engine.cpu.cache_kernels import write_rounded
from engine.cpu.jit import F32, FLOATS, I64, LANES, Builder, Program, constant
from engine.cpu.prompt_attention import is_inside

MAX_ROTATED_DIM = 256  # elements of a head, which must fit into the registers

Norms = tuple[torch.Tensor, torch.Tensor, float] | None


Scales = tuple[torch.Tensor, torch.Tensor] | None  # of an int8 cache's keys and values, (blocks, block_size, kv_heads)


def can_attend(dtype: torch.dtype, keys: torch.Tensor, values: torch.Tensor) -> bool:
    """Returns whether the kernels can read this cache for queries of `dtype`."""
    dims = {keys.shape[-1], values.shape[-1]}
    is_here = keys.device.type == "cpu" and dtype in DTYPES and jit.is_available()
    return is_here and len(dims) == 1 and not keys.shape[-1] % LANES


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    ranges: torch.Tensor,
    scaling: float,
    output: torch.Tensor,
    scales: Scales = None,
) -> None:
    """Computes attention of one query per sequence over its blocks, and writes output.

    query: (kv_heads, group, sequences, dim), its heads evenly apart. keys, values: (blocks, block_size, kv_heads, dim).
    tables: (sequences, width) int64 block numbers. ranges: (sequences, 2) int64, the first position in the table's
    blocks that is visible, and the end. output: (sequences, kv_heads, group, dim). scales: of an int8 cache.
    """
    group, sequences, dim = query.shape[1:]
    head_stride = query.stride(0) // group
    _, block_size, kv_heads, _ = keys.shape
    assert output.is_contiguous() and query.stride(3) == 1 and query.stride(0) == group * head_stride
    longest = tables.shape[1] * block_size
    padded = -(-longest // LANES) * LANES
    threads = torch.get_num_threads() if sequences * longest > 64 else 1
    scores = torch.empty(threads, padded, dtype=torch.float32)
    scale_dtype = None if scales is None else scales[0].dtype
    _attend(query.dtype, keys.dtype, scale_dtype, dim, scaling)(
        query.data_ptr(),
        head_stride,
        query.stride(2),
        keys.data_ptr(),
        values.data_ptr(),
        *((0, 0) if scales is None else (part.data_ptr() for part in scales)),
        tables.data_ptr(),
        tables.shape[1],
        ranges.data_ptr(),
        output.data_ptr(),
        scores.data_ptr(),
        padded,
        sequences,
        kv_heads * group,
        kv_heads,
        block_size,
        num_threads=threads,
    )


def can_rotate(dim: int, num_rotated: int) -> bool:
    """Returns whether `rotate` can handle heads of so many elements, the first of which are rotated."""
    return not dim % LANES and dim <= MAX_ROTATED_DIM and not num_rotated % (2 * LANES) and num_rotated <= dim


def rotate(
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    angles: tuple[torch.Tensor, torch.Tensor],
    norms: Norms,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    query_step: int,
    scales: Scales = None,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """Applies rotary embeddings, after a normalisation if `norms` is given, and writes keys and values to the cache.

    heads: queries, keys and values, each (tokens, heads * dim); their rows may have gaps. angles: cosines and sines of
    the first elements of a head, (1, tokens, rotated) of the same dtype. norms: weights of queries and keys, (dim,)
    float32, and epsilon. keys, values: (blocks, block_size, kv_heads, dim). slots: (tokens,) int64. query_step: from
    one query head to the next, where something else is between them. scales, factors: of an int8 cache; keys are
    divided by the factors, (kv_heads, dim) float32, and queries multiplied. Returns the queries, (tokens, heads, dim).
    """
    query, key, value = heads
    cosine, sine = angles
    num_tokens, dim, kv_heads = query.shape[0], keys.shape[-1], keys.shape[-2]
    num_heads = query.shape[1] // query_step
    assert cosine.dtype == query.dtype and keys.dtype == (query.dtype if scales is None else torch.int8)
    assert cosine.is_contiguous() and sine.is_contiguous()
    output = torch.empty(num_tokens, num_heads, dim, dtype=query.dtype)
    weights = (0, 0) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
    epsilon = None if norms is None else norms[2]
    _rotate(query.dtype, dim, cosine.shape[-1], query_step, epsilon, scales is not None)(
        *(address for part in heads for address in (part.data_ptr(), part.stride(0))),
        cosine.data_ptr(),
        sine.data_ptr(),
        *weights,
        keys.data_ptr(),
        values.data_ptr(),
        *((0, 0) if scales is None else (part.data_ptr() for part in scales)),
        0 if factors is None else factors.data_ptr(),
        slots.data_ptr(),
        output.data_ptr(),
        num_tokens,
        num_heads,
        kv_heads,
        num_threads=torch.get_num_threads() if num_tokens > FEW_ROWS else 1,
    )
    return output


# --- the programs


_ROTATE = (
    *("query", "query_stride", "key", "key_stride", "value", "value_stride", "cosine", "sine", "query_weight"),
    *("key_weight", "keys", "values", "key_scales", "value_scales", "factors", "slots", "output"),
    *("tokens", "heads", "kv_heads"),
)


@functools.cache
def _rotate(
    dtype: torch.dtype, dim: int, num_rotated: int, query_step: int, epsilon: float | None, is_int8: bool
) -> Program:
    """Gives each thread some of the tokens. The first half of what is rotated rotates with the second, as in
    GPT-NeoX."""
    b = Builder("rotate", _ROTATE, jit.host()[1])
    argument, size = b.argument, dtype.itemsize
    group = b.sdiv(argument["heads"], argument["kv_heads"])

    def read(name: str, token: jit.Value, head: jit.Value, step: int) -> list[jit.Value]:
        source = b.address(argument[name], b.mul(token, argument[f"{name}_stride"]), size)
        start = b.address(source, head, step * size)
        return [b.read_floats(dtype, b.add(start, I64(i * size))) for i in range(0, dim, LANES)]

    def rotated(parts: list[jit.Value], token: jit.Value, weight: str) -> list[jit.Value]:
        angles = [b.address(argument[name], token, num_rotated * size) for name in ("cosine", "sine")]
        if epsilon is not None:
            parts = _normalized(b, parts, argument[weight], epsilon)
        first = parts[: num_rotated // LANES]
        return _rotated(b, dtype, first, *angles) + parts[num_rotated // LANES :]

    def factors(kv_head: jit.Value) -> list[jit.Value]:
        start = b.address(argument["factors"], kv_head, 4 * dim)
        return [b.read(FLOATS, b.add(start, I64(4 * i))) for i in range(0, dim, LANES)]

    def write(parts: list[jit.Value], name: str, place: jit.Value, scales: str = "") -> None:
        if scales and is_int8:
            write_rounded(b, parts, argument[name], argument[scales], place)
            return
        for i, part in enumerate(parts):
            b.write_floats(part, dtype, b.add(b.address(argument[name], place, dim * size), I64(i * LANES * size)))

    with b.share(argument["tokens"]) as token:
        first = b.mul(b.read(I64, b.address(argument["slots"], token, 8)), argument["kv_heads"])
        with b.loop(I64(0), argument["heads"]) as head:
            parts = rotated(read("query", token, head, query_step), token, "query_weight")
            if is_int8:
                parts = list(map(b.fmul, parts, factors(b.sdiv(head, group))))
            write(parts, "output", b.add(b.mul(token, argument["heads"]), head))
        with b.loop(I64(0), argument["kv_heads"]) as head:
            parts = rotated(read("key", token, head, dim), token, "key_weight")
            if is_int8:
                parts = list(map(b.fdiv, parts, factors(head)))
            write(parts, "keys", b.add(first, head), "key_scales")
            write(read("value", token, head, dim), "values", b.add(first, head), "value_scales")
    return jit.compile_program(b)


def _normalized(b: Builder, parts: list[jit.Value], weight: jit.Value, epsilon: float) -> list[jit.Value]:
    """Divides a head by the root of the mean of its squares, and multiplies it by the weight."""
    squares = constant(FLOATS, 0.0)
    for part in parts:
        squares = b.fused(part, part, squares)
    mean = b.fdiv(b.total(squares), F32(float(len(parts) * LANES)))
    scale = b.splat(b.fdiv(F32(1.0), b.intrinsic("llvm.sqrt.f32", F32, b.fadd(mean, F32(epsilon)))))
    weights = [b.read(FLOATS, b.add(weight, I64(4 * LANES * i))) for i in range(len(parts))]
    return [b.fmul(b.fmul(part, scale), factor) for part, factor in zip(parts, weights, strict=True)]


def _rotated(
    b: Builder, dtype: torch.dtype, parts: list[jit.Value], cosine: jit.Value, sine: jit.Value
) -> list[jit.Value]:
    size, half = LANES * dtype.itemsize, len(parts) // 2
    partners = [*(b.fneg(part) for part in parts[half:]), *parts[:half]]
    rotated = []
    for i, (part, partner) in enumerate(zip(parts, partners, strict=True)):
        cos, sin = (b.read_floats(dtype, b.add(start, I64(i * size))) for start in (cosine, sine))
        rotated.append(b.fused(part, cos, b.fmul(partner, sin)))
    return rotated


_ATTEND = (
    *("query", "head_stride", "sequence_stride", "keys", "values", "key_scales", "value_scales", "tables", "width"),
    *("ranges", "output", "scores", "num_scores", "sequences", "heads", "kv_heads", "block_size"),
)


@functools.cache
def _attend(
    dtype: torch.dtype, stored: torch.dtype, scale_dtype: torch.dtype | None, dim: int, scaling: float
) -> Program:
    """Gives each thread some heads of some sequences. It computes all scores, their softmax, the sum of the values.

    dtype: of queries and outputs; stored: of keys and values. The scale of a key multiplies its score, that of a value
    its weight.
    """
    b = Builder("attend", _ATTEND, jit.host()[1])
    argument, size = b.argument, dtype.itemsize

    def head_at(cache: str, place: jit.Value) -> list[jit.Value]:
        start = b.address(argument[cache], place, dim * stored.itemsize)
        return [b.read_floats(stored, b.add(start, I64(i * stored.itemsize))) for i in parts]

    def times_scale(value: jit.Value, scales: str, place: jit.Value) -> jit.Value:
        if scale_dtype is None:
            return value
        return b.fmul(value, b.read_float(scale_dtype, b.address(argument[scales], place, scale_dtype.itemsize)))

    parts = range(0, dim, LANES)
    scores = b.add(argument["scores"], b.mul(b.mul(b.thread, argument["num_scores"]), I64(4)))
    best, total = b.variable(constant(FLOATS, 0.0)), b.variable(constant(FLOATS, 0.0))
    sums = [b.variable(constant(FLOATS, 0.0)) for _ in parts]
    with b.share(b.mul(argument["sequences"], argument["heads"])) as index:
        sequence, head = b.sdiv(index, argument["heads"]), b.srem(index, argument["heads"])
        start = b.add(b.mul(head, argument["head_stride"]), b.mul(sequence, argument["sequence_stride"]))
        query = [b.read_floats(dtype, b.address(argument["query"], b.add(start, I64(i)), size)) for i in parts]
        query = [b.fmul(part, constant(FLOATS, scaling)) for part in query]
        kv_head = b.sdiv(head, b.sdiv(argument["heads"], argument["kv_heads"]))
        visible = _Visible(b, sequence, kv_head)
        with visible.tokens() as (position, place):
            products = constant(FLOATS, 0.0)
            for part, key in zip(query, head_at("keys", place), strict=True):
                products = b.fused(part, key, products)
            b.write(times_scale(b.total(products), "key_scales", place), b.address(scores, position, 4))
        _softmax(b, scores, visible, best, total)
        for part in sums:
            part.set(constant(FLOATS, 0.0))
        with visible.tokens() as (position, place):
            weight = times_scale(b.read(F32, b.address(scores, position, 4)), "value_scales", place)
            weight = b.splat(weight)
            for part, value in zip(sums, head_at("values", place), strict=True):
                part.set(b.fused(weight, value, part.get()))
        scale = b.splat(b.fdiv(F32(1.0), b.total(total.get())))
        for i, part in zip(parts, sums, strict=True):
            place = b.add(b.mul(index, I64(dim)), I64(i))
            b.write_floats(b.fmul(part.get(), scale), dtype, b.address(argument["output"], place, size))
    return jit.compile_program(b)


class _Visible:
    """The tokens that a sequence's query sees, found in the blocks of its table."""

    def __init__(self, b: Builder, sequence: jit.Value, kv_head: jit.Value) -> None:
        self.b, self.kv_head = b, kv_head
        self.table = b.address(b.argument["tables"], b.mul(sequence, b.argument["width"]), 8)
        ends = b.address(b.argument["ranges"], sequence, 16)
        self.first, self.end = b.read(I64, ends), b.read(I64, b.add(ends, I64(8)))

    @contextmanager
    def tokens(self) -> Iterator[tuple[jit.Value, jit.Value]]:
        """Loops over the tokens' positions and the places of their heads: which one of all heads in the cache."""
        b, size = self.b, self.b.argument["block_size"]
        last = b.add(b.sdiv(b.sub(self.end, I64(1)), size), I64(1))
        with b.loop(b.sdiv(self.first, size), last) as index:
            before = b.mul(index, size)
            block = b.read(I64, b.address(self.table, index, 8))
            low, high = b.larger(self.first, before), b.smaller(self.end, b.add(before, size))
            with b.loop(low, high) as position:
                slot = b.add(b.mul(block, size), b.sub(position, before))
                yield position, b.add(b.mul(slot, b.argument["kv_heads"]), self.kv_head)


def _softmax(b: Builder, scores: jit.Value, visible: _Visible, best: jit.Variable, total: jit.Variable) -> None:
    """Replaces scores by weights that are not divided by their sum yet; the sum goes to `total`, lane by lane."""
    best.set(constant(FLOATS, float("-inf")))
    total.set(constant(FLOATS, 0.0))
    first = b.and_(visible.first, I64(-LANES))
    with b.loop(first, visible.end, LANES) as position:
        place = b.address(scores, position, 4)
        inside = is_inside(b, position, visible.first, visible.end)
        score = b.select(inside, b.read(FLOATS, place), constant(FLOATS, float("-inf")))
        b.write(score, place)
        best.set(b.intrinsic("llvm.maximum.v16f32", FLOATS, best.get(), score))
    _exponentiate(b, scores, first, visible.end, best, total)


def _exponentiate(
    b: Builder, scores: jit.Value, first: jit.Value, end: jit.Value, best: jit.Variable, total: jit.Variable
) -> None:
    top = b.splat(b.intrinsic("llvm.vector.reduce.fmaximum.v16f32", F32, best.get()))
    with b.loop(first, end, LANES) as position:
        place = b.address(scores, position, 4)
        weights = b.exp(b.fsub(b.read(FLOATS, place), top))
        b.write(weights, place)
        total.set(b.fadd(total.get(), weights))
