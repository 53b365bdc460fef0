"""transformers' image processors for Pillow, which need no torchvision, with torchvision's way to resize.

Pillow rounds between rows and columns, so that its pixels differ by 2 of 255, and by 23 in noise. torchvision calls the
function of torch that is called here.
"""

from pathlib import Path
from typing import Any

import numpy
import torch
from PIL.Image import Resampling
from torch.nn.functional import interpolate
from transformers import AutoImageProcessor
from transformers.image_processing_backends import PilBackend
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    Gemma4ImageProcessorPil,
    get_aspect_ratio_preserving_size,
)

MODES = {Resampling.BILINEAR: "bilinear", Resampling.BICUBIC: "bicubic"}  # those that torch computes as torchvision


class _Resizing(PilBackend):
    """Stands behind a processor's class, whose `resize` may have chosen the size."""

    def resize(
        self, image: Any, size: Any, resample: Any = None, reducing_gap: int | None = None, **others: Any
    ) -> Any:
        if not (size.height and size.width and resample in MODES):
            return super().resize(image, size, resample, reducing_gap, **others)
        return _resized(image, size.height, size.width, resample)


def resizing(processor_class: Any) -> Any:
    """Returns the processor's class with this way to resize."""
    return type(processor_class.__name__, (processor_class, _Resizing), {})


def open_processor(directory: Path) -> Any:
    """Returns the image processor of the model in a directory. Raises OSError, ValueError or KeyError."""
    chosen = type(AutoImageProcessor.from_pretrained(directory, backend="pil"))
    return resizing(chosen).from_pretrained(directory)


class Gemma4ImageProcessor(Gemma4ImageProcessorPil):
    """Gemma 4's, which resizes by a function of its own."""

    def aspect_ratio_preserving_resize(
        self, image: Any, patch_size: int, max_patches: int, pooling_kernel_size: int, resample: Any
    ) -> Any:
        if resample not in MODES:
            return super().aspect_ratio_preserving_resize(image, patch_size, max_patches, pooling_kernel_size, resample)
        height, width = image.shape[-2:]
        size = get_aspect_ratio_preserving_size(height, width, patch_size, max_patches, pooling_kernel_size)
        return _resized(image, *size, resample)


def _resized(image: Any, height: int, width: int, resample: Any) -> Any:
    """image: (channels, height, width), of bytes; so is the result."""
    if image.shape[-2:] == (height, width):
        return image
    pixels = torch.from_numpy(numpy.ascontiguousarray(image))[None]
    found = interpolate(pixels, (height, width), mode=MODES[resample], align_corners=False, antialias=True)
    return found[0].numpy()
