"""FusedDeltaNet: a stock Gated DeltaNet module's work in a few kernels for the CPU, for all sequences of a step.

As in packed_layers, it is first compared with the module that it replaces; see `fused_delta_net`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from engine.cpu import delta_rule
from engine.cpu.delta_rule import DeltaShape
from engine.cpu.jit import LANES
from engine.cpu.packed_layers import PackedLinear, SharedInput, is_same, prepare
from engine.cpu.packed_weight import PackedWeight
from engine.layer_spec import RecurrentSpec, StateShape
from engine.lora.adapter import Shape
from engine.lora.updates import LowRankUpdates, Part, Target, single
from engine.recurrent.layers import LayerStates, RecurrentLayer, asks_for_state
from engine.recurrent.state_cache import Phase, StateCache, StateRun, StateStep

Projection = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # tokens -> queries, keys, values; z
TRIED = (5, 1)  # tokens of the two calls in which both are compared


class FusedDeltaNet(RecurrentLayer):
    """Computes the projections, the convolution, the gated delta rule, its norm, and the output layer."""

    def __init__(self, stock: nn.Module, layer: int, shape: DeltaShape) -> None:
        super().__init__(stock, layer)
        module: Any = stock
        self._shape = shape
        self._project, self._gate_weight = _projection(module, shape), _gate_weight(module, shape).float()
        self._conv_weight = module.conv1d.weight.data[:, 0].T.float().contiguous()
        self._constants = torch.stack([-module.A_log.data.float().exp(), module.dt_bias.data.float()])
        self._norm = (module.norm.weight.data.float(), float(module.norm.variance_epsilon))
        self.updates: LowRankUpdates | None = None  # of adapters, for all that reads the layer's input

    def adapter_targets(self, name: str) -> list[Target]:
        parts = _parts(self.stock, self._shape)
        columns = cast(int, cast(Any, self.stock).hidden_size)
        sizes = {f"{name}.{part}": Shape(_num_rows(getattr(self.stock, part)), columns) for part, _ in parts}
        found = []
        for part, rows in parts:
            whole = sizes[f"{name}.{part}"]
            shape = whole if rows is None else Shape(len(rows), columns)
            found.append(Part(f"{name}.{part}", shape, rows))
        return [Target(sizes, tuple(found), partial(setattr, self, "updates"))]

    @property
    def spec(self) -> RecurrentSpec:
        dtype = cast(torch.dtype, cast(Any, self.stock).conv1d.weight.dtype)
        width, channels = self._conv_weight.shape
        states = (
            StateShape(kind="conv", index=0, shape=(width - 1, channels), dtype=dtype),
            StateShape(kind="recurrent", index=0, shape=self._shape.state_shape, dtype=torch.float32),
        )
        return RecurrentSpec(states, channels + len(self._gate_weight), dtype, torch.device("cpu"))

    def record(self, hidden_states: torch.Tensor) -> tuple[RecurrentSpec, torch.Tensor]:
        return self.spec, super().record(hidden_states)[1]

    def compute(self, tokens: torch.Tensor, step: StateStep, cache: StateCache) -> torch.Tensor:
        inputs = cache.inputs[self._layer]
        recalled = inputs[list(step.recalled)] if step.recalled else None
        output, read = self.run(tokens, step.phases, cache.tensors[self._layer], recalled)
        for row, place in step.kept:
            inputs[place] = torch.cat([part[row] for part in read])
        return output

    def run(
        self,
        tokens: torch.Tensor,
        phases: tuple[Phase, ...],
        states: tuple[torch.Tensor, ...],
        recalled: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Returns the layer's output, (tokens, columns), and what it read of each token: the input of the convolution,
        and b and a.

        tokens: (tokens, columns). states: of all slots. recalled: what it read of the guesses before.
        """
        mixed, z = self._project(tokens)
        gates = nn.functional.linear(tokens.float(), self._gate_weight).to(tokens.dtype)  # as it is kept of guesses
        if self.updates is not None and self.updates.is_active:
            self.updates.add(tokens, [mixed, z, *gates.chunk(2, dim=-1)])
        read = mixed, gates
        if recalled is not None:
            mixed = torch.cat([mixed, recalled[:, : mixed.shape[1]]])
            gates = torch.cat([gates, recalled[:, mixed.shape[1] :]])
        convolution, recurrence = states
        output = torch.empty(len(tokens), z.shape[1], dtype=tokens.dtype)
        for phase in phases:
            delta_rule.apply_rule(
                self._shape,
                mixed=delta_rule.convolve(mixed, self._conv_weight, convolution, phase.table, phase.rows),
                gates=gates.float(),
                z=z,
                constants=self._constants,
                norm=self._norm,
                state=recurrence,
                table=phase.table,
                rows=phase.rows,
                output=output,
            )
            phase.save(states)
        return cast(torch.Tensor, cast(Any, self.stock).out_proj(output)), read


def wrap_recurrent_layers(model: nn.Module) -> None:
    """Puts a FusedDeltaNet, or else a RecurrentLayer, in the place of every stock module with recurrent state."""
    wrapped = {module.stock for module in model.modules() if isinstance(module, RecurrentLayer)}
    for name, module in list(model.named_modules()):
        if module not in wrapped and asks_for_state(module):
            layer = cast(int, module.layer_idx)
            model.set_submodule(name, fused_delta_net(module, layer) or RecurrentLayer(module, layer))


@torch.inference_mode()
def fused_delta_net(stock: nn.Module, layer: int) -> FusedDeltaNet | None:
    """Returns the replacement of a module; None if the module computes something else, or not on this CPU.

    Both compute a few random tokens, and then one more from the state after these.
    """
    try:
        shape = _shape_of(stock)
        if shape is None:
            return None
        fused = FusedDeltaNet(stock, layer, shape)
        parts = (
            torch.randn(1, sum(TRIED), cast(Any, stock).hidden_size, dtype=torch.float32)
            .to(fused.spec.input_dtype)
            .split(TRIED, dim=1)
        )
        states, cache = fused.spec.make_tensors(1), LayerStates()
        for part in parts:
            expected = stock(hidden_states=part, cache_params=cache)
            phase = Phase((StateRun(0, tuple(range(part.shape[1])), writes=True),))
            if not is_same(fused.run(part[0], (phase,), states)[0][None], expected):
                return None
    except Exception:  # it is built in another way
        return None
    return fused


def _shape_of(stock: Any) -> DeltaShape | None:
    """Returns the shape of the module's heads, if the kernels can compute it. Raises AttributeError where it has other
    parts."""
    shape = DeltaShape(stock.num_k_heads, stock.num_v_heads, stock.head_k_dim, stock.head_v_dim)
    is_here = stock.A_log.device.type == "cpu" and stock.conv1d.bias is None and stock.activation == "silu"
    return shape if is_here and delta_rule.can_compute(shape, stock.conv1d.weight.dtype) else None


def _projection(stock: Any, shape: DeltaShape) -> Projection:
    """Returns the function that projects tokens, (tokens, columns), without the updates of adapters."""
    if not hasattr(stock, "in_proj_qkvz"):
        layers = [stock.in_proj_qkv, stock.in_proj_z]
        if not all(isinstance(layer, PackedLinear) for layer in layers):
            return lambda tokens: (stock.in_proj_qkv.forward(tokens), stock.in_proj_z.forward(tokens))
        shared = SharedInput(layers)
        return lambda tokens: cast(tuple[torch.Tensor, torch.Tensor], tuple(shared.outputs(tokens)))
    order = _order_of_inputs(shape)
    sizes = (shape.channels, shape.num_value_heads * shape.value_dim)
    if not isinstance(stock.in_proj_qkvz, PackedLinear):
        return lambda tokens: stock.in_proj_qkvz.forward(tokens)[:, order].split(sizes, dim=-1)
    stock.in_proj_qkvz = Reordered(stock.in_proj_qkvz, order)
    layer = stock.in_proj_qkvz.layer
    return lambda tokens: layer.multiply(prepare(tokens, layer.packed.format)).split(sizes, dim=-1)


def _gate_weight(stock: Any, shape: DeltaShape) -> torch.Tensor:
    """Returns the weight of the layers for b and a, (2 * value heads, columns)."""
    if not hasattr(stock, "in_proj_ba"):
        return torch.cat([_weight(layer) for layer in (stock.in_proj_b, stock.in_proj_a)])
    return _weight(stock.in_proj_ba)[_order_of_gates(shape)]


def _parts(stock: Any, shape: DeltaShape) -> list[tuple[str, torch.Tensor | None]]:
    """Returns where queries, keys and values come from, then z, b and a: the name of a layer, and which of its rows."""
    if not hasattr(stock, "in_proj_qkvz"):
        return [("in_proj_qkv", None), ("in_proj_z", None), ("in_proj_b", None), ("in_proj_a", None)]
    inputs, gates = _order_of_inputs(shape), _order_of_gates(shape)
    mixed, z = inputs[: shape.channels], inputs[shape.channels :]
    return [("in_proj_qkvz", mixed), ("in_proj_qkvz", z), *(("in_proj_ba", rows) for rows in gates.chunk(2))]


def _num_rows(layer: Any) -> int:
    if isinstance(layer, Reordered):
        return layer.layer.packed.num_rows
    return layer.packed.num_rows if isinstance(layer, PackedLinear) else cast(int, layer.out_features)


def _order_of_inputs(shape: DeltaShape) -> torch.Tensor:
    return _order(shape, [shape.key_dim] * 2 + [shape.value_dim * shape.num_value_heads // shape.num_key_heads] * 2)


def _order_of_gates(shape: DeltaShape) -> torch.Tensor:
    return _order(shape, [shape.num_value_heads // shape.num_key_heads] * 2)


def _weight(layer: Any) -> torch.Tensor:
    if isinstance(layer, PackedLinear):
        return layer.packed.dequantize().to(layer.dtype)
    return cast(torch.Tensor, layer.weight.data)


def _order(shape: DeltaShape, sizes: list[int]) -> torch.Tensor:
    """Returns the rows of a layer that gives all parts of the first head of keys, then of the second one and so on, in
    the order of the parts. sizes: of each part."""
    rows = torch.arange(shape.num_key_heads * sum(sizes)).view(shape.num_key_heads, -1)
    return torch.cat([part.flatten() for part in rows.split(sizes, dim=1)])


class Reordered(nn.Module):
    """A packed layer whose weight has its rows in another order, and gives its output in the first one."""

    def __init__(self, layer: PackedLinear, order: torch.Tensor) -> None:
        """order: the rows of the weight, in whole tiles."""
        super().__init__()
        tiles = order.view(-1, LANES)
        assert torch.equal(tiles, tiles[:, :1] + torch.arange(LANES)), "the parts are whole tiles"
        parts = {name: part[tiles[:, 0] // LANES] for name, part in layer.packed.parts.items()}
        self.layer = PackedLinear(
            PackedWeight(layer.packed.format, layer.packed.num_rows, **parts), layer.bias[order], layer.dtype
        )
        self._inverse = order.argsort()
        self.updates: LowRankUpdates | None = None  # of adapters

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = cast(torch.Tensor, self.layer(x))[..., self._inverse]
        if self.updates is not None:
            self.updates.add(x, [output])
        return output

    def adapter_targets(self, name: str) -> list[Target]:
        return [single(name, self.layer.shape, partial(setattr, self, "updates"))]
