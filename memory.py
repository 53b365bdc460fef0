"""What the C library keeps of freed memory for itself, given back."""

import ctypes
from contextlib import suppress

LARGE = 4 * 2**20  # bytes that were freed; less is used again soon


def trim() -> None:
    """Takes milliseconds; does nothing where the C library is not GNU's."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
