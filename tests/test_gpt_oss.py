"""gpt-oss as OpenAI publishes it: experts in MXFP4, all else in bfloat16."""

import json
from pathlib import Path

import pytest
import quantized_checkpoints as made
import torch
from models import tiny_model
from quantized_checkpoints import Tensors
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine import start_check
from engine.build import build_engine, model_runner_of
from engine.checked_model import check_model
from engine.engine import EngineOptions
from engine.model_loader import load_model


@pytest.mark.parametrize("quantization", ["none", "auto", "int8"])
def test_a_gpt_oss_in_mxfp4_computes_with_its_numbers(quantization: str, tmp_path: Path) -> None:
    """Transformers dequantises its experts, which stay bfloat16."""
    expected = save_mxfp4(tmp_path)
    model = load_model(check_model(tmp_path, "auto", "cpu"), lambda phase, fraction: None, quantization)
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name].float(), weight) for name, weight in expected.items())
    assert start_check.check(model_runner_of(build_engine(model, EngineOptions(max_num_seqs=4), frozenset())), 256)


def save_mxfp4(directory: Path) -> dict[str, torch.Tensor]:
    """Saves a tiny gpt-oss as OpenAI's checkpoints are; returns the experts' weights in float32, by their names."""
    tiny_model("gpt_oss", "eager", hidden_size=64).save_pretrained(directory)
    weights = {}

    def to_codes(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            num_experts, columns, rows = tensors.pop(name).shape
            shape = (num_experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            scales = torch.randint(121, 125, shape, dtype=torch.uint8)
            tensors.update({f"{name}_blocks": blocks, f"{name}_scales": scales})
            weights[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)

    made.change(directory, to_codes)
    path = directory / "config.json"
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    scheme = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": scheme}))
    return weights
