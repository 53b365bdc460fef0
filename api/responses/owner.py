"""Owner: tells other processes which share a file whether this one still runs, and asks so about them.

Each holds the lock of a file of its own, which the system lets go when the process ends, however it ends.
"""

import fcntl
from contextlib import suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

ENDING = "alive"


class Owner:
    def __init__(self, path: Path) -> None:
        """path: of the file that is shared. Removes what processes that were killed have left. Raises OSError."""
        self._path, self.name = path, uuid4().hex
        for left in path.parent.glob(f"{escape(path.name)}.*.{ENDING}"):
            if not _is_locked(left):
                left.unlink(missing_ok=True)
        hidden = path.with_name(f".{path.name}.{self.name}")
        self._file = hidden.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        hidden.rename(self._place(self.name))  # locked before others see it

    def is_alive(self, name: str) -> bool:
        """Returns whether the owner of this name runs."""
        return name == self.name or _is_locked(self._place(name))

    def close(self) -> None:
        with suppress(OSError):
            self._place(self.name).unlink(missing_ok=True)
        self._file.close()

    def _place(self, name: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{name}.{ENDING}")


def _is_locked(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # locked, or not readable: then someone else has it
        return True
    return False
