"""An int8 cache: what it holds, and that the engine's tokens are those of a model that rounds its keys and values."""

import asyncio
from dataclasses import replace
from functools import cache
from typing import Any, cast

import pytest
import torch
from models import FAMILIES, MIXTURES, RECURRENT, SHARING, SINKS, VOCAB, generate, tiny_model
from test_engine import SMALL_STEPS, answers, greedy, prompts, run, small_cache
from transformers import AttentionInterface

from engine import start_check
from engine.attention import flash
from engine.build import build_engine
from engine.cpu import attention_kernels, cache_kernels, jit, kernels, prompt_attention
from engine.engine import Engine, EngineOptions
from engine.kv_cache import CachePlan, KVCache
from engine.layer_cache import LayerCache, quantized
from engine.layer_probe import MEASURED_TOKENS, measure_key_factors, probe_layers
from engine.layer_spec import AttentionSpec
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.spec_decode.draft_model import DraftModel

ROUNDING = "attention_of_rounded_keys_and_values"
ALL = [*FAMILIES, *RECURRENT, *MIXTURES, *SHARING, *SINKS]
CLOSE = 0.02  # of two logits: float32 adds in another order, and a number on the edge is rounded to the other side


def rounded(numbers: torch.Tensor, factors: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Rounds (batch, kv_heads, tokens, dim) to 8 bits for each token and head, in plain torch."""
    numbers = numbers / factors
    scale = (numbers.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
    return (numbers / scale.clamp(min=1e-37)).round() * scale * factors


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Computes attention over all tokens, without a cache."""
    factors = cast(Any, module).config.key_factors[cast(Any, module).layer_idx]
    key = rounded(key, torch.tensor(factors).view(key.shape[1], 1, key.shape[3]))
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, rounded(value)))
    distance = torch.arange(key.shape[2])[:, None] - torch.arange(key.shape[2])
    window = others.get("sliding_window") or key.shape[2]
    scores = (query @ key.mT * scaling).masked_fill((distance < 0) | (distance >= window), -torch.inf)
    sinks = others.get("s_aux")
    weights = flash.softmax(scores, None if sinks is None else sinks[:, None, None])
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register(ROUNDING, attend)


@cache
def rounding_model(family: str) -> Any:
    """The reference: transformers' model, whose attention rounds as the cache should."""
    model: Any = tiny_model(family, ROUNDING)
    model.config.key_factors = measure_key_factors(tiny_model(family), model.config.max_position_embeddings)
    return model


def distances(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Returns how far each token's logit is below the model's best one after the tokens before it, as a part of the
    logits' spread: 0 for the model's own choice."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
    rows = logits[len(prompt) - 1 : -1]
    chosen = rows.gather(1, torch.tensor(answer)[:, None])[:, 0]
    return (rows.amax(-1) - chosen) / rows.std(-1)


def check(family: str, prompt: list[int], answer: list[int]) -> None:
    """Checks that the tokens are the reference's choices; one may be nearly as good."""
    found = distances(rounding_model(family), prompt, answer)
    assert found.count_nonzero() <= 1 and found.max() <= CLOSE
    assert len(set(answer)) > 5, "the answer is too simple to compare"


def engine_of(family: str, options: EngineOptions = SMALL_STEPS) -> Engine:
    return build_engine(tiny_model(family), replace(options, kv_cache_dtype="int8"), frozenset())


@pytest.mark.parametrize("family", ALL)
def test_tokens_are_those_of_a_model_that_rounds_its_keys_and_values(family: str) -> None:
    """Sixteen sequences in chunks of 24 tokens, and one alone."""
    requests = prompts(16)
    for prompt, answer in zip(requests, answers(engine_of(family), requests, greedy(), 0.01), strict=True):
        check(family, prompt, answer)
    [alone] = answers(engine_of(family, EngineOptions()), requests[:1], greedy())
    check(family, requests[0], alone)


def test_a_model_that_does_not_round_chooses_other_tokens() -> None:
    """That the comparison above can fail."""
    requests, model = prompts(16), tiny_model("qwen2", "eager")
    pairs = zip(requests, answers(engine_of("qwen2"), requests, greedy()), strict=True)
    assert sum(int(distances(model, prompt, answer).count_nonzero()) for prompt, answer in pairs) > 16


@pytest.mark.parametrize("family", ["gemma3", "qwen2", "gemma4"])
def test_the_same_without_kernels(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: torch computes over gathered blocks."""
    monkeypatch.setattr("engine.cpu.jit.is_available", lambda: False)
    requests = prompts(8)
    for prompt, answer in zip(requests, answers(engine_of(family), requests, greedy()), strict=True):
        check(family, prompt, answer)


@pytest.mark.parametrize("family", ["gemma3", "qwen2", "qwen3_5", "gemma4"])
def test_preempted_sequences_give_the_same_tokens(family: str) -> None:
    requests = prompts(8, longest=60)
    options = small_cache(family, num_tokens=200, max_num_batched_tokens=32)
    specs = probe_layers(tiny_model(family))
    saved = 200 * (specs.bytes_per_token - specs.in_int8({}).bytes_per_token)
    engine = engine_of(family, replace(options, kv_cache_memory=options.kv_cache_memory - saved))
    for prompt, answer in zip(requests, answers(engine, requests, greedy(60)), strict=True):
        check(family, prompt, answer)
    assert engine.scheduler.num_preemptions > 0, "the cache was not small enough"


def test_reused_blocks_and_guesses_give_the_same_tokens() -> None:
    start = (prompts(1)[0] * 120)[:100]
    requests = [start + other for other in prompts(6, longest=20)]
    reused: list[int] = []

    async def use(engine: Engine) -> list[list[int]]:
        async def one(prompt: list[int]) -> list[int]:
            outputs = [output async for output in generate(engine, prompt, greedy(300))]
            reused.append(outputs[0].num_cached_tokens)
            return [output.token_id for output in outputs if output.token_id is not None]

        return [await one(requests[0]), *await asyncio.gather(*map(one, requests[1:]))]

    for prompt, answer in zip(requests, run(engine_of("qwen3"), use), strict=True):
        check("qwen3", prompt, answer)
    assert min(reused[1:]) >= 96


def test_a_draft_model_has_an_int8_cache_too() -> None:
    options = replace(SMALL_STEPS, kv_cache_dtype="int8")
    engine = build_engine(tiny_model("qwen3"), options, frozenset(), tiny_model("qwen3"))
    draft = engine.scheduler.proposer
    assert isinstance(draft, DraftModel) and draft._cache.layer(0).is_int8
    requests = prompts(4)
    for prompt, answer in zip(requests, answers(engine, requests, greedy()), strict=True):
        check("qwen3", prompt, answer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128, 256, 512])
@pytest.mark.skipif(not kernels.are_available(), reason="needs torch with GNU's OpenMP")
@pytest.mark.usefixtures("threads")
def test_the_kernel_rounds_as_torch_does(dtype: torch.dtype, dim: int) -> None:
    numbers = (torch.randn(9, 3, dim) * torch.logspace(-6, 6, 9)[:, None, None]).to(dtype)
    numbers[4, 1] = 0
    factors = torch.randint(-4, 5, (3, dim)).float().exp2()
    slots = torch.randperm(4 * 16)[:9]
    for given in (None, factors):
        cache, scales = torch.zeros(4, 16, 3, dim, dtype=torch.int8), torch.zeros(4, 16, 3, dtype=torch.bfloat16)
        strided = numbers.transpose(0, 1).contiguous().transpose(0, 1)  # as models give it
        cache_kernels.store(strided, given, cache, scales, slots)
        expected = quantized(numbers, given, torch.bfloat16)
        assert torch.equal(cache.flatten(0, 1)[slots], expected[0])
        assert torch.equal(scales.flatten(0, 1)[slots], expected[1])
        assert cache.count_nonzero() == expected[0].count_nonzero()


@pytest.mark.skipif(not kernels.are_available(), reason="needs torch with GNU's OpenMP")
@pytest.mark.parametrize("dim", [64, 96, 256])
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.usefixtures("threads")
def test_rotated_keys_are_rounded_as_they_are_written(dim: int, has_norms: bool) -> None:
    """The fused kernel gives what it gives for a plain cache, and LayerCache rounds."""
    tokens, heads, kv_heads = 7, 6, 2
    parts = tuple(torch.randn(tokens, count * dim) for count in (heads, kv_heads, kv_heads))
    angles = (torch.rand(1, tokens, dim // 32 * 32), torch.rand(1, tokens, dim // 32 * 32))
    norms = (torch.rand(dim), torch.rand(dim), 1e-6) if has_norms else None
    factors, slots = torch.randint(-3, 4, (kv_heads, dim)).float().exp2(), torch.randperm(32)[:tokens]
    plain = LayerCache(*(torch.zeros(2, 16, kv_heads, dim) for _ in range(2)))
    query = attention_kernels.rotate(parts, angles, norms, plain.keys, plain.values, slots, dim)
    small, expected = (int8_cache((2, 16, kv_heads, dim), factors) for _ in range(2))
    changed = attention_kernels.rotate(
        parts, angles, norms, small.keys, small.values, slots, dim, small.scales, small.factors
    )
    key, value = (cache.flatten(0, 1)[slots] for cache in (plain.keys, plain.values))
    expected.write(key, value, slots)
    grouped = query.view(tokens, kv_heads, -1, dim).permute(1, 2, 0, 3)
    assert torch.equal(changed.view(tokens, kv_heads, -1, dim).permute(1, 2, 0, 3), expected.scaled(grouped))
    for one, other in zip(vars(small).values(), vars(expected).values(), strict=True):
        assert torch.equal(one, other)


def int8_cache(shape: tuple[int, int, int, int], factors: torch.Tensor) -> LayerCache:
    """Returns an empty cache. shape: of keys and of values."""
    tensors = [torch.zeros(shape, dtype=torch.int8) for _ in range(2)]
    scales = [torch.zeros(shape[:3], dtype=torch.bfloat16) for _ in range(2)]
    return LayerCache(*tensors, *scales, factors, factors[:, None, None])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("has_kernels", [False, True])
def test_what_is_no_number_shows_in_the_scale_and_is_not_reused(
    value: float, has_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_kernels:
        monkeypatch.setattr("engine.cpu.jit.is_available", lambda: False)
    spec = AttentionSpec(2, 16, 16, None, torch.float32, torch.device("cpu"), key_factors=(1.0,) * 32)
    plan = CachePlan.fit({0: spec}, 8 * 4 * spec.bytes_per_token, 4, 4, 16)
    cache = KVCache(plan, {0: spec})
    sequence = Sequence(list(range(9)), SamplingParams(max_tokens=1), on_output=lambda output: None)
    cache.allocate(sequence, 9)
    key, number = torch.randn(9, 2, 16), torch.randn(9, 2, 16)
    number[2, 1, 5] = value
    blocks = sequence.block_tables[0]
    slots = torch.tensor([blocks[i // 4] * 4 + i % 4 for i in range(9)])
    cache.layer(0).write(key, number, slots)
    gathered = cache.layer(0).gather(torch.tensor(blocks), 1, torch.float32)[1][0, :, :9]
    assert not gathered[1, 2].isfinite().all() and gathered[:, [0, 1, 3, 4, 5, 6, 7, 8]].isfinite().all()
    cache.advance(sequence, 9)
    cache.cache_blocks(sequence, is_checked=False)
    assert not any(cache.pools[0].is_cached(block) for block in blocks)
    cache.erase(sequence)
    assert all(tensor.isfinite().all() for tensor in cache.tensors[0])


def test_the_check_at_start_allows_for_the_rounding_and_for_no_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for cache_dtype, tolerance in (("auto", 0.01), ("int8", 0.15)):
        engine = build_engine(tiny_model("qwen2"), EngineOptions(kv_cache_dtype=cache_dtype), frozenset())
        assert isinstance(engine.runner, ModelRunner)
        assert start_check.tolerance_of(engine.runner) == tolerance
        assert start_check.check(engine.runner, engine.max_model_len)
    sizes = [line.rsplit(", ", 1)[1] for line in caplog.messages if line.startswith("the context is")]
    assert sizes == ["0.6 KiB for a token in float32", "0.2 KiB for a token in int8"]


def test_a_token_takes_about_half_the_memory() -> None:
    spec = AttentionSpec(8, 128, 128, None, torch.bfloat16, torch.device("cpu"))
    small = replace(spec, key_factors=(1.0,) * 1024)
    assert spec.bytes_per_token / small.bytes_per_token == pytest.approx(1.97, abs=0.01)
    for one in (spec, small):
        tensors = one.make_tensors(3, 4)
        assert sum(tensor.nbytes for tensor in tensors) == 3 * 4 * one.bytes_per_token
        assert all(tensor.shape[:3] == (3, 4, 8) for tensor in tensors)


def test_factors_are_powers_of_two_that_level_a_heads_channels() -> None:
    model: Any = tiny_model("qwen2")
    with torch.no_grad():  # Qwen 2's keys have such biases
        model.model.layers[1].self_attn.k_proj.bias[3] = 200
    factors = torch.tensor(measure_key_factors(model, 512)[1]).view(2, -1)
    assert torch.equal(factors.log2(), factors.log2().round())
    large = factors[0].topk(2).indices.sort().values.tolist()
    assert large == [3, 3 + factors.shape[1] // 2], "rotation mixes these two"
    assert MEASURED_TOKENS <= VOCAB


def test_queries_times_factors_and_keys_by_them_keep_their_products() -> None:
    key, value, query = torch.randn(5, 2, 16), torch.randn(5, 2, 16), torch.randn(2, 3, 1, 16)
    key[..., 7] *= 1000
    query[..., 7] /= 1000
    scores = {}
    for name, factors in {"plain": torch.ones(2, 16), "level": torch.ones(2, 16)}.items():
        if name == "level":
            factors[:, 7] = 1024
        cache = int8_cache((1, 5, 2, 16), factors)
        cache.write(key, value, torch.arange(5))
        stored = cache.gather(torch.tensor([0]), 1, torch.float32)[0][0]
        scores[name] = cache.scaled(query)[:, :, 0] @ stored.mT
    exact = query[:, :, 0] @ key.permute(1, 2, 0)
    errors = {name: (score - exact).abs().max() for name, score in scores.items()}
    assert errors["level"] < errors["plain"] / 3


@pytest.mark.skipif("+avx2" not in jit.features(), reason="needs AVX2")
@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
def test_the_same_without_avx512(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU of 2015: the programs are compiled without its instructions."""
    name, features = jit.host()
    newer = ("+avx512", "+avx10", "+amx", "+avxvnni")
    kept = [f"-{one[1:]}" if one.startswith(newer) else one for one in features.split(",")]
    monkeypatch.setattr("engine.cpu.jit.host", lambda: (name, ",".join(kept)))
    compiled = (attention_kernels._attend, prompt_attention._program, prompt_attention.chunk_program)
    for program in (*compiled, cache_kernels._store):
        program.cache_clear()
    requests = prompts(8)
    try:
        for prompt, answer in zip(requests, answers(engine_of(family), requests, greedy()), strict=True):
            check(family, prompt, answer)
    finally:
        for program in (*compiled, cache_kernels._store):
            program.cache_clear()
