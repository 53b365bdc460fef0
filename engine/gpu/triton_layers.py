"""A stock model's layers on a GPU in fewer, larger kernels; Triton computes what is between the products.

For one token, a stock layer launches some forty kernels, which take longer to start than to run. Here it launches a
dozen: products of the same input are one, and each norm, the steps between products and attention (norms of heads,
rotation, the cache), and the activation are one kernel each. A module is replaced only if the replacement gives the
same result; see packed_layers.is_same. The replacement keeps the stock module, whose weights become views of the joined
ones.
"""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import linear

from engine.attention import flash
from engine.attention.paged import AttentionRecorder, StepAttention
from engine.gpu.layer_kernels import Angles, activate, place_heads, rms_norm
from engine.gpu.packed_layers import PackedLinear
from engine.gpu.packed_weight import joined, split
from engine.layer_cache import LayerCache
from engine.lora.adapter import Shape
from engine.lora.updates import LowRankUpdates, Target, several

TOLERANCES = {2: 0.02, 4: 1e-4}  # bytes of a number -> allowed difference, as a part of a result's norm
LARGEST_ROW = 16384  # columns that one program can hold
ATTENTION_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Norm(nn.Module):
    """Computes a root mean square norm over the last dimension."""

    def __init__(self, stock: nn.Module, factor: torch.Tensor, epsilon: float) -> None:
        super().__init__()
        self._stock = stock
        self.factor, self.epsilon = factor, epsilon  # (columns,), float32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.factor, self.epsilon)


class Joined:
    """Computes linear layers of one input as one product, or as few as their formats allow; their weights become views
    of the joined ones."""

    def __init__(self, layers: list[Any]) -> None:
        self.sizes = [layer.out_features for layer in layers]
        self.num_columns = layers[0].in_features
        self.updates: LowRankUpdates | None = None  # of adapters
        self._products = [_join(list(run)) for _, run in groupby(layers, key=_kind)]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (1, tokens, columns)."""
        products = self._products
        output = products[0](x) if len(products) == 1 else torch.cat([product(x) for product in products], dim=-1)
        if self.updates is not None and self.updates.is_active:
            self.updates.add(x, output.split(self.sizes, dim=-1))
        return output

    def adapter_targets(self, names: list[str]) -> list[Target]:
        """names: of the layers."""
        shapes = {name: Shape(size, self.num_columns) for name, size in zip(names, self.sizes, strict=True)}
        return [several(shapes, partial(setattr, self, "updates"))]


def _kind(layer: Any) -> object:
    """Returns what layers have in common that can be joined."""
    return layer.packed.kind if isinstance(layer, PackedLinear) else None


def _join(layers: list[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    biases, sizes = [layer.bias for layer in layers], [layer.out_features for layer in layers]
    bias = None if biases[0] is None else torch.cat(biases)
    if isinstance(layers[0], PackedLinear):
        packed = joined([layer.packed for layer in layers])
        for layer, rows in zip(layers, split(packed, sizes), strict=True):
            layer.packed = rows
        return PackedLinear(packed, bias, layers[0].dtype)
    weight = torch.cat([layer.weight for layer in layers])
    for layer, rows in zip(layers, weight.split(sizes), strict=True):
        layer.weight.data = rows
    return partial(linear, weight=weight, bias=bias)


class MLP(nn.Module):
    """Computes gate and up in one product, and their activation in one kernel."""

    def __init__(self, stock: Any, is_gelu: bool) -> None:
        super().__init__()
        self._stock, self._is_gelu = stock, is_gelu
        self._joined = Joined([stock.gate_proj, stock.up_proj])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self._stock.down_proj(activate(self._joined(x), self._is_gelu)))

    def adapter_targets(self, name: str) -> list[Target]:
        return self._joined.adapter_targets([f"{name}.{part}" for part in ("gate_proj", "up_proj")])


class Attention(nn.Module):
    """Computes queries, keys and values in one product; their norms, rotation and the cache in one kernel."""

    def __init__(self, stock: Any, scaling: float) -> None:
        super().__init__()
        self._stock, self._layer, self._head_dim = stock, cast(int, stock.layer_idx), cast(int, stock.head_dim)
        self._scaling = scaling
        norms = [getattr(stock, name, None) for name in ("q_norm", "k_norm")]
        if not all(isinstance(norm, Norm) for norm in norms) and norms != [None, None]:
            raise ValueError("another normalisation")
        self._norms = [(norm.factor, norm.epsilon) if isinstance(norm, Norm) else None for norm in norms]
        self._joined = Joined([stock.q_proj, stock.k_proj, stock.v_proj])

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Angles | None = None, **others: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: (1, tokens, columns)."""
        step = others.get("step")
        if not isinstance(step, StepAttention) or step.flash is None or position_embeddings is None:
            return self._as_stock(hidden_states, position_embeddings, others)
        if position_embeddings[0].shape[-1] != self._head_dim:  # only a part of each head is rotated
            return self._as_stock(hidden_states, position_embeddings, others)
        group = step.of_layer(self._layer, hidden_states.device)
        if group.flash is None or group.prefills:  # there are images, and the kernel cannot see ahead
            return self._as_stock(hidden_states, position_embeddings, others)
        cache = step.cache.layer(self._layer)
        query = self.heads(hidden_states, position_embeddings, cache, group.slots)
        output = flash.attend(
            step.flash, query, cache.keys, cache.values, group.flash, self._scaling, scales=cache.scales
        )
        return self.project(output), None

    def _as_stock(
        self, hidden_states: torch.Tensor, angles: Angles | None, others: dict[str, Any]
    ) -> tuple[torch.Tensor, None]:
        result = self._stock(hidden_states=hidden_states, position_embeddings=angles, **others)
        return cast(tuple[torch.Tensor, None], result)

    def heads(self, x: torch.Tensor, angles: Angles, cache: LayerCache, slots: torch.Tensor) -> torch.Tensor:
        """Computes the queries, `scaled`, (tokens, heads, dim), and writes keys and values to the cache."""
        return place_heads(self._joined(x)[0], angles, self._norms, cache, slots)

    def project(self, output: torch.Tensor) -> torch.Tensor:
        """Turns attention's result, (tokens, heads, dim), into the module's output."""
        return cast(torch.Tensor, self._stock.o_proj(output.reshape(1, len(output), -1)))

    def adapter_targets(self, name: str) -> list[Target]:
        return self._joined.adapter_targets([f"{name}.{part}" for part in ATTENTION_LAYERS[:3]])


@torch.no_grad()
def fuse_gpu_layers(model: nn.Module) -> int:
    """Replaces every stock module for which a replacement gives the same result. Returns the number of them."""
    count = 0
    for make in (fused_norm, fused_mlp, fused_attention):
        for name, module in list(model.named_modules()):
            fused = None if hasattr(module, "_hf_hook") or "_stock" in name else make(module)
            if fused is not None:
                model.set_submodule(name, fused)
                count += 1
    return count


def fused_norm(module: nn.Module) -> Norm | None:
    """Returns the replacement of a root mean square norm; None if the module computes something else."""
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or epsilon is None:
        return None
    if weight.dim() != 1 or weight.numel() > LARGEST_ROW:
        return None
    x = _numbers(len(weight), weight)
    for factor in (weight.float(), 1 + weight.float()):
        fused = Norm(module, factor, float(epsilon))
        if _is_same(fused(x), module(x)):
            return fused
    return None


def fused_mlp(module: nn.Module) -> MLP | None:
    """Returns the replacement of a gated MLP; None if the module computes something else."""
    layers = _plain_layers(module, "gate_proj", "up_proj", "down_proj")
    if not layers or layers[0].bias is not None or layers[1].bias is not None:
        return None
    gate, up, down = layers
    x = _inputs(gate)
    try:
        expected, joined = module(x), torch.cat([gate(x), up(x)], dim=-1)
        for is_gelu in (False, True):
            if _is_same(down(activate(joined, is_gelu)), expected):
                return MLP(module, is_gelu)
    except Exception:  # the module is called in another way
        return None
    return None


def fused_attention(module: nn.Module) -> Attention | None:
    """Returns the replacement of an attention module whose norms are replaced; None if the module computes something
    else.

    It is compared as in engine/attention/fused.py: what it hands to attention, and what it makes of the result.
    """
    layers, head_dim = _plain_layers(module, *ATTENTION_LAYERS), getattr(module, "head_dim", None)
    if not layers or not isinstance(head_dim, int) or head_dim & (head_dim - 1):  # a kernel's rows are powers of two
        return None
    if len({layer.bias is None for layer in layers[:3]}) > 1:
        return None
    x = _inputs(layers[0])
    half = torch.rand(1, 3, head_dim // 2, device=x.device, dtype=torch.float32) * 6
    angles = torch.cat([half, half], dim=-1)
    places = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
    recorder = AttentionRecorder()
    try:
        expected = module(hidden_states=x, position_embeddings=places, attention_mask=None, step=recorder)[0]
        (call,) = recorder.calls.values()
        if call.softcap is not None or call.sinks is not None:
            return None
        if call.spec.key_dim != head_dim or call.spec.value_dim != head_dim:
            return None
        fused = Attention(module, call.scaling)
    except Exception:  # the module is called in another way
        return None
    keys, values = torch.empty(2, 1, 3, call.spec.num_kv_heads, head_dim, dtype=x.dtype, device=x.device)
    query = fused.heads(x, places, LayerCache(keys, values), torch.arange(3, device=x.device))
    pairs = (
        (query, call.query[0].transpose(0, 1)),
        (keys[0], call.key[0].transpose(0, 1)),
        (values[0], call.value[0].transpose(0, 1)),
        (fused.project(call.stand_in[0]), expected),
    )
    return fused if all(a.shape == b.shape and _is_same(a, b) for a, b in pairs) else None


def _plain_layers(module: nn.Module, *names: str) -> list[Any]:
    """Returns the module's layers of these names; an empty list unless all of them are linear layers and no more."""
    layers: list[Any] = [getattr(module, name, None) for name in names]
    return layers if all(type(layer) in (nn.Linear, PackedLinear) for layer in layers) else []


def _inputs(layer: Any) -> torch.Tensor:
    """Makes random inputs of three tokens for a linear layer: (1, 3, columns)."""
    return _numbers(layer.in_features, layer.weight)


def _numbers(columns: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(1, 3, columns, device=like.device, dtype=torch.float32).to(like.dtype)


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Returns whether `a` differs from the stock result `b` by no more than rounding."""
    tolerance = TOLERANCES[b.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and bool((a - b).float().norm() <= tolerance * b.float().norm())
