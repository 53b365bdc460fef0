"""Tiny checkpoints with a change to their tensors or configuration."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import save_tiny_checkpoint
from safetensors.torch import load_file, save_file

from engine.batch import Batch, Span
from engine.build import ModelDefaults, load_engine
from engine.checked_model import check_model
from engine.engine import Engine, EngineOptions
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

Tensors = dict[str, torch.Tensor]


def ignore(what: str, fraction: float) -> None:
    pass


def save(directory: Path, change: Callable[[Tensors], object], config: dict[str, Any] | None = None) -> Path:
    """Saves a tiny Qwen 3 with changed tensors, and with `config` in its configuration."""
    save_tiny_checkpoint(directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    edit(directory, **(config or {}))
    return directory


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def start(directory: Path, **options: Any) -> Engine:
    settings = EngineOptions(kv_cache_memory=2**24, **options)
    return load_engine(check_model(directory, settings.dtype, settings.device_map), settings, ModelDefaults, ignore)[0]


def logprobs(engine: Engine, token_ids: list[int]) -> torch.Tensor:
    """Returns the log-probabilities after each token: (tokens, vocab)."""
    runner = engine.runner
    assert isinstance(runner, ModelRunner)
    sequence = Sequence(token_ids, SamplingParams(max_tokens=1), on_output=lambda output: None)
    assert runner.cache.allocate(sequence, len(token_ids))
    return runner.logits(Batch((Span(sequence, 0, len(token_ids)),))).float().log_softmax(-1)
