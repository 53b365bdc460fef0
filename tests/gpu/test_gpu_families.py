"""Mixtures of experts, layers that share keys and values, and recurrent layers choose the tokens of generate too."""

from dataclasses import replace

import pytest
import torch
from gpu_engines import (
    CHUNKS,
    GUESSES,
    REPEATING,
    WHOLE,
    answers,
    engine_of,
    hold,
    prompts,
    room_for,
    runner_of,
    stock_model,
    with_new,
    with_or_without,
)
from models import MIXTURES, RECURRENT, SHARING, VOCAB
from test_recurrent import HalfRight

from engine.engine import EngineOptions
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

SMALL = replace(CHUNKS, kv_block_size=8)
LONG = [number % VOCAB for number in range(3, 150)]
FLOAT = torch.float32  # in 16 bits a router may send a token to another expert


@pytest.mark.parametrize("family", [*MIXTURES, *SHARING, *with_new(RECURRENT)])
@pytest.mark.parametrize(
    ("options", "requests"),
    [(WHOLE, prompts(1)), (WHOLE, prompts(16)), (CHUNKS, prompts(16)), (GUESSES, REPEATING)],
    ids=["alone", "together", "chunks", "guesses"],
)
@pytest.mark.parametrize("graphs", ["graphs", "no-graphs"])
def test_tokens_are_those_of_generate(
    family: str, options: EngineOptions, requests: list[list[int]], graphs: str, device: torch.device
) -> None:
    engine = with_or_without(graphs, engine_of(family, FLOAT, device, options))
    hold(stock_model(family, FLOAT, device), requests, answers(engine, requests))


@pytest.mark.parametrize("family", [*SHARING, *with_new(["qwen3_5", "lfm2", "granite_hybrid"])])
def test_in_16_bits_too(family: str, device: torch.device) -> None:
    requests = prompts(16)
    found = answers(engine_of(family, torch.bfloat16, device, CHUNKS), requests)
    hold(stock_model(family, torch.bfloat16, device), requests, found)


@pytest.mark.parametrize("family", [*MIXTURES, *SHARING])
def test_preempted_sequences_too(family: str, device: torch.device) -> None:
    memory = room_for(320, family, FLOAT, device)
    options = EngineOptions(max_num_seqs=8, kv_cache_memory=memory, max_model_len=160, max_num_batched_tokens=32)
    engine, requests = engine_of(family, FLOAT, device, options), prompts(8, longest=60)
    hold(stock_model(family, FLOAT, device), requests, answers(engine, requests))
    assert engine.num_preemptions > 0, "the cache was not small enough"


@pytest.mark.parametrize("family", [*MIXTURES, *SHARING, *with_new(RECURRENT)])
def test_beginnings_that_were_computed_before_too(family: str, device: torch.device) -> None:
    """Also where a state of recurrent layers was kept."""
    requests = [LONG[:n] + own for n, own in zip((140, 139, 30, 64, 65, 8), prompts(6, longest=20), strict=True)]
    engine = engine_of(family, FLOAT, device, SMALL)
    for _ in range(2):
        hold(stock_model(family, FLOAT, device), requests, answers(engine, requests))
    again = Sequence(requests[0], SamplingParams(max_tokens=1, temperature=0.0), lambda output: None)
    engine.scheduler.add(again)
    while engine.scheduler.has_work:
        engine.step()
    assert again.num_cached_tokens > 64


@pytest.mark.parametrize("family", with_new(RECURRENT))
@pytest.mark.parametrize("count", [1, 6])
def test_wrong_guesses_are_taken_back(family: str, count: int, device: torch.device) -> None:
    """From the states of recurrent layers."""
    requests = prompts(count, longest=60)
    expected = answers(engine_of(family, FLOAT, device, WHOLE), requests)
    proposer = HalfRight({tuple(p): own for p, own in zip(requests, expected, strict=True)})
    engine = engine_of(family, FLOAT, device, GUESSES)
    engine.scheduler.proposer = proposer
    assert answers(engine, requests) == expected
    assert any(0 < num_accepted < num_proposed for num_proposed, num_accepted in proposer.counts)


@pytest.mark.parametrize("family", SHARING)
def test_steps_are_recorded(family: str, device: torch.device, on_gpu: None) -> None:
    """Without that, decodes wait for Python."""
    assert runner_of(engine_of(family, FLOAT, device, WHOLE))._graphs is not None
