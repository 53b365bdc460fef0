"""PrefixFolder: the directory of the prefix cache on disk. It knows which rows its files have, and bounds their bytes.

Each fingerprint has a folder, so that models never see each other's files; the bound holds for all of them together,
and the files that were not used for the longest time go first. Several processes may share the directory: a file
appears whole, has the same content whoever writes it, and may be gone whenever it is read.
"""

import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from engine import prefix_files
from engine.prefix_files import BadFile, Kind, Rows
from errors import first_line

log = logging.getLogger(__name__)

KEPT_SHARE = 0.9  # of the bound, down to which files are removed once it is reached
ABANDONED = 600.0  # seconds after which a file that was never finished is removed
COUNTED = 10.0  # seconds for which the bytes of other processes may be unknown
TOUCHED = 60.0  # seconds within which another use of a file is not noted
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


@dataclass
class _File:
    keys: tuple[bytes, ...]
    touched: float = 0.0  # time.monotonic()


@dataclass(frozen=True)
class _Found:
    used: int  # when, in nanoseconds
    size: int
    path: Path


class PrefixFolder:
    """The rows on disk of one model's cache. One thread writes, one reads; any may ask whether it has a row."""

    refreshed = 5.0  # seconds after which the files of other processes are looked for

    def __init__(self, root: Path, kinds: Mapping[str, Kind], limit: int) -> None:
        """kinds: those of the parts of the cache, by their names. limit: bytes of all files under `root`."""
        self.root, self.kinds, self.limit = root, kinds, limit
        (self.fingerprint,) = {kind.fingerprint for kind in kinds.values()}
        assert _FINGERPRINT.fullmatch(self.fingerprint)
        self.folder = root / self.fingerprint
        self._places: dict[tuple[str, bytes], str] = {}  # part and key -> name of the file
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()  # around changes of both
        self._bad: set[str] = set()  # names of files that could not be read or removed
        self.num_bytes = 0  # of all files, as far as known
        self._counted = -COUNTED
        self._seen: tuple[int, float] | None = None  # the folder's time of change, and when it was looked at

    @property
    def num_files(self) -> int:
        return len(self._files)

    def has(self, part: str, key: bytes) -> bool:
        return (part, key) in self._places

    # --- what other processes do

    def refresh(self, patience: float = 1.0) -> None:
        """Learns which rows the files have that are new; of those left after `patience` seconds the next time."""
        now = time.monotonic()
        if self._seen is not None and now - self._seen[1] < self.refreshed:
            return
        try:
            changed = self.folder.stat().st_mtime_ns
            if self._seen is not None and changed == self._seen[0]:
                self._seen = (changed, now)
                return
            names = {name for name in os.listdir(self.folder) if prefix_files.is_file_name(name)}
        except OSError:  # not made yet, or not readable
            names, changed = set(), -1
        known = set(self._files.copy())
        for name in known - names:
            self._forget(name)
        for name in sorted(names - known - self._bad):
            if time.monotonic() - now > patience:
                changed = -1
                break
            self._learn(name)
        self._seen = (changed, now)

    def _learn(self, name: str) -> None:
        kind = self.kinds.get(name.partition("-")[0])
        try:
            if kind is None:
                raise BadFile("it is of another layout")
            self._add(name, kind.part, prefix_files.read_header(self.folder / name, kind).keys)
        except (BadFile, OSError) as error:
            self._reject(name, error)

    def _add(self, name: str, part: str, keys: Sequence[bytes]) -> None:
        with self._lock:
            self._files[name] = _File(tuple(keys))
            for key in keys:
                self._places.setdefault((part, key), name)

    def _forget(self, name: str) -> None:
        part = name.partition("-")[0]
        with self._lock:
            file = self._files.pop(name, None)
            for key in () if file is None else file.keys:
                if self._places.get((part, key)) == name:
                    del self._places[part, key]

    def _reject(self, name: str, error: Exception) -> None:
        """Forgets a file that cannot be read, and removes one that is bad. The system may have had no descriptor or no
        memory for the others; one that another process has removed is no news."""
        self._forget(name)
        if isinstance(error, FileNotFoundError):
            return
        log.warning("%s is not used: %s", self.folder / name, first_line(error))
        self._bad.add(name)
        if isinstance(error, BadFile):
            with suppress(OSError):
                os.unlink(self.folder / name)
                self._bad.remove(name)

    # --- rows

    def read(self, part: str, keys: Sequence[bytes], used: int) -> Iterator[tuple[list[bytes], Rows]]:
        """Yields the rows with these keys, those of one file at a time, and notes when they were used. Ends early
        where one is missing or a file is bad."""
        for name, found in self._by_file(part, keys):
            try:
                rows = prefix_files.read_rows(self.folder / name, self.kinds[part], found)
            except (BadFile, OSError) as error:
                self._reject(name, error)
                return
            self._touch(name, used)
            used -= 1000  # what comes first in a prompt is needed most
            yield found, rows

    def _by_file(self, part: str, keys: Sequence[bytes]) -> Iterator[tuple[str, list[bytes]]]:
        name, found = "", list[bytes]()
        for key in keys:
            place = self._places.get((part, key))
            if place != name and found:
                yield name, found
                found = []
            if place is None:
                return
            name = place
            found.append(key)
        if found:
            yield name, found

    def note_use(self, part: str, keys: Sequence[bytes], used: int) -> None:
        """Notes that these rows were used now, though not read."""
        names = dict.fromkeys(name for key in keys if (name := self._places.get((part, key))) is not None)
        for rank, name in enumerate(names):
            self._touch(name, used - 1000 * rank)

    def _touch(self, name: str, used: int) -> None:
        file, now = self._files.get(name), time.monotonic()
        if file is not None and now - file.touched > TOUCHED:
            file.touched = now
            with suppress(OSError):
                os.utime(self.folder / name, ns=(used, used))

    def write(self, part: str, keys: Sequence[bytes], rows: Rows, used: int) -> bool:
        """Writes a file, unless there is no room for it within the bound. Raises OSError."""
        size = rows.nbytes + prefix_files.header_size(self.kinds[part], len(keys))
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if not self._make_room(size):
            return False
        path = prefix_files.write_rows(self.folder, self.kinds[part], keys, rows)
        os.utime(path, ns=(used, used))
        self.num_bytes += path.stat().st_size
        self._add(path.name, part, keys)
        return True

    # --- the bound

    def _make_room(self, size: int) -> bool:
        """Removes what was not used for the longest time until `size` bytes more are within the bound."""
        if size > KEPT_SHARE * self.limit:
            return False  # all others would go, and this one the next time
        is_over = self.num_bytes + size > self.limit
        if not is_over and time.monotonic() - self._counted < COUNTED:
            return True
        found = self._all_files()
        self.num_bytes, self._counted = sum(file.size for file in found), time.monotonic()
        if self.num_bytes + size <= self.limit:
            return True
        found.sort(key=lambda file: file.used)
        for file in found:
            if self.num_bytes + size <= KEPT_SHARE * self.limit:
                break
            self._remove(file)
        return self.num_bytes + size <= self.limit

    def _remove(self, file: _Found) -> None:
        with suppress(OSError):
            with suppress(FileNotFoundError):
                file.path.unlink()
            self.num_bytes -= file.size
            if file.path.parent == self.folder:
                self._forget(file.path.name)
            else:
                file.path.parent.rmdir()  # where it is empty now

    def count(self) -> None:
        """Counts the bytes of all files."""
        self.num_bytes, self._counted = sum(file.size for file in self._all_files()), time.monotonic()

    def _all_files(self) -> list[_Found]:
        """Lists the files of all fingerprints, and removes those that were never finished."""
        found = []
        for folder in _entries(self.root):
            if not _FINGERPRINT.fullmatch(folder.name) or not folder.is_dir(follow_symlinks=False):
                continue
            for entry in _entries(folder.path):
                is_temporary = entry.name.endswith(prefix_files.TEMPORARY)
                if not is_temporary and not prefix_files.is_file_name(entry.name):
                    continue
                with suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if is_temporary and time.time() - status.st_mtime > ABANDONED:
                        os.unlink(entry.path)
                    else:
                        found.append(_Found(status.st_mtime_ns, status.st_size, Path(entry.path)))
        return found


def _entries(path: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []
