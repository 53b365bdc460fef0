"""CheckedModel: a model's directory that can be served, as `check_model` found by its configuration and headers."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine import weight_files
from engine.cpu import packed_layers
from errors import ModelLoadError, first_line
from vision.families import vision_family_of

# The layers whose state the cache can hold
ATTENTION_LAYER_TYPES, RECURRENT_LAYER_TYPES = {"full_attention", "sliding_attention"}, {"linear_attention", "conv"}
# Activations beyond 65504 overflow: https://github.com/huggingface/transformers/issues/36822
NEVER_FLOAT16 = ("gemma",)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class CheckedModel:
    """A model whose files fit together and that this engine can compute; what `load_model` needs to load it."""

    directory: Path
    config: PreTrainedConfig
    dtype: torch.dtype  # to load it in
    dtype_setting: str  # the setting DTYPE, from which `dtype` was chosen
    device_map: str
    num_elements: int  # numbers in the weight files

    @property
    def is_on_cuda(self) -> bool:
        return _is_on_cuda(self.device_map)


def check_model(directory: Path, dtype: str, device_map: str) -> CheckedModel:
    """Reads a model's configuration and the headers of its weight files, in milliseconds. Raises ModelLoadError for a
    model that this engine cannot serve.

    dtype, device_map: the settings DTYPE and DEVICE_MAP.
    """
    try:
        tensors = weight_files.read_headers(directory)
        _check_layers(directory, len(tensors))
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        _leave_out_parts(config, tensors)
        check_architecture(config)
        if _is_tied(config) and weight_files.has_own_head(directory, tensors):
            _untie(config)  # as transformers does once it has read both
        _check_generation_config(directory)
        weight_files.check_numbers(directory, tensors, config)
        return CheckedModel(
            directory=directory,
            config=config,
            dtype=choose_dtype(dtype, config.model_type, _is_on_cuda(device_map)),
            dtype_setting=dtype,
            device_map=device_map,
            num_elements=sum(tensor.num_elements for tensor in tensors.values()),
        )
    except ModelLoadError:
        raise
    except Exception as error:  # malformed files can raise anything
        raise ModelLoadError(
            f"The model in {directory} cannot be served ({type(error).__name__}: {first_line(error).rstrip('.')})."
        ) from error


def _is_on_cuda(device_map: str) -> bool:
    return torch.cuda.is_available() and device_map != "cpu"


def choose_dtype(setting: str, model_type: str, on_cuda: bool) -> torch.dtype:
    """Gives the data type for a setting of DTYPE. `auto` is bfloat16 if the device computes in it; a family that
    overflows in float16 never gets that."""
    fits_bfloat16 = _multiplies_bfloat16(on_cuda)
    dtype = _DTYPES.get(setting)
    if dtype is None:
        dtype = torch.bfloat16 if fits_bfloat16 else torch.float16 if on_cuda else torch.float32
    if dtype == torch.float16 and model_type.startswith(NEVER_FLOAT16):
        dtype = torch.bfloat16 if fits_bfloat16 else torch.float32
    return dtype


def _multiplies_bfloat16(on_cuda: bool) -> bool:
    """Returns whether the device has products of bfloat16; GPUs before compute capability 8.0 compute them slowly."""
    if on_cuda:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def auto_class(config: PreTrainedConfig) -> Any:
    """Returns the class of transformers that makes the model; that of images and text for models that see."""
    return AutoModelForCausalLM if vision_family_of(config) is None else AutoModelForImageTextToText


def _is_causal_lm(config: PreTrainedConfig) -> bool:
    return config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def check_architecture(config: PreTrainedConfig) -> None:
    """Raises ModelLoadError for models that are not causal language models, or attend in a way that the KV cache does
    not support."""
    if not _is_causal_lm(config) and vision_family_of(config) is None:
        raise ModelLoadError(
            f"Models of type {config.model_type!r} are not supported: transformers has no causal "
            "language model of this type."
        )
    model_class = cast(type[PreTrainedModel], auto_class(config)._model_mapping[type(config)])
    text = config.get_text_config()
    layer_types = {*(getattr(text, "layer_types", None) or ())}
    # Qwen 3.5 takes other functions and does not say so; `probe_layers` will see whether all layers do
    if not model_class._supports_attention_backend and not layer_types & RECURRENT_LAYER_TYPES:
        raise ModelLoadError(
            f"Models of type {config.model_type!r} are not supported: transformers allows no other "
            "attention function for them."
        )
    if foreign := layer_types - ATTENTION_LAYER_TYPES - RECURRENT_LAYER_TYPES:
        raise ModelLoadError(
            f"Models of type {config.model_type!r} are not supported: they have {', '.join(sorted(foreign))} layers."
        )
    rope = getattr(text, "rope_parameters", None) or {}
    types = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)} - {None}
    if "dynamic" in types:
        raise ModelLoadError(
            "Models with dynamic rotary embeddings are not supported: their angles depend on the other "
            "requests of a batch."
        )
    if unknown := types - {"default", *ROPE_INIT_FUNCTIONS}:
        raise ModelLoadError(
            f"Rotary embeddings of type {', '.join(sorted(map(repr, unknown)))} are not supported; "
            f"the supported types are {', '.join(sorted(ROPE_INIT_FUNCTIONS))}."
        )


def _leave_out_parts(config: PreTrainedConfig, tensors: Iterable[str]) -> None:
    """Leaves out of the configuration the parts that hear, which this server does not use, and those that see, where
    the files lack them: they would take memory, or be missing."""
    family = vision_family_of(config)
    if getattr(config, "audio_config", None) is not None and family is not None:
        cast(Any, config).audio_config = None
    if family is not None and not family.needs_tower and not any(map(packed_layers.SEEING.search, tensors)):
        cast(Any, config).vision_config = None


def _is_tied(config: PreTrainedConfig) -> bool:
    return bool(config.get_text_config().tie_word_embeddings or config.tie_word_embeddings)


def _untie(config: PreTrainedConfig) -> None:
    for part in (config, config.get_text_config()):
        cast(Any, part).tie_word_embeddings = False


def _check_layers(directory: Path, num_tensors: int) -> None:
    """Raises ModelLoadError if the configuration names more layers than the files can have: otherwise something would
    be made for each of them before the mistake is found."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    parts = [config, *config.values()] if isinstance(config, dict) else []
    counts = [part.get("num_hidden_layers") for part in parts if isinstance(part, dict)]
    num_layers = max((count for count in counts if isinstance(count, int)), default=0)
    if num_layers > num_tensors:
        raise ModelLoadError(
            f"The config.json of the model in {directory} names {num_layers} layers, but its files "
            f"hold only {num_tensors} tensors."
        )


def _check_generation_config(directory: Path) -> None:
    """Raises ModelLoadError for a generation config that is not a JSON object: transformers would ignore it, and with
    it the tokens that end an answer."""
    path = directory / "generation_config.json"
    try:
        is_read = not path.exists() or isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:
        is_read = False
    if not is_read:
        raise ModelLoadError(f"{path} is not a JSON object: repair it or remove it.")
