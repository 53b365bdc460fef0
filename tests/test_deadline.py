"""How long an answer may take, here and at a provider's, and what becomes of it when the server ends."""

import asyncio
import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from process import MAIN, Server, serve, until
from raw_http import JSON, Connection, Reply, error_of, request
from upstreams import Asked, chunk, event, upstream
from upstreams import Reply as Told
from upstreams import Upstream as Theirs

from server.deadline import Shutdown, TimeLimit

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
HERE = {"model": "Tiny-Qwen3", "messages": HELLO, "max_tokens": 400, "ignore_eos": True, "n": 64}  # many seconds
THERE = {"model": "openai/slow", "messages": HELLO}


# --- the bound itself


def answered(seconds: float | None, *pauses: float, shutdown: Shutdown | None = None) -> list[Any]:
    """What is sent by an app that waits before each of its messages."""
    messages: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for number, pause in enumerate(pauses):
            await asyncio.sleep(pause)
            if number == 0:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                scope["state"]["deadline"].failure = lambda error: error.code.encode()
            await send({"type": "http.response.body", "body": b"x", "more_body": number < len(pauses) - 1})

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def main() -> None:
        await TimeLimit(app, seconds, shutdown or Shutdown())({"type": "http", "path": "/", "state": {}}, receive, send)

    asyncio.run(main())
    return messages


def test_an_answer_in_time_is_unchanged() -> None:
    for seconds in (None, 100.0):
        messages = answered(seconds, 0, 0, 0)
        assert [message.get("body", b"") for message in messages] == [b"", b"x", b"x", b"x"]


def test_an_answer_that_never_begins_is_an_error_and_one_that_never_ends_has_one() -> None:
    start, body = answered(0.05, 100)
    assert start["status"] == 504 and json.loads(body["body"])["error"]["code"] == "request_timeout"
    messages = answered(0.3, 0, 100)
    assert messages[0]["status"] == 200 and messages[-1] == {
        "type": "http.response.body",
        "body": b"request_timeout",
        "more_body": False,
    }


def test_a_server_that_ends_ends_what_begins_afterwards_too() -> None:
    shutdown = Shutdown()
    shutdown.begin()
    start, body = answered(None, 100, shutdown=shutdown)
    assert start["status"] == 503 and b"shutting down" in body["body"]


# --- the process


def slow(asked: Asked) -> Told:
    """A provider that begins and never ends."""
    first = event(chunk({"role": "assistant", "content": "Hi"}))
    return Told.stream(first, 600.0) if asked.body.get("stream") else Told([600.0], is_whole=False)


@contextmanager
def gateway(checkpoint: Path, **settings: str) -> Iterator[tuple[Server, Theirs]]:
    with ExitStack() as stack:
        theirs = stack.enter_context(upstream(slow))
        openai = {"OPENAI_BASE_URL": theirs.url + "/v1", "OPENAI_API_KEY": "sk-theirs"}
        server = stack.enter_context(
            serve(MAIN, MODEL_PATH=str(checkpoint), DTYPE="float32", MAX_MODEL_LEN="480", **openai, **settings)
        )
        server.wait_until_healthy()
        yield server, theirs


def ask(server: Server, body: Any, cut: int | None = None) -> Reply:
    with Connection(server.url, timeout=60) as connection:
        connection.send(request("POST", CHAT, json.dumps(body).encode(), JSON)[:cut])
        return connection.reply("POST")


def last_event(reply: Reply) -> Any:
    assert reply.status == 200
    return json.loads(reply.body.decode().rstrip().rpartition("data: ")[2])


@pytest.fixture(scope="module")
def impatient(tiny_checkpoint: Path) -> Iterator[tuple[Server, Theirs]]:
    with gateway(tiny_checkpoint, REQUEST_TIMEOUT="1") as both:
        yield both


@pytest.mark.parametrize("asked", [HERE, THERE], ids=["here", "there"])
def test_every_answer_ends_at_the_servers_limit(impatient: tuple[Server, Theirs], asked: Any) -> None:
    server, _ = impatient
    begin = time.monotonic()
    assert error_of(ask(server, asked))["code"] == "request_timeout"
    assert last_event(ask(server, {**asked, "stream": True}))["error"]["code"] == "request_timeout"
    assert 2 <= time.monotonic() - begin < 20
    server.wait_until_idle()


def test_a_request_that_does_not_come_ends_at_the_servers_limit(impatient: tuple[Server, Theirs]) -> None:
    reply = ask(impatient[0], HERE, -5)
    assert reply.status == 504 and error_of(reply)["code"] == "request_timeout"


@pytest.mark.parametrize("asked", [HERE, THERE], ids=["here", "there"])
def test_a_request_can_ask_for_less_and_the_provider_is_not_told(impatient: tuple[Server, Theirs], asked: Any) -> None:
    server, theirs = impatient
    theirs.asked.clear()
    reply = ask(server, {**asked, "timeout": 0.2})
    assert reply.status == 504 and "0.2 seconds" in error_of(reply)["message"]
    assert all("timeout" not in one.body for one in theirs.asked)
    assert error_of(ask(server, {**asked, "timeout": "soon"}))["param"] == "timeout"


@pytest.mark.parametrize("num_signals", [1, 2], ids=["after the grace time", "at a second signal"])
def test_a_server_that_ends_tells_everybody_wherever_they_are_answered(tiny_checkpoint: Path, num_signals: int) -> None:
    grace = "1" if num_signals == 1 else "60"
    with gateway(tiny_checkpoint, SHUTDOWN_TIMEOUT=grace) as (server, theirs), ExitStack() as stack:
        open_ones: list[Connection] = []
        for body, is_stream, cut in (
            (HERE, True, None), (THERE, True, None), (HERE, False, None), (THERE, False, None), (HERE, False, -5),
        ):  # fmt: skip
            connection = stack.enter_context(Connection(server.url, timeout=60))
            connection.send(request("POST", CHAT, json.dumps({**body, "stream": is_stream}).encode(), JSON)[:cut])
            open_ones.append(connection)
            if is_stream:
                connection.socket.recv(1, socket.MSG_PEEK)  # it has begun
        until(lambda: len(theirs.asked) == 2)
        for _ in range(num_signals):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        begin = time.monotonic()
        replies = [reply_and_close(connection) for connection in open_ones]
        streamed, whole = [last_event(reply)["error"] for reply in replies[:2]], replies[2:]
        assert [reply.status for reply in whole] == [503] * 3
        assert all("shutting down" in error["message"] for error in (*streamed, *map(error_of, whole)))
        assert server.process.wait(10) == 0
        assert time.monotonic() - begin < 15
    text = "".join(server.lines)
    assert "Traceback" not in text, text[text.index("Traceback") - 300 :][:3000]


def reply_and_close(connection: Connection) -> Reply:
    with connection:
        return connection.reply("POST")
