"""Images on the GPU: the tokens are those of transformers on the CPU, in float32, beside requests without images."""

import copy
from dataclasses import replace

import pytest
import test_vision_families as families
import torch
from gpu_engines import with_new
from seeing_models import KINDS, expected_tokens, seeing_model

from engine.build import build_engine
from engine.engine import Engine, EngineOptions
from engine.sequence import Sequence

NAMES = ["one picture", "a picture first", "the same picture twice", "text between", "many turns"]
NEW = ["gemma4_small", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"]
TEXTS = [[(7 * i + t) % 190 for t in range(5 + 20 * i)] for i in range(3)]


def engine_of(kind: str, device: torch.device, options: EngineOptions = families.SMALL_STEPS) -> Engine:
    model = copy.deepcopy(seeing_model(kind)).to(device)
    return build_engine(model, replace(options, kv_cache_memory=2**26), frozenset())


@pytest.mark.parametrize("kind", [*(kind for kind in KINDS if kind not in NEW), *with_new(NEW)])
@pytest.mark.parametrize("step_tokens", [24, 512])
def test_tokens_are_those_of_transformers(kind: str, step_tokens: int, device: torch.device) -> None:
    """Twice, the second time with features and blocks that are known."""
    engine = engine_of(kind, device, replace(families.SMALL_STEPS, max_num_batched_tokens=step_tokens))
    texts = [expected_tokens(kind, text, [], families.NUM_NEW) for text in TEXTS]
    for _ in range(2):
        asked = [Sequence(text, families.GREEDY, on_output=lambda output: None) for text in TEXTS]
        asked += [families.sequence_of(kind, name) for name in NAMES]
        assert families.finish(engine, asked) == [*texts, *(families.expected(kind, name) for name in NAMES)]
