"""The weight files of a model's directory: which ones hold its weights, and what their headers say of each tensor.

A checkpoint must store exactly what the model reads. A tensor that is left over, such as a scale, usually means that
the model would misread the others. The exceptions are in UNREAD, each with its reason.
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from errors import ModelLoadError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MODELOPT = "hf_quant_config.json"
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.*)")
FURTHER = "layers that predict further tokens"
FURTHER_COUNTS = (  # settings that give the number of such layers
    *("num_nextn_predict_layers", "nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers"),
    *("num_mtp_modules", "mtp_num_layers", "n_predict_layers", "num_multi_token_layers"),
)
FURTHER_PARTS = re.compile(r"(eh_proj|enorm|hnorm|shared_head|mtp|nextn)\b|mtp_|nextn_")  # parts only such layers have
HEAD = re.compile(r"(^|\.)lm_head\.(?!bias$)")
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
ROWS = 4096  # that are compared at a time
BIAS = re.compile(r"(\.|_)bias$")
NAMED = 3  # tensors that an error lists
CODES = re.compile(
    r"F8_|F4|F6_|I8|U8|I16|U16|I32|U32|I64|U64"
)  # safetensors' types of codes, not of weights themselves
UNREAD = {  # tensors that a text model need not read -> what they are
    r"(^|\.)(inv_freq|cos_cached|sin_cached|freqs_cis)$": "rotary angles, which the model computes itself",
    r"\.(attn|attention)\.(bias|masked_bias)$": "causal masks",
    r"position_ids$": "position ids",
    r"(^|\.)(mtp|mtp_layers|nextn|shared_head|multi_token)\w*\.": FURTHER,
    r"(^|\.)(vision|visual|image|audio|speech|sound|video)\w*\.": "image and audio parts",
    r"(^|\.)(mm_|multi_modal_|multimodal_|embed_vision|embed_audio|resampler|connector|aligner|projector)\w*\.": (
        "image and audio parts"
    ),
    r"(^|\.)(value_head|v_head|talker|token2wav|code2wav)\.": "heads for another task",
    r"\.((q|k|v|kv|prob)_scale|(q|k|v|kv|qkv)_proj\.output_scale)$": (
        "scales of an 8-bit KV cache, which this server does not use"
    ),
}
UNREAD_QUANTIZED = {r"\.(input|activation)_scale$": "scales of activations, which are not used after dequantization"}


@dataclass(frozen=True)
class Tensor:
    """One tensor, as a file's header describes it."""

    file: str
    dtype: str  # as safetensors names it, such as BF16
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return self.num_elements * (int(bits[0]) if bits else 8) // 8


def read_headers(directory: Path) -> dict[str, Tensor]:
    """Reads the headers of all tensors that a model will be loaded from, by name.

    Copies in another format, such as consolidated.safetensors, are not read. Raises ModelLoadError for a tensor that
    is in two files.
    """
    tensors: dict[str, Tensor] = {}
    for path in weight_paths(directory):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                if name in tensors:
                    raise ModelLoadError(
                        f"The tensor {name} is in two files, {path} and {tensors[name].file}: remove one of them."
                    )
                part = file.get_slice(name)
                tensors[name] = Tensor(path.name, part.get_dtype(), tuple(part.get_shape()))
    return tensors


def has_own_head(directory: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether the files have an output layer that is not the embedding, whatever config.json says."""
    heads = [name for name in tensors if HEAD.search(name)]
    if not any(name.endswith(".weight") for name in heads):
        return bool(heads)  # codes with scales
    (head, *_), embeddings = heads, [name for name in tensors if EMBEDDING.search(name)]
    if len(embeddings) != 1:
        return False
    if any(getattr(tensors[head], part) != getattr(tensors[embeddings[0]], part) for part in ("shape", "dtype")):
        return True
    with ExitStack() as stack:
        files = (stack.enter_context(safe_open(directory / tensors[name].file, "pt")) for name in (head, embeddings[0]))
        first, second = (file.get_slice(name) for file, name in zip(files, (head, embeddings[0]), strict=True))
        parts = range(0, tensors[head].shape[0], ROWS)
        return not all(torch.equal(first[at : at + ROWS], second[at : at + ROWS]) for at in parts)


def weight_paths(directory: Path) -> list[Path]:
    """Returns the files that transformers reads. Raises ModelLoadError if it could not tell which."""
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    if (directory / INDEX).exists():
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        if "metadata" not in index:
            raise ModelLoadError(
                f'{directory / INDEX} has no "metadata", which transformers requires: add "metadata": {{}}.'
            )
        return [directory / name for name in sorted(set(index["weight_map"].values()))]
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        raise ModelLoadError(
            f"{directory} has {others[0]}, but neither {SINGLE} nor {INDEX}, which lists the files' tensors."
        )
    return []


def check_numbers(directory: Path, tensors: dict[str, Tensor], config: PreTrainedConfig) -> None:
    """Raises ModelLoadError for weights stored as codes, unless config.json says what they mean in a way that
    transformers reads: otherwise the codes would be taken for the weights themselves."""
    scheme = scheme_of(config)
    if scheme is not None:
        method = method_of(scheme)
        if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
            raise ModelLoadError(
                f"The model in {directory} is quantized as {method!r}, which transformers does not support."
            )
        return
    codes = [name for name, tensor in tensors.items() if is_codes(tensor, name)]
    if codes:
        is_modelopt = (directory / MODELOPT).exists()
        reason = f"; {MODELOPT} does, but only NVIDIA's tools read it" if is_modelopt else ""
        raise ModelLoadError(
            f"The model in {directory} stores {some(codes)} as {tensors[codes[0]].dtype}, and its config.json has no "
            f"quantization_config that says what they mean{reason}: take the checkpoint that is not quantized."
        )


def is_codes(tensor: Tensor, name: str) -> bool:
    """Returns whether a weight is stored as codes."""
    return CODES.match(tensor.dtype) is not None and name.endswith("weight")


def scheme_of(config: PreTrainedConfig) -> Any:
    """Returns the quantization_config of a model whose files are quantized; None for others."""
    scheme = getattr(config, "quantization_config", None)
    return scheme or getattr(config.get_text_config(), "quantization_config", None)


def method_of(scheme: Any) -> str:
    """Returns the method of a quantization_config, as transformers names it."""
    values = scheme if isinstance(scheme, dict) else scheme.to_dict()
    bits = next((bits for bits in (8, 4) if values.get(f"load_in_{bits}bit")), None)
    method = values.get("quant_method")
    return str(getattr(method, "value", method)) if bits is None else f"bitsandbytes_{bits}bit"


def check_unread(directory: Path, names: set[str], config: PreTrainedConfig, is_quantized: bool) -> str:
    """Checks tensors that the model did not read, and gives a sentence about them for the log.

    names: these tensors, without those that transformers itself expects to be unread. Raises ModelLoadError for any
    tensor that is not in UNREAD, part of a layer that predicts further tokens, or a bias of zero.
    """
    patterns = {**UNREAD, **UNREAD_QUANTIZED} if is_quantized else UNREAD
    further = _further_layers(names, config)
    reasons: dict[str, list[str]] = {}
    for name in names:
        reasons.setdefault(_reason(name, patterns, further) or "", []).append(name)
    unexpected = reasons.pop("", [])
    zeros = _zeros(directory, {name for name in unexpected if BIAS.search(name)})
    if others := sorted({*unexpected} - zeros):
        raise ModelLoadError(
            f"The model in {directory} has {some(others)}, which its architecture does not use: "
            "without them its answers would be wrong."
        )
    if zeros:
        reasons["biases of zero, which change nothing"] = [*zeros]
    return ", ".join(f"{len(tensors)} tensors ({reason})" for reason, tensors in sorted(reasons.items()))


def _reason(name: str, patterns: dict[str, str], further: set[int]) -> str | None:
    """Returns why a tensor may be left unread; None if it may not."""
    layer = LAYER.search(name)
    if layer and int(layer[1]) in further:
        return FURTHER
    return next((reason for pattern, reason in patterns.items() if re.search(pattern, name)), None)


def _further_layers(names: set[str], config: PreTrainedConfig) -> set[int]:
    """Returns the numbers of layers, beyond the model's own, that predict further tokens.

    The configuration counts them, or they have parts that no other layer has. Any other layer beyond the model's own
    means that the configuration has too few.
    """
    text = config.get_text_config()
    first = text.num_hidden_layers
    counts = [getattr(text, setting, None) for setting in FURTHER_COUNTS]
    num_further = max((count for count in counts if isinstance(count, int)), default=0)
    layers = [layer for layer in map(LAYER.search, names) if layer]
    seen = {int(layer[1]) for layer in layers if FURTHER_PARTS.match(layer[2])}
    return {number for number in seen if number >= first} | {*range(first, first + num_further)}


def _zeros(directory: Path, names: set[str]) -> set[str]:
    """Returns the tensors that are zero everywhere: some quantizers write such biases for layers that have none."""
    zeros: set[str] = set()
    for path in weight_paths(directory) if names else ():
        with safe_open(path, "pt") as file:
            zeros |= {name for name in names.intersection(file.keys()) if not file.get_tensor(name).any()}
    return zeros


def some(names: list[str]) -> str:
    """Lists tensors for a message: their number, and the first of them."""
    shown = ", ".join(names[:NAMED])
    rest = len(names) - NAMED
    return f"{len(names)} tensors ({shown}{', ...' if rest > 0 else ''})" if len(names) > 1 else f"the tensor {shown}"
