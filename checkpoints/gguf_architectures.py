"""The architectures that are read from GGUF files: for each, which attribute takes which key, and what is derived."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from checkpoints import gguf_gemma as gemma
from checkpoints import gguf_recurrent as recurrent
from checkpoints import gguf_rope as rope
from checkpoints import gguf_sizes as sizes
from checkpoints.gguf_header import Value
from checkpoints.gguf_sizes import Derive

DECODER = {  # key -> the attribute of the configuration that takes its value
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
RMS_DECODER = DECODER | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
GEMMA = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
MINIMAX_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
GPT2 = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
BASIC: tuple[Derive, ...] = (sizes.key_value_heads, sizes.head_dim, rope.whole_heads)
PARTLY_ROTATED: tuple[Derive, ...] = (sizes.key_value_heads, sizes.head_dim, rope.part_of_heads)
FIXED_HEADS: tuple[Derive, ...] = (sizes.key_value_heads, sizes.fixed_head_dim, rope.whole_heads)
HEADS = frozenset({"attention.head_count_kv", "attention.key_length"})
FEED_FORWARD = frozenset({"feed_forward_length"})


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp's that transformers reads, and that this server serves."""

    model_type: str  # in transformers
    attributes: Mapping[str, str]  # key -> attribute
    derive: tuple[Derive, ...]  # called one after the other
    optional: frozenset[str] = frozenset()  # keys that may be missing: llama.cpp and transformers have the same default
    constants: Mapping[str, Any] = field(default_factory=dict)  # attribute -> value, unless a key has another one
    neutral: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)  # in place of gguf_metadata.NEUTRAL


ARCHITECTURES: dict[str, Architecture] = {  # by general.architecture
    "llama": Architecture(
        model_type="llama",
        attributes=RMS_DECODER,
        derive=(
            *BASIC,
            sizes.one_number_of_heads,
            sizes.biases(attention_bias="attn_q.bias", mlp_bias="ffn_gate.bias"),
        ),
        optional=HEADS,
    ),
    "qwen2": Architecture(model_type="qwen2", attributes=RMS_DECODER, derive=FIXED_HEADS, optional=HEADS),
    "qwen3": Architecture(model_type="qwen3", attributes=RMS_DECODER, derive=BASIC, optional=HEADS),
    "qwen2moe": Architecture(
        model_type="qwen2_moe",
        attributes=RMS_DECODER | EXPERTS,
        derive=(*FIXED_HEADS, sizes.dense_size, sizes.moe_size, sizes.shared_expert_size, sizes.expert_norm(False)),
        optional=HEADS | FEED_FORWARD,
    ),
    "qwen3moe": Architecture(
        model_type="qwen3_moe",
        attributes=RMS_DECODER | EXPERTS,
        derive=(*BASIC, sizes.dense_size, sizes.moe_size, sizes.expert_norm(True)),
        optional=HEADS | FEED_FORWARD,
    ),
    "qwen35": Architecture(
        model_type="qwen3_5_text",
        attributes=RMS_DECODER,
        derive=(*PARTLY_ROTATED, recurrent.delta_net, recurrent.sections),
        optional=HEADS,
    ),
    "qwen35moe": Architecture(
        model_type="qwen3_5_moe_text",
        attributes=RMS_DECODER | EXPERTS,
        derive=(
            *(*PARTLY_ROTATED, recurrent.delta_net, recurrent.sections),
            *(sizes.moe_size, sizes.shared_expert_size, sizes.always_normalized),
        ),
        optional=HEADS | FEED_FORWARD,
    ),
    "lfm2": Architecture(
        model_type="lfm2",
        attributes={key: name for key, name in DECODER.items() if key != "attention.head_count_kv"}
        | {"attention.layer_norm_rms_epsilon": "norm_eps"},
        derive=(recurrent.short_convolutions, sizes.fixed_head_dim, rope.whole_heads),
        optional=HEADS,
        constants={"block_auto_adjust_ff_dim": False},
    ),
    "phi3": Architecture(
        model_type="phi3",
        attributes=RMS_DECODER,
        derive=(sizes.key_value_heads, sizes.fixed_head_dim, rope.part_of_heads, rope.original_length, sizes.window),
        optional=HEADS,
    ),
    "starcoder2": Architecture(
        model_type="starcoder2",
        attributes=DECODER | {"attention.layer_norm_epsilon": "norm_epsilon"},
        derive=(*FIXED_HEADS, sizes.biases(use_bias="attn_q.bias")),
        optional=HEADS,
        constants={"sliding_window": None},
    ),
    "gpt2": Architecture(
        model_type="gpt2",
        attributes=GPT2,
        derive=(sizes.fixed_head_dim,),
        neutral={"rope.dimension_count": (0,), "attention.head_count_kv": ()},
    ),
    "gemma2": Architecture(
        model_type="gemma2",
        attributes=RMS_DECODER | GEMMA,
        derive=(sizes.key_value_heads, gemma.attention_scale, gemma.gemma2_layers, rope.whole_heads),
        optional=HEADS | GEMMA.keys(),
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        attributes=RMS_DECODER | GEMMA,
        derive=(sizes.key_value_heads, gemma.attention_scale, gemma.gemma3_layers),
        optional=HEADS | GEMMA.keys() | {"attention.layer_norm_rms_epsilon"},
        constants={"rms_norm_eps": 1e-6},  # Ollama's files leave it out
    ),
    "minimax-m2": Architecture(
        model_type="minimax_m2",
        attributes=RMS_DECODER | MINIMAX_EXPERTS,
        derive=(sizes.key_value_heads, sizes.head_dim, rope.part_of_heads, sizes.expert_size),
        optional=HEADS | FEED_FORWARD,
        neutral={"expert_gating_func": (2,), "expert_weights_norm": (True,)},  # 2: sigmoid
    ),
}
