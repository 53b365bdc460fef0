"""Tiny random models of the families, the same ones for every test."""

import copy
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
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


def tiny_model(family: str, implementation: str = attention.NAME, **changes: object) -> PreTrainedModel:
    """The same weights for every `implementation` of attention; float32."""
    model_class, config = FAMILIES[family]
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = model_class(config)
    model.set_attn_implementation(implementation)
    return model.eval()


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, so that random tokens are often no whole characters, and the ChatML tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def save_tiny_checkpoint(directory: Path) -> Path:
    """A Qwen 3 with a token per byte, as `MODEL_PATH` takes it."""
    tokenizer = byte_tokenizer()
    _, config = FAMILIES["qwen3"]
    config = Qwen3Config(**{**config.to_dict(), "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id})
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
