"""Folder: the models below MODELS_DIR, as they were found a moment ago."""

import asyncio
import time
from pathlib import Path

from checkpoints import model_folder
from checkpoints.model_folder import FoundModel, Kind

MAX_AGE = 5.0  # seconds after which the folder is looked through again


class Folder:
    def __init__(self, path: Path | None) -> None:
        """path: None for no folder, and no models."""
        self._path = path
        self._found = self._scan()
        self._scanned_at = time.monotonic()
        self._scanning: asyncio.Task[None] | None = None

    @property
    def exists(self) -> bool:
        return self._path is not None

    def models(self, kind: Kind) -> list[FoundModel]:
        return [model for model in self._found if model.kind == kind]

    async def refresh(self) -> None:
        """Looks for models that have come or gone, if that was not done just now; all wait for the same look."""
        if self.exists and self._scanning is None and time.monotonic() - self._scanned_at > MAX_AGE:
            self._scanning = asyncio.create_task(self._scan_again())
        if self._scanning is not None:
            await asyncio.shield(self._scanning)

    async def _scan_again(self) -> None:
        try:
            self._found = await asyncio.to_thread(self._scan)
        finally:
            self._scanned_at, self._scanning = time.monotonic(), None

    def _scan(self) -> list[FoundModel]:
        return [] if self._path is None else model_folder.find_models(self._path)
