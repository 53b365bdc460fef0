"""Every response has an id, and a bug is a 500 in the shape of all errors."""

import asyncio
import json
import logging

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.request_id import RequestId


async def fine(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b""})


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    raise KeyError("/secret/path at 0x7f")


def call(app: object, **headers: str) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(RequestId(app)({"type": "http", "path": "/", "headers": raw}, receive, send))
    return sent


def test_a_good_id_is_kept_and_a_bad_or_missing_one_replaced() -> None:
    def id_of(**headers: str) -> str:
        return str(dict(call(fine, **headers)[0]["headers"])[b"x-request-id"].decode())

    assert id_of(x_request_id="my-id.1") == "my-id.1"
    for bad in ("", "a b", "x" * 129, "a\nb", "ä"):
        assert id_of(x_request_id=bad).startswith("req_")
    assert id_of() != id_of()


def test_a_bug_is_a_500_without_its_secrets(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        start, body = call(broken)
    assert start["status"] == 500 and b"x-request-id" in dict(start["headers"])
    error = json.loads(body["body"])["error"]
    assert error == {
        "message": "The server failed; the error is in its log.",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    assert "secret" in caplog.text
