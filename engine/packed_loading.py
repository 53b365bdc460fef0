"""PackingQuantizer: has transformers hand over each weight as it is read, so that only its packed form stays in memory.

It is a quantizer of transformers, which calls it for every parameter while a checkpoint is loaded:
https://huggingface.co/docs/transformers/quantization/contribute.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from engine.cpu.packed_weight import Codes
from engine.cpu.packing import Packer
from engine.placement import check_places
from engine.quantized import records
from errors import ModelLoadError

METHOD = "packed-while-loading"
RecordSize = Callable[[str], float | None]


@register_quantization_config(METHOD)
class PackingConfig(QuantizationConfigMixin):
    """Says that weights are packed, and holds the packer once the model's structure is known."""

    def __init__(self, make_packer: Callable[[PreTrainedModel], Packer], record_size: RecordSize | None = None) -> None:
        """record_size: set for a quantised checkpoint, whose weights may be records; see quantized/records.py. Gives
        the bytes of a number of a parameter in its own codes, by its name; None where it has none."""
        super().__init__(quant_method=cast(Any, METHOD))
        self.make_packer, self.record_size = make_packer, record_size
        self.packer: Packer | None = None
        self.failure: ModelLoadError | None = None  # transformers says no more than that something failed

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


@register_quantizer(METHOD)
class PackingQuantizer(HfQuantizer):
    def __init__(self, quantization_config: PackingConfig, **others: Any) -> None:
        super().__init__(quantization_config, **others)
        self._config = quantization_config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **others: Any) -> None:
        self._config.packer = self._config.make_packer(model)

    def validate_environment(self, *others: Any, device_map: Any = None, **more: Any) -> None:
        """Raises ModelLoadError for a device map that has packed weights where no kernels are."""
        packer = self._config.packer
        if isinstance(device_map, dict) and packer is not None and packer.form.needs_gpu:
            check_places(device_map)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **others: Any) -> bool:
        packer, may_be_record = self._config.packer, self._config.record_size is not None
        if packer is None:
            return False
        return packer.format_of(param_name) is not None or (may_be_record and _is_matrix(model, param_name))

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: torch.Tensor) -> float:
        """Returns the bytes of one number, by which transformers chooses a parameter's device."""
        packer, record_size = self._config.packer, self._config.record_size
        stored = None if record_size is None else record_size(param_name)
        fmt = None if packer is None or packer.leaves_numbers else packer.format_of(param_name)
        return stored or float(param.element_size() if fmt is None else fmt.bytes_per_weight)

    def get_quantize_ops(self) -> "Pack":
        return Pack(self._config)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False


def _is_matrix(model: PreTrainedModel, name: str) -> bool:
    module, _, parameter = name.rpartition(".")
    own: torch.Tensor = getattr(model.get_submodule(module), parameter)
    return own.ndim >= 2


class Pack(ConversionOps):
    """Packs a parameter; an empty one stays in the model until the packed layer takes its place."""

    def __init__(self, config: PackingConfig) -> None:
        self._config = config

    def convert(self, input_dict: dict[str, Any], *others: Any, **more: Any) -> dict[str, Any]:
        result = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            try:
                result[name] = self._pack(name, weight, more["model"])
            except ModelLoadError as error:
                self._config.failure = ModelLoadError(f"{name}: {error}")
                raise
        return result

    def _pack(self, name: str, weight: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
        """Returns what the model keeps of a parameter. weight: its numbers, or records."""
        packer, own = self._config.packer, cast(torch.Tensor, model.get_parameter_or_buffer(name))
        assert packer is not None
        if self._config.record_size is None:
            packer.pack(name, weight)
            return torch.empty(0, dtype=weight.dtype)
        is_record = weight.dtype == torch.uint8
        stored = records.read(weight.flatten(0, -2)) if is_record else weight
        shape = (*weight.shape[:-1], records.num_columns(stored))
        if shape != own.shape:
            raise ModelLoadError(f"The files have {shape}, but config.json says {tuple(own.shape)}.")
        is_left = is_record and packer.is_kept_as_numbers(name, stored) and not packer.packs_floats(own.dtype)
        if is_left or (packer.leaves_numbers and not isinstance(stored, Codes)):
            packer.leave(name)
        if packer.format_of(name) is None:
            return records.numbers(stored).view(shape).to(own.dtype)
        if is_record:
            packer.keep(name, stored)
        else:
            packer.pack(name, weight)
        return torch.empty(0, dtype=own.dtype)
