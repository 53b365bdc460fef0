"""PackedExperts: the experts of a mixture with packed weights on a GPU; see engine/cpu/packed_experts.py."""

import torch
from torch import nn

from engine.cpu.packed_experts import PARAMETERS
from engine.gpu import products
from engine.gpu.layer_kernels import activate
from engine.gpu.packed_weight import GPUWeight, unpack
from engine.gpu.product_limits import TOLERANCES
from errors import ModelLoadError

TRIED_ROWS = 64  # of two experts, whose products are compared
TRIED_TOKENS = (3, 20, 40)  # of each, for which different tiles are taken


class PackedExperts(nn.Module):
    """Computes sum_e weight_e * down_e(activation(gate_e(x)) * up_e(x)) over the experts of each token.

    Nothing is read back from the device: tokens are sorted by their experts, and a program finds its expert itself.
    """

    def __init__(
        self, gate_up: GPUWeight, down: GPUWeight, num_experts: int, activation: str, dtype: torch.dtype
    ) -> None:
        """dtype: of the activations."""
        super().__init__()
        self.dtype = dtype
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


def check_experts(model: nn.Module) -> None:
    """Raises ModelLoadError where the kernel gives other products of experts than torch does, for any format."""
    weights: dict[object, tuple[GPUWeight, torch.dtype]] = {}
    for experts in model.modules():
        if isinstance(experts, PackedExperts):
            weights |= {weight.kind: (weight, experts.dtype) for weight in experts.packed.values()}
    for weight, dtype in weights.values():
        if not agrees(weight, dtype):
            raise ModelLoadError(
                f"This GPU computes wrong products with experts of {weight.format.bits} bits: set QUANTIZATION=none, "
                "or update Triton and the GPU's driver."
            )


def agrees(weight: GPUWeight, dtype: torch.dtype) -> bool:
    """Returns whether products of two experts are torch's, for the numbers of tokens that take different tiles."""
    rows = weight.rows(0, TRIED_ROWS)
    numbers = unpack(rows).dequantize().chunk(2)
    for count in TRIED_TOKENS:
        counts = [count + 1, count - 1]
        starts = torch.tensor([0, count + 1, 2 * count], dtype=torch.int32, device=rows.quants.device)
        x = torch.randn(2 * count, rows.num_columns, device=starts.device, dtype=torch.float32).to(dtype)
        output = torch.empty(2 * count, TRIED_ROWS // 2, dtype=dtype, device=starts.device)
        products.multiply_tiles(x, rows, None, output, starts)
        expected = torch.cat([own.float() @ part.T for own, part in zip(x.split(counts), numbers, strict=True)])
        if not bool((output.float() - expected).norm() <= TOLERANCES[x.element_size()] * expected.norm()):
            return False
    return True
