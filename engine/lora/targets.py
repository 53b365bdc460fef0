"""Targets: the linear layers of a model that adapters can change, and the places where their updates are added.

A module that stands for several layers says itself which these are, by a method `adapter_targets`. All others are found
as linear layers, and get a hook.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.lora.adapter import Shape, layer_name
from engine.lora.updates import ActiveAdapters, LowRankUpdates, Target, single
from engine.recurrent.layers import RecurrentLayer

_REPLACED = ("_stock", "stock")  # what replaced modules are called in those that replaced them
_OTHER = re.compile(  # layers that see or hear, and parts of modules that answer for them
    r"(^|\.)(vision|visual|image|embed_vision|audio|multi_modal)\w*\.|(^|\.)_(?!stock\b)|\.in_proj_qkvz\.layer$"
)


def find_targets(model: PreTrainedModel) -> list[Target]:
    """Returns all that adapters can change in the model's text layers. The output layer is not among it."""
    head, found = model.get_output_embeddings(), list[Target]()
    for name, module in model.named_modules():
        if module is not head and not _OTHER.search(name):
            found += _targets(_plain_name(name), module)
    return found


def shapes_of(targets: list[Target]) -> dict[str, Shape]:
    """Returns the size of each layer, by its name."""
    return {name: shape for target in targets for name, shape in target.shapes.items()}


def attach(model: nn.Module, targets: list[Target], active: ActiveAdapters) -> None:
    """Has the model's layers apply the adapters of each step."""
    for target in targets:
        target.attach(LowRankUpdates(active, target.parts))
    layers: list[Any] = [module for module in model.modules() if isinstance(module, RecurrentLayer)]
    for layer in layers:
        layer.step_adapters = active  # it computes the tokens of a step in an order of its own


def _plain_name(name: str) -> str:
    """Returns the name that a module has in the stock model."""
    return layer_name(".".join(part for part in name.split(".") if part not in _REPLACED))


def _targets(name: str, module: Any) -> list[Target]:
    if hasattr(module, "adapter_targets"):
        found: list[Target] = module.adapter_targets(name)
        return found
    columns, rows = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(columns, int) and isinstance(rows, int) and hasattr(module, "weight"):
        return [single(name, Shape(rows, columns), partial(_add_hook, module))]
    return []


def _add_hook(layer: nn.Module, updates: LowRankUpdates) -> None:
    def hook(layer: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        updates.add(arguments[0], [output])

    layer.register_forward_hook(hook)
