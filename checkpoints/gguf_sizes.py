"""Sizes that a GGUF file's keys may leave out: heads, biases, windows and experts, from tensors and defaults."""

import math
from collections.abc import Callable

from checkpoints.gguf_keys import TOLERANCE, Attributes, Keys
from checkpoints.gguf_rope import Factors

Derive = Callable[[Keys, Attributes, Factors], Attributes]  # takes the attributes so far, returns further ones


def head_dim(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    size = keys.count("attention.key_length", config["hidden_size"] // config["num_attention_heads"])
    _check_scale(keys, size)
    return {"head_dim": size}


def fixed_head_dim(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    """Checks the size of heads for model classes that have no attribute for it."""
    heads = config["num_attention_heads" if "num_attention_heads" in config else "n_head"]
    hidden = config["hidden_size" if "hidden_size" in config else "n_embd"]
    size = keys.count("attention.key_length", hidden // heads)
    if size != hidden // heads:
        raise keys.refuse("attention.key_length", f"it must be {hidden // heads}")
    _check_scale(keys, size)
    return {}


def _check_scale(keys: Keys, head_dim: int) -> None:
    """Raises ValueError where attention's scores do not have the usual scale."""
    scale = keys.number("attention.scale", 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=TOLERANCE):
        raise keys.refuse("attention.scale", f"it must be {head_dim**-0.5:.6g}")


def key_value_heads(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    return {"num_key_value_heads": keys.count("attention.head_count_kv", config["num_attention_heads"])}


def one_number_of_heads(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    """Raises ValueError for a list of numbers, even of equal ones: with them transformers undoes llama.cpp's order of
    queries and keys, and it takes no list."""
    for key in ("attention.head_count", "attention.head_count_kv"):
        if keys.is_list(key):
            raise keys.refuse(key, "it must be one number for all layers")
    return {}


def biases(**tensors: str) -> Derive:
    """Returns a function that sets each attribute to whether the first layer has its tensor."""
    return lambda keys, config, factors: {name: keys.has(f"blk.0.{tensor}") for name, tensor in tensors.items()}


def window(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    return {"sliding_window": keys.count("attention.sliding_window", 0, minimum=0) or None}


def moe_size(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    return {"moe_intermediate_size": keys.shape("blk.0.ffn_gate_exps.weight")[1]}


def shared_expert_size(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    return {"shared_expert_intermediate_size": keys.shape("blk.0.ffn_gate_shexp.weight")[0]}


def expert_size(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    return {"intermediate_size": keys.shape("blk.0.ffn_gate_exps.weight")[1]}


def dense_size(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    """Returns the size of dense layers, which a model of experts alone does not have: 1 then."""
    return {"intermediate_size": keys.count("feed_forward_length", 1, minimum=0) or 1}


def always_normalized(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    """Raises ValueError for a file that asks for other weights of experts than model classes that normalise them."""
    if keys.value("expert_weights_norm") not in (None, True):
        raise keys.refuse("expert_weights_norm", "it must be true")
    return {}


def expert_norm(default: bool) -> Derive:
    """Returns a function that sets whether experts' weights are normalised; default: where the file does not say."""

    def derive(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
        value = keys.value("expert_weights_norm")
        if not isinstance(value, bool | None):
            raise keys.refuse("expert_weights_norm", "it must be true or false")
        return {"norm_topk_prob": default if value is None else value}

    return derive
