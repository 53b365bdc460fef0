"""A stream's connection: kept open while nothing comes, and left when it ends."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from errors import Overloaded
from server.deadline import Deadline
from server.error_formats import OPENAI
from server.events import EventStream, await_first


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

        stream = EventStream(events(pauses), OPENAI.event, {}, silence=0.3)
        state = {"deadline": Deadline(None)}
        await stream({"type": "http", "asgi": {"spec_version": "2.3"}, "state": state}, receive, send)
        assert not messages[-1].get("more_body")
        return [message["body"] for message in messages if message.get("body")]

    async def scenario() -> None:
        quiet, busy = await asyncio.gather(sent([1.0, 0.0]), sent([0.0] * 5))
        assert 1 <= quiet.count(b": keep-alive\n\n") <= 3 and quiet[-2:] == [b"data: 1\n\n"] * 2
        assert busy == [b"data: 1\n\n"] * 5

    asyncio.run(scenario())


def test_a_stream_that_takes_long_to_begin_is_heard_of_and_one_that_fails_at_once_is_not() -> None:
    left: list[bool] = []

    async def numbers(pause: float, fails: bool) -> AsyncGenerator[int]:
        try:
            await asyncio.sleep(pause)
            if fails:
                raise Overloaded("full")
            yield 1
            yield 2
        finally:
            left.append(True)

    async def scenario() -> None:
        for silence in (0.01, 100.0):
            assert [number async for number in await await_first(numbers(0.1, False), silence)] == [1, 2]
        with pytest.raises(Overloaded):
            await await_first(numbers(0, True), 100.0)
        late = await await_first(numbers(0.1, True), 0.01)
        with pytest.raises(Overloaded):
            await anext(late)
        waiting = asyncio.ensure_future(await_first(numbers(100, False), 100.0))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        left_early = await await_first(numbers(100, False), 0.01)
        asking = asyncio.ensure_future(anext(left_early))
        await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.sleep(0)
        assert left == [True] * 6

    asyncio.run(scenario())
