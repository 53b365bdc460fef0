"""Bodies and the memory that they have together."""

import asyncio
from typing import Any

import pytest
from process import MAIN, serve, wait_for
from raw_http import Connection, Reply, error_of, request
from starlette.types import Message, Receive, Scope, Send

from errors import Overloaded
from server.body_limit import BodyLimit

ROOM = 64 * 2**10  # bytes
HELD = b'{"prompt": "' + b"x" * 30_000 + b'"}'  # two fit
NEXT = b'{"prompt": "' + b"x" * 10_000 + b'"}'  # and this one does not


@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_bodies_that_fill_the_memory_together_are_a_503_until_they_end(tiny_checkpoint: Any, kind: str) -> None:
    replies: list[Reply] = []

    def ask_next() -> int:
        with Connection(server.url) as connection:
            replies.append(connection.ask("POST", "/tokenize", NEXT, (("content-type", kind),)))
        return replies[-1].status

    bounds = {"MAX_BODY_MEMORY": str(ROOM), "MAX_BODY_SIZE": str(ROOM)}
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), DTYPE="float32", **bounds) as server:
        server.wait_until_healthy()
        accepted = ask_next()
        with Connection(server.url) as first, Connection(server.url) as second:
            for slow in (first, second):
                slow.send(request("POST", "/tokenize", HELD)[:-1])
            assert wait_for(lambda: ask_next() == 503, 30), replies[-1]
            assert int(replies[-1].header("retry-after") or 0) >= 1
            assert error_of(replies[-1])["code"] == "server_is_overloaded"
            assert server.get("/health").status_code == 200
            for slow in (first, second):
                slow.send(HELD[-1:])
                assert slow.reply("POST").status == 200
        assert wait_for(lambda: ask_next() == accepted, 30), replies[-1]


def test_a_body_that_was_taken_is_not_refused_while_its_client_is_waited_for() -> None:
    is_taken, is_refused, is_over = asyncio.Event(), asyncio.Event(), asyncio.Event()
    scope: Scope = {"type": "http", "headers": []}
    answered: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await receive()
        except Overloaded:  # its bytes are still counted while it is told so
            is_refused.set()
            await is_over.wait()
            return
        is_taken.set()
        await is_refused.wait()
        answered.append(await receive())

    def client() -> Receive:
        messages: list[Message] = [{"type": "http.disconnect"}, {"type": "http.request", "body": b"x" * 60}]

        async def receive() -> Message:
            return messages.pop()

        return receive

    async def send(message: Message) -> None:
        raise AssertionError(message)

    async def scenario() -> None:
        limit = BodyLimit(app, max_body_size=100, max_body_memory=100)
        first = asyncio.create_task(limit(scope, client(), send))
        await is_taken.wait()
        second = asyncio.create_task(limit(scope, client(), send))
        await asyncio.wait_for(first, 10)
        is_over.set()
        await second

    asyncio.run(scenario())
    assert answered == [{"type": "http.disconnect"}]
