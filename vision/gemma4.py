"""Gemma 4: an image keeps its proportions and takes up to as many tokens as `detail` allows.

Source: transformers' processor and model of Gemma 4.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision.family import Grid, ImageCrop, VisionFamily, forward_text

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as Picture

MOST_TOKENS = {"low": 70, "high": 1120, "original": 1120}  # of an image; `auto`: what the processor's files say


class Gemma4Vision(VisionFamily):
    mark = "<|image|>"
    needs_tower = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = config.get_text_config()
        self.is_causal = text.use_bidirectional_attention != "vision"  # E2B and E4B
        self._pool: int = config.vision_config.pooling_kernel_size  # patches on a side of a token
        self._pad: int = text.pad_token_id or 0
        ids = (config.image_token_id, config.video_token_id, config.audio_token_id)
        self._placeholders = [token for token in ids if token is not None]

    @property
    def max_crop_tokens(self) -> int:
        return 0 if self.is_causal else max(MOST_TOKENS.values())

    def looks_ahead(self, window: int | None) -> bool:
        """Only sliding layers let an image's tokens see later ones, within their window."""
        return not self.is_causal and window is not None

    def open_processor(self, directory: Path) -> Any:
        from vision.image_processors import Gemma4ImageProcessor

        return Gemma4ImageProcessor.from_pretrained(directory)

    def crops(self, processor: Any, picture: "Picture", detail: str) -> list[ImageCrop]:
        options = {"max_soft_tokens": MOST_TOKENS[detail]} if detail in MOST_TOKENS else {}
        found = processor(picture, return_tensors="pt", **options)
        columns, rows = (found["image_position_ids"][0].amax(0) + 1).tolist()
        pixels = found["pixel_values"][0, : rows * columns].clone()  # behind them is padding
        return [ImageCrop.of(pixels, (rows // self._pool, columns // self._pool))]

    def prompt_text(self, grids: Sequence[Grid]) -> str:
        ((rows, columns),) = grids
        return f"<|image>{self.mark * rows * columns}<image|>"

    def encode(self, model: Any, pixels: "Sequence[torch.Tensor]", grids: Sequence[Grid]) -> "Sequence[torch.Tensor]":
        """pixels: each (patches, numbers of a patch). One image after the other, so that none has to be padded."""
        return [self._encoded(model, *crop) for crop in zip(pixels, grids, strict=True)]

    def _encoded(self, model: Any, pixels: "torch.Tensor", grid: Grid) -> "torch.Tensor":
        import torch

        rows, columns = (side * self._pool for side in grid)
        axes = torch.arange(columns, device=pixels.device), torch.arange(rows, device=pixels.device)
        places = torch.stack(torch.meshgrid(*axes, indexing="xy"), dim=-1).view(1, -1, 2)
        output = model.get_image_features(pixels[None], places, return_dict=True)
        features: torch.Tensor = output.pooler_output[0]
        return features

    def inputs(
        self, model: Any, token_ids: "torch.Tensor", features: "Sequence[tuple[int, torch.Tensor]]"
    ) -> dict[str, Any]:
        """Layers with embeddings of their own read padding in the place of images, and the whole model wherever a
        prompt has a placeholder without an image."""
        is_placeholder = sum(token_ids == token for token in self._placeholders).bool()
        token_ids = token_ids.masked_fill(is_placeholder, self._pad)
        inputs = super().inputs(model, token_ids, features)
        text = model.model.language_model
        if features and getattr(text.config, "hidden_size_per_layer_input", None):
            inputs["per_layer_inputs"] = text.get_per_layer_inputs(token_ids)
        return inputs

    def forward(self, model: Any, **inputs: Any) -> Any:
        return forward_text(model, **inputs)


class Gemma4UnifiedVision(Gemma4Vision):
    """Gemma 4 12B: it has no tower, and a token is one large patch. In all layers the tokens of an image see each
    other, as in Gemma 3."""

    sees_beyond_window = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._pool = 1

    def open_processor(self, directory: Path) -> Any:
        """Takes that of the other sizes with larger patches, which cuts images alike: its own needs torchvision."""
        processor = super().open_processor(directory)
        processor.patch_size, processor.pooling_kernel_size = processor.patch_size * processor.pooling_kernel_size, 1
        return processor

    def looks_ahead(self, window: int | None) -> bool:
        return not self.is_causal

    def tower(self, model: Any) -> Any:
        return model.model.embed_vision
