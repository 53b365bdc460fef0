"""Fused layers compute what the stock ones do: on a GPU where there is one, else in Triton's interpreter."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from devices import DEVICE
from lora_files import TinyAdapter, greedy_tokens
from models import FAMILIES, tiny_model
from test_flash_attention import OPTIONS
from transformers import GlmConfig, GlmForCausalLM

from engine.async_runner import AsyncRunner
from engine.attention import flash, paged
from engine.build import build_engine, model_runner_of
from engine.engine import Engine
from engine.layer_cache import LayerCache, quantized
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

pytest.importorskip("triton", reason="Triton is not installed; torch's builds for CUDA bring it")
from engine.gpu import layer_kernels  # noqa: E402


def engine_of(family: str, is_fused: bool, cache: str = "auto") -> Engine:
    """With one call of attention for all sequences, as a GPU has it."""
    from engine.gpu import triton_layers

    model = tiny_model(family).to(DEVICE)
    if is_fused:
        num_layers = model.config.num_hidden_layers
        without_norms = 2 * num_layers if family in ("qwen2", "llama") else 0
        assert triton_layers.fuse_gpu_layers(model) >= 4 * num_layers + 1 - without_norms
    engine = build_engine(model, replace(OPTIONS, kv_cache_dtype=cache), frozenset())
    inner = engine.runner.runner if isinstance(engine.runner, AsyncRunner) else engine.runner
    if DEVICE.type == "cpu":
        assert isinstance(inner, ModelRunner)
        engine.runner = ModelRunner(model, inner.cache, flash=flash.reference)
    return engine


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_fused_layers_give_the_same_tokens(family: str, cache: str) -> None:
    found = []
    for is_fused in (False, True):
        engine = engine_of(family, is_fused, cache)
        params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        sequences = [Sequence(prompt, params, lambda output: None) for prompt in ([5, 6, 7, 8, 9], [11])]
        for sequence in sequences:
            engine.scheduler.add(sequence)
        while engine.scheduler.has_work:
            engine.step()
        found.append([sequence.output_ids for sequence in sequences])
    assert found[0] == found[1]


def test_heads_of_which_a_part_is_rotated_give_the_same_tokens() -> None:
    """Their angles have fewer columns than a head; fused layers leave them to the stock ones."""
    from engine.gpu import triton_layers

    shapes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    config = GlmConfig(vocab_size=199, head_dim=16, intermediate_size=96, rope_parameters=rope, **shapes)
    config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    stock = GlmForCausalLM(config).eval().to(DEVICE)
    model = copy.deepcopy(stock)
    model.set_attn_implementation(paged.NAME)
    triton_layers.fuse_gpu_layers(model)
    engine = build_engine(model, OPTIONS, frozenset())
    if DEVICE.type == "cpu":
        engine.runner = ModelRunner(model, model_runner_of(engine).cache, flash=flash.reference)
    own = Sequence([5, 6, 7, 8, 9], SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True), lambda output: None)
    engine.scheduler.add(own)
    while engine.scheduler.has_work:
        engine.step()
    assert own.output_ids == greedy_tokens(stock, [5, 6, 7, 8, 9], 6)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_fused_layers_apply_the_adapter_of_each_sequence(family: str, tmp_path: Path) -> None:
    stock = tiny_model(family, "eager")
    ends = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    made, engine, prompt = TinyAdapter(stock, ends), engine_of(family, is_fused=True), [5, 6, 7, 8, 9]
    adapter = model_runner_of(engine).adapters.read("mine", made.save(tmp_path), max_rank=8)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    owners = [replace(params, adapter=adapter), params]
    sequences = [Sequence(prompt, own, lambda output: None) for own in owners]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    expected = [greedy_tokens(model, prompt, 4) for model in (made.merged(), stock)]
    assert [sequence.output_ids for sequence in sequences] == expected and expected[0] != expected[1]


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN slice) encountered:RuntimeWarning")  # a GPU is silent
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("special", [0.0, torch.nan, torch.inf, -torch.inf, 1e-30])
def test_an_int8_cache_holds_the_numbers_that_stock_layers_write(dtype: torch.dtype, special: float) -> None:
    """Bit for bit: also for heads of zeros, and of what is no number, which show in the scale."""

    tokens, kv_heads, group, dim = 9, 2, 3, 16
    joined = torch.randn(tokens, (group + 2) * kv_heads * dim, device=DEVICE).to(dtype)
    heads = joined.view(tokens, -1, dim)
    heads[4, group * kv_heads :] *= special
    heads[5, -1, 3] = heads[6, group * kv_heads, 3] = special
    still = (torch.ones(1, tokens, dim, device=DEVICE).to(dtype), torch.zeros(1, tokens, dim, device=DEVICE).to(dtype))
    factors = 2.0 ** torch.randint(-3, 4, (kv_heads, dim), device=DEVICE)
    slots = torch.randperm(12, device=DEVICE)[:tokens]
    actual, expected = (_int8_cache(kv_heads, dim, factors, dtype) for _ in range(2))
    query = layer_kernels.place_heads(joined, still, [None, None], actual, slots)
    own, key, value = heads.split([group * kv_heads, kv_heads, kv_heads], dim=1)
    key = torch.cat([a * 1 + b * 0 for a, b in (key.chunk(2, -1), key.chunk(2, -1)[::-1])], dim=-1)  # as rotated
    for part, cache, scales, divisors in zip((key, value), *_parts(expected), (factors, None), strict=True):
        rounded, own_scales = quantized(part, divisors, torch.bfloat16)
        cache.flatten(0, 1)[slots], scales.flatten(0, 1)[slots] = rounded, own_scales
    grouped = own.transpose(0, 1).unflatten(0, (kv_heads, group))
    assert torch.equal(query, expected.scaled(grouped).flatten(0, 1).transpose(0, 1))
    for part, other in zip((actual.keys, actual.values), (expected.keys, expected.values), strict=True):
        assert torch.equal(part, other)
    for part, other in zip(actual.scales or (), expected.scales or (), strict=True):
        assert torch.equal(part.nan_to_num(1e9), other.nan_to_num(1e9))


def _parts(cache: LayerCache) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    assert cache.scales is not None
    return (cache.keys, cache.values), cache.scales


def _int8_cache(kv_heads: int, dim: int, factors: torch.Tensor, dtype: torch.dtype) -> LayerCache:
    tensors = [torch.zeros(3, 4, kv_heads, dim, dtype=torch.int8, device=DEVICE) for _ in range(2)]
    scales = [torch.zeros(3, 4, kv_heads, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    return LayerCache(*tensors, *scales, factors, factors[:, None, None].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [16, 48, 5376])
def test_a_norm_is_that_of_torch(columns: int, dtype: torch.dtype) -> None:

    x = torch.randn(2, 5, columns, device=DEVICE).to(dtype)
    factor = torch.randn(columns, device=DEVICE)
    expected = torch.nn.functional.rms_norm(x.float(), (columns,), factor, 1e-6)
    own = layer_kernels.rms_norm(x, factor, 1e-6)
    assert own.dtype == dtype and torch.allclose(own.float(), expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-4)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # to infinity, on a GPU in silence
@pytest.mark.parametrize("is_gelu", [False, True])
def test_activations_are_those_of_torch(is_gelu: bool) -> None:

    joined = 4 * torch.randn(1, 3, 2 * 1100, device=DEVICE)
    joined[..., :4] = torch.tensor([-1000.0, -100.0, 100.0, 1000.0])
    gate, up = joined.chunk(2, dim=-1)
    gate = torch.nn.functional.gelu(gate, approximate="tanh") if is_gelu else torch.nn.functional.silu(gate)
    assert torch.allclose(layer_kernels.activate(joined, is_gelu), gate * up, atol=1e-5)
