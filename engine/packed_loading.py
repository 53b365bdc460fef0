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

from engine.cpu.packing import Packer

METHOD = "packed-while-loading"


@register_quantization_config(METHOD)
class PackingConfig(QuantizationConfigMixin):
    """Says that weights are packed, and holds the packer once the model's structure is known."""

    def __init__(self, make_packer: Callable[[PreTrainedModel], Packer]) -> None:
        super().__init__(quant_method=cast(Any, METHOD))
        self.make_packer = make_packer
        self.packer: Packer | None = None

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
        return self._config.packer is not None and self._config.packer.format_of(param_name) is not None

    def get_quantize_ops(self) -> "Pack":
        assert self._config.packer is not None
        return Pack(self._config.packer)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        return False


class Pack(ConversionOps):
    """Packs a parameter; an empty one stays in the model until the packed layer takes its place."""

    def __init__(self, packer: Packer) -> None:
        self._packer = packer

    def convert(self, input_dict: dict[str, Any], *others: Any, **more: Any) -> dict[str, Any]:
        result = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            self._packer.pack(name, weight)
            result[name] = torch.empty(0, dtype=weight.dtype)
        return result
