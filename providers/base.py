"""Provider: one source of models. Streams are the only thing it makes; whole answers are their fold."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from schemas import ChatCompletionChunk, ChatCompletionRequest, Completion, CompletionRequest, Model

if TYPE_CHECKING:
    from providers.upstream import Upstream


@dataclass(frozen=True)
class ProviderResponse:
    """An answer of another server's, as bytes: whole JSON, or the events of a stream."""

    content: bytes | AsyncGenerator[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)


class Gateway(Protocol):
    """A provider somewhere else. Leaving what it returns ends the work there."""

    @property
    def upstream(self) -> "Upstream": ...

    async def answer(self, path: str, body: dict[str, Any]) -> ProviderResponse:
        """path: of the endpoint, below /v1; body: the client's, with the model's name there. Raises errors.APIError."""
        ...

    async def models(self) -> list[str]:
        """Names, without the prefix. Raises errors.APIError."""
        ...


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
