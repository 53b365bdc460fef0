"""A stream's connection: kept open while nothing comes, and left when it ends."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from connection import EventStream


def test_a_silent_stream_gets_comments_and_a_busy_one_none() -> None:
    async def events(pauses: list[float]) -> AsyncGenerator[bytes]:
        for pause in pauses:
            await asyncio.sleep(pause)
            yield b"data: 1\n\n"

    async def sent(pauses: list[float]) -> list[bytes]:
        messages: list[Any] = []

        async def receive() -> Any:
            await asyncio.sleep(100)

        async def send(message: Any) -> None:
            messages.append(message)

        stream = EventStream(events(pauses), {}, silence=0.1)
        await stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send)
        assert not messages[-1].get("more_body")
        return [message["body"] for message in messages if message.get("body")]

    async def scenario() -> None:
        quiet, busy = await asyncio.gather(sent([0.35, 0.0]), sent([0.02] * 5))
        assert 2 <= quiet.count(b": keep-alive\n\n") <= 3 and quiet[-2:] == [b"data: 1\n\n"] * 2
        assert busy == [b"data: 1\n\n"] * 5

    asyncio.run(scenario())
