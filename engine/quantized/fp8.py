"""FP8: numbers of 8 bits with an exponent, and a scale for a tensor, each row, or each block of rows and columns.

Source: https://arxiv.org/abs/2412.19437, section 3.3; Qwen's and DeepSeek's checkpoints name the scales
`weight_scale_inv`, though weights are multiplied by them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from engine.quantized.layout import Layout, Parts
from engine.quantized.weights import Floats, StoredWeight, spread

SCALES = ("_scale_inv", "_scale")


def layouts(scheme: Mapping[str, Any]) -> list[Layout]:
    block = scheme.get("weight_block_size") or (None, None)
    return [Layout("", (scale,), partial(_read, scale, tuple(block)), target="") for scale in SCALES]


def _read(scale: str, block: tuple[int | None, int | None], parts: Parts) -> StoredWeight:
    codes = parts[""]
    values, groups = spread(parts[scale], tuple(codes.shape), block)
    return Floats(codes, values, groups)
