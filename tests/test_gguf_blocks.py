import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from engine.cpu.gguf_blocks import BLOCK_BYTES, decode
from engine.cpu.packed_weight import pack


def random_blocks(name: str, rows: int, num_blocks: int) -> numpy.ndarray:
    """Any bytes are codes, but the float16 numbers among them must be finite."""
    rng = numpy.random.default_rng(0)
    data = rng.integers(0, 256, (rows, num_blocks, BLOCK_BYTES[name]), dtype=numpy.uint8)
    offsets = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(name, (0,))
    if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
        offsets = (0, 2)
    for offset in offsets:
        halfs = rng.uniform(0.001, 0.1, (rows, num_blocks)).astype(numpy.float16)
        data[:, :, offset : offset + 2] = halfs[..., None].view(numpy.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("name", BLOCK_BYTES)
def test_blocks_are_decoded_as_the_gguf_library_does(name: str) -> None:
    data = random_blocks(name, 5, 3)
    expected = torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[name]))
    assert torch.equal(decode(torch.from_numpy(data), name).dequantize(), expected)


@pytest.mark.parametrize("name", BLOCK_BYTES)
def test_packing_loses_nothing(name: str) -> None:
    codes = decode(torch.from_numpy(random_blocks(name, 32, 2)), name)
    assert torch.equal(pack(codes).dequantize(), codes.dequantize())
