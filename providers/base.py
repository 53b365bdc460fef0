"""Provider: one source of models. Streams are the only thing it makes; whole answers are their fold."""

from collections.abc import AsyncGenerator
from typing import Protocol

from schemas import ChatCompletionChunk, ChatCompletionRequest, Completion, CompletionRequest, Model


class Provider(Protocol):
    """All methods raise `errors.APIError`; leaving a stream's iterator cancels the work behind it."""

    def models(self) -> list[Model]:
        """At once, also while models load."""
        ...

    def serves(self, model: str) -> bool: ...

    def stream_chat(self, request: ChatCompletionRequest) -> AsyncGenerator[ChatCompletionChunk]:
        """The last chunk has no choices, and the usage."""
        ...

    def stream_completion(self, request: CompletionRequest) -> AsyncGenerator[Completion]: ...

    async def close(self, timeout: float) -> None: ...
