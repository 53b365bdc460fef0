"""Tiny engines on the device, and the stock models that they are compared with."""

import copy
import random
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from gpu_models import NEEDS_NEW
from models import VOCAB, tiny_model
from transformers import PreTrainedModel

from engine.async_runner import AsyncRunner
from engine.build import build_engine
from engine.engine import Engine, EngineOptions
from engine.layer_probe import probe_layers
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

NUM_NEW = 40
DTYPES = [torch.float32, torch.bfloat16]
WHOLE = EngineOptions(max_num_seqs=16, num_speculative_tokens=0, kv_cache_memory=2**26)
CHUNKS = replace(WHOLE, max_num_batched_tokens=24, max_num_mixed_tokens=24)
GUESSES = replace(WHOLE, num_speculative_tokens=8)
REPEATING = [[*range(10, 24)] * 5 + [7, 9, number] for number in range(8)]
INT8_APART = 0.5  # of the logits' spread, that another token may be better by where an int8 cache rounds
MANY, SHARE_OF_BEST = 40, 0.9  # tokens in 16 bits; the part of them that is the stock model's first choice


def with_new(names: Iterable[str]) -> list[Any]:
    """Returns parameters of tests that are skipped with an old transformers."""
    return [pytest.param(name, marks=NEEDS_NEW) for name in names]


def prompts(count: int, longest: int = 120, seed: int = 7) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


@cache
def model_of(family: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Returns a tiny model that attends through the engine's cache."""
    return tiny_model(family).to(device=device, dtype=dtype)


@cache
def stock_model(family: str, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    return tiny_model(family, "eager").to(device=device, dtype=dtype)


def engine_of(family: str, dtype: torch.dtype, device: torch.device, options: EngineOptions) -> Engine:
    return build_engine(model_of(family, dtype, device), options, frozenset())


def without_graphs(engine: Engine) -> Engine:
    runner_of(engine)._graphs = None
    return engine


def with_or_without(graphs: str, engine: Engine) -> Engine:
    """graphs: "graphs" or "no-graphs"."""
    if graphs == "no-graphs":
        return without_graphs(engine)
    if runner_of(engine)._graphs is None:
        pytest.skip("nothing is recorded here")
    return engine


def runner_of(engine: Engine) -> ModelRunner:
    runner = engine.runner.runner if isinstance(engine.runner, AsyncRunner) else engine.runner
    assert isinstance(runner, ModelRunner)
    return runner


def room_for(num_tokens: int, family: str, dtype: torch.dtype, device: torch.device) -> int:
    """Returns the bytes of a cache with so many tokens in every layer."""
    return num_tokens * probe_layers(model_of(family, dtype, device)).bytes_per_token


def finish(engine: Engine, sequences: Rows[Sequence]) -> None:
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    assert engine.num_used_blocks == 0


def answers(engine: Engine, requests: Rows[list[int]], **params: object) -> list[list[int]]:
    """Returns the tokens of all answers, computed together; greedy unless `params` has a temperature."""
    sampling = SamplingParams(**{"max_tokens": NUM_NEW, "temperature": 0.0, "ignore_eos": True, **params})
    sequences = [Sequence(prompt, copy.copy(sampling), on_output=lambda output: None) for prompt in requests]
    finish(engine, sequences)
    return [sequence.output_ids for sequence in sequences]


@cache
def generated(stock: PreTrainedModel, prompt: tuple[int, ...], num_new: int) -> list[int]:
    """Returns the tokens of transformers' generate, on the stock model's device."""
    ids = torch.tensor([prompt], device=stock.device)
    output = stock.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, do_sample=False)
    return output[0, len(prompt) :].tolist()


@cache
def exact_twin(stock: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(stock).float()


def hold(stock: PreTrainedModel, requests: Rows[list[int]], found: Rows[list[int]]) -> None:
    """Checks answers: in float32 they are those of generate, in 16 bits what rounding explains."""
    if stock.dtype == torch.float32:
        pairs = zip(requests, found, strict=True)
        assert found == [generated(stock, tuple(prompt), len(own)) for prompt, own in pairs]
    else:
        hold_rounded(stock, requests, found)


def hold_rounded(stock: PreTrainedModel, requests: Rows[list[int]], found: Rows[list[int]]) -> None:
    """Checks that no token is worse, by the logits in float32, than twice the most that the stock model in 16 bits is
    wrong itself; and that the stock model in 16 bits chooses nearly all of them too, where they are many."""
    same, worst, error = [], 0.0, 0.0
    for prompt, answer in zip(requests, found, strict=True):
        rounded, exact = (logits_of(model, prompt, answer) for model in (stock, exact_twin(stock)))
        chosen = torch.tensor(answer, device=exact.device)[:, None]
        same += (rounded.gather(-1, chosen)[:, 0] == rounded.amax(-1)).tolist()
        worst = max(worst, float((exact.amax(-1) - exact.gather(-1, chosen)[:, 0]).max()))
        error = max(error, float((rounded - exact).abs().max()))
    assert worst <= 2 * error, f"a token is {worst:.2f} from the best, and rounding explains {2 * error:.2f}"
    assert len(same) < MANY or sum(same) >= SHARE_OF_BEST * len(same)


@torch.inference_mode()
def logits_of(stock: PreTrainedModel, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Returns a stock model's logits for each token of an answer: (tokens, vocab), float32."""
    ids = torch.tensor([prompt + answer], device=stock.device)
    return stock(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()


def check(stock: PreTrainedModel, requests: Rows[list[int]], answers: Rows[list[int]], max_apart: float) -> None:
    """Checks that no token is worse than the stock model's first choice by more than that part of its logits'
    spread."""
    for prompt, answer in zip(requests, answers, strict=True):
        logits = logits_of(stock, prompt, answer)
        chosen = logits.gather(-1, torch.tensor(answer, device=logits.device)[:, None])[:, 0]
        short = float(((logits.amax(-1) - chosen) / logits.std(-1)).max())
        assert short <= max_apart, f"a token is {short:.2f} of the spread from the best"
