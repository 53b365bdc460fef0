"""Attention over the paged cache on GPUs, by torch's own flash attention for sequences of different lengths.

Which cache layouts and windows that kernel takes depends on the GPU and on torch's version, so it is tried, and its
result compared, before it is used: https://docs.pytorch.org/docs/stable/nn.attention.varlen.html.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import cast

import torch

from engine.kv_cache import LayerSpec

log = logging.getLogger(__name__)

Kernel = Callable[..., torch.Tensor]  # with the signature of `reference`
TOLERANCE = 0.02  # of the result's norm, in 16 bits


@dataclass(frozen=True)
class FlashBatch:
    """What the layers of one group share in a step: its sequences, each with one or more neighbouring queries."""

    starts: torch.Tensor  # (sequences + 1,) int32, where each one's queries begin among the step's tokens
    tables: torch.Tensor  # (sequences, width) int32, blocks from the first that its first query sees
    lengths: torch.Tensor  # (sequences,) int32, tokens in these blocks, the queries included
    longest_query: int
    longest: int  # tokens that a table's row can hold
    num_tokens: int  # of the step's, from the first on
    window: int | None

    def to(self, device: torch.device) -> "FlashBatch":
        starts, tables, lengths = (t.to(device) for t in (self.starts, self.tables, self.lengths))
        return replace(self, starts=starts, tables=tables, lengths=lengths)


def attend(
    kernel: Kernel, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: FlashBatch, scaling: float
) -> torch.Tensor:
    """query: (tokens, heads, dim); keys, values: (blocks, block_size, kv_heads, dim) -> (tokens, heads, dim)."""
    return kernel(
        query,
        keys,
        values,
        batch.starts,
        None,
        batch.longest_query,
        batch.longest,
        scale=scaling,
        window_size=(-1 if batch.window is None else batch.window - 1, 0),
        enable_gqa=True,
        seqused_k=batch.lengths,
        block_table=batch.tables,
    )


def find(specs: Iterable[LayerSpec], block_size: int) -> Kernel | None:
    """torch's kernel, if this device computes all these layers with it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    kernel = cast(Kernel, varlen_attn)
    can_use = all(spec.can_use_flash and agrees(kernel, spec, block_size) for spec in set(specs))
    return kernel if can_use else None


def agrees(kernel: Kernel, spec: LayerSpec, block_size: int) -> bool:
    """Whether it gives what `reference` gives, for one query and for several, in blocks out of order."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(spec.dtype).to(spec.device)

    lengths = [2 * block_size + 3, block_size, 3 * block_size]
    num_queries = [1, block_size, 2]
    starts = torch.tensor([0, *num_queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    tables = torch.tensor([[4, 1, 6], [0, 0, 0], [3, 5, 2]], dtype=torch.int32)
    batch = FlashBatch(
        starts,
        tables,
        torch.tensor(lengths, dtype=torch.int32),
        max(num_queries),
        3 * block_size,
        sum(num_queries),
        None if spec.window is None else min(spec.window, block_size + 2),
    ).to(spec.device)
    query = numbers(sum(num_queries), 2 * spec.num_kv_heads, spec.key_dim)
    keys, values = (numbers(7, block_size, spec.num_kv_heads, spec.key_dim) for _ in "kv")
    expected = attend(reference, query, keys, values, batch, spec.key_dim**-0.5).float()
    try:
        actual = attend(kernel, query, keys, values, batch, spec.key_dim**-0.5).float()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        log.info("no flash attention for blocks of %d tokens: %s", block_size, str(error).splitlines()[0])
        return False
    return bool((actual - expected).norm() <= TOLERANCE * expected.norm())


def reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    _: None,
    longest_query: int,
    longest: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """What the kernel is to compute, one sequence after the other, in float32."""
    output = torch.empty_like(query)
    for number, (start, end) in enumerate(zip(starts.tolist(), starts[1:].tolist(), strict=False)):
        length = int(seqused_k[number])
        blocks = block_table[number].long()
        group = query.shape[1] // keys.shape[2]
        key, value = (c[blocks].flatten(0, 1)[:length].float().repeat_interleave(group, dim=1) for c in (keys, values))
        positions = torch.arange(length, device=query.device)
        own = positions[length - (end - start) :, None]
        hidden = positions > own
        if window_size[0] >= 0:
            hidden |= positions < own - window_size[0]
        scores = torch.einsum("qhd,khd->hqk", query[start:end].float(), key) * scale
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        output[start:end] = torch.einsum("hqk,khd->qhd", weights, value).to(query.dtype)
    return output
