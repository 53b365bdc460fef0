"""Adapters: answers are those of the model with the adapter in its weights, whatever else is in the step."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from lora_files import TinyAdapter, greedy_tokens
from models import tiny_model
from test_engine import SMALL_STEPS, answer, greedy, prompts, run

from engine.build import build_engine, model_runner_of
from engine.engine import Engine, EngineOptions
from engine.lora.adapter import Adapter

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR_ATTENTION = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
KINDS = {  # family -> the layers that its adapters change
    "llama": (*ATTENTION, *MLP),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": (*ATTENTION, *MLP),
    "gemma3": (*ATTENTION, *MLP),
    "gemma4": (*ATTENTION, *MLP),
    "qwen3_moe": ATTENTION,
    "qwen3_5": (*ATTENTION, *MLP, *LINEAR_ATTENTION),
    "qwen3_5_moe": (*ATTENTION, *LINEAR_ATTENTION),
    "qwen3_next": (*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"),
    "lfm2": ("q_proj", "out_proj", "in_proj", "w1"),
    "granite_hybrid": ("q_proj", "in_proj", "out_proj"),
}
NUM_TOKENS = 24


def engine_of(family: str, options: EngineOptions = SMALL_STEPS) -> Engine:
    return build_engine(tiny_model(family), options, frozenset())


def read(engine: Engine, directory: Path, name: str = "mine") -> Adapter:
    return model_runner_of(engine).adapters.read(name, directory, max_rank=64)


def answers(engine: Engine, requests: list[tuple[list[int], Adapter | None]], delay: float = 0) -> list[list[int]]:
    async def use(engine: Engine) -> list[list[int]]:
        return await asyncio.gather(
            *(
                answer(engine, prompt, replace(greedy(NUM_TOKENS), adapter=adapter), number * delay)
                for number, (prompt, adapter) in enumerate(requests)
            )
        )

    return run(engine, use)


@pytest.mark.parametrize("family", KINDS)
def test_answers_are_those_of_the_merged_model_beside_other_adapters_and_none(family: str, tmp_path: Path) -> None:
    engine, stock = engine_of(family), tiny_model(family, "eager")
    made = [
        TinyAdapter(stock, KINDS[family], rank=4, seed=1),
        TinyAdapter(stock, KINDS[family][:2], rank=3, alpha=5, seed=2, fields={"use_rslora": True}),
    ]
    adapters = [read(engine, adapter.save(tmp_path / str(n))) for n, adapter in enumerate(made)]
    models = [*(adapter.merged() for adapter in made), stock]
    asked = prompts(6, longest=60)
    requests = [(prompt, [*adapters, None][n % 3]) for n, prompt in enumerate(asked)]
    expected = [greedy_tokens(models[n % 3], prompt, NUM_TOKENS) for n, prompt in enumerate(asked)]
    assert answers(engine, requests, delay=0.01) == expected
    assert expected[0] != greedy_tokens(stock, asked[0], NUM_TOKENS), "the adapter changes something"
