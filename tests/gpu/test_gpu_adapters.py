"""Adapters on the GPU: answers are those of the model with the adapter in its weights, between recorded steps."""

from pathlib import Path

import pytest
import torch
from gpu_engines import WHOLE, finish, generated, prompts, runner_of, with_new
from lora_files import TinyAdapter
from models import tiny_model
from test_lora import KINDS

from engine.build import build_engine
from engine.engine import Engine
from engine.lora.adapter import Adapter
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

NUM_NEW = 24
OLDER = ["llama", "qwen2", "qwen3", "gemma3", "gemma4", "qwen3_moe"]


def answers(engine: Engine, requests: list[list[int]], owners: list[Adapter | None]) -> list[list[int]]:
    """Returns the tokens of answers that are computed together. owners: the adapters that take turns."""
    asked = []
    for number, prompt in enumerate(requests):
        adapter = owners[number % len(owners)]
        params = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True, adapter=adapter)
        asked.append(Sequence(prompt, params, lambda output: None))
    finish(engine, asked)
    return [sequence.output_ids for sequence in asked]


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gemma3", "gemma4", "qwen3_moe", *with_new(["qwen3_5", "lfm2"])]
)
def test_each_answer_has_its_own_adapter(family: str, device: torch.device, tmp_path: Path) -> None:
    """Beside others and none, and after and before steps of decodes without one, which are recorded."""
    stock, requests = tiny_model(family, "eager").to(device), prompts(6, longest=60)
    made = [TinyAdapter(stock, KINDS[family], seed=1), TinyAdapter(stock, KINDS[family][:2], rank=3, seed=2)]
    engine = build_engine(tiny_model(family).to(device), WHOLE, frozenset())
    read = runner_of(engine).adapters.read
    adapters = [read(str(n), adapter.save(tmp_path / str(n)), max_rank=8) for n, adapter in enumerate(made)]
    models = [*(adapter.merged() for adapter in made), stock]
    adapted = [generated(models[n % 3], tuple(prompt), NUM_NEW) for n, prompt in enumerate(requests)]
    plain = [generated(stock, tuple(prompt), NUM_NEW) for prompt in requests]
    assert adapted[0] != plain[0], "the adapter changes something"
    for _ in range(2):
        assert answers(engine, requests, [None]) == plain
        assert answers(engine, requests, [*adapters, None]) == adapted
