"""GPTQ: codes of neighbouring inputs share a word. Frantar et al. 2022, https://arxiv.org/abs/2210.17323.

The order is that of AutoGPTQ: https://github.com/AutoGPTQ/AutoGPTQ/blob/main/auto_gptq/nn_modules/qlinear/.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from engine.quantized.layout import Layout, Parts
from engine.quantized.weights import Groups, Integers, check_bits, unpacked
from errors import ModelLoadError

FORMATS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> what is added to the stored zeros
FOREIGN = ("is_marlin_format", "is_bitblas_format")


def layouts(scheme: Mapping[str, Any]) -> list[Layout]:
    name = str(scheme.get("checkpoint_format") or "gptq")
    if name not in FORMATS or any(scheme.get(flag) for flag in FOREIGN):
        raise ModelLoadError(
            f"Its GPTQ weights are in an order for one kind of GPU ({name}): take a checkpoint in the format gptq."
        )
    bits = int(scheme.get("bits", 4))
    check_bits(bits)
    read = partial(_read, bits, FORMATS[name], int(scheme.get("group_size", -1)))
    return [Layout(".qweight", (".scales",), read, (".qzeros", ".g_idx"), bits=bits)]


def _read(default_bits: int, added: int, group: int, parts: Parts) -> Integers:
    """qweight: (inputs * bits / 32, outputs). qzeros: (groups, outputs * bits / 32). scales: (groups, outputs).
    g_idx: (inputs,), the group of each."""
    words, scales, index = parts[".qweight"], parts[".scales"], parts.get(".g_idx")
    bits = default_bits if index is None else len(words) * 32 // len(index)
    codes = unpacked(words.T, bits)
    if ".qzeros" in parts:
        zeros = unpacked(parts[".qzeros"], bits).int() + added & (2**bits - 1)
    else:
        zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.int32)
    size = group if group > 0 and len(scales) > 1 else None
    groups = Groups.even(codes.shape[1], len(scales), size) if index is None else Groups(index.long())
    return Integers(bits, codes, scales.float().T, zeros[:, : scales.shape[1]].T, groups)
