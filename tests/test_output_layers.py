"""The output layer of a model is the one that its files have, also where config.json ties it to the embedding."""

from pathlib import Path

import pytest
import quantized_checkpoints as made
import torch
from models import tiny_model
from quantized_cases import CASES
from quantized_checkpoints import Tensors
from safetensors.torch import load_file
from test_quantized_checkpoints import load

from engine.cpu import kernels

pytestmark = pytest.mark.skipif(not kernels.are_available(), reason="needs torch with GNU's OpenMP")


@pytest.mark.parametrize("name", ["gptq-4-32-sym", "fp8-rows", None])
@pytest.mark.parametrize("is_own", [False, True])
def test_an_output_layer_of_the_files_own_is_used_whatever_the_configuration_says(
    name: str | None, is_own: bool, tmp_path: Path
) -> None:
    write, scheme, _ = CASES[name or "int8"]
    if name is None:
        tiny_model("qwen3", tie_word_embeddings=True, vocab_size=200).bfloat16().save_pretrained(tmp_path)
    else:
        made.save(tmp_path, write, scheme, tie_word_embeddings=True, vocab_size=200)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].float()
    value = torch.randn(embedding.shape) if is_own else embedding
    parts: Tensors = {".weight": value.bfloat16()}
    if name is not None and is_own:
        parts, value = write(value)
    made.change(tmp_path, lambda tensors: tensors.update({f"lm_head{part}": t for part, t in parts.items()}))
    for quantization in ("auto", "none", "int8") if name is None else ("auto", "int8"):
        head = load(tmp_path, quantization).get_submodule("lm_head")
        numbers = head.packed.dequantize() if hasattr(head, "packed") else head.weight.float()
        assert (numbers - value.bfloat16().float()).norm() < 0.02 * value.norm()


@pytest.mark.parametrize("name", ["gptq-4-32-sym", "fp8-rows"])
def test_tied_embeddings_that_are_quantized_keep_their_codes(name: str, tmp_path: Path) -> None:
    write, scheme, fmt = CASES[name]
    layers, vocab = "(proj|embed_tokens)$", 200  # words of GPTQ hold eight outputs
    expected = made.save(tmp_path, write, scheme, layers=layers, tie_word_embeddings=True, vocab_size=vocab)
    value = expected["model.embed_tokens.weight"]
    model = load(tmp_path)
    assert model.get_submodule("lm_head").packed.format == fmt
    ids = torch.arange(0, 199, 3)
    rows = model.get_submodule("model.embed_tokens")(ids).float()
    assert (rows - value[ids]).norm() < 0.01 * value[ids].norm()
