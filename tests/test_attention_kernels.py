import pytest
import torch
from amx_emulator import BUILDERS

from engine.attention.paged import visible_of
from engine.cpu import activations, attention_kernels, kernels, prompt_attention, prompt_plan
from engine.cpu.amx import AMXBuilder
from engine.cpu.prompt_plan import Plan
from engine.layer_cache import LayerCache, quantized

pytestmark = [
    pytest.mark.skipif(not kernels.are_available(), reason="needs torch with GNU's OpenMP"),
    pytest.mark.usefixtures("threads"),
]


def random_cache(shape: tuple[int, ...], dtype: torch.dtype, is_int8: bool) -> tuple[LayerCache, list[torch.Tensor]]:
    """Returns random keys and values, and the numbers that they stand for."""
    plain = [torch.randn(shape).to(dtype) for _ in range(2)]
    if not is_int8:
        return LayerCache(*plain), plain
    (keys, key_scales), (values, value_scales) = (quantized(numbers, None, torch.bfloat16) for numbers in plain)
    numbers = [keys.float() * key_scales.float()[..., None], values.float() * value_scales.float()[..., None]]
    return LayerCache(keys, values, key_scales, value_scales), numbers


@pytest.mark.parametrize("dtype", activations.DTYPES)
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(4, 4, 16), (6, 2, 64), (3, 1, 80), (4, 2, 96), (2, 2, 128), (2, 1, 256), (2, 1, 512)],
)
def test_attention_of_decodes_is_that_of_torch(
    dtype: torch.dtype, is_int8: bool, heads: int, kv_heads: int, dim: int
) -> None:
    torch.manual_seed(heads)
    block_size, width, lengths, firsts = 16, 5, [1, 16, 17, 80], [0, 0, 3, 47]
    cache, numbers = random_cache((32, block_size, kv_heads, dim), dtype, is_int8)
    tables = torch.stack([torch.randperm(32)[:width] for _ in lengths])
    query = torch.randn(1, len(lengths), heads, dim).to(dtype).transpose(1, 2)[0]  # strided, as models give it
    query = query.unflatten(0, (kv_heads, -1))
    ranges = torch.tensor(list(zip(firsts, lengths, strict=True)))
    output = torch.empty(len(lengths), kv_heads, heads // kv_heads, dim, dtype=dtype)
    attention_kernels.attend(query, cache.keys, cache.values, tables, ranges, 0.3, output, cache.scales)
    for row, (first, end) in enumerate(zip(firsts, lengths, strict=True)):
        k, v = (part[tables[row]].flatten(0, 1)[first:end].transpose(0, 1).float() for part in numbers)
        expected = torch.nn.functional.scaled_dot_product_attention(
            query.flatten(0, 1)[:, row, None].float(), k, v, scale=0.3, enable_gqa=True
        )
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(output[row].flatten(0, 1).float(), expected[:, 0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scaling", [64**-0.5, 80**-0.5, 128**-0.5, 256**-0.5, 0.3, 1.0])
@pytest.mark.parametrize("dtype", activations.DTYPES)
@pytest.mark.parametrize("builder", [None, *BUILDERS])
def test_a_query_may_see_nothing_of_a_tile_that_others_see(
    dtype: torch.dtype, scaling: float, builder: type[AMXBuilder] | None
) -> None:
    """With a window of 20, the last of 24 queries from position 252 on sees the first tile no more."""
    start, tokens, window = prompt_plan.KEYS - 4, 24, 20
    torch.manual_seed(0)
    keys, values = (torch.randn(20, 16, 1, 64).to(dtype) for _ in range(2))
    query = torch.randn(4, tokens, 64).to(dtype)[None]
    output = torch.empty(tokens, 1, 4, 64, dtype=dtype)
    slots, visible = prompt_attention.slots_of(torch.arange(20), 16), visible_of(start, tokens, window, [])
    plan = Plan.of(dtype, 64, builder is not None)
    program = plan, prompt_attention.chunk_program(plan, scaling, builder or AMXBuilder)
    prompt_attention.attend_chunk(query, keys, values, slots, visible, scaling, output, program)
    k, v = (cache.flatten(0, 1)[: start + tokens, 0].float() for cache in (keys, values))
    distance = torch.arange(start, start + tokens)[:, None] - torch.arange(start + tokens)
    mask = (distance >= 0) & (distance < window)
    expected = torch.nn.functional.scaled_dot_product_attention(query[0].float(), k, v, attn_mask=mask, scale=scaling)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(output[:, 0].float(), expected.transpose(0, 1), rtol=tolerance, atol=tolerance)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("dtype", activations.DTYPES)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("is_int8", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 16), (6, 2, 64), (2, 1, 256), (4, 2, 80)])
@pytest.mark.parametrize(("start", "tokens"), [(0, 1), (0, 40), (37, 30), (64, 4), (301, 200)])
@pytest.mark.parametrize("has_images", [False, True])
@pytest.mark.parametrize("builder", [None, *BUILDERS])  # of programs with AMX
def test_attention_of_a_chunk_is_that_of_torch(
    dtype: torch.dtype,
    window: int | None,
    is_int8: bool,
    heads: int,
    kv_heads: int,
    dim: int,
    start: int,
    tokens: int,
    has_images: bool,
    builder: type[AMXBuilder] | None,
) -> None:
    images = [(start + tokens // 5, start + tokens // 2), (start + tokens // 2, start + tokens)] if has_images else []
    torch.manual_seed(tokens)
    cache, numbers = random_cache((64, 16, kv_heads, dim), dtype, is_int8)
    table = torch.randperm(64)[: -(-(start + tokens) // 16)]
    query = torch.randn(1, tokens, heads, dim).to(dtype).transpose(1, 2)[0].unflatten(0, (kv_heads, -1))
    output = torch.empty(tokens, kv_heads, heads // kv_heads, dim, dtype=dtype)
    slots, visible = prompt_attention.slots_of(table, 16), visible_of(start, tokens, window, images)
    plan = Plan.of(dtype, dim, builder is not None, is_int8)
    program = plan, prompt_attention.chunk_program(plan, 0.3, builder or AMXBuilder)
    prompt_attention.attend_chunk(query, cache.keys, cache.values, slots, visible, 0.3, output, program, cache.scales)
    k, v = (part[table].flatten(0, 1)[: start + tokens].transpose(0, 1).double() for part in numbers)
    distance = torch.arange(start, start + tokens)[:, None] - torch.arange(start + tokens)
    mask = (distance >= 0) & (distance < (window or 10**6))
    for first, end in images:  # all of whose tokens see each other
        mask[max(first - start, 0) : end - start, first:end] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.flatten(0, 1).double(), k, v, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    actual, expected = output.flatten(1, 2).double(), expected.transpose(0, 1)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
