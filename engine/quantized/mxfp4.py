"""MXFP4: numbers of 4 bits with an exponent (E2M1), and for each 32 of them a scale that is a power of two.

Source: OCP Microscaling Formats, v1.0, sections 5.3.3 and 6.3. All such numbers are multiples of a half, so that twice
them are whole numbers, from -12 to 12, which 5 bits hold.
"""

import torch

from engine.cpu.packed_weight import GROUP
from engine.quantized.weights import Groups, Integers, powers_of_two, unpacked

BITS, ZERO = 5, 16
_MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)  # twice the numbers that the lower three bits stand for; the highest is a sign
TWICE = torch.tensor([ZERO + m for m in _MAGNITUDES] + [ZERO - m for m in _MAGNITUDES], dtype=torch.uint8)


def read(data: torch.Tensor, scales: torch.Tensor) -> Integers:
    """Returns a weight. data: (rows, columns / 2) uint8, the first of two numbers in the lower bits. scales: (rows,
    columns / 32) uint8."""
    codes = TWICE[unpacked(data, 4).int()]
    is_used = (codes != ZERO).view(len(codes), -1, GROUP).any(-1)
    values = torch.where(is_used, powers_of_two(scales) / 2, 0.0)  # the scale of nothing but zeros may be any number
    zeros = torch.full(values.shape, ZERO, dtype=torch.int32)
    return Integers(BITS, codes, values, zeros, Groups.even(codes.shape[1], values.shape[1], GROUP))
