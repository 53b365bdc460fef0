"""Recurrent layers in a GGUF file: Gated DeltaNet's heads, short convolutions, and which layers attend instead."""

from checkpoints.gguf_header import Array
from checkpoints.gguf_keys import Attributes, Keys
from checkpoints.gguf_rope import Factors


def delta_net(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    """Returns what Qwen 3.5's layers need. The layers that predict further tokens are counted apart."""
    num_layers = config["num_hidden_layers"] - keys.count("nextn_predict_layers", 0, minimum=0)
    value_heads = keys.count("ssm.time_step_rank")
    inner = keys.count("ssm.inner_size")
    if inner % value_heads:
        raise keys.refuse("ssm.inner_size", f"it must be a multiple of ssm.time_step_rank, {value_heads}")
    return {
        "num_hidden_layers": num_layers,
        "linear_conv_kernel_dim": keys.count("ssm.conv_kernel"),
        "linear_key_head_dim": keys.count("ssm.state_size"),
        "linear_num_key_heads": keys.count("ssm.group_count"),
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": inner // value_heads,
        "layer_types": _layer_types(keys, num_layers),
    }


def _layer_types(keys: Keys, num_layers: int) -> list[str]:
    """Returns the type of each layer, from a list, from how often one attends, or from both, which must agree."""
    interval = keys.count("full_attention_interval", 4)
    flags = [(layer + 1) % interval != 0 for layer in range(num_layers)]
    recurrent = keys.value("attention.recurrent_layers")
    if isinstance(recurrent, Array):
        listed = [bool(item) for item in recurrent.items[:num_layers]]
        if len(listed) != num_layers or ("full_attention_interval" in keys and listed != flags):
            raise keys.refuse(
                "attention.recurrent_layers", f"beside {num_layers} layers and one of {interval} attending"
            )
        flags = listed
    elif recurrent is not None:
        raise keys.refuse("attention.recurrent_layers", "it must be a list, with 0 for the layers that attend")
    return ["linear_attention" if flag else "full_attention" for flag in flags]


def sections(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    """Adds how many frequencies rotate by time, height and width; all three are a token's position in text."""
    value = keys.value("rope.dimension_sections")
    counts = [item for item in value.items if item] if isinstance(value, Array) else []
    more = {"mrope_section": counts, "mrope_interleaved": True} if counts else {}
    return {"rope_parameters": {**config["rope_parameters"], **more}}


def short_convolutions(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    """Returns what LFM2's layers need: those without heads of keys are convolutions."""
    counts = keys.value("attention.head_count_kv")
    items = counts.items if isinstance(counts, Array) else (counts,) * config["num_hidden_layers"]
    heads = [count for count in items if isinstance(count, int)]
    if len(heads) != config["num_hidden_layers"] or len({*heads} - {0}) != 1:
        raise keys.refuse("attention.head_count_kv", "it must be a number for each layer, of which all but 0 are equal")
    return {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "conv_L_cache": keys.count("shortconv.l_cache"),
        "conv_bias": any(name.endswith("shortconv.in_proj.bias") for name in keys.tensors),
    }
