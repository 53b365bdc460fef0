"""What the C library keeps of freed memory for itself, given back."""

import ctypes
import threading
from contextlib import suppress

LARGE = 2**18  # bytes of a request, or of what was made for it; less is used again soon
DELAY = 2.0  # seconds: until what uses it has ended

_pending = threading.Lock()


def trim_soon() -> None:
    """Once, however often it is asked for meanwhile. Does nothing where the C library is not GNU's."""
    if _pending.acquire(blocking=False):
        timer = threading.Timer(DELAY, _trim)
        timer.daemon = True
        timer.start()


def _trim() -> None:
    _pending.release()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
