"""Qwen 2.5 VL, Qwen 3 VL and Qwen 3.5: images of any size become grids of tokens, which stand at two coordinates.

Source: transformers' processors and models of these families; DeepStack (Meng et al. 2024) for Qwen 3 VL.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vision.family import Grid, ImageCrop, PlacedImage, VisionFamily, forward_text

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as Picture

MOST_TOKENS = {"low": 256, "auto": 1280, "high": 4096, "original": 4096}  # of an image, if the model's files allow them


class QwenVision(VisionFamily):
    mark = "<|image_pad|>"
    frame = ("<|vision_start|>", "<|vision_end|>")
    is_causal = True
    position_axes = 3  # time, row and column

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._merge: int = config.vision_config.spatial_merge_size  # patches on a side of a token

    def crops(self, processor: Any, picture: "Picture", detail: str) -> list[ImageCrop]:
        least, most = processor.size["shortest_edge"], processor.size["longest_edge"]  # pixels of the whole image
        most = min(most, MOST_TOKENS[detail] * (processor.patch_size * processor.merge_size) ** 2)
        size = {"shortest_edge": min(least, most), "longest_edge": most}
        found = processor(picture, return_tensors="pt", size=size)
        _, rows, columns = found["image_grid_thw"][0].tolist()
        return [ImageCrop.of(found["pixel_values"], (rows // self._merge, columns // self._merge))]

    def prompt_text(self, grids: Sequence[Grid]) -> str:
        ((rows, columns),) = grids
        return self.mark * rows * columns

    def encode(self, model: Any, pixels: "Sequence[torch.Tensor]", grids: Sequence[Grid]) -> "Sequence[torch.Tensor]":
        """pixels: each (patches, numbers of a patch)."""
        import torch

        patches = [[1, rows * self._merge, columns * self._merge] for rows, columns in grids]
        sizes = torch.tensor(patches, device=pixels[0].device)
        return self._features(model.get_image_features(torch.cat([*pixels]), sizes, return_dict=True))

    def _features(self, output: Any) -> "Sequence[torch.Tensor]":
        features: Sequence[torch.Tensor] = output.pooler_output
        return features

    def positions(self, start: int, end: int, images: Sequence[PlacedImage]) -> list[list[int]]:
        """An image's tokens stand at one time, and at their rows and columns from there on. What follows the image goes
        on behind its longer side, so that later tokens stand nearer than they would after as many words."""
        axes: list[list[int]] = [[], [], []]
        place, shift = start, 0  # of the next token, and from there to its position
        for image in images:
            rows, columns = image.grid
            behind = image.start + rows * columns
            if image.start >= end:
                break
            if behind > start:
                _go_on(axes, range(place + shift, image.start + shift))
                place = min(behind, end)
                for index in range(max(start, image.start) - image.start, place - image.start):
                    for axis, offset in zip(axes, (0, index // columns, index % columns), strict=True):
                        axis.append(image.start + shift + offset)
            shift += max(rows, columns) - rows * columns
        _go_on(axes, range(place + shift, end + shift))
        return axes


def _go_on(axes: list[list[int]], positions: range) -> None:
    """Adds positions of text, which are the same on all axes."""
    for axis in axes:
        axis += positions


class Qwen3_5Vision(QwenVision):
    needs_tower = False


class Qwen3VLVision(QwenVision):
    """Qwen 3 VL: the tower's earlier layers give features too, which are added after the first layers of the text
    model. A token's features here are all of these, one after the other."""

    def _features(self, output: Any) -> "Sequence[torch.Tensor]":
        import torch

        parts = zip(output.pooler_output, *output.deepstack_features, strict=True)
        return [torch.cat(features, dim=-1) for features in parts]

    def inputs(
        self, model: Any, token_ids: "torch.Tensor", features: "Sequence[tuple[int, torch.Tensor]]"
    ) -> dict[str, Any]:
        import torch

        width = model.config.get_text_config().hidden_size
        inputs = super().inputs(model, token_ids, [(first, rows[:, :width]) for first, rows in features])
        if features:
            is_seen = torch.zeros_like(token_ids, dtype=torch.bool)
            for first, rows in features:
                is_seen[0, first : first + len(rows)] = True
            deeper = torch.cat([rows[:, width:] for _, rows in features]).split(width, dim=1)
            inputs |= {"visual_pos_masks": is_seen, "deepstack_visual_embeds": [*deeper]}
        return inputs

    def forward(self, model: Any, **inputs: Any) -> Any:
        return forward_text(model, **inputs)
