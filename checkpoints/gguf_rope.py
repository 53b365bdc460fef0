"""The rotary embeddings of a GGUF file: its keys and tensors as transformers' `rope_parameters`."""

import math
from collections.abc import Mapping, Sequence

from checkpoints.gguf_header import Header
from checkpoints.gguf_keys import TOLERANCE, Attributes, Keys

Factors = Mapping[str, Sequence[float]]  # a tensor's name -> the numbers that frequencies are divided by

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
MAX_FACTORS = 2**16
DEFAULT_BASE = 10000.0
YARN_BETAS = {"rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0}


def neutral_factors(header: Header) -> Factors:
    """Returns factors that change nothing, as many as the file has: a check of the header has not read its own."""
    shapes = {name: header.tensors[name].shape for name in FACTORS if name in header.tensors}
    return {name: [1.0] * min(math.prod(shape), MAX_FACTORS) for name, shape in shapes.items()}


def whole_heads(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    """Returns the parameters of rotary embeddings that rotate all of a head."""
    size = rotated_size(keys, config)
    if size != _head_size(config):
        raise keys.refuse("rope.dimension_count", f"it must be {_head_size(config)}")
    return {"rope_parameters": scaled(keys, config, factors, size, base(keys))}


def part_of_heads(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    """Returns the parameters of rotary embeddings that rotate the first part of a head."""
    size = rotated_size(keys, config)
    parameters = scaled(keys, config, factors, size, base(keys))
    return {"rope_parameters": {**parameters, "partial_rotary_factor": size / _head_size(config)}}


def original_length(keys: Keys, config: Attributes, factors: Factors) -> Attributes:
    """Returns Phi 3's original context length, an attribute that wins over the one in `rope_parameters`."""
    original = keys.count("rope.scaling.original_context_length", config["max_position_embeddings"])
    if original < config["max_position_embeddings"] and config["rope_parameters"]["rope_type"] == "default":
        # a converter has dropped them: https://github.com/ggml-org/llama.cpp/issues/24820
        raise keys.refuse("rope.scaling.original_context_length", f"it lacks the tensors {' and '.join(FACTORS[1:])}")
    length = config["rope_parameters"].get("original_max_position_embeddings", config["max_position_embeddings"])
    return {"original_max_position_embeddings": length}


def rotated_size(keys: Keys, config: Attributes) -> int:
    """Returns how many dimensions of a head are rotated."""
    return keys.count("rope.dimension_count", _head_size(config))


def base(keys: Keys) -> float:
    return keys.positive(DEFAULT_BASE, "rope.freq_base")


def _head_size(config: Attributes) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def scaled(keys: Keys, config: Attributes, factors: Factors, size: int, base: float) -> Attributes:
    """Returns the parameters of rotary embeddings of `size` dimensions, with the scaling that the file asks for.

    Raises ValueError for a scaling that transformers cannot compute."""
    kind = keys.value("rope.scaling.type")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    original = keys.count("rope.scaling.original_context_length", config["max_position_embeddings"])
    attention = keys.number("rope.scaling.attn_factor", 0.0) or 1.0
    parameters: Attributes = {"rope_theta": base}
    betas = {key: keys.number(key, default) for key, default in YARN_BETAS.items()}  # counts as read: yarn alone has it
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
    """Returns the scaling of the file's tensors: one for all lengths, or one for short and one for long contexts."""
    for name, values in factors.items():
        if len(values) != size // 2:
            raise ValueError(f"its tensor {name} has {len(values)} factors instead of {size // 2}")
    if "rope_freqs.weight" in factors:
        one = list(factors["rope_freqs.weight"])
        llama3 = _llama3(one, base, size) if attention == 1.0 else None
        return llama3 or _long(one, one, original, attention)
    if len(factors) != 2:
        raise ValueError(f"it has only {', '.join(factors)} of the two tensors for short and long contexts")
    short, long = (list(factors[f"rope_factors_{length}.weight"]) for length in ("short", "long"))
    return _long(short, long, original, attention)


def _long(short: list[float], long: list[float], original: int, attention: float) -> Attributes:
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _llama3(factors: list[float], base: float, size: int) -> Attributes | None:
    """Returns Llama 3.1's scaling if there is one with these factors, else None.

    It divides low frequencies by `factor` and keeps high ones; between two bounds, 1 / factor of a frequency f grows
    in proportion to f.
    """
    frequencies = [base ** (-2 * i / size) / (2 * math.pi) for i in range(size // 2)]  # turns for each token
    factor = max(factors)
    if factor <= 1.0:
        return {"rope_type": "default"} if all(f == 1.0 for f in factors) else None
    shares = [(f, (1 / x - 1 / factor) / (1 - 1 / factor)) for f, x in zip(frequencies, factors, strict=True)]
    between = [(f, share) for f, share in shares if TOLERANCE < share < 1 - TOLERANCE]
    for original, high in _candidates(between):
        computed = [_llama3_factor(f, factor, original, high) for f in frequencies]
        if all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(computed, factors, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    return None


def _candidates(points: list[tuple[float, float]]) -> list[tuple[int, float]]:
    """Returns pairs (original context length, high factor) to try, for a low factor of 1: Llama's own pair, and the
    one of the line through two points (frequency, share), since share = (original * frequency - 1) / (high - 1)."""
    pairs = [(8192, 4.0)]
    if len(points) > 1 and points[0][0] != points[-1][0]:
        (f1, s1), (f2, s2) = points[0], points[-1]
        slope = (s1 - s2) / (f1 - f2)
        width = 1 / (slope * f1 - s1) if slope * f1 != s1 else 0.0
        pairs.append((round(slope * width), round(1 + width, 3)))
    return pairs


def _llama3_factor(frequency: float, factor: float, original: int, high: float) -> float:
    turns = original * frequency
    share = min(1.0, max(0.0, (turns - 1) / (high - 1)))
    return 1 / ((1 - share) / factor + share)
