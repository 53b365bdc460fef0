"""BoundedHttpProtocol: uvicorn's HTTP with limits on how much and how slowly a client may send, and how slowly read.

uvicorn limits none of these. A request that declares its length in two ways is refused, because proxies and servers
disagree on where it ends (request smuggling).
"""

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from config import Settings
from errors import APIError, InvalidRequest, Overloaded
from server.error_formats import error_format
from server.transport import Transport

MAX_HEADERS = 1000
OVERHEAD = 16  # most bytes of chunk framing per byte of a body
BYTES_PER_SECOND = 10_000  # of a body, at least; BODY_TIMEOUT is added to the time for it
LARGEST_REST = 2**23  # bytes read after a refusal: many clients send everything before they read an answer
BLANK_LINE = b"\r\n\r\n"  # ends the headers, and a chunked body
_UPGRADE = re.compile(rb"\r\nupgrade(?=[ \t]*:)", re.IGNORECASE)
_NO_UPGRADE = b"\r\nignored"


class TooLarge(InvalidRequest):
    status = 431


class TooSlow(InvalidRequest):
    status = 408
    code = "request_timeout"


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection with one request at a time: data behind a request waits, unparsed, until that is answered.

    `with_bounds` makes the subclass for uvicorn.
    """

    bounds: ClassVar[Settings]

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._is_reading_head = True
        self.url = b""
        self._head_size = 0
        self._last = b""  # bytes at the end of this head or body, where a blank line may have begun
        self._length: int | None = 0  # bytes of the body; None if it is chunked
        self._num_raw = self._num_received = 0  # bytes of the body, with chunk framing and without
        self._num_discarded = 0
        self._held = bytearray()  # data that arrived behind the request that is being answered
        self._began = 0.0
        self._path = ""  # of the request, once its head is complete
        self._error: APIError | None = None
        self._timer: asyncio.TimerHandle | None = None

    # --- the connection

    def connection_made(self, transport: Any) -> None:
        bounded: Any = Transport(transport, self.loop, self.bounds.write_timeout, lambda: self._is_awaited)
        super().connection_made(bounded)
        self._await_head()
        if len(self.connections) > self.bounds.max_connections:
            self._refuse(
                Overloaded(
                    f"There are too many connections: {self.bounds.max_connections} are allowed; try again later.",
                    retry_after=1,
                )
            )

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.transport.abort()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        """Whether a complete request is being answered, so that the data behind it has to wait."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    @property
    def _is_awaited(self) -> bool:
        """Whether the client may still be sending data that will not be read."""
        return not self._is_reading_head or self._error is not None

    def data_received(self, data: bytes) -> None:
        if self._error is not None or self.transport.is_closing():
            return self._discard(len(data))  # nothing that follows a refusal is answered
        start = 0
        while start < len(data) and not self._is_answering and self._error is None:
            start = self._feed(data, start)
        if self._is_answering:
            self._held += data[start:]
            if len(self._held) > self.bounds.max_header_size:
                self.flow.pause_reading()

    def _feed(self, data: bytes, start: int) -> int:
        """Gives the parser at most the rest of one head or one body. Returns the position behind it."""
        if self._is_reading_head:
            return self._feed_head(data, start)
        end = self._behind_blank_line(data, start) if self._length is None else start + self._length - self._num_raw
        self._num_raw += len(data[start:end])
        super().data_received(data[start:end])
        is_over = self._num_raw > OVERHEAD * self._num_received + self.bounds.max_header_size
        if is_over and not self._is_reading_head:
            self._refuse(InvalidRequest("The body's chunks carry too little data for their framing: send larger ones."))
        return end

    def _feed_head(self, data: bytes, start: int) -> int:
        while not self._head_size and data[start : start + 1] in (b"\r", b"\n"):  # RFC 9112, 2.2
            start += 1
        if start == len(data):
            return start
        if self._timer is None:
            self._await_head()
        end = self._behind_blank_line(data, start)
        self._head_size += end - start
        # The offer of another protocol is hidden: the parser would take the rest for data of that protocol
        super().data_received(_UPGRADE.sub(_NO_UPGRADE, data[start:end]))
        if self._is_reading_head and self._head_size > self.bounds.max_header_size:
            self._refuse(self._head_too_large())
        return end

    def _behind_blank_line(self, data: bytes, start: int) -> int:
        """Returns the position behind the next blank line; the end of the data if there is none."""
        before = self._last
        if (index := (before + data[start : start + 3]).find(BLANK_LINE)) >= 0:
            end = start + index + len(BLANK_LINE) - len(before)
        else:
            index = data.find(BLANK_LINE, start)
            end = len(data) if index < 0 else index + len(BLANK_LINE)
        self._last = (before + data[max(start, end - 3) : end])[-3:]
        return end

    def _discard(self, size: int) -> None:
        self._num_discarded += size
        if self._num_discarded > LARGEST_REST:
            self.transport.abort()

    # --- callbacks of the parser

    def on_message_begin(self) -> None:
        if self._is_answering:
            raise self._parser_error(InvalidRequest("The request is malformed: another one began before it ended."))
        super().on_message_begin()
        self._is_reading_head, self._path = True, ""

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._is_reading_head:
            return  # a trailer of a chunked body: it comes after the request was checked, and is ignored
        super().on_header(name, value)
        if len(self.headers) > MAX_HEADERS:
            raise self._parser_error(TooLarge(f"The request has more than {MAX_HEADERS} headers."))

    def on_headers_complete(self) -> None:
        names = [name for name, _ in self.headers]
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self.bounds.max_header_size:
            raise self._parser_error(self._head_too_large())
        codings = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (codings != [b"chunked"] or b"content-length" in names):
            raise self._parser_error(
                InvalidRequest("The request's Transfer-Encoding must be chunked alone, without a Content-Length.")
            )
        lengths = [int(value) for name, value in self.headers if name == b"content-length"]
        self._length = None if codings else max(lengths, default=0)
        self._is_reading_head, self._last = False, b""
        self._num_raw = self._num_received = 0
        self._began = time.monotonic()
        self._arm(self.bounds.body_timeout, self._check_body)
        super().on_headers_complete()
        self._path = self.scope["path"]

    def on_body(self, body: bytes) -> None:
        self._num_received += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_reading_head, self._head_size, self._last = True, 0, b""
        self._disarm()
        super().on_message_complete()

    # --- answers

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        """Closes the connection after an answer that begins before all of its request has arrived, and says so."""

        async def answer(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
            async def send_as_last(message: Any) -> None:
                if message["type"] == "http.response.start" and cycle.more_body:
                    cycle.keep_alive = False
                await send(message)

            await app(scope, receive, send_as_last)

        super()._start_asgi_task(cycle, answer)

    def on_response_complete(self) -> None:
        """Reads the next request, if its data has arrived."""
        super().on_response_complete()
        data, self._held = bytes(self._held), bytearray()
        if data and not self.transport.is_closing():
            self.data_received(data)

    # --- time

    def _await_head(self) -> None:
        self._arm(self.bounds.header_timeout, self._on_slow_head)

    def _arm(self, seconds: float, action: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None

    def _on_slow_head(self) -> None:
        self._timer = None
        if self._head_size:
            seconds = self.bounds.header_timeout
            self._refuse(TooSlow(f"The request's headers did not arrive within {seconds:g} seconds: send them faster."))
        else:  # the client has not begun a request
            self.transport.close()

    def _check_body(self) -> None:
        """Refuses a body that comes too slowly; a large one may take long."""
        self._timer = None
        deadline = self._began + self.bounds.body_timeout + self._num_received / BYTES_PER_SECOND
        left = deadline - time.monotonic()
        if left > 0:
            self._arm(left, self._check_body)
        elif self.cycle.response_started:
            self.transport.abort()
        else:
            self._refuse(
                TooSlow(
                    f"The request's body did not arrive within {self.bounds.body_timeout:g} seconds, plus one "
                    f"for every {BYTES_PER_SECOND} bytes of it: send it faster."
                )
            )

    # --- refusals

    def _head_too_large(self) -> APIError:
        limit = self.bounds.max_header_size
        return TooLarge(
            f"The request's headers are larger than the limit of {limit} bytes: send fewer or shorter ones."
        )

    def _parser_error(self, error: APIError) -> Exception:
        """Makes the exception that stops the parser; uvicorn then calls `send_400_response`, which sends `error`."""
        self._error = error
        return httptools.HttpParserError(error.message)

    def send_400_response(self, msg: str) -> None:
        """Answers with the error of `_parser_error`. uvicorn also calls it for data that is not HTTP."""
        error, self._error = self._error or InvalidRequest("The request is not valid HTTP."), None
        self._refuse(error)

    def _refuse(self, error: APIError) -> None:
        """Sends the error unless an answer has begun, and closes the connection when the client had time to read it."""
        if self._error is not None or self.transport.is_closing():
            return
        self._error = error
        self._disarm()
        is_under_way = self.cycle is not None and not self.cycle.response_complete
        if not is_under_way or not self.cycle.response_started:
            path = self._path or self.url.partition(b"?")[0].decode("latin-1")
            self.transport.write(_response(error, path))
        if is_under_way:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


def _response(error: APIError, path: str) -> bytes:
    body = json.dumps(error_format(path).body(error)).encode()
    retry = f"retry-after: {error.retry_after}\r\n" if error.retry_after else ""
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\ncontent-type: application/json\r\n"
        f"{retry}content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


def with_bounds(settings: Settings) -> type[BoundedHttpProtocol]:
    """Makes the class of protocol that uvicorn is given, with the bounds of these settings."""
    return type("Protocol", (BoundedHttpProtocol,), {"bounds": settings})
