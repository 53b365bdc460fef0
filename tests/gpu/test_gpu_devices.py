"""A model whose layers are spread over several GPUs chooses the same tokens."""

from pathlib import Path

import pytest
import quantized_checkpoints as made
import torch
from gpu_engines import CHUNKS, WHOLE, answers, generated, prompts, runner_of
from models import tiny_model

from engine.build import build_engine
from engine.checked_model import check_model
from engine.engine import EngineOptions
from engine.layer_probe import probe_layers
from engine.model_loader import load_model

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.mark.parametrize("options", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_tokens_are_those_of_one_device(quantization: str, options: EngineOptions, tmp_path: Path) -> None:
    """Without recorded steps, which one device records."""
    tiny_model("qwen3", **made.SIZES).save_pretrained(tmp_path)
    found = []
    for place in ("cuda:0", "balanced"):
        model = load_model(check_model(tmp_path, "float32", place), lambda *_: None, quantization)
        devices = {spec.device for spec in probe_layers(model).attention.values()}
        assert len(devices) == (2 if place == "balanced" else 1)
        engine = build_engine(model, options, frozenset())
        assert place == "cuda:0" or runner_of(engine)._graphs is None
        found.append(answers(engine, prompts(8)))
    assert found[0] == found[1]
    if quantization == "none":
        stock = tiny_model("qwen3", "eager", **made.SIZES).to("cuda:0")
        assert found[0] == [generated(stock, tuple(prompt), len(found[0][0])) for prompt in prompts(8)]
