"""compressed-tensors: the format of LLM Compressor, in which each group of layers may have a scheme of its own.

Source: https://github.com/vllm-project/compressed-tensors, src/compressed_tensors/compressors.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from engine.quantized import mxfp4
from engine.quantized.layout import Layout, Parts
from engine.quantized.weights import Floats, Groups, Integers, StoredWeight, spread, unpacked
from errors import ModelLoadError

FORMATS = (
    *(None, "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"),
    *("mxfp4-pack-quantized", "mxfp8-quantized"),
)
Block = tuple[int | None, int | None]


def layouts(scheme: Mapping[str, Any]) -> list[Layout]:
    for name in _formats(scheme):
        if name not in FORMATS:
            raise ModelLoadError(
                f"Its weights are in the format {name}, which is not read: take a checkpoint in one of "
                f"{', '.join(filter(None, FORMATS))}."
            )
    if scheme.get("transform_config"):
        raise ModelLoadError("Its weights are rotated (transform_config), which is not read: take another checkpoint.")
    block = _block(scheme)
    return [
        Layout(
            ".weight_packed",
            (".weight_scale", ".weight_shape"),
            partial(_read_packed, block),
            (".weight_zero_point", ".weight_g_idx"),
            bits=4,
        ),
        Layout(".weight_packed", (".weight_scale",), _read_mxfp4, bits=4, more_bits=1),
        Layout(".weight", (".weight_scale",), partial(_read_plain, block), (".weight_zero_point",)),
    ]


def _groups(scheme: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [group for group in (scheme.get("config_groups") or {}).values() if isinstance(group, Mapping)]


def _formats(scheme: Mapping[str, Any]) -> Iterator[str | None]:
    yield scheme.get("format")
    yield (scheme.get("sparsity_config") or {}).get("format")
    yield from (group.get("format") for group in _groups(scheme))


def _block(scheme: Mapping[str, Any]) -> Block:
    """Returns rows and columns of a block, where a scale has one."""
    blocks = [(group.get("weights") or {}).get("block_structure") for group in _groups(scheme)]
    rows, columns = next(filter(None, blocks), (None, None))
    return rows, columns


def _read_packed(block: Block, parts: Parts) -> Integers:
    """weight_packed: (rows, columns * bits / 32). weight_zero_point: (rows * bits / 32, groups)."""
    words, (rows, columns) = parts[".weight_packed"], parts[".weight_shape"].tolist()
    bits = words.shape[1] * 32 // columns
    codes = unpacked(words, bits)[:, :columns]
    scales, groups = _scales(parts, (rows, columns), (None, None))
    zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.int32)
    if ".weight_zero_point" in parts:
        zeros = unpacked(parts[".weight_zero_point"].T, bits)[:, :rows].T.int()
    return Integers(bits, codes.contiguous(), scales, zeros, groups)


def _read_mxfp4(parts: Parts) -> Integers:
    return mxfp4.read(parts[".weight_packed"], parts[".weight_scale"])


def _read_plain(block: Block, parts: Parts) -> StoredWeight:
    """weight: (rows, columns) int8, or a number of 8 bits."""
    codes = parts[".weight"]
    scales, groups = _scales(parts, tuple(codes.shape), block)
    if codes.dtype != torch.int8:
        return Floats(codes, scales, groups)
    zeros = torch.zeros(scales.shape, dtype=torch.int32)
    if ".weight_zero_point" in parts:
        zeros = spread(parts[".weight_zero_point"], tuple(codes.shape), block)[0].int()
    return Integers(8, (codes.short() + 128).to(torch.uint8), scales, zeros + 128, groups)


def _scales(parts: Parts, shape: tuple[int, ...], block: Block) -> tuple[torch.Tensor, Groups]:
    scales, groups = spread(parts[".weight_scale"], shape, block)
    index = parts.get(".weight_g_idx")
    return scales, groups if index is None or bool((index < 0).any()) else Groups(index.long())
