"""How long an answer may take."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from deadline import within
from errors import RequestTimeout


def test_an_answer_in_time_is_unchanged_and_one_beyond_is_ended_and_left() -> None:
    left: list[bool] = []

    async def numbers(pause: float) -> AsyncGenerator[int]:
        try:
            for number in range(5):
                await asyncio.sleep(pause)
                yield number
        finally:
            left.append(True)

    async def scenario() -> None:
        for limits in ((), (None,), (None, 5.0), (9.0, 5.0)):
            assert [number async for number in within(numbers(0), *limits)] == [0, 1, 2, 3, 4]
        left.clear()
        got: list[int] = []
        with pytest.raises(RequestTimeout) as ended:
            async for number in within(numbers(0.05), 10.0, 0.17):
                got.append(number)
        assert 1 <= len(got) < 5 and left == [True] and ended.value.status == 504

    asyncio.run(scenario())


def test_time_that_the_reader_takes_counts_too() -> None:
    async def numbers() -> AsyncGenerator[int]:
        while True:
            yield 1
            await asyncio.sleep(0)

    async def scenario() -> None:
        with pytest.raises(RequestTimeout):
            async for _ in within(numbers(), 0.05):
                await asyncio.sleep(0.03)

    asyncio.run(scenario())
