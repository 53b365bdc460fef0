"""What the C library has given out, and what it keeps of freed memory for itself, given back."""

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil

LARGE = 2**18  # bytes of a request, or of what was made for it; less is used again soon
DELAY = 2.0  # seconds: until what uses it has ended


class _MallInfo(ctypes.Structure):
    """GNU's `struct mallinfo2`."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    )


def _function(name: str) -> Any:
    """A function of GNU's C library, or None where that is another one."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


_count = _function("mallinfo2")
IS_COUNTED = _count is not None  # by GNU's C library, 2.33 or newer
if IS_COUNTED:
    _count.restype = _MallInfo


def allocated() -> int:
    """Bytes that are in use; those that are resident where they are not counted, which do not grow by what is made in
    memory that was freed."""
    if not IS_COUNTED:
        return int(psutil.Process().memory_info().rss)
    counts = _count()
    return int(counts.uordblks + counts.hblkhd)


def trim() -> None:
    """Gives back what was freed, where the C library is GNU's."""
    give_back = _function("malloc_trim")
    if give_back is not None:
        give_back(0)


class Trimmer:
    """Trims once, however often it is asked meanwhile, and always once more after it was asked last."""

    def __init__(self, trim: Callable[[], object], delay: float) -> None:
        """delay: seconds from the last time that it is asked"""
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
    """Gives memory back soon, if so many bytes that were freed are worth it."""
    if num_bytes > LARGE:
        trim_soon()
