"""What a GGUF file says of its model, as the attributes of transformers' configuration.

No key that changes what is computed is dropped: each one is honoured, or it is known to change nothing, or the file
is refused by the key's name. The same holds for the tensors that scale the rotary embeddings. It reads no weights.

Sources: llama.cpp's `load_hparams` and `load_arch_hparams` for each architecture, for what a key means and what holds
where it is missing; its convert_hf_to_gguf.py, for what is written.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from checkpoints.gguf_header import Array, Header, Value

Attributes = dict[str, Any]
Factors = Mapping[str, Sequence[float]]  # of the rotary embeddings: a tensor's name -> what it divides frequencies by

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
MOST_FACTORS = 2**16
DEFAULT_BASE = 10000.0  # of rotary embeddings
YARN_BETAS = {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}
TOLERANCE = 1e-4  # of factors, which files have in float32

# --- the tables

DECODER = {  # key -> the attribute of the configuration that takes its value
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
HEADS = {"attention.key_length": "head_dim"}
SOFTCAPS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
LEAST = {"attention.sliding_window": 0, "feed_forward_length": 0}  # of counts; 1 of others
EXPERTS = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
GPT2 = {
    "context_length": "n_positions",
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}
NO_EFFECT = {  # what they say is known from elsewhere, or does not change what is computed
    "vocab_size",  # the embedding has as many rows
    "attention.value_length",  # the tensors' shapes say it, and a wrong one is refused with them
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "expert_feed_forward_length",  # the shapes
    "expert_shared_feed_forward_length",
}
NEUTRAL: Mapping[str, tuple[Value, ...]] = {  # keys that change nothing at these values, and are refused at others
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "expert_weights_norm": (False,),
    "expert_gating_func": (0, 1),  # none said; softmax
    "leading_dense_block_count": (0,),
    "interleave_moe_layer_step": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
}


class Keys:
    """An architecture's values by the end of their keys; it knows which of them were asked for."""

    def __init__(self, header: Header) -> None:
        self.architecture = str(header.values.get("general.architecture", ""))
        self.tensors = header.tensors
        self.asked: set[str] = set()
        prefix = f"{self.architecture}."
        self._values = {key.removeprefix(prefix): v for key, v in header.values.items() if key.startswith(prefix)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def value(self, key: str) -> Value | None:
        """None where the file does not have the key. A list of equal numbers, one for each layer, is that number."""
        self.asked.add(key)
        value = self._values.get(key)
        if isinstance(value, Array) and len(set(value.items)) == 1:
            return value.items[0]
        return value

    def is_list(self, key: str) -> bool:
        return isinstance(self._values.get(key), Array)

    def number(self, key: str, default: float | None = None) -> Any:
        value = self.value(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float):
            said = "is missing" if value is None else f"is not one number for all layers ({_said(value)})"
            raise ValueError(f"its key {self.architecture}.{key} {said}")
        if not 0 <= value < math.inf:  # nor is it one that is not a number
            raise self.refuse(key, "it must be at least 0")
        return value

    def positive(self, default: float, *names: str) -> float:
        """The value of a key that has several names: files of llama.cpp's converter have the first one."""
        said = [name for name in names if name in self]
        values = {float(self.number(name)) for name in said}
        if len(values) > 1 or 0.0 in values:
            raise self.refuse(said[-1], f"beside {said[0]}" if len(values) > 1 else "it must be greater than 0")
        return values.pop() if values else default

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of things."""
        value = self.number(key, default)
        if value != int(value) or value < least:
            raise self.refuse(key, f"it must be a whole number of at least {least}")
        return int(value)

    def refuse(self, key: str, served: str = "") -> ValueError:
        value = _said(self._values.get(key))
        hint = f" ({served})" if served else ""
        return ValueError(f"its key {self.architecture}.{key} is {value}, which is not supported{hint}")

    def has(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ValueError(f"it lacks the tensor {name}")
        return self.tensors[name].shape


Derive = Callable[[Keys, Attributes, Factors], Attributes]  # what the table has said so far -> what else is to be said


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's that transformers reads, and this server serves."""

    model_type: str  # transformers' name of it
    attributes: Mapping[str, str]
    derive: tuple[Derive, ...]
    # Those of the attributes' keys that may be missing: what holds then is llama.cpp's default, and transformers'
    optional: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)  # as NEUTRAL, and before it


def _said(value: Value | None) -> str:
    return f"[{', '.join(map(str, value.items[:3]))}, ...]" if isinstance(value, Array) else str(value)


# --- what is derived


def _head_dim(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    size = keys.count("attention.key_length", hidden // heads)
    _scale(keys, size)
    return {"head_dim": size}


def _shape_alone(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    """The heads of classes that have no setting for their size."""
    heads = found["num_attention_heads" if "num_attention_heads" in found else "n_head"]
    hidden = found["hidden_size" if "hidden_size" in found else "n_embd"]
    size = keys.count("attention.key_length", hidden // heads)
    if size != hidden // heads:
        raise keys.refuse("attention.key_length", f"it must be {hidden // heads}")
    _scale(keys, size)
    return {}


def _scale(keys: Keys, head_dim: int) -> None:
    """Attention's scores have the usual scale, or the file is refused."""
    scale = keys.number("attention.scale", 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=TOLERANCE):
        raise keys.refuse("attention.scale", f"it must be {head_dim**-0.5:.6g}")


def _key_value_heads(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    return {"num_key_value_heads": keys.count("attention.head_count_kv", found["num_attention_heads"])}


def _one_number_of_heads(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    """transformers undoes llama.cpp's order of queries and keys by these numbers, and takes no list of equal ones."""
    for key in ("attention.head_count", "attention.head_count_kv"):
        if keys.is_list(key):
            raise keys.refuse(key, "it must be one number for all layers")
    return {}


def _biases(**names: str) -> Derive:
    """Attributes that are true where the first layer has the tensor."""
    return lambda keys, found, factors: {attribute: keys.has(f"blk.0.{tensor}") for attribute, tensor in names.items()}


def _window(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    return {"sliding_window": keys.count("attention.sliding_window", 0, least=0) or None}


def _original(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    """Phi 3 has it beside the rotary embeddings' parameters, where it wins over them."""
    said = keys.count("rope.scaling.original_context_length", found["max_position_embeddings"])
    if said < found["max_position_embeddings"] and found["rope_parameters"]["rope_type"] == "default":
        # a converter has dropped them: https://github.com/ggml-org/llama.cpp/issues/24820
        raise keys.refuse("rope.scaling.original_context_length", f"it lacks the tensors {' and '.join(FACTORS[1:])}")
    original = found["rope_parameters"].get("original_max_position_embeddings", found["max_position_embeddings"])
    return {"original_max_position_embeddings": original}


def _experts(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    return {"moe_intermediate_size": keys.shape("blk.0.ffn_gate_exps.weight")[1]}


def _shared_expert(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    return {"shared_expert_intermediate_size": keys.shape("blk.0.ffn_gate_shexp.weight")[0]}


def _dense_size(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    """Of layers that a model of experts alone does not have."""
    return {"intermediate_size": keys.count("feed_forward_length", 1, least=0) or 1}


def _norm_of_experts(default: bool) -> Derive:
    def derive(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
        said = keys.value("expert_weights_norm")
        if not isinstance(said, bool | None):
            raise keys.refuse("expert_weights_norm", "it must be true or false")
        return {"norm_topk_prob": default if said is None else said}

    return derive


def _expert_size(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    return {"intermediate_size": keys.shape("blk.0.ffn_gate_exps.weight")[1]}


# --- rotary embeddings


def _rope(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    """All of a head is rotated."""
    size = _rotated(keys, found)
    if size != _size_of_heads(found):
        raise keys.refuse("rope.dimension_count", f"it must be {_size_of_heads(found)}")
    return {"rope_parameters": _scaled(keys, found, factors, size, _base(keys))}


def _partial_rope(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    """The first part of a head is rotated."""
    size = _rotated(keys, found)
    parameters = _scaled(keys, found, factors, size, _base(keys))
    return {"rope_parameters": {**parameters, "partial_rotary_factor": size / _size_of_heads(found)}}


def _size_of_heads(found: Attributes) -> int:
    return int(found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"])


def _rotated(keys: Keys, found: Attributes) -> int:
    return keys.count("rope.dimension_count", _size_of_heads(found))


def _base(keys: Keys) -> float:
    return keys.positive(DEFAULT_BASE, "rope.freq_base")


def _scaled(keys: Keys, found: Attributes, factors: Factors, size: int, base: float) -> Attributes:
    """The parameters of rotary embeddings of `size` dimensions, as transformers takes them."""
    kind = keys.value("rope.scaling.type")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    original = keys.count("rope.scaling.original_context_length", found["max_position_embeddings"])
    attention = keys.number("rope.scaling.attn_factor", 0.0) or 1.0
    parameters: Attributes = {"rope_theta": base}
    betas = {key: keys.number(key, usual) for key, usual in YARN_BETAS.items()}  # asked for: only yarn reads them
    if factors:
        if factor != 1.0 and kind not in ("none", "longrope"):
            raise keys.refuse("rope.scaling.factor", "a tensor of the file scales the rotary embeddings too")
        return parameters | _by_factors(keys, factors, size, base, original, attention)
    if kind == "yarn":
        return parameters | _yarn(keys, factor, original, attention, *betas.values())
    if attention != 1.0:
        raise keys.refuse("rope.scaling.attn_factor", "it needs rope.scaling.type to be yarn or longrope")
    if kind == "none" or (kind in (None, "linear", "longrope") and factor == 1.0):
        return parameters | {"rope_type": "default"}
    if kind not in (None, "linear"):
        raise keys.refuse("rope.scaling.type")
    return parameters | {"rope_type": "linear", "factor": factor}


def _yarn(keys: Keys, factor: float, original: int, attention: float, fast: float, slow: float) -> Attributes:
    multiplier = keys.number("rope.scaling.yarn_log_multiplier", 0.0)
    magnitude = _magnitude(factor, 1.0) / (_magnitude(factor, multiplier) if multiplier else 1.0)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": magnitude * attention,
        "beta_fast": fast,
        "beta_slow": slow,
    }


def _magnitude(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1.0 else 0.1 * multiplier * math.log(factor) + 1.0


def _by_factors(keys: Keys, factors: Factors, size: int, base: float, original: int, attention: float) -> Attributes:
    """The scaling that tensors say: one for all lengths, or one for short and one for long contexts."""
    for name, values in factors.items():
        if len(values) != size // 2:
            raise ValueError(f"its tensor {name} has {len(values)} factors instead of {size // 2}")
    if "rope_freqs.weight" in factors:
        one = list(factors["rope_freqs.weight"])
        llama3 = _llama3(one, base, size) if attention == 1.0 else None
        return llama3 or _long(one, one, original, attention)
    if len(factors) != 2:
        raise ValueError(f"it has only {', '.join(factors)} of the two tensors for short and long contexts")
    return _long(
        list(factors["rope_factors_short.weight"]), list(factors["rope_factors_long.weight"]), original, attention
    )


def _long(short: list[float], long: list[float], original: int, attention: float) -> Attributes:
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _llama3(factors: list[float], base: float, size: int) -> Attributes | None:
    """Llama 3.1's scaling, if there is one with these factors: low frequencies are divided by `factor`, high ones are
    kept, and between two bounds 1 / factor of a frequency f grows in proportion to f."""
    frequencies = [base ** (-2 * i / size) / (2 * math.pi) for i in range(size // 2)]  # turns for each token
    factor = max(factors)
    if factor <= 1.0:
        return {"rope_type": "default"} if all(f == 1.0 for f in factors) else None
    between = [(f, (1 / x - 1 / factor) / (1 - 1 / factor)) for f, x in zip(frequencies, factors, strict=True)]
    inner = [(f, share) for f, share in between if TOLERANCE < share < 1 - TOLERANCE]
    for original, high in _candidates(inner):
        found = [_llama3_factor(f, factor, original, high) for f in frequencies]
        if all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(found, factors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None


def _candidates(inner: list[tuple[float, float]]) -> list[tuple[int, float]]:
    """Original context lengths and high factors, for a low factor of 1: Llama's own, and the line through two points
    of (frequency, share), since share = (original * frequency - 1) / (high - 1)."""
    found = [(8192, 4.0)]
    if len(inner) > 1 and inner[0][0] != inner[-1][0]:
        (f1, s1), (f2, s2) = inner[0], inner[-1]
        slope = (s1 - s2) / (f1 - f2)
        width = 1 / (slope * f1 - s1) if slope * f1 != s1 else 0.0
        found.append((round(slope * width), round(1 + width, 3)))
    return found


def _llama3_factor(frequency: float, factor: float, original: int, high: float) -> float:
    turns = original * frequency
    share = min(1.0, max(0.0, (turns - 1) / (high - 1)))
    return 1 / ((1 - share) / factor + share)


# --- Gemma

GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # layers of those whose scores have a scale of their own


def _gemma(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    """llama.cpp knows the attention's scale by the number of layers: files do not say it."""
    size = keys.count("attention.key_length", found["hidden_size"] // found["num_attention_heads"])
    is_27b = found["num_hidden_layers"] == GEMMA_27B[keys.architecture]
    scalar = found["hidden_size"] // found["num_attention_heads"] if is_27b else size
    if scale := keys.number("attention.scale", 0.0):
        scalar = round(scale**-2) if scale > 0 else 0
        if not scalar or not math.isclose(scalar**-0.5, scale, rel_tol=TOLERANCE):
            raise keys.refuse("attention.scale")
    return {"head_dim": size, "query_pre_attn_scalar": scalar}


def _gemma2_layers(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    base = _base(keys)
    if keys.positive(base, "rope.freq_base_swa") != base:
        raise keys.refuse("rope.freq_base_swa", f"it must be {base}")
    caps = {cap: found.get(cap, most) or None for cap, most in GEMMA2_CAPS.items()}
    return {"sliding_window": found.get("sliding_window", 4096), "layer_types": _layers(keys, found, 2), **caps}


GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}


def _gemma3_layers(keys: Keys, found: Attributes, factors: Factors) -> Attributes:
    """Only the layers that see all have the scaling. Ollama has names of its own for the two bases."""
    window = found.get("sliding_window", 0)
    types = _layers(keys, found, 6) if window else ["full_attention"] * found["num_hidden_layers"]
    size = _rotated(keys, found)
    if size != found["head_dim"]:
        raise keys.refuse("rope.dimension_count", f"it must be {found['head_dim']}")
    base = keys.positive(DEFAULT_BASE, "rope.freq_base", "rope.global.freq_base")
    local = keys.positive(DEFAULT_BASE, "rope.freq_base_swa", "rope.local.freq_base")
    return {
        "sliding_window": window or 4096,
        "layer_types": types,
        "final_logit_softcapping": found.get("final_logit_softcapping") or None,
        "rope_parameters": {
            "full_attention": _scaled(keys, found, factors, size, base),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _layers(keys: Keys, found: Attributes, period: int) -> list[str]:
    """Of each `period` layers, the last sees all, where the file does not say it layer by layer."""
    names = {True: "sliding_attention", False: "full_attention"}
    said = keys.value("attention.sliding_window_pattern")
    if isinstance(said, Array):
        if len(said.items) != found["num_hidden_layers"]:
            raise keys.refuse("attention.sliding_window_pattern", f"it has {said.length} entries, not one per layer")
        return [names[bool(item)] for item in said.items]
    if isinstance(said, bool):
        return [names[said]] * found["num_hidden_layers"]
    if said is not None:
        period = keys.count("attention.sliding_window_pattern")
    return [names[(layer + 1) % period != 0] for layer in range(found["num_hidden_layers"])]


# --- the architectures

_BASIC: tuple[Derive, ...] = (_key_value_heads, _head_dim, _rope)
_NO_HEADS = frozenset({"attention.head_count_kv", "attention.key_length"})

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(
        "llama",
        DECODER | RMS,
        (*_BASIC, _one_number_of_heads, _biases(attention_bias="attn_q.bias", mlp_bias="ffn_gate.bias")),
        _NO_HEADS,
    ),
    "qwen2": Architecture("qwen2", DECODER | RMS, (_key_value_heads, _shape_alone, _rope), _NO_HEADS),
    "qwen3": Architecture("qwen3", DECODER | RMS, _BASIC, _NO_HEADS),
    "qwen2moe": Architecture(
        "qwen2_moe",
        DECODER | RMS | EXPERTS,
        (_key_value_heads, _shape_alone, _rope, _dense_size, _experts, _shared_expert, _norm_of_experts(False)),
        _NO_HEADS | {"feed_forward_length"},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        DECODER | RMS | EXPERTS,
        (*_BASIC, _dense_size, _experts, _norm_of_experts(True)),
        _NO_HEADS | {"feed_forward_length"},
    ),
    "phi3": Architecture(
        "phi3", DECODER | RMS, (_key_value_heads, _shape_alone, _partial_rope, _original, _window), _NO_HEADS
    ),
    "starcoder2": Architecture(
        "starcoder2",
        DECODER | {"attention.layer_norm_epsilon": "norm_epsilon"},
        (_key_value_heads, _shape_alone, _rope, _biases(use_bias="attn_q.bias")),
        _NO_HEADS,
        {"sliding_window": None},
    ),
    "gpt2": Architecture(
        "gpt2", GPT2, (_shape_alone,), also={"rope.dimension_count": (0,), "attention.head_count_kv": ()}
    ),
    "gemma2": Architecture(
        "gemma2",
        DECODER | RMS | SOFTCAPS,
        (_key_value_heads, _gemma, _gemma2_layers, _rope),
        _NO_HEADS | SOFTCAPS.keys(),
    ),
    "gemma3": Architecture(
        "gemma3_text",
        DECODER | RMS | SOFTCAPS,
        (_key_value_heads, _gemma, _gemma3_layers),
        _NO_HEADS | SOFTCAPS.keys() | RMS.keys(),
        {"rms_norm_eps": 1e-6},  # as Ollama's files leave it out
    ),
    "minimax-m2": Architecture(
        "minimax_m2",
        DECODER | RMS | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        (_key_value_heads, _head_dim, _partial_rope, _expert_size),
        _NO_HEADS | {"feed_forward_length"},
        also={"expert_gating_func": (2,), "expert_weights_norm": (True,)},  # sigmoid
    ),
}

# --- all of it

KINDS = {  # general.type of files that are no models -> what they are, and what to do
    "adapter": "it is a LoRA adapter, which is not served; merge it into its model",
    "mmproj": "it holds the image or audio part of a model; name the file of its text model",
    "imatrix": "it is an importance matrix, which is for quantizing; name the file of its model",
    "vocab": "it is a vocabulary without a model",
}
SIGNS = {"adapter.": "adapter", "clip.": "mmproj", "imatrix.": "imatrix"}  # of files that are older than general.type
OTHERS = ("diffusion.", "xielu.")  # further keys that change what is computed


def check_kind(header: Header) -> None:
    """Raises ValueError with a sentence for a file that is no text model, or not for this machine."""
    kind = header.values.get("general.type")
    signs = (kind for key in header.values for sign, kind in SIGNS.items() if key.startswith(sign))
    kind = next(signs, kind)
    if kind not in (None, "model"):
        raise ValueError(KINDS.get(str(kind), f"its key general.type is {kind}; only models are served"))
    if header.is_big_endian:
        raise ValueError("it is big-endian; convert it with gguf-convert-endian")
    others = [key for key in header.values if key.startswith(OTHERS)]
    if others:
        raise ValueError(f"its key {others[0]} is not supported")


def no_factors(header: Header) -> Factors:
    """Factors that change nothing, where a file's own are not at hand."""
    shapes = {name: header.tensors[name].shape for name in FACTORS if name in header.tensors}
    return {name: [1.0] * min(math.prod(shape), MOST_FACTORS) for name, shape in shapes.items()}


def attributes(header: Header, factors: Factors) -> Attributes:
    """Those of the configuration, with `model_type`; factors: the tensors FACTORS that the file has.

    Raises ValueError with a sentence that names the key.
    """
    keys = Keys(header)
    architecture = ARCHITECTURES.get(keys.architecture)
    if architecture is None:
        raise ValueError(
            f"its architecture is {keys.architecture or 'not given'}; the supported ones are {', '.join(ARCHITECTURES)}"
        )
    found: Attributes = {"model_type": architecture.model_type, **architecture.constants}
    for key, attribute in architecture.attributes.items():
        if key in keys or key not in architecture.optional:
            is_count = not key.endswith(("epsilon", "softcapping"))
            found[attribute] = keys.count(key, least=LEAST.get(key, 1)) if is_count else keys.number(key)
    for derive in architecture.derive:
        found |= derive(keys, found, factors)
    _refuse_others(keys, architecture)
    rows = keys.shape("token_embd.weight")[0]
    return {
        **found,
        "vocab_size": rows,
        "tie_word_embeddings": not keys.has("output.weight"),
        **_token_ids(header, rows),
    }


def _refuse_others(keys: Keys, architecture: Architecture) -> None:
    """For a key that nobody has asked for, and that may change something."""
    for key in keys:
        if key in keys.asked or key in NO_EFFECT:
            continue
        neutral = architecture.also.get(key, NEUTRAL.get(key, ()))
        if key == "attention.sliding_window" and keys.number(key) >= keys.number("context_length"):
            continue  # nothing is ever out of sight
        if key == "embedding_length_out" and keys.number(key) in (0, keys.number("embedding_length")):
            continue  # no other than that of what goes in
        if keys.value(key) not in neutral:
            raise keys.refuse(key, f"it must be {' or '.join(map(str, neutral))}" if neutral else "")


SAMPLING = {  # what a model's authors recommend -> transformers' names; other samplers are not offered here
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


def sampling(header: Header) -> dict[str, Value]:
    """What requests that are silent take."""
    return {name: header.values[key] for key, name in SAMPLING.items() if key in header.values}


TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message with a call


def _token_ids(header: Header, rows: int) -> Attributes:
    """None where the file says none, or one that the model does not have."""
    found = {attribute: _token_id(header, name, rows) for attribute, name in TOKENS.items()}
    ends = [*(_token_id(header, name, rows) for name in ENDS), *_further_ends(header, rows)]
    known = list(dict.fromkeys(token for token in ends if token is not None))
    return {**found, "eos_token_id": known[0] if len(known) == 1 else known or None}


def _token_id(header: Header, name: str, rows: int) -> int | None:
    return _known(header.values.get(f"tokenizer.ggml.{name}_token_id"), rows)


def _further_ends(header: Header, rows: int) -> list[int | None]:
    """Those of a list, as Ollama writes it."""
    said = header.values.get("tokenizer.ggml.eos_token_ids")
    return [_known(item, rows) for item in said.items] if isinstance(said, Array) else [_known(said, rows)]


def _known(token: Value | None, rows: int) -> int | None:
    return token if isinstance(token, int) and 0 <= token < rows else None
