"""Gemma 3: crops of 256 tokens, whose tokens see each other.

Source: transformers' processor and model of Gemma 3, and the Gemma 3 report (pan and scan).
"""

from collections.abc import Sequence
from math import isqrt
from typing import TYPE_CHECKING, Any

from vision.family import Grid, ImageCrop, VisionFamily

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as Picture

PAN_AND_SCAN = {  # of `detail: high`, as in Gemma 3's report; `auto` does the same with elongated images
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
}
ELONGATED = {"auto": 1.5, "high": 1.2, "original": 1.2}  # the ratio of sides from which parts are shown as well


class Gemma3Vision(VisionFamily):
    mark = "<start_of_image>"
    token = "<image_soft_token>"
    is_causal = False
    sees_beyond_window = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        side = isqrt(config.mm_tokens_per_image)
        self._grid = (side, side)

    @property
    def max_crop_tokens(self) -> int:
        return self._grid[0] * self._grid[1]

    def crops(self, processor: Any, picture: "Picture", detail: str) -> list[ImageCrop]:
        options: dict[str, Any] = {"do_pan_and_scan": False}
        if detail in ELONGATED:
            options = {**PAN_AND_SCAN, "pan_and_scan_min_ratio_to_activate": ELONGATED[detail]}
        pixels = processor(picture, return_tensors="pt", **options)["pixel_values"]
        return [ImageCrop.of(crop, self._grid) for crop in pixels]

    def prompt_text(self, grids: Sequence[Grid]) -> str:
        whole, *parts = [f"\n\n{self.mark}{self.token * rows * columns}<end_of_image>\n\n" for rows, columns in grids]
        if not parts:
            return whole
        return f"Here is the original image {whole} and here are some crops to help you see better {' '.join(parts)}"

    def encode(self, model: Any, pixels: "Sequence[torch.Tensor]", grids: Sequence[Grid]) -> "Sequence[torch.Tensor]":
        """pixels: each (channels, height, width)."""
        import torch

        features: Sequence[torch.Tensor] = model.get_image_features(
            torch.stack([*pixels]), return_dict=True
        ).pooler_output
        return features
