"""Gemma 4 and Qwen's models that see, in the continuous batch: the tokens are those of transformers' own `generate`."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from seeing_models import IMAGE, KINDS, crop, expected_tokens, family_of, seeing_model

from engine.build import build_engine
from engine.engine import Engine, EngineOptions
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.vision import Image

NUM_NEW = 10
SMALL_STEPS = EngineOptions(max_num_batched_tokens=24, max_num_mixed_tokens=24, max_num_seqs=8, kv_block_size=8)
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True)

# What stands between numbers of pictures is text, in tokens
LAYOUTS: dict[str, list[Any]] = {
    "one picture": [[7, 3, 9], 0, [5, 6]],
    "a picture first": [2, [5, 6, 7]],
    "two pictures": [[7], 0, [4], 1, [8, 9]],
    "the same picture twice": [[9], 1, [1, 2], 1, [3, 4]],
    "text between": [list(range(10, 40)), 0, list(range(20, 50)), 3, [3]],
    "in the second half of a chunk": [list(range(10, 28)), 2, list(range(30, 60))],
    "many turns": [[t for i in range(5) for t in (i, i + 50)], 0, [11, 12], 1, [13], 2, list(range(60, 99)), 3, [2]],
}


def prompt_of(kind: str, layout: list[Any], detail: str = "auto") -> tuple[list[int], tuple[Image, ...]]:
    token_ids: list[int] = []
    images: list[Image] = []
    for part in layout:
        if isinstance(part, int):
            seen = crop(kind, part, detail)
            causal = family_of(kind).is_causal
            images.append(Image(seen.digest, seen.pixels, len(token_ids), seen.grid, causal))
            token_ids += [IMAGE] * seen.num_tokens
        else:
            token_ids += part
    return token_ids, tuple(images)


@cache
def expected(kind: str, name: str, detail: str = "auto") -> list[int]:
    token_ids, _ = prompt_of(kind, LAYOUTS[name], detail)
    pictures = [part for part in LAYOUTS[name] if isinstance(part, int)]
    return expected_tokens(kind, token_ids, pictures, NUM_NEW, detail)


def engine_of(kind: str, options: EngineOptions = SMALL_STEPS) -> Engine:
    return build_engine(seeing_model(kind), options, frozenset())


def sequence_of(kind: str, name: str, detail: str = "auto") -> Sequence:
    token_ids, images = prompt_of(kind, LAYOUTS[name], detail)
    return Sequence(token_ids, GREEDY, on_output=lambda output: None, images=images)


def finish(engine: Engine, sequences: list[Sequence]) -> list[list[int]]:
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    assert engine.num_used_blocks == 0
    return [sequence.output_ids for sequence in sequences]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_transformers(kind: str, name: str) -> None:
    for step_tokens in (24, 512):
        options = replace(SMALL_STEPS, max_num_batched_tokens=step_tokens)
        assert finish(engine_of(kind, options), [sequence_of(kind, name)]) == [expected(kind, name)]
