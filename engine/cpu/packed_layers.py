"""Layers that compute with packed weights, and what puts them where a stock model has others.

Stock models stay in charge of their structure: a layer is replaced by one that gives the same result faster. Where
several layers are replaced by one (norms, MLPs), the replacement is first compared with what it replaces; see
`is_same`.
"""

import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from engine.cpu import activations, kernels, products
from engine.cpu.activations import Activations
from engine.cpu.jit import LANES
from engine.cpu.packed_weight import Format, PackedWeight
from engine.lora.adapter import Shape
from engine.lora.updates import LowRankUpdates, Target, several, single

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
EXACT = re.compile(  # small layers that are not rounded: routers choose experts, and gates how long a state lasts
    r"(^|\.)(\w*router\w*|gate|shared_expert_gate|in_proj_(a|b|ba))(\.|$)"
)
SEEING = re.compile(r"(^|\.)(vision|visual|image|embed_vision)\w*\.")  # layers that see
Prepared = Activations | torch.Tensor  # what `prepare` makes of a layer's input
ROUNDING = {torch.bfloat16: 0.02, torch.float32: 1e-4}  # how far outputs of the same computation may be apart


class PackedLinear(nn.Module):
    """Computes y = x W^T + b with a packed weight. If the weight is quantised, x is too: to 8 bits, with a scale for
    every 32 columns."""

    def __init__(self, weight: PackedWeight, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = weight
        self.bias = _padded_bias(weight, bias)
        self.dtype = dtype  # of the output
        self.updates: LowRankUpdates | None = None  # of adapters

    @property
    def weight(self) -> torch.Tensor:
        """An empty tensor: some modules ask the weights of their layers for the data type."""
        return torch.empty(0, dtype=self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.multiply(prepare(x, self.packed.format)).view(*x.shape[:-1], self.packed.num_rows)
        if self.updates is not None:
            self.updates.add(x, [output])
        return output

    def adapter_targets(self, name: str) -> list[Target]:
        return [single(name, self.shape, partial(setattr, self, "updates"))]

    @property
    def shape(self) -> Shape:
        return Shape(self.packed.num_rows, self.packed.num_columns)

    def multiply(self, x: Prepared) -> torch.Tensor:
        if isinstance(x, Activations):
            return products.matmul(x, self.packed, self.bias, self.dtype)
        if x.dtype == torch.bfloat16:
            return products.matmul_bfloat16(x, self.packed, self.bias, self.dtype)
        return products.matmul_floats(x, self.packed, self.bias, self.dtype)


def prepare(x: torch.Tensor, fmt: Format) -> Prepared:
    """Converts inputs, (..., columns), into the form that a product with a weight of that format reads."""
    rows = x.reshape(-1, x.shape[-1])
    return activations.quantize(rows.contiguous()) if fmt.is_quantized else activations.group(rows.to(fmt.input_dtype))


def _padded_bias(weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    padded = torch.zeros(weight.quants.shape[0] * LANES, dtype=torch.float32)
    if bias is not None:
        padded[: len(bias)] = bias  # the bias of joined layers is padded already
    return padded


class SharedInput:
    """Linear layers that a module applies to the same tensor, one after the other.

    The tensor is quantised once for all of them, and layers of one format are computed as one product.
    """

    def __init__(self, layers: list[PackedLinear]) -> None:
        self._layers = layers
        self.num_columns = layers[0].packed.num_columns
        self._products = list(_joined(layers))
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor] = []
        self.updates: LowRankUpdates | None = None  # of adapters

    def num_rows(self, index: int) -> int:
        """Returns the size of a layer's output."""
        return self._layers[index].packed.num_rows

    @property
    def shapes(self) -> list[Shape]:
        return [layer.shape for layer in self._layers]

    def outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Returns the outputs of all layers, each (rows, rows of its weight)."""
        rows = prepare(x, self._layers[0].packed.format)
        outputs = [part for product in self._products for part in product(rows)]
        if self.updates is not None:
            self.updates.add(x, outputs)
        return outputs

    def output(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if x is not self._input:
            self._outputs = self.outputs(x)
            self._input = x
        output = self._outputs[index]
        if index == len(self._outputs) - 1:  # the last layer has asked: free the memory
            self._input, self._outputs = None, []
        return output.view(*x.shape[:-1], output.shape[-1])


def _joined(layers: list[PackedLinear]) -> Iterator[Callable[[Prepared], tuple[torch.Tensor, ...]]]:
    """Yields one product for each run of neighbouring layers that can be computed together."""
    run: list[PackedLinear] = []
    for layer in layers:
        if run and not _can_join(run[-1], layer):
            yield _product(run)
            run = []
        run.append(layer)
    yield _product(run)


def _can_join(first: PackedLinear, second: PackedLinear) -> bool:
    """Returns whether both have one format and the first one's rows fill whole tiles."""
    return first.packed.format == second.packed.format and first.packed.num_rows % LANES == 0


def _product(layers: list[PackedLinear]) -> Callable[[Prepared], tuple[torch.Tensor, ...]]:
    whole = join(layers)
    sizes = [layer.packed.num_rows for layer in layers]
    return lambda x: whole.multiply(x).split(sizes, dim=-1)


def join(layers: list[PackedLinear]) -> PackedLinear:
    """Joins layers into one that gives their outputs side by side; their weights become views of its weight."""
    if len(layers) == 1:
        return layers[0]
    weights = [layer.packed for layer in layers]
    parts = {name: torch.cat([weight.parts[name] for weight in weights]) for name in weights[0].parts}
    whole = PackedWeight(weights[0].format, sum(weight.num_rows for weight in weights), **parts)
    joined = PackedLinear(whole, torch.cat([layer.bias for layer in layers]), layers[0].dtype)
    start = 0
    for layer in layers:
        layer.packed = whole.tiles(start, layer.packed.num_rows)
        start += layer.packed.quants.shape[0]
    return joined


class SharedLinear(nn.Module):
    """Replaces one linear layer in the stock module; its SharedInput computes it together with the others."""

    def __init__(self, shared: SharedInput, index: int) -> None:
        super().__init__()
        self.shared, self._index = shared, index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.output(self._index, x)

    def adapter_targets(self, name: str) -> list[Target]:
        """The first layer answers for all."""
        if self._index:
            return []
        owner = name.rpartition(".")[0]
        shapes = {f"{owner}.{part}": shape for part, shape in zip(ATTENTION_INPUTS, self.shared.shapes, strict=True)}
        return [several(shapes, partial(setattr, self.shared, "updates"))]


class PackedEmbedding(nn.Module):
    """Looks rows of a packed weight up, and multiplies them by the scale that some families give their embeddings."""

    def __init__(self, weight: PackedWeight, scale: torch.Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.scale, self.dtype = weight, scale, dtype
        self.num_embeddings = weight.num_rows

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        flat = token_ids.flatten()
        if self.packed.format.is_quantized and not self.packed.format.is_float:
            rows = kernels.embed(flat, self.packed, self.dtype)
        else:
            rows = self.packed.rows(flat).to(self.dtype)
        rows = rows.view(*token_ids.shape, -1)
        return rows if self.scale is None else rows * self.scale.to(self.dtype)


class FusedMLP(nn.Module):
    """Computes down(activation(gate(x)) * up(x)); one kernel does all between the two products."""

    def __init__(self, gate_up: PackedLinear, activation: str, down: PackedLinear) -> None:
        super().__init__()
        self._gate_up, self._activation, self._down = gate_up, activation, down
        self.updates: LowRankUpdates | None = None  # of adapters, for gate and up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both = self._gate_up.multiply(prepare(x, self._gate_up.packed.format))
        if self.updates is not None and self.updates.is_active:
            self.updates.add(x, both.chunk(2, dim=-1))
        output = self._down.multiply(kernels.gate(both, self._activation))
        if self._down.updates is not None and self._down.updates.is_active:
            unrounded = partial(kernels.gate_unrounded, both, self._activation)
            self._down.updates.add_lazily(x.device, unrounded, [output])
        return output.view(x.shape)

    def adapter_targets(self, name: str) -> list[Target]:
        rows, columns = self._gate_up.shape
        shapes = {f"{name}.{part}": Shape(rows // 2, columns) for part in ("gate_proj", "up_proj")}
        return [
            several(shapes, partial(setattr, self, "updates")),
            *self._down.adapter_targets(f"{name}.down_proj"),
        ]


class FusedNorm(nn.Module):
    """Computes a root mean square normalisation in one kernel."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = weight, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return kernels.rms_norm(x.contiguous(), self.weight, self.epsilon)


# --- replacing a model's layers


def replace_layer(model: PreTrainedModel, name: str, packed: PackedWeight) -> None:
    """Replaces the linear layer or embedding `name` by one with a packed weight. The output layer gives float32."""
    layer = model.get_submodule(name)
    dtype = cast(torch.Tensor, layer.weight).dtype
    if isinstance(layer, nn.Embedding):
        scale = cast(torch.Tensor | None, getattr(layer, "embed_scale", None))
        model.set_submodule(name, PackedEmbedding(packed, scale, dtype))
    else:
        output = torch.float32 if layer is model.get_output_embeddings() else dtype
        bias = cast(torch.Tensor | None, layer.bias)
        model.set_submodule(name, PackedLinear(packed, None if bias is None else bias.data, output))


def fuse_layers(model: PreTrainedModel) -> None:
    """Replaces attention inputs, MLPs and norms by fewer, larger steps, wherever these give the same result."""
    for name, module in list(model.named_modules()):
        inputs = [getattr(module, part, None) for part in ATTENTION_INPUTS]
        if all(isinstance(layer, PackedLinear) for layer in inputs) and _are_alike(cast(list[PackedLinear], inputs)):
            shared = SharedInput(cast(list[PackedLinear], inputs))
            for index, part in enumerate(ATTENTION_INPUTS):
                setattr(module, part, SharedLinear(shared, index))
        fused = _fused_mlp(module) or _fused_norm(module)
        if fused is not None and name:
            model.set_submodule(name, fused)


def _are_alike(layers: list[PackedLinear]) -> bool:
    """Returns whether all layers read the same form of input, such as one of 8 bits."""
    return len({layer.packed.format.input_dtype for layer in layers}) == 1


def _fused_mlp(module: nn.Module) -> FusedMLP | None:
    layers = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
    activation = activation_name(getattr(module, "act_fn", None))
    if activation is None or not all(isinstance(layer, PackedLinear) for layer in layers):
        return None
    gate, up, down = cast(list[PackedLinear], layers)
    if (
        not down.packed.format.is_quantized
        or not _can_join(gate, up)
        or gate.packed.num_rows != up.packed.num_rows
        or up.packed.num_rows % LANES
    ):
        return None
    x = torch.randn(3, gate.packed.num_columns, dtype=torch.float32).to(gate.dtype)
    expected = module(x)
    fused = FusedMLP(join([gate, up]), activation, down)
    return fused if is_same(fused(x), expected) else None


def activation_name(function: Any) -> str | None:
    if not callable(function):
        return None
    points = torch.linspace(-4, 4, 64, dtype=torch.float32)
    stock: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": nn.functional.silu,
        "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    }
    return next((name for name, same in stock.items() if torch.allclose(function(points), same(points))), None)


def _fused_norm(module: nn.Module) -> FusedNorm | None:
    """Replaces a root mean square norm. Some families store the weight minus one, so both meanings are tried, in
    float32: beside a large weight, lower precision would not show the difference."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or epsilon is None or weight.numel() % LANES:
        return None
    x = torch.randn(2, weight.numel(), dtype=torch.float32)
    for offset in (0.0, 1.0):
        fused = FusedNorm(weight.data.float() + offset, float(epsilon))
        if is_same(fused(x), module(x).float()):
            return fused
    return None


def is_same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Returns whether two results differ by no more than rounding.

    Nothing in a module's code says what it computes, only running it does. So every replacement is tried first:
        x = random inputs
        expected = stock_module(x)
        actual = replacement(x)
        keep the replacement if |actual - expected| <= ROUNDING * |expected|, else the stock module
    A family with another formula (a clamp, a scale, weights stored minus one) fails this and stays as it is.
    """
    difference = (actual.float() - expected.float()).norm()
    return bool(difference <= ROUNDING[expected.dtype] * expected.float().norm())
