"""Random weights in every format that packed weights have on a GPU."""

import torch
from test_kernels import random_codes

from engine.cpu import gguf_blocks
from engine.cpu.packed_weight import E4M3, INT4, INT8, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Codes, Format

FORMATS = {
    "int8": INT8,
    "int4": INT4,
    "q2_k": Q2_K,
    "q3_k": Q3_K,
    "q4_k": Q4_K,
    "q5_k": Q5_K,
    "q6_k": Q6_K,
    "q4_0": Format(4, offset=8),
    "q5_0": Format(5, offset=16),
    "q5_1": Format(5, has_minimum=True),
    "iq4_nl": gguf_blocks.IQ4_NL,
    "iq4_xs": gguf_blocks.IQ4_XS,
    "e4m3": E4M3,
    "gptq-2": Format(2, offset=2),
    "gptq-8": Format(8, offset=128, has_minimum=True),
}


def codes_of(fmt: Format, rows: int, columns: int, device: torch.device, columns_per_scale: int = 0) -> Codes:
    """Returns a random weight. columns_per_scale: columns that share a scale, if more than a group."""
    torch.manual_seed(rows + columns)
    weight = random_codes(fmt, rows, columns)
    codes = weight.codes
    if fmt.is_float:
        codes = codes.masked_fill(codes & 127 == 127, 1)  # which is not a number
    parts = [codes, weight.scales, weight.minimums, weight.supers]
    if columns_per_scale:
        times = columns_per_scale // fmt.group
        parts[1:3] = [None if p is None else p[:, ::times].repeat_interleave(times, dim=1) for p in parts[1:3]]
    codes, scales, minimums, supers = (None if part is None else part.to(device) for part in parts)
    assert codes is not None and scales is not None
    return Codes(fmt, codes, scales, minimums, supers)
