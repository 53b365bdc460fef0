"""Attention over the paged cache on GPUs, by kernels in Triton: decodes and chunks of prompts in one launch.

They compute what `flash.reference` computes, by softmax in passes (Dao, FlashAttention-2, 2023). A tile holds the
heads that share a key and as many queries as fit. If there are too few tiles to fill the device, the keys of each are
divided into parts, whose results a second kernel joins (Flash-Decoding, 2023). Nothing is read back from the device,
so that a step can be recorded. This module needs Triton, which torch installs on GPUs.
"""

import functools
from dataclasses import dataclass, replace

import torch
import triton

from engine.attention import older_gpus
from engine.attention.paged_kernels import attend_kernel, join_kernel
from engine.gpu.half_layers import AMPERE
from engine.gpu.triton_tools import TURING, is_ampere, num_processors, on_its_device, precision, widens
from engine.layer_spec import AttentionSpec

LOG2E = 1.4426950408889634
FEW_PARTS, MAX_PARTS = 8, 64
NO_WINDOW = 2**30  # tokens
PROGRAMS_PER_PROCESSOR = 4  # keys are divided into parts until there are so many
MIN_KEYS_PER_PART = 256


@dataclass(frozen=True)
class Tiles:
    """How one shape is computed; see `tiles_of`."""

    rows: int  # pairs of a query and a head; a power of two, at least 16
    keys: int  # keys that a pass reads; a power of two, at least 16
    warps: int
    stages: int  # passes whose keys are loaded ahead


# Bytes of a number -> elements of a head, padded -> its tiles. They need less than 99 KiB of shared memory, which the
# smaller GPUs from compute capability 8.0 on have, and keep their state in registers.
CHUNK_TILES = {  # for several queries of a sequence
    2: {
        64: Tiles(rows=128, keys=64, warps=4, stages=3),
        128: Tiles(rows=128, keys=64, warps=8, stages=3),
        256: Tiles(rows=64, keys=32, warps=8, stages=3),
        512: Tiles(rows=32, keys=32, warps=8, stages=3),
    },
    4: {
        64: Tiles(rows=64, keys=32, warps=4, stages=2),
        128: Tiles(rows=32, keys=32, warps=4, stages=2),
        256: Tiles(rows=16, keys=16, warps=4, stages=2),
        512: Tiles(rows=16, keys=16, warps=8, stages=1),
    },
}
DECODE_TILES = {  # for one query of a sequence
    2: {
        64: Tiles(rows=16, keys=128, warps=4, stages=3),
        128: Tiles(rows=16, keys=64, warps=4, stages=3),
        256: Tiles(rows=16, keys=32, warps=4, stages=3),
        512: Tiles(rows=16, keys=16, warps=4, stages=2),
    },
    4: {
        64: Tiles(rows=16, keys=64, warps=4, stages=3),
        128: Tiles(rows=16, keys=32, warps=4, stages=3),
        256: Tiles(rows=16, keys=16, warps=4, stages=2),
        512: Tiles(rows=16, keys=16, warps=8, stages=1),
    },
}


@on_its_device
def paged_attention(
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
    softcap: float | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    visible: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    num_parts: int | None = None,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """Computes attention over the paged cache; the signature is torch's `varlen_attn`, and more as in
    `flash.reference`.

    query (tokens, heads, dim), keys and values (blocks, block_size, kv_heads, dim) -> (tokens, heads, value dim).
    num_parts: the number of parts that each tile's keys are divided into. tiles: the tiles' sizes. None chooses both
    by shape and device.
    """
    num_tokens, num_heads, key_dim = query.shape
    _blocks, block_size, num_kv_heads, value_dim = values.shape
    group, num_sequences, is_decode = num_heads // num_kv_heads, len(seqused_k), longest_query == 1
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == block_table.stride(-1) == 1
    assert all(part is None or part.is_contiguous() for part in (*(scales or ()), visible, sinks))
    tiles = tiles or _tiles_for(query.device, max(key_dim, value_dim), query.element_size(), is_decode, group)
    queries = tiles.rows // group
    num_tiles = num_sequences if is_decode else num_tokens // queries + num_sequences
    if num_parts is None:
        num_parts = parts_of(num_tiles * num_kv_heads, longest, num_processors(query.device))
    output = query.new_empty(num_tokens, num_heads, value_dim)
    nothing = _nothing(query.device)
    partial = top = total = nothing
    key_scales, value_scales = scales or (nothing, nothing)
    if num_parts > 1:
        sizes = ((value_dim,), (), ())
        partial, top, total = (
            torch.empty(num_parts, num_tokens, num_heads, *size, dtype=torch.float32, device=query.device)
            for size in sizes
        )
    attend_kernel[num_tiles, num_kv_heads, num_parts](
        *(query, keys, values, output, partial, top, total, starts, seqused_k, block_table),
        *(key_scales, value_scales, nothing if visible is None else visible, nothing if sinks is None else sinks),
        scale * LOG2E if softcap is None else LOG2E,
        0.0 if softcap is None else 2 * scale / softcap,
        softcap or 0.0,
        NO_WINDOW if window_size[0] < 0 else window_size[0],
        *(num_parts, num_tokens, num_sequences),
        *(*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3], block_table.stride(0)),
        GROUP=group,
        BLOCK_SIZE=block_size,
        KEY_DIM=key_dim,
        KEY_PAD=_padded(key_dim),
        VALUE_DIM=value_dim,
        VALUE_PAD=_padded(value_dim),
        ROWS=tiles.rows,
        QUERIES=queries,
        KEYS=tiles.keys,
        IS_DECODE=is_decode,
        HAS_CAP=softcap is not None,
        HAS_SCALES=scales is not None,
        HAS_RANGES=visible is not None,
        HAS_SINKS=sinks is not None,
        PRECISION=precision(query.device),
        WIDENS=widens(query.dtype),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if num_parts > 1:
        join_kernel[num_tokens, num_heads](
            *(partial, top, total, output, num_parts, num_tokens),
            HEADS=num_heads,
            DIM=value_dim,
            PAD=_padded(value_dim),
            PARTS_PAD=FEW_PARTS if num_parts <= FEW_PARTS else MAX_PARTS,
            num_warps=4 if value_dim <= 256 else 8,
        )
    return output


def can_attend(spec: AttentionSpec) -> bool:
    """Returns whether the kernel can be tried for a layer: Triton's products need a GPU of compute capability 7.5 or
    more, and those of bfloat16 8.0. On a GPU of less than 8.0, a process of its own tries it first."""
    if spec.device.type != "cuda" or spec.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    if max(spec.key_dim, spec.value_dim) > max(CHUNK_TILES[spec.dtype.itemsize]):
        return False
    capability = torch.cuda.get_device_capability(spec.device)
    if capability >= AMPERE:
        return True
    return capability >= TURING and spec.dtype != torch.bfloat16 and older_gpus.ends_well(older_gpus.trial_of(spec))


def tiles_of(dim: int, num_bytes: int, is_decode: bool, group: int) -> Tiles:
    """Chooses the tiles for a shape. num_bytes: of a number; group: heads that share a key, which are in one tile."""
    tiles = (DECODE_TILES if is_decode else CHUNK_TILES)[num_bytes][max(64, triton.next_power_of_2(dim))]
    return replace(tiles, rows=max(tiles.rows, triton.next_power_of_2(group)))


def small_tiles_of(dim: int, num_bytes: int, is_decode: bool, group: int) -> Tiles:
    """Chooses tiles as `tiles_of` does, for GPUs that have 64 KiB of shared memory and load nothing ahead: the sums of
    a tile's rows and the keys of a pass take 16 KiB each, or what the smallest tiles take."""
    tiles, pad = tiles_of(dim, num_bytes, is_decode, group), max(64, triton.next_power_of_2(dim))
    rows = max(min(tiles.rows, 2**14 // (4 * pad)), triton.next_power_of_2(group), 16)
    return replace(tiles, rows=rows, keys=max(min(tiles.keys, 2**14 // (num_bytes * pad)), 16), stages=1)


def _tiles_for(device: torch.device, dim: int, num_bytes: int, is_decode: bool, group: int) -> Tiles:
    return (tiles_of if is_ampere(device) else small_tiles_of)(dim, num_bytes, is_decode, group)


def parts_of(num_programs: int, longest: int, num_processors: int) -> int:
    """Returns the number of parts that fills the device, of at least MIN_KEYS_PER_PART keys each."""
    enough = PROGRAMS_PER_PROCESSOR * num_processors // num_programs
    return max(1, min(enough, longest // MIN_KEYS_PER_PART, MAX_PARTS))


@functools.cache
def _nothing(device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.float32, device=device)


def _padded(dim: int) -> int:
    return max(16, int(triton.next_power_of_2(dim)))
