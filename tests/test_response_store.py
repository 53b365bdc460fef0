"""The stores of responses, and what is put into them: their bounds, and a response however it ends."""

import asyncio
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import Response
from process import ROOT

from api.responses.requests import ResponsesRequest
from api.responses.schemas import OutputFunctionCall, OutputItem, ResponseObject
from api.responses.sqlite_store import SqliteStore
from api.responses.store import MemoryStore, ResponseStore, StoreBounds, StoredResponse, StoreFailure
from api.responses.stored import StoredResponses
from api.responses.view import opened, stream
from errors import InvalidRequest, NotFound, Overloaded
from schemas import ChatCompletionChunk, ChunkChoice, Delta
from telemetry import request_record
from telemetry.request_record import RequestRecord

BOUNDS = StoreBounds(max_size=2**20, max_count=100)


# --- the stores themselves


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    def make(bounds: StoreBounds) -> ResponseStore:
        return MemoryStore(bounds) if request.param == "memory" else SqliteStore(tmp_path / "r.db", bounds)

    return make


def stored(name: str, size: int = 10, **fields: Any) -> StoredResponse:
    return StoredResponse(id=name, client="ann", response=b"x" * size, items=b"[]", **fields)


def test_a_store_holds_its_bounds_whatever_is_put(make: Any) -> None:
    async def check() -> None:
        store = make(StoreBounds(max_size=20_000, max_count=5))
        for number in range(40):
            await store.put(stored(f"r{number}", size=number % 7 * 1000, output_ids=(f"o{number}",)))
            found = [response for i in range(40) if (response := await store.get(f"r{i}"))]
            assert found and len(found) <= 5 and sum(response.size for response in found) <= 20_000
            assert found[-1].id == f"r{number}", "what has just been put is there"
            for i in range(40):
                owner = await store.find_output(f"o{i}")
                assert (owner and owner.id) == (f"r{i}" if await store.get(f"r{i}") else None)
        await store.delete("r39")
        assert await store.get("r39") is None and await store.find_output("o39") is None
        store.close()

    asyncio.run(check())


def test_a_response_that_is_put_twice_is_there_once(make: Any) -> None:
    async def check() -> None:
        store = make(BOUNDS)
        for size in (10, 20):
            await store.put(stored("r", size, output_ids=("o",)))
        found = await store.get("r")
        assert found is not None and len(found.response) == 20
        assert (await store.find_output("o")) is not None
        store.close()

    asyncio.run(check())


def test_two_processes_may_share_a_file(tmp_path: Path) -> None:
    async def check() -> None:
        one, other = (SqliteStore(tmp_path / "r.db", BOUNDS) for _ in range(2))
        for number in range(20):
            await one.put(stored(f"a{number}"))
            await other.put(stored(f"b{number}"))
        await asyncio.gather(one.get(""), other.get(""))  # until all is written
        assert all([await store.get(f"{name}{n}") for n in range(20) for store, name in ((one, "b"), (other, "a"))])
        one.close()
        other.close()

    asyncio.run(check())


def test_a_reader_waits_for_no_one_who_writes(tmp_path: Path) -> None:
    async def check() -> None:
        store = SqliteStore(tmp_path / "r.db", BOUNDS)
        await store.put(stored("r", output_ids=("o",)))
        other = sqlite3.connect(tmp_path / "r.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        written = asyncio.ensure_future(store.put(stored("late")))
        begin = time.monotonic()
        assert await store.get("r") is not None and await store.find_output("o") is not None
        assert time.monotonic() - begin < 2 and not written.done()
        other.execute("COMMIT")
        await written
        assert await store.get("late") is not None, "what was put is committed when that returns"
        assert other.execute("SELECT COUNT(*) FROM responses").fetchone() == (2,)
        other.close()
        store.close()

    asyncio.run(check())


def test_what_is_put_is_written_also_if_no_one_waits_for_it(tmp_path: Path) -> None:
    async def check() -> None:
        store = SqliteStore(tmp_path / "r.db", BOUNDS)
        putting = asyncio.ensure_future(store.put(stored("r")))
        await asyncio.sleep(0)
        putting.cancel()
        await asyncio.gather(putting, return_exceptions=True)
        store.close()

    asyncio.run(check())
    again = SqliteStore(tmp_path / "r.db", BOUNDS)
    assert asyncio.run(again.get("r")) is not None
    again.close()


def test_a_response_whose_owner_has_ended_is_interrupted(tmp_path: Path) -> None:
    async def check() -> None:
        one, other = (SqliteStore(tmp_path / "r.db", BOUNDS) for _ in range(2))
        await one.put(stored("r", is_running=True))
        for store in (one, other):
            found = await store.get("r")
            assert found is not None and (found.is_running, found.is_interrupted) == (True, False)
        one.close()
        found = await other.get("r")
        assert found is not None and (found.is_running, found.is_interrupted) == (False, True)
        await other.put(stored("r"))
        found = await other.get("r")
        assert found is not None and not found.is_running and not found.is_interrupted
        other.close()

    asyncio.run(check())


@pytest.mark.parametrize("place", ["/proc/r.db", "."])
def test_a_place_that_is_no_file_is_refused(place: str) -> None:
    with pytest.raises(StoreFailure, match="cannot be used for responses"):
        SqliteStore(Path(place), BOUNDS)


# --- how a response ends


def request(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "m", "input": "Hello", **fields})


async def chunks(error: BaseException | None = None) -> AsyncIterator[ChatCompletionChunk]:
    for text in ("One", "Two"):
        choice = ChunkChoice(index=0, delta=Delta(content=text))
        yield ChatCompletionChunk(id="1", created=1, model="m", choices=[choice])
    if error is not None:
        raise error


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (None, "completed", None),
        (Overloaded("No room."), "failed", "server_error"),
        (InvalidRequest("Bad."), "failed", "invalid_prompt"),
        (TypeError("a secret path"), "failed", "server_error"),
        (asyncio.CancelledError(), "cancelled", None),
    ],
)
def test_a_response_is_stored_however_it_ends(error: BaseException | None, status: str, code: str | None) -> None:
    async def check() -> None:
        responses = StoredResponses(MemoryStore(BOUNDS), BOUNDS)
        response = opened(request())
        events = responses.open(request(), response).kept(stream(request(), chunks(error), response))
        try:
            async for _ in events:
                pass
        except BaseException as raised:
            assert raised is error
        body = (await responses.get(response.id)).body
        assert Response.model_validate(body).status == status and (body["error"] or {}).get("code") == code
        assert "secret" not in json.dumps(body) and body["store"] is True

    asyncio.run(check())


def test_an_answer_that_is_too_large_says_that_it_is_not_stored() -> None:
    async def check() -> None:
        small = StoreBounds(max_size=1500, max_count=5)
        responses = StoredResponses(MemoryStore(small), small)
        response = opened(request())
        events = [
            event async for event in responses.open(request(), response).kept(stream(request(), chunks(), response))
        ]
        assert [event.response.store for event in (events[0], events[-1])] == [True, False]
        with pytest.raises(NotFound):
            await responses.get(response.id)

    asyncio.run(check())


def test_what_is_refused_at_once_is_not_stored() -> None:
    async def refused() -> AsyncIterator[ChatCompletionChunk]:
        raise InvalidRequest("Bad.")
        yield

    async def check() -> None:
        responses = StoredResponses(MemoryStore(BOUNDS), BOUNDS)
        response = opened(request())
        with pytest.raises(InvalidRequest):
            await anext(responses.open(request(), response).kept(stream(request(), refused(), response)))
        with pytest.raises(NotFound):
            await responses.get(response.id)

    asyncio.run(check())


def test_a_stream_that_is_closed_is_stored_as_cancelled() -> None:
    async def check() -> None:
        responses = StoredResponses(MemoryStore(BOUNDS), BOUNDS)
        response = opened(request())
        events = responses.open(request(), response).kept(stream(request(), chunks(), response))
        assert (await anext(events)).type == "response.created"
        await events.aclose()
        assert (await responses.get(response.id)).body["status"] == "cancelled"

    asyncio.run(check())


def test_a_long_conversation_is_followed_and_an_endless_one_refused() -> None:
    async def check() -> None:
        responses = StoredResponses(MemoryStore(StoreBounds(max_size=2**28, max_count=10**5)), BOUNDS)
        last: str | None = None
        for number in range(3):
            output: list[OutputItem] = [OutputFunctionCall(call_id=f"c{i}", name="f") for i in range(3000)]
            response = ResponseObject(status="completed", model="m", output=output, previous_response_id=last)
            items = json.dumps([{"type": "message", "role": "user", "content": str(number), "id": f"msg_{number}"}])
            await responses._store.put(
                StoredResponse(
                    id=response.id, client="", response=response.model_dump_json().encode(), items=items.encode()
                )
            )
            last = response.id
        earlier, _ = await responses.context_of(request(previous_response_id=last))
        assert len(earlier) == 9003 and [item.content for item in earlier[::3001]] == ["0", "1", "2"]
        request_record.begin(RequestRecord(client="bob"))
        with pytest.raises(NotFound):
            await responses.context_of(request(previous_response_id=last))

    begin = time.monotonic()
    asyncio.run(check())
    assert time.monotonic() - begin < 30


def test_without_a_file_nothing_of_it_is_imported() -> None:
    """Its locks are of Unix; the server also starts elsewhere."""
    code = "import sys, main; sys.exit('api.responses.owner' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0
