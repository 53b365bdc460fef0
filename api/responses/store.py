"""Where responses are stored: the interface, and the store in memory, which forgets the least recently used first."""

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

from config import Settings

OVERHEAD = 1024  # bytes that a stored response takes beside its content
Object = dict[str, Any]


class StoreFailure(Exception):
    """The store cannot be opened. The message is one sentence for whoever started the server."""


@dataclass(frozen=True, kw_only=True)
class StoredResponse:
    id: str
    client: str  # name of the API key that made it; only that one may read it
    response: bytes  # JSON
    items: bytes  # JSON: the list of the request's own input items, each with an id
    output_ids: tuple[str, ...] = ()  # of the items that the response has
    is_running: bool = False  # it is being made
    is_interrupted: bool = False  # the process that made it has ended

    @property
    def size(self) -> int:
        """The bytes that it takes."""
        return len(self.response) + len(self.items) + OVERHEAD

    @property
    def input_items(self) -> list[Object]:
        items: list[Object] = json.loads(self.items)
        return items

    @property
    def body(self) -> Object:
        """The response as a client gets it."""
        body: Object = json.loads(self.response)
        return body


@dataclass(frozen=True, kw_only=True)
class StoreBounds:
    max_size: int  # bytes
    max_count: int  # responses; 0 stores none

    @classmethod
    def of(cls, settings: Settings) -> "StoreBounds":
        return cls(max_size=settings.response_store_size, max_count=settings.max_stored_responses)

    def allow(self, size: int) -> bool:
        """Returns whether one response of this size can be stored."""
        return self.max_count > 0 and size <= self.max_size


class ResponseStore(Protocol):
    """All methods raise Unavailable if the store fails."""

    async def put(self, stored: StoredResponse) -> None:
        """Returns when it is kept. If no one waits for that any more, it is written nevertheless."""
        ...

    async def get(self, response_id: str) -> StoredResponse | None: ...

    async def find_output(self, item_id: str) -> StoredResponse | None:
        """Returns the response that has this item in its output."""
        ...

    async def delete(self, response_id: str) -> None: ...

    def close(self) -> None: ...


class MemoryStore:
    def __init__(self, bounds: StoreBounds) -> None:
        self._bounds = bounds
        self._stored: OrderedDict[str, StoredResponse] = OrderedDict()  # the least recently used first
        self._owners: dict[str, str] = {}  # id of an output item -> id of its response
        self._size = 0

    async def put(self, stored: StoredResponse) -> None:
        self._remove(stored.id)
        self._stored[stored.id] = stored
        self._owners |= dict.fromkeys(stored.output_ids, stored.id)
        self._size += stored.size
        while self._size > self._bounds.max_size or len(self._stored) > self._bounds.max_count:
            self._remove(next(iter(self._stored)))

    async def get(self, response_id: str) -> StoredResponse | None:
        if response_id in self._stored:
            self._stored.move_to_end(response_id)
        return self._stored.get(response_id)

    async def find_output(self, item_id: str) -> StoredResponse | None:
        return await self.get(self._owners.get(item_id, ""))

    async def delete(self, response_id: str) -> None:
        self._remove(response_id)

    def close(self) -> None:
        pass

    def _remove(self, response_id: str) -> None:
        stored = self._stored.pop(response_id, None)
        if stored is not None:
            self._size -= stored.size
            for item_id in stored.output_ids:
                self._owners.pop(item_id, None)
