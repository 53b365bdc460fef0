"""Layers that compute with packed weights on a GPU, and what puts them where a stock model has others.

Inputs are not rounded, unlike on a CPU: a layer computes what the stock one would with the dequantised weight.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.cpu.packed_experts import PARAMETERS, activation_of, make_router_exact
from engine.gpu import products
from engine.gpu.packed_weight import GPUWeight
from engine.gpu.product_limits import multiply
from engine.gpu.triton_layers import activate


class PackedLinear(nn.Module):
    """Computes y = x W^T + b with a packed weight."""

    def __init__(self, packed: GPUWeight, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.bias, self.dtype = packed, bias, dtype
        self.in_features, self.out_features = packed.num_columns, packed.num_rows

    @property
    def weight(self) -> torch.Tensor:
        """An empty tensor: some modules ask the weights of their layers for the data type and the device."""
        return torch.empty(0, dtype=self.dtype, device=self.packed.quants.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.to(self.packed.quants.device).reshape(-1, self.in_features)
        return multiply(rows, self.packed, self.bias).view(*x.shape[:-1], self.out_features)


class PackedEmbedding(nn.Module):
    """Looks rows of a packed weight up, and multiplies them by the scale that some families give their embeddings."""

    def __init__(self, packed: GPUWeight, scale: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.scale, self.dtype = packed, scale, dtype
        self.num_embeddings = packed.num_rows

    @property
    def weight(self) -> torch.Tensor:
        """As PackedLinear's."""
        return torch.empty(0, dtype=self.dtype, device=self.packed.quants.device)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        ids = token_ids.to(self.packed.quants.device)
        rows = products.dequantised(self.packed, self.dtype, ids.flatten()).view(*ids.shape, -1)
        return rows if self.scale is None else rows * self.scale.to(rows)


class PackedExperts(nn.Module):
    """Computes sum_e weight_e * down_e(activation(gate_e(x)) * up_e(x)) over the experts of each token.

    Nothing is read back from the device: tokens are sorted by their experts, and a program finds its expert itself.
    """

    def __init__(self, gate_up: GPUWeight, down: GPUWeight, num_experts: int, activation: str) -> None:
        super().__init__()
        self.packed = dict(zip(PARAMETERS, (gate_up, down), strict=True))
        self.num_experts, self._is_gelu = num_experts, activation != "silu"

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states: (tokens, columns). top_k_index, top_k_weights: (tokens, experts of a token)."""
        gate_up, down = self.packed.values()
        experts, num_chosen = top_k_index.flatten(), top_k_index.shape[1]
        order = experts.argsort(stable=True)
        starts = self._starts(experts)
        both = self._multiply(hidden_states.index_select(0, order // num_chosen), gate_up, starts)
        result = self._multiply(activate(both[None], self._is_gelu)[0], down, starts)
        weights = top_k_weights.flatten().index_select(0, order).to(torch.float32)[:, None]
        output = torch.zeros(len(order), result.shape[1], dtype=torch.float32, device=result.device)
        output.index_copy_(0, order, result.float() * weights)
        return output.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _starts(self, experts: torch.Tensor) -> torch.Tensor:
        """Returns where the rows of each expert begin, and where they end: (experts + 1,) int32."""
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int32, device=experts.device)
        counts.index_add_(0, experts + 1, torch.ones_like(experts, dtype=torch.int32))
        return counts.cumsum(0, dtype=torch.int32)

    def _multiply(self, rows: torch.Tensor, weight: GPUWeight, starts: torch.Tensor) -> torch.Tensor:
        num_rows = weight.num_rows // self.num_experts
        output = torch.empty(len(rows), num_rows, dtype=rows.dtype, device=rows.device)
        products.multiply_tiles(rows, weight, None, output, starts)
        return output


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
            model.set_submodule(parent, PackedExperts(weight, down, num_experts, activation))
            make_router_exact(modules[parent.rpartition(".")[0]])


def _packed(layer: nn.Module, weight: GPUWeight) -> nn.Module:
    dtype = cast(torch.Tensor, layer.weight).dtype
    if isinstance(layer, nn.Embedding):
        return PackedEmbedding(weight, cast(torch.Tensor | None, getattr(layer, "embed_scale", None)), dtype)
    bias = cast(torch.Tensor | None, layer.bias)
    return PackedLinear(weight, None if bias is None else bias.data, dtype)
