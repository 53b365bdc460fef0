"""Pixels are those of transformers' processors with torchvision, which is not installed here: their hashes were."""

from hashlib import blake2b
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vision.image_processors import Gemma4ImageProcessor, resizing

# With torchvision 0.28, by processor, for each of the sizes
HASHES = {
    "gemma3": ["ff250ca6a668", "f5b260e0e40e", "127826280604", "f24b48576156", "2feea34825a5"],
    "gemma4": ["9727dbaf09bc", "c6a84fd4e965", "e85087505503", "54a52fcc3765", "caa333b6c9fd"],
    "gemma4_unified": ["3872e11b4d75", "b6562c717719", "ecb0bc08c595", "54a52fcc3765", "4fbde6e2e4ef"],
    "qwen": ["a544b0646348", "9508c8deaa3b", "3a3b30e4a889", "dd3d146ca8f0", "6bda09587d3a"],
}
SIZES = ((640, 480), (1000, 300), (33, 77), (1, 1), (90, 700))


def sample(width: int, height: int) -> Image.Image:
    """Returns noise, in which a difference of filters shows most."""
    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(width), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def digest(pixels: torch.Tensor) -> str:
    """Hashes pixels as bytes; what was subtracted from them, or padded, makes no difference to that."""
    levels = (pixels - pixels.min()) * 255 / (pixels.max() - pixels.min()).clamp(min=1e-6)
    return blake2b(levels.round().to(torch.uint8).numpy().tobytes(), digest_size=6).hexdigest()


OURS: dict[str, Any] = {
    "gemma3": resizing(Gemma3ImageProcessorPil)(),
    "gemma4": Gemma4ImageProcessor(),
    "gemma4_unified": Gemma4ImageProcessor(patch_size=48, pooling_kernel_size=1),
    "qwen": resizing(Qwen2VLImageProcessorPil)(),
}


@pytest.mark.parametrize("name", OURS)
def test_pixels_are_those_of_torchvision(name: str) -> None:
    hashes = [digest(OURS[name](sample(*size), return_tensors="pt")["pixel_values"]) for size in SIZES]
    assert hashes == HASHES[name]


@pytest.mark.parametrize(
    ("plain", "name"), [(Gemma4ImageProcessorPil(), "gemma4"), (Qwen2VLImageProcessorPil(), "qwen")]
)
def test_pillow_alone_gives_other_pixels(plain: Any, name: str) -> None:
    """That the comparison can fail."""
    assert digest(plain(sample(640, 480), return_tensors="pt")["pixel_values"]) != HASHES[name][0]
