"""What becomes of a request's work when its client leaves."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

T = TypeVar("T")
CLIENT_GONE = 499  # the status in the log: no client reads it


async def unless_client_leaves(request: Request, work: Awaitable[T]) -> T | None:
    """Returns the result of `work`; None, and `work` is cancelled, if the connection closes first."""

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(leave())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return await working if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
