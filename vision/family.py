"""VisionFamily: all that is particular to one kind of model that sees. Each kind is a class in a file of its own.

The server asks it for an image's crops, the prompt for their text, and the engine for their features, for what their
tokens see and for where they stand. To add a kind, write its class and name it in `families.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image as Picture


Grid = tuple[int, int]  # rows and columns of an image's tokens


@dataclass(frozen=True)
class ImageCrop:
    """An image, or a part of it, as the model sees it."""

    pixels: "torch.Tensor"  # in the shape that the family's `encode` takes
    grid: Grid
    digest: bytes  # of the grid and the pixels

    @classmethod
    def of(cls, pixels: "torch.Tensor", grid: Grid) -> "ImageCrop":
        """pixels: on the CPU."""
        digest = blake2b(repr(grid).encode(), digest_size=16)  # pixels of one colour are the same in any grid
        digest.update(pixels.numpy().tobytes())
        return cls(pixels, grid, digest.digest())

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


class PlacedImage(Protocol):
    """A crop in a prompt."""

    @property
    def start(self) -> int:
        """The position of its first token."""
        ...

    @property
    def grid(self) -> Grid: ...


class VisionFamily(ABC):
    """The vision part of one model. Methods that take pixels may run in any thread."""

    mark: str  # what a chat template writes for an image
    frame: tuple[str, str] = ("", "")  # what it writes around that
    details: tuple[str, ...] = ("low", "high", "auto", "original")  # the values of OpenAI's `detail` that it takes
    is_causal: bool  # a token of an image sees what comes before it; if not, all tokens of an image see each other
    sees_beyond_window = False  # a token of an image sees the whole image also where a layer's window is shorter
    position_axes = 1  # coordinates of a token's position
    needs_tower = True  # transformers has no text model of its type, or cannot make it without a tower

    def __init__(self, config: Any) -> None:
        """config: the model's, as transformers reads it."""
        self.image_token_id: int = config.image_token_id  # stands for each token of a crop

    @property
    def max_crop_tokens(self) -> int:
        """The largest number of tokens of a crop that no step may cut; a causal family has none."""
        return 0

    def open_processor(self, directory: Path) -> Any:
        """Returns the image processor of the model in the directory. Raises OSError, ValueError or KeyError."""
        from vision import image_processors

        return image_processors.open_processor(directory)

    def tower(self, model: Any) -> Any:
        """Returns the module that encodes images."""
        return model.get_encoder("image")

    @abstractmethod
    def crops(self, processor: Any, picture: "Picture", detail: str) -> list[ImageCrop]:
        """Returns the image as the model sees it. processor: transformers' image processor of the model.

        Raises ValueError for an image that the model cannot see, such as one that is far too long.
        """

    @abstractmethod
    def prompt_text(self, grids: Sequence[Grid]) -> str:
        """Returns the text that stands for one image in a prompt. grids: those of its crops' tokens."""

    def looks_ahead(self, window: int | None) -> bool:
        """Returns whether a token of an image sees the later ones of it in layers with that window (None: without
        one)."""
        return not self.is_causal

    @abstractmethod
    def encode(self, model: Any, pixels: "Sequence[torch.Tensor]", grids: Sequence[Grid]) -> "Sequence[torch.Tensor]":
        """Returns the features of crops, each (num_tokens, features). Raises what the model, which is transformers',
        raises.

        pixels, grids: of the crops, as `crops` made them; the pixels on the model's device.
        """

    def inputs(
        self, model: Any, token_ids: "torch.Tensor", features: "Sequence[tuple[int, torch.Tensor]]"
    ) -> dict[str, Any]:
        """Returns what the model is called with for a step: here its token ids, or embeddings with features in them.

        token_ids: (1, tokens). features: of crops or parts of them, in the order of their rows, with the row of the
        first token of each.
        """
        if not features:
            return {"input_ids": token_ids}
        embeddings = model.get_input_embeddings()(token_ids)
        for first, rows in features:
            embeddings[0, first : first + len(rows)] = rows.to(embeddings)
        return {"inputs_embeds": embeddings}

    def forward(self, model: Any, **inputs: Any) -> Any:
        """Computes a step: returns an output with `logits` and `past_key_values`, as the model's own `forward`, which
        is used here. Raises what the model raises."""
        return model(**inputs)

    def positions(self, start: int, end: int, images: Sequence[PlacedImage]) -> list[list[int]]:
        """Returns the positions of a sequence's tokens start .. end for each axis: here the places of the tokens."""
        return [list(range(start, end))] * self.position_axes


def forward_text(model: Any, *, logits_to_keep: "int | torch.Tensor" = 0, **inputs: Any) -> Any:
    """Computes what `VisionFamily.forward` does by the text model and the head alone, past the class around them.

    Some of these classes search each step for images, or pass on less than the text model takes.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    output = model.model.language_model(**inputs)
    hidden = output.last_hidden_state
    if isinstance(logits_to_keep, int):
        kept: Any = slice(-logits_to_keep, None)
    else:
        kept = logits_to_keep.to(hidden.device)  # layers may be on several devices
    logits = model.lm_head(hidden[:, kept])
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    logits = logits if cap is None else (logits / cap).tanh() * cap
    return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)
