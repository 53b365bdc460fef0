"""FusedAttention: a stock attention module's work in six kernels, from its input to its output.

As in packed_layers, it is first compared with the module that it replaces; see `fused_attention`.
"""

from typing import Any, cast

import torch
from torch import nn

from engine.attention.paged import AttentionRecorder, StepAttention, attend_with_kernels
from engine.cpu import attention_kernels
from engine.cpu.attention_kernels import Norms
from engine.cpu.packed_layers import ATTENTION_INPUTS, FusedNorm, PackedLinear, SharedInput, SharedLinear, is_same
from engine.layer_cache import LayerCache

Angles = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, (1, tokens, dim)


class FusedAttention(nn.Module):
    """Computes queries, keys and values, their normalisation and rotation, attention, and the output layer."""

    def __init__(
        self, stock: nn.Module, shared: SharedInput, head_dim: int, norms: Norms, scaling: float, is_gated: bool
    ) -> None:
        """is_gated: behind each head's query its layer gives a gate for attention's result, as in Qwen 3.5."""
        super().__init__()
        self._stock = stock  # an AttentionRecorder's forward runs it, to record the layer as it is
        self._layer = cast(int, stock.layer_idx)
        self._output = cast(PackedLinear, stock.o_proj)
        self._shared, self._head_dim, self._norms, self._scaling = shared, head_dim, norms, scaling
        self._is_gated = is_gated

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: Angles | None = None, **others: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: (1, tokens, columns)."""
        step = others.get("step")
        if not isinstance(step, StepAttention) or position_embeddings is None:
            others["position_embeddings"] = position_embeddings
            return cast(tuple[torch.Tensor, None], self._stock(hidden_states=hidden_states, **others))
        group = step.of_layer(self._layer, hidden_states.device)
        cache = step.cache.layer(self._layer)
        query, gate = self.heads(hidden_states, position_embeddings, cache, group.slots)
        output = torch.empty_like(query).view(len(query), cache.keys.shape[2], -1, self._head_dim)
        grouped = query.view(output.shape).permute(1, 2, 0, 3)
        attend_with_kernels(grouped, cache, group, self._scaling, output)
        return self.project(output, gate), None

    def heads(
        self, x: torch.Tensor, angles: Angles, cache: LayerCache, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the queries, `scaled`, and their gates, if there are any, (tokens, heads, dim), and writes keys and
        values to the cache."""
        query, key, value = self._shared.outputs(x)
        step = self._head_dim * (1 + self._is_gated)
        rotated = attention_kernels.rotate(
            (query, key, value),
            angles,
            self._norms,
            cache.keys,
            cache.values,
            slots,
            step,
            cache.scales,
            cache.factors,
        )
        gate = query.unflatten(1, (-1, 2, self._head_dim))[:, :, 1] if self._is_gated else None
        return rotated, gate

    def project(self, output: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """Turns attention's result, (tokens, ...), into the module's output."""
        if gate is not None:
            output = output.view_as(gate) * gate.sigmoid()
        return cast(torch.Tensor, self._output(output.reshape(1, len(output), -1)))


@torch.inference_mode()
def fuse_attention(model: nn.Module) -> None:
    """Replaces every stock attention module for which FusedAttention gives the same result."""
    for name, module in list(model.named_modules()):
        fused = fused_attention(module)
        if fused is not None:
            model.set_submodule(name, fused)


def fused_attention(module: nn.Module) -> FusedAttention | None:
    """Returns the replacement of a module whose linear layers are packed; None if the module computes something else.

    Attention itself is the same function for both, so the halves before and after it are compared:
        expected = stock_module(x), run with an AttentionRecorder, which records what the module hands to attention
        queries, keys and values of the replacement must equal the recorded ones
        project(stand-in for attention's result) must equal `expected`
    """
    layers = [getattr(module, part, None) for part in ATTENTION_INPUTS]
    head_dim, output = getattr(module, "head_dim", None), getattr(module, "o_proj", None)
    if not all(isinstance(layer, SharedLinear) for layer in layers) or not isinstance(output, PackedLinear):
        return None
    if not isinstance(head_dim, int):
        return None
    num_rotated = int(head_dim * _rotated_part(module))
    if not attention_kernels.can_rotate(head_dim, num_rotated):
        return None
    shared = cast(SharedLinear, layers[0]).shared
    x = torch.randn(1, 3, shared.num_columns, dtype=torch.float32).to(output.dtype)
    half = torch.rand(1, 3, num_rotated // 2, dtype=torch.float32) * 6
    angles = torch.cat([half, half], dim=-1)
    places = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
    recorder = AttentionRecorder()
    try:
        expected = module(hidden_states=x, position_embeddings=places, attention_mask=None, step=recorder)[0]
        (call,) = recorder.calls.values()
        norms = _norms(module)
    except Exception:  # the module is called in another way
        return None
    if call.softcap is not None or call.sinks is not None:
        return None
    is_gated = shared.num_rows(0) == 2 * output.packed.num_columns
    fused = FusedAttention(module, shared, head_dim=head_dim, norms=norms, scaling=call.scaling, is_gated=is_gated)
    spec = call.spec
    if spec.key_dim != head_dim or spec.value_dim != head_dim or spec.dtype != x.dtype:
        return None
    keys, values = torch.empty(2, 1, 3, spec.num_kv_heads, head_dim, dtype=x.dtype)
    query, gate = fused.heads(x, places, LayerCache(keys, values), torch.arange(3))
    pairs = (
        (query, call.query[0].transpose(0, 1)),
        (keys[0], call.key[0].transpose(0, 1)),
        (values[0], call.value[0].transpose(0, 1)),
        (fused.project(call.stand_in[0], gate), expected),
    )
    return fused if all(a.shape == b.shape and is_same(a, b) for a, b in pairs) else None


def _rotated_part(module: nn.Module) -> float:
    """Returns the part of each head that the model's configuration has rotated."""
    rope = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
    return float(rope.get("partial_rotary_factor") or 1.0)


def _norms(module: nn.Module) -> Norms:
    """Returns the norms of queries and keys; None if there are none. Raises ValueError unless both are plain root mean
    squares over a head."""
    query, key = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
    if query is None and key is None:
        return None
    if not isinstance(query, FusedNorm) or not isinstance(key, FusedNorm) or query.epsilon != key.epsilon:
        raise ValueError("another normalisation")
    return query.weight, key.weight, query.epsilon
