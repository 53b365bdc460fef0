"""Gemma's layers in a GGUF file: the scale of attention, sliding windows, caps, and the bases of rotary embeddings."""

import math

from checkpoints import gguf_rope
from checkpoints.gguf_header import Array
from checkpoints.gguf_keys import TOLERANCE, Attributes, Keys
from checkpoints.gguf_rope import Factors

NUM_LAYERS_27B = {"gemma2": 46, "gemma3": 62}  # the 27B models alone scale their scores by another size
GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}  # defaults
DEFAULT_WINDOW = 4096  # tokens


def attention_scale(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    """Derives the scale from the number of layers, as llama.cpp does: files leave it out."""
    size = keys.count("attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    is_27b = config["num_hidden_layers"] == NUM_LAYERS_27B[keys.architecture]
    scalar = config["hidden_size"] // config["num_attention_heads"] if is_27b else size
    if scale := keys.number("attention.scale", 0.0):
        scalar = round(scale**-2) if scale > 0 else 0
        if not scalar or not math.isclose(scalar**-0.5, scale, rel_tol=TOLERANCE):
            raise keys.refuse("attention.scale")
    return {"head_dim": size, "query_pre_attn_scalar": scalar}


def gemma2_layers(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    base = gguf_rope.base(keys)
    if keys.positive(base, "rope.freq_base_swa") != base:
        raise keys.refuse("rope.freq_base_swa", f"it must be {base}")
    caps = {cap: config.get(cap, default) or None for cap, default in GEMMA2_CAPS.items()}
    window = config.get("sliding_window", DEFAULT_WINDOW)
    return {"sliding_window": window, "layer_types": _layer_types(keys, config, 2), **caps}


def gemma3_layers(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    """Scales the rotary embeddings of layers with full attention alone. Ollama has its own names for the two bases."""
    window = config.get("sliding_window", 0)
    types = _layer_types(keys, config, 6) if window else ["full_attention"] * config["num_hidden_layers"]
    size = gguf_rope.rotated_size(keys, config)
    if size != config["head_dim"]:
        raise keys.refuse("rope.dimension_count", f"it must be {config['head_dim']}")
    base = keys.positive(gguf_rope.DEFAULT_BASE, "rope.freq_base", "rope.global.freq_base")
    local_base = keys.positive(gguf_rope.DEFAULT_BASE, "rope.freq_base_swa", "rope.local.freq_base")
    return {
        "sliding_window": window or DEFAULT_WINDOW,
        "layer_types": types,
        "final_logit_softcapping": config.get("final_logit_softcapping") or None,
        "rope_parameters": {
            "full_attention": gguf_rope.scaled(keys, config, factors, size, base),
            "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
        },
    }


def _layer_types(keys: Keys, config: Attributes, period: int) -> list[str]:
    """Returns each layer's attention, by the file's list or else with every `period`-th layer's one full."""
    names = {True: "sliding_attention", False: "full_attention"}
    pattern = keys.value("attention.sliding_window_pattern")
    if isinstance(pattern, Array):
        if len(pattern.items) != config["num_hidden_layers"]:
            raise keys.refuse("attention.sliding_window_pattern", f"it has {pattern.length} entries, not one per layer")
        return [names[bool(item)] for item in pattern.items]
    if isinstance(pattern, bool):
        return [names[pattern]] * config["num_hidden_layers"]
    if pattern is not None:
        period = keys.count("attention.sliding_window_pattern")
    return [names[(layer + 1) % period != 0] for layer in range(config["num_hidden_layers"])]
