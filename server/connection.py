"""What becomes of work, and of a stream, when the client leaves, or is kept waiting."""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from errors import APIError

T = TypeVar("T")
SILENCE = 15.0  # seconds
CLIENT_GONE = 499  # nobody reads it; for the log
STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # for proxies: pass events on at once


class EventStream(StreamingResponse):
    """A stream that is closed when its response ends, however it ends."""

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        failure: Callable[[APIError], bytes],
        headers: Mapping[str, str],
        silence: float = SILENCE,
    ) -> None:
        """failure: the event that tells of an error."""
        super().__init__(events, media_type="text/event-stream", headers={**headers, **STREAM_HEADERS})
        self._events = events
        self._failure = failure
        self._silence = silence

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope["state"]["deadline"].failure = self._failure
        sent = time.monotonic()

        async def send_and_note(message: Any) -> None:
            nonlocal sent
            sent = time.monotonic()
            await send(message)

        async def keep_alive() -> None:
            """A comment whenever nothing was sent for a while: proxies cut what is silent."""
            while True:
                await asyncio.sleep(max(0.01, sent + self._silence - time.monotonic()))
                if time.monotonic() - sent >= self._silence:
                    await send_and_note({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})

        keeper = asyncio.create_task(keep_alive())
        try:
            await super().__call__(scope, receive, send_and_note)
        finally:
            keeper.cancel()
            await self._events.aclose()


async def await_first(items: AsyncGenerator[T], silence: float = SILENCE) -> AsyncGenerator[T]:
    """The same when its first item has come, or failed to, or when that takes so long that the client has to hear
    something: its errors are events then."""
    first = asyncio.ensure_future(anext(items))
    try:
        await asyncio.wait({first}, timeout=silence)
        if first.done():
            first.result()
    except BaseException:
        first.cancel()
        raise
    return _after(first, items)


async def _after(first: "asyncio.Future[T]", rest: AsyncGenerator[T]) -> AsyncGenerator[T]:
    try:
        yield await first
        async for item in rest:
            yield item
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await rest.aclose()


async def unless_client_leaves(request: Request, work: Awaitable[T]) -> T | None:
    """The result of `work`; None, and `work` cancelled, if the connection closes first."""

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
