"""Provider and ProviderResponse: what the router knows of a provider, and what a provider answers."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from providers.upstream import NO_HEADERS, Upstream

PASSED_HEADERS = ("anthropic-version", "anthropic-beta")


@dataclass(frozen=True)
class ProviderResponse:
    """A provider's answer: whole JSON, or a stream's events once the first has come, or 15 seconds have passed."""

    content: bytes | AsyncGenerator[bytes]
    headers: Mapping[str, str] = field(default_factory=dict)


class Provider(Protocol):
    """A provider's models over HTTP. Cancelling a call, or closing the stream that it returned, ends the work there."""

    @property
    def upstream(self) -> Upstream:
        """The connections to the provider, and how they fared."""
        ...

    def speaks(self, path: str) -> bool:
        """Returns whether the provider has the endpoint `path`, which is written as below /v1."""
        ...

    async def answer(
        self, path: str, body: dict[str, Any], headers: Mapping[str, str] = NO_HEADERS
    ) -> ProviderResponse:
        """Sends a request on and returns the provider's answer. Raises errors.APIError, also while a stream runs.

        path: the endpoint's, below /v1; body: the client's, with the model's name at the provider; it may be changed;
        headers: the client's that belong to a protocol, of PASSED_HEADERS.
        """
        ...

    async def models(self) -> list[str]:
        """Returns the names of the provider's models, without the prefix. Raises errors.APIError."""
        ...
