"""The C library's memory: how much of it is in use, and freed memory returned to the system (malloc_trim)."""

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

LARGE = 2**18  # bytes, of a request or of what was made for it; less than that is used again soon
DELAY = 2.0  # seconds; the HTTP request whose memory is to be freed has usually ended by then


class _MallInfo(ctypes.Structure):
    """GNU's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def _function(name: str) -> Any:
    """Returns a function of the C library, None where it has no such function."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


_count = _function("mallinfo2")
IS_COUNTED = _count is not None  # GNU's C library has it from 2.33 on
if IS_COUNTED:
    _count.restype = _MallInfo


def allocated() -> int:
    """Returns the bytes in use. Where the C library does not count them, returns the resident bytes, which do not grow
    while freed memory is used again."""
    if not IS_COUNTED:
        return int(psutil.Process().memory_info().rss)
    counts = _count()
    return int(counts.uordblks + counts.hblkhd)


def trim() -> None:
    """Returns freed memory to the system, where the C library is GNU's."""
    give_back = _function("malloc_trim")
    if give_back is not None:
        give_back(0)


class Trimmer:
    """Calls `trim` in a thread: about every `delay` seconds while `ask` is called, and once after the last call."""

    def __init__(self, trim: Callable[[], object], delay: float) -> None:
        """delay: seconds"""
        self._trim, self._delay = trim, delay
        self._lock = threading.Lock()
        self._due: float | None = None

    def ask(self) -> None:
        with self._lock:
            is_running, self._due = self._due is not None, time.monotonic() + self._delay
        if not is_running:
            threading.Thread(target=self._run, name="trim", daemon=True).start()

    def _run(self) -> None:
        while (seconds := self._seconds_left()) > 0:
            time.sleep(seconds)
            self._trim()

    def _seconds_left(self) -> float:
        with self._lock:
            left = (self._due or 0) - time.monotonic()
            if left <= 0:
                self._due = None
            return left


trim_soon = Trimmer(trim, DELAY).ask


def trim_after(num_bytes: int) -> None:
    """Returns freed memory to the system soon, if `num_bytes` of it are worth that."""
    if num_bytes > LARGE:
        trim_soon()
