"""Images on their way through the model: pixels in, the features that stand in for a prompt's image tokens out."""

from collections import OrderedDict
from collections.abc import Sequence as Images
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from vision.families import vision_family_of

MEMORY = 256 * 2**20  # bytes of features that are kept for later requests


@dataclass(eq=False)
class Image:
    """One crop of an image, and its place in a prompt."""

    digest: bytes  # of the pixels
    pixels: torch.Tensor | None  # as the model's vision family takes them; None once the features are there
    start: int  # position of its first token
    grid: tuple[int, int]  # rows and columns of its tokens
    is_causal: bool = False  # if not, its tokens see each other, so that no step may cut it
    features: torch.Tensor | None = None  # (num_tokens, features), once they are computed

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


class VisionEncoder:
    """The vision tower with its projector, run once for each distinct image."""

    def __init__(self, model: PreTrainedModel, memory: int = MEMORY) -> None:
        family = vision_family_of(model.config)
        assert family is not None, "only models that see get images"
        self.family = family
        self._model: Any = model if hasattr(model, "get_image_features") else model.model
        self._memory = memory
        self._known: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # the least recently used first
        self.num_encoded = 0  # since the start

    def recall(self, image: Image) -> None:
        """Gives the image what is known of one like it."""
        if (features := self._known.get(image.digest)) is not None:
            self._known.move_to_end(image.digest)
            image.features, image.pixels = features, None

    @torch.inference_mode()
    def encode(self, images: Images[Image]) -> None:
        """All in one batch; raises what the model raises."""
        distinct = {image.digest: image for image in images if image.features is None}
        tower: torch.nn.Module = self._model
        weight = next(p for name, p in tower.named_parameters() if "vision" in name)
        pixels = [
            image.pixels.to(weight.device, weight.dtype) for image in distinct.values() if image.pixels is not None
        ]
        features = self.family.encode(self._model, pixels)
        self.num_encoded += len(distinct)
        for digest, own in zip(distinct, features, strict=True):
            self._known[digest] = own.clone()  # not a view, which would keep all of them
        for image in images:
            image.features, image.pixels = self._known[image.digest], None
        while self._known and sum(features.nbytes for features in self._known.values()) > self._memory:
            self._known.popitem(last=False)
