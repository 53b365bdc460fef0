"""Deadlines: a request ends when its time is over, or when the server shuts down, whatever it waits for.

TimeLimit is pure ASGI, and surrounds everything that reads a request and answers it, here or at a provider.
"""

import asyncio
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from errors import APIError, RequestTimeout, Unavailable
from server.asgi_errors import send_error
from telemetry import request_record


class Deadline:
    """The deadline of one request; `deadline_of` finds it."""

    def __init__(self, seconds: float | None) -> None:
        """seconds: the time from now; None for no limit."""
        self._begin = asyncio.get_running_loop().time()
        self._seconds = seconds
        self.timeout = asyncio.timeout(seconds)
        # Writes an error into an answer that has begun; None where the protocol has no way to do that
        self.failure: Callable[[APIError], bytes] | None = None

    def shorten(self, seconds: float | None) -> None:
        """Moves the deadline to `seconds` after the begin of the request, if that is earlier; None changes nothing."""
        if seconds is not None and (self._seconds is None or seconds < self._seconds):
            self._seconds = seconds
            self._move(self._begin + seconds)

    def end(self) -> None:
        """Moves the deadline to now."""
        self._move(asyncio.get_running_loop().time())

    def _move(self, when: float) -> None:
        if not self.timeout.expired():
            self.timeout.reschedule(when)

    def error(self) -> APIError:
        return RequestTimeout(
            f"The answer took longer than the limit of {self._seconds:g} seconds: "
            "ask for fewer tokens, or raise the request's timeout or the server's REQUEST_TIMEOUT."
        )


def deadline_of(scope: Scope) -> Deadline:
    """Finds the deadline that TimeLimit has given to a request."""
    deadline: Deadline = scope["state"]["deadline"]
    return deadline


class Shutdown:
    """The deadlines of all requests in progress, which a shutdown ends."""

    def __init__(self) -> None:
        self.has_begun = False
        self._deadlines: set[Deadline] = set()

    def begin(self) -> None:
        self.has_begun = True
        for deadline in list(self._deadlines):
            deadline.end()

    def add(self, deadline: Deadline) -> None:
        self._deadlines.add(deadline)
        if self.has_begun:
            deadline.end()

    def remove(self, deadline: Deadline) -> None:
        self._deadlines.discard(deadline)


class TimeLimit:
    def __init__(self, app: ASGIApp, seconds: float | None, shutdown: Shutdown) -> None:
        self.app = app
        self._seconds = seconds
        self._shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        deadline = scope.setdefault("state", {})["deadline"] = Deadline(self._seconds)
        last: Message | None = None

        async def send_and_note(message: Message) -> None:
            nonlocal last
            last = message
            await send(message)

        try:
            async with deadline.timeout:
                self._shutdown.add(deadline)
                await self.app(scope, receive, send_and_note)
        except TimeoutError:
            if not deadline.timeout.expired():
                raise
            await self._tell(scope, send, deadline, last)
        finally:
            self._shutdown.remove(deadline)

    async def _tell(self, scope: Scope, send: Send, deadline: Deadline, last: Message | None) -> None:
        is_over = self._shutdown.has_begun
        error = Unavailable("The server is shutting down.", retry_after=10) if is_over else deadline.error()
        if last is None:
            request_record.current().error = error.code
            await send_error(scope, send, error)
        elif deadline.failure is not None and (last["type"] == "http.response.start" or last.get("more_body")):
            request_record.current().error = error.code
            await send({"type": "http.response.body", "body": deadline.failure(error), "more_body": False})
