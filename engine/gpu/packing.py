"""GPU_FORM: how GPUs store packed weights; and the loading of what was converted from a GGUF file on GPUs.

The blocks of the file are kept as they are. On their device they change from the order of the CPU's kernels, which the
converted file has, into that of the GPU's, some rows at a time.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import dispatch_model, init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from engine.cpu import packed_checkpoint
from engine.cpu.jit import LANES
from engine.cpu.packed_experts import PARAMETERS, activation_of, has_usual_formula, make_router_exact
from engine.cpu.packed_weight import PART, PackedWeight
from engine.cpu.packing import PackedForm
from engine.gpu import packed_weight
from engine.gpu.packed_experts import PackedExperts
from engine.gpu.packed_layers import PackedEmbedding, PackedLinear
from engine.gpu.packed_weight import GPUWeight
from engine.placement import SHARED_MAPS, DeviceMap, check_places, device_map_of, place_of


def install(model: PreTrainedModel, packed: Mapping[str, GPUWeight]) -> None:
    """Replaces layers and experts by packed ones. packed: by the names of layers, or of experts' parameters."""
    modules = dict(model.named_modules())
    for name, weight in packed.items():
        parent, _, parameter = name.rpartition(".")
        if name in modules:
            model.set_submodule(name, _packed(modules[name], weight))
        elif parameter == PARAMETERS[0]:
            stock, down = modules[parent], packed[f"{parent}.{PARAMETERS[1]}"]
            activation, num_experts = cast(str, activation_of(stock)), cast(int, stock.num_experts)
            dtype = stock.get_parameter(parameter).dtype
            model.set_submodule(parent, PackedExperts(weight, down, num_experts, activation, dtype))
            make_router_exact(modules[parent.rpartition(".")[0]])


def _packed(layer: nn.Module, weight: GPUWeight) -> nn.Module:
    dtype = cast(torch.Tensor, layer.weight).dtype
    if isinstance(layer, nn.Embedding):
        return PackedEmbedding(weight, cast(torch.Tensor | None, getattr(layer, "embed_scale", None)), dtype)
    bias = cast(torch.Tensor | None, layer.bias)
    return PackedLinear(weight, None if bias is None else bias.data, dtype)


GPU_FORM = PackedForm(
    pack=packed_weight.pack,
    round_and_pack=packed_weight.round_and_pack,
    pack_floats=None,
    install=install,
    can_pack_experts=has_usual_formula,
)


def load(
    directory: Path, config: PreTrainedConfig, dtype: torch.dtype, attention: Any, device_map: str
) -> PreTrainedModel:
    """Loads a model from what was converted from a GGUF file; numbers without codes get `dtype`. Raises ModelLoadError
    if the file does not fit the model."""
    path = directory / packed_checkpoint.FILE
    packed, plain = packed_checkpoint.weights(path, is_mapped=True)
    with init_empty_weights(include_buffers=False):
        model = packed_checkpoint.builder(config, dtype, attention)()
    places = device_map_of(model, packed_checkpoint.parameter_sizes(model, directory), device_map)
    if device_map in SHARED_MAPS:
        check_places(places)
    quantised = {name: weight for name, weight in packed.items() if weight.format.is_quantized}
    moved = {name: value.to(_device(name, places), dtype) for name, value in plain.items()}
    moved |= _numbers_on_devices(packed, places, dtype)
    packed_checkpoint.assign_plain(model, moved, quantised, path)
    model.tie_weights()
    install(model, _on_devices(quantised, places))
    packed_checkpoint.read_generation_config(model, directory)
    dispatch_model(model, dict(places), skip_keys=model._skip_keys_device_placement)
    return model


def _numbers_on_devices(
    packed: Mapping[str, PackedWeight], places: DeviceMap, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Returns the weights that the file has not quantised, by the names of parameters, each on its device; one at a
    time is in the host's memory, and layers that share one still do."""
    known: dict[int, torch.Tensor] = {}
    names = [name for name, weight in packed.items() if not weight.format.is_quantized]
    for name in names:
        if id(packed[name]) not in known:
            known[id(packed[name])] = packed[name].dequantize().to(_device(name, places), dtype)
    return {f"{name}.weight": known[id(packed[name])] for name in names}


def _on_devices(packed: Mapping[str, PackedWeight], places: DeviceMap) -> dict[str, GPUWeight]:
    """Returns each weight in the order of GPUs, on its device; layers that share one still do."""
    known: dict[int, GPUWeight] = {}
    for name, weight in packed.items():
        if id(weight) not in known:
            known[id(weight)] = reordered(weight, _device(name, places))
    return {name: known[id(weight)] for name, weight in packed.items()}


def reordered(weight: PackedWeight, device: torch.device, part: int = PART) -> GPUWeight:
    """Returns a quantised weight in the order of GPUs, on a device; about `part` numbers at a time."""
    step = max(1, part // (weight.num_columns * LANES))
    parts = (
        weight.tiles(tile, min(step * LANES, weight.num_rows - tile * LANES))
        for tile in range(0, len(weight.quants), step)
    )
    return packed_weight.joined([packed_weight.pack(rows.to(device).unpack()) for rows in parts])


def _device(name: str, places: DeviceMap) -> torch.device:
    return torch.device(place_of(name, places))
