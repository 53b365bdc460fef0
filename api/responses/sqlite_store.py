"""The store of responses in a file of SQLite, which survives a restart, and which several processes may share.

One thread writes and one reads, so that the event loop never waits for the disk, nor a reader for who writes.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from api.responses.owner import Owner
from api.responses.store import StoreBounds, StoredResponse, StoreFailure
from errors import Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE = 10.0  # seconds for another process that writes
SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, client TEXT NOT NULL, response BLOB NOT NULL, items BLOB NOT NULL,
    size INTEGER NOT NULL, used REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS by_use ON responses (used, size);
CREATE TABLE IF NOT EXISTS outputs (
    id TEXT PRIMARY KEY, response_id TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE
);
CREATE INDEX IF NOT EXISTS by_response ON outputs (response_id);
CREATE TABLE IF NOT EXISTS running (
    id TEXT PRIMARY KEY REFERENCES responses (id) ON DELETE CASCADE, owner TEXT NOT NULL
);
"""
ROWS = (
    "SELECT responses.id, client, response, items, owner FROM responses LEFT JOIN running ON running.id = responses.id"
)


class SqliteStore:
    def __init__(self, path: Path, bounds: StoreBounds) -> None:
        """Opens the file, or makes it, readable by its owner alone. Raises StoreFailure."""
        self._path, self._bounds = path, bounds
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._connection = sqlite3.connect(path, timeout=PATIENCE, check_same_thread=False)
            for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._connection.executescript(SCHEMA)
            self._reading = sqlite3.connect(path, timeout=PATIENCE, check_same_thread=False)
            self._owner = Owner(path)
        except (OSError, sqlite3.Error) as error:
            raise StoreFailure(f"RESPONSE_STORE: the file {path} cannot be used for responses: {error}.") from error
        self._running: set[str] = set()  # ids of the responses that this process is making
        self._writer, self._reader = (ThreadPoolExecutor(1, f"responses-{name}") for name in ("write", "read"))

    async def put(self, stored: StoredResponse) -> None:
        if stored.is_running:
            self._running.add(stored.id)
        else:
            self._running.discard(stored.id)
        try:
            await self._run(self._writer, partial(self._put, stored))
        except Unavailable:
            self._running.discard(stored.id)
            raise

    async def get(self, response_id: str) -> StoredResponse | None:
        return await self._run(self._reader, partial(self._get, f"{ROWS} WHERE responses.id = ?", response_id))

    async def find_output(self, item_id: str) -> StoredResponse | None:
        query = f"{ROWS} JOIN outputs ON response_id = responses.id WHERE outputs.id = ?"
        return await self._run(self._reader, partial(self._get, query, item_id))

    async def delete(self, response_id: str) -> None:
        self._running.discard(response_id)
        await self._run(self._writer, partial(self._delete, response_id))

    def close(self) -> None:
        """Waits for what is still to be written."""
        for thread, connection in ((self._writer, self._connection), (self._reader, self._reading)):
            thread.shutdown()
            connection.close()
        self._owner.close()

    async def _run(self, thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        """Raises Unavailable if the file fails. What has begun goes on, also if no one waits for it any more."""
        try:
            return await asyncio.shield(asyncio.get_running_loop().run_in_executor(thread, work))
        except sqlite3.Error as error:
            log.error("RESPONSE_STORE: the file %s failed: %s", self._path, error)
            raise Unavailable(
                f"Stored responses cannot be reached, because the file of RESPONSE_STORE failed ({error}): try later.",
                retry_after=5,
            ) from error

    # --- in the thread that writes

    def _put(self, stored: StoredResponse) -> None:
        values = (stored.id, stored.client, stored.response, stored.items, stored.size, time.time())
        with self._connection as database:
            database.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)", values)
            owned = [(item_id, stored.id) for item_id in stored.output_ids]
            database.executemany("INSERT OR REPLACE INTO outputs VALUES (?, ?)", owned)
            database.execute("DELETE FROM running WHERE id = ?", (stored.id,))
            if stored.is_running:
                database.execute("INSERT INTO running VALUES (?, ?)", (stored.id, self._owner.name))
            self._forget()

    def _delete(self, response_id: str) -> None:
        with self._connection as database:
            database.execute("DELETE FROM responses WHERE id = ?", (response_id,))

    def _forget(self) -> None:
        """Deletes the least recently used responses until the rest is within the bounds."""
        count, size = self._connection.execute("SELECT COUNT(*), SUM(size) FROM responses").fetchone()
        oldest = self._connection.execute("SELECT id, size FROM responses ORDER BY used")
        gone: list[tuple[str]] = []
        while count > self._bounds.max_count or size > self._bounds.max_size:
            response_id, own_size = oldest.fetchone()
            gone.append((response_id,))
            count, size = count - 1, size - own_size
        self._connection.executemany("DELETE FROM responses WHERE id = ?", gone)

    # --- in the thread that reads

    def _get(self, query: str, key: str) -> StoredResponse | None:
        row = self._reading.execute(query, (key,)).fetchone()
        if row is None:
            return None
        response_id, client, response, items, owner = row
        self._touch(response_id)
        is_running = owner is not None and self._is_made(response_id, owner)
        return StoredResponse(
            id=response_id,
            client=client,
            response=response,
            items=items,
            is_running=is_running,
            is_interrupted=owner is not None and not is_running,
        )

    def _is_made(self, response_id: str, owner: str) -> bool:
        """Returns whether a response that had begun may still end."""
        return response_id in self._running if owner == self._owner.name else self._owner.is_alive(owner)

    def _touch(self, response_id: str) -> None:
        """Notes the use, unless someone else is writing: no reader has to wait for that."""
        self._reading.execute("PRAGMA busy_timeout = 0")
        try:
            with self._reading as database:
                database.execute("UPDATE responses SET used = ? WHERE id = ?", (time.time(), response_id))
        except sqlite3.Error as error:
            log.debug("the use of a response was not noted: %s", error)
        finally:
            self._reading.execute(f"PRAGMA busy_timeout = {int(PATIENCE * 1000)}")
