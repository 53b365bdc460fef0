"""Twins: tiny transformers models, each with the keys and tensors of a GGUF file that describe the same model."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf_files
import numpy
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from checkpoints import checkpoint, conversion
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
    """A transformers model, and the keys that llama.cpp's converter writes for it."""

    architecture: str
    model_type: str
    config: dict[str, Any]
    keys: dict[str, Any]
    tensors: dict[str, numpy.ndarray[Any, Any]] = field(default_factory=dict)
    is_rounded: bool = True  # to bfloat16

    def model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        config = CONFIG_MAPPING[self.model_type](**{**COMMON, **self.config})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    value.add_(torch.randn(value.shape) * 0.2)
        return gguf_files.rounded(model) if self.is_rounded else model.eval()

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
QWEN35 = (
    {
        **EPSILON,
        **rope(1e6, partial_rotary_factor=0.25, mrope_section=[1, 1, 2], mrope_interleaved=True),
        "head_dim": 32,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
    },
    {
        **RMS,
        **{"block_count": 4, "rope.freq_base": 1e6, "attention.key_length": 32, "attention.value_length": 32},
        **{"rope.dimension_count": 8, "rope.dimension_sections": [1, 1, 2, 0], "full_attention_interval": 4},
        **{"attention.recurrent_layers": [1, 1, 1, 0], "ssm.conv_kernel": 4, "ssm.state_size": 16},
        **{"ssm.group_count": 2, "ssm.time_step_rank": 4, "ssm.inner_size": 128},
    },
)
LFM2 = (
    {
        **rope(1e6),
        **{"norm_eps": 1e-3, "num_hidden_layers": 4, "block_auto_adjust_ff_dim": False, "conv_L_cache": 3},
        "layer_types": ["conv", "conv", "full_attention", "conv"],
    },
    {
        **RMS,
        **{"block_count": 4, "rope.freq_base": 1e6, "attention.head_count_kv": [0, 0, 2, 0], "shortconv.l_cache": 3},
    },
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


Fields = dict[str, Any]
Tensors = dict[str, numpy.ndarray[Any, Any]]


def twin(
    names: tuple[str, str],
    base: tuple[Fields, Fields],
    config: Fields | None = None,
    keys: Fields | None = None,
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
    "qwen35": twin(("qwen35", "qwen3_5_text"), QWEN35),
    "qwen35, a head of values for each key": twin(("qwen35", "qwen3_5_text"), QWEN35, {"linear_num_key_heads": 4},
        {"ssm.group_count": 4}),
    "qwen35moe": twin(("qwen35moe", "qwen3_5_moe_text"), QWEN35, EXPERTS[0] | SHARED[0], EXPERTS[1] | SHARED[1]),
    "lfm2": twin(("lfm2", "lfm2"), LFM2),
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

FIRST = {architecture: name for name, twin in reversed(TWINS.items()) if (architecture := twin.architecture)}
LLAMA_TWIN = TWINS["llama, tied"]


def difference(one: PreTrainedModel, other: PreTrainedModel, length: int = 200) -> float:
    """Returns the largest difference between two models' log-probabilities for the same tokens."""
    ids = torch.randint(0, gguf_files.VOCAB, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        first, second = (torch.log_softmax(model(ids).logits.float(), -1) for model in (one, other))
    return float((first - second).abs().max())


def converted(path: Path) -> PreTrainedModel:
    directory = path.with_suffix("")
    conversion.convert([path], directory, lambda fraction: None)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


def refusal(path: Path) -> str:
    """Returns the error with which a file is refused from its header."""
    with pytest.raises(ModelLoadError) as raised:
        checkpoint.fetch(str(path), path.parent / "cache", lambda what, fraction: None)
    assert "\n" not in str(raised.value)
    return str(raised.value)
