"""Which of a model's modules go on which device, as transformers' device_map="auto" chooses, by sizes that may be those
of packed weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.integrations.accelerate import get_balanced_memory, get_max_memory, infer_auto_device_map

from errors import ModelLoadError

SHARED_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # of DEVICE_MAP; others name one device
DeviceMap = Mapping[str, Any]  # the names of modules or tensors, or beginnings of them -> their device


def device_map_of(
    model: PreTrainedModel, sizes: Mapping[str, int], setting: str, free: Mapping[Any, int] | None = None
) -> DeviceMap:
    """Returns the place of each module: the number of a GPU, or the name of another place, or what `setting` names.

    sizes: bytes of parameters, by their names; others have the model's data type. setting: DEVICE_MAP. free: bytes of
    each device, by its number; None: as transformers finds them.
    """
    if setting not in SHARED_MAPS:
        return {"": setting}
    memory, by_size = cast(Any, None if free is None else dict(free)), cast(Any, _Sizes(sizes))
    classes, kept = cast(Any, model._no_split_modules), getattr(model, "_no_placement_params", None)
    if setting == "sequential":
        memory = get_max_memory(memory)
    else:
        is_low = setting == "balanced_low_0"
        memory = get_balanced_memory(model, memory, classes, hf_quantizer=by_size, low_zero=is_low)
    places = infer_auto_device_map(model, memory, classes, hf_quantizer=by_size, no_placement_params=kept)
    return cast(DeviceMap, places)


def place_of(name: str, device_map: DeviceMap) -> Any:
    """Returns the place of a module or tensor; None where the map has none for it."""
    while name and name not in device_map:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def check_places(device_map: DeviceMap) -> None:
    """Raises ModelLoadError where some packed weights have no place on a GPU: nothing else computes with them."""
    if {"cpu", "disk"} & {str(place) for place in device_map.values()}:
        raise ModelLoadError(
            "The GPUs have too little memory for the model's weights in this format: use a smaller model, or set "
            "QUANTIZATION to a format with fewer bits."
        )


@dataclass(frozen=True)
class _Sizes:
    """Tells transformers the sizes of parameters, as its quantizers do."""

    sizes: Mapping[str, int]

    def param_element_size(self, model: PreTrainedModel, name: str, parameter: torch.Tensor) -> float:
        """Returns the bytes of one number."""
        size = self.sizes.get(name)
        return parameter.itemsize if size is None else size / parameter.numel()
