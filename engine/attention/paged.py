"""Attention over the paged cache, as the function that transformers' models call for every layer.

It is registered with transformers' `AttentionInterface`, so that stock modules run unmodified. The tokens of a step
come packed as one row (1, heads, tokens, dim), first the decodes, then the chunks of prompts. This file knows no
sequences, only the step's tensors in `StepAttention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from engine.attention import flash
from engine.attention.flash import FlashBatch, Kernel
from engine.cpu import attention_kernels, prompt_attention
from engine.kv_cache import KVCache
from engine.layer_cache import LayerCache
from engine.layer_spec import AttentionSpec, RecurrentSpec
from engine.recurrent.state_cache import StateStep

NAME = "paged_blocks"
MAX_SCORES = 2**25  # that are in memory at a time in float32, where torch computes them
COMPUTED = ("position_ids", "is_causal")  # arguments that need nothing more than what is computed here


@dataclass(frozen=True)
class DecodeGroup:
    """Decodes of similar length, padded to the longest."""

    start: int  # index among the step's tokens
    end: int
    tables: torch.Tensor  # (rows, num_blocks)
    visible: torch.Tensor  # (rows, 2), the first visible position in the table's blocks, and the end
    block_size: int
    dtype: torch.dtype

    @cached_property
    def mask(self) -> torch.Tensor:
        """The mask, (rows, 1, 1, num_blocks * block_size): 0 for visible positions, else -inf."""
        positions = torch.arange(self.tables.shape[1] * self.block_size, device=self.tables.device)
        hidden = (positions < self.visible[:, :1]) | (positions >= self.visible[:, 1:])
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.tables.device)
        return mask.masked_fill_(hidden, -torch.inf)[:, None, None]


@dataclass(frozen=True)
class PrefillChunk:
    """One sequence's chunk of its prompt."""

    start: int  # index among the step's tokens
    end: int
    table: torch.Tensor  # (num_blocks,), all blocks that the chunk sees
    visible: torch.Tensor  # (tokens, 2), the first position in the table's blocks that each token sees, and the end
    sees_only_itself: bool  # causally, with nothing before it
    block_size: int
    dtype: torch.dtype

    @cached_property
    def slots(self) -> torch.Tensor:
        """Where the tokens that the chunk sees lie in the cache, for the CPU's kernel."""
        return prompt_attention.slots_of(self.table, self.block_size)

    @cached_property
    def mask(self) -> torch.Tensor:
        """The mask, (tokens, positions): 0 for visible positions, else -inf."""
        positions = torch.arange(len(self.table) * self.block_size, device=self.table.device)
        hidden = (positions < self.visible[:, :1]) | (positions >= self.visible[:, 1:])
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.table.device)
        return mask.masked_fill_(hidden, -torch.inf)


def visible_of(
    start: int, num_tokens: int, window: int | None, images: Sequence[tuple[int, int]], reaches_back: bool = True
) -> torch.Tensor:
    """Returns the range of positions, as first and end, that each of `num_tokens` tokens from `start` on sees: (tokens,
    2).

    A token sees itself and all before it, or as many of these as the window holds. A token of an image (start, end)
    also sees what follows in the image and, if it reaches back, what is in the image before the window.
    """
    ends = torch.arange(start + 1, start + num_tokens + 1)
    firsts = torch.zeros_like(ends) if window is None else (ends - window).clamp(min=0)
    for image_start, image_end in images:
        tokens = slice(max(image_start - start, 0), image_end - start)
        ends[tokens] = image_end
        if reaches_back:
            firsts[tokens].clamp_(max=image_start)
    return torch.stack([firsts, ends], dim=1)


@dataclass(frozen=True)
class GroupAttention:
    """What the layers of one group share in a step."""

    slots: torch.Tensor  # (tokens,): block * block_size + offset, where a token's key and value go
    decodes: tuple[DecodeGroup, ...]
    prefills: tuple[PrefillChunk, ...]
    flash: FlashBatch | None = None  # on a GPU: the step in one kernel call, but for images if it cannot see ahead

    def to(self, device: torch.device) -> "GroupAttention":
        """Returns a copy whose tensors are on `device`."""
        return GroupAttention(
            slots=self.slots.to(device),
            decodes=tuple(replace(d, tables=d.tables.to(device), visible=d.visible.to(device)) for d in self.decodes),
            prefills=tuple(replace(p, table=p.table.to(device), visible=p.visible.to(device)) for p in self.prefills),
            flash=None if self.flash is None else self.flash.to(device),
        )


@dataclass
class StepAttention:
    """What a step hands to attention: the cache, and each group's tensors, copied to each device that needs them."""

    cache: KVCache
    groups: list[GroupAttention]
    flash: Kernel | None = None
    states: StateStep | None = None  # of recurrent layers, if the model has any
    _copies: dict[tuple[int, torch.device], GroupAttention] = field(default_factory=dict)

    def of_layer(self, layer: int, device: torch.device) -> GroupAttention:
        """Returns the tensors of a layer's group, on the device."""
        group = self.cache.group_of[layer]
        if (group, device) not in self._copies:
            self._copies[group, device] = self.groups[group].to(device)
        return self._copies[group, device]


@dataclass(frozen=True)
class Call:
    """What a layer hands to attention; shapes as in `paged_attention`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    window: int | None
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None = None  # (heads,), logits that join the softmax and have no value

    @property
    def spec(self) -> AttentionSpec:
        _, num_kv_heads, _, key_dim = self.key.shape
        return AttentionSpec(
            num_kv_heads=num_kv_heads,
            key_dim=key_dim,
            value_dim=self.value.shape[3],
            window=self.window,
            dtype=self.key.dtype,
            device=self.key.device,
            softcap=self.softcap,
            group=self.query.shape[1] // num_kv_heads,
            has_sinks=self.sinks is not None,
        )

    @property
    def stand_in(self) -> torch.Tensor:
        """The values themselves, in the shape of attention's output."""
        return self.value.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1).transpose(1, 2)

    @property
    def output(self) -> torch.Tensor:
        """Attention's output, where the tokens are the first ones of one sequence."""
        group = self.query.shape[1] // self.key.shape[1]
        key, value = (part.repeat_interleave(group, dim=1) for part in (self.key, self.value))
        distances = torch.arange(self.key.shape[2], device=self.key.device)
        distances = distances[:, None] - distances
        hidden = (distances < 0) | (distances >= (self.window or len(distances)))
        mask = torch.zeros(hidden.shape, dtype=self.query.dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        sinks = None if self.sinks is None else self.sinks[:, None, None]
        return _attend(self.query, key, value, mask, self.scaling, self.softcap, sinks).transpose(1, 2)


@dataclass
class AttentionRecorder:
    """Replaces StepAttention in a first forward, and records what each layer asks for or remembers."""

    computes: bool = False  # whether attention is computed, or a stand-in given
    calls: dict[int, Call] = field(default_factory=dict)
    recurrent: dict[int, RecurrentSpec] = field(default_factory=dict)

    @property
    def shared(self) -> dict[int, int]:
        """The layers that were given the keys and values of an earlier layer, each with that layer."""
        shared = {}
        for layer, call in self.calls.items():
            owners = (other for other, its in self.calls.items() if its.key is call.key and its.window == call.window)
            if (owner := next(owners)) != layer:
                shared[layer] = owner
        return shared


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    step: StepAttention | AttentionRecorder | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Writes keys and values to the cache and computes attention over it.

    query (1, heads, tokens, dim), key and value (1, kv_heads, tokens, dim) -> (1, tokens, heads, value_dim). `s_aux`,
    (heads,), are attention sinks. `step` travels through the model's forward as a keyword argument, as transformers'
    own paged cache does.
    """
    assert step is not None, "the model does not pass keyword arguments on to its attention"
    layer = cast(int, module.layer_idx)
    scaling = scaling or query.shape[-1] ** -0.5
    # exit 1: a first forward, which only records the layers
    if isinstance(step, AttentionRecorder):
        _refuse_what_is_not_computed(others)
        # the cache has one place for a layer's keys and values
        assert layer not in step.calls, "some of their layers call the attention twice"
        step.calls[layer] = Call(
            query=query,
            key=key,
            value=value,
            window=sliding_window,
            scaling=scaling,
            softcap=softcap,
            sinks=s_aux,
        )
        return step.calls[layer].output if step.computes else step.calls[layer].stand_in, None
    group, cache = step.of_layer(layer, key.device), step.cache.layer(layer)
    keys, values = cache.keys, cache.values  # (num_blocks, block_size, kv_heads, dim)
    if layer not in step.cache.shared:
        cache.write(key[0].transpose(0, 1), value[0].transpose(0, 1), group.slots)
    num_kv_heads, value_dim = values.shape[2:]
    query = cache.scaled(query[0].view(num_kv_heads, -1, *query.shape[2:]))  # (kv_heads, group, tokens, dim)
    flat = query.flatten(0, 1).transpose(0, 1)  # (tokens, heads, dim)
    attend = partial(flash.attend, scaling=scaling, softcap=softcap, scales=cache.scales, sinks=s_aux)
    if step.flash is not None and group.flash is not None and not group.prefills:
        # exit 2: on a GPU one kernel computes the whole step
        return attend(step.flash, flat, keys, values, group.flash)[None], None
    output = query.new_empty(query.shape[2], num_kv_heads, query.shape[1], value_dim)  # tokens first
    if step.flash is not None and group.flash is not None:  # chunks with images follow below, in torch
        tokens = slice(0, group.flash.num_tokens)
        result = attend(step.flash, flat[tokens], keys, values, group.flash)
        output[tokens] = result.view_as(output[tokens])
    if softcap is None and s_aux is None and attention_kernels.can_attend(query.dtype, keys, values):
        # exit 3: on a CPU with kernels, they read the cache in place
        attend_with_kernels(query, cache, group, scaling, output)
        return output.flatten(1, 2)[None], None
    sinks = None if s_aux is None else s_aux.view(num_kv_heads, -1, 1)  # (kv_heads, group, 1)
    for decode in group.decodes:
        rows = query[:, :, decode.start : decode.end].permute(2, 0, 1, 3)  # (rows, kv_heads, group, dim)
        visible = cache.gather(decode.tables.flatten(), decode.end - decode.start, query.dtype)
        output[decode.start : decode.end] = _attend(rows, *visible, decode.mask, scaling, softcap, sinks)
    for chunk in group.prefills:
        part = query[:, :, chunk.start : chunk.end]  # (kv_heads, group, tokens, dim)
        if chunk.sees_only_itself and not cache.is_int8:  # where a key counts as it was rounded
            tokens = slice(chunk.start, chunk.end)
            k, v, mask = key[0, :, tokens], value[0, :, tokens], None
        else:
            gathered = cache.gather(chunk.table, 1, query.dtype)
            k, v, mask = gathered[0][0], gathered[1][0], chunk.mask
        shape = (-1, query.shape[1], -1, -1)  # the heads of a group share one key: no copy
        k, v, own = k[:, None].expand(shape), v[:, None].expand(shape), None if sinks is None else sinks[..., None]
        result = _attend(part, k, v, mask, scaling, softcap, own)
        output[chunk.start : chunk.end] = result.permute(2, 0, 1, 3)
    # exit 4: everything else, in torch over gathered blocks: soft caps, sinks, images, devices without a kernel
    return output.flatten(1, 2)[None], None


def attend_with_kernels(
    query: torch.Tensor, cache: LayerCache, group: GroupAttention, scaling: float, output: torch.Tensor
) -> None:
    """Computes a step with the CPU's kernels, and writes output (tokens, kv_heads, group, dim).

    query: (kv_heads, group, tokens, dim), `scaled`, whose keys and values are in the cache already.
    """
    keys, values, scales = cache.keys, cache.values, cache.scales
    for decode in group.decodes:
        tokens = slice(decode.start, decode.end)
        attention_kernels.attend(
            query[:, :, tokens], keys, values, decode.tables, decode.visible, scaling, output[tokens], scales
        )
    for chunk in group.prefills:
        tokens = slice(chunk.start, chunk.end)
        prompt_attention.attend_chunk(
            query[:, :, tokens], keys, values, chunk.slots, chunk.visible, scaling, output[tokens], scales=scales
        )


def _refuse_what_is_not_computed(arguments: dict[str, Any]) -> None:
    """Raises AssertionError for position biases, caps of another name and the like: without them answers are wrong."""
    unknown = [
        name
        for name, value in arguments.items()
        if name not in COMPUTED and (isinstance(value, torch.Tensor) or value not in (None, False, 0))
    ]
    assert not unknown, f"their attention takes the unknown arguments {', '.join(sorted(unknown))}"
    assert arguments.get("is_causal") is not False, "their attention is not causal"


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Computes attention of (a, b, queries, dim) over (a, b, visible, dim); it is causal if there is no mask. sinks:
    see `flash.softmax`."""
    if softcap is not None or sinks is not None:
        return _attend_in_steps(query, key, value, mask, scaling, softcap, sinks)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling)


def _attend_in_steps(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Computes what torch's fused attention lacks: Gemma 2's scores, which go through softcap * tanh(score / softcap),
    and the sinks of gpt-oss. A long prompt's queries take turns, so that their scores do not fill the memory."""
    if mask is None:
        shape = (query.shape[2], key.shape[2])
        mask = torch.full(shape, -torch.inf, dtype=torch.float32, device=query.device).triu(1)
    size = max(1, MAX_SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    results = []
    for start in range(0, query.shape[2], size):
        rows = slice(start, start + size)
        scores = torch.matmul(query[:, :, rows], key.transpose(-1, -2)).float() * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores += mask if mask.shape[-2] == 1 else mask[..., rows, :]
        own = sinks if sinks is None or sinks.shape[-2] == 1 else sinks[..., rows, :]
        results.append(torch.matmul(flash.softmax(scores, own).to(value.dtype), value))
    return torch.cat(results, dim=2)


AttentionInterface.register(NAME, paged_attention)
