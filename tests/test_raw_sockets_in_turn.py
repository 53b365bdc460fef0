"""Requests behind one another, cut anywhere, and halves of requests: each is told apart, or given up.

The numbers are rows of rows.md.
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from process import Server, wait_for
from raw_http import JSON, Connection, bounded_peak, request
from raw_sockets import (
    BODY,
    CHAT,
    CHUNKED,
    HELLO,
    LASTING,
    LENGTH,
    LIMIT,
    SMALL,
    STATUS,
    WAITS,
    chunked,
    head,
    num_sockets,
)

pytestmark = pytest.mark.usefixtures("served_before_and_after")


def test_pipelined_requests_are_answered_in_order_row25(bounded: Server) -> None:
    kinds: list[Callable[[int], bytes]] = [
        lambda number: request("GET", f"/v1/models/n{number}"),
        lambda number: request("POST", "/tokenize", json.dumps({"prompt": "x", "model": f"n{number}"}).encode()),
        lambda number: head(CHUNKED) + chunked(json.dumps({"prompt": "x", "model": f"n{number}"}).encode()),
    ]
    with Connection(bounded.url) as connection:
        connection.send(b"".join(kinds[number % len(kinds)](number) for number in range(60)))
        for number in range(60):
            assert f"'n{number}'" in connection.reply().json["error"]["message"]


def test_a_request_behind_a_stream_waits_for_it_row25(bounded: Server) -> None:
    stream = json.dumps({**HELLO, "stream": True, "max_tokens": 50, "ignore_eos": True}).encode()
    with Connection(bounded.url) as connection:
        connection.send(request("POST", CHAT, stream) + request("GET", "/v1/models/behind"))
        assert connection.reply("POST").body.rstrip().endswith(b"[DONE]")
        assert "behind" in connection.reply().json["error"]["message"]


def test_a_body_that_comes_late_behind_another_request_is_read_row25(bounded: Server) -> None:
    behind = request("POST", "/tokenize", SMALL)
    with Connection(bounded.url) as connection:
        connection.send(request("GET", "/version") + behind[:-5])
        assert connection.reply().status == 200
        connection.send(behind[-5:])
        assert "tokens" in connection.reply("POST").json


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    "behind", [request("POST", "/tokenize", SMALL)[:-5], b"GET /vers", b"\r\n", b"\0garbage\r\n\r\n"]
)
def test_half_a_request_behind_an_answer_does_not_touch_it_row25(bounded: Server, behind: bytes) -> None:
    """However long that takes."""
    with Connection(bounded.url) as connection:
        connection.send(request("POST", CHAT, json.dumps(LASTING).encode()) + behind)
        begin = time.monotonic()
        reply = connection.reply("POST")
        assert reply.status == 200 and reply.body.count(b"data: [DONE]") == 1 and b"HTTP/1.1" not in reply.body
        assert time.monotonic() - begin > WAITS, "it is over too soon to show that"


def test_thousands_of_requests_in_one_read_wait_as_bytes_row25(bounded: Server) -> None:
    many = request("GET", "/version") * 5000
    with ExitStack() as stack, bounded_peak(bounded, 64 * 2**20):
        for _ in range(10):
            stack.enter_context(Connection(bounded.url)).send_unless_closed(many)
        assert bounded.get("/health").status_code == 200


def test_a_body_full_of_blank_lines_is_read_in_time_row21(bounded: Server) -> None:
    """Any of them could have been its end."""
    body = b'{"prompt": "x"' + b"\r\n\r\n" * (LIMIT // 4 - 10) + b"}"
    with Connection(bounded.url) as connection:
        connection.send(head(CHUNKED) + chunked(body) + request("GET", "/version"))
        assert connection.reply("POST").status == 200
        assert connection.reply().status == 200


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64])
def test_requests_are_told_apart_however_they_are_cut_row25(bounded: Server, size: int) -> None:
    three = request("GET", "/version") + head(CHUNKED) + chunked(SMALL) + request("POST", "/tokenize", SMALL)
    with Connection(bounded.url) as connection:
        for start in range(0, len(three), size):
            connection.send(three[start : start + size])
            time.sleep(0.001)
        assert "version" in connection.reply().json
        assert "tokens" in connection.reply("POST").json and "tokens" in connection.reply("POST").json


@pytest.mark.parametrize("cut", [0, 40, -5])
def test_an_offer_of_http2_is_not_taken_and_the_body_is_read(bounded: Server, cut: int) -> None:
    """As Java's own client makes it with its first request."""
    offer = (
        *JSON,
        ("connection", "Upgrade, HTTP2-Settings"),
        ("upgrade", "h2c"),
        ("http2-settings", "AAEAAEAAAAIAAAAB"),
    )
    asked = request("POST", "/tokenize", SMALL, offer)
    with Connection(bounded.url) as connection:
        connection.send(asked[:cut])
        time.sleep(0.05)
        connection.send(asked[cut:] + request("GET", "/version"))
        assert "tokens" in connection.reply("POST").json and "version" in connection.reply().json


def test_an_answer_before_all_of_the_body_ends_the_connection_and_says_so(bounded: Server) -> None:
    asked = request("POST", "/nowhere", b"x" * 100)
    with Connection(bounded.url) as connection:
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
def test_half_a_request_is_given_up_row25(bounded: Server, name: str, how: str) -> None:
    before = num_sockets(bounded)
    with Connection(bounded.url, timeout=5) as connection:
        connection.send(HALVES[name])
        time.sleep(0.05)
        if how == "half-close":
            connection.socket.shutdown(1)
            answer = connection.rest()
            assert set(map(int, STATUS.findall(answer))) <= {400, 408}, answer[:300]
        elif how == "reset":
            connection.reset()
    assert wait_for(lambda: num_sockets(bounded) <= before, 5), "the connection is kept"
    bounded.wait_until_idle(5)


def test_a_whole_request_may_be_followed_by_half_a_close_row25(bounded: Server) -> None:
    with Connection(bounded.url, timeout=5) as connection:
        connection.send(request("POST", CHAT, BODY))
        connection.socket.shutdown(1)
        answer = connection.rest()
    assert set(map(int, STATUS.findall(answer))) <= {200, 400}, answer[:300]
    bounded.wait_until_idle(5)


def test_a_body_is_asked_for_when_it_is_wanted(bounded: Server) -> None:
    expecting = request("POST", CHAT, b"", (*JSON, ("content-length", str(len(BODY))), ("expect", "100-continue")))
    with Connection(bounded.url) as connection:
        connection.send(expecting)
        assert connection.reply().status == 100
        connection.send(BODY)
        assert connection.reply("POST").status == 200
    too_large = request("POST", CHAT, b"", (*JSON, ("content-length", str(LIMIT + 1)), ("expect", "100-continue")))
    with Connection(bounded.url, timeout=5) as connection:
        connection.send(too_large)
        assert connection.reply("POST").status == 413
