"""AdapterConfig: what an adapter's adapter_config.json says, as PEFT writes it; what is not supported is refused."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from errors import ModelLoadError, first_line

FILE = "adapter_config.json"
ANY = None  # target_modules is `all-linear` or a regular expression, which has done its work when the files were made
MAX_REPEATS = 4  # in a pattern of names; more of them, one in another, can take years
_REPEATED = re.compile(r"(?<!\\)\)[*+?{]")  # a whole group
_OFF: tuple[Any, ...] = (None, False, "none", [], {}, "")
_UNSUPPORTED = {  # fields that must have one of the values in _OFF, with what they stand for
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "blocks in the matrices",
    "fan_in_fan_out": "transposed weights",
    "bias": "trained biases",
    "lora_bias": "trained biases",
    "modules_to_save": "whole layers beside the adapter",
    "target_parameters": "parameters that are no linear layers, such as a mixture's experts",
    "trainable_token_indices": "trained embeddings of tokens",
    "alora_invocation_tokens": "activation by tokens",
    "layer_replication": "layers that are there more than once",
    "arrow_config": "routing between adapters",
    "monteclora_config": "sampled weights",
    "kasa_config": "singular values beside the matrices",
}
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal", "mica")  # init_lora_weights that leave the base as it is


@dataclass(frozen=True)
class AdapterConfig:
    """How an adapter's matrices are scaled, and which layers they are for."""

    base: str  # the model that it was trained for, as its authors call it
    rank: int
    alpha: float
    is_rank_stabilized: bool
    targets: tuple[str, ...] | None  # the ends of names; ANY: what its files say
    ranks: Mapping[str, int]  # patterns of names -> another rank
    alphas: Mapping[str, float]

    @classmethod
    def read(cls, directory: Path) -> "AdapterConfig":
        """Raises ModelLoadError where the file is missing or damaged, or asks for something unsupported."""
        fields = _read_fields(directory / FILE)
        _check_support(fields, directory)
        try:
            targets = fields["target_modules"]
            return cls(
                base=str(fields.get("base_model_name_or_path") or "another model"),
                rank=_positive(fields["r"], int),
                alpha=_positive(fields.get("lora_alpha", 8), int, float),
                is_rank_stabilized=bool(fields.get("use_rslora")),
                targets=_ends(targets),
                ranks={_pattern(key): _positive(rank, int) for key, rank in _mapping(fields, "rank_pattern")},
                alphas={_pattern(key): _positive(a, int, float) for key, a in _mapping(fields, "alpha_pattern")},
            )
        except (KeyError, TypeError, ValueError, re.error) as error:
            raise ModelLoadError(
                f"{directory / FILE} is not the configuration of a LoRA adapter: r, lora_alpha, target_modules, "
                f"rank_pattern or alpha_pattern is missing or wrong ({first_line(error)})."
            ) from error

    def rank_of(self, name: str) -> int:
        """Returns the rank of the matrices of the layer `name`."""
        return next((rank for pattern, rank in self.ranks.items() if _is_match(pattern, name)), self.rank)

    def scale_of(self, name: str) -> float:
        """Returns the factor of the product of both matrices."""
        alpha = next((alpha for pattern, alpha in self.alphas.items() if _is_match(pattern, name)), self.alpha)
        rank = self.rank_of(name)
        return float(alpha / (rank**0.5 if self.is_rank_stabilized else rank))

    def names(self, layer: str) -> bool:
        """Returns whether the adapter's target_modules name a layer."""
        return self.targets is ANY or any(layer == end or layer.endswith(f".{end}") for end in self.targets)


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"{path.parent} is not an adapter: it has no {FILE}.") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {first_line(error)}.") from error
    if not isinstance(fields, dict):
        raise ModelLoadError(f"{path} does not hold an object of JSON.")
    return fields


def _check_support(fields: dict[str, Any], directory: Path) -> None:
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise ModelLoadError(f"The adapter in {directory} has peft_type {kind!r}, and only 'LORA' is supported.")
    for name, meaning in _UNSUPPORTED.items():
        if fields.get(name) not in _OFF:
            raise ModelLoadError(
                f"The adapter in {directory} sets {name} ({meaning}), which is not supported: "
                "merge it into the model (PEFT's merge_and_unload), or train it without that."
            )
    start = fields.get("init_lora_weights", True)
    if not isinstance(start, bool | None) and start not in _PLAIN_STARTS:
        raise ModelLoadError(
            f"The adapter in {directory} has init_lora_weights {start!r}, which changes the base model's weights: "
            "save it with PEFT's path_initial_model_for_weight_conversion."
        )


def _positive(value: Any, *types: type) -> Any:
    if type(value) not in types or not 0 < value < 1e9:
        raise ValueError(f"{value!r} is not a positive number")
    return value


def _ends(targets: Any) -> tuple[str, ...] | None:
    if isinstance(targets, str):
        re.compile(targets)
        return ANY
    return tuple(map(_text, targets))


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not the name of a layer")
    return value


def _pattern(text: str) -> str:
    """Checks a pattern of names, which a file of somebody else's brings: it must not hold up the server."""
    re.compile(text)
    if _REPEATED.search(text) or len(re.findall(r"[*+?{]", text)) > MAX_REPEATS:
        raise ValueError(f"{text[:80]!r} repeats too much: write the names of the layers")
    return text


def _mapping(fields: dict[str, Any], name: str) -> list[tuple[str, Any]]:
    return list((fields.get(name) or {}).items())


def _is_match(pattern: str, name: str) -> bool:
    """PEFT's own rule: the pattern is the whole name, or its end after a dot."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
