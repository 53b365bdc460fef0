"""Bytes with two readings, or none, as a request: nothing behind them is answered, and the next client is served.

The numbers are rows of rows.md.
"""

from dataclasses import dataclass, field

import pytest
from process import Server
from raw_http import Connection
from raw_sockets import (
    CHUNKED,
    GET,
    LENGTH,
    SMALL,
    SMUGGLED,
    STATUS,
    WAITS,
    chunked,
    converse,
    head,
)

pytestmark = pytest.mark.usefixtures("served_before_and_after")


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
def test_what_is_no_request_ends_the_connection(bounded: Server, case: Case) -> None:
    answer, is_closed = converse(bounded, case.data + SMUGGLED, within=WAITS + 3)
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
def test_what_is_odd_but_has_one_reading_is_answered_or_refused(bounded: Server, name: str) -> None:
    with Connection(bounded.url, timeout=5) as connection:
        connection.send(FINE[name])
        reply = connection.reply()
        assert reply.status in (200, 400, 403, 426, 505), reply
        if reply.status == 200:
            assert b"permission" in reply.body or b"tokens" in reply.body
