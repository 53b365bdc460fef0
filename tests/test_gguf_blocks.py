import pytest
import torch
from gguf import GGMLQuantizationType, quants
from gguf_files import random_blocks

from engine.cpu.gguf_blocks import BLOCK_BYTES, decode
from engine.cpu.packed_weight import pack


@pytest.mark.parametrize("name", BLOCK_BYTES)
def test_blocks_are_decoded_as_the_gguf_library_does(name: str) -> None:
    data = random_blocks(name, 5, 3)
    expected = torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[name]))
    assert torch.equal(decode(torch.from_numpy(data), name).dequantize(), expected)


@pytest.mark.parametrize("name", BLOCK_BYTES)
def test_packing_loses_nothing(name: str) -> None:
    codes = decode(torch.from_numpy(random_blocks(name, 32, 2)), name)
    assert torch.equal(pack(codes).dequantize(), codes.dequantize())
