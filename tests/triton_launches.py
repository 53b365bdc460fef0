"""Launches of every kernel in Triton, with all that it can have; see triton_compiler.py."""

from dataclasses import replace
from functools import partial

import torch
from gpu_codes import FORMATS, codes_of

from engine.attention import paged_triton
from engine.attention.flash import Trial
from engine.gpu import layer_kernels, products
from engine.gpu.packed_weight import pack
from engine.layer_cache import LayerCache
from engine.layer_spec import AttentionSpec

CPU = torch.device("cpu")
COLUMNS_PER_SCALE = {"q4_0": 128}  # as GPTQ has it


def launch(capability: int) -> None:
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    attend(capability, dtype)
    multiply(dtype)
    multiply_vocabulary(dtype)
    place(dtype)
    layer_kernels.rms_norm(torch.zeros(2, 4096, dtype=dtype), torch.zeros(4096), 1e-6)
    for is_gelu in (False, True):
        layer_kernels.activate(torch.zeros(1, 2, 4096, dtype=dtype), is_gelu)


def attend(capability: int, dtype: torch.dtype) -> None:
    """Decodes and chunks, in parts too, of heads of every size; plain, and with caps, sinks, images and int8 caches."""
    chunks, decodes = ([3, 40], [50, 40]), ([1, 1], [50, 40])
    for dim, number in [(64, dtype), (128, dtype), (256, dtype), (128, torch.float32)]:
        plain = AttentionSpec(2, dim, dim, None, number, CPU, None, 4)
        capped = replace(plain, softcap=30.0, window=20)
        whole = replace(plain, has_sinks=True, sees_ahead=True, key_factors=(1.0,) * 2 * dim)
        for spec, (counts, lengths), num_parts in [
            *((plain, shape, 1) for shape in (chunks, decodes)),
            *((each, shape, 2) for shape in (chunks, decodes) for each in (capped, whole)),
        ]:
            is_decode = lengths == decodes[1] and counts == decodes[0]
            choose = paged_triton.tiles_of if capability >= 80 else paged_triton.small_tiles_of
            tiles = choose(dim, number.itemsize, is_decode, spec.group)
            Trial.of(spec, 16, counts, lengths).run(
                partial(paged_triton.paged_attention, num_parts=num_parts, tiles=tiles)
            )


def multiply(dtype: torch.dtype) -> None:
    """Every format in every way, as it is for a model's large layers."""
    for name in ("q4_0", "q4_k", "int8", "q6_k", "q5_k", "q3_k", "iq4_xs", "e4m3"):
        weight = pack(codes_of(FORMATS[name], 64, 4096, CPU, COLUMNS_PER_SCALE.get(name, 0)))
        bias = torch.zeros(64, dtype=dtype)
        products.dequantised(weight, dtype)
        for tiles in (products.ONE_TOKEN, *products.SEVERAL_TOKENS):
            x = torch.zeros(tiles.tokens, 4096, dtype=dtype)
            output = torch.zeros(tiles.tokens, 64, dtype=dtype)
            if tiles is products.ONE_TOKEN:
                products.multiply_numbers(x, weight, bias, output)
            elif tiles is products.tiles_for(weight, tiles.tokens):
                products.multiply_tiles(x, weight, bias, output, num_parts=1)
        experts = torch.tensor([0, 8, 16, 16, 16], dtype=torch.int32)
        products.multiply_tiles(x[:16], weight, None, torch.zeros(16, 16, dtype=dtype), experts, num_parts=2)


def multiply_vocabulary(dtype: torch.dtype) -> None:
    """The output layer of Gemma 3, which has the most rows, in every way."""
    weight = pack(codes_of(FORMATS["q6_k"], 262_208, 256, CPU))
    products.dequantised(weight, dtype)
    for count in (1, 16):
        x, output = torch.zeros(count, 256, dtype=dtype), torch.zeros(count, 262_208, dtype=dtype)
        products.multiply_numbers(x, weight, None, output)
        products.multiply_tiles(x, weight, None, output)


def place(dtype: torch.dtype) -> None:
    """Queries, keys and values, with norms, in a cache as it is and in one of 8 bits."""
    joined, norm = torch.zeros(3, (4 + 2 * 2) * 64, dtype=dtype), (torch.zeros(64), 1e-6)
    angles = (torch.zeros(1, 3, 64, dtype=dtype), torch.zeros(1, 3, 64, dtype=dtype))
    plain = AttentionSpec(2, 64, 64, None, dtype, CPU)
    for spec in (plain, replace(plain, key_factors=(1.0,) * 128)):
        factors = spec.make_factors()
        own = (factors, None if factors is None else factors[:, None, None].to(dtype))
        keys, values, *scales = spec.make_tensors(2, 16)
        cache = LayerCache(keys, values, *(scales or (None, None)), *own)
        layer_kernels.place_heads(joined, angles, [norm, norm], cache, torch.arange(3))
