"""Slow clients are cut off, and others do not wait; who leaves is not answered to the end.

The numbers are rows of rows.md.
"""

import itertools
import json
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from process import Server, wait_for
from raw_http import JSON, Connection, request
from raw_sockets import (
    BODY,
    CHAT,
    CHUNKED,
    HELLO,
    MOST,
    READS,
    SMALL,
    WAITS,
    head,
    is_idle,
    num_sockets,
)

pytestmark = pytest.mark.usefixtures("served_before_and_after")


# --- row 27: slow ones


def median_time(bounded: Server, count: int = 7) -> float:
    def once() -> float:
        begin = time.monotonic()
        with Connection(bounded.url) as connection:
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


def test_slow_requests_are_cut_off_and_others_do_not_wait_row27(bounded: Server) -> None:
    alone = median_time(bounded)
    most = 3 * WAITS + 3

    def be_slow(name: str) -> float:
        start, rest = SLOW[name]
        with Connection(bounded.url) as connection:
            connection.send(start)
            return trickle(connection, rest, 0.25, most)

    with ThreadPoolExecutor(len(SLOW)) as pool:
        times = [pool.submit(be_slow, name) for name in SLOW]
        beside = median_time(bounded)
        taken = dict(zip(SLOW, (future.result() for future in times), strict=True))
    late = {name: seconds for name, seconds in taken.items() if seconds > WAITS + 2}
    assert not late, f"still there: {late}"
    assert beside <= 3 * alone + 0.5, (alone, beside)  # they take seconds


def test_a_steady_body_is_not_cut_off_row27(bounded: Server) -> None:
    """20 kB/s, which is twice what a body must come with."""
    body = json.dumps({"prompt": "x" * 100_000}).encode()
    with Connection(bounded.url) as connection:
        connection.send(request("POST", "/tokenize", b"", (*JSON, ("content-length", str(len(body))))))
        for start in range(0, len(body), 4000):
            connection.send(body[start : start + 4000])
            time.sleep(0.2)
        assert connection.reply("POST").status == 200


def test_idle_sockets_delay_nobody_and_are_closed_row27(bounded: Server) -> None:
    alone = median_time(bounded)
    with ExitStack() as stack:
        idle = [stack.enter_context(Connection(bounded.url)) for _ in range(200)]
        assert median_time(bounded) <= 3 * alone + 0.5
        assert all(connection.is_closed(WAITS + 3) for connection in idle), "one that says nothing is kept"


def test_connections_beyond_the_limit_are_refused_and_the_others_served_row27(bounded: Server) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(Connection(bounded.url))
        assert first.ask("GET", "/version").status == 200
        opened = [stack.enter_context(Connection(bounded.url, timeout=2)) for _ in range(MOST + 20)]
        for connection in opened[-10:]:
            reply = connection.reply()
            assert reply.status == 503 and reply.header("retry-after") == "1" and reply.header("connection") == "close"
            assert "too many connections" in reply.json["error"]["message"]
        assert first.ask("GET", "/version").status == 200


BULKY = {"prompt": "hello world " * 80_000, "return_token_strs": True}  # megabytes to answer


@pytest.mark.slow
def test_who_reads_steadily_gets_all_of_it_row27(bounded: Server) -> None:
    """It takes longer than a client may read nothing."""
    with Connection(bounded.url, receive_buffer=65536) as connection:
        connection.send(request("POST", "/tokenize", json.dumps(BULKY).encode()))
        begin, answer = time.monotonic(), connection.socket.recv(4000)
        size = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        pause = 2.5 * READS / (size / 60_000)
        while len(answer) < size:
            answer += connection.socket.recv(60_000)
            time.sleep(pause)
        assert time.monotonic() - begin > 2 * READS


@pytest.mark.slow
def test_who_reads_nothing_of_a_whole_answer_is_cut_off_row27(bounded: Server) -> None:
    """Also where little enough is left to be written that nobody waits for it."""
    before = num_sockets(bounded)
    with ExitStack() as stack:
        for size in range(24_600, 26_600, 150):  # some end within what the system keeps, some right behind it
            body = json.dumps({**BULKY, "prompt": "hello world " * size}).encode()
            one = stack.enter_context(Connection(bounded.url, receive_buffer=4096))
            one.send(request("POST", "/tokenize", body, (*JSON, ("connection", "close"))))
            assert one.socket.recv(10)
        assert wait_for(lambda: num_sockets(bounded) <= before, 5 * READS + 5), "they are kept"


LONG = {**HELLO, "stream": True, "max_tokens": 430, "ignore_eos": True, "n": 16, "logprobs": True, "top_logprobs": 20}


def test_who_does_not_read_is_cut_off_and_others_do_not_wait_row27(bounded: Server) -> None:
    with Connection(bounded.url, timeout=10, receive_buffer=4096) as connection:
        connection.send(request("POST", CHAT, json.dumps(LONG).encode()))
        assert connection.socket.recv(100)
        time.sleep(0.5)
        beside = median_time(bounded, 3)
        assert beside < 3, f"others take {beside:.1f} s"
        assert wait_for(lambda: is_idle(bounded), 25), "it is still answered"
        time.sleep(READS + 1)
        connection.socket.settimeout(10)
        assert b"[DONE]" not in connection.rest(), "the whole answer was kept for it"


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
    bounded: Server, name: str, when: str, how: str, behind: bytes
) -> None:
    body, own = LEAVING[name], f"leaving-{next(_numbers)}"
    with Connection(bounded.url) as connection:
        headers = (*JSON, ("x-request-id", own))
        connection.send(request("POST", CHAT, json.dumps(body).encode(), headers) + behind)
        if when == "in the stream":
            assert connection.socket.recv(100)
        elif when == "while it runs":
            assert wait_for(lambda: not is_idle(bounded), 5)
        if how == "reset":
            connection.reset()
        elif how == "half-close":
            connection.socket.shutdown(1)
            assert wait_for(lambda: num_computed(bounded, own) is not None, 10)
    assert wait_for(lambda: num_computed(bounded, own) is not None, 10), "it is not left"
    assert (num_computed(bounded, own) or 0) < body.get("n", 1) * body["max_tokens"], "it is computed to the end"
    assert wait_for(lambda: is_idle(bounded), 5)


def num_computed(bounded: Server, request_id: str) -> int | None:
    """Tokens, as the log has it when the request is over."""
    line = next((line for line in list(bounded.lines) if f"request_id={request_id} " in line), None)
    found = line and re.search(r"completion_tokens=(\d+)", line)
    return None if line is None else int(found[1]) if found else 0


def test_in_the_end_nothing_runs_and_no_bug_was_met(bounded: Server) -> None:
    bounded.wait_until_idle(5)
    text = "".join(bounded.lines)
    assert "Traceback" not in text, text[text.index("Traceback") - 300 :][:3000]
