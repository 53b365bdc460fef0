"""Protocol: uvicorn's HTTP with bounds on what a connection may send, how slowly, and how slowly it may read.

uvicorn bounds none of these. A request that says its length in two ways is refused: proxies disagree on what it means.
"""

import asyncio
import json
import time
from http import HTTPStatus
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from config import Settings
from errors import APIError, InvalidRequest, Overloaded

MAX_HEADERS = 1000
OVERHEAD = 16  # bytes of chunks' heads for one of a body, at most
BYTES_PER_SECOND = 10_000  # that a body has to come with, beside BODY_TIMEOUT
LINGER = 5.0  # seconds that a client gets to read why it was refused
LARGEST_REST = 2**23  # bytes behind a refusal that are still read: many clients send all before they read an answer


class TooLarge(InvalidRequest):
    status = 431


class TooSlow(InvalidRequest):
    status = 408
    code = "request_timeout"


class Protocol(HttpToolsProtocol):
    """One connection. `with_bounds` makes the class for uvicorn."""

    bounds: ClassVar[Settings]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_reading_head = True
        self._head_size = 0
        self._num_messages = 0
        self._num_raw = self._num_received = 0  # bytes of the body, with the heads of its chunks and without
        self._num_discarded = 0
        self._began = 0.0
        self._error: APIError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    # --- the connection

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) > self.bounds.max_connections:
            self._refuse(Overloaded("There are too many connections; try again later.", retry_after=1))

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._error is not None or self.transport.is_closing():
            return self._discard(len(data))  # nothing behind a refusal is answered
        if self._is_reading_head and self._timer is None:
            self._await_head()
        num_messages, was_head = self._num_messages, self._is_reading_head
        super().data_received(data)
        if self._num_messages != num_messages or self._is_reading_head != was_head or self._error is not None:
            return  # it was a part of two things, which the parser's calls have seen
        if was_head:
            self._head_size += len(data)
            if self._head_size > self.bounds.max_header_size:
                self._refuse(self._head_too_large())
        else:
            self._num_raw += len(data)
            if self._num_raw > OVERHEAD * self._num_received + self.bounds.max_header_size:
                self._refuse(InvalidRequest("The body's chunks are mostly what describes them."))

    def _discard(self, size: int) -> None:
        self._num_discarded += size
        if self._num_discarded > LARGEST_REST:
            self.transport.abort()

    # --- the parser's calls

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_reading_head, self._head_size = True, 0
        self._num_raw = self._num_received = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            raise self._noted(TooLarge(f"A request has at most {MAX_HEADERS} headers."))

    def on_headers_complete(self) -> None:
        names = [name for name, _ in self.headers]
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.bounds.max_header_size:
            raise self._noted(self._head_too_large())
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (codings != [b"chunked"] or b"content-length" in names):
            raise self._noted(InvalidRequest("The body's length is said in two ways."))
        self._is_reading_head = False
        self._began = time.monotonic()
        self._arm(self.bounds.body_timeout, self._check_body)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_messages += 1
        self._is_reading_head = True
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """What was answered before all of it came is not waited for."""
        super().on_response_complete()
        if not self._is_reading_head and not self.transport.is_closing():
            self._error = InvalidRequest("answered")
            self._linger()

    # --- time

    def _await_head(self) -> None:
        self._arm(self.bounds.header_timeout, self._on_slow_head)

    def _arm(self, seconds: float, then: Any) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, then)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _on_slow_head(self) -> None:
        self._timer = None
        if self._head_size:
            self._refuse(TooSlow("The request's headers did not come in time."))
        else:  # it never said anything
            self.transport.close()

    def _check_body(self) -> None:
        """A large body may take long, one that drips may not."""
        self._timer = None
        deadline = self._began + self.bounds.body_timeout + self._num_received / BYTES_PER_SECOND
        left = deadline - time.monotonic()
        if left > 0:
            self._arm(left, self._check_body)
        elif self.cycle.response_started:
            self.transport.abort()
        else:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._refuse(TooSlow("The request's body did not come in time."))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.bounds.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()

    # --- refusals

    def _head_too_large(self) -> APIError:
        return TooLarge(f"A request's headers have at most {self.bounds.max_header_size} bytes.")

    def _noted(self, error: APIError) -> Exception:
        """What ends the parser, which answers by `send_400_response`."""
        self._error = error
        return httptools.HttpParserError(error.message)

    def send_400_response(self, msg: str) -> None:
        """For uvicorn, which calls it for what is no HTTP."""
        error, self._error = self._error or InvalidRequest("This is no valid HTTP request."), None
        self._refuse(error)

    def _refuse(self, error: APIError) -> None:
        """Answers, if nothing else is under way, and closes when the client had time to read it."""
        if self._error is not None or self.transport.is_closing():
            return
        self._error = error
        self._disarm()
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self.transport.write(_response(error))
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._linger()

    def _linger(self) -> None:
        """A connection that is closed while something comes is reset, and its client may never see the answer."""
        self._arm(LINGER, self.transport.abort)
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()


def _response(error: APIError) -> bytes:
    body = json.dumps(error.body()).encode()
    retry = f"retry-after: {error.retry_after}\r\n" if error.retry_after else ""
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
        f"{retry}content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


def with_bounds(settings: Settings) -> type[Protocol]:
    return type("BoundedProtocol", (Protocol,), {"bounds": settings})
