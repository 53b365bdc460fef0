"""Upstream: HTTP to one provider, with its timeouts, retries and errors. Of formats it knows server-sent events.

A retry happens only before anything was read of an answer, and never beside a client that has left: leaving an await
here closes the connection.
"""

import asyncio
import json
import logging
import random
import re
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import httpx2

from errors import APIError, ProviderNotConfigured, UpstreamError
from providers.upstream_errors import error_of
from server.error_formats import OPENAI
from telemetry import request_record

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 5.0  # seconds
KEEP_ALIVE = 15.0  # seconds of silence after which a comment is sent
LONGEST_WAIT = 20.0  # seconds; a provider that asks for more is not waited for
LARGEST = 64 * 2**20  # bytes of an answer, or of one event
NUM_FAILURES, COOLDOWN = 3, 30.0  # requests in a row that found no connection; seconds in which no more are tried
MIN_SECRET = 8  # characters of what is taken for a key
_BOM = b"\xef\xbb\xbf"
_END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\r\n|\r\n\n|\n\n|\r\r")


@dataclass(frozen=True)
class UpstreamConfig:
    """How a provider is reached."""

    name: str
    key_variable: str  # what a person sets
    headers: Mapping[str, str] = field(repr=False)  # with the key
    needs_key: bool
    timeout: float  # seconds between bytes
    total_timeout: float  # seconds for an answer that is not streamed
    num_retries: int = 2

    @property
    def is_usable(self) -> bool:
        return bool(self.headers) or not self.needs_key


class Upstream:
    def __init__(self, access: UpstreamConfig, transport: httpx2.AsyncBaseTransport | None = None) -> None:
        self.access = access
        self._transport = transport
        self._client: httpx2.AsyncClient | None = None
        self._num_failures, self._rests_until = 0, 0.0
        self.last_success: float | None = None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    @property
    def was_asked(self) -> bool:
        return self._client is not None

    @property
    def is_resting(self) -> bool:
        return time.monotonic() < self._rests_until

    async def whole(self, method: str, url: str, body: bytes | None) -> httpx2.Response:
        """A successful answer, read. Raises APIError."""
        try:
            async with asyncio.timeout(self.access.total_timeout):
                return await self.read(await self._send(method, url, body))
        except TimeoutError as error:
            raise self.fault(
                f"did not answer within {self.access.total_timeout:g} seconds", 504, "upstream_timeout"
            ) from error

    async def opened(self, url: str, body: bytes) -> httpx2.Response:
        """A successful answer, of which nothing is read but the headers. Raises APIError; the caller closes it."""
        return await self._send("POST", url, body)

    async def read(self, response: httpx2.Response) -> httpx2.Response:
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

    async def _send(self, method: str, url: str, body: bytes | None) -> httpx2.Response:
        if not self.access.is_usable:
            variable = self.access.key_variable
            raise ProviderNotConfigured(f"{variable} is not set: set it to use models of {self.access.name}.")
        if self.is_resting:
            left = max(1, round(self._rests_until - time.monotonic()))
            raise self.fault("cannot be reached", 503, "upstream_unreachable", retry_after=left, is_passing=True)
        num_retries = 0 if method == "GET" else self.access.num_retries  # lists can wait
        for attempt in range(num_retries + 1):
            try:
                return await self._try(method, url, body)
            except UpstreamError as error:
                wait = _wait(error, attempt)
                if attempt == num_retries or wait is None:
                    self._note(error)
                    raise
                log.info(
                    "a request to %s failed and is sent again in %.1f s: %s", self.access.name, wait, error.message
                )
                await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def _try(self, method: str, url: str, body: bytes | None) -> httpx2.Response:
        client = self._connected()
        headers = {**self.access.headers, "accept-encoding": "identity", "content-type": "application/json"}
        try:
            response = await client.send(client.build_request(method, url, content=body, headers=headers), stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise self.fault("cannot be reached", 502, "upstream_unreachable", is_passing=True) from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError) as error:
            raise self.fault(
                "cannot be called: its base URL or API key is not valid", 502, "upstream_unreachable"
            ) from error
        except httpx2.HTTPError as error:
            raise self.transport_fault(error) from error
        self._num_failures, self.last_success = 0, time.time()
        if response.status_code >= 300:
            raise self._refusal(await self.read(response))
        return response

    def _connected(self) -> httpx2.AsyncClient:
        if self._client is None:
            timeout = httpx2.Timeout(self.access.timeout, connect=CONNECT_TIMEOUT, pool=None)
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
            self._client = httpx2.AsyncClient(timeout=timeout, limits=limits, transport=self._transport)
        return self._client

    def _note(self, error: UpstreamError) -> None:
        """After the last attempt of a request."""
        if error.code != "upstream_unreachable" or not error.is_passing:
            return
        self._num_failures += 1
        if self._num_failures >= NUM_FAILURES:
            self._rests_until, self._num_failures = time.monotonic() + COOLDOWN, 0

    # --- errors

    def fault(self, what: str, status: int, code: str, **more: Any) -> UpstreamError:
        return UpstreamError(f"{self.access.name} {what}.", status=status, code=code, **more)

    def transport_fault(self, error: Exception) -> UpstreamError:
        if isinstance(error, httpx2.TimeoutException):
            return self.fault(f"sent nothing for {self.access.timeout:g} seconds", 504, "upstream_timeout")
        return self.fault("closed the connection too early", 502, "upstream_disconnected", is_passing=True)

    def _refusal(self, response: httpx2.Response) -> UpstreamError:
        """A status that is none of success, in OpenAI's shape."""
        try:
            body = json.loads(response.content)
        except (ValueError, RecursionError):
            body = None
        return self.told(response.status_code, body, response.headers)

    def told(self, status: int, body: Any, headers: Mapping[str, str] | None = None) -> UpstreamError:
        """The error that a provider told of; some repeat the key."""
        error = error_of(status, body, self.access.name, self.access.key_variable, headers)
        for secret in [value.removeprefix("Bearer ") for value in self.access.headers.values()]:
            if len(secret) >= MIN_SECRET:
                error.message = error.message.replace(secret, "[redacted]")
        return error


def _wait(error: UpstreamError, attempt: int) -> float | None:
    """Seconds before the next attempt; None: there is none."""
    if not error.is_passing:
        return None
    if error.retry_after is not None:
        milliseconds = error.headers.get("retry-after-ms")
        asked = error.retry_after if milliseconds is None else float(milliseconds) / 1000
        return float(asked) if asked <= LONGEST_WAIT else None
    return float(min(8.0, 0.5 * 2**attempt) * random.uniform(0.75, 1.25))


def _plain(headers: httpx2.Headers) -> httpx2.Headers:
    """What the content that was read is not described by any more."""
    gone = ("content-encoding", "content-length", "transfer-encoding")
    return httpx2.Headers([(name, value) for name, value in headers.items() if name.lower() not in gone])


# --- server-sent events


async def events_of(response: httpx2.Response, upstream: Upstream) -> AsyncGenerator[bytes]:
    """Each event as it came, with the blank line behind it. Raises APIError; closes the response."""
    text, searched, is_first = bytearray(), 0, True
    try:
        async for part in response.aiter_raw():
            text += part
            if is_first and (len(text) >= len(_BOM) or not _BOM.startswith(bytes(text))):
                text, is_first = text.removeprefix(_BOM), False
            start = 0
            while found := _END_OF_EVENT.search(text, max(start, searched)):
                yield bytes(text[start : found.end()])
                start = searched = found.end()
            del text[:start]
            searched = max(0, len(text) - 3)  # an end may be cut in two
            if len(text) > LARGEST:
                raise upstream.fault(f"sent an event of more than {LARGEST} bytes", 502, "upstream_invalid_response")
    except httpx2.HTTPError as error:
        raise upstream.transport_fault(error) from error
    finally:
        await response.aclose()
    if text.strip() and _is_whole(bytes(text)):
        yield bytes(text) + b"\n\n"


def _is_whole(event: bytes) -> bool:
    """Whether the last event, behind which no blank line came, was not cut."""
    data = data_of(event)
    if data is None or data == b"[DONE]":
        return data is not None
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def header_of(names: Iterable[str]) -> dict[str, str]:
    """What tells a client of parameters that were left out; headers are ASCII."""
    listed = ", ".join(json.dumps(name)[1:-1] for name in names)[:1000]
    return {"x-gateway-dropped-params": listed} if listed else {}


def data_of(event: bytes) -> bytes | None:
    """What the lines of an event that begin with `data:` say; None for a comment."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def name_of(event: bytes) -> str | None:
    names = [line[6:].strip() for line in event.splitlines() if line.startswith(b"event:")]
    return names[-1].decode("utf-8", "replace") if names else None


async def with_keep_alive(events: AsyncGenerator[bytes], silence: float = KEEP_ALIVE) -> AsyncGenerator[bytes]:
    """The same, with a comment whenever nothing came for a while."""
    async with aclosing(events):
        pending: asyncio.Future[bytes] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(events))
                done, _ = await asyncio.wait({pending}, timeout=silence)
                if not done:
                    yield b": keep-alive\n\n"
                    continue
                event, pending = pending.result(), None
                yield event
        except StopAsyncIteration:
            pending = None
        finally:
            if pending is not None:
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)


async def after(first: bytes, rest: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """A stream whose first event was awaited already."""
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


async def until_error(events: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """A failure becomes the last event."""
    try:
        async with aclosing(events):
            async for event in events:
                yield event
    except APIError as error:
        request_record.current().error = error.code or error.type
        yield failure_event(error)
    except Exception:
        log.exception("a relayed stream failed")
        yield failure_event(APIError("The server failed; the error is in its log."))


def failure_event(error: APIError) -> bytes:
    return OPENAI.event(error)
