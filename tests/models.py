"""Tiny random models of the families, the same ones for every test."""

import copy

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engine import attention

VOCAB = 199
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # large enough for logits that differ
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,  # tied random weights repeat one token
}
FAMILIES = {
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **_COMMON,
            head_dim=16,
            num_hidden_layers=7,
            sliding_window=24,
            layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
            query_pre_attn_scalar=16,
        ),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**_COMMON, head_dim=16, num_hidden_layers=3)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**_COMMON, num_hidden_layers=3)),
    "llama": (LlamaForCausalLM, LlamaConfig(**_COMMON, num_hidden_layers=3)),
}


def tiny_model(family: str, implementation: str = attention.NAME) -> PreTrainedModel:
    """The same weights for every `implementation` of attention; float32."""
    model_class, config = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(copy.deepcopy(config))
    model.set_attn_implementation(implementation)
    return model.eval()
