"""load_model: a directory in, the model with its text layers attending through this engine out."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import logging as transformers_logging

from engine import memory, weight_files
from engine.attention import fused, paged
from engine.cpu import kernels, packed_checkpoint, packed_layers
from engine.quantization import BFLOAT16_KERNELS, FROM_FILE, NONE, STOCK, Quantization, choose
from errors import ModelLoadError

log = logging.getLogger(__name__)
Report = Callable[[str, float], None]  # what is being done, fraction of it from 0 to 1
LAYER_TYPES = {"full_attention", "sliding_attention"}
NEVER_FLOAT16 = (
    "gemma",
)  # activations beyond 65504 overflow: https://github.com/huggingface/transformers/issues/36822
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_dtype(wanted: str, model_type: str, on_cuda: bool) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it; a family that overflows in float16 never gets it."""
    fits_bfloat16 = torch.cuda.is_bf16_supported() if on_cuda else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtype = _DTYPES.get(wanted)
    if dtype is None:
        dtype = torch.bfloat16 if fits_bfloat16 else torch.float16 if on_cuda else torch.float32
    if dtype == torch.float16 and model_type.startswith(NEVER_FLOAT16):
        dtype = torch.bfloat16 if fits_bfloat16 else torch.float32
    return dtype


def load_model(
    directory: Path, dtype: str, device_map: str, report: Report, quantization: str = STOCK
) -> PreTrainedModel:
    """The model in evaluation mode, its text layers attending through this engine. Raises ModelLoadError."""
    config, chosen = check_model(directory, dtype, device_map)
    weights = choose_quantization(quantization, dtype, _is_on_cuda(device_map), directory)
    if weights is NONE and quantization != STOCK and _multiplies_bfloat16(chosen, device_map):
        weights = BFLOAT16_KERNELS
    log.info("weights: %s", weights.description)
    report("loading weights", 0.0)
    try:
        if weights is FROM_FILE:
            model = packed_checkpoint.load(directory, config, chosen, _attention_names(config))
        else:
            model = _load_stock(directory, config, chosen, device_map, weights, report)
    except ModelLoadError:
        raise
    except ImportError as error:
        is_quantized = weight_files.scheme_of(config) is not None
        reason = (
            "the package that reads its quantized weights is not installed" if is_quantized else "a package is missing"
        )
        raise ModelLoadError(f"The model in {directory} cannot be loaded: {reason} ({first_line(error)}).") from error
    except Exception as error:  # of any kind, where a file says what nobody expects
        raise ModelLoadError(
            f"The model in {directory} cannot be loaded ({type(error).__name__}: {first_line(error).rstrip('.')})."
        ) from error
    if "disk" in {str(place) for place in getattr(model, "hf_device_map", {}).values()}:
        raise ModelLoadError(
            f"The model in {directory} does not fit into the memory of this machine's devices: use a "
            "smaller model, or set QUANTIZATION to a format with fewer bits."
        )
    model.eval()
    if weights.packed_bits:
        with torch.inference_mode():
            packed_layers.pack_model(model, weights, lambda fraction: report("quantizing weights", fraction))
    if weights.needs_cpu_kernels:
        fused.fuse(model)
    memory.trim()  # what loading has freed would else stay with the process
    return model


def _load_stock(
    directory: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device_map: str,
    weights: Quantization,
    report: Report,
) -> PreTrainedModel:
    options: dict[str, Any] = {}
    if weights.bitsandbytes:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else it warns at every matrix product
        options["quantization_config"] = BitsAndBytesConfig(
            **weights.bitsandbytes, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=_layers_to_keep(config)
        )
    with _weights_progress(report):
        both = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=_attention_names(config),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model, loaded = cast(tuple[PreTrainedModel, dict[str, Any]], both)
    if missing := sorted(loaded["missing_keys"]):  # transformers would fill them at random
        raise ModelLoadError(f"The model in {directory} lacks {weight_files.some(missing)}.")
    is_quantized = weight_files.scheme_of(config) is not None
    unread = weight_files.check_unread(directory, loaded["unexpected_keys"], config, is_quantized)
    if unread:
        log.info("weights that are not read: %s", unread)
    if is_quantized and all(p.is_floating_point() and p.dtype.itemsize > 1 for p in model.parameters()):
        _make_alike(model, dtype)
    return model


def _make_alike(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Layers that were made plain when loaded have a type of their own, and what is beside them that of the files."""
    names = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(kept in name for kept in names):
            parameter.data = parameter.data.to(dtype)


def _layers_to_keep(config: PreTrainedConfig) -> list[str] | None:
    """Those that bitsandbytes leaves alone, if there are routers: these, and what it would leave anyhow."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    routers = [name for name, _ in model.named_modules() if packed_layers.ROUTER.search(name)]
    return [*get_keys_to_not_convert(model), *routers] if routers else None


def choose_quantization(setting: str, dtype: str, on_cuda: bool, directory: Path) -> Quantization:
    """The format that a setting of QUANTIZATION stands for on this machine; see `choose`."""
    has_cpu_kernels = kernels.are_available() and not on_cuda
    return choose(setting, dtype, has_cpu_kernels, packed_checkpoint.exists(directory))


def _multiplies_bfloat16(dtype: torch.dtype, device_map: str) -> bool:
    return dtype == torch.bfloat16 and kernels.has_bfloat16() and not _is_on_cuda(device_map)


def check_model(directory: Path, dtype: str, device_map: str) -> tuple[PreTrainedConfig, torch.dtype]:
    """Its configuration, and the dtype to load it in; takes milliseconds. Raises ModelLoadError."""
    on_cuda = _is_on_cuda(device_map)
    try:
        tensors = weight_files.read_headers(directory)
        _check_layers(directory, len(tensors))
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        check_architecture(config)
        _check_generation_config(directory)
        weight_files.check_numbers(directory, tensors, config)
        chosen = choose_dtype(dtype, config.model_type, on_cuda)
        if not on_cuda:
            _check_memory(directory, config, chosen, sum(tensor.num_elements for tensor in tensors.values()))
    except ModelLoadError:
        raise
    except Exception as error:  # of any kind, where a file says what nobody expects
        raise ModelLoadError(
            f"The model in {directory} cannot be served ({type(error).__name__}: {first_line(error).rstrip('.')})."
        ) from error
    return config, chosen


def _is_on_cuda(device_map: str) -> bool:
    return torch.cuda.is_available() and device_map != "cpu"


def check_architecture(config: PreTrainedConfig) -> None:
    """Raises ModelLoadError for models that are no causal language models, or attend in a way the cache cannot hold."""
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelLoadError(
            f"Models of type {config.model_type!r} are not supported: transformers has no causal "
            "language model of this type."
        )
    model_class = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    if not model_class._supports_attention_backend:
        raise ModelLoadError(
            f"Models of type {config.model_type!r} are not supported: transformers allows no other "
            "attention function for them."
        )
    text = config.get_text_config()
    foreign = set(getattr(text, "layer_types", None) or LAYER_TYPES) - LAYER_TYPES
    if foreign:
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


def _attention_names(config: PreTrainedConfig) -> str | dict[str, str]:
    """The engine's attention for the text layers; a vision tower keeps the stock one."""
    parts = {name: "sdpa" for name in config.sub_configs if name != "text_config"}
    return {**parts, "text_config": paged.NAME, "": "sdpa"} if "text_config" in config.sub_configs else paged.NAME


def _check_memory(directory: Path, config: PreTrainedConfig, dtype: torch.dtype, in_files: int) -> None:
    """For what the files have, and for what the configuration says: room is made for that before they are compared."""
    needed = max(in_files, _num_parameters(config)) * dtype.itemsize
    free = psutil.virtual_memory().available
    if needed > free:
        raise ModelLoadError(
            f"The model in {directory} needs {needed / 2**30:.1f} GiB of memory, but only "
            f"{free / 2**30:.1f} GiB are free: use a smaller model, or set QUANTIZATION to a format with fewer bits."
        )


def _num_parameters(config: PreTrainedConfig) -> int:
    """0 for a model that is quantized already."""
    if getattr(config, "quantization_config", None) is not None:
        return 0
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    return int(model.num_parameters())


def _check_layers(directory: Path, num_tensors: int) -> None:
    """Before anything is made for each layer that a configuration says there is."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    parts = [config, *config.values()] if isinstance(config, dict) else []
    said = [part.get("num_hidden_layers") for part in parts if isinstance(part, dict)]
    num_layers = max((number for number in said if isinstance(number, int)), default=0)
    if num_layers > num_tensors:
        raise ModelLoadError(
            f"The config.json of the model in {directory} names {num_layers} layers, but its files "
            f"hold only {num_tensors} tensors."
        )


def _check_generation_config(directory: Path) -> None:
    """transformers goes on without one that it cannot read, and so without the tokens that end an answer."""
    path = directory / "generation_config.json"
    try:
        is_read = not path.exists() or isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except ValueError:
        is_read = False
    if not is_read:
        raise ModelLoadError(f"{path} is not a JSON object: repair it or remove it.")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _weights_progress(report: Report) -> Iterator[None]:
    """Passes the progress of transformers' own bars on, where its version has a hook for that."""
    set_hook = getattr(transformers_logging, "set_tqdm_hook", None)
    if set_hook is None:
        yield
        return

    def make_bar(factory: Any, arguments: Any, options: Any) -> Any:
        bar = factory(*arguments, **{**options, "disable": False, "file": _Nowhere()})
        update = bar.update

        def reporting_update(count: int = 1) -> Any:
            result = update(count)
            if bar.total:
                report("loading weights", min(1.0, bar.n / bar.total))
            return result

        bar.update = reporting_update
        return bar

    previous = set_hook(make_bar)
    try:
        yield
    finally:
        set_hook(previous)


class _Nowhere:
    def write(self, text: str) -> None: ...

    def flush(self) -> None: ...
