"""Server-sent events: how they are read and written, and how a stream of them begins, is kept alive and ends.

Local and relayed streams share it. It does not know what an error looks like: an EventEncoder writes the event for one.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastapi.responses import StreamingResponse

from errors import APIError
from telemetry import request_record

log = logging.getLogger(__name__)
T = TypeVar("T")

SILENCE = 15.0  # seconds without an event after which the client gets a comment
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # for proxies: pass events on at once
KEEP_ALIVE = b": keep-alive\n\n"
_BOM = b"\xef\xbb\xbf"
_END_OF_EVENT = re.compile(rb"\r\n\r\n|\n\r\n|\r\n\n|\n\n|\r\r")


# --- one event


def encode_event(data: str, name: str | None = None) -> bytes:
    """Returns an event with these data, which are one line, and this name."""
    return (f"event: {name}\n" if name else "").encode() + b"data: " + data.encode() + b"\n\n"


DONE = encode_event("[DONE]")


def data_of(event: bytes) -> bytes | None:
    """Returns the text of an event's `data:` lines; None for a comment."""
    lines = [line[5:].removeprefix(b" ") for line in event.splitlines() if line.startswith(b"data:")]
    return b"\n".join(lines) if lines else None


def name_of(event: bytes) -> str | None:
    """Returns the text of an event's last `event:` line; None if it has none."""
    names = [line[6:].strip() for line in event.splitlines() if line.startswith(b"event:")]
    return names[-1].decode("utf-8", "replace") if names else None


class EventSplitter:
    """Bytes as they come from the network -> events as they were sent, each with the blank line behind it."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._num_searched = 0  # bytes in which no event ends
        self._is_first = True

    @property
    def num_pending(self) -> int:
        """The number of bytes that wait for the end of their event."""
        return len(self._text)

    def put(self, part: bytes) -> list[bytes]:
        """Returns the events that end in this part."""
        self._text += part
        if self._is_first and (len(self._text) >= len(_BOM) or not _BOM.startswith(bytes(self._text))):
            self._text, self._is_first = self._text.removeprefix(_BOM), False
        events: list[bytes] = []
        start = 0
        while end := _END_OF_EVENT.search(self._text, max(start, self._num_searched)):
            events.append(bytes(self._text[start : end.end()]))
            start = self._num_searched = end.end()
        del self._text[:start]
        self._num_searched = max(0, len(self._text) - 3)  # an end may be cut in two
        return events

    def end(self) -> bytes | None:
        """Returns the last event if no blank line came behind it, unless it was cut."""
        event = bytes(self._text)
        return event + b"\n\n" if event.strip() and _is_whole(event) else None


def _is_whole(event: bytes) -> bool:
    """Returns whether the data of an event are whole JSON, or `[DONE]`."""
    data = data_of(event)
    if data is None or data == b"[DONE]":
        return data is not None
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


# --- a stream of events


@dataclass(frozen=True)
class StreamFormat:
    """What a protocol's streams are called, and what is sent where nothing has come for a while."""

    media_type: str = "text/event-stream"
    keep_alive: bytes = KEEP_ALIVE  # empty: nothing is sent


EVENTS = StreamFormat()


class EventEncoder(Protocol):
    """How the items of a stream become server-sent events, or the lines of another format."""

    @property
    def format(self) -> StreamFormat: ...

    def event(self, item: Any) -> bytes:
        """Returns the event of an item; empty for one that the client does not get."""
        ...

    def failure(self, error: APIError) -> bytes:
        """Returns the last event of a stream that failed."""
        ...

    def end(self) -> bytes:
        """Returns the last event of a stream that did not fail; it may be empty."""
        ...


@dataclass(frozen=True)
class PassThroughEncoder:
    """A stream whose items are events already; `failure` writes the event for an error."""

    failure: Callable[[APIError], bytes]
    format = EVENTS

    def event(self, item: bytes) -> bytes:
        return item

    def end(self) -> bytes:
        return b""


async def sse(items: AsyncGenerator[Any], encoder: EventEncoder) -> AsyncGenerator[bytes]:
    """Yields the events of a stream; if it fails, the last one says so, and the request's record has the error."""
    try:
        async with aclosing(items):
            async for item in items:
                if event := encoder.event(item):
                    yield event
        if end := encoder.end():
            yield end
    except APIError as error:
        request_record.current().error = error.code or error.type
        yield encoder.failure(error)
    except Exception:
        log.exception("a stream failed")
        request_record.current().error = "server_error"
        yield encoder.failure(APIError("The server failed; the error is in its log."))


async def await_first(items: AsyncGenerator[T], silence: float = SILENCE) -> AsyncGenerator[T]:
    """Waits for the first item, so that an early error still gets an HTTP status, and returns the same stream.

    After `silence` seconds it returns anyway, so that the client hears something; errors are events from then on.
    """
    first = asyncio.ensure_future(anext(items))
    try:
        await asyncio.wait({first}, timeout=silence)
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        raise
    return _after(first, items)


async def marking_silence(items: AsyncGenerator[T], silence: float) -> AsyncGenerator[T | None]:
    """Yields the items; before them None, if the first one takes longer than `silence` seconds."""
    first = asyncio.ensure_future(anext(items))
    rest = _after(first, items)
    try:
        await asyncio.wait({first}, timeout=silence)
        if not first.done():
            yield None
        async for item in rest:
            yield item
    finally:
        await rest.aclose()  # which does nothing if it has not begun
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await items.aclose()


async def _after(first: "asyncio.Future[T]", rest: AsyncGenerator[T]) -> AsyncGenerator[T]:
    """Yields the stream whose first item was, or is still, awaited."""
    try:
        yield await first
        async for item in rest:
            yield item
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await rest.aclose()


class EventStream(StreamingResponse):
    """A response of events, with a comment after each silence; it closes the stream when it ends, however it ends."""

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        failure: Callable[[APIError], bytes],
        headers: Mapping[str, str],
        silence: float = SILENCE,
        format: StreamFormat = EVENTS,
    ) -> None:
        """failure: writes the event for an error; silence: seconds."""
        super().__init__(events, media_type=format.media_type, headers={**headers, **STREAM_HEADERS})
        self._events = events
        self._failure = failure
        self._silence, self._keep_alive = silence, format.keep_alive

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["deadline"].failure = self._failure
        sent = time.monotonic()

        async def send_and_note(message: Any) -> None:
            nonlocal sent
            sent = time.monotonic()
            await send(message)

        async def keep_alive() -> None:
            """Sends a comment whenever nothing was sent for a while: proxies cut a silent connection."""
            while True:
                await asyncio.sleep(max(0.01, sent + self._silence - time.monotonic()))
                if time.monotonic() - sent >= self._silence:
                    await send_and_note({"type": "http.response.body", "body": self._keep_alive, "more_body": True})

        keeper = asyncio.create_task(keep_alive()) if self._keep_alive else None
        try:
            await super().__call__(scope, receive, send_and_note)
        finally:
            if keeper is not None:
                keeper.cancel()
            await self._events.aclose()
