"""PackedExperts: the experts of a mixture with packed weights on a GPU; see engine/cpu/packed_experts.py."""

import torch
from torch import nn

from engine.cpu.packed_experts import PARAMETERS
from engine.gpu import products
from engine.gpu.layer_kernels import activate
from engine.gpu.packed_weight import GPUWeight


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
