"""DiskPrefixCache: what prompts and answers left in the KV cache, kept on disk for later turns and the next start.

1. When a sequence ends, the engine's thread notes which rows of the cache hold it. It copies nothing.
2. A thread with a low priority copies such rows, if the cache still holds them, and writes them to files.
3. Before a sequence is admitted, its keys are looked up. Where the disk continues what memory has, the sequence waits
   and others go on. Another thread reads the rows; the engine's thread puts them into free rows of the cache.
4. Then the sequence is admitted as any other: it finds its beginning in memory.

Nothing here makes a request fail. What cannot be read is computed, and what cannot be written is left out.
"""

import asyncio
import logging
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from hashlib import blake2b
from pathlib import Path

from engine import prefix_files
from engine.cache_rows import CacheRows, Row, rows_of
from engine.kv_cache import STATE, KVCache, part_of
from engine.prefix_files import Rows
from engine.prefix_folder import PrefixFolder
from engine.sequence import Sequence, Status
from errors import first_line

log = logging.getLogger(__name__)

LEAST_BLOCKS = 2  # that are worth a file, or being read
RUN_BYTES, MOST_ROWS = 8 * 2**20, 64  # of a file, which is read and written at once
MAX_WRITES = 1024  # ended sequences that are not written yet; of more, nothing is kept
MOST_READS = 3  # for one sequence
MAX_READ_AHEAD = 2  # runs that were read and wait for the engine
WRITE_SHARE = 0.25  # of the thread's time that writing takes while the engine works
OPENING = 5.0  # seconds that reading the names and headers of files may take before the first request
PAUSE = 30.0  # seconds without writes after the disk refused one
POLL = 0.1  # seconds
NICENESS = 10


class Lookup(Enum):
    """What the disk has for a sequence."""

    NOTHING = 0  # that it lacks, or that there is room for
    READING = 1  # rows, which are read now
    LATER = 2  # rows, for which there will be room when others have been admitted


@dataclass
class _Write:
    """Rows of an ended sequence in one part of the cache, in the order of its tokens."""

    part: CacheRows
    rows: deque[Row]
    used: int  # when, in nanoseconds; what comes first in a prompt counts as used last


@dataclass(frozen=True)
class _Read:
    """What a sequence lacks in memory and the disk has."""

    sequence: Sequence
    keys: list[tuple[CacheRows, list[bytes]]]
    num_rows: dict[str, int]  # that it needs of each part until it is admitted
    num_tokens: int  # that are not to be computed then
    on_done: Callable[[], object]
    patience: threading.Timer
    asked: float = field(default_factory=time.perf_counter)


class DiskPrefixCache:
    patience = 20.0  # seconds for which a sequence waits for the disk at most
    idle_refresh = 10.0  # seconds after which an idle thread looks for files of other processes

    def __init__(self, cache: KVCache, folder: PrefixFolder, parts: list[CacheRows]) -> None:
        self._cache, self.folder = cache, folder
        self._parts = {part.name: part for part in parts}
        self._writes: deque[_Write] = deque()
        self._reads: deque[_Read] = deque()
        self._promised: list[_Read] = []  # of sequences that wait for their rows, or to be admitted with them
        self._changed = threading.Condition()
        self._deadline: float | None = None  # time.monotonic() at which the thread has to end; None: it goes on
        self._paused_until = 0.0
        self._unread = threading.Semaphore(MAX_READ_AHEAD)
        self._post: Callable[[Callable[[], object]], object] | None = None
        self._reader = threading.Thread(target=self._run_reads, name="prefix reader", daemon=True)
        self._writer = threading.Thread(target=self._run_writes, name="prefix writer", daemon=True)
        self.num_tokens_read = 0  # since the start, of prompts
        self.num_bytes_written = 0  # likewise

    @classmethod
    def open(cls, cache: KVCache, root: Path, limit: int, model: str) -> "DiskPrefixCache":
        """Reads what the files under `root` have. limit: bytes of all of them. model: a hash of all that decides the
        numbers which a row holds for its key, but for the layout of rows."""
        parts = rows_of(cache)
        layouts = [(part.name, part.layout) for part in parts]
        windows = [group.window for group in cache.groups]
        factors = [getattr(spec, "key_factors", None) for spec in cache.specs.values()]  # measured at each start
        facts = (prefix_files.MAGIC, model, sys.byteorder, cache.block_size, windows, layouts, factors)
        fingerprint = blake2b(repr(facts).encode(), digest_size=16).hexdigest()
        folder = PrefixFolder(root, {part.name: part.kind(fingerprint) for part in parts}, limit)
        folder.refresh(patience=OPENING)
        folder.count()
        return cls(cache, folder, parts)

    @property
    def has_writes(self) -> bool:
        return bool(self._writes)

    # --- the engine's thread

    def start(self, post: Callable[[Callable[[], object]], object]) -> None:
        """Starts both threads. post: has the engine's thread call something between two steps."""
        self._post = post
        self._reader.start()
        self._writer.start()

    def save(self, sequence: Sequence) -> None:
        """Has what the cache holds of a sequence written, of all that others can find."""
        if self._post is None or len(self._writes) >= MAX_WRITES:
            return
        keys, used = sequence.block_keys(self._cache.block_size), time.time_ns()
        if len(keys) < LEAST_BLOCKS:
            return
        for part in self._parts.values():
            if part.name == STATE:
                assert self._cache.states is not None
                keys = self._cache.states.ends_of(sequence)
            if rows := part.rows_of(keys):
                self._writes.append(_Write(part, deque(rows), used))
        self._wake()

    def load(self, sequence: Sequence, on_done: Callable[[], object]) -> Lookup:
        """Has the rows read that the sequence lacks, if the disk has more of its beginning than memory. `on_done` is
        called on this thread, perhaps twice, when they are there or cannot be read."""
        if self._post is None or self._deadline is not None or not self.folder.num_files:
            return Lookup.NOTHING
        size, keys = self._cache.block_size, self._cache.keys_to_reuse(sequence)
        known = self._cache.num_reusable(keys, sequence)
        length = self._cache.num_reusable(keys, sequence, self.folder.has)
        if length < known + LEAST_BLOCKS:
            sequence.is_looked_up = True
            return Lookup.NOTHING
        needed = self._needed(keys[:length])
        if any(part.num_lacking(own) for part, own in needed):
            return Lookup.NOTHING  # nor can it be admitted yet
        waiting = [read for read in self._promised if read.sequence.status is Status.WAITING]
        self._promised = [read for read in waiting if read.sequence is not sequence]
        promised = Counter[str]()
        for other in self._promised:
            promised.update(other.num_rows)
        if any(part.num_lacking(own, promised[part.name]) for part, own in needed):
            return Lookup.LATER
        sequence.is_looked_up = True
        sequence.num_reads += 1
        for part, own in needed:
            part.touch(own)
        lacking = [(part, [key for key in own if part.keeper.find(key) is None]) for part, own in needed]
        patience = threading.Timer(self.patience, self._post, (on_done,))  # a disk may hang
        patience.daemon = True
        num_tokens = (length - known) * size
        read = _Read(
            sequence=sequence,
            keys=lacking,
            num_rows={part.name: len(own) for part, own in needed},
            num_tokens=num_tokens,
            on_done=on_done,
            patience=patience,
        )
        self._promised.append(read)
        self._reads.append(read)
        read.patience.start()
        self._wake()
        return Lookup.READING

    def _needed(self, keys: list[bytes]) -> list[tuple[CacheRows, list[bytes]]]:
        """Returns what the token after these blocks needs of each part."""
        groups = enumerate(self._cache.groups)
        needed = [(part_of(index), keys[self._cache.first_visible(group, len(keys)) :]) for index, group in groups]
        needed += [] if self._cache.states is None else [(STATE, keys[-1:])]
        return [(self._parts[name], own) for name, own in needed]

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    async def close(self, timeout: float) -> None:
        """Writes what is left, for `timeout` seconds at most, and ends the threads."""
        self._deadline = time.monotonic() + timeout
        self._wake()
        if self._writer.is_alive():
            await asyncio.to_thread(self._writer.join, timeout + 1.0)

    # --- writing

    def _run_writes(self) -> None:
        _lower_priority()
        while self._goes_on():
            try:
                self._next()
            except OSError as error:
                self._pause(error)
            except Exception:  # a mistake here must not cost an answer
                log.exception("the prefix cache on disk failed")
                self._pause(None)

    def _goes_on(self) -> bool:
        if self._deadline is None:
            return True
        return bool(self._writes) and time.monotonic() < self._deadline

    def _next(self) -> None:
        """Writes one file and rests, or waits for something to write."""
        if self._writes:
            began = time.monotonic()
            self._write(self._writes[0])
            if not self._writes[0].rows:
                self._writes.popleft()
            seconds = (time.monotonic() - began) * (1 / WRITE_SHARE - 1)  # which are the engine's
            self._wait(lambda: self._deadline is not None, seconds)
        else:
            self.folder.refresh()
            self._wait(lambda: self._writes or self._deadline is not None, self.idle_refresh)

    def _wait(self, is_over: Callable[[], object], seconds: float | None = None) -> None:
        with self._changed:
            self._changed.wait_for(is_over, timeout=seconds)

    def _pause(self, error: OSError | None) -> None:
        """Gives up what waits to be written, and writes nothing for a while."""
        if error is not None:
            log.warning(
                "the prefix cache cannot write to %s, and leaves it for %.0f s: %s",
                self.folder.root,
                PAUSE,
                first_line(error),
            )
        self._paused_until = time.monotonic() + PAUSE
        self._writes.clear()

    def _write(self, write: _Write) -> None:
        """Writes the first run of the rows that no file has yet."""
        part, run = write.part, list[Row]()
        if time.monotonic() < self._paused_until:
            write.rows.clear()
            return
        self.folder.note_use(part.name, [row.key for row in write.rows], write.used)
        limit = max(1, min(MOST_ROWS, RUN_BYTES // part.row_size))
        while write.rows and len(run) < limit:
            row = write.rows.popleft()
            if not self.folder.has(part.name, row.key):
                run.append(row)
        if not run:
            return
        content = part.copy(run)
        current = [number for number, row in enumerate(run) if part.is_current(row)]
        if current:  # the others were evicted meanwhile
            content = content if len(current) == len(run) else content[current]
            keys = [run[number].key for number in current]
            if self.folder.write(part.name, keys, content, write.used):
                self.num_bytes_written += content.nbytes
        write.used -= 1000

    # --- reading

    def _run_reads(self) -> None:
        while self._deadline is None:
            self._wait(lambda: self._reads or self._deadline is not None)
            try:
                while self._reads:
                    self._carry_out(self._reads.popleft())
            except Exception:
                log.exception("the prefix cache on disk failed")

    def _carry_out(self, read: _Read) -> None:
        assert self._post is not None
        is_whole = False
        try:
            is_whole = all(self._fetch(read, part, keys) for part, keys in read.keys)
            if is_whole:
                self.num_tokens_read += read.num_tokens
                seconds = time.perf_counter() - read.asked
                log.info("%d tokens of a prompt were read from disk in %.0f ms", read.num_tokens, seconds * 1000)
        finally:
            read.patience.cancel()
            self._post(partial(self._finish, read, is_whole))

    def _finish(self, read: _Read, is_whole: bool) -> None:
        """Has the sequence admitted; the disk is asked once more then, as its rows may have had to go meanwhile."""
        if is_whole and read.sequence.num_reads < MOST_READS:
            read.sequence.is_looked_up = False
        read.on_done()

    def _fetch(self, read: _Read, part: CacheRows, keys: list[bytes]) -> bool:
        """Reads rows and hands them to the engine's thread. Returns whether all of them were there."""
        assert self._post is not None
        lacking = [key for key in keys if part.keeper.find(key) is None]  # another sequence may have read them
        num_read, limit = 0, max(1, min(MOST_ROWS, RUN_BYTES // part.row_size))
        for found, rows in self.folder.read(part.name, lacking, time.time_ns()):
            for first in range(0, len(found), limit):
                tensors = part.split(rows[first : first + limit])
                if not self._may_hand_over(read.sequence):
                    return False
                self._post(partial(self._put, part, found[first : first + limit], tensors))
            num_read += len(found)
        return num_read == len(lacking)

    def _may_hand_over(self, sequence: Sequence) -> bool:
        """Waits until the engine has taken what was read before. False where nobody waits for the rows any more."""
        while sequence.status is not Status.FINISHED and self._deadline is None:
            if self._unread.acquire(timeout=POLL):
                return True
        return False

    def _put(self, part: CacheRows, keys: list[bytes], tensors: list[Rows]) -> None:
        try:
            part.put(keys, tensors)
        finally:
            self._unread.release()


def _lower_priority() -> None:
    """Lets the engine's threads go before this one, where the system counts by threads."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
