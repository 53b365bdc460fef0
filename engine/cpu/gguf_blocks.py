"""Reads the blocks of GGUF's quantised tensors as Codes, bit by bit. It knows no files and no models.

A further type is a row of BLOCK_BYTES and of _TYPES, and the function that reads its block.
Source: the structures of ggml-common.h, https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h.
"""

from collections.abc import Callable

import torch

from engine.cpu.packed_weight import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Codes, Format

BLOCK_BYTES = {
    **{"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "IQ4_NL": 18},
    **{"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210, "IQ4_XS": 136},
}
NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # what IQ4's codes stand for
IQ4_NL = Format.of_table(NON_LINEAR)
IQ4_XS = Format.of_table(NON_LINEAR, has_super_blocks=True)

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Blocks = torch.Tensor  # (rows, blocks, bytes) uint8
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]  # of Codes, of each block


def read(data: torch.Tensor, type_name: str) -> Codes | torch.Tensor:
    """Reads a tensor, (rows, any), of one of BLOCK_BYTES or FLOATS."""
    return data.view(FLOATS[type_name]) if type_name in FLOATS else decode(data, type_name)


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


def _pairs_of_bits(data: torch.Tensor) -> torch.Tensor:
    """Splits two halves of 32 bytes into their pairs of bits, the lowest of all bytes first: 256 codes."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    pairs: torch.Tensor = data.unflatten(-1, (2, 1, 32)) >> shifts & 3
    return pairs.flatten(-3)


def _q2_k(blocks: Blocks) -> Parts:
    """Reads a block of 16 groups, whose scales and minimums are the halves of a byte."""
    factors = blocks[..., :16]
    supers = torch.cat([_halfs(blocks, 80), -_halfs(blocks, 82)], dim=-1)
    scales, minimums = (factors & 15).view(torch.int8), (factors >> 4).view(torch.int8)
    return _pairs_of_bits(blocks[..., 16:80]), scales, minimums, supers


def _q3_k(blocks: Blocks) -> Parts:
    """Reads a block of 16 groups; bit i of 32 bytes is the highest of the codes of groups 2 i and 2 i + 1. Of the
    scales, eight bytes have the low nibbles, and four the upper two bits."""
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    high = (blocks[..., None, :32] >> shifts & 1).flatten(-2)
    upper = blocks[..., None, 104:108] >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None] & 3
    scales = _nibbles(blocks[..., 96:104]) | upper.flatten(-2) << 4
    return _pairs_of_bits(blocks[..., 32:96]) | high << 2, (scales.view(torch.int8) - 32), None, _halfs(blocks, 108)


def _iq4_xs(blocks: Blocks) -> Parts:
    """Reads a block of eight groups; of the scales, four bytes have the low nibbles, and two the upper two bits."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    high = (blocks[..., 2:4, None] >> shifts & 3).flatten(-2)
    low = torch.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], dim=-1).flatten(-2)
    codes = _nibbles(blocks[..., 8:].unflatten(-1, (8, 16))).flatten(-2)
    return codes, (low | high << 4).view(torch.int8) - 32, None, _halfs(blocks, 0)


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
    "IQ4_NL": (IQ4_NL, _q4_0),
    "Q2_K": (Q2_K, _q2_k),
    "Q3_K": (Q3_K, _q3_k),
    "IQ4_XS": (IQ4_XS, _iq4_xs),
    "Q4_K": (Q4_K, _q4_k),
    "Q5_K": (Q5_K, _q5_k),
    "Q6_K": (Q6_K, _q6_k),
}
