"""Tiny engines on the device, and the stock models that they are compared with."""

import copy
import random
from collections.abc import Sequence as Rows
from functools import cache

import torch
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
INT8_APART = 0.5  # as MAX_APART, where an int8 cache rounds keys and values
MAX_APART = {torch.float32: 1e-3, torch.bfloat16: 0.35}  # of the logits' spread, that another token may be better by
SHARE_OF_BEST = {torch.float32: 1.0, torch.bfloat16: 0.9}  # of tokens that are the stock model's first choice


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


def runner_of(engine: Engine) -> ModelRunner:
    runner = engine.runner.runner if isinstance(engine.runner, AsyncRunner) else engine.runner
    assert isinstance(runner, ModelRunner)
    return runner


def room_for(num_tokens: int, family: str, dtype: torch.dtype, device: torch.device) -> int:
    """Returns the bytes of a cache with so many tokens in every layer."""
    specs = probe_layers(model_of(family, dtype, device))
    return num_tokens * specs.bytes_per_token


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
def generated(family: str, dtype: torch.dtype, device: torch.device, prompt: tuple[int, ...]) -> list[int]:
    """Returns the tokens of transformers' generate on the same device."""
    ids = torch.tensor([prompt], device=device)
    output = stock_model(family, dtype, device).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False
    )
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def check(stock: PreTrainedModel, requests: Rows[list[int]], answers: Rows[list[int]], max_apart: float) -> float:
    """Returns the share of tokens that are the stock model's first choice; fails if one is much worse than that.

    In 16 bits two implementations may choose different tokens of nearly the same logit, and differ from there on. So
    each token is compared with the stock model's logits after the answer's own tokens before it."""
    best = []
    for prompt, answer in zip(requests, answers, strict=True):
        ids = torch.tensor([prompt + answer], device=next(stock.parameters()).device)
        logits = stock(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
        short = (logits.amax(-1) - chosen) / logits.std(-1)
        assert float(short.max()) <= max_apart, f"a token is {float(short.max()):.2f} of the spread from the best"
        best += (short == 0).tolist()
    return sum(best) / len(best)
