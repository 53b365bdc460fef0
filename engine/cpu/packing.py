"""Packer: chooses which of a model's weights are packed, packs them one by one, and puts the packed layers in place.

A stock model of any size can be packed while it is read: its weights come one after the other, and only the packed ones
stay in memory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.cpu import kernels
from engine.cpu.packed_experts import PARAMETERS, can_pack_experts, experts_of, make_router_exact
from engine.cpu.packed_layers import EXACT, SEEING, fuse_layers, replace_layer
from engine.cpu.packed_weight import (
    BFLOAT16,
    Codes,
    Format,
    PackedWeight,
    can_pack,
    format_of,
    pack,
    pack_floats,
    round_and_pack,
)
from engine.quantization import Quantization
from errors import ModelLoadError

# Takes the packed weights, by the names of their layers or parameters, and all other tensors of the model, by their own
Keep = Callable[[dict[str, PackedWeight], dict[str, torch.Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class PackedForm:
    """How one kind of device stores packed weights, and puts layers in place that compute with them."""

    pack: Callable[[Codes], Any]
    round_and_pack: Callable[[torch.Tensor, Format], Any]
    pack_floats: Callable[[torch.Tensor], Any] | None  # None: numbers are left to the model's own layers
    install: Callable[[PreTrainedModel, Mapping[str, Any]], None]
    can_pack_experts: Callable[[nn.Module], bool]
    needs_gpu: bool = True


class Packer:
    """Packs the weights of one model, in the format that its quantization asks for."""

    def __init__(self, model: PreTrainedModel, quantization: Quantization, form: PackedForm | None = None) -> None:
        """model: its parameters need no memory yet. quantization: a format with `packed_bits`. form: that of the
        device; None: a CPU's."""
        bits, head_bits = quantization.packed_bits, quantization.packed_head_bits
        self.form = form or CPU_FORM
        self._keeps_codes, self._rounds_numbers = quantization.keeps_codes, quantization.rounds_numbers
        assert bits is not None and head_bits is not None
        self._owners = layers_to_pack(model)
        head = model.get_output_embeddings()
        self._formats = {
            name: format_of(head_bits if head in map(model.get_submodule, owners) else _bits_of(name, bits))
            for name, owners in self._owners.items()
        }
        if bits < 16:
            experts = [name for name, module in model.named_modules() if self.form.can_pack_experts(module)]
            self._formats |= {f"{name}.{part}": format_of(bits) for name in experts for part in PARAMETERS}
        self.packed: dict[str, Any] = {}  # by the names of layers, or of experts' parameters

    def format_of(self, name: str) -> Format | None:
        """Returns the format of a parameter; None if it is not packed."""
        return self._formats.get(name)

    def num_bytes(self, model: PreTrainedModel) -> int:
        """Returns the memory that all the model's weights will take, and the largest of them while it is packed: as it
        is read, and joined of what was read."""
        largest = max(p.numel() * p.itemsize for p in model.parameters())
        return 2 * largest + self.num_packed_bytes(model)

    def num_packed_bytes(self, model: PreTrainedModel) -> int:
        """Returns the memory that all the model's weights will take in the end."""
        return sum(self.sizes(model).values())

    def sizes(self, model: PreTrainedModel) -> dict[str, int]:
        """Returns the bytes that each of the model's parameters will take in the end."""
        return {
            name: int(p.numel() * (self._formats[name].bytes_per_weight if name in self._formats else p.itemsize))
            for name, p in model.named_parameters()
        }

    def pack(self, name: str, weight: torch.Tensor) -> None:
        """Packs a parameter that the packer takes."""
        with torch.inference_mode():
            self.put(name, self._packed(weight.flatten(0, -2), self._formats[name]))

    def keep(self, name: str, stored: Codes | torch.Tensor) -> None:
        """Packs a parameter of a quantised checkpoint, with its own codes if they have no more bits than asked for.

        stored: codes, or numbers in bfloat16 where the checkpoint's own codes cannot be had. Raises ModelLoadError for
        such experts, which cannot be numbers.
        """
        fmt = self._formats[name]
        if self._keeps_codes and not isinstance(stored, Codes) and name.endswith(PARAMETERS):
            raise ModelLoadError(
                "The codes of its experts have groups of columns or scales that the CPU's kernels do not have: set "
                "QUANTIZATION=int8, which rounds them again."
            )
        with torch.inference_mode():
            if not isinstance(stored, Codes):
                self.put(name, self._packed(stored, BFLOAT16 if self.is_kept_as_numbers(name, stored) else fmt))
            elif self._keeps_codes or (stored.format.bits <= fmt.bits and not stored.format.is_float):
                self.put(name, self.form.pack(stored))
            else:
                self.put(name, self.form.round_and_pack(stored.dequantize(), fmt))

    def _packed(self, weight: torch.Tensor, fmt: Format) -> Any:
        if fmt.is_quantized:
            return self.form.round_and_pack(weight, fmt)
        assert self.form.pack_floats is not None
        return self.form.pack_floats(weight)

    def is_kept_as_numbers(self, name: str, stored: Codes | torch.Tensor) -> bool:
        """Returns whether a parameter stays in bfloat16: one of a quantised checkpoint whose codes cannot be had."""
        is_format = name in self._formats and not name.endswith(PARAMETERS)
        return self._keeps_codes and is_format and not isinstance(stored, Codes)

    def packs_floats(self, dtype: torch.dtype) -> bool:
        """Returns whether numbers that are not rounded are packed, too."""
        return self.form.pack_floats is not None and dtype == torch.bfloat16 and kernels.has_bfloat16()

    @property
    def leaves_numbers(self) -> bool:
        """Whether what a quantised checkpoint has not quantised stays as it is."""
        return not self._rounds_numbers

    def leave(self, name: str) -> None:
        """Leaves a parameter to the model, as numbers."""
        self._formats.pop(name, None)

    def put(self, name: str, packed: Any) -> None:
        """Takes a parameter that is packed already."""
        for owner in self._owners.get(name, [name]):
            self.packed[owner] = packed

    def finish(self, model: PreTrainedModel, keep: Keep | None = None) -> None:
        """Puts the packed layers in their places. keep: gets the weights before that."""
        if keep is not None:
            names = {*self._formats, *(f"{name}.weight" for name in self.packed)}
            keep(self.packed, {name: t for name, t in model.state_dict().items() if name not in names})
        self.form.install(model, self.packed)


def _bits_of(name: str, bits: int) -> int:
    """Returns the bits of a parameter: parts that see are small, and suffer from fewer than 8."""
    return max(bits, 8) if SEEING.search(name) else bits


def pack_model(
    model: PreTrainedModel, quantization: Quantization, keep: Keep | None = None, form: PackedForm | None = None
) -> None:
    """Packs the weights of a model that is in memory, in place."""
    packer = Packer(model, quantization, form)
    for name, parameter in model.named_parameters():
        if packer.format_of(name):
            packer.pack(name, parameter.data)
    packer.finish(model, keep)


def install(model: PreTrainedModel, packed: Mapping[str, PackedWeight]) -> None:
    """Replaces layers and experts by packed ones, and fuses what can be fused. packed: by the names of layers, or of
    experts' parameters."""
    modules = dict(model.named_modules())
    for name, weight in packed.items():
        parent, _, parameter = name.rpartition(".")
        if name in modules:
            replace_layer(model, name, weight)
        elif parameter == PARAMETERS[0]:
            gate_up, down = (packed[f"{parent}.{part}"] for part in PARAMETERS)
            model.set_submodule(parent, experts_of(modules[parent], gate_up, down))
            make_router_exact(modules[parent.rpartition(".")[0]])
    fuse_layers(model)


CPU_FORM = PackedForm(
    pack=pack,
    round_and_pack=round_and_pack,
    pack_floats=lambda weight: pack_floats(weight.to(BFLOAT16.dtype)),
    install=install,
    can_pack_experts=can_pack_experts,
    needs_gpu=False,
)


def layers_to_pack(model: PreTrainedModel) -> dict[str, list[str]]:
    """Returns the parameters of linear layers, each with the names of the modules that have it: the layer, and the
    embedding where both are tied. Those that stay EXACT are left out."""
    names = {module: name for name, module in model.named_modules()}
    embedding, tied = cast(nn.Embedding, model.get_input_embeddings()), model.all_tied_weights_keys
    shared = f"{names[embedding]}.weight"
    result = {}
    for layer, name in names.items():
        if type(layer) is nn.Linear and can_pack(layer.in_features) and not EXACT.search(name):
            parameter = f"{name}.weight"
            is_tied = layer.weight is embedding.weight or tied.get(parameter) == shared
            result[shared if is_tied else parameter] = [name, names[embedding]] if is_tied else [name]
    return result
