"""Upstream: HTTP to one provider, with its time-outs, retries and errors. It knows no format but server-sent events.

A request is sent again only until a successful answer begins. When the client leaves, the await here is cancelled,
which closes the connection and ends the retries.
"""

import asyncio
import json
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from config import ProviderValues
from errors import ProviderNotConfigured, UpstreamError
from providers.upstream_errors import error_of
from server.events import EventSplitter
from server.headers import header_value

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0  # seconds
LONGEST_WAIT = 20.0  # seconds; a provider that asks to wait longer gets no retry
LARGEST = 64 * 2**20  # bytes of an answer, or of one event
NUM_FAILURES, COOLDOWN = 3, 30.0  # requests in a row without a connection; seconds without requests after them
MIN_SECRET = 8  # characters; a shorter header value is not a key to be redacted


@dataclass(frozen=True, kw_only=True)
class UpstreamConfig:
    """How requests reach a provider, and how long they may take."""

    name: str
    key_variable: str  # the environment variable with its key
    headers: Mapping[str, str] = field(repr=False)  # those with the key; empty without one
    needs_key: bool
    timeout: float  # seconds between bytes
    total_timeout: float  # seconds for an answer that is not streamed
    num_retries: int = 2

    @classmethod
    def of(cls, values: ProviderValues, headers: Callable[[str], Mapping[str, str]]) -> "UpstreamConfig":
        """Returns the configuration from a provider's settings; `headers` makes the headers that carry its key."""
        return cls(
            name=values.row.name,
            key_variable=values.row.key.name.upper(),
            headers=headers(values.key.get_secret_value()) if values.key is not None else {},
            needs_key=values.row.needs_key,
            timeout=values.timeout,
            total_timeout=values.total_timeout,
            num_retries=values.num_retries,
        )

    @property
    def is_usable(self) -> bool:
        """Whether a request can be sent: there is a key, or none is needed."""
        return bool(self.headers) or not self.needs_key


NO_HEADERS: Mapping[str, str] = {}
DROPPED_PARAMS = "x-gateway-dropped-params"  # the header with the parameters that a provider was not sent


class Upstream:
    """The connections to one provider."""

    def __init__(self, config: UpstreamConfig, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self.config = config
        self._transport = transport
        self._client: httpx2.AsyncClient | None = None
        self._num_failures, self._open_until = 0, 0.0
        self.last_success: float | None = None  # when the last answer without an error began, in seconds since 1970

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    @property
    def was_asked(self) -> bool:
        """Whether any request was sent."""
        return self._client is not None

    @property
    def is_circuit_open(self) -> bool:
        """Whether requests are refused at once, because the last ones found no connection."""
        return time.monotonic() < self._open_until

    async def request(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str] = NO_HEADERS
    ) -> httpx2.Response:
        """Sends a request and returns its successful answer, read as a whole. Raises APIError.

        headers: those that go with the provider's own.
        """
        try:
            async with asyncio.timeout(self.config.total_timeout):
                return await self.read(await self._send(method, url, body, headers))
        except TimeoutError as error:
            raise self.fault(
                f"did not answer within {self.config.total_timeout:g} seconds", 504, "upstream_timeout"
            ) from error

    async def stream(self, url: str, body: bytes, headers: Mapping[str, str] = NO_HEADERS) -> httpx2.Response:
        """Sends a POST and returns its successful answer, of which the caller reads and closes the body.

        Raises APIError.
        """
        return await self._send("POST", url, body, headers)

    async def read(self, response: httpx2.Response) -> httpx2.Response:
        """Reads an answer as a whole, up to LARGEST bytes, and closes it. Raises APIError."""
        try:
            size = 0
            parts: list[bytes] = []
            async for part in response.aiter_raw():
                size += len(part)
                if size > LARGEST:
                    raise self.fault(f"sent an answer of more than {LARGEST} bytes", 502, "upstream_invalid_response")
                parts.append(part)
        except httpx2.HTTPError as error:
            raise self.transport_fault(error) from error
        finally:
            await response.aclose()
        return httpx2.Response(response.status_code, headers=_plain(response.headers), content=b"".join(parts))

    def check_key(self) -> None:
        """Raises ProviderNotConfigured if the provider's key is not set."""
        if not self.config.is_usable:
            variable = self.config.key_variable
            raise ProviderNotConfigured(f"{variable} is not set: set it to use models of {self.config.name}.")

    async def _send(self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]) -> httpx2.Response:
        self.check_key()
        if self.is_circuit_open:
            left = max(1, round(self._open_until - time.monotonic()))
            raise self.fault("cannot be reached", 503, "upstream_unreachable", retry_after=left, is_transient=True)
        num_retries = 0 if method == "GET" else self.config.num_retries  # a list of models is asked for again later
        for attempt in range(num_retries + 1):
            try:
                return await self._try(method, url, body, headers)
            except UpstreamError as error:
                wait = _wait(error, attempt)
                if attempt == num_retries or wait is None:
                    self._note(error)
                    raise
                log.info(
                    "a request to %s failed and is sent again in %.1f s: %s", self.config.name, wait, error.message
                )
                await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def _try(self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]) -> httpx2.Response:
        client = self._connected()
        sent = {**self.config.headers, **headers, "accept-encoding": "identity", "content-type": "application/json"}
        try:
            response = await client.send(client.build_request(method, url, content=body, headers=sent), stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise self.fault("cannot be reached", 502, "upstream_unreachable", is_transient=True) from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError) as error:
            raise self.fault(
                "cannot be called: its base URL or API key is not valid", 502, "upstream_unreachable"
            ) from error
        except httpx2.HTTPError as error:
            raise self.transport_fault(error) from error
        self._num_failures = 0
        if response.status_code >= 300:
            raise self._refusal(await self.read(response))
        self.last_success = time.time()
        return response

    def _connected(self) -> httpx2.AsyncClient:
        if self._client is None:
            timeout = httpx2.Timeout(self.config.timeout, connect=CONNECT_TIMEOUT, pool=None)
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
            self._client = httpx2.AsyncClient(timeout=timeout, limits=limits, transport=self._transport)
        return self._client

    def _note(self, error: UpstreamError) -> None:
        """Counts a request that failed for good; after NUM_FAILURES without a connection the circuit opens for
        COOLDOWN seconds."""
        if error.code != "upstream_unreachable" or not error.is_transient:
            return
        self._num_failures += 1
        if self._num_failures >= NUM_FAILURES:
            self._open_until, self._num_failures = time.monotonic() + COOLDOWN, 0

    # --- errors

    def fault(self, what: str, status: int, code: str, **more: Any) -> UpstreamError:
        """Returns the error for what the provider did, such as `cannot be reached`."""
        return UpstreamError(f"{self.config.name} {what}.", status=status, code=code, **more)

    def transport_fault(self, error: Exception) -> UpstreamError:
        """Returns the error for a connection that failed after it was made."""
        if isinstance(error, httpx2.TimeoutException):
            return self.fault(f"sent nothing for {self.config.timeout:g} seconds", 504, "upstream_timeout")
        return self.fault("closed the connection too early", 502, "upstream_disconnected", is_transient=True)

    def _refusal(self, response: httpx2.Response) -> UpstreamError:
        """Returns the error for an answer whose status is not one of success."""
        try:
            body = json.loads(response.content)
        except (ValueError, RecursionError):
            body = None
        return self.error_from(response.status_code, body, response.headers)

    def error_from(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> UpstreamError:
        """Returns the error that a provider sent, without the key, which some providers repeat."""
        error = error_of(status, body, self.config.name, self.config.key_variable, headers)
        for secret in [value.removeprefix("Bearer ") for value in self.config.headers.values()]:
            if len(secret) >= MIN_SECRET:
                error.message = error.message.replace(secret, "[redacted]")
        return error


def _wait(error: UpstreamError, attempt: int) -> float | None:
    """Returns the seconds to wait before the next attempt; None if there must be none."""
    if not error.is_transient:
        return None
    if error.retry_after is not None:
        milliseconds = error.headers.get("retry-after-ms")
        wait = error.retry_after if milliseconds is None else float(milliseconds) / 1000
        return float(wait) if wait <= LONGEST_WAIT else None
    return float(min(8.0, 0.5 * 2**attempt) * random.uniform(0.75, 1.25))


def _plain(headers: httpx2.Headers) -> httpx2.Headers:
    """Returns the headers without those that described the content before it was read."""
    outdated = ("content-encoding", "content-length", "transfer-encoding")
    return httpx2.Headers([(name, value) for name, value in headers.items() if name.lower() not in outdated])


# --- server-sent events


async def events_of(response: httpx2.Response, upstream: Upstream) -> AsyncGenerator[bytes]:
    """Yields the events of a streamed answer, each as it came, with the blank line behind it.

    Raises APIError; closes the response.
    """
    splitter = EventSplitter()
    try:
        async for part in response.aiter_raw():
            for event in splitter.put(part):
                yield event
            if splitter.num_pending > LARGEST:
                raise upstream.fault(f"sent an event of more than {LARGEST} bytes", 502, "upstream_invalid_response")
    except httpx2.HTTPError as error:
        raise upstream.transport_fault(error) from error
    finally:
        await response.aclose()
    if (last := splitter.end()) is not None:
        yield last


def dropped_params_header(names: Collection[str]) -> dict[str, str]:
    """Returns the header that tells a client which parameters were left out."""
    listed = header_value(*names)
    return {DROPPED_PARAMS: listed} if listed else {}
