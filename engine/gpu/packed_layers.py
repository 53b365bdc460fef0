"""Linear layers and embeddings that compute with packed weights on a GPU.

Inputs are not rounded, unlike on a CPU: a layer computes what the stock one would with the dequantised weight.
"""

from contextlib import nullcontext

import torch
from torch import nn

from engine.gpu import products, timing
from engine.gpu.half_layers import in_halves, multiplies_halves
from engine.gpu.packed_weight import GPUWeight
from engine.gpu.product_limits import Measure, measure, multiply


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
        return self._multiply(rows).view(*x.shape[:-1], self.out_features)

    def _multiply(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.dtype != torch.float32 or not multiplies_halves(rows.device):
            return multiply(rows, self.packed, self.bias)
        output = in_halves(rows, lambda halves: multiply(halves, self.packed))
        return output if self.bias is None else output + self.bias


class PackedEmbedding(nn.Module):
    """Looks rows of a packed weight up, and multiplies them by the scale that some families give their embeddings."""

    def __init__(self, packed: GPUWeight, scale: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.dtype = packed, dtype
        # where the rows are: a copy from the CPU cannot be recorded in a CUDA graph
        self.scale = None if scale is None else scale.to(packed.quants.device, dtype)
        self.num_embeddings = packed.num_rows

    @property
    def weight(self) -> torch.Tensor:
        """As PackedLinear's."""
        return torch.empty(0, dtype=self.dtype, device=self.packed.quants.device)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        ids = token_ids.to(self.packed.quants.device)
        rows = products.dequantised(self.packed, self.dtype, ids.flatten()).view(*ids.shape, -1)
        return rows if self.scale is None else rows * self.scale


def measure_products(model: nn.Module, seconds: Measure = timing.seconds) -> None:
    """Finds the fastest way to multiply with a GPU model's packed weights; see product_limits.py. Raises
    ModelLoadError where none is right.

    seconds: measures a call on the current device.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    for device in {layer.packed.quants.device for layer in layers}:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            own = [layer for layer in layers if layer.packed.quants.device == device]
            dtype = torch.float16 if multiplies_halves(device) else own[0].dtype
            measure((layer.packed for layer in own), dtype, seconds)
