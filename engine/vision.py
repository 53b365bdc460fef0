"""VisionEncoder: pixels of images in, features out, which take the place of a prompt's image tokens."""

from collections import OrderedDict
from collections.abc import Sequence as Images
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from vision.families import vision_family_of

KEPT_FEATURES = 256 * 2**20  # bytes of features that are kept for later requests


@dataclass(eq=False)
class Image:
    """One crop of an image, and its place in a prompt."""

    digest: bytes  # of the grid and the pixels
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
    """Runs the vision tower and its projector, once for each distinct image."""

    def __init__(self, model: PreTrainedModel, memory: int = KEPT_FEATURES) -> None:
        family = vision_family_of(model.config)
        assert family is not None, "only models that see get images"
        self.family = family
        self._model: Any = model if hasattr(model, "get_image_features") else model.model
        self._memory = memory
        self._features: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # by digest; the least recently used first
        self.num_encoded = 0  # since the start

    def recall(self, image: Image) -> None:
        """Gives the image its features, if an equal one was encoded before."""
        if (features := self._features.get(image.digest)) is not None:
            self._features.move_to_end(image.digest)
            image.features, image.pixels = features, None

    @torch.inference_mode()
    def encode(self, images: Images[Image]) -> None:
        """Encodes images together. Raises what the model raises."""
        distinct = {image.digest: image for image in images if image.features is None}
        weight = next(self.family.tower(self._model).parameters())
        # in float32: some towers scale pixels before they round them
        pixels = [image.pixels.to(weight.device) for image in distinct.values() if image.pixels is not None]
        features = self.family.encode(self._model, pixels, [image.grid for image in distinct.values()])
        self.num_encoded += len(distinct)
        for digest, rows in zip(distinct, features, strict=True):
            self._features[digest] = rows.clone()  # a view would keep the whole batch
        for image in images:
            image.features, image.pixels = self._features[image.digest], None
        while self._features and sum(kept.nbytes for kept in self._features.values()) > self._memory:
            self._features.popitem(last=False)
