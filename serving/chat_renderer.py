"""ChatRenderer: a conversation becomes a prompt, and its images get their places in it."""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prompt_templates import RenderOptions
from schemas import ChatCompletionRequest, TokenizeRequest
from serving.admission import check_characters
from serving.image_fetcher import ImageFetcher
from serving.loading import LoadedModel
from text.tools import ToolSet

if TYPE_CHECKING:
    from engine.vision import Image


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as the model's prompt."""

    prompt_ids: list[int]
    images: "tuple[Image, ...]" = ()
    boundaries: tuple[int, ...] = ()  # numbers of tokens after which other prompts may go on; see `Engine.stream`


class ChatRenderer:
    def __init__(self, fetcher: ImageFetcher, max_images: int) -> None:
        self._fetcher, self._max_images = fetcher, max_images

    async def render(
        self, loaded: LoadedModel, request: ChatCompletionRequest | TokenizeRequest, tools: ToolSet | None
    ) -> "RenderedChat":
        """Returns the prompt. A model without vision fetches no image. Raises APIError."""
        messages, image_inputs = request.messages or [], loaded.image_inputs
        images = [] if image_inputs is None else await image_inputs.crops_of(messages, self._fetcher, self._max_images)
        check_characters(loaded, sum(len(text) for message in messages for text in message.texts), "messages")
        options = RenderOptions(
            continues=request.continue_final_message,
            opens=request.add_generation_prompt,
            image_grids=[[crop.grid for crop in crops] for crops in images],
            tools=tools.shown if tools else (),
            thinks=False if request.thinks is None and is_background_task(request) else request.thinks,
            effort=request.effort,
            arguments=request.template_arguments,
        )
        template, boundaries = loaded.template, tuple[int, ...]()
        if loaded.engine.needs_boundaries and isinstance(request, ChatCompletionRequest):
            prompt_ids, boundaries = await asyncio.to_thread(template.render_turns, messages, options)
        else:
            prompt_ids = await asyncio.to_thread(template.render_chat, messages, options)
        if image_inputs is None or not images:
            return RenderedChat(prompt_ids, boundaries=boundaries)
        crops = [crop for crops in images for crop in crops]
        return RenderedChat(prompt_ids, image_inputs.place(prompt_ids, crops), boundaries)


def is_background_task(request: ChatCompletionRequest | TokenizeRequest) -> bool:
    """Returns whether this asks for a title, for tags or the like, as Open WebUI does beside each chat.

    Such a request lets chats go first, and is answered without reasoning, which no one would read.
    """
    content = request.messages[-1].content if request.messages else None
    is_chat = isinstance(request, ChatCompletionRequest) and not request.stream
    return is_chat and isinstance(content, str) and content.startswith("### Task:")
