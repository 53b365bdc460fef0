"""Bytes that are hardly HTTP, slow clients and clients that leave, against the real process.

Whatever comes, nothing that follows a request with two readings is answered, memory stays, and the next client is
served. The numbers are rows of rows.md.
"""

import itertools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from process import MAIN, Server, serve
from raw_http import JSON, Closed, Connection, bounded_peak, error_of, request, wait_for

MODEL, CHAT = "Tiny-Qwen3", "/v1/chat/completions"
LIMIT = 2 * 2**20  # bytes of a body
WAITS = 2.0  # seconds for headers, and for a body beside what its size allows
READS = 3.0  # seconds that a client may not read
MOST = 260  # connections
SETTINGS = {
    "MAX_BODY_SIZE": str(LIMIT),
    "HEADER_TIMEOUT": str(WAITS),
    "BODY_TIMEOUT": str(WAITS),
    "WRITE_TIMEOUT": str(READS),
    "MAX_CONNECTIONS": str(MOST),
}
HELLO: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
BODY = json.dumps({**HELLO, "temperature": 0}).encode()
SMALL = b'{"prompt": "x"}'
LASTING: dict[str, Any] = {**HELLO, "max_tokens": 440, "ignore_eos": True, "stream": True, "n": 32}  # seconds
SMUGGLED = b"GET /v1/models/SMUGGLED HTTP/1.1\r\nHost: x\r\n\r\n"
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), DTYPE="float32", MAX_MODEL_LEN="480", **SETTINGS) as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture(autouse=True)
def served_before_and_after(server: Server) -> Iterator[None]:
    before = greedy(server)
    yield
    assert wait_for(lambda: greedy(server) == before, 5)


def greedy(server: Server) -> Any:
    with Connection(server.url) as connection:
        reply = connection.ask("POST", CHAT, BODY)
        return reply.json["choices"][0]["message"] if reply.status == 200 else reply.status


def converse(server: Server, data: bytes, within: float = 5) -> tuple[bytes, bool]:
    """All that comes back, and whether the server ended the connection."""
    answer, deadline = b"", time.monotonic() + within
    with Connection(server.url) as connection:
        connection.send_unless_closed(data)
        while (left := deadline - time.monotonic()) > 0:
            connection.socket.settimeout(left)
            try:
                data = connection.read_some()
            except TimeoutError:
                break
            except ConnectionError:
                return answer, True
            if not data:
                return answer, True
            answer += data
    return answer, False


def head(*lines: str | bytes, first: str = "POST /tokenize HTTP/1.1") -> bytes:
    given = [line.encode() if isinstance(line, str) else line for line in lines]
    return b"\r\n".join((first.encode(), b"Host: x", b"Content-Type: application/json", *given)) + b"\r\n\r\n"


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + end


# --- rows 24 and 25: what has two readings, or none


@dataclass(frozen=True)
class Case:
    row: int
    name: str
    data: bytes = field(repr=False)
    statuses: frozenset[int] = frozenset({400})
    is_followed: bool = False  # where it has one reading after all, what follows is a request

    def __str__(self) -> str:
        return f"row{self.row:02}-{self.name}"


LENGTH, CHUNKED = f"Content-Length: {len(SMALL)}", "Transfer-Encoding: chunked"
BAD_LENGTHS = {
    "negative": "-1", "plus": "+15", "fraction": "15.0", "hexadecimal": "0xf", "exponent": "1e1", "underscore": "1_5",
    "words": "fifteen",
    "list-differing": "15, 16", "list-same": "15, 15", "blank-inside": "1 5", "huge": "1" * 40,
    "2-to-the-64": str(2**64), "2-to-the-63": str(2**63),
    "arabic": "\u0661\u0665", "semicolon": "15;x", "empty": "", "quoted": '"15"', "nul": "15\0",
}  # fmt: skip
BAD_CODINGS = {
    "identity": "identity", "unknown": "xchunked", "chunked-x": "chunkedx", "list": "chunked, chunked",
    "gzip-last": "chunked, gzip",
    "identity-chunked": "chunked, identity", "quoted": '"chunked"', "parameter": "chunked;x=y",
    "vertical-tab": "\x0bchunked", "nul": "chunked\0",
    "comma": ",", "empty": "",
}  # fmt: skip
BAD_SIZES = {
    "letters": b"zz", "negative": b"-1", "plus": b"+f", "prefix": b"0xf", "blank-inside": b"f f", "empty": b"",
    "underscore": b"0_f", "comma": b"f,",
    "2-to-the-64": b"1" + b"0" * 16, "wraps": b"1000000000000000f", "max": b"f" * 16,
    "huge": b"f" * 10_000, "fraction": b"f.0", "latin1": b"\xe9", "nul": b"f\0", "minus-zero": b"-0",
}  # fmt: skip
ROW_24 = [
    Case(24, "length-and-chunked", head(LENGTH, CHUNKED) + chunked(SMALL)),
    Case(24, "chunked-and-length", head(CHUNKED, LENGTH) + chunked(SMALL)),
    Case(24, "zero-length-and-chunked", head("Content-Length: 0", CHUNKED) + chunked(SMALL)),
    Case(24, "length-and-capital-chunked", head(LENGTH, "tRANSFER-eNCODING: Chunked") + chunked(SMALL)),
    Case(24, "length-and-identity", head(LENGTH, "Transfer-Encoding: identity") + SMALL),
    Case(24, "length-and-no-coding", head(LENGTH, "Transfer-Encoding: ") + SMALL),
    Case(24, "length-and-cut-chunked", head("Content-Length: 4", CHUNKED) + b"1\r\n"),
    Case(24, "two-lengths", head(LENGTH, "Content-Length: 16") + SMALL),
    Case(24, "two-lengths-same", head(LENGTH, LENGTH) + SMALL),
    Case(24, "two-lengths-zero", head("Content-Length: 0", LENGTH) + SMALL),
    Case(24, "three-lengths", head(LENGTH, LENGTH, "Content-Length: 1") + SMALL),
    Case(24, "chunked-twice", head(CHUNKED, CHUNKED) + chunked(SMALL)),
    Case(24, "chunked-then-identity", head(CHUNKED, "Transfer-Encoding: identity") + chunked(SMALL)),
    Case(24, "identity-then-chunked", head("Transfer-Encoding: identity", CHUNKED) + chunked(SMALL)),
    Case(24, "chunked-in-1.0", head(CHUNKED, "Connection: keep-alive",
        first="POST /tokenize HTTP/1.0") + chunked(SMALL), frozenset({200, 400})),
    Case(24, "length-in-get-and-chunked", head(LENGTH, CHUNKED, first="GET /v1/models HTTP/1.1") + chunked(SMALL)),
    Case(24, "blank-before-colon-length", head(f"Content-Length : {len(SMALL)}") + SMALL),
    Case(24, "blank-before-colon-chunked", head("Transfer-Encoding : chunked") + chunked(SMALL)),
    Case(24, "tab-before-colon-chunked", head(LENGTH, "Transfer-Encoding\t: chunked") + SMALL),
    Case(24, "folded-chunked", head(LENGTH, "Transfer-Encoding:\r\n chunked") + SMALL),
    Case(24, "folded-length", head("Content-Length:\r\n 15") + SMALL, frozenset({200, 400}), is_followed=True),
    Case(24, "chunked-behind-a-bare-return", head(LENGTH, "X: y\rTransfer-Encoding: chunked") + SMALL),
    Case(24, "chunked-behind-nul", head(LENGTH, "X: y\0Transfer-Encoding: chunked") + SMALL),
    *(Case(24, f"length-{name}", head(f"Content-Length: {value}") + SMALL, frozenset({400, 413})) for name,
        value in BAD_LENGTHS.items()),
    *(Case(24, f"coding-{name}", head(f"Transfer-Encoding: {value}") + chunked(SMALL), frozenset({400, 501}))
      for name, value in BAD_CODINGS.items()),
    *(Case(24, f"size-{name}", head(CHUNKED) + size + b"\r\n" + SMALL + b"\r\n0\r\n\r\n", frozenset({400, 408, 413}))
      for name, size in BAD_SIZES.items()),
    Case(24, "chunk-without-end", head(CHUNKED) + b"f\r\n" + SMALL + b"XX0\r\n\r\n"),
    Case(24, "chunk-too-long", head(CHUNKED) + b"e\r\n" + SMALL + b"\r\n0\r\n\r\n"),
    Case(24, "chunk-behind-line-feed", head(CHUNKED) + b"f\n" + SMALL + b"\n0\n\n"),
    Case(24, "chunk-behind-return", head(CHUNKED) + b"f\r" + SMALL + b"\r\n0\r\n\r\n"),
    Case(24, "extension-with-line-feed", head(CHUNKED) + b"f;a\nb\r\n" + SMALL + b"\r\n0\r\n\r\n"),
    Case(24, "extension-with-nul", head(CHUNKED) + b"f;a=\0\r\n" + SMALL + b"\r\n0\r\n\r\n"),
    Case(24, "extension-of-a-megabyte", head(CHUNKED) + b"f;a=" + b"x" * 2**20 + b"\r\n" + SMALL + b"\r\n0\r\n\r\n",
        frozenset({200, 400, 413, 431}), is_followed=True),
    Case(24, "trailer-of-a-megabyte", head(CHUNKED) + chunked(SMALL, end=b"0\r\nX: " + b"y" * 2**20 + b"\r\n\r\n"),
        frozenset({200, 400, 413, 431}), is_followed=True),
    Case(24, "trailers-without-number", head(CHUNKED) + chunked(SMALL, end=b"0\r\n" + b"X: y\r\n" * 100_000 + b"\r\n"),
        frozenset({200, 400, 413, 431}), is_followed=True),
]  # fmt: skip

GET = "GET /v1/models HTTP/1.1"
CLIENT_HELLO = (
    bytes.fromhex("160301007a010000760303")
    + bytes(range(32))
    + bytes.fromhex("00000413011302010000490000000e000c")
    + b"\0" * 64
)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
ROW_25 = [
    Case(25, "tls", CLIENT_HELLO),
    Case(25, "tls-2", b"\x80\x2e\x01\x03\x01" + bytes(41)),
    Case(25, "h2-preface", PREFACE, frozenset({400, 505})),
    Case(25, "ssh", b"SSH-2.0-OpenSSH_9.6\r\n"),
    Case(25, "smtp", b"EHLO example\r\n"),
    Case(25, "redis", b"*1\r\n$4\r\nPING\r\n"),
    Case(25, "proxy-protocol", b"PROXY TCP4 127.0.0.1 127.0.0.1 1 2\r\n" + head(first=GET)),
    Case(25, "nuls", bytes(1000)),
    Case(25, "ones", b"\xff" * 1000),
    Case(25, "noise", bytes((i * 7919 + i // 7) % 256 for i in range(5000))),
    Case(25, "http-0.9", b"GET /v1/models\r\n\r\n", frozenset({200, 400})),
    Case(25, "http-3", head(first="GET /v1/models HTTP/3.0"), frozenset({400, 505})),
    Case(25, "http-1.2", head(first="GET /v1/models HTTP/1.9"), frozenset({400, 505})),
    Case(25, "http-11", head(first="GET /v1/models HTTP/11.1"), frozenset({400, 505})),
    Case(25, "http-without-number", head(first="GET /v1/models HTTP/"), frozenset({400, 505})),
    Case(25, "small-http", head(first="GET /v1/models http/1.1"), frozenset({400, 505})),
    Case(25, "icap", head(first="GET /v1/models ICAP/1.0"), frozenset({400, 505})),
    Case(25, "unknown-method", head(first="FOO /v1/models HTTP/1.1"), frozenset({400, 405, 501})),
    Case(25, "small-method", head(first="get /v1/models HTTP/1.1"), frozenset({400, 405, 501})),
    Case(25, "no-method", head(first=" /v1/models HTTP/1.1")),
    Case(25, "method-of-100k", head(first="G" * 100_000 + " / HTTP/1.1"), frozenset({400, 405, 431, 501})),
    Case(25, "nul-in-path", head(first="GET /v1/mo\0dels HTTP/1.1")),
    Case(25, "latin1-in-path", b"GET /v1/\xe9\xff HTTP/1.1\r\nHost: x\r\n\r\n", frozenset({400, 404})),
    Case(25, "return-in-path", head(first="GET /v1/mo\rdels HTTP/1.1")),
    Case(25, "three-parts", head(first="GET /v1/models x HTTP/1.1")),
    Case(25, "nul-in-value", head("X: a\0b", first=GET)),
    Case(25, "nul-in-name", head("X\0Y: a", first=GET)),
    Case(25, "return-in-value", head("X: a\rb", first=GET)),
    Case(25, "control-in-name", head("X\x01: a", first=GET)),
    Case(25, "blank-in-name", head("X Y: a", first=GET)),
    Case(25, "blank-before-colon", head("X : a", first=GET)),
    Case(25, "no-colon", head("nothing", first=GET)),
    Case(25, "no-name", head(": a", first=GET)),
    Case(25, "latin1-in-name", head(b"X\xe9: a", first=GET)),
    Case(25, "folded-first", b"GET /v1/models HTTP/1.1\r\n Host: x\r\n\r\n"),
]  # fmt: skip


def check_answers(answer: bytes, case: Case) -> None:
    """One at most, of a status that is allowed, and nothing for what followed."""
    assert b"SMUGGLED" not in answer, answer[:500]
    found = [int(status) for status in STATUS.findall(answer)]
    assert len(found) <= 1 and set(found) <= case.statuses, answer[:500]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("case", [*ROW_24, *ROW_25], ids=str)
def test_what_is_no_request_ends_the_connection(server: Server, case: Case) -> None:
    answer, is_closed = converse(server, case.data + SMUGGLED, within=WAITS + 3)
    if case.is_followed and b"SMUGGLED" in answer:
        assert set(map(int, STATUS.findall(answer))) <= {200, 404}, answer[:500]
        return
    check_answers(answer, case)
    assert is_closed, answer[:500]


FINE = {
    "line-feeds": b"GET /v1/models HTTP/1.1\nHost: x\n\n",
    "folded": head("X: a\r\n b", first=GET),
    "leading-line-ends": b"\r\n\r\n" + head(first=GET),
    "latin1-value": head(b"X: \xe9\xff", first=GET),
    "many-blanks": head("X:" + " " * 1000 + "a", first=GET),
    "no-host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "old": b"GET /v1/models HTTP/1.0\r\n\r\n",
    "absolute": head(first="GET http://127.0.0.1/v1/models HTTP/1.1"),
    "absolute-elsewhere": head(first="GET http://example.invalid/v1/models HTTP/1.1"),
    "chunks-of-one": head(CHUNKED) + chunked(*[SMALL[i : i + 1] for i in range(len(SMALL))]),
    "extension": head(CHUNKED) + b"f;a=b\r\n" + SMALL + b"\r\n0\r\n\r\n",
    "extension-quoted": head(CHUNKED) + b'f;a="b;c"\r\n' + SMALL + b"\r\n0;x\r\n\r\n",
    "trailer": head(CHUNKED) + chunked(SMALL, end=b"0\r\nX-Checksum: y\r\n\r\n"),
    "trailer-with-length": head(CHUNKED) + chunked(SMALL, end=b"0\r\nContent-Length: 5\r\n\r\n"),
    "capital-size": head(CHUNKED) + b"F\r\n" + SMALL + b"\r\n0\r\n\r\n",
    "many-zeros-before-size": head(CHUNKED) + b"0" * 10_000 + b"f\r\n" + SMALL + b"\r\n0\r\n\r\n",
    "zeros-before-size": head(CHUNKED) + b"000f\r\n" + SMALL + b"\r\n000\r\n\r\n",
    "websocket": head("Upgrade: websocket", "Connection: Upgrade", first=GET),
    "h2c": head("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
        first=GET),
    "get-with-body": head(LENGTH, first=GET) + SMALL,
}  # fmt: skip


@pytest.mark.parametrize("name", FINE)
def test_what_is_odd_but_has_one_reading_is_answered_or_refused(server: Server, name: str) -> None:
    with Connection(server.url, timeout=5) as connection:
        connection.send(FINE[name])
        reply = connection.reply()
        assert reply.status in (200, 400, 403, 426, 505), reply
        if reply.status == 200:
            assert b"permission" in reply.body or b"tokens" in reply.body


def test_pipelined_requests_are_answered_in_order_row25(server: Server) -> None:
    kinds: list[Callable[[int], bytes]] = [
        lambda number: request("GET", f"/v1/models/n{number}"),
        lambda number: request("POST", "/tokenize", json.dumps({"prompt": "x", "model": f"n{number}"}).encode()),
        lambda number: head(CHUNKED) + chunked(json.dumps({"prompt": "x", "model": f"n{number}"}).encode()),
    ]
    with Connection(server.url) as connection:
        connection.send(b"".join(kinds[number % len(kinds)](number) for number in range(60)))
        for number in range(60):
            assert f"'n{number}'" in connection.reply().json["error"]["message"]


def test_a_request_behind_a_stream_waits_for_it_row25(server: Server) -> None:
    stream = json.dumps({**HELLO, "stream": True, "max_tokens": 50, "ignore_eos": True}).encode()
    with Connection(server.url) as connection:
        connection.send(request("POST", CHAT, stream) + request("GET", "/v1/models/behind"))
        assert connection.reply("POST").body.rstrip().endswith(b"[DONE]")
        assert "behind" in connection.reply().json["error"]["message"]


def test_a_body_that_comes_late_behind_another_request_is_read_row25(server: Server) -> None:
    behind = request("POST", "/tokenize", SMALL)
    with Connection(server.url) as connection:
        connection.send(request("GET", "/version") + behind[:-5])
        assert connection.reply().status == 200
        connection.send(behind[-5:])
        assert "tokens" in connection.reply("POST").json


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    "behind", [request("POST", "/tokenize", SMALL)[:-5], b"GET /vers", b"\r\n", b"\0garbage\r\n\r\n"]
)
def test_half_a_request_behind_an_answer_does_not_touch_it_row25(server: Server, behind: bytes) -> None:
    """However long that takes."""
    with Connection(server.url) as connection:
        connection.send(request("POST", CHAT, json.dumps(LASTING).encode()) + behind)
        begin = time.monotonic()
        reply = connection.reply("POST")
        assert reply.status == 200 and reply.body.count(b"data: [DONE]") == 1 and b"HTTP/1.1" not in reply.body
        assert time.monotonic() - begin > WAITS, "it is over too soon to show that"


def test_thousands_of_requests_in_one_read_wait_as_bytes_row25(server: Server) -> None:
    many = request("GET", "/version") * 5000
    with ExitStack() as stack, bounded_peak(server, 64 * 2**20):
        for _ in range(10):
            stack.enter_context(Connection(server.url)).send_unless_closed(many)
        assert server.get("/health").status_code == 200


def test_a_body_full_of_blank_lines_is_read_in_time_row21(server: Server) -> None:
    """Any of them could have been its end."""
    body = b'{"prompt": "x"' + b"\r\n\r\n" * (LIMIT // 4 - 10) + b"}"
    with Connection(server.url) as connection:
        connection.send(head(CHUNKED) + chunked(body) + request("GET", "/version"))
        assert connection.reply("POST").status == 200
        assert connection.reply().status == 200


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64])
def test_requests_are_told_apart_however_they_are_cut_row25(server: Server, size: int) -> None:
    three = request("GET", "/version") + head(CHUNKED) + chunked(SMALL) + request("POST", "/tokenize", SMALL)
    with Connection(server.url) as connection:
        for start in range(0, len(three), size):
            connection.send(three[start : start + size])
            time.sleep(0.001)
        assert "version" in connection.reply().json
        assert "tokens" in connection.reply("POST").json and "tokens" in connection.reply("POST").json


@pytest.mark.parametrize("cut", [0, 40, -5])
def test_an_offer_of_http2_is_not_taken_and_the_body_is_read(server: Server, cut: int) -> None:
    """As Java's own client makes it with its first request."""
    offer = (
        *JSON,
        ("connection", "Upgrade, HTTP2-Settings"),
        ("upgrade", "h2c"),
        ("http2-settings", "AAEAAEAAAAIAAAAB"),
    )
    asked = request("POST", "/tokenize", SMALL, offer)
    with Connection(server.url) as connection:
        connection.send(asked[:cut])
        time.sleep(0.05)
        connection.send(asked[cut:] + request("GET", "/version"))
        assert "tokens" in connection.reply("POST").json and "version" in connection.reply().json


def test_an_answer_before_all_of_the_body_ends_the_connection_and_says_so(server: Server) -> None:
    asked = request("POST", "/nowhere", b"x" * 100)
    with Connection(server.url) as connection:
        connection.send(asked[:-50])
        reply = connection.reply("POST")
        assert reply.status == 404 and reply.header("connection") == "close"
        connection.send_unless_closed(asked[-50:])
        assert connection.is_closed()


HALVES = {
    "length": head(LENGTH) + SMALL[:5],
    "chunk": head(CHUNKED) + b"f\r\n" + SMALL[:5],
    "between-chunks": head(CHUNKED) + b"f\r\n" + SMALL + b"\r\n",
    "size": head(CHUNKED) + b"f",
    "headers": head(LENGTH)[:-4],
    "first-line": b"POST /tok",
    "nothing": b"",
    "no-body": head(LENGTH),
    "chat": request("POST", CHAT, BODY)[:-5],
}


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize("how", ["half-close", "close", "reset"])
def test_half_a_request_is_given_up_row25(server: Server, name: str, how: str) -> None:
    before = num_sockets(server)
    with Connection(server.url, timeout=5) as connection:
        connection.send(HALVES[name])
        time.sleep(0.05)
        if how == "half-close":
            connection.socket.shutdown(1)
            answer = connection.rest()
            assert set(map(int, STATUS.findall(answer))) <= {400, 408}, answer[:300]
        elif how == "reset":
            connection.reset()
    assert wait_for(lambda: num_sockets(server) <= before, 5), "the connection is kept"
    server.wait_until_idle(5)


def test_a_whole_request_may_be_followed_by_half_a_close_row25(server: Server) -> None:
    with Connection(server.url, timeout=5) as connection:
        connection.send(request("POST", CHAT, BODY))
        connection.socket.shutdown(1)
        answer = connection.rest()
    assert set(map(int, STATUS.findall(answer))) <= {200, 400}, answer[:300]
    server.wait_until_idle(5)


def num_sockets(server: Server) -> int:
    folder = f"/proc/{server.process.pid}/fd"
    found = 0
    for name in os.listdir(folder):
        try:
            found += os.readlink(f"{folder}/{name}").startswith("socket:")
        except FileNotFoundError:
            pass
    return found


def test_a_body_is_asked_for_when_it_is_wanted(server: Server) -> None:
    expecting = request("POST", CHAT, b"", (*JSON, ("content-length", str(len(BODY))), ("expect", "100-continue")))
    with Connection(server.url) as connection:
        connection.send(expecting)
        assert connection.reply().status == 100
        connection.send(BODY)
        assert connection.reply("POST").status == 200
    too_large = request("POST", CHAT, b"", (*JSON, ("content-length", str(LIMIT + 1)), ("expect", "100-continue")))
    with Connection(server.url, timeout=5) as connection:
        connection.send(too_large)
        assert connection.reply("POST").status == 413


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
def test_too_many_headers_are_refused_and_take_no_memory_row23(server: Server, name: str) -> None:
    with bounded_peak(server, 30 * 2**20), Connection(server.url, timeout=WAITS + 3) as connection:
        sent = connection.send_unless_closed(HEADERS[name]())
        answer = connection.rest()
    assert set(map(int, STATUS.findall(answer))) <= {400, 414, 431}, answer[:300]
    assert sent < 20 * 2**20, f"the server took {sent / 2**20:.0f} MiB"


def test_headers_below_the_limit_are_taken_row23(server: Server) -> None:
    with Connection(server.url) as connection:
        for lines in (["X: " + "y" * 60_000], [f"X{i}: y" for i in range(900)]):
            connection.send(head(*lines, first=GET))
            assert connection.reply().status == 200


# --- row 21: bodies

TARGETS = (CHAT, "/v1/embeddings", "/tokenize", "/v1/responses")


@pytest.mark.parametrize("path", TARGETS)
@pytest.mark.parametrize("size", [LIMIT + 1, 2**31, 2**40, 10**18])
def test_a_body_that_says_it_is_too_large_is_refused_unread_row21(server: Server, path: str, size: int) -> None:
    with Connection(server.url, timeout=3) as connection:
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
def test_reading_stops_at_the_limit_row21(server: Server, name: str) -> None:
    with bounded_peak(server, 20 * 2**20 + 2 * LIMIT), Connection(server.url, timeout=10) as connection:
        sent = connection.send_unless_closed(BODIES[name]())
        try:
            reply = connection.reply("POST")
        except Closed:
            reply = None
    assert reply is None or reply.status == 413
    if name != "small-chunks":
        assert sent < 30 * 2**20, f"the server took {sent / 2**20:.0f} MiB"


@pytest.mark.parametrize("path", ["/nowhere", "/v1/models", "/health"])
def test_bodies_that_nobody_reads_take_no_memory_row21(server: Server, path: str) -> None:
    with bounded_peak(server, 20 * 2**20), Connection(server.url, timeout=10) as connection:
        connection.send_unless_closed(endless_body(50 * 2**20, path))
        try:
            assert connection.reply("POST").status in (404, 405, 413)
        except Closed:
            pass


def test_what_follows_a_body_that_is_too_large_is_not_a_request_row21(server: Server) -> None:
    body = SMUGGLED * (3 * 2**20 // len(SMUGGLED))
    answer, _ = converse(server, request("POST", CHAT, body), within=3)
    assert b"SMUGGLED" not in answer and len(STATUS.findall(answer)) <= 1, answer[:500]


# --- row 27: slow ones


def median_time(server: Server, count: int = 7) -> float:
    def once() -> float:
        begin = time.monotonic()
        with Connection(server.url) as connection:
            assert connection.ask("POST", CHAT, BODY).status == 200
        return time.monotonic() - begin

    return statistics.median(once() for _ in range(count))


def trickle(connection: Connection, data: bytes, pause: float, most: float) -> float:
    """Seconds until the server ends the connection, or `most`; a byte after each pause."""
    begin = time.monotonic()
    connection.socket.settimeout(pause)
    for number in range(int(most / pause)):
        try:
            connection.send(data[number % len(data) :][:1])
            if connection.socket.recv(1000) == b"":
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    return time.monotonic() - begin


SLOW = {
    "headers": (b"", b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + b"X: " + b"y" * 1000),
    "endless-headers": (b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", b"X: y\r\n"),
    "line-ends": (b"", b"\r\n"),
    "second-headers": (request("GET", "/version"), b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 1000),
    "body": (head("Content-Length: 1000"), b" "),
    "chunks": (head(CHUNKED), b"1\r\n \r\n"),
    "chunk-size": (head(CHUNKED), b"0"),
    "extension": (head(CHUNKED) + b"1;", b"x"),
    "trailers": (head(CHUNKED) + b"f\r\n" + SMALL + b"\r\n0\r\n", b"X: y\r\n"),
    "unread-body": (head("Content-Length: 1000", first="POST /nowhere HTTP/1.1"), b" "),
    "chat-body": (head("Content-Length: 1000", first=f"POST {CHAT} HTTP/1.1"), b" "),
}


def test_slow_requests_are_cut_off_and_others_do_not_wait_row27(server: Server) -> None:
    alone = median_time(server)
    most = 3 * WAITS + 3

    def be_slow(name: str) -> float:
        start, rest = SLOW[name]
        with Connection(server.url) as connection:
            connection.send(start)
            return trickle(connection, rest, 0.25, most)

    with ThreadPoolExecutor(len(SLOW)) as pool:
        times = [pool.submit(be_slow, name) for name in SLOW]
        beside = median_time(server)
        taken = dict(zip(SLOW, (future.result() for future in times), strict=True))
    late = {name: seconds for name, seconds in taken.items() if seconds > WAITS + 2}
    assert not late, f"still there: {late}"
    assert beside <= 3 * alone + 0.5, (alone, beside)  # they take seconds


def test_a_steady_body_is_not_cut_off_row27(server: Server) -> None:
    """20 kB/s, which is twice what a body must come with."""
    body = json.dumps({"prompt": "x" * 100_000}).encode()
    with Connection(server.url) as connection:
        connection.send(request("POST", "/tokenize", b"", (*JSON, ("content-length", str(len(body))))))
        for start in range(0, len(body), 4000):
            connection.send(body[start : start + 4000])
            time.sleep(0.2)
        assert connection.reply("POST").status == 200


def test_idle_sockets_delay_nobody_and_are_closed_row27(server: Server) -> None:
    alone = median_time(server)
    with ExitStack() as stack:
        idle = [stack.enter_context(Connection(server.url)) for _ in range(200)]
        assert median_time(server) <= 3 * alone + 0.5
        assert all(connection.is_closed(WAITS + 3) for connection in idle), "one that says nothing is kept"


def test_connections_beyond_the_limit_are_refused_and_the_others_served_row27(server: Server) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(Connection(server.url))
        assert first.ask("GET", "/version").status == 200
        opened = [stack.enter_context(Connection(server.url, timeout=2)) for _ in range(MOST + 20)]
        for connection in opened[-10:]:
            reply = connection.reply()
            assert reply.status == 503 and reply.header("retry-after") == "1" and reply.header("connection") == "close"
            assert "too many connections" in reply.json["error"]["message"]
        assert first.ask("GET", "/version").status == 200


BULKY = {"prompt": "hello world " * 80_000, "return_token_strs": True}  # megabytes to answer


@pytest.mark.slow
def test_who_reads_steadily_gets_all_of_it_row27(server: Server) -> None:
    """It takes longer than a client may read nothing."""
    with Connection(server.url, receive_buffer=65536) as connection:
        connection.send(request("POST", "/tokenize", json.dumps(BULKY).encode()))
        begin, answer = time.monotonic(), connection.socket.recv(4000)
        size = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        pause = 2.5 * READS / (size / 60_000)
        while len(answer) < size:
            answer += connection.socket.recv(60_000)
            time.sleep(pause)
        assert time.monotonic() - begin > 2 * READS


@pytest.mark.slow
def test_who_reads_nothing_of_a_whole_answer_is_cut_off_row27(server: Server) -> None:
    """Also where little enough is left to be written that nobody waits for it."""
    before = num_sockets(server)
    with ExitStack() as stack:
        for size in range(24_600, 26_600, 150):  # some end within what the system keeps, some right behind it
            body = json.dumps({**BULKY, "prompt": "hello world " * size}).encode()
            one = stack.enter_context(Connection(server.url, receive_buffer=4096))
            one.send(request("POST", "/tokenize", body, (*JSON, ("connection", "close"))))
            assert one.socket.recv(10)
        assert wait_for(lambda: num_sockets(server) <= before, 5 * READS + 5), "they are kept"


LONG = {**HELLO, "stream": True, "max_tokens": 430, "ignore_eos": True, "n": 16, "logprobs": True, "top_logprobs": 20}


def test_who_does_not_read_is_cut_off_and_others_do_not_wait_row27(server: Server) -> None:
    with Connection(server.url, timeout=10, receive_buffer=4096) as connection:
        connection.send(request("POST", CHAT, json.dumps(LONG).encode()))
        assert connection.socket.recv(100)
        time.sleep(0.5)
        beside = median_time(server, 3)
        assert beside < 3, f"others take {beside:.1f} s"
        assert wait_for(lambda: is_idle(server), 25), "it is still answered"
        time.sleep(READS + 1)
        connection.socket.settimeout(10)
        assert b"[DONE]" not in connection.rest(), "the whole answer was kept for it"


def is_idle(server: Server) -> bool:
    return bool({"running": 0, "waiting": 0}.items() <= server.get("/health").json().items())


# --- row 28: those who leave

_numbers = itertools.count()
WHOLE = {**HELLO, "max_tokens": 440, "ignore_eos": True}
LEAVING: dict[str, dict[str, Any]] = {
    "whole": WHOLE,
    "stream": {**WHOLE, "stream": True},
    "several": {**WHOLE, "n": 4},
    "several-streamed": {**WHOLE, "n": 4, "stream": True},
}
MOMENTS = [(name, when) for name in LEAVING for when in ("at once", "while it runs")]
MOMENTS += [(name, "in the stream") for name, body in LEAVING.items() if body.get("stream")]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("behind", [b"", request("GET", "/version")], ids=["", "another-behind"])
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
@pytest.mark.parametrize(("name", "when"), MOMENTS)
def test_who_leaves_is_not_answered_to_the_end_row28(
    server: Server, name: str, when: str, how: str, behind: bytes
) -> None:
    body, own = LEAVING[name], f"leaving-{next(_numbers)}"
    with Connection(server.url) as connection:
        headers = (*JSON, ("x-request-id", own))
        connection.send(request("POST", CHAT, json.dumps(body).encode(), headers) + behind)
        if when == "in the stream":
            assert connection.socket.recv(100)
        elif when == "while it runs":
            assert wait_for(lambda: not is_idle(server), 5)
        if how == "reset":
            connection.reset()
        elif how == "half-close":
            connection.socket.shutdown(1)
            assert wait_for(lambda: num_computed(server, own) is not None, 10)
    assert wait_for(lambda: num_computed(server, own) is not None, 10), "it is not left"
    assert (num_computed(server, own) or 0) < body.get("n", 1) * body["max_tokens"], "it is computed to the end"
    assert wait_for(lambda: is_idle(server), 5)


def num_computed(server: Server, request_id: str) -> int | None:
    """Tokens, as the log has it when the request is over."""
    line = next((line for line in list(server.lines) if f"request_id={request_id} " in line), None)
    found = line and re.search(r"completion_tokens=(\d+)", line)
    return None if line is None else int(found[1]) if found else 0


def test_in_the_end_nothing_runs_and_no_bug_was_met(server: Server) -> None:
    server.wait_until_idle(5)
    text = "".join(server.lines)
    assert "Traceback" not in text, text[text.index("Traceback") - 300 :][:3000]
