"""Files that appear whole or not at all, even if several processes write them, and the disk space that they need."""

import contextlib
import importlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import errors
from engine.report import Report

# Not on Windows: there, two processes may make the same file twice, but never leave a torn one.
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None


@contextlib.contextmanager
def load_errors(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into a ModelLoadError that names its file, or else `path`."""
    try:
        yield
    except OSError as error:
        raise errors.ModelLoadError(
            f"{error.filename or path} could not be read or written: {error.strerror or error}."
        ) from error


@contextlib.contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """Yields a path beside `target`, and removes what is there afterwards, unless it was moved to `target`."""
    path = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield path
    finally:
        remove(path)


def remove(path: Path) -> None:
    """Removes a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(target: Path, report: Report) -> Iterator[None]:
    """Holds `target`'s lock file during the block; other processes wait for it.

    Temporary files that killed processes left beside `target` are removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as file:
        if _lock(file, f"waiting for another process to make {target.name}", report):
            for path in target.parent.glob("*.tmp"):
                if path.name.startswith(f"{target.name}."):
                    remove(path)
        yield


def _lock(file: IO[str], phase: str, report: Report) -> bool:
    """Locks `file`; returns False if the platform or the file system has no locks. Reports `phase` before it waits."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        report(phase, 0.0)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def require_room(directory: Path, size: int, name: str) -> None:
    """Raises ModelLoadError if the disk of `directory`, which may not exist yet, has less than `size` bytes free."""
    directory = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(directory).free
    if free < size:
        raise errors.ModelLoadError(
            f"{name} needs at least {size / 1e9:.1f} GB in {directory}, but only {free / 1e9:.1f} GB are free there: "
            "free some, or set CACHE_DIR (HF_HOME for models of the Hub) to another disk."
        )
