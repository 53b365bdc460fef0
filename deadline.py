"""A bound on how long an answer may take."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

from errors import RequestTimeout

T = TypeVar("T")


def within(items: AsyncGenerator[T], *limits: float | None) -> AsyncGenerator[T]:
    """The same, ended by RequestTimeout after the shortest of so many seconds; None: any number."""
    seconds = min((limit for limit in limits if limit is not None), default=None)
    return items if seconds is None else _within(items, seconds)


async def _within(items: AsyncGenerator[T], seconds: float) -> AsyncGenerator[T]:
    deadline = asyncio.get_running_loop().time() + seconds
    async with aclosing(items):
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    item = await anext(items)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise RequestTimeout(f"The answer took longer than {seconds:g} seconds.") from error
            yield item
