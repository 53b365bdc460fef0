"""Packer: chooses which of a model's weights are packed, packs them one by one, and puts the packed layers in place.

A stock model of any size can be packed while it is read: its weights come one after the other, and only the packed ones
stay in memory.
"""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.cpu.packed_experts import PARAMETERS, can_pack_experts, experts_of
from engine.cpu.packed_layers import EXACT, SEEING, fuse_layers, replace_layer
from engine.cpu.packed_weight import (
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
ROUTERS = ("gate", "router")  # names of the layer that chooses experts, beside them


class Packer:
    """Packs the weights of one model, in the format that its quantization asks for."""

    def __init__(self, model: PreTrainedModel, quantization: Quantization) -> None:
        """model: its parameters need no memory yet. quantization: a format with `packed_bits`."""
        bits, head_bits = quantization.packed_bits, quantization.packed_head_bits
        self._keeps_codes = quantization.keeps_codes
        assert bits is not None and head_bits is not None
        self._owners = layers_to_pack(model)
        head = model.get_output_embeddings()
        self._formats = {
            name: format_of(head_bits if head in map(model.get_submodule, owners) else _bits_of(name, bits))
            for name, owners in self._owners.items()
        }
        if bits < 16:
            experts = [name for name, module in model.named_modules() if can_pack_experts(module)]
            self._formats |= {f"{name}.{part}": format_of(bits) for name in experts for part in PARAMETERS}
        self.packed: dict[str, PackedWeight] = {}  # by the names of layers, or of experts' parameters

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
            fmt = self._formats[name]
            self.put(name, _pack(weight.flatten(0, -2), fmt))

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
                is_kept = self.is_kept_as_numbers(name, stored)
                self.put(name, pack_floats(stored) if is_kept else round_and_pack(stored, fmt))
            elif self._keeps_codes or (stored.format.bits <= fmt.bits and not stored.format.is_float):
                self.put(name, pack(stored))
            else:
                self.put(name, round_and_pack(stored.dequantize(), fmt))

    def is_kept_as_numbers(self, name: str, stored: Codes | torch.Tensor) -> bool:
        """Returns whether a parameter stays in bfloat16: one of a quantised checkpoint whose codes cannot be had."""
        is_format = name in self._formats and not name.endswith(PARAMETERS)
        return self._keeps_codes and is_format and not isinstance(stored, Codes)

    def leave(self, name: str) -> None:
        """Leaves a parameter to the model, as numbers."""
        del self._formats[name]

    def put(self, name: str, packed: PackedWeight) -> None:
        """Takes a parameter that is packed already."""
        for owner in self._owners.get(name, [name]):
            self.packed[owner] = packed

    def finish(self, model: PreTrainedModel, keep: Keep | None = None) -> None:
        """Puts the packed layers in their places. keep: gets the weights before that."""
        if keep is not None:
            names = {*self._formats, *(f"{name}.weight" for name in self.packed)}
            keep(self.packed, {name: t for name, t in model.state_dict().items() if name not in names})
        install(model, self.packed)


def _bits_of(name: str, bits: int) -> int:
    """Returns the bits of a parameter: parts that see are small, and suffer from fewer than 8."""
    return max(bits, 8) if SEEING.search(name) else bits


def pack_model(model: PreTrainedModel, quantization: Quantization, keep: Keep | None = None) -> None:
    """Packs the weights of a model that is in memory, in place."""
    packer = Packer(model, quantization)
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
            _make_router_exact(modules[parent.rpartition(".")[0]])
    fuse_layers(model)


def _make_router_exact(block: nn.Module) -> None:
    """Has the router beside a mixture's experts compute in float32: rounding would choose other experts."""
    for router in filter(None, (getattr(block, name, None) for name in ROUTERS)):
        router.float()
        router.register_forward_pre_hook(lambda module, arguments: tuple(argument.float() for argument in arguments))


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


def _pack(weight: torch.Tensor, fmt: Format) -> PackedWeight:
    return round_and_pack(weight, fmt) if fmt.is_quantized else pack_floats(weight.to(fmt.dtype))
