"""Files that appear whole or not at all, whoever else writes them, and the room that they need."""

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
def temporary(target: Path) -> Iterator[Path]:
    """A path beside `target` that is gone afterwards, unless it was moved to `target`."""
    path = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield path
    finally:
        remove(path)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(target: Path, report: Report) -> Iterator[None]:
    """Makes and holds `target`'s lock file; other processes wait. What killed ones left beside `target` is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as file:
        if _lock(file, f"waiting for another process to make {target.name}", report):
            for path in target.parent.glob("*.tmp"):
                if path.name.startswith(f"{target.name}."):
                    remove(path)
        yield


def _lock(file: IO[str], what: str, report: Report) -> bool:
    """Whether `file` is locked now; not where the platform or the file system has no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        report(what, 0.0)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def require_room(directory: Path, size: int, name: str) -> None:
    directory = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(directory).free
    if free < size:
        raise errors.ModelLoadError(
            f"{name} needs at least {size / 1e9:.1f} GB in {directory}, but only {free / 1e9:.1f} GB are free there."
        )
