"""ImageInputs: a request's images become crops in pixels, and each crop gets its place among the prompt's tokens."""

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from errors import InvalidRequest, Overloaded
from schemas import ContentPart, Message
from serving import image_decoder
from serving.image_fetcher import ImageFetcher

if TYPE_CHECKING:
    import torch

    from engine.vision import Image

PAN_AND_SCAN = {  # of `detail: high`, as in Gemma 3's report; `auto` does the same with elongated images
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
}
ELONGATED = {
    "auto": 1.5,
    "high": 1.2,
    "original": 1.2,
}  # from which ratio of its sides on an image is also shown in parts
FETCHED_TOGETHER, DECODED_TOGETHER = 16, 4  # images, which bounds the memory for it
MAX_WAITING_BYTES = 2**30  # of pixels that wait to be encoded; more requests are told to come back


@dataclass(frozen=True)
class ImageCrop:
    """An image, or a part of it, as the model sees it."""

    pixels: "torch.Tensor"  # (channels, height, width)
    digest: bytes


class ImageInputs:
    """What a model that sees needs beside its engine."""

    def __init__(self, processor: Any, image_token_id: int, tokens_per_view: int) -> None:
        """processor: transformers' image processor of the model."""
        self._processor = processor
        self._image_token_id, self._tokens_per_view = image_token_id, tokens_per_view
        self._room = asyncio.Semaphore(FETCHED_TOGETHER)
        self._decoders = ThreadPoolExecutor(DECODED_TOGETHER, "decoder")  # so that images wait for images alone
        self._waiting: WeakSet[torch.Tensor] = WeakSet()

    @classmethod
    def open(cls, directory: Path, config: Any) -> "ImageInputs":
        """With Pillow's image processor, which needs no torchvision. Raises OSError or ValueError."""
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(directory, backend="pil")
        return cls(processor, config.image_token_id, config.mm_tokens_per_image)

    async def see(self, messages: Sequence[Message], fetcher: ImageFetcher, most: int) -> list[list[ImageCrop]]:
        """The views of each image, in the order of the messages. Raises InvalidRequest, or Overloaded."""
        parts = list(image_parts(messages))
        if len(parts) > most:
            raise InvalidRequest(
                f"The request has more than {most} images.", param=parts[most][0], code="too_many_images"
            )
        tasks = [asyncio.ensure_future(self._views(part, param, fetcher)) for param, part in parts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _views(self, part: ContentPart, param: str, fetcher: ImageFetcher) -> list[ImageCrop]:
        url, detail = part.image
        if url is None:
            raise InvalidRequest(f"{param}.image_url has no url.", param=param, code="missing_required_parameter")
        if detail not in ("low", *ELONGATED):
            raise InvalidRequest(
                f"detail must be one of low, {', '.join(ELONGATED)}.", param=f"{param}.detail", code="invalid_value"
            )
        async with self._room:
            if sum(pixels.nbytes for pixels in list(self._waiting)) > MAX_WAITING_BYTES:
                raise Overloaded("Too many images are queued; try again later.", retry_after=5)
            data = await fetcher.fetch(url, param)
            work = partial(self._process, data, detail, param)
            views = await asyncio.get_running_loop().run_in_executor(self._decoders, work)
            self._waiting.update(view.pixels for view in views)
        return views

    def _process(self, data: bytes, detail: str, param: str) -> list[ImageCrop]:
        options: dict[str, Any] = {"do_pan_and_scan": False}
        if detail in ELONGATED:
            options = {**PAN_AND_SCAN, "pan_and_scan_min_ratio_to_activate": ELONGATED[detail]}
        picture = image_decoder.decode(data, param)
        pixels = self._processor(picture, return_tensors="pt", **options)["pixel_values"]
        return [ImageCrop(own, blake2b(own.numpy().tobytes(), digest_size=16).digest()) for own in pixels]

    def place(self, token_ids: Sequence[int], views: Sequence[ImageCrop]) -> "tuple[Image, ...]":
        """The views where the prompt has their tokens."""
        from engine.vision import Image

        starts = list(self._starts(token_ids))
        assert len(starts) == len(views), "the prompt was rendered for other images"
        return tuple(
            Image(view.digest, view.pixels, start, self._tokens_per_view)
            for start, view in zip(starts, views, strict=True)
        )

    def _starts(self, token_ids: Sequence[int]) -> Iterator[int]:
        position = 0
        while position < len(token_ids):
            if token_ids[position] == self._image_token_id:
                yield position
                position += self._tokens_per_view
            else:
                position += 1


def image_parts(messages: Sequence[Message]) -> Iterator[tuple[str, ContentPart]]:
    """With the path of each."""
    for number, message in enumerate(messages):
        if isinstance(message.content, list):
            for index, part in enumerate(message.content):
                if part.type == "image_url":
                    yield f"messages[{number}].content[{index}]", part
