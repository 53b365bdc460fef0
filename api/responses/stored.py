"""StoredResponses: what /v1/responses keeps of an answer, who may read it, and the conversation that led to it."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic_core import to_json

from api.responses.progress import OVER, ResponseProgress, problem_of
from api.responses.requests import InputItem, ResponsesRequest
from api.responses.schemas import ResponseObject, ResponsesEvent
from api.responses.store import MemoryStore, ResponseStore, StoreBounds, StoredResponse
from config import Settings
from errors import APIError, InvalidRequest, NotFound, Unavailable
from schemas import MAX_MESSAGES
from telemetry import request_record

log = logging.getLogger(__name__)
Object = dict[str, Any]
_ID = re.compile(r"\w[\w-]{0,199}", re.ASCII)  # of anything that was stored
INTERRUPTED = "The server ended, or was restarted, before the response was complete: ask again."
PREFIXES = {"message": "msg", "function_call": "fc", "custom_tool_call": "ctc", "reasoning": "rs"}  # of ids, by type


def open_store(settings: Settings) -> ResponseStore:
    """Raises StoreFailure if the file cannot be used."""
    bounds, place = StoreBounds.of(settings), settings.response_store
    if place == "memory":
        return MemoryStore(bounds)
    from api.responses.sqlite_store import SqliteStore  # which locks files in a way that Windows does not have

    return SqliteStore(Path(place).expanduser(), bounds)


class StoredResponses:
    def __init__(self, store: ResponseStore, bounds: StoreBounds) -> None:
        self._store, self._bounds = store, bounds

    def close(self) -> None:
        self._store.close()

    # --- reading

    async def get(self, response_id: str) -> StoredResponse:
        """Raises NotFound, also for a response that another key made."""
        stored = await self._found(response_id)
        if stored is None:
            raise NotFound(f"Response with id '{response_id[:200]}' not found.")
        return stored

    async def delete(self, response_id: str) -> None:
        await self.get(response_id)
        await self._store.delete(response_id)

    async def _found(self, response_id: str) -> StoredResponse | None:
        return _if_own(_as_ended(await self._store.get(response_id))) if _ID.fullmatch(response_id) else None

    # --- a conversation

    async def context_of(self, request: ResponsesRequest) -> tuple[list[InputItem], ResponsesRequest]:
        """Returns the items of the responses that a request follows, and the request with the items that it refers to.

        Raises NotFound if one of them is not stored.
        """
        earlier = await self.items_until(request.previous_response_id)
        known = {item["id"] for item in earlier}
        items = [InputItem.model_validate(item) for item in earlier]
        return items, await self._resolved(request, known)

    async def items_until(self, response_id: str | None, *, is_whole: bool = True) -> list[Object]:
        """Returns the input and the output of a response and of those before it, the first one first.

        Raises NotFound if one of them is not stored, unless is_whole is false: then those behind it are returned.
        """
        turns: list[list[Object]] = []
        while response_id is not None:
            stored = await self._found(response_id)
            if stored is None and is_whole:
                raise NotFound(
                    f"Previous response with id '{response_id[:200]}' not found.",
                    param="previous_response_id",
                    code="previous_response_not_found",
                )
            if stored is None:
                break
            if stored.is_running and is_whole:
                raise InvalidRequest(
                    f"Previous response with id '{response_id[:200]}' is still being made: wait until it is over.",
                    param="previous_response_id",
                    code="invalid_value",
                )
            turns.append([*stored.input_items, *stored.body["output"]])
            if sum(map(len, turns)) > MAX_MESSAGES:
                raise InvalidRequest(
                    f"The conversation has more than {MAX_MESSAGES} items: begin a new one.",
                    param="previous_response_id",
                    code="invalid_value",
                )
            response_id = stored.body["previous_response_id"]
        return [item for turn in reversed(turns) for item in turn]

    async def _resolved(self, request: ResponsesRequest, known: Collection[str]) -> ResponsesRequest:
        """known: ids of items that the conversation has already; a reference to one of them adds nothing."""
        if isinstance(request.input, str) or not any(item.is_reference for item in request.input):
            return request
        items = [
            await self._referred(item.id or "", f"input[{number}]") if item.is_reference else item
            for number, item in enumerate(request.input)
            if not (item.is_reference and item.id in known)
        ]
        return request.model_copy(update={"input": items})

    async def _referred(self, item_id: str, path: str) -> InputItem:
        stored = _if_own(await self._store.find_output(item_id)) if _ID.fullmatch(item_id) else None
        found = [item for item in stored.body["output"] if item["id"] == item_id] if stored else []
        if not found:
            raise NotFound(
                f"Item with id '{item_id[:200]}' not found: an item is stored unless its response's store is false.",
                param=path,
            )
        return InputItem.model_validate(found[0])

    async def input_of(self, previous: str | None, own: list[Object]) -> list[Object]:
        """Returns what a response answers, as far as it is still stored."""
        return [*await self.items_until(previous, is_whole=False), *own]

    # --- writing

    def open(
        self, request: ResponsesRequest, response: ResponseObject, earlier: Sequence[InputItem] = ()
    ) -> "OpenResponse":
        """Begins to keep a response, unless the request says that it is not to be stored.

        earlier: the items of the responses that it follows.
        """
        items = None if request.store is False else _input_items(request, {item.id for item in earlier})
        is_kept = items is not None and self._bounds.allow(len(items))
        response.store = is_kept
        return OpenResponse(self, ResponseProgress(response), items if is_kept else None)

    async def put(self, response: ResponseObject, items: bytes, client: str) -> bool:
        """Stores a response, however far it is; returns whether it is small enough. Raises Unavailable."""
        stored = StoredResponse(
            id=response.id,
            client=client,
            response=response.model_dump_json().encode(),
            items=items,
            output_ids=tuple(item.id for item in response.output),
            is_running=response.status not in OVER,
        )
        if not self._bounds.allow(stored.size):
            return False
        await self._store.put(stored)
        return True

    async def forget(self, response_id: str) -> None:
        await self._store.delete(response_id)


class OpenResponse:
    """A response that is being made."""

    def __init__(self, responses: StoredResponses, progress: ResponseProgress, items: bytes | None) -> None:
        """items: the input to store; None stores nothing."""
        self._responses, self.progress, self._items = responses, progress, items
        self._client = request_record.current().client
        self._has_begun = self._is_stored = False  # whether it was stored when it began, and when it ended

    @property
    def is_kept(self) -> bool:
        return self._items is not None

    @property
    def size(self) -> int:
        """The bytes of the input."""
        return len(self._items or b"")

    @property
    def input_items(self) -> list[Object]:
        items: list[Object] = json.loads(self._items or b"[]")
        return items

    async def kept(self, events: AsyncGenerator[ResponsesEvent]) -> AsyncGenerator[ResponsesEvent]:
        """Yields the events, and stores the response when they end, however they end."""
        progress = self.progress
        try:
            async with aclosing(events):
                async for event in events:
                    progress.add(event)
                    await self.store_if_over()
                    yield event
        except APIError as error:
            await self._failed(error)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            progress.cancel()
            await self.store_if_over()
            raise
        except Exception:
            await self._failed(APIError("The server failed; the error is in its log."))
            raise

    async def store_begun(self) -> None:
        """Stores a response that has only begun, so that it is found whatever happens. Raises Unavailable."""
        if self._items is not None:
            self._has_begun = True
            await self._responses.put(self.progress.response, self._items, self._client)

    async def forget(self) -> None:
        """Forgets a response that no one knows of; it is no harm if that fails."""
        with suppress(Unavailable):
            await self._responses.forget(self.progress.response.id)

    async def _failed(self, error: APIError) -> None:
        self.progress.fail(error)
        await self.store_if_over()

    async def store_if_over(self) -> None:
        """Stores the response once; not one that failed before its client could learn its id."""
        is_known = self.progress.has_begun or self.progress.response.background
        if self._items is None or self._is_stored or not self.progress.is_over or not is_known:
            return
        self._is_stored = True
        response = self.progress.response
        try:
            response.store = await self._put(response, self._items)  # also in the last event, which has the same one
        except Exception as error:
            log.error("the response %s is not stored: %s", response.id, error)
            response.store = False

    async def _put(self, response: ResponseObject, items: bytes) -> bool:
        is_small = await self._responses.put(response, items, self._client)
        if self._has_begun and not is_small:
            await self._responses.forget(response.id)
        return is_small


def _if_own(stored: StoredResponse | None) -> StoredResponse | None:
    """Returns what the key of this request has stored."""
    return stored if stored is not None and stored.client == request_record.current().client else None


def _as_ended(stored: StoredResponse | None) -> StoredResponse | None:
    """Returns a response whose process has ended before it as one that failed."""
    if stored is None or not stored.is_interrupted:
        return stored
    failed = {**stored.body, "status": "failed", "error": problem_of(Unavailable(INTERRUPTED))}
    return replace(stored, response=to_json(failed))


def _input_items(request: ResponsesRequest, taken: set[str | None]) -> bytes | None:
    """Returns the input as JSON, each item with an id that no other has; None for what JSON cannot hold.

    A client's id stays with the first item that has it: the pages of a list are found by ids. `taken`: those that the
    conversation has already.
    """
    given: list[Object] = (
        [{"type": "message", "role": "user", "content": request.input}]
        if isinstance(request.input, str)
        else [{**item.model_dump(exclude_unset=True), "type": item.type} for item in request.input]
    )
    try:
        return to_json([{**item, "id": _own_id(item, taken)} for item in given])
    except (ValueError, RecursionError):  # an unpaired surrogate, or nested too deeply to be written
        return None


def _own_id(item: Object, taken: set[str | None]) -> str:
    """Returns the id of an item, which is from then on taken; a new one if it has none, or if another has it."""
    own, kind = item.get("id"), item["type"]
    if own and own not in taken:
        taken.add(own)
        return str(own)
    return f"{PREFIXES.get(kind, kind[:20])}_{uuid4().hex}"
