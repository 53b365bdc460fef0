"""SignalDrain: lets the requests in progress finish when the process is asked to end."""

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from types import FrameType
from typing import Any

FORCED = 1.0  # seconds from a second signal until connections are cut


class SignalDrain:
    """The first SIGTERM or SIGINT lets requests finish for `timeout` seconds; a second one ends them with an error.

    uvicorn's own handlers, which stop it from listening and wait for the connections to end, stay in place.
    """

    def __init__(self, drain: Callable[[float], Awaitable[None]], timeout: float) -> None:
        """drain: is called with the seconds that requests get, and returns when all have ended."""
        self._drain = drain
        self._timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._drains: list[asyncio.Future[None]] = []

    def install(self) -> None:
        """Installs the handlers; does nothing outside of the main thread, where Python allows none."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, partial(self._on_signal, signal.getsignal(number)))

    def _on_signal(self, previous: Any, number: int, frame: FrameType | None) -> None:
        if callable(previous) and not self._drains:
            previous(number, frame)
        self._loop.call_soon_threadsafe(self._begin, previous)

    def _begin(self, previous: Any) -> None:
        is_second = bool(self._drains)
        if is_second and callable(previous):  # the errors get a moment to be sent; then uvicorn is forced to end
            self._loop.call_later(FORCED, previous, signal.SIGINT, None)
        self._drains.append(asyncio.ensure_future(self._drain(0.0 if is_second else self._timeout)))
