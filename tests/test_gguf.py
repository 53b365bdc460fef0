"""GGUF files compute what the models do that they were made of, or are refused by the name of what cannot be read."""

import dataclasses
import json
import math
import os
import re
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy
import pytest
import test_genuine_prompts
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from checkpoints import checkpoint, conversion, gguf_header, gguf_metadata, gguf_parts, gguf_tokenizer
from engine.checked_model import check_model
from engine.model_loader import load_model
from engine.model_runner import probe_layers
from errors import ModelLoadError

COMMON = {
    "vocab_size": gguf_files.VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
KEYS = {
    "context_length": 256,
    "block_count": 2,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}


@dataclass(frozen=True)
class Twin:
    """A transformers model, and the keys with which llama.cpp's converter says the same."""

    architecture: str
    model_type: str
    config: dict[str, Any]
    keys: dict[str, Any]
    tensors: dict[str, numpy.ndarray[Any, Any]] = field(default_factory=dict)

    def model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = CONFIG_MAPPING[self.model_type](**{**COMMON, **self.config})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    value.add_(torch.randn(value.shape) * 0.2)
        return gguf_files.rounded(model)

    def write(self, path: Path, **more: Any) -> PreTrainedModel:
        model = self.model()
        tensors = {**gguf_files.tensors_of(model, self.architecture), **self.tensors}
        gguf_files.write(path, self.architecture, {**KEYS, **self.keys}, tensors, **more)
        return model


RMS = {"attention.layer_norm_rms_epsilon": 1e-3}  # large enough to tell
LAYER_NORM = {"attention.layer_norm_epsilon": 1e-3}
EPSILON = {"rms_norm_eps": 1e-3}


def rope(base: float, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": base, **more}}


def factors(values: list[float]) -> numpy.ndarray[Any, Any]:
    return numpy.array(values, dtype=numpy.float32)


def llama3_factors(base: float, size: int, factor: float, high: float, original: int) -> numpy.ndarray[Any, Any]:
    """As llama.cpp's converter computes them, for a low factor of 1."""
    found = []
    for i in range(0, size, 2):
        wavelength = 2 * numpy.pi * base ** (i / size)
        smooth = (original / wavelength - 1) / (high - 1)
        middle = 1 / ((1 - smooth) / factor + smooth)
        found.append(1.0 if wavelength < original / high else factor if wavelength > original else middle)
    return factors(found)


def gemma3(full: dict[str, Any], local: float = 1e4) -> dict[str, Any]:
    sliding = {"rope_type": "default", "rope_theta": local}
    return {"rope_parameters": {"full_attention": {"rope_theta": 1e6, **full}, "sliding_attention": sliding}}


LLAMA = ({**EPSILON, **rope(5e4)}, {**RMS, "rope.freq_base": 5e4, "rope.dimension_count": 16})
QWEN2 = ({**EPSILON, **rope(1e6)}, {**RMS, "rope.freq_base": 1e6})
QWEN3 = ({**QWEN2[0], "head_dim": 32}, {**QWEN2[1], "attention.key_length": 32, "attention.value_length": 32})
EXPERTS = (
    {"moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3},
    {"expert_count": 8, "expert_used_count": 3, "expert_feed_forward_length": 48},
)
SHARED = ({"shared_expert_intermediate_size": 72}, {"expert_shared_feed_forward_length": 72})
PHI3 = ({**EPSILON, **rope(1e4)}, {**RMS, "rope.freq_base": 1e4, "rope.dimension_count": 16})
STARCODER2 = (
    {"norm_epsilon": 1e-3, "tie_word_embeddings": True, **rope(1e5)},
    {**LAYER_NORM, "rope.freq_base": 1e5},
)
GEMMA2 = (
    {**EPSILON, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 20, "tie_word_embeddings": True},
    {**RMS, "attention.key_length": 32, "attention.value_length": 32, "attention.sliding_window": 20},
)
GEMMA3 = (
    {**GEMMA2[0], "num_hidden_layers": 7, **gemma3({"rope_type": "default"})},
    {**GEMMA2[1], "block_count": 7, "rope.freq_base": 1e6},
)
MINIMAX = (
    {
        **EPSILON,
        **rope(5e6, partial_rotary_factor=0.5),
        "head_dim": 32,
        "intermediate_size": 48,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
    },
    {
        **RMS,
        **EXPERTS[1],
        "rope.freq_base": 5e6,
        "rope.dimension_count": 16,
        "attention.key_length": 32,
        "expert_gating_func": 2,
    },
)


Said = dict[str, Any]
Tensors = dict[str, numpy.ndarray[Any, Any]]


def twin(
    names: tuple[str, str],
    base: tuple[Said, Said],
    config: Said | None = None,
    keys: Said | None = None,
    tensors: Tensors | None = None,
) -> Twin:
    return Twin(*names, {**base[0], **(config or {})}, {**base[1], **(keys or {})}, tensors or {})


LLAMA_, QWEN2_, QWEN3_ = ("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")
GEMMA2_, GEMMA3_, PHI3_ = ("gemma2", "gemma2"), ("gemma3", "gemma3_text"), ("phi3", "phi3")
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
HF_YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LONG, SHORT = [1.0 + i / 2 for i in range(8)], [1.0 + i / 8 for i in range(8)]
ATTENTION = math.sqrt(1 + math.log(256 / 64) / math.log(64))
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

TWINS = {
    "llama": twin(LLAMA_, LLAMA),
    "llama, tied": twin(LLAMA_, LLAMA, {"tie_word_embeddings": True}),
    "llama, large heads": twin(LLAMA_, LLAMA, {"head_dim": 32},
        {"attention.key_length": 32, "rope.dimension_count": 32}),
    "llama, no base": twin(LLAMA_, LLAMA, rope(1e4), {"rope.freq_base": None}),
    "llama, biases": twin(LLAMA_, LLAMA, {"attention_bias": True, "mlp_bias": True}),
    "llama, named mistral": twin(LLAMA_, LLAMA, {}, {"general.name": "mistral"}),
    "llama, linear": twin(LLAMA_, LLAMA, rope(5e4, "linear", factor=8.0), LINEAR),
    "llama, old name of linear": twin(LLAMA_, LLAMA, rope(5e4, "linear", factor=8.0), {"rope.scale_linear": 8.0}),
    "llama, no scaling": twin(LLAMA_, LLAMA, {}, {**LINEAR, "rope.scaling.type": "none"}),
    "llama, yarn": twin(LLAMA_, LLAMA, rope(5e4, "yarn", **HF_YARN), YARN),
    "llama 3.1": twin(LLAMA_, LLAMA, {**rope(5e5, "llama3", **LLAMA3), "head_dim": 64},
        {"rope.freq_base": 5e5, "rope.dimension_count": 64, "attention.key_length": 64},
        {"rope_freqs.weight": llama3_factors(5e5, 64, 8.0, 4.0, 8192)}),
    "llama 3.2": twin(LLAMA_, LLAMA, {**rope(5e5, "llama3", **{**LLAMA3, "factor": 32.0}), "head_dim": 64},
        {"rope.freq_base": 5e5, "rope.dimension_count": 64, "attention.key_length": 64},
        {"rope_freqs.weight": llama3_factors(5e5, 64, 32.0, 4.0, 8192)}),
    "llama, other llama3": twin(LLAMA_, LLAMA,
        {**rope(5e4, "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=8.0,
                original_max_position_embeddings=128), "head_dim": 64},
        {"rope.dimension_count": 64, "attention.key_length": 64},
        {"rope_freqs.weight": llama3_factors(5e4, 64, 4.0, 8.0, 128)}),
    "llama, any factors": twin(LLAMA_, LLAMA,
        rope(5e4, "longrope", long_factor=LONG, short_factor=LONG, original_max_position_embeddings=64,
             attention_factor=1.0), {}, {"rope_freqs.weight": factors(LONG)}),
    "qwen2": twin(QWEN2_, QWEN2),
    "qwen2, yarn": twin(QWEN2_, QWEN2, rope(1e6, "yarn", **HF_YARN), YARN),
    "qwen2, yarn with all": twin(QWEN2_, QWEN2,
        rope(1e6, "yarn", **HF_YARN, attention_factor=(0.1 * math.log(4) + 1) * 1.25, beta_fast=16.0, beta_slow=2.0),
        {**YARN, "rope.scaling.attn_factor": 1.25, "rope.scaling.yarn_beta_fast": 16.0,
         "rope.scaling.yarn_beta_slow": 2.0}),
    "qwen3": twin(QWEN3_, QWEN3),
    "qwen3, yarn": twin(QWEN3_, QWEN3, rope(1e6, "yarn", **HF_YARN), YARN),
    "qwen2moe": twin(("qwen2moe", "qwen2_moe"), QWEN2, EXPERTS[0] | SHARED[0], EXPERTS[1] | SHARED[1]),
    "qwen3moe": twin(("qwen3moe", "qwen3_moe"), QWEN3, EXPERTS[0] | {"norm_topk_prob": True}, EXPERTS[1]),
    "qwen3moe, not normed": twin(("qwen3moe", "qwen3_moe"), QWEN3, EXPERTS[0] | {"norm_topk_prob": False},
        EXPERTS[1] | {"expert_weights_norm": False}),
    "phi3": twin(PHI3_, PHI3),
    "phi3, window": twin(PHI3_, PHI3, {"sliding_window": 20}, {"attention.sliding_window": 20}),
    "phi3, part of the heads": twin(PHI3_, PHI3, rope(1e4, partial_rotary_factor=0.75), {"rope.dimension_count": 12}),
    "phi3, long": twin(PHI3_, PHI3,
        {**rope(1e4, "longrope", long_factor=LONG, short_factor=SHORT, original_max_position_embeddings=64),
         "original_max_position_embeddings": 64},
        {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": ATTENTION},
        {"rope_factors_long.weight": factors(LONG),
         "rope_factors_short.weight": factors(SHORT)}),
    "starcoder2": twin(("starcoder2", "starcoder2"), STARCODER2),
    "gpt2": twin(("gpt2", "gpt2"), (
        {"n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_inner": 96, "layer_norm_epsilon": 1e-3,
         "tie_word_embeddings": True}, {**LAYER_NORM, "attention.head_count_kv": None})),
    "gemma2": twin(GEMMA2_, GEMMA2),
    "gemma2, caps": twin(GEMMA2_, GEMMA2, {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2, linear": twin(GEMMA2_, GEMMA2, rope(1e4, "linear", factor=8.0), LINEAR),
    "gemma2 27b": twin(GEMMA2_, GEMMA2, {"num_hidden_layers": 46, "query_pre_attn_scalar": 16}, {"block_count": 46}),
    "gemma2, scale": twin(GEMMA2_, GEMMA2, {"query_pre_attn_scalar": 16}, {"attention.scale": 0.25}),
    "gemma3": twin(GEMMA3_, GEMMA3),
    "gemma3, linear": twin(GEMMA3_, GEMMA3, gemma3({"rope_type": "linear", "factor": 8.0}), LINEAR),
    "gemma3, no window": twin(GEMMA3_, GEMMA3, {"layer_types": ["full_attention"] * 7},
        {"attention.sliding_window": None}),
    "gemma3, pattern": twin(GEMMA3_, GEMMA3, {"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2
        + ["sliding_attention"]}, {"attention.sliding_window_pattern": 3}),
    "gemma3, list": twin(GEMMA3_, GEMMA3, {"layer_types": ["full_attention"] + ["sliding_attention"] * 6},
        {"attention.sliding_window_pattern": [False] + [True] * 6}),
    "gemma3, bases": twin(GEMMA3_, GEMMA3, gemma3({"rope_type": "default", "rope_theta": 3e6}, 3e4),
        {"rope.freq_base": 3e6, "rope.freq_base_swa": 3e4}),
    "gemma3, cap": twin(GEMMA3_, GEMMA3, {"final_logit_softcapping": 3.0}, {"final_logit_softcapping": 3.0}),
    "gemma3, own head": twin(GEMMA3_, GEMMA3, {"tie_word_embeddings": False}),
    "gemma3 27b": twin(GEMMA3_, GEMMA3, {"num_hidden_layers": 62, "query_pre_attn_scalar": 16,
        **gemma3({"rope_type": "linear", "factor": 8.0})}, {"block_count": 62, **LINEAR}),
    "minimax-m2": twin(("minimax-m2", "minimax_m2"), MINIMAX),
}  # fmt: skip


def difference(one: PreTrainedModel, other: PreTrainedModel, length: int = 200) -> float:
    """The largest of two models' log-probabilities for the same tokens."""
    ids = torch.randint(0, gguf_files.VOCAB, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = [torch.log_softmax(model(ids).logits.float(), -1) for model in (one, other)]
    return float((found[0] - found[1]).abs().max())


def converted(path: Path) -> PreTrainedModel:
    directory = path.with_suffix("")
    conversion.convert([path], directory, lambda fraction: None)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", TWINS)
def test_a_gguf_file_computes_what_its_model_does(name: str, tmp_path: Path) -> None:
    model = TWINS[name].write(tmp_path / "tiny.gguf")
    assert difference(model, converted(tmp_path / "tiny.gguf")) < 1e-3


FIRST = {architecture: name for name, twin in reversed(TWINS.items()) if (architecture := twin.architecture)}


@pytest.mark.parametrize("name", FIRST.values())
def test_each_architecture_is_served(name: str, tmp_path: Path) -> None:
    """All its layers attend through the engine, with the file's own blocks where they are kept."""
    TWINS[name].write(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    conversion.convert([tmp_path / "tiny.gguf"], tmp_path / "tiny", lambda fraction: None)
    model = load_model(check_model(tmp_path / "tiny", "auto", "cpu"), lambda what, fraction: None, "auto")
    assert len(probe_layers(model)) == model.config.num_hidden_layers


# --- each key: honoured, without effect, or refused by its name


def all_keys() -> list[str]:
    """The ends of all keys that llama.cpp knows for an architecture."""
    groups = [gguf.constants.Keys]
    found = []
    while groups:
        for value in vars(groups.pop()).values():
            if isinstance(value, type):
                groups.append(value)
            elif isinstance(value, str) and value.startswith("{arch}."):
                found.append(value.removeprefix("{arch}."))
    return found


@pytest.mark.parametrize("architecture", gguf_metadata.ARCHITECTURES)
def test_no_key_is_dropped(architecture: str, tmp_path: Path) -> None:
    """Of all that llama.cpp knows: one with another value is refused, or it is in the configuration."""
    path = tmp_path / "tiny.gguf"
    TWINS[FIRST[architecture]].write(path)
    header = gguf_header.read(path)
    usual = gguf_metadata.attributes(header, {})
    names = {*all_keys(), "rope.scale_linear", "never.heard.of"} - gguf_metadata.NO_EFFECT
    for name in sorted(names):
        key = f"{architecture}.{name}"
        said = header.values.get(key)
        value = said + 1 if isinstance(said, int | float) else 5
        values = {**header.values, key: value}
        if name in ("rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast"):
            values |= {f"{architecture}.{k}": v for k, v in YARN.items() if k != name}
        try:
            found = gguf_metadata.attributes(gguf_header.Header(False, values, header.tensors), {})
        except ValueError as refusal:
            assert architecture in str(refusal), key
        else:
            assert found != usual or name in WITHOUT_SCALING | OTHER_EFFECTS.get(architecture, set()), key


WITHOUT_SCALING = {"rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier"}  # which say how to scale
OTHER_EFFECTS = {  # honoured from elsewhere, or not at all by llama.cpp
    "gpt2": {"rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast"},
    **dict.fromkeys(("qwen3moe", "qwen2moe", "minimax-m2"), {"feed_forward_length"}),  # the shapes of the experts
}


def attributes(name: str, path: Path, **keys: Any) -> dict[str, Any]:
    """Those of a twin with other keys of its architecture; `__` is a point."""
    own = {key.replace("__", "."): value for key, value in keys.items()}
    tokenizer = {key: value for key, value in own.items() if key.startswith("tokenizer.")}
    values = {key: value for key, value in own.items() if key not in tokenizer}
    dataclasses.replace(TWINS[name], keys={**TWINS[name].keys, **values}).write(
        path, tokenizer={**gguf_files.TOKENIZER, **tokenizer}
    )
    header = gguf_header.read(path)
    gguf_tokenizer.check(header)
    return gguf_metadata.attributes(header, {})


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"embedding_length_out": 64}),
        ("llama", {"interleave_moe_layer_step": 0}),
        ("llama", {"rope__scaling__type": "none", "rope__scaling__yarn_beta_fast": 16.0}),
        ("llama, linear", {"rope__scaling__yarn_beta_slow": 2.0}),
        ("llama", {"tokenizer__ggml__add_padding_token": False, "tokenizer__ggml__add_unknown_token": True}),
        ("llama", {"tokenizer__huggingface__json": "{}"}),
    ],
)
def test_keys_without_effect_are_accepted(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    assert attributes(name, tmp_path / "with.gguf", **keys) == attributes(name, tmp_path / "without.gguf")


def test_ollamas_names_for_the_bases_say_the_same(tmp_path: Path) -> None:
    theirs = {"rope__freq_base": None, "rope__freq_base_swa": None}
    theirs |= {"rope__global__freq_base": 3e6, "rope__local__freq_base": 3e4}
    expected = attributes("gemma3, bases", tmp_path / "llama_cpp.gguf")
    assert attributes("gemma3, bases", tmp_path / "ollama.gguf", **theirs) == expected
    with pytest.raises(ValueError, match=r"rope\.local\.freq_base is 20000\.0.*beside rope\.freq_base_swa"):
        attributes("gemma3, bases", tmp_path / "both.gguf", rope__local__freq_base=2e4)


def test_gemma_3_without_an_epsilon_has_ollamas(tmp_path: Path) -> None:
    found = attributes("gemma3", tmp_path / "tiny.gguf", attention__layer_norm_rms_epsilon=None)
    assert found["rms_norm_eps"] == 1e-6


def test_a_list_of_tokens_that_end_a_turn_is_honoured(tmp_path: Path) -> None:
    end = gguf_files.VOCAB - 1
    found = attributes("llama", tmp_path / "tiny.gguf", tokenizer__ggml__eos_token_ids=[end, end - 1])
    assert found["eos_token_id"] == [end, end - 1]


@pytest.mark.parametrize("name", FIRST.values())
def test_a_tensor_that_nothing_takes_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    twin = TWINS[name]
    extra = {"blk.0.attn_q_extra.weight": factors([1.0] * 8)}
    Twin(twin.architecture, twin.model_type, twin.config, twin.keys, extra).write(tmp_path / "tiny.gguf")
    with pytest.raises(ModelLoadError, match=r"blk\.0\.attn_q_extra\.weight"):
        converted(tmp_path / "tiny.gguf")


def refusal(path: Path) -> str:
    """What the server says of the file, before it imports torch."""
    with pytest.raises(ModelLoadError) as raised:
        checkpoint.fetch(str(path), path.parent / "cache", lambda what, fraction: None)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"attention.scale": 0.5}, "llama.attention.scale is 0.5"),
        ({"logit_scale": 0.125}, "llama.logit_scale is 0.125"),
        ({"expert_count": 8, "expert_used_count": 2}, "llama.expert_count is 8"),
        ({"attention.sliding_window": 32}, "llama.attention.sliding_window is 32"),
        ({"attention.causal": False}, "llama.attention.causal is False"),
        ({"rope.scaling.type": "quadratic", "rope.scaling.factor": 2.0}, "llama.rope.scaling.type is quadratic"),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ({"attention.head_count": [4, 2]}, "llama.attention.head_count is not one number for all layers"),
        ({"attention.head_count": [4, 4]}, "llama.attention.head_count is [4, 4, ...]"),
        ({"attention.head_count_kv": [2, 2]}, "llama.attention.head_count_kv is [2, 2, ...]"),
        ({"something.new": 1}, "llama.something.new is 1"),
        ({"context_length": math.inf}, "llama.context_length is inf"),
        ({"context_length": math.nan}, "llama.context_length is nan"),
        ({"rope.freq_base": math.nan}, "llama.rope.freq_base is nan"),
        ({"rope.freq_base": 0.0}, "llama.rope.freq_base is 0.0"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": -8.0}, "llama.rope.scaling.factor is -8.0"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "llama.attention.layer_norm_rms_epsilon is -1.0"),
        ({"embedding_length_out": 32}, "llama.embedding_length_out is 32"),
        ({"interleave_moe_layer_step": 2}, "llama.interleave_moe_layer_step is 2"),
        ({"attention.layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon is missing"),
        ({"general.type": "adapter"}, "LoRA adapter"),
        ({"adapter.type": "lora"}, "LoRA adapter"),
        ({"general.type": "mmproj"}, "name the file of its text model"),
        ({"general.type": "imatrix"}, "importance matrix"),
        ({"general.type": "lens"}, "general.type is lens"),
        ({"split.count": 3, "split.no": 0}, "one of 3 parts of a model"),
        ({"tokenizer.ggml.model": "none"}, "it has no tokenizer"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model is rwkv"),
        ({"tokenizer.ggml.something": 1}, "tokenizer.ggml.something is not supported"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_name(keys: dict[str, Any], reason: str, tmp_path: Path) -> None:
    own = {key: value for key, value in keys.items() if key.startswith("tokenizer.")}
    twin(LLAMA_, LLAMA, None, {key: value for key, value in keys.items() if key not in own}).write(
        tmp_path / "tiny.gguf", tokenizer={**gguf_files.TOKENIZER, **own}
    )
    assert reason in refusal(tmp_path / "tiny.gguf")


def test_a_long_context_without_its_factors_is_refused(tmp_path: Path) -> None:
    twin(PHI3_, PHI3, None, {"rope.scaling.original_context_length": 64}).write(tmp_path / "tiny.gguf")
    assert "it lacks the tensors rope_factors_long.weight" in refusal(tmp_path / "tiny.gguf")


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "x.gguf", "mamba", {}, {"token_embd.weight": factors([1.0])})
    assert "its architecture is mamba; the supported ones are llama" in refusal(tmp_path / "x.gguf")


def test_a_file_in_the_other_order_of_bytes_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", factors([1.0] * 64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "it is big-endian" in refusal(tmp_path / "x.gguf")


def test_a_type_of_tensor_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": numpy.ones(8, dtype=numpy.float64)}
    twin(LLAMA_, LLAMA, None, None, tensors).write(tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match=r"rope_freqs\.weight has the type F64"):
        converted(tmp_path / "tiny.gguf")


# --- types of tensors


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_types_of_tensors_are_read(kind: str, tmp_path: Path) -> None:
    """Rounded as the type rounds, and not more."""
    model = LLAMA_TWIN.write(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType[kind])
    bound = {"F16": 1e-3, "BF16": 1e-3, "Q8_0": 3.0, "Q4_0": 30.0}[kind]
    assert difference(model, converted(tmp_path / "tiny.gguf"), 20) < bound


LLAMA_TWIN = TWINS["llama, tied"]

# --- parts


def write_parts(path: Path) -> list[Path]:
    """As gguf-split does."""
    LLAMA_TWIN.write(path, parts=8)
    path.unlink(missing_ok=True)
    return sorted(path.parent.glob("*-of-*.gguf"))


@pytest.mark.parametrize("number", [0, 2])
def test_any_part_stands_for_all(number: int, tmp_path: Path) -> None:
    paths = write_parts(tmp_path / "tiny.gguf")
    assert len(paths) == 3
    found = gguf_parts.parts(paths[number])
    assert found == paths and gguf_parts.stem(paths[number].name) == "tiny"
    conversion.convert(found, tmp_path / "converted", lambda fraction: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    assert difference(LLAMA_TWIN.model(), model) < 1e-3
    assert not list((tmp_path / "converted").glob("*.gguf"))


def test_an_empty_list_among_the_keys_of_parts_is_left_out(tmp_path: Path) -> None:
    """gguf's writer refuses it, so a list of one item loses it in the file, to the description after it."""
    keys = {"general.tags": [7], "general.description": "abcd"}
    dataclasses.replace(LLAMA_TWIN, keys={**LLAMA_TWIN.keys, **keys}).write(tmp_path / "tiny.gguf", parts=8)
    paths = sorted(tmp_path.glob("*-of-*.gguf"))
    content = paths[0].read_bytes()
    for key, old, new in (
        (b"tags", struct.pack("<IIQi", 9, 5, 1, 7), struct.pack("<IIQ", 9, 5, 0)),
        (b"description", struct.pack("<IQ", 8, 4) + b"abcd", struct.pack("<IQ", 8, 8) + b"abcdabcd"),
    ):
        assert content.count(key + old) == 1
        content = content.replace(key + old, key + new)
    paths[0].write_bytes(content)
    gguf_parts.merge(paths, tmp_path / "whole.gguf")
    merged, whole = gguf_header.read(tmp_path / "whole.gguf"), gguf_parts.read(paths)
    assert merged.tensors == whole.tensors
    assert merged.values["general.description"] == "abcdabcd" and "general.tags" not in merged.values


def test_parts_that_are_missing_are_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path / "tiny.gguf")
    paths[1].unlink()
    said = refusal(paths[0])
    assert "is one of 3 parts of a model: put the missing ones (1) into its directory: tiny-00002-of-00003.gguf" in said


# --- converted directories


def test_a_list_of_equal_numbers_for_the_layers_is_that_number(tmp_path: Path) -> None:
    number = KEYS["feed_forward_length"]
    twin(LLAMA_, LLAMA, None, {"feed_forward_length": [number, number]}).write(tmp_path / "tiny.gguf")
    conversion.convert([tmp_path / "tiny.gguf"], tmp_path / "tiny", lambda fraction: None)
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["intermediate_size"] == number


@pytest.mark.slow
def test_what_an_older_converter_made_is_made_again_and_removed_once_nobody_uses_it(tmp_path: Path) -> None:
    LLAMA_TWIN.write(tmp_path / "tiny.gguf")
    path, cache = str(tmp_path / "tiny.gguf"), tmp_path / "cache"
    directory = checkpoint.fetch(path, cache, lambda what, fraction: None).directory
    old = directory.with_name(directory.name.rpartition("-")[0] + "-v2")
    fresh = directory.with_name(directory.name.rpartition("-")[0] + "-v3")
    other = directory.with_name("tiny-0123456789abcdef-v2")
    directory.rename(old)
    for made in (fresh, other):
        made.mkdir()
    for unused in (old, other):
        os.utime(unused, (0, 0))
    assert checkpoint.fetch(path, cache, lambda what, fraction: None).directory == directory
    assert directory.exists() and fresh.exists() and other.exists() and not old.exists()


def test_the_converters_version_is_that_of_all_that_converts() -> None:
    """Else a directory that an older one wrote would be used after an update."""
    root = conversion.ROOT
    script = (
        "import sys, json;"
        "from checkpoints import conversion;"
        "sys.argv = ['', '', ''];"
        "from engine.cpu import packed_checkpoint;"
        "print(json.dumps([m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)]))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    loaded = {Path(file) for file in json.loads(run.stdout)}
    own = {str(path.relative_to(root)) for path in loaded if path.is_relative_to(root) and ".venv" not in path.parts}
    assert own - set(conversion.SOURCES) <= NOT_CONVERTING
    assert re.fullmatch("v[0-9a-f]{8}", conversion.converter_version())


NOT_CONVERTING = {  # imported by what converts, without a say in what is written
    *(
        "errors.py",
        "checkpoints/__init__.py",
        "checkpoints/atomic_files.py",
        "engine/__init__.py",
        "engine/cpu/__init__.py",
        "engine/cpu/packed_layers.py",
    ),
    *("engine/cpu/kernels.py", "engine/quantization.py", "engine/report.py", "engine/threads.py", "engine/memory.py"),
}


# --- tokenizers


def tokenizer(path: Path, **keys: Any) -> Any:
    """keys: of the tokenizer; `__` is a point."""
    own = {f"tokenizer.{key.replace('__', '.')}": value for key, value in keys.items()}
    LLAMA_TWIN.write(path, tokenizer={**gguf_files.TOKENIZER, **own})
    conversion.convert([path], path.with_suffix(""), lambda fraction: None)
    return AutoTokenizer.from_pretrained(path.with_suffix(""))


def test_control_tokens_outside_ascii_stay_whole(tmp_path: Path) -> None:
    """DeepSeek's, say."""
    tokens, kinds = list(gguf_files.TOKENS), list(gguf_files.TOKENIZER["tokenizer.ggml.token_type"])
    tokens[-3:-1], kinds[-2] = ["<｜begin▁of▁sentence｜>", "<｜User｜>"], 4
    found = tokenizer(
        tmp_path / "tiny.gguf",
        ggml__tokens=tokens,
        ggml__token_type=kinds,
        ggml__bos_token_id=gguf_files.VOCAB - 3,
        ggml__add_bos_token=True,
    )
    ids = found.encode("a<｜User｜>b<｜begin▁of▁sentence｜>")
    assert found.convert_ids_to_tokens(ids) == [
        "<｜begin▁of▁sentence｜>",
        "a",
        "<｜User｜>",
        "b",
        "<｜begin▁of▁sentence｜>",
    ]
    assert ids[0] == gguf_files.VOCAB - 3 and ids[2] == gguf_files.VOCAB - 2 and len(found) == gguf_files.VOCAB
    assert found.decode(ids, skip_special_tokens=True) == "a<｜User｜>b"
    assert found.bos_token == "<｜begin▁of▁sentence｜>"


SENTENCEPIECE = {
    "ggml__model": "llama",
    "ggml__pre": None,
    "ggml__merges": None,
    "ggml__tokens": ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(253)), "▁", "a", "b", "▁a", "▁b"],
    "ggml__scores": [0.0] * 256 + [-1.0, -2.0, -3.0, -4.0, -5.0],
    "ggml__token_type": [2, 3, 3] + [6] * 253 + [1] * 5,
    "ggml__bos_token_id": 1,
    "ggml__eos_token_id": 2,
    "ggml__unknown_token_id": 0,
}


@pytest.mark.parametrize(("prefix", "first"), [(None, "▁a"), (True, "▁a"), (False, "a")])
def test_a_space_before_the_text_is_added_where_the_file_says_so(
    prefix: bool | None, first: str, tmp_path: Path
) -> None:
    found = tokenizer(tmp_path / "tiny.gguf", **SENTENCEPIECE, ggml__add_space_prefix=prefix)
    ids = found.encode("a b")
    assert found.convert_ids_to_tokens(ids) == ["<s>", first, "▁b"]
    assert found.decode(ids, skip_special_tokens=True) == "a b"


def test_a_sentencepiece_tokenizer_without_scores_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks the key tokenizer\.ggml\.scores"):
        tokenizer(tmp_path / "tiny.gguf", **{**SENTENCEPIECE, "ggml__scores": None})


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "in 2026's", ["in", "Ġ2026", "'s"]),
        ("smollm", "in 2026", ["in", "Ġ", "2", "0", "2", "6"]),
        ("qwen2", "in 2026", ["in", "Ġ", "2", "0", "2", "6"]),
        ("llama-bpe", "in 2026", ["in", "Ġ", "202", "6"]),
        ("deepseek-v3", "in 2026", ["in", "Ġ", "202", "6"]),
        ("default", "in 2026!", ["in", "Ġ", "202", "6", "!"]),
    ],
)
def test_text_is_split_as_the_file_says(pre: str, text: str, words: list[str], tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "tiny.gguf", ggml__pre=pre)
    split = found.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [word for word, _ in split] == words


@pytest.mark.parametrize("pre", sorted(gguf_tokenizer.COMPOSED))
def test_letters_and_their_accents_are_composed_where_the_familys_own_tokenizer_does(pre: str, tmp_path: Path) -> None:
    found = tokenizer(tmp_path / "tiny.gguf", ggml__pre=pre)
    assert found("cafe\u0301").input_ids == found("caf\u00e9").input_ids
    assert tokenizer(tmp_path / "tiny.gguf", ggml__pre="llama-bpe")("e\u0301").input_ids != found("\u00e9").input_ids


@pytest.mark.parametrize("said", [None, "default"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen2", ["in", "Ġ", "2", "0", "2", "6", "!?"]),
        ("qwen3moe", ["in", "Ġ", "2", "0", "2", "6", "!?"]),
        ("starcoder2", ["in", "Ġ", "2", "0", "2", "6", "!?"]),
        ("gpt2", ["in", "Ġ2026", "!?"]),
        ("llama", ["in", "Ġ", "202", "6", "!?"]),
    ],
)
def test_text_is_split_as_the_family_does_where_the_file_does_not_say(
    name: str, words: list[str], said: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "tiny.gguf"
    TWINS[name].write(path, tokenizer={**gguf_files.TOKENIZER, "tokenizer.ggml.pre": said})
    found = gguf_tokenizer.load(path, gguf_header.read(path))
    split = found.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 2026!?")
    assert [word for word, _ in split] == words


@pytest.mark.parametrize(("name", "is_told"), [("llama", True), ("qwen2", False)])
def test_a_way_to_split_text_that_nobody_says_is_told(
    name: str, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    TWINS[name].write(tmp_path / "tiny.gguf", tokenizer={**gguf_files.TOKENIZER, "tokenizer.ggml.pre": None})
    conversion.check_header([tmp_path / "tiny.gguf"])
    assert ("lacks the key tokenizer.ggml.pre" in caplog.text) == is_told


def test_an_unknown_way_to_split_text_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.pre is no-such, which is an unknown way to split text"):
        tokenizer(tmp_path / "tiny.gguf", ggml__pre="no-such")


@pytest.mark.parametrize(
    ("pre", "said", "adds"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False), ("qwen2", True, True)],
)
def test_a_text_begins_as_the_file_says_or_as_its_kind_does(
    pre: str, said: bool | None, adds: bool, tmp_path: Path
) -> None:
    bos = gguf_files.VOCAB - 3
    found = tokenizer(tmp_path / "tiny.gguf", ggml__pre=pre, ggml__bos_token_id=bos, ggml__add_bos_token=said)
    assert (found.encode("ab")[0] == bos) == adds


def test_several_templates_are_kept_by_name(tmp_path: Path) -> None:
    found = tokenizer(
        tmp_path / "tiny.gguf",
        chat_template="plain",
        chat_template__tool_use="with tools",
        chat_templates=["tool_use"],
    )
    assert found.chat_template == {"default": "plain", "tool_use": "with tools"}
    assert found.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "plain"


def test_all_tokens_that_end_a_turn_do(tmp_path: Path) -> None:
    end = gguf_files.VOCAB - 1
    tokenizer(tmp_path / "tiny.gguf", ggml__eot_token_id=end - 1, ggml__eom_token_id=end)
    generation = json.loads((tmp_path / "tiny" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end, end - 1]


def test_the_sampling_that_a_file_recommends_is_the_models(tmp_path: Path) -> None:
    said = {"general.sampling.temp": 0.25, "general.sampling.top_k": 20, "general.sampling.min_p": 0.125}
    twin(LLAMA_, LLAMA, None, said).write(tmp_path / "tiny.gguf")
    conversion.convert([tmp_path / "tiny.gguf"], tmp_path / "tiny", lambda fraction: None)
    generation = json.loads((tmp_path / "tiny" / "generation_config.json").read_text())
    assert [generation[name] for name in ("temperature", "top_k", "min_p", "do_sample")] == [0.25, 20, 0.125, True]


TEXTS = [
    " What is 世界?\n\n  In 2026, don't  pay $12,345.67 — ok?\t\tnaïve café Ω≈ç🙂",
    "cafe\u0301 A\u030angstro\u0308m \u1112\u1161\u11ab",  # letters and their accents apart
    "def f(x):\n    return x ** 2  # 二乗\r\n\r\nHELLOworld camelCaseWord it's IT'S 1234567",
]


@pytest.mark.thinned(6)
@pytest.mark.parametrize(
    ("name", "architecture", "pre"),
    [
        ("qwen2_5", "qwen2", "qwen2"),
        ("llama3_2", "llama", "llama-bpe"),
        ("llama3_2", "llama", None),
        ("deepseek_v3", "llama", "deepseek-v3"),
        ("mistral_nemo", "llama", "tekken"),
        ("qwen3", "qwen3moe", "qwen2"),
    ],
)
def test_a_genuine_tokenizer_is_the_same_from_a_gguf_file(
    name: str, architecture: str, pre: str | None, tmp_path: Path
) -> None:
    genuine = AutoTokenizer.from_pretrained(test_genuine_prompts.fetch(name))
    state = json.loads(genuine.backend_tokenizer.to_str())
    tokens = [token for token, _ in sorted(genuine.get_vocab().items(), key=lambda pair: pair[1])]
    kinds = [1] * len(tokens)
    for added in state["added_tokens"]:
        kinds[added["id"]] = 3 if added["special"] else 4
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    own = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges}
    own |= {"bos_token_id": genuine.bos_token_id, "eos_token_id": genuine.eos_token_id}
    own |= {"add_bos_token": genuine("").input_ids == [genuine.bos_token_id]} if pre else {}
    path = tmp_path / "tiny.gguf"
    said = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    tensors = {f"blk.{layer}.attn_norm.weight": factors([1.0]) for layer in range(2)}
    gguf_files.write(path, architecture, {**KEYS, **LLAMA[1]}, tensors, said)
    read = gguf_tokenizer.load(path, gguf_header.read(path))
    specials = [added["content"] for added in state["added_tokens"]][:30]
    for text in (*TEXTS, "a".join(specials)):
        assert read(text).input_ids == genuine(text).input_ids
        assert read.decode(read(text).input_ids) == genuine.decode(genuine(text).input_ids)
