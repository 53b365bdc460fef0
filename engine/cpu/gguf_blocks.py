"""Reads the blocks of GGUF's quantised tensors as Codes, bit by bit. It knows no files and no models.

A further type is a row of BLOCK_BYTES and of _TYPES, and the function that reads its block.
Source: the structures of ggml-common.h, https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h.
"""

from collections.abc import Callable

import torch

from engine.cpu.packed_weight import Q4_K, Q5_K, Q6_K, Codes, Format

BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}

Blocks = torch.Tensor  # (rows, blocks, bytes) uint8
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # of Codes, of each block


def decode(data: torch.Tensor, type_name: str) -> Codes:
    """Reads a tensor. Scales and minimums are float32 or, in super-blocks, int8.

    data: (rows, bytes) uint8. type_name: one of BLOCK_BYTES.
    """
    blocks = data.view(data.shape[0], -1, BLOCK_BYTES[type_name])
    fmt, read = _TYPES[type_name]
    codes, scales, minimums, supers = read(blocks)
    rows = data.shape[0]
    flat = None if minimums is None else minimums.reshape(rows, -1)
    return Codes(fmt, codes.reshape(rows, -1).contiguous(), scales.reshape(rows, -1), flat, supers)


def _halfs(blocks: Blocks, offset: int) -> torch.Tensor:
    """Reads the float16 at each block's byte `offset`: (rows, blocks, 1) float32."""
    return blocks[..., offset : offset + 2].contiguous().view(torch.float16).float()


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """Splits bytes into their low halves, then their high ones."""
    return torch.cat([data & 15, data >> 4], dim=-1)


def _fifth_bits(data: torch.Tensor) -> torch.Tensor:
    """Spreads the bits of (..., 4) bytes, of which bit i belongs to code i, to (..., 32), each 0 or 16."""
    bits = data[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(-2) << 4


def _q4_0(blocks: Blocks) -> Parts:
    return _nibbles(blocks[..., 2:]), _halfs(blocks, 0), None, None


def _q4_1(blocks: Blocks) -> Parts:
    return _nibbles(blocks[..., 4:]), _halfs(blocks, 0), _halfs(blocks, 2), None


def _q5_0(blocks: Blocks) -> Parts:
    return _nibbles(blocks[..., 6:]) | _fifth_bits(blocks[..., 2:6]), _halfs(blocks, 0), None, None


def _q5_1(blocks: Blocks) -> Parts:
    return _nibbles(blocks[..., 8:]) | _fifth_bits(blocks[..., 4:8]), _halfs(blocks, 0), _halfs(blocks, 2), None


def _q8_0(blocks: Blocks) -> Parts:
    return blocks[..., 2:] ^ 128, _halfs(blocks, 0), None, None  # the signed byte plus 128


def _k_scales(blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reads the scales and minimums of eight groups, of 6 bits, packed into 12 bytes, and their factors. What is called
    a minimum there is subtracted."""
    packed = blocks[..., 4:16]
    low, middle, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], dim=-1)
    minimums = torch.cat([middle & 63, (high >> 4) | (middle >> 6 << 4)], dim=-1)
    supers = torch.cat([_halfs(blocks, 0), -_halfs(blocks, 2)], dim=-1)
    return scales.view(torch.int8), minimums.view(torch.int8), supers


def _q4_k(blocks: Blocks) -> Parts:
    pairs = blocks[..., 16:].unflatten(-1, (4, 32))  # the nibbles of a byte belong to neighbouring groups
    return _nibbles(pairs).flatten(-2), *_k_scales(blocks)


def _q5_k(blocks: Blocks) -> Parts:
    low = _nibbles(blocks[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(-3, -2)  # (..., 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    high = blocks[..., None, 16:48] >> shifts & 1
    return (low | high << 4).flatten(-2), *_k_scales(blocks)


def _q6_k(blocks: Blocks) -> Parts:
    """Reads a block of two halves of 128 codes; of each, 64 bytes have the low nibbles and 32 the upper two bits."""
    low = blocks[..., :128].unflatten(-1, (2, 64))
    low = _nibbles(low).unflatten(-1, (4, 32))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = blocks[..., 128:192].unflatten(-1, (2, 1, 32)) >> shifts & 3
    scales = blocks[..., 192:208].contiguous().view(torch.int8)
    return (low | high << 4).flatten(-3), scales, None, _halfs(blocks, 208)


_TYPES: dict[str, tuple[Format, Callable[[Blocks], Parts]]] = {
    "Q4_0": (Format(4, offset=8), _q4_0),
    "Q4_1": (Format(4, has_minimum=True), _q4_1),
    "Q5_0": (Format(5, offset=16), _q5_0),
    "Q5_1": (Format(5, has_minimum=True), _q5_1),
    "Q8_0": (Format(8, offset=128), _q8_0),
    "Q4_K": (Q4_K, _q4_k),
    "Q5_K": (Q5_K, _q5_k),
    "Q6_K": (Q6_K, _q6_k),
}
