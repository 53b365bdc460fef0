"""AWQ: codes of eight outputs share a word, even ones first. Lin et al. 2023, https://arxiv.org/abs/2306.00978.

The order is that of AutoAWQ's "gemm": https://github.com/casper-hansen/AutoAWQ/blob/main/awq/utils/packing_utils.py.
"""

from collections.abc import Mapping
from typing import Any

import torch

from engine.quantized.layout import Layout, Parts
from engine.quantized.weights import Groups, Integers, unpacked
from errors import ModelLoadError

BITS = 4
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where a word has the code of each of its eight outputs


def layouts(scheme: Mapping[str, Any]) -> list[Layout]:
    version, bits = str(scheme.get("version", "gemm")).lower(), scheme.get("bits", BITS)
    if version != "gemm" or bits != BITS or scheme.get("backend", "autoawq") != "autoawq":
        raise ModelLoadError(
            f"Its AWQ weights have {bits} bits in the order {version!r}: take a checkpoint of {BITS} bits in the "
            "order gemm."
        )
    return [Layout(".qweight", (".qzeros", ".scales"), _read, bits=BITS)]


def _read(parts: Parts) -> Integers:
    """qweight: (inputs, outputs / 8). qzeros: (groups, outputs / 8). scales: (groups, outputs)."""
    codes, zeros, scales = _ordered(parts[".qweight"]), _ordered(parts[".qzeros"]), parts[".scales"]
    groups = Groups.even(len(codes), len(scales))
    return Integers(BITS, codes.T.contiguous(), scales.float().T, zeros.int().T, groups)


def _ordered(words: torch.Tensor) -> torch.Tensor:
    eights: torch.Tensor = unpacked(words, BITS).unflatten(1, (-1, len(PLACES)))
    return eights[..., PLACES].flatten(1)
