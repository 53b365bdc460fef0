"""Products in float16 between numbers of float32, on GPUs that multiply no bfloat16 (before compute capability 8.0),
for models whose activations float16 does not hold, such as Gemma's.

Each row of the inputs is divided by its largest number before, and the result multiplied by it, so neither overflows.
The tensor cores add up in float32.
"""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import nn
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

from engine.cpu.packing import PackedForm
from engine.gpu import packed_weight

AMPERE = (8, 0)  # the first compute capability with products of bfloat16
SMALLEST = 1e-30  # that a row is divided by: one of zeros stays one


def multiplies_halves(device: torch.device) -> bool:
    """Returns whether products of float32 are computed in float16 on a device, as packed layers do on older GPUs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < AMPERE


def in_halves(x: torch.Tensor, multiply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Computes a product. x: (..., columns). multiply: takes and gives float16. Returns float32."""
    x = x.float()  # a module may hand over what it converts to its weight's type
    largest = x.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    return multiply((x / largest).half()).float() * largest


class HalfLinear(nn.Module):
    """Computes y = x W^T + b with a weight in float16, and all else in float32."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = in_halves(x.to(self.weight.device), lambda rows: linear(rows, self.weight))
        return output if self.bias is None else output + self.bias


class HalfEmbedding(nn.Module):
    """Looks rows of float16 up, in float32, and multiplies them by the scale that some families give them."""

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(weight, requires_grad=False), scale
        self.num_embeddings = len(weight)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        rows = embedding(token_ids.to(self.weight.device), self.weight).float()
        return rows if self.scale is None else rows * self.scale.to(rows)


def install(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """Replaces layers by those with weights in float16. weights: by the names of layers; tied ones are the same."""
    modules = dict(model.named_modules())
    for name, weight in weights.items():
        layer = modules[name]
        if isinstance(layer, nn.Embedding):
            scale = cast(torch.Tensor | None, getattr(layer, "embed_scale", None))
            model.set_submodule(name, HalfEmbedding(weight, scale))
        else:
            bias = cast(torch.Tensor | None, layer.bias)
            model.set_submodule(name, HalfLinear(weight, None if bias is None else bias.data))


HALF_FORM = PackedForm(
    pack=packed_weight.pack,  # of no use here: nothing is quantised
    round_and_pack=packed_weight.round_and_pack,
    pack_floats=lambda weight: weight.half(),
    install=install,
    can_pack_experts=lambda module: False,
)
