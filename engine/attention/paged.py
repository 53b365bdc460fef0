"""Attention over the paged cache, as the function that transformers' models call for every layer.

Registered with transformers' `AttentionInterface`, so that stock modules run unmodified: the tokens of a step come
packed as one row (1, heads, tokens, dim), first the decodes, then the chunks of prompts. It knows no sequences, only
the step's tensors in `StepAttention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from engine.attention import flash
from engine.attention.flash import FlashBatch, Kernel
from engine.cpu import attention_kernels
from engine.kv_cache import KVCache
from engine.layer_spec import AttentionSpec

NAME = "paged_blocks"
COMPUTED = ("position_ids", "is_causal")  # arguments that ask for nothing beside what is computed here


@dataclass(frozen=True)
class DecodeGroup:
    """Decodes of similar length, padded to the longest."""

    start: int  # among the step's tokens
    end: int
    tables: torch.Tensor  # (rows, num_blocks)
    visible: torch.Tensor  # (rows, 2), the first position of a table's blocks that is visible, and the end
    block_size: int
    dtype: torch.dtype

    @cached_property
    def mask(self) -> torch.Tensor:
        """(rows, 1, 1, num_blocks * block_size), 0 where visible, else -inf."""
        positions = torch.arange(self.tables.shape[1] * self.block_size, device=self.tables.device)
        hidden = (positions < self.visible[:, :1]) | (positions >= self.visible[:, 1:])
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.tables.device)
        return mask.masked_fill_(hidden, -torch.inf)[:, None, None]


@dataclass(frozen=True)
class PrefillChunk:
    """One sequence's chunk of its prompt."""

    start: int  # among the step's tokens
    end: int
    table: torch.Tensor  # (num_blocks,), all that the chunk sees
    visible: torch.Tensor  # (tokens, 2), the first position in the table's blocks that each sees, and the end
    sees_only_itself: bool  # and what is causal in it
    block_size: int
    dtype: torch.dtype

    @cached_property
    def mask(self) -> torch.Tensor:
        """(tokens, positions): 0 where visible, else -inf."""
        positions = torch.arange(len(self.table) * self.block_size, device=self.table.device)
        hidden = (positions < self.visible[:, :1]) | (positions >= self.visible[:, 1:])
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.table.device)
        return mask.masked_fill_(hidden, -torch.inf)


def visible_of(start: int, num_tokens: int, window: int | None, images: Sequence[tuple[int, int]]) -> torch.Tensor:
    """(tokens, 2), first position and end that each of `num_tokens` tokens from `start` on sees: all before it and
    itself, or so many as the window holds; of an image (start, end), also all of it."""
    ends = torch.arange(start + 1, start + num_tokens + 1)
    firsts = torch.zeros_like(ends) if window is None else (ends - window).clamp(min=0)
    for image_start, image_end in images:
        own = slice(max(image_start - start, 0), image_end - start)
        ends[own] = image_end
        firsts[own].clamp_(max=image_start)
    return torch.stack([firsts, ends], dim=1)


@dataclass(frozen=True)
class GroupAttention:
    """What the layers of one group share in a step."""

    slots: torch.Tensor  # (tokens,): block * block_size + offset, where a token's key and value go
    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillChunk, ...]
    flash: FlashBatch | None = None  # all of them in one, but for chunks with images, where a GPU computes that

    def to(self, device: torch.device) -> "GroupAttention":
        """A copy whose tensors are on `device`."""
        return GroupAttention(
            self.slots.to(device),
            tuple(replace(d, tables=d.tables.to(device), visible=d.visible.to(device)) for d in self.decodes),
            tuple(replace(p, table=p.table.to(device), visible=p.visible.to(device)) for p in self.prefills),
            None if self.flash is None else self.flash.to(device),
        )


@dataclass
class StepAttention:
    """The step's side of attention: the cache, and each group's tensors on each device that asks for them."""

    cache: KVCache
    groups: list[GroupAttention]
    flash: Kernel | None = None
    _placed: dict[tuple[int, torch.device], GroupAttention] = field(default_factory=dict)

    def of_layer(self, layer: int, device: torch.device) -> GroupAttention:
        group = self.cache.group_of[layer]
        if (group, device) not in self._placed:
            self._placed[group, device] = self.groups[group].to(device)
        return self._placed[group, device]


@dataclass(frozen=True)
class Call:
    """What a layer hands to attention; shapes as in `paged_attention`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    window: int | None
    scaling: float
    softcap: float | None

    @property
    def spec(self) -> AttentionSpec:
        _, num_kv_heads, _, key_dim = self.key.shape
        place, group = (self.key.dtype, self.key.device), self.query.shape[1] // num_kv_heads
        return AttentionSpec(num_kv_heads, key_dim, self.value.shape[3], self.window, *place, self.softcap, group)

    @property
    def stand_in(self) -> torch.Tensor:
        """The values themselves, in the shape of what attention would give."""
        return self.value.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1).transpose(1, 2)


@dataclass
class Probe:
    """Takes the place of StepAttention in a first forward, and notes what each layer asks for."""

    calls: dict[int, Call] = field(default_factory=dict)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    step: StepAttention | Probe | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """query (1, heads, tokens, dim), key and value (1, kv_heads, tokens, dim) -> (1, tokens, heads, value_dim).

    `step` travels through the model's forward as a keyword argument, as transformers' own paged cache does.
    """
    assert step is not None, "the model does not pass keyword arguments on to its attention"
    layer = cast(int, module.layer_idx)
    scaling = scaling or query.shape[-1] ** -0.5
    if isinstance(step, Probe):
        _refuse_what_is_not_computed(others)
        # with one place for keys and values
        assert layer not in step.calls, "some of their layers call the attention twice"
        step.calls[layer] = Call(query, key, value, sliding_window, scaling, softcap)
        return step.calls[layer].stand_in, None
    group = step.of_layer(layer, key.device)
    keys, values = step.cache.tensors[layer]  # (num_blocks, block_size, kv_heads, dim)
    keys.flatten(0, 1).index_copy_(0, group.slots, key[0].transpose(0, 1))
    values.flatten(0, 1).index_copy_(0, group.slots, value[0].transpose(0, 1))
    flat = query[0].transpose(0, 1)  # (tokens, heads, dim)
    if step.flash is not None and group.flash is not None and not group.prefills:
        return flash.attend(step.flash, flat, keys, values, group.flash, scaling, softcap)[None], None
    num_kv_heads, value_dim = values.shape[2:]
    query = query[0].view(num_kv_heads, -1, *query.shape[2:])  # (kv_heads, group, tokens, dim)
    output = query.new_empty(query.shape[2], num_kv_heads, query.shape[1], value_dim)  # tokens first
    if step.flash is not None and group.flash is not None:
        own = slice(0, group.flash.num_tokens)
        result = flash.attend(step.flash, flat[own], keys, values, group.flash, scaling, softcap)
        output[own] = result.view_as(output[own])
    if softcap is None and attention_kernels.can_attend(keys, values):
        attend_with_kernels(query, keys, values, group, scaling, output)
        return output.flatten(1, 2)[None], None
    for decode in group.decodes:
        rows = query[:, :, decode.start : decode.end].permute(2, 0, 1, 3)  # (rows, kv_heads, group, dim)
        visible = _gather(keys, values, decode.tables.flatten(), decode.end - decode.start)
        output[decode.start : decode.end] = _attend(rows, *visible, decode.mask, scaling, softcap)
    for chunk in group.prefills:
        part = query[:, :, chunk.start : chunk.end]  # (kv_heads, group, tokens, dim)
        if chunk.sees_only_itself:
            own = slice(chunk.start, chunk.end)
            k, v, mask = key[0, :, own], value[0, :, own], None
        else:
            gathered = _gather(keys, values, chunk.table, 1)
            k, v, mask = gathered[0][0], gathered[1][0], chunk.mask
        shape = (-1, query.shape[1], -1, -1)  # the heads of a group share one key: no copy
        result = _attend(part, k[:, None].expand(shape), v[:, None].expand(shape), mask, scaling, softcap)
        output[chunk.start : chunk.end] = result.permute(2, 0, 1, 3)
    return output.flatten(1, 2)[None], None


def attend_with_kernels(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    group: GroupAttention,
    scaling: float,
    output: torch.Tensor,
) -> None:
    """query: (kv_heads, group, tokens, dim), their keys and values in the cache; writes output, as the kernels do."""
    for decode in group.decodes:
        own = slice(decode.start, decode.end)
        attention_kernels.attend(query[:, :, own], keys, values, decode.tables, decode.visible, scaling, output[own])
    for chunk in group.prefills:
        own = slice(chunk.start, chunk.end)
        attention_kernels.attend_chunk(query[:, :, own], keys, values, chunk.table, chunk.visible, scaling, output[own])


def _refuse_what_is_not_computed(arguments: dict[str, Any]) -> None:
    """Attention sinks, position biases, caps and the like: to leave them out would give wrong answers."""
    unknown = [
        name
        for name, value in arguments.items()
        if name not in COMPUTED and (isinstance(value, torch.Tensor) or value not in (None, False, 0))
    ]
    assert not unknown, f"their attention takes the unknown arguments {', '.join(sorted(unknown))}"
    assert arguments.get("is_causal") is not False, "their attention is not causal"


def _gather(
    keys: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each (rows, kv_heads, tokens, dim)."""
    k = keys.index_select(0, blocks).view(rows, -1, *keys.shape[2:])
    v = values.index_select(0, blocks).view(rows, -1, *values.shape[2:])
    return k.transpose(1, 2), v.transpose(1, 2)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """(a, b, queries, dim) over (a, b, visible, dim); without a mask it is causal."""
    if softcap is not None:
        return _attend_softcapped(query, key, value, mask, scaling, softcap)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)


def _attend_softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Gemma 2's: scores go through softcap * tanh(score / softcap), which no fused kernel here has."""
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scaling
    scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.full(scores.shape[-2:], -torch.inf, device=scores.device).triu(1)
    return torch.matmul((scores + mask).softmax(-1).to(value.dtype), value)


AttentionInterface.register(NAME, paged_attention)
