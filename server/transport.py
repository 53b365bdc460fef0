"""Transport: a connection that ends, whatever the other side does.

asyncio's own transport waits forever for a client that does not read its answer. And if it is closed while data still
arrives, the system resets the connection, so that the client may never see the answer.
"""

import asyncio
from collections.abc import Callable
from typing import Any

LINGER = 5.0  # seconds in which a client can read why it was refused


class Transport:
    """Wraps asyncio's transport, which handles every attribute that is not defined here."""

    def __init__(
        self,
        inner: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        write_timeout: float,
        is_awaited: Callable[[], bool],
    ) -> None:
        """Wraps `inner`.

        write_timeout: the seconds within which the client must read at least some of the data that waits for it.
        is_awaited: tells whether the client may still be sending when the connection ends.
        """
        self._inner = inner
        self._loop = loop
        self._write_timeout = write_timeout
        self._is_awaited = is_awaited
        self._is_ending = False
        self._num_written = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def is_closing(self) -> bool:
        return self._is_ending or self._inner.is_closing()

    def write(self, data: bytes) -> None:
        if self._is_ending:
            return
        self._inner.write(data)
        self._num_written += len(data)
        if "write" not in self._timers and self._inner.get_write_buffer_size():
            self._watch(self._num_taken)

    @property
    def _num_taken(self) -> int:
        """The number of bytes that were handed to the system."""
        return self._num_written - self._inner.get_write_buffer_size()

    def _watch(self, num_taken: int) -> None:
        self._timers["write"] = self._loop.call_later(self._write_timeout, self._check, num_taken)

    def _check(self, num_taken: int) -> None:
        """Aborts if the client has read nothing since the last check; a large answer may take long."""
        del self._timers["write"]
        if self._inner.get_write_buffer_size() == 0:
            return
        if self._num_taken > num_taken:
            self._watch(self._num_taken)
        else:
            self.abort()

    def close(self) -> None:
        if self.is_closing():
            return
        self._is_ending = True
        if self._is_awaited():
            self._linger()
        else:
            self._inner.close()

    def _linger(self) -> None:
        self._timers["linger"] = self._loop.call_later(LINGER, self.abort)
        self._inner.resume_reading()
        if self._inner.can_write_eof():
            self._inner.write_eof()

    def abort(self) -> None:
        """Ends the connection at once; does nothing to one that has ended."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._inner.abort()
