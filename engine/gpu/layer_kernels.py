"""Kernels in Triton for what is between the products of a layer: norms, activations, and the rotation and writing of
queries, keys and values."""

import torch
import triton
import triton.language as tl

from engine.cpu.cache_kernels import SMALLEST
from engine.gpu.triton_tools import inlined, on_its_device
from engine.layer_cache import LARGEST, LayerCache

Angles = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (1, tokens, dim)
ACTIVATED = 1024  # columns that one program activates


@on_its_device
def rms_norm(x: torch.Tensor, factor: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Computes x / sqrt(mean(x * x) + epsilon) * factor. x: (..., columns); factor: (columns,), float32."""
    columns = x.shape[-1]
    rows = x.reshape(-1, columns)
    output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = triton.next_power_of_2(columns)
    _norm[(len(rows),)](
        rows, factor, output, columns, rows.stride(0), epsilon, SIZE=size, num_warps=max(1, min(16, size // 512))
    )
    return output


@on_its_device
def activate(joined: torch.Tensor, is_gelu: bool) -> torch.Tensor:
    """Multiplies the activated gates, the first half of (1, tokens, 2 * columns), by the second half."""
    tokens, columns = joined.shape[1], joined.shape[2] // 2
    output = torch.empty(1, tokens, columns, dtype=joined.dtype, device=joined.device)
    _activate[tokens, triton.cdiv(columns, ACTIVATED)](joined, output, columns, IS_GELU=is_gelu, SIZE=ACTIVATED)
    return output


@on_its_device
def place_heads(
    joined: torch.Tensor,
    angles: Angles,
    norms: list[tuple[torch.Tensor, float] | None],
    cache: LayerCache,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Norms and rotates queries and keys, and writes keys and values to the cache, as `LayerCache.write` does.

    joined: (tokens, (heads + 2 * kv_heads) * dim), queries, keys and values. slots: (tokens,), places in the cache.
    Returns the queries, `scaled`, (tokens, heads, dim).
    """
    num_kv_heads, dim = cache.keys.shape[2:]
    num_heads = joined.shape[1] // dim - 2 * num_kv_heads
    query = torch.empty(len(joined), num_heads, dim, dtype=joined.dtype, device=joined.device)
    cosines, sines = (part[0].contiguous() for part in angles)
    (query_factor, query_epsilon), (key_factor, key_epsilon) = (norm or (cosines, 0.0) for norm in norms)
    key_scales, value_scales = cache.scales or (cosines, cosines)
    _place[len(joined), num_heads + 2 * num_kv_heads](
        *(joined, query, cache.keys, cache.values, slots, cosines, sines, query_factor, key_factor),
        *(key_scales, value_scales, cosines if cache.factors is None else cache.factors),
        *(query_epsilon, key_epsilon, num_heads, num_kv_heads),
        DIM=dim,
        HAS_NORMS=norms[0] is not None,
        IS_INT8=cache.is_int8,
        LARGEST=float(LARGEST),
        SMALLEST=SMALLEST,
        num_warps=1,
    )
    return query


@triton.jit
def _norm(
    x: tl.tensor,
    factor: tl.tensor,
    output: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    epsilon: tl.tensor,
    SIZE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    is_there = column < columns
    value = tl.load(x + row * stride + column, mask=is_there, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / columns + epsilon)
    value = value * tl.load(factor + column, mask=is_there, other=0.0)
    tl.store(output + row * columns + column, value.to(output.dtype.element_ty), mask=is_there)


@triton.jit
def _activate(
    joined: tl.tensor, output: tl.tensor, columns: tl.tensor, IS_GELU: tl.constexpr, SIZE: tl.constexpr
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    is_there = column < columns
    place = joined + row * 2 * columns + column
    gate = tl.load(place, mask=is_there, other=0.0).to(tl.float32)
    up = tl.load(place + columns, mask=is_there, other=0.0).to(tl.float32)
    if IS_GELU:  # its tanh form, tanh(x) = 2 sigmoid(2 x) - 1
        gate = gate * tl.sigmoid(2 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
    else:
        gate = gate * tl.sigmoid(gate)
    tl.store(output + row * columns + column, (gate * up).to(output.dtype.element_ty), mask=is_there)


@triton.jit
def _place(
    joined: tl.tensor,
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    slots: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    query_factor: tl.tensor,
    key_factor: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    factors: tl.tensor,
    query_epsilon: tl.tensor,
    key_epsilon: tl.tensor,
    num_heads: tl.tensor,
    num_kv_heads: tl.tensor,
    DIM: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    IS_INT8: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    """Places one head of one token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, DIM // 2)
    source = joined + (token * (num_heads + 2 * num_kv_heads) + head) * DIM + half
    first, second = tl.load(source), tl.load(source + DIM // 2)
    slot = tl.load(slots + token)
    if head >= num_heads + num_kv_heads:  # a value
        place = slot * num_kv_heads + head - num_heads - num_kv_heads
        _store(values, value_scales, place, first, second, half, DIM, IS_INT8, LARGEST, SMALLEST)
    elif head >= num_heads:
        _store_key(
            *(keys, key_scales, factors, slot * num_kv_heads, head - num_heads, first, second),
            *(cosines, sines, key_factor, key_epsilon, token, half, DIM, HAS_NORMS, IS_INT8, LARGEST, SMALLEST),
        )
    else:
        _store_query(
            *(query, factors, token * num_heads, head, num_heads // num_kv_heads, first, second),
            *(cosines, sines, query_factor, query_epsilon, token, half, DIM, HAS_NORMS, IS_INT8),
        )


@inlined
def _store_key(
    keys: tl.tensor,
    scales: tl.tensor,
    factors: tl.tensor,
    start: tl.tensor,
    head: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    norm: tl.tensor,
    epsilon: tl.tensor,
    token: tl.tensor,
    half: tl.tensor,
    DIM: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    IS_INT8: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    """Writes a key, as head `start + head` of the cache."""
    first, second = _rotated(first, second, cosines, sines, norm, epsilon, token, half, DIM, HAS_NORMS)
    if IS_INT8:
        factor = factors + head * DIM + half
        first = tl.div_rn(first.to(tl.float32), tl.load(factor))
        second = tl.div_rn(second.to(tl.float32), tl.load(factor + DIM // 2))
    _store(keys, scales, start + head, first, second, half, DIM, IS_INT8, LARGEST, SMALLEST)


@inlined
def _store_query(
    query: tl.tensor,
    factors: tl.tensor,
    start: tl.tensor,
    head: tl.tensor,
    group: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    norm: tl.tensor,
    epsilon: tl.tensor,
    token: tl.tensor,
    half: tl.tensor,
    DIM: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    IS_INT8: tl.constexpr,
) -> None:
    """Writes a query, as head `start + head` of all."""
    first, second = _rotated(first, second, cosines, sines, norm, epsilon, token, half, DIM, HAS_NORMS)
    if IS_INT8:
        factor = factors + head // group * DIM + half
        first, second = first * tl.load(factor), second * tl.load(factor + DIM // 2)
    _write(query, start + head, first, second, half, DIM)


@inlined
def _rotated(
    first: tl.tensor,
    second: tl.tensor,
    cosines: tl.tensor,
    sines: tl.tensor,
    factor: tl.tensor,
    epsilon: tl.tensor,
    token: tl.tensor,
    half: tl.tensor,
    DIM: tl.constexpr,
    HAS_NORMS: tl.constexpr,
) -> tl.tuple:
    """Norms and rotates a head, given as its two halves. Returns them in the model's type."""
    dtype: tl.constexpr = first.dtype
    first, second = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORMS:
        scale = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / DIM + epsilon)
        first = first * scale * tl.load(factor + half)
        second = second * scale * tl.load(factor + DIM // 2 + half)
    angle = token * DIM + half
    cosine, sine = tl.load(cosines + angle).to(tl.float32), tl.load(sines + angle).to(tl.float32)
    turned = first * cosine - second * sine
    angle += DIM // 2
    cosine, sine = tl.load(cosines + angle).to(tl.float32), tl.load(sines + angle).to(tl.float32)
    return turned.to(dtype), (second * cosine + first * sine).to(dtype)


@inlined
def _store(
    target: tl.tensor,
    scales: tl.tensor,
    place: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    half: tl.tensor,
    DIM: tl.constexpr,
    IS_INT8: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
) -> None:
    """Writes a head to the cache; to one of 8 bits as `layer_cache.quantized` rounds it, and its scale."""
    if IS_INT8:
        first, second = first.to(tl.float32), second.to(tl.float32)
        num_nans = tl.sum((first != first).to(tl.int32) + (second != second).to(tl.int32), 0)
        largest = tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 0)  # which may leave out a NaN
        scale = _as_bfloat16(tl.div_rn(largest, LARGEST))
        tl.store(scales + place, tl.where(num_nans > 0, float("nan"), scale).to(scales.dtype.element_ty))
        divisor = tl.where(num_nans > 0, float("nan"), tl.maximum(scale, SMALLEST))
        first, second = _rounded(first, divisor, LARGEST), _rounded(second, divisor, LARGEST)
    _write(target, place, first, second, half, DIM)


@inlined
def _write(
    target: tl.tensor, place: tl.tensor, first: tl.tensor, second: tl.tensor, half: tl.tensor, DIM: tl.constexpr
) -> None:
    """Writes a head as number `place` of all."""
    start = target + place * DIM + half
    tl.store(start, first.to(target.dtype.element_ty))
    tl.store(start + DIM // 2, second.to(target.dtype.element_ty))


@inlined
def _rounded(x: tl.tensor, divisor: tl.tensor, LARGEST: tl.constexpr) -> tl.tensor:
    """Rounds quotients to whole numbers, ties to even; what is no number becomes 0."""
    x = tl.div_rn(x, divisor + tl.zeros_like(x))
    x = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -LARGEST), LARGEST)
    return (x + 12582912.0) - 12582912.0  # 1.5 * 2^23, beyond which float32 has whole numbers alone


@inlined
def _as_bfloat16(x: tl.tensor) -> tl.tensor:
    """Rounds a positive float32 to one that bfloat16 holds, ties to even; the interpreter's conversion rounds down."""
    bits = x.to(tl.int32, bitcast=True)
    bits += 0x7FFF + ((bits >> 16) & 1)
    return ((bits >> 16) << 16).to(tl.float32, bitcast=True)
