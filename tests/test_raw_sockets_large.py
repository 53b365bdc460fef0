"""Headers and bodies that are too large are refused without being read, and memory stays.

The numbers are rows of rows.md.
"""

from collections.abc import Callable, Iterator

import pytest
from process import Server
from raw_http import JSON, Closed, Connection, bounded_peak, error_of, request
from raw_sockets import (
    CHAT,
    CHUNKED,
    GET,
    LENGTH,
    LIMIT,
    SMALL,
    SMUGGLED,
    STATUS,
    WAITS,
    converse,
    head,
)

pytestmark = pytest.mark.usefixtures("served_before_and_after")


# --- row 23: headers


def streamed_header(size: int) -> Iterator[bytes]:
    yield b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Long: "
    for _ in range(size // 2**16):
        yield b"y" * 2**16
    yield b"\r\n\r\n"


HEADERS: dict[str, Callable[[], Iterator[bytes]]] = {
    "one-of-70-kB": lambda: iter([head("X: " + "y" * 70_000, first=GET)]),
    "name-of-70-kB": lambda: iter([head("x" * 70_000 + ": y", first=GET)]),
    "100-of-1-kB": lambda: iter([head(*[f"X{i}: " + "y" * 1000 for i in range(100)], first=GET)]),
    "1100-small": lambda: iter([head(*[f"X{i}: y" for i in range(1100)], first=GET)]),
    "20000-small": lambda: iter([head(*["X: y"] * 20_000, first=GET)]),
    "path-of-70-kB": lambda: iter([head(first="GET /" + "a" * 70_000 + " HTTP/1.1")]),
    "query-of-1-MB": lambda: iter([head(first="GET /v1/models?" + "a" * 2**20 + " HTTP/1.1")]),
    "cookie-of-1-MB": lambda: iter([head("Cookie: " + "a=b; " * 200_000, first=GET)]),
    "one-of-1-MB": lambda: streamed_header(2**20),
    "one-of-64-MB": lambda: streamed_header(64 * 2**20),
    "64-MB-of-small": lambda: iter([b"GET / HTTP/1.1\r\n", *[b"X: y\r\n" * 10_000] * 1000]),
    "folded-1-MB": lambda: iter([b"GET / HTTP/1.1\r\nX: y\r\n", *[b" y\r\n" * 1000] * 260, b"\r\n"]),
    "before-a-body": lambda: iter([head("X: " + "y" * 70_000, LENGTH), SMALL]),
}


@pytest.mark.parametrize("name", HEADERS)
def test_too_many_headers_are_refused_and_take_no_memory_row23(bounded: Server, name: str) -> None:
    with bounded_peak(bounded, 30 * 2**20), Connection(bounded.url, timeout=WAITS + 3) as connection:
        sent = connection.send_unless_closed(HEADERS[name]())
        answer = connection.rest()
    assert set(map(int, STATUS.findall(answer))) <= {400, 414, 431}, answer[:300]
    assert sent < 20 * 2**20, f"the server took {sent / 2**20:.0f} MiB"


def test_headers_below_the_limit_are_taken_row23(bounded: Server) -> None:
    with Connection(bounded.url) as connection:
        for lines in (["X: " + "y" * 60_000], [f"X{i}: y" for i in range(900)]):
            connection.send(head(*lines, first=GET))
            assert connection.reply().status == 200


# --- row 21: bodies

TARGETS = (CHAT, "/v1/embeddings", "/tokenize", "/v1/responses")


@pytest.mark.parametrize("path", TARGETS)
@pytest.mark.parametrize("size", [LIMIT + 1, 2**31, 2**40, 10**18])
def test_a_body_that_says_it_is_too_large_is_refused_unread_row21(bounded: Server, path: str, size: int) -> None:
    with Connection(bounded.url, timeout=3) as connection:
        connection.send(request("POST", path, b"", (*JSON, ("content-length", str(size)))))
        reply = connection.reply("POST")
        assert reply.status == 413 and error_of(reply), reply


def endless_chunks(piece: bytes, count: int) -> Iterator[bytes]:
    yield head(CHUNKED, first=f"POST {CHAT} HTTP/1.1")
    for _ in range(count):
        yield b"%x\r\n%s\r\n" % (len(piece), piece)


def endless_body(size: int, path: str = CHAT) -> Iterator[bytes]:
    yield request("POST", path, b"", (*JSON, ("content-length", str(size))))
    for _ in range(size // 2**16):
        yield b" " * 2**16


BODIES: dict[str, Callable[[], Iterator[bytes]]] = {
    "large-chunks": lambda: endless_chunks(b" " * 2**16, 1500),
    "small-chunks": lambda: endless_chunks(b" " * 64, 100_000),
    "one-chunk": lambda: iter([head(CHUNKED, first=f"POST {CHAT} HTTP/1.1"), b"ffffffff\r\n", *[b" " * 2**16] * 1500]),
    "length": lambda: endless_body(100 * 2**20),
}


@pytest.mark.parametrize("name", BODIES)
def test_reading_stops_at_the_limit_row21(bounded: Server, name: str) -> None:
    with bounded_peak(bounded, 20 * 2**20 + 2 * LIMIT), Connection(bounded.url, timeout=10) as connection:
        sent = connection.send_unless_closed(BODIES[name]())
        try:
            reply = connection.reply("POST")
        except Closed:
            reply = None
    assert reply is None or reply.status == 413
    if name != "small-chunks":
        assert sent < 30 * 2**20, f"the server took {sent / 2**20:.0f} MiB"


@pytest.mark.parametrize("path", ["/nowhere", "/v1/models", "/health"])
def test_bodies_that_nobody_reads_take_no_memory_row21(bounded: Server, path: str) -> None:
    with bounded_peak(bounded, 20 * 2**20), Connection(bounded.url, timeout=10) as connection:
        connection.send_unless_closed(endless_body(50 * 2**20, path))
        try:
            assert connection.reply("POST").status in (404, 405, 413)
        except Closed:
            pass


def test_what_follows_a_body_that_is_too_large_is_not_a_request_row21(bounded: Server) -> None:
    body = SMUGGLED * (3 * 2**20 // len(SMUGGLED))
    answer, _ = converse(bounded, request("POST", CHAT, body), within=3)
    assert b"SMUGGLED" not in answer and len(STATUS.findall(answer)) <= 1, answer[:500]
