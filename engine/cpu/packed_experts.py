"""PackedExperts: the experts of a mixture with packed weights, each computed with the tokens that were sent to it.

Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538. Stock modules hold the weights of all experts in two
parameters of three dimensions. They are packed as one matrix each, whose rows are those of all experts one after the
other, and two products multiply every token with its own experts only.
"""

from collections.abc import Callable
from copy import copy
from typing import Any, cast

import torch
from torch import nn

from engine.cpu import kernels, products
from engine.cpu.activations import quantize
from engine.cpu.packed_layers import activation_name
from engine.cpu.packed_weight import GROUP, INT8, PackedWeight, round_and_pack

PARAMETERS = ("gate_up_proj", "down_proj")  # (experts, 2 * inner, columns) and (experts, columns, inner)
ROUTERS = ("gate", "router")  # names of the layer that chooses experts, beside them
TRIED_EXPERTS, TRIED_SIZE = 3, 64  # of the small copy that shows what a module computes
ROUNDING, UNROUNDED = 0.05, 1e-4  # how far 8 bits may move its result, and how far another order of sums


class PackedExperts(nn.Module):
    """Computes sum_e weight_e * down_e(activation(gate_e(x)) * up_e(x)) over the experts of each token."""

    def __init__(self, gate_up: PackedWeight, down: PackedWeight, num_experts: int, activation: str) -> None:
        super().__init__()
        self.packed = dict(zip(PARAMETERS, (gate_up, down), strict=True))
        self.num_experts, self._activation = num_experts, activation

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
        """hidden_states: (tokens, columns). top_k_index, top_k_weights: (tokens, experts of a token)."""
        gate_up, down = self.packed.values()
        experts, num_chosen = top_k_index.flatten(), top_k_index.shape[1]
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=self.num_experts)
        rows = quantize(hidden_states.index_select(0, order // num_chosen))
        both = products.matmul_experts(rows, gate_up, counts, hidden_states.dtype)
        result = products.matmul_experts(kernels.gate(both, self._activation), down, counts, torch.float32)
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        weights = top_k_weights.float().contiguous()
        return kernels.combine(result, places.view_as(top_k_index), weights, hidden_states.dtype)


def can_pack_experts(module: nn.Module) -> bool:
    """Returns whether PackedExperts computes the same as a stock module, whose parameters need no memory yet: a small
    copy of it is computed both ways."""
    return kernels.are_available() and _computes_as(module, _by_kernels, ROUNDING)


def has_usual_formula(module: nn.Module) -> bool:
    """Returns whether a stock module computes the formula of PackedExperts, as `can_pack_experts`, without these."""
    return _computes_as(module, _by_torch, UNROUNDED)


def _computes_as(module: nn.Module, compute: Callable[..., torch.Tensor], tolerance: float) -> bool:
    with torch.device("cpu"), torch.inference_mode():
        small = _small_copy(module)
        if small is None:
            return False
        chosen = torch.tensor([[0, 2], [1, 0], [2, 1], [2, 0]])
        x, weights = torch.randn(4, TRIED_SIZE, dtype=torch.float32), torch.rand(4, 2, dtype=torch.float32)
        try:
            expected = small(x, chosen, weights)
        except Exception:  # it is called in another way
            return False
        difference = compute(small, x, chosen, weights) - expected
        return bool(difference.norm() < tolerance * expected.norm())


def _small_copy(module: nn.Module) -> Any:
    """Returns a copy with a few small experts; None where the parameters have other shapes."""
    shapes: list[tuple[int, ...]] = [getattr(getattr(module, name, None), "shape", ()) for name in PARAMETERS]
    if [len(shape) for shape in shapes] != [3, 3] or activation_of(module) is None:
        return None
    columns, inner = shapes[1][1:]
    if shapes[0][1:] != (2 * inner, columns) or inner % GROUP or columns % GROUP:
        return None
    small, size = cast(Any, copy(module)), TRIED_SIZE
    small._parameters = {
        "gate_up_proj": nn.Parameter(torch.randn(TRIED_EXPERTS, size, size, dtype=torch.float32)),
        "down_proj": nn.Parameter(torch.randn(TRIED_EXPERTS, size, size // 2, dtype=torch.float32)),
    }
    small.num_experts = TRIED_EXPERTS
    return small


def _by_kernels(small: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    gate_up, down = (round_and_pack(small._parameters[name].data.flatten(0, 1), INT8) for name in PARAMETERS)
    return cast(torch.Tensor, experts_of(small, gate_up, down)(x, chosen, weights))


def _by_torch(small: Any, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    gate_up, down = (small._parameters[name].data[chosen] for name in PARAMETERS)  # (tokens, experts of a token, ...)
    gate, up = torch.einsum("tc,teic->tei", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("tei,teci,te->tc", small.act_fn(gate) * up, down, weights)


def activation_of(module: nn.Module) -> str | None:
    return activation_name(getattr(module, "act_fn", None))


def experts_of(module: nn.Module, gate_up: PackedWeight, down: PackedWeight) -> PackedExperts:
    """Returns what takes the place of a stock module."""
    activation = activation_of(module)
    assert activation is not None
    return PackedExperts(gate_up, down, cast(int, cast(Any, module).num_experts), activation)


def make_router_exact(block: nn.Module) -> None:
    """Has the router beside a mixture's experts compute in float32: rounding would choose other experts."""
    for router in filter(None, (getattr(block, name, None) for name in ROUTERS)):
        router.float()
        router.register_forward_pre_hook(lambda module, arguments: tuple(argument.float() for argument in arguments))
