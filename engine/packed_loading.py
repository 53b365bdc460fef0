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

from engine.cpu import kernels
from engine.cpu.packing import Packer
from engine.quantized import records
from errors import ModelLoadError

METHOD = "packed-while-loading"


@register_quantization_config(METHOD)
class PackingConfig(QuantizationConfigMixin):
    """Says that weights are packed, and holds the packer once the model's structure is known."""

    def __init__(self, make_packer: Callable[[PreTrainedModel], Packer], has_records: bool = False) -> None:
        """has_records: whether the weights may be records of a quantised checkpoint; see quantized/records.py."""
        super().__init__(quant_method=cast(Any, METHOD))
        self.make_packer, self.has_records = make_packer, has_records
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

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **others: Any) -> bool:
        packer = self._config.packer
        if packer is None:
            return False
        return packer.format_of(param_name) is not None or (self._config.has_records and _is_matrix(model, param_name))

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
        if not self._config.has_records:
            packer.pack(name, weight)
            return torch.empty(0, dtype=weight.dtype)
        is_record = weight.dtype == torch.uint8
        stored = records.read(weight.flatten(0, -2)) if is_record else weight
        shape = (*weight.shape[:-1], records.num_columns(stored))
        if shape != own.shape:
            raise ModelLoadError(f"The files have {shape}, but config.json says {tuple(own.shape)}.")
        if is_record and packer.is_kept_as_numbers(name, stored) and not _multiplies_bfloat16(own.dtype):
            packer.leave(name)
        if packer.format_of(name) is None:
            return records.numbers(stored).view(shape).to(own.dtype)
        if is_record:
            packer.keep(name, stored)
        else:
            packer.pack(name, weight)
        return torch.empty(0, dtype=own.dtype)


def _multiplies_bfloat16(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and kernels.has_bfloat16()
