"""The store of responses in a file of SQLite, which survives a restart, and which several processes may share.

One thread uses the connection, in the order in which the event loop asks, so that the loop never waits for the disk.
"""

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from api.responses.store import StoreBounds, StoredResponse, StoreFailure

log = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE = 10.0  # seconds for another process that writes
SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, client TEXT NOT NULL, response BLOB NOT NULL, items BLOB NOT NULL,
    size INTEGER NOT NULL, used REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS by_use ON responses (used);
CREATE TABLE IF NOT EXISTS outputs (
    id TEXT PRIMARY KEY, response_id TEXT NOT NULL REFERENCES responses (id) ON DELETE CASCADE
);
CREATE INDEX IF NOT EXISTS by_response ON outputs (response_id);
"""
COLUMNS = "responses.id, client, response, items"


class SqliteStore:
    def __init__(self, path: Path, bounds: StoreBounds) -> None:
        """Opens the file, or makes it, readable by its owner alone. Raises StoreFailure."""
        self._bounds = bounds
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
            self._connection = sqlite3.connect(path, timeout=PATIENCE, check_same_thread=False)
            for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            self._connection.executescript(SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise StoreFailure(f"RESPONSE_STORE: the file {path} cannot be used for responses: {error}.") from error
        self._thread = ThreadPoolExecutor(1, "responses")

    def put(self, stored: StoredResponse) -> None:
        self._thread.submit(self._put, stored).add_done_callback(_log_failure)

    async def get(self, response_id: str) -> StoredResponse | None:
        query = f"SELECT {COLUMNS} FROM responses WHERE id = ?"
        return await self._run(partial(self._get, query, response_id))

    async def find_output(self, item_id: str) -> StoredResponse | None:
        query = f"SELECT {COLUMNS} FROM responses JOIN outputs ON response_id = responses.id WHERE outputs.id = ?"
        return await self._run(partial(self._get, query, item_id))

    async def delete(self, response_id: str) -> None:
        await self._run(partial(self._delete, response_id))

    def close(self) -> None:
        """Waits for what is still to be written."""
        self._thread.shutdown()
        self._connection.close()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    # --- in the thread

    def _put(self, stored: StoredResponse) -> None:
        values = (stored.id, stored.client, stored.response, stored.items, stored.size, time.time())
        with self._connection as database:
            database.execute("INSERT OR REPLACE INTO responses VALUES (?, ?, ?, ?, ?, ?)", values)
            owned = [(item_id, stored.id) for item_id in stored.output_ids]
            database.executemany("INSERT OR REPLACE INTO outputs VALUES (?, ?)", owned)
            self._forget()

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

    def _get(self, query: str, key: str) -> StoredResponse | None:
        row = self._connection.execute(query, (key,)).fetchone()
        if row is None:
            return None
        with self._connection as database:
            database.execute("UPDATE responses SET used = ? WHERE id = ?", (time.time(), row[0]))
        return StoredResponse(id=row[0], client=row[1], response=row[2], items=row[3])

    def _delete(self, response_id: str) -> None:
        with self._connection as database:
            database.execute("DELETE FROM responses WHERE id = ?", (response_id,))


def _log_failure(writing: "Future[None]") -> None:
    if error := writing.exception():
        log.error("a response could not be stored: %s", error)
