"""A proxy that passes every byte on as it comes, and keeps what went both ways."""

import asyncio
import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPException, HTTPMessage, HTTPResponse, parse_headers
from typing import Any, cast
from urllib.parse import urlsplit

from upstreams import listening


@dataclass(frozen=True)
class Exchange:
    """A request and its answer. An answer that was cut off is not whole; one that never began has the status 0."""

    method: str
    path: str
    headers: HTTPMessage = field(repr=False)
    body: bytes = field(repr=False)
    at: float  # time at which the request's first bytes came
    status: int = 0
    answer_headers: HTTPMessage = field(default_factory=HTTPMessage, repr=False)
    answer: bytes = field(default=b"", repr=False)
    is_whole: bool = False

    @property
    def route(self) -> str:
        """The path without its query."""
        return urlsplit(self.path).path

    @property
    def sent(self) -> Any:
        return json.loads(self.body)

    @property
    def told(self) -> Any:
        return json.loads(self.answer)

    @property
    def is_stream(self) -> bool:
        return str(self.answer_headers.get("content-type", "")).startswith("text/event-stream")


class _OneAfterTheOther(io.BytesIO):
    """Bytes of several answers: the reader of one does not close them for the next."""

    def makefile(self, mode: str) -> "_OneAfterTheOther":
        return self

    def close(self) -> None:
        pass

    @property
    def is_at_end(self) -> bool:
        return self.tell() == len(self.getbuffer())


@dataclass(frozen=True)
class Wire:
    """The bytes of one client's connection, each way."""

    asked: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)
    arrivals: list[tuple[int, float]] = field(default_factory=list)  # bytes asked so far, and when there were so many

    def ask(self, data: bytes) -> None:
        self.asked.extend(data)
        self.arrivals.append((len(self.asked), time.monotonic()))

    def exchanges(self) -> Iterator[Exchange]:
        asked, answered = io.BytesIO(bytes(self.asked)), _OneAfterTheOther(bytes(self.answered))
        while line := asked.readline():
            at = next(came for length, came in self.arrivals if length >= asked.tell())
            method, path, _ = line.decode().split(" ")
            headers = parse_headers(asked)
            yield _answered(Exchange(method, path, headers, _body(asked, headers), at), answered)


def _body(file: io.BytesIO, headers: HTTPMessage) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return file.read(int(headers.get("content-length", 0)))
    body = b""
    while size := int(file.readline().split(b";")[0] or b"0", 16):
        body += file.read(size)
        file.readline()
    file.readline()
    return body


def _answered(asked: Exchange, file: _OneAfterTheOther) -> Exchange:
    """The request with its answer, as far as that has come."""
    if file.is_at_end:
        return asked
    response = HTTPResponse(cast(socket.socket, file), method=asked.method)  # which it only asks for its file
    response.begin()
    try:
        answer, is_whole = response.read(), True
    except HTTPException as error:
        answer, is_whole = getattr(error, "partial", b""), False
    return replace(
        asked,
        status=response.status,
        answer_headers=response.headers,
        answer=answer,
        is_whole=is_whole,
    )


class Recorder:
    """Forwards connections to a server. Its `exchanges` are read from the bytes when they are asked for."""

    def __init__(self, url: str) -> None:
        target = urlsplit(url)
        assert target.hostname and target.port
        self.target = (target.hostname, target.port)
        self.wires: list[Wire] = []
        self.url = ""

    @property
    def exchanges(self) -> list[Exchange]:
        """All so far, in the order in which they were asked."""
        found = [exchange for wire in self.wires for exchange in wire.exchanges()]
        return sorted(found, key=lambda exchange: exchange.at)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.CancelledError):
            upstream_reader, upstream_writer = await asyncio.open_connection(*self.target)
            wire = Wire()
            self.wires.append(wire)
            ways = [
                asyncio.ensure_future(_pass_on(reader, upstream_writer, wire.ask)),
                asyncio.ensure_future(_pass_on(upstream_reader, writer, wire.answered.extend)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)  # who leaves, leaves for both
            finally:
                upstream_writer.close()
                await asyncio.gather(*ways, return_exceptions=True)
        writer.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, keep: Callable[[bytes], None]) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(2**16):
            keep(data)
            writer.write(data)
            await writer.drain()
        writer.close()


@contextmanager
def recording(url: str) -> Iterator[Recorder]:
    """A recording proxy in front of the server at `url`, until the block ends."""
    recorder = Recorder(url)
    with listening(recorder.serve) as recorder.url:
        yield recorder
