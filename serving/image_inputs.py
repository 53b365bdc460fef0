"""ImageInputs: a request's images become crops in pixels, and each crop gets its place among the prompt's tokens."""

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from errors import InvalidRequest, Overloaded
from schemas import ContentPart, Message
from serving import image_decoder
from serving.image_fetcher import ImageFetcher
from vision.family import ImageCrop, VisionFamily

if TYPE_CHECKING:
    import torch

    from engine.vision import Image

FETCHED_TOGETHER, DECODED_TOGETHER = 16, 4  # images, which bounds the memory for it
MAX_WAITING_BYTES = 2**30  # of pixels that wait to be encoded; while there are more, requests are refused


class ImageInputs:
    """Fetches and decodes a vision model's images, and places them among the prompt's tokens."""

    def __init__(self, family: VisionFamily, processor: Any) -> None:
        """processor: transformers' image processor of the model."""
        self.family = family
        self._processor = processor
        self._fetching = asyncio.Semaphore(FETCHED_TOGETHER)
        self._decoders = ThreadPoolExecutor(DECODED_TOGETHER, "decoder")  # so that images wait for images alone
        self._waiting: WeakSet[torch.Tensor] = WeakSet()

    @classmethod
    def open(cls, directory: Path, family: VisionFamily) -> "ImageInputs":
        """Raises what the family's `open_processor` raises."""
        return cls(family, family.open_processor(directory))

    async def crops_of(
        self, messages: Sequence[Message], fetcher: ImageFetcher, max_images: int
    ) -> list[list[ImageCrop]]:
        """Fetches and decodes the images, and returns the crops of each, in the order of the messages.

        Raises InvalidRequest, or Overloaded.
        """
        parts = list(image_parts(messages))
        if len(parts) > max_images:
            raise InvalidRequest(
                f"The request has more than {max_images} images: send fewer.",
                param=parts[max_images][0],
                code="too_many_images",
            )
        tasks = [asyncio.ensure_future(self._crops(part, param, fetcher)) for param, part in parts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _crops(self, part: ContentPart, param: str, fetcher: ImageFetcher) -> list[ImageCrop]:
        url, detail = part.image
        if url is None:
            raise InvalidRequest(f"{param}.image_url has no url.", param=param, code="missing_required_parameter")
        if detail not in self.family.details:
            raise InvalidRequest(
                f"detail must be one of {', '.join(self.family.details)}.",
                param=f"{param}.detail",
                code="invalid_value",
            )
        async with self._fetching:
            if sum(pixels.nbytes for pixels in list(self._waiting)) > MAX_WAITING_BYTES:
                raise Overloaded("Too many images are queued; try again later.", retry_after=5)
            data = await fetcher.fetch(url, param)
            work = partial(self._process, data, detail, param)
            crops = await asyncio.get_running_loop().run_in_executor(self._decoders, work)
            self._waiting.update(crop.pixels for crop in crops)
        return crops

    def _process(self, data: bytes, detail: str, param: str) -> list[ImageCrop]:
        picture = image_decoder.decode(data, param)
        try:
            return self.family.crops(self._processor, picture, detail)
        except ValueError as error:
            raise InvalidRequest(
                f"The model cannot see the image: {error}.", param=param, code="invalid_image"
            ) from error

    def place(self, token_ids: Sequence[int], crops: Sequence[ImageCrop]) -> "tuple[Image, ...]":
        """Puts each crop where the prompt has its tokens."""
        from engine.vision import Image

        placed: list[Image] = []
        end = 0
        for crop in crops:
            start = token_ids.index(self.family.image_token_id, end)
            end = start + crop.num_tokens
            placed.append(
                Image(
                    digest=crop.digest, pixels=crop.pixels, start=start, grid=crop.grid, is_causal=self.family.is_causal
                )
            )
        assert self.family.image_token_id not in token_ids[end:], "the prompt was rendered for other images"
        return tuple(placed)


def image_parts(messages: Sequence[Message]) -> Iterator[tuple[str, ContentPart]]:
    """Yields the images of the messages, each with its path in the request."""
    for number, message in enumerate(messages):
        if isinstance(message.content, list):
            for index, part in enumerate(message.content):
                if part.type == "image_url":
                    yield f"messages[{number}].content[{index}]", part
