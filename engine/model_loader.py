"""load_model: a CheckedModel in, the model with its text layers attending through this engine out."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.utils import logging as transformers_logging

from engine import memory, weight_files
from engine.attention import fused, paged
from engine.checked_model import CheckedModel, auto_class
from engine.cpu import kernels, packed_checkpoint, packed_layers
from engine.cpu.packing import Keep, PackedForm, Packer, pack_model
from engine.packed_loading import PackingConfig
from engine.quantization import BFLOAT16_KERNELS, CPU, FROM_FILE, GPU, HALVES, NONE, STOCK, Quantization, choose
from engine.quantized import files
from engine.report import Report
from engine.rounded_weights import RoundedWeights
from errors import ModelLoadError, first_line

log = logging.getLogger(__name__)


def load_model(
    checked: CheckedModel, report: Report, quantization: str = STOCK, cache_dir: Path | None = None
) -> PreTrainedModel:
    """Loads a model in evaluation mode, its text layers attending through this engine. Raises ModelLoadError.

    quantization: the setting QUANTIZATION. cache_dir: where rounded weights are kept for the next start; None: nowhere.
    """
    directory, config = checked.directory, checked.config
    weights = weights_of(checked, quantization)
    log.info("weights: %s", weights.description)
    report("loading weights", 0.0)
    rounded = _rounded_weights(checked, weights, cache_dir)
    try:
        kept = None if rounded is None else rounded.read(_attention_names(config))
        if not checked.is_on_cuda and kept is None:
            _check_memory(checked, weights)
        if weights is FROM_FILE:
            model = _load_blocks(checked)
        else:
            keep = None if rounded is None else rounded.write
            load = _load_quantized if _has_own_codes(checked, weights) else _load_stock
            model = kept or load(checked, weights, report, keep)
    except ModelLoadError:
        raise
    except ImportError as error:
        reason = _missing_package(checked, first_line(error).rstrip("."))
        raise ModelLoadError(f"The model in {directory} cannot be loaded: {reason}.") from error
    except Exception as error:  # malformed files can raise anything
        raise ModelLoadError(
            f"The model in {directory} cannot be loaded ({type(error).__name__}: {first_line(error).rstrip('.')})."
        ) from error
    if "disk" in {str(device) for device in getattr(model, "hf_device_map", {}).values()}:
        raise ModelLoadError(
            f"The model in {directory} does not fit into the memory of this machine's devices: use a "
            "smaller model, or set QUANTIZATION to a format with fewer bits."
        )
    model.eval()
    if weights.needs_kernels and not checked.is_on_cuda:
        fused.fuse_attention(model)
    memory.trim()  # otherwise the process keeps what loading has freed
    return model


def weights_of(checked: CheckedModel, setting: str) -> Quantization:
    """Returns the format that a model's weights get with a setting of QUANTIZATION. Those that are not quantised may be
    kept for kernels, too. Raises ModelLoadError for a format that this device cannot have."""
    weights = choose_quantization(setting, checked.dtype_setting, checked.is_on_cuda, checked.directory, checked.config)
    if weights is not NONE or setting == STOCK:
        return weights
    if checked.dtype == torch.bfloat16 and kernels.has_bfloat16() and not checked.is_on_cuda:
        return BFLOAT16_KERNELS
    return HALVES if _needs_halves(checked) else NONE


def _needs_halves(checked: CheckedModel) -> bool:
    """Returns whether the model's numbers have float32 because its GPU multiplies no bfloat16, and its activations
    overflow in float16."""
    is_plain = weight_files.scheme_of(checked.config) is None and checked.dtype_setting != "float32"
    return checked.is_on_cuda and is_plain and checked.dtype == torch.float32


def _missing_package(checked: CheckedModel, error: str) -> str:
    """Says what the package that is missing was for, and what helps."""
    scheme = weight_files.scheme_of(checked.config)
    if scheme is None:
        return f"a package is missing ({error})"
    reason = f"the package that reads its quantized weights is not installed ({error})"
    is_read_here = files.can_read(scheme) and kernels_for(checked.is_on_cuda) is not None
    return f"{reason}; with QUANTIZATION=auto and DTYPE=auto this server reads them itself" if is_read_here else reason


def _rounded_weights(checked: CheckedModel, weights: Quantization, cache_dir: Path | None) -> RoundedWeights | None:
    """Returns where the model's rounded weights are kept; None where nothing is rounded, or the files are already."""
    is_rounded = _is_rounded(weights)
    scheme = weight_files.scheme_of(checked.config)
    if cache_dir is None or checked.is_on_cuda or not is_rounded or (scheme is not None and not files.can_read(scheme)):
        return None
    return RoundedWeights(cache_dir, checked, weights)


def _load_stock(
    checked: CheckedModel, weights: Quantization, report: Report, keep: Keep | None = None
) -> PreTrainedModel:
    """Has transformers load the model. Weights to be packed are packed one by one as they are read; those of files that
    are quantized already, once all are there."""
    directory, config, dtype = checked.directory, checked.config, checked.dtype
    is_quantized = weight_files.scheme_of(config) is not None
    is_packed, form = weights.packed_bits and not is_quantized, _form(checked, weights)
    packing = PackingConfig(lambda model: Packer(model, weights, form)) if is_packed else None
    options: dict[str, Any] = {} if packing is None else {"quantization_config": packing}
    if weights.bitsandbytes:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # silences a warning on every matrix product
        options["quantization_config"] = BitsAndBytesConfig(
            **weights.bitsandbytes, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=_layers_to_keep(config)
        )
    with _weights_progress(report, "loading weights" if packing is None else "quantizing weights"):
        result = auto_class(config).from_pretrained(
            directory,
            config=config,
            dtype=dtype,
            device_map=checked.device_map if packing is None or checked.is_on_cuda else "cpu",
            attn_implementation=_attention_names(config),
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    model, loaded = cast(tuple[PreTrainedModel, dict[str, Any]], result)
    if packing is not None:
        cast(Any, model).hf_quantizer.remove_quantization_config(model)
    _check_loaded(checked, loaded)
    if is_quantized and all(p.is_floating_point() and p.dtype.itemsize > 1 for p in model.parameters()):
        _make_alike(model, dtype)
    model.eval()
    with torch.inference_mode():
        if packing is not None and packing.packer is not None:
            packing.packer.finish(model, keep)
        elif weights.packed_bits:
            pack_model(model, weights, keep, form)
    return model


def _load_blocks(checked: CheckedModel) -> PreTrainedModel:
    """Loads what was converted from a GGUF file, with the file's own blocks."""
    directory, config, dtype, names = checked.directory, checked.config, checked.dtype, _attention_names(checked.config)
    if not checked.is_on_cuda:
        return packed_checkpoint.load(directory, config, dtype, names)
    from engine.gpu import packing  # which needs Triton

    return packing.load(directory, config, dtype, names, checked.device_map)


def _form(checked: CheckedModel, weights: Quantization) -> PackedForm | None:
    """Returns how the model's device stores packed weights; None for a CPU."""
    if not checked.is_on_cuda or weights.packed_bits is None:
        return None
    if weights is HALVES:
        from engine.gpu.half_layers import HALF_FORM

        return HALF_FORM
    from engine.gpu.packing import GPU_FORM  # which needs Triton

    return GPU_FORM


def _load_quantized(
    checked: CheckedModel, weights: Quantization, report: Report, keep: Keep | None = None
) -> PreTrainedModel:
    """Has transformers load a quantised checkpoint, whose weights come with their own codes; see engine/quantized.
    Experts that are not alike are rounded where QUANTIZATION asks for that."""
    scheme = weight_files.scheme_of(checked.config)
    try:
        return _load_codes(checked, weights, report, keep, files.QuantizedFiles(checked.directory, scheme))
    except files.MixedExperts as error:
        if weights.keeps_codes:
            raise ModelLoadError(f"The model in {checked.directory} cannot be loaded. {error}") from error
    return _load_codes(checked, weights, report, keep, files.QuantizedFiles(checked.directory, scheme, True))


def _load_codes(
    checked: CheckedModel, weights: Quantization, report: Report, keep: Keep | None, stored: files.QuantizedFiles
) -> PreTrainedModel:
    directory, config = checked.directory, files.plain_config(checked.config)
    form = _form(checked, weights)
    packing = PackingConfig(lambda model: Packer(model, weights, form), stored.element_size)
    model_class = cast(Any, auto_class(config)._model_mapping[type(config)])
    has_generation = (directory / "generation_config.json").exists()
    with _weights_progress(report, "quantizing weights"), ExitStack() as stack:
        try:
            result = model_class.from_pretrained(
                None,
                config=config,
                state_dict=stored.state_dict(stack),
                generation_config=GenerationConfig.from_pretrained(directory) if has_generation else None,
                dtype=checked.dtype,
                device_map=checked.device_map if form is not None else "cpu",
                attn_implementation=_attention_names(config),
                output_loading_info=True,
                quantization_config=packing,
            )
        except Exception as error:
            failure = packing.failure or stored.failure or (error if isinstance(error, ModelLoadError) else None)
            if failure is None:
                raise
            if isinstance(failure, files.MixedExperts):
                raise failure from error
            raise ModelLoadError(f"The model in {directory} cannot be loaded. {failure}") from error
    model, loaded = cast(tuple[PreTrainedModel, dict[str, Any]], result)
    cast(Any, model).hf_quantizer.remove_quantization_config(model)
    _check_loaded(checked, loaded)
    model.eval()
    assert packing.packer is not None
    with torch.inference_mode():
        packing.packer.finish(model, keep)
    return model


def _has_own_codes(checked: CheckedModel, weights: Quantization) -> bool:
    """Returns whether this server reads the checkpoint's codes itself."""
    return _is_rounded(weights) and files.can_read(weight_files.scheme_of(checked.config))


def _is_rounded(weights: Quantization) -> bool:
    return weights.packed_bits is not None and weights not in (BFLOAT16_KERNELS, HALVES)


def _check_loaded(checked: CheckedModel, loaded: Mapping[str, Any]) -> None:
    """Raises ModelLoadError for tensors that the files lack, or that the model does not read."""
    directory, config = checked.directory, checked.config
    if missing := sorted(loaded["missing_keys"]):  # transformers would fill them at random
        raise ModelLoadError(f"The model in {directory} lacks {weight_files.some(missing)}.")
    is_quantized = weight_files.scheme_of(config) is not None
    if unread := weight_files.check_unread(directory, loaded["unexpected_keys"], config, is_quantized):
        log.info("weights that are not read: %s", unread)


def _make_alike(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives all floating-point parameters one data type: layers that were dequantized at loading may have another."""
    names = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(kept in name for kept in names):
            parameter.data = parameter.data.to(dtype)


def _layers_to_keep(config: PreTrainedConfig) -> list[str] | None:
    """Returns the layers that bitsandbytes must not quantize: those that stay EXACT, those that see, and its own
    defaults. None if the model has none of the former, so that its defaults apply."""
    with torch.device("meta"):
        model: Any = auto_class(config).from_config(config)
    kept = (packed_layers.EXACT, packed_layers.SEEING)
    exact = [name for name, _ in model.named_modules() if any(pattern.search(name) for pattern in kept)]
    return [*get_keys_to_not_convert(model), *exact] if exact else None


def choose_quantization(
    setting: str, dtype: str, on_cuda: bool, directory: Path, config: PreTrainedConfig | None = None
) -> Quantization:
    """Returns the format that a setting of QUANTIZATION stands for on this machine; see `choose`. config: the model's,
    which says whether its files are quantised."""
    return choose(
        setting,
        dtype,
        kernels=kernels_for(on_cuda),
        has_packed_file=packed_checkpoint.exists(directory),
        has_own_codes=config is not None and files.can_read(weight_files.scheme_of(config)),
    )


def kernels_for(on_cuda: bool) -> str | None:
    """Returns of what this server has kernels, for the device that a model will run on: CPU or GPU; None: of
    neither."""
    if on_cuda:
        return GPU if find_spec("triton") is not None else None
    return CPU if kernels.are_available() else None


def _attention_names(config: PreTrainedConfig) -> str | dict[str, str]:
    """Names the engine's attention for the text layers; a vision tower keeps transformers' own."""
    parts = {name: "sdpa" for name in config.sub_configs if name != "text_config"}
    return {**parts, "text_config": paged.NAME, "": "sdpa"} if "text_config" in config.sub_configs else paged.NAME


def _check_memory(checked: CheckedModel, weights: Quantization) -> None:
    """Raises ModelLoadError if the weights need more memory than is free.

    The configuration counts too, not the files alone: loading makes room for the model that it describes before the
    two are compared.
    """
    scheme = weight_files.scheme_of(checked.config)
    needed = max(checked.num_elements * checked.dtype.itemsize, _num_bytes(checked.config, checked.dtype, NONE))
    if scheme is not None and weight_files.method_of(scheme) == "mxfp4":  # a byte of gpt-oss becomes two numbers
        needed = _num_bytes(files.plain_config(checked.config), checked.dtype, NONE)
    if weights.packed_bits and scheme is None:
        needed = _num_bytes(checked.config, checked.dtype, weights)
    elif _has_own_codes(checked, weights):
        stored = files.QuantizedFiles(checked.directory, scheme)
        saved = stored.num_saved_bytes() if weights.packed_bits == 8 else 0
        needed = _num_bytes(files.plain_config(checked.config), checked.dtype, weights) - saved
    free = psutil.virtual_memory().available
    if needed > free:
        raise ModelLoadError(
            f"The model in {checked.directory} needs {needed / 2**30:.1f} GiB of memory, but only "
            f"{free / 2**30:.1f} GiB are free: use a smaller model, or set QUANTIZATION to a format with fewer bits."
        )


def _num_bytes(config: PreTrainedConfig, dtype: torch.dtype, weights: Quantization) -> int:
    """Returns the memory of the parameters that the configuration describes; 0 for a model whose files are
    quantized."""
    if getattr(config, "quantization_config", None) is not None:
        return 0
    with torch.device("meta"):
        model: Any = auto_class(config).from_config(config, dtype=dtype)
    return Packer(model, weights).num_bytes(model) if weights.packed_bits else model.get_memory_footprint()


@contextmanager
def _weights_progress(report: Report, phase: str) -> Iterator[None]:
    """Reports the progress that transformers' own bars show, if its version has a hook for that."""
    report(phase, 0.0)
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
                report(phase, min(1.0, bar.n / bar.total))
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
