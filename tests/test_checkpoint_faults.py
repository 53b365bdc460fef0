"""Checkpoints that would start, and answer with something else than the model, are refused or read rightly."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from models import _COMMON
from odd_checkpoints import Tensors, edit, ignore, logprobs, save, start
from safetensors.torch import load_file, save_file
from transformers import (
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine.checked_model import check_model
from engine.cpu import kernels
from engine.cpu.packing import pack_model
from engine.model_loader import load_model
from engine.quantization import QUANTIZATIONS
from errors import ModelLoadError

# --- tensors


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.down_proj.weight_scale",
        "model.layers.1.self_attn.q_proj.bias",
        "model.layers.2.mlp.experts.0.down_proj.weight",
        "model.layers.3.mlp.down_proj.weight",  # beyond the model's layers, which are then too few
        "model.layers.9.eh_proj_of_something.weight",
        "model.layers.0.mlp.down_proj.bias",
        "score.weight",
    ],
)
def test_tensors_that_nobody_reads_are_refused_by_name(name: str, tmp_path: Path) -> None:
    directory = save(tmp_path, lambda tensors: tensors.update({name: torch.ones(4)}))
    with pytest.raises(ModelLoadError, match=f"the tensor {name}, which its architecture does not use"):
        load_model(check_model(directory, "float32", "cpu"), ignore)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_pos_emb.inv_freq",
        "model.freqs_cis",
        "model.layers.3.eh_proj.weight",  # beyond the model's layers: it predicts further tokens
        "mtp.layers.0.mlp.down_proj.weight",
        "visual.blocks.0.attn.qkv.weight",
        "model.vision_tower.encoder.layers.0.weight",
        "multi_modal_projector.linear_1.weight",
        "model.layers.0.self_attn.k_scale",
        "model.layers.0.self_attn.kv_scale",
        "model.layers.0.self_attn.k_proj.output_scale",
    ],
)
def test_what_a_text_model_rightly_leaves_unread_is_accepted(name: str, tmp_path: Path) -> None:
    load_model(
        check_model(save(tmp_path, lambda tensors: tensors.update({name: torch.ones(4)})), "float32", "cpu"), ignore
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_biases_of_zero_that_no_layer_has_change_nothing(dtype: torch.dtype, tmp_path: Path) -> None:
    """Official GPTQ files have them."""
    name = "model.layers.{}.mlp.down_proj.bias"
    zeros = {name.format(layer): torch.zeros(48, dtype=dtype) for layer in range(3)}
    directory = save(tmp_path, lambda tensors: tensors.update(zeros))
    load_model(check_model(directory, "float32", "cpu"), ignore)
    zeros[name.format(1)][7] = 1e-4
    save(directory, lambda tensors: tensors.update(zeros))
    with pytest.raises(ModelLoadError, match=f"the tensor {name.format(1)}, which its architecture does not use"):
        load_model(check_model(directory, "float32", "cpu"), ignore)


@pytest.mark.parametrize("setting", ["num_nextn_predict_layers", "mtp_num_hidden_layers"])
@pytest.mark.parametrize(("count", "is_accepted"), [(1, False), (2, True)])
def test_layers_beyond_the_models_are_left_unread_where_the_configuration_counts_them(
    setting: str, count: int, is_accepted: bool, tmp_path: Path
) -> None:
    further = {f"model.layers.{layer}.mlp.down_proj.weight": torch.ones(4) for layer in (3, 4)}
    directory = save(tmp_path, lambda tensors: tensors.update(further), {setting: count})
    refused = pytest.raises(
        ModelLoadError, match="the tensor model.layers.4.mlp.down_proj.weight, which its architecture does not use"
    )
    with nullcontext() if is_accepted else refused:
        load_model(check_model(directory, "float32", "cpu"), ignore)


def test_a_layer_that_predicts_further_tokens_is_known_by_its_parts(tmp_path: Path) -> None:
    names = ("enorm.weight", "mlp.down_proj.weight", "self_attn.q_proj.weight")
    further = {f"model.layers.3.{name}": torch.ones(4) for name in names}
    load_model(check_model(save(tmp_path, lambda tensors: tensors.update(further)), "float32", "cpu"), ignore)


def test_a_configuration_with_fewer_layers_than_the_files_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path, lambda tensors: None, {"num_hidden_layers": 2, "layer_types": None})
    with pytest.raises(ModelLoadError, match=r"11 tensors \(model.layers.2.*which its architecture does not use"):
        load_model(check_model(directory, "float32", "cpu"), ignore)


def to_codes(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize("is_modelopt", [True, False])
def test_numbers_in_8_bits_whose_scheme_nobody_says_are_refused(is_modelopt: bool, tmp_path: Path) -> None:
    directory = save(tmp_path, to_codes)
    if is_modelopt:
        (directory / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    reason = "; hf_quant_config.json does, but only NVIDIA's tools read it" if is_modelopt else "what they mean: take"
    with pytest.raises(ModelLoadError, match=rf"21 tensors \(model.layers.0.mlp.down_proj.*F8_E4M3.*{reason}"):
        check_model(directory, "auto", "cpu")


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("modelopt", "'modelopt', which transformers does not support"),
        ("gptq", "not installed"),
        ("awq", "not installed"),
    ],
)
def test_quantizations_that_cannot_be_read_are_named(method: str, reason: str, tmp_path: Path) -> None:
    scheme = {"quant_method": method, "bits": 4, "group_size": 128}
    directory = save(tmp_path, lambda tensors: None, {"quantization_config": scheme})
    with pytest.raises(ModelLoadError, match=reason) as raised:
        load_model(check_model(directory, "auto", "cpu"), ignore)
    assert "\n" not in str(raised.value)
    is_read_here = "with QUANTIZATION=auto and DTYPE=auto this server reads them" in str(raised.value)
    assert is_read_here == (method != "modelopt" and kernels.are_available())


BLOCK = 128


def to_blocks(tensors: Tensors) -> None:
    """As Qwen's FP8 checkpoints have them: https://arxiv.org/abs/2412.19437, section 3.3."""
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        blocks = tensors[name].float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)
        tensors[name], tensors[f"{name}_scale_inv"] = codes.to(torch.float8_e4m3fn), scales


def plain(tensors: Tensors) -> Tensors:
    def scaled(name: str) -> torch.Tensor:
        if f"{name}_scale_inv" not in tensors:
            return tensors[name].float()
        spread = tensors[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return tensors[name].float() * spread

    return {name: scaled(name) for name in tensors if not name.endswith("_scale_inv")}


@pytest.mark.parametrize("around", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_blocks_in_8_bits_are_served_in_every_type_beside_every_type(
    around: torch.dtype, dtype: str, tmp_path: Path
) -> None:
    own = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "num_hidden_layers": 2}
    config = Qwen3Config(**{**_COMMON, **own, "initializer_range": 0.1})
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(around).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    to_blocks(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})
    stock = Qwen3ForCausalLM(config).eval()
    stock.load_state_dict(plain(tensors))
    token_ids = list(range(0, 190, 7))
    expected = stock(torch.tensor([token_ids])).logits[0].log_softmax(-1)
    apart = (logprobs(start(tmp_path, dtype=dtype), token_ids) - expected).abs().max()
    assert apart < (0.01 if dtype == "float32" else 0.3)


# --- positions


def llama_logprobs(directory: Path, **rope: Any) -> torch.Tensor:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**_COMMON, num_hidden_layers=2)).save_pretrained(directory)
    path = directory / "config.json"
    known = {name: value for name, value in json.loads(path.read_text()).items() if name != "rope_parameters"}
    path.write_text(json.dumps({**known, **rope}))
    return logprobs(start(directory, dtype="float32"), list(range(0, 190, 2)))


YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope_type", "values"),
    [
        ("linear", {"factor": 4.0}),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64}),
        ("llama3", LLAMA3),
    ],
)
def test_scaled_positions_are_the_same_in_the_old_words_and_the_new(
    rope_type: str, values: dict[str, Any], tmp_path: Path
) -> None:
    new = llama_logprobs(tmp_path / "new", rope_parameters={"rope_type": rope_type, "rope_theta": 5e5, **values})
    old = llama_logprobs(tmp_path / "old", rope_scaling={"type": rope_type, **values}, rope_theta=5e5)
    plain = llama_logprobs(tmp_path / "plain", rope_theta=5e5)
    assert torch.equal(old, new) and not torch.allclose(old, plain, atol=0.1)


@pytest.mark.parametrize("rope_type", ["su", "mrope", "dynamic"])
def test_scaled_positions_that_are_not_known_are_refused_by_name(rope_type: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=rf"{rope_type}'? ?.*are not supported"):
        llama_logprobs(tmp_path, rope_scaling={"type": rope_type, "factor": 2.0}, rope_theta=1e4)


# --- architectures


@pytest.mark.parametrize("model_type", ["falcon", "gptj", "gpt_neo", "mpt", "biogpt", "bloom", "bart"])
def test_models_with_an_attention_of_their_own_are_refused_in_a_sentence(model_type: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ModelLoadError, match=f"Models of type '{model_type}' are not supported") as raised:
        check_model(tmp_path, "auto", "cpu")
    assert "paged_blocks" not in str(raised.value)


MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "jetmoe": lambda: JetMoeForCausalLM(
        JetMoeConfig(
            vocab_size=199, hidden_size=64, num_hidden_layers=2, num_key_value_heads=2, kv_channels=16,
            intermediate_size=64, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0, eos_token_id=None,
        )
    ),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **{**_COMMON, "hidden_size": 64, "intermediate_size": 64}, num_hidden_layers=2, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64,
        )
    ),
}  # fmt: skip
ROUTERS = {"jetmoe": "mlp.router.layer", "qwen2_moe": "mlp.shared_expert_gate"}


@pytest.mark.skipif(not kernels.are_available(), reason="needs torch with GNU's OpenMP")
@pytest.mark.parametrize("quantization", ["int8", "int4", "bnb-8bit"])
@pytest.mark.parametrize("name", MIXTURES)
def test_routers_are_never_quantized(name: str, quantization: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    MIXTURES[name]().save_pretrained(tmp_path)
    model = load_model(check_model(tmp_path, "float32", "cpu"), ignore, quantization)
    routers = [module for path, module in model.named_modules() if path.endswith(ROUTERS[name])]
    assert len(routers) == 2 and {type(router) for router in routers} == {torch.nn.Linear}
    kinds = {type(module).__name__ for module in model.modules()}
    assert kinds & {"PackedLinear", "SharedLinear", "Linear8bitLt"}


@pytest.mark.skipif(not kernels.are_available(), reason="needs torch with GNU's OpenMP")
def test_a_mixture_in_8_bits_moves_as_a_dense_model_does() -> None:
    """The median token: a few are sent to other experts even by what attention in 8 bits rounds."""
    moved = {}
    for name in ("dense", *MIXTURES):
        torch.manual_seed(0)
        dense = LlamaConfig(**{**_COMMON, "hidden_size": 64, "intermediate_size": 64}, num_hidden_layers=2)
        model = LlamaForCausalLM(dense).eval() if name == "dense" else MIXTURES[name]().eval()
        token_ids = torch.arange(0, 198, 3)[None]
        with torch.inference_mode():
            before = model(token_ids).logits.log_softmax(-1)
            pack_model(model, QUANTIZATIONS["int8"])
            after = model(token_ids).logits.log_softmax(-1)
        moved[name] = float((after - before).abs().amax(-1).median())
    assert max(moved.values()) <= 1.5 * moved["dense"], moved
