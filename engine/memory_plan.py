"""MemoryPlan: which of a model's weights and layers go on which device, and the context and the sequences that the KV
cache then holds, before anything is loaded.

The model is built from its configuration on torch's meta device, where tensors have shapes and no numbers. Its modules
are placed by the function that transformers places them by, the cache is divided as the engine divides it.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from engine import weight_files
from engine.attention import paged
from engine.cache_size import (
    BLOCK_SIZES,
    GPU_RESERVE,
    INT8,
    CacheSize,
    StepSizes,
    fit_context,
    gpu_room,
    model_context,
)
from engine.checked_model import CheckedModel, auto_class
from engine.cpu import packed_checkpoint
from engine.cpu.packed_layers import SEEING
from engine.cpu.packing import Packer
from engine.engine import EngineOptions
from engine.layer_probe import probe_layers
from engine.layer_spec import LayerSpecs
from engine.model_loader import weights_of
from engine.placement import SHARED_MAPS, DeviceMap, device_map_of, place_of
from engine.quantization import FROM_FILE, NONE, QUANTIZATIONS, Quantization
from engine.quantized import files
from errors import ModelLoadError, first_line

log = logging.getLogger(__name__)
ALTERNATIVES = ("int8", "int4")  # of QUANTIZATION, those with more bits first
ONE_GPU_SHARE = 0.9  # of a single GPU's free memory that transformers gives to weights
CARD_SHARE = 0.98  # of the size that a card is sold by, in GiB, that it reports: 23.5 of 24, for example
CUDA_CONTEXT = 400 * 2**20  # bytes that CUDA and torch's kernels take before any model, about
HOST_SHARE = 0.9  # of the machine's own free memory, likewise


@dataclass(frozen=True)
class Device:
    """A GPU, real or on paper."""

    name: str  # such as cuda:0
    capacity: int  # bytes in all
    free: int  # bytes, before the model is loaded

    @classmethod
    def of_card(cls, number: int, size: float) -> "Device":
        """Returns a card that is sold as one of `size` GB, with nothing else on it."""
        capacity = int(CARD_SHARE * size * 2**30)
        return cls(f"cuda:{number}", capacity=capacity, free=capacity - CUDA_CONTEXT)


@dataclass(frozen=True)
class DeviceShare:
    """What one device has of a model. All sizes are bytes."""

    device: Device
    layers: tuple[int, ...]  # whose keys, values and states lie here
    weights: int
    vision: int  # of these, the part of the vision tower
    cache: int

    @property
    def reserve(self) -> int:
        """What is kept for activations, also those of a vision tower."""
        return int(GPU_RESERVE * self.device.capacity)

    @property
    def unused(self) -> int:
        """What nothing takes; negative where more is needed than is free."""
        return self.device.free - self.weights - self.reserve - self.cache


@dataclass(frozen=True)
class MemoryPlan:
    """What of a model goes where."""

    shares: tuple[DeviceShare, ...]
    elsewhere: int  # bytes of weights that found no place on the devices
    context: int  # tokens of the longest sequence; 0 where the model does not fit
    max_num_seqs: int  # sequences that run at once; likewise
    missing: int  # bytes that the devices lack; 0 where the model fits
    failure: str = ""  # why it does not fit
    size: CacheSize | None = None

    @property
    def fits(self) -> bool:
        return not self.failure

    @property
    def weights(self) -> int:
        """The bytes of all weights."""
        return self.elsewhere + sum(share.weights for share in self.shares)


@dataclass(frozen=True)
class PaperModel:
    """A model without its weights: the bytes that they take, and what its layers store."""

    model: PreTrainedModel  # on the meta device
    sizes: Mapping[str, int]  # bytes of parameters, by their names; others have the model's data type
    specs: LayerSpecs
    weights: Quantization

    @classmethod
    def of(
        cls, config: PreTrainedConfig, dtype: torch.dtype, weights: Quantization = NONE, directory: Path | None = None
    ) -> "PaperModel":
        """Builds the model on paper. Raises ModelLoadError for weights whose sizes cannot be known before, and what
        transformers raises.

        weights: their format. directory: of a GGUF file's own blocks, or of a quantised checkpoint, whose headers say
        their sizes.
        """
        plain = files.plain_config(config)
        model, probed = meta_model(plain, dtype), meta_model(plain, dtype)  # the probe wraps layers
        if weights.keeps_codes and directory is not None:
            sizes = _sizes_of_codes(model, directory, weight_files.scheme_of(config))
        else:
            sizes = _sizes(model, weights, directory)
        return cls(model, sizes, probe_layers(probed), weights)

    def in_format(self, weights: Quantization) -> "PaperModel":
        """Returns the same model with its weights in another format."""
        return replace(self, sizes=_sizes(self.model, weights, None), weights=weights)

    def plan(self, devices: Sequence[Device], options: EngineOptions) -> MemoryPlan:
        """Says what goes where on these devices, and whether the model fits. Raises ModelLoadError for options that no
        device can fulfil, such as a MAX_MODEL_LEN beyond the model's context."""
        places = _Places(self.model, self._device_map(devices, options.device_map))
        weights, vision = self._weights_on(places)
        specs = self._specs_on(places, devices, options)
        shares = [
            DeviceShare(device, _layers_on(specs, device), weights=weights[number], vision=vision[number], cache=0)
            for number, device in enumerate(devices)
        ]
        return _with_cache(self.model.config, specs, options, shares, elsewhere=weights[None])

    def _device_map(self, devices: Sequence[Device], setting: str) -> DeviceMap:
        """Returns the device of each module, as transformers chooses it: a number, or the name of none of them."""
        if setting not in SHARED_MAPS:
            return {"": next((i for i, device in enumerate(devices) if device.name == setting), 0)}
        free = {number: device.free for number, device in enumerate(devices)}
        logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)  # of GPUs on paper it says: not there
        if setting != "sequential" and len(devices) == 1:
            free[0] = int(ONE_GPU_SHARE * free[0])
        return device_map_of(self.model, self.sizes, setting, free)

    def _weights_on(self, places: "_Places") -> tuple[Counter[int | None], Counter[int | None]]:
        """Returns the bytes of parameters and buffers by the number of their device, and of those that see."""
        weights: Counter[int | None] = Counter()
        vision: Counter[int | None] = Counter()
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        for name, tensor in tensors:
            weights[places.of(name)] += self.sizes.get(name, tensor.nbytes)
            vision[places.of(name)] += self.sizes.get(name, tensor.nbytes) if SEEING.search(name) else 0
        return weights, vision

    def _specs_on(self, places: "_Places", devices: Sequence[Device], options: EngineOptions) -> LayerSpecs:
        """Returns what the layers store, each on its device. What is computed elsewhere is computed on the first."""
        where = {layer: torch.device(devices[number or 0].name) for layer, number in places.of_layers().items()}
        specs = self.specs.in_int8({}) if options.kv_cache_dtype == INT8 else self.specs
        attention = {layer: replace(spec, device=where[layer]) for layer, spec in specs.attention.items()}
        recurrent = {layer: replace(spec, device=where[layer]) for layer, spec in specs.recurrent.items()}
        return replace(specs, attention=attention, recurrent=recurrent)


def check_can_plan(config: PreTrainedConfig, weights: Quantization) -> None:
    """Raises ModelLoadError for a quantised checkpoint that does not keep its own codes, or whose codes have sizes that
    this server does not know."""
    scheme = weight_files.scheme_of(config)
    if scheme is not None and not (weights.keeps_codes and files.can_read(scheme)):
        raise ModelLoadError("The sizes of a quantized checkpoint's weights are unknown until they are loaded.")


def meta_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds a model whose tensors have shapes and no numbers, and which attends through this engine. The configuration
    stays as it is."""
    with torch.device("meta"):
        model = cast(PreTrainedModel, auto_class(config).from_config(deepcopy(config), dtype=dtype))
    model.set_attn_implementation({"text_config": paged.NAME} if "text_config" in config.sub_configs else paged.NAME)
    model.set_experts_implementation("batched_mm")  # others look at numbers, or take bfloat16 alone
    return model


def _sizes(model: PreTrainedModel, weights: Quantization, directory: Path | None) -> dict[str, int]:
    """Returns the bytes of parameters in a format. Raises ModelLoadError where they are not known."""
    if weights is NONE:
        return {}
    if weights is FROM_FILE and directory is not None:
        return packed_checkpoint.parameter_sizes(model, directory)
    if weights.packed_bits is None:
        raise ModelLoadError(f"The sizes of weights in {weights.description} are unknown until they are loaded.")
    return Packer(model, weights).sizes(model)


def _sizes_of_codes(model: PreTrainedModel, directory: Path, scheme: Any) -> dict[str, int]:
    """Returns the bytes of the parameters that a quantised checkpoint has codes of."""
    stored = files.QuantizedFiles(directory, scheme)
    known = ((name, parameter.numel(), stored.element_size(name)) for name, parameter in model.named_parameters())
    return {name: int(count * size) for name, count, size in known if size is not None}


@dataclass(frozen=True)
class _Places:
    """Where each part of a model is: the number of its device, or None for no device."""

    model: PreTrainedModel
    device_map: DeviceMap

    def of(self, name: str) -> int | None:
        """Returns the place of a module or tensor."""
        place = place_of(name, self.device_map)
        return place if isinstance(place, int) else None

    def of_layers(self) -> dict[int, int | None]:
        """Returns the place of each text layer, by its number."""
        modules = ((name, getattr(module, "layer_idx", None)) for name, module in self.model.named_modules())
        return {i: self.of(name) for name, i in modules if isinstance(i, int) and not SEEING.search(f"{name}.")}


def _layers_on(specs: LayerSpecs, device: Device) -> tuple[int, ...]:
    places = {i: spec.device for i, spec in specs.recurrent.items()}
    places |= {i: spec.device for i, spec in specs.attention.items()}
    return tuple(sorted(layer for layer, place in places.items() if place == torch.device(device.name)))


def _with_cache(
    config: PreTrainedConfig,
    specs: LayerSpecs,
    options: EngineOptions,
    shares: Sequence[DeviceShare],
    elsewhere: int,
) -> MemoryPlan:
    """Plans the cache in what the weights leave."""
    steps = StepSizes.choose(config, options, "cuda")
    context = model_context(config, options.max_model_len)
    block_size = options.kv_block_size or BLOCK_SIZES[0]
    free = {torch.device(s.device.name): s.device.free - s.weights for s in shares if s.layers}
    rooms = {
        torch.device(s.device.name): gpu_room(s.device.free - s.weights, s.device.capacity) for s in shares if s.layers
    }
    try:
        if elsewhere:
            raise ModelLoadError(f"{elsewhere / 2**30:.1f} GiB of its weights do not fit on the devices.")
        size = CacheSize.fit(specs, options, steps=steps, block_size=block_size, context=context, rooms=rooms)
        taken, longest = size.num_bytes(specs), fit_context(context, size, options)
        if any(taken[device] > free[device] for device in taken):
            raise ModelLoadError(f"KV_CACHE_MEMORY={options.kv_cache_memory} is more than the weights leave.")
    except ModelLoadError as error:
        least = _least_cache(specs, options, block_size)
        lacking = elsewhere + sum(max(0, -share.unused) for share in shares)
        missing = max(lacking, least + elsewhere - sum(share.unused for share in shares), 1)
        return MemoryPlan(tuple(shares), elsewhere, context=0, max_num_seqs=0, missing=missing, failure=str(error))
    return MemoryPlan(
        tuple(replace(share, cache=taken[torch.device(share.device.name)]) for share in shares),
        elsewhere,
        context=longest,
        max_num_seqs=size.max_num_seqs,
        missing=0,
        size=size,
    )


def _least_cache(specs: LayerSpecs, options: EngineOptions, block_size: int) -> int:
    """Returns the bytes of the smallest cache that the options allow, about."""
    tokens = options.max_model_len or 2 * block_size
    return options.kv_cache_memory or tokens * specs.bytes_per_token + specs.bytes_per_sequence


# --- before loading


def check_devices(checked: CheckedModel, options: EngineOptions) -> None:
    """Raises ModelLoadError for a model that this machine's GPUs have no memory for. Where that is not certain, loading
    goes on."""
    if not checked.is_on_cuda:
        return
    try:
        weights = weights_of(checked, options.quantization)
        check_can_plan(checked.config, weights)
        paper = PaperModel.of(checked.config, checked.dtype, weights, checked.directory)
        reason = refusal(paper, _gpus(), options, int(HOST_SHARE * psutil.virtual_memory().available))
    except Exception as error:  # a model that cannot be built on paper may still be loaded
        log.info("its memory is not planned (%s: %s)", type(error).__name__, first_line(error))
        return
    if reason:
        raise ModelLoadError(f"The model in {checked.directory} does not fit: {reason}")


def _gpus() -> list[Device]:
    return [_gpu(number) for number in range(torch.cuda.device_count())]


def _gpu(number: int) -> Device:
    """Returns a GPU of this machine. What torch keeps of models that are gone is free, too."""
    free, capacity = torch.cuda.mem_get_info(number)
    kept = torch.cuda.memory_reserved(number) - torch.cuda.memory_allocated(number)
    return Device(f"cuda:{number}", capacity=capacity, free=free + kept)


def refusal(paper: PaperModel, devices: Sequence[Device], options: EngineOptions, host: int) -> str:
    """Returns why a model cannot be loaded on these devices; empty where it can, or may.

    host: bytes of the machine's own memory, where transformers puts weights for which the devices have no place.
    """
    plan = paper.plan(devices, options)
    if plan.fits:
        log.info("planned: %s", "; ".join(f"{s.device.name} has {_gib(s.weights)} of weights" for s in plan.shares))
    elif 0 < plan.elsewhere <= host and not paper.weights.needs_kernels:  # which works, slowly
        log.warning(
            "%s of the weights stay in this machine's own memory: %s",
            _gib(plan.elsewhere),
            advice(paper, devices, options),
        )
    else:
        return f"{explain(plan, paper)} {advice(paper, devices, options)}"
    return ""


def explain(plan: MemoryPlan, paper: PaperModel) -> str:
    """Says in a sentence or two what is needed, and what the devices have."""
    reserve = sum(share.reserve for share in plan.shares)
    free = ", ".join(f"{share.device.name} {_gib(share.device.free)}" for share in plan.shares)
    return (
        f"{_gib(plan.weights)} of weights ({paper.weights.description}) and {_gib(reserve)} for activations are "
        f"needed, and memory for a KV cache; free are {free}. {_gib(plan.missing)} are missing. {plan.failure}"
    )


def advice(paper: PaperModel, devices: Sequence[Device], options: EngineOptions) -> str:
    """Says what to do where a model does not fit: a shorter context, or another format of its weights."""
    choices = []
    if options.max_model_len is not None:
        shorter = paper.plan(devices, replace(options, max_model_len=None))
        choices += [f"set MAX_MODEL_LEN={shorter.context}"] if shorter.fits else []
    choices += [f"set QUANTIZATION={name}" for name in ALTERNATIVES if _would_fit(name, paper, devices, options)]
    return f"To make it fit, {' or '.join(choices)}." if choices else "Use a smaller model."


def _would_fit(name: str, paper: PaperModel, devices: Sequence[Device], options: EngineOptions) -> bool:
    if name == paper.weights.name:
        return False
    return paper.in_format(QUANTIZATIONS[name]).plan(devices, options).fits


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
