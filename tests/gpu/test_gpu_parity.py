"""Greedy tokens on the GPU are those of transformers' generate there, whatever shares a step."""

from dataclasses import replace

import pytest
import test_int8_cache
import test_vision
import torch
from gpu_engines import (
    CHUNKS,
    DTYPES,
    GUESSES,
    INT8_APART,
    REPEATING,
    WHOLE,
    answers,
    check,
    engine_of,
    hold,
    prompts,
    room_for,
    runner_of,
    stock_model,
    with_or_without,
)
from models import FAMILIES, SINKS, VOCAB, tiny_gemma_that_sees
from test_start_check import TINY

from engine import start_check
from engine.async_runner import AsyncRunner
from engine.attention import flash, paged
from engine.build import build_engine
from engine.engine import EngineOptions

LONG = [number % VOCAB for number in range(3, 150)]
Requests = list[list[int]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("options", "requests"),
    [
        (WHOLE, prompts(1)),
        (WHOLE, prompts(16)),
        (CHUNKS, prompts(16)),
        (replace(CHUNKS, kv_block_size=8), prompts(16)),
        (replace(CHUNKS, kv_block_size=256), prompts(8)),
        (GUESSES, REPEATING),
    ],
    ids=["alone", "together", "chunks", "small-blocks", "large-blocks", "guesses"],
)
@pytest.mark.parametrize("graphs", ["graphs", "no-graphs"])
def test_tokens_are_those_of_generate(
    family: str,
    dtype: torch.dtype,
    options: EngineOptions,
    requests: list[list[int]],
    graphs: str,
    device: torch.device,
) -> None:
    engine = with_or_without(graphs, engine_of(family, dtype, device, options))
    hold(stock_model(family, dtype, device), requests, answers(engine, requests))


@pytest.mark.parametrize("family", SINKS)
@pytest.mark.parametrize(
    ("options", "requests"),
    [(WHOLE, prompts(1)), (CHUNKS, prompts(16)), (replace(CHUNKS, kv_block_size=256), prompts(8))],
    ids=["alone", "chunks", "large-blocks"],
)
@pytest.mark.parametrize("graphs", ["graphs", "no-graphs"])
def test_attention_with_sinks_too(
    family: str, options: EngineOptions, requests: Requests, graphs: str, device: torch.device
) -> None:
    """In float32: in 16 bits a router may send a token to another expert, and everything differs from there on."""
    engine = with_or_without(graphs, engine_of(family, torch.float32, device, options))
    hold(stock_model(family, torch.float32, device), requests, answers(engine, requests))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("graphs", ["graphs", "no-graphs"])
def test_an_int8_cache_costs_little(family: str, dtype: torch.dtype, graphs: str, device: torch.device) -> None:
    options, requests = replace(CHUNKS, kv_cache_dtype="int8"), prompts(16)
    engine = with_or_without(graphs, engine_of(family, dtype, device, options))
    assert device.type != "cuda" or runner_of(engine).flash is not None, "no kernel reads it"
    check(stock_model(family, dtype, device), requests, answers(engine, requests), INT8_APART)


@pytest.mark.parametrize("family", SINKS)
@pytest.mark.parametrize("graphs", ["graphs", "no-graphs"])
def test_an_int8_cache_of_a_mixture_holds_what_it_should(family: str, graphs: str, device: torch.device) -> None:
    """A router may send a token to another expert for the rounding, so the reference rounds too."""
    options, requests = replace(CHUNKS, kv_cache_dtype="int8"), prompts(8)
    engine = with_or_without(graphs, engine_of(family, torch.float32, device, options))
    for prompt, answer in zip(requests, answers(engine, requests), strict=True):
        test_int8_cache.check(family, prompt, answer)


@pytest.mark.parametrize("step_tokens", [24, 64, 512])
@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_images_whose_tokens_see_each_other(step_tokens: int, cache: str, device: torch.device) -> None:
    model = tiny_gemma_that_sees(test_vision.IMAGE).to(device)
    options = replace(test_vision.SMALL_STEPS, max_num_batched_tokens=step_tokens, kv_cache_dtype=cache)
    engine = build_engine(model, replace(options, kv_cache_memory=2**26), frozenset())
    found = test_vision.finish(engine, [test_vision.sequence_of(name) for name in test_vision.LAYOUTS])
    expected = [test_vision.expected(name) for name in test_vision.LAYOUTS]
    assert found == expected if cache == "auto" else [len(own) for own in found] == [len(own) for own in expected]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_preempted_sequences_too(family: str, dtype: torch.dtype, device: torch.device) -> None:
    memory = room_for(256, family, dtype, device)
    options = EngineOptions(max_num_seqs=8, kv_cache_memory=memory, max_model_len=160, max_num_batched_tokens=32)
    engine, requests = engine_of(family, dtype, device, options), prompts(8, longest=60)
    hold(stock_model(family, dtype, device), requests, answers(engine, requests))
    assert engine.num_preemptions > 0, "the cache was not small enough"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_beginnings_that_were_computed_before_too(family: str, dtype: torch.dtype, device: torch.device) -> None:
    requests = [LONG[:n] + own for n, own in zip((140, 139, 30, 64, 65, 8), prompts(6, longest=20), strict=True)]
    engine = engine_of(family, dtype, device, replace(CHUNKS, kv_block_size=8))
    for _ in range(2):
        hold(stock_model(family, dtype, device), requests, answers(engine, requests))


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_begin_before_the_last_one_is_read(family: str, device: torch.device, on_gpu: None) -> None:
    engine = engine_of(family, torch.bfloat16, device, WHOLE)
    answers(engine, prompts(3))
    assert isinstance(engine.runner, AsyncRunner) and engine.runner.num_steps_kept > 30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TINY)
def test_the_check_at_start_passes(name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Also with soft caps, with windows and for mixtures."""
    torch.manual_seed(0)
    model = TINY[name]().to(device=device, dtype=dtype).eval()
    model.set_attn_implementation({"text_config": paged.NAME, "": paged.NAME})
    runner = runner_of(build_engine(model, EngineOptions(kv_cache_memory=2**24, max_model_len=256), frozenset()))
    assert start_check.check(runner, 256)


@pytest.mark.parametrize("block_size", [16, 256])
@pytest.mark.parametrize("heads", [(8, 128), (2, 64), (16, 128), (4, 256)], ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_the_kernel_that_is_found_agrees_with_the_reference(
    heads: tuple[int, int], window: int | None, block_size: int, device: torch.device, on_gpu: None
) -> None:
    num_kv_heads, dim = heads
    spec = flash.AttentionSpec(num_kv_heads, dim, dim, window, torch.bfloat16, device)
    kernel = flash.find([spec], block_size)
    if kernel is None:
        pytest.skip("this device has no kernel for such blocks")
    assert flash.agrees(kernel, spec, block_size)
