"""Stored responses: what comes back, for whom, how long, and how a conversation goes on from them."""

import itertools
import json
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from models import byte_tokenizer
from openai import OpenAI
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from process import MAIN, Server, run_to_end, serve, until
from pydantic import TypeAdapter

from api.responses.requests import ResponsesRequest
from api.responses.view import as_chat

MODEL = "Tiny-Qwen3"
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
(THINK,) = byte_tokenizer(has_marks=True).convert_tokens_to_ids(["<think>"])


def create(client: OpenAI, text: Any = "Hello", **fields: Any) -> Response:
    options: Any = {"model": MODEL, "input": text, "max_output_tokens": 4, "temperature": 0, **fields}
    options["extra_body"] = {"ignore_eos": True, **fields.get("extra_body", {})}
    response: Response = client.responses.create(**options)
    return response


def validated(text: str) -> list[Any]:
    return [EVENT.validate_python(json.loads(line[6:])) for line in text.splitlines() if line.startswith("data: ")]


# --- over HTTP, as the SDK sees it


def test_a_response_comes_back_as_it_was_until_it_is_deleted(client: OpenAI, server: Server) -> None:
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    text: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}, "verbosity": "low"}
    made = create(client, metadata={"k": "v"}, extra_body={"text": text})
    assert made.to_dict()["text"] == text
    assert made.to_dict() == client.responses.retrieve(made.id).to_dict() and made.to_dict()["store"] is True
    deleted = httpx2.delete(f"{server.url}/v1/responses/{made.id}", timeout=30)
    assert deleted.json() == {"id": made.id, "object": "response", "deleted": True}
    for again in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match=f"Response with id '{made.id}' not found") as refusal:
            again(made.id)
    assert refusal.value.type == "invalid_request_error"


def test_all_methods_of_a_path_are_named_where_another_one_comes(server: Server) -> None:
    refusal = server.post("/v1/responses/resp_1")
    assert refusal.status_code == 405 and refusal.headers["allow"] == "DELETE, GET"
    assert "use DELETE, GET" in refusal.json()["error"]["message"]
    other = httpx2.put(server.url + "/responses/input_tokens", timeout=30)
    assert other.status_code == 405 and other.headers["allow"] == "POST"


def test_a_stream_is_stored_when_it_ends(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "input": "Hello", "max_output_tokens": 4, "temperature": 0}
    events = list(client.responses.create(**options, stream=True, extra_body={"ignore_eos": True}))
    last = events[-1]
    assert last.type == "response.incomplete"
    assert client.responses.retrieve(last.response.id).to_dict() == last.response.to_dict()


def test_a_stored_response_is_streamed_again(client: OpenAI, server: Server) -> None:
    made = create(client, top_logprobs=1, max_output_tokens=20)
    events = list(client.responses.retrieve(made.id, stream=True))
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.to_dict() == made.to_dict()
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == made.output_text
    text = server.get(f"/v1/responses/{made.id}?stream=true&starting_after=2").text
    assert [event.sequence_number for event in validated(text)] == [*range(3, len(events))]


def test_a_conversation_goes_on_from_a_response_without_its_instructions(client: OpenAI) -> None:
    first = create(client, "One", instructions="Be brief.")
    second = create(client, "Two", previous_response_id=first.id)
    third = create(client, [{"role": "user", "content": "Three"}], previous_response_id=second.id)
    whole = [{"role": "user", "content": "One"}, *first.to_dict()["output"], {"role": "user", "content": "Two"}]
    whole += [*second.to_dict()["output"], {"role": "user", "content": "Three"}]
    same = create(client, whole)
    assert third.output_text == same.output_text and third.previous_response_id == second.id
    assert third.usage and same.usage and third.usage.input_tokens == same.usage.input_tokens
    client.responses.delete(first.id)
    listed = list(client.responses.input_items.list(third.id, order="asc"))
    (answer,) = second.output
    assert [item.content[0].text for item in listed] == ["Two", answer.content[0].text, "Three"], "what is still stored"
    with pytest.raises(openai.NotFoundError) as refusal:
        create(client, "Four", previous_response_id=third.id)
    error = refusal.value
    assert (error.param, error.code) == ("previous_response_id", "previous_response_not_found")
    assert error.type == "invalid_request_error" and first.id in str(error)


def test_the_input_is_listed_with_what_came_before_it_page_by_page(client: OpenAI, server: Server) -> None:
    first = create(client, "One")
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    items: Any = [
        {"role": "user", "content": [{"type": "input_text", "text": "Two"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        call,
        {"type": "function_call_output", "call_id": "c1", "output": "42"},
        {"type": "custom_tool_call", "call_id": "c2", "name": "g", "input": "text"},
        {"type": "custom_tool_call_output", "call_id": "c2", "output": "43"},
        {"role": "assistant", "content": "Well"},
        {"role": "developer", "content": "Go on"},
    ]
    second = create(client, items, previous_response_id=first.id)
    path = f"/v1/responses/{second.id}/input_items"
    listed = server.get(f"{path}?order=asc&limit=100").json()
    page = ResponseItemList.model_validate(listed)
    kinds = ["message", "message", *("message" if "role" in item else item["type"] for item in items)]
    assert [item.type for item in page.data] == kinds and not page.has_more
    assert listed["data"][1] == first.to_dict()["output"][0] and listed["data"][3]["id"] == "rs_1"
    assert [item.id for item in client.responses.input_items.list(second.id)] == [i.id for i in page.data][::-1]
    found = [item.id for item in client.responses.input_items.list(second.id, limit=3, order="asc")]
    assert found == [item.id for item in page.data], "the SDK asks for each page in turn"
    for query, param in (("limit=0", "limit"), ("limit=101", "limit"), ("order=up", "order"), ("after=x", "after")):
        refusal = server.get(f"{path}?{query}")
        assert refusal.status_code == (404 if param == "after" else 400) and refusal.json()["error"]["param"] == param


def test_pages_end_where_a_client_repeats_its_ids(client: OpenAI) -> None:
    def said(text: str) -> dict[str, Any]:
        return {"type": "message", "id": "msg_same", "role": "user", "content": text}

    first = create(client, [said(text) for text in "abc"])
    second = create(client, [said(text) for text in "de"], previous_response_id=first.id)
    listed = list(itertools.islice(client.responses.input_items.list(second.id, limit=1, order="asc"), 20))
    assert [item.content[0].text for item in listed if item.role == "user"] == [*"abcde"] and len(listed) == 6
    assert listed[0].id == "msg_same" and len({item.id for item in listed}) == 6


def test_a_reference_stands_for_an_item_of_a_stored_answer(client: OpenAI) -> None:
    first = create(client, "One")
    (item,) = first.output
    spelled = create(client, [{"role": "user", "content": "One"}, item.to_dict(), {"role": "user", "content": "Two"}])
    for reference in ({"type": "item_reference", "id": item.id}, {"id": item.id}):
        referred: Any = [{"role": "user", "content": "One"}, reference, {"role": "user", "content": "Two"}]
        assert create(client, referred).output_text == spelled.output_text
        chained = create(client, [reference, {"role": "user", "content": "Two"}], previous_response_id=first.id)
        assert chained.output_text == spelled.output_text, "what the conversation has already is not repeated"
    with pytest.raises(openai.NotFoundError, match="Item with id 'msg_0' not found") as refusal:
        create(client, [{"type": "item_reference", "id": "msg_0"}])
    assert refusal.value.param == "input[0]"


def test_the_tokens_of_a_prompt_are_counted_as_they_are_computed(client: OpenAI, thinking_server: Server) -> None:
    first = create(client, "One")
    second = create(client, "Two", previous_response_id=first.id, instructions="Be brief.")
    counted = client.responses.input_tokens.count(
        model=MODEL, input="Two", previous_response_id=first.id, instructions="Be brief."
    )
    assert second.usage and counted.input_tokens == second.usage.input_tokens
    assert counted.object == "response.input_tokens"
    assert client.responses.input_tokens.count(input="Two").input_tokens < counted.input_tokens, "of the main model"
    body = {"model": MODEL, "input": "Hello", "tools": [{"type": "function", "name": "f"}]}
    told = thinking_server.post("/v1/responses", **body, max_output_tokens=1).json()["usage"]["input_tokens"]
    assert thinking_server.post("/v1/responses/input_tokens", **body).json()["input_tokens"] == told
    for bad, param in (({"input": [{"role": "user"}]}, "input[0].content"), ({"model": "other"}, "model")):
        refusal = thinking_server.post("/v1/responses/input_tokens", **{**body, **bad})
        assert refusal.status_code in (400, 404) and refusal.json()["error"]["param"] == param


def test_encrypted_reasoning_brings_the_reasoning_back(thinking_server: Server) -> None:
    body = {"model": MODEL, "input": "Hello", "temperature": 0, "max_output_tokens": 40, "ignore_eos": True}
    body |= {"logit_bias": {str(THINK): 100}, "thinking_token_budget": 6, "store": False}
    plain = thinking_server.post("/v1/responses", **body).json()["output"][0]
    asked = thinking_server.post("/v1/responses", **body, include=["reasoning.encrypted_content"]).json()
    item = asked["output"][0]
    assert "encrypted_content" not in plain and plain["content"] == item["content"] and item["content"][0]["text"]

    def thoughts(**reasoning: Any) -> str | None:
        sent = {"type": "reasoning", "id": "rs_1", "summary": [], **reasoning}
        call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
        body = {"model": MODEL, "input": [{"role": "user", "content": "Hello"}, sent, call]}
        chat = as_chat(ResponsesRequest.model_validate(body))
        return chat.messages[1].reasoning_content

    text = item["content"][0]["text"]
    assert thoughts(**{**item, "content": None}) == thoughts(content=item["content"]) == text
    assert thoughts(summary=[{"type": "summary_text", "text": "In short"}]) == "In short"
    for foreign in (
        "gAAAAABo",
        item["encrypted_content"][:-4] + "AAAA",
        item["encrypted_content"][:-1],
        "reasoning.v1.é",
    ):
        assert thoughts(encrypted_content=foreign) is None


# --- keys, bounds and restarts


@pytest.fixture(scope="module", params=["memory", "sqlite"])
def small(
    request: pytest.FixtureRequest, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with two keys, a small store, and one response in the background."""
    path = tmp_path_factory.mktemp("stored") / "folder" / "responses.db"
    place = "memory" if request.param == "memory" else str(path)
    settings = {"API_KEYS": "ann:a1;concurrent=1,bob:b2", "MAX_STORED_RESPONSES": "3", "RESPONSE_STORE_SIZE": "40KiB"}
    settings |= {"MAX_BACKGROUND_RESPONSES": "2", "MAX_MODEL_LEN": "480", "DTYPE": "float32"}
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), RESPONSE_STORE=place, **settings) as server:
        server.wait_until_healthy()
        yield server
    if place != "memory":
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert sqlite3.connect(path).execute("SELECT COUNT(*) FROM responses").fetchone()[0] <= 3


@pytest.fixture
def people(small: Server) -> Iterator[tuple[OpenAI, OpenAI]]:
    keys = ("a1", "b2")
    ann, bob = (OpenAI(base_url=small.url + "/v1", api_key=key, max_retries=0) for key in keys)
    with ann, bob:
        yield ann, bob


def test_a_response_is_there_for_its_key_alone(people: tuple[OpenAI, OpenAI]) -> None:
    ann, bob = people
    made, running = create(ann), create(ann, background=True, max_output_tokens=400)
    for response in (made, running):
        for ask in (bob.responses.retrieve, bob.responses.delete, bob.responses.cancel, bob.responses.input_items.list):
            with pytest.raises(openai.NotFoundError, match="not found"):
                ask(response.id)
        with pytest.raises(openai.NotFoundError, match="Previous response"):
            create(bob, previous_response_id=response.id)
    with pytest.raises(openai.NotFoundError):
        create(bob, [{"type": "item_reference", "id": made.output[0].id}])
    assert ann.responses.retrieve(made.id).id == made.id
    ann.responses.cancel(running.id)


def test_the_least_recently_used_response_is_forgotten_first(people: tuple[OpenAI, OpenAI]) -> None:
    ann, _ = people
    first, second, third = (create(ann, text) for text in ("One", "Two", "Three"))
    ann.responses.retrieve(first.id)
    fourth = create(ann, "Four")
    found = {}
    for response in (first, second, third, fourth):
        try:
            found[response.id] = bool(ann.responses.retrieve(response.id))
        except openai.NotFoundError:
            found[response.id] = False
    assert found == {first.id: True, second.id: False, third.id: True, fourth.id: True}


def test_what_is_too_large_is_not_stored_and_says_so(people: tuple[OpenAI, OpenAI]) -> None:
    ann, _ = people
    large: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Hi", "note": "x" * 50_000}]}]
    assert create(ann, large).to_dict()["store"] is False
    with pytest.raises(openai.BadRequestError) as refusal:
        create(ann, large, background=True)
    assert refusal.value.param == "background"


def test_responses_in_the_background_are_few(people: tuple[OpenAI, OpenAI]) -> None:
    ann, bob = people
    endless: Any = {"background": True, "max_output_tokens": 450, "temperature": 1}
    made = create(ann, **endless)
    with pytest.raises(openai.RateLimitError, match="in the background"):
        create(ann, **endless)
    other = create(bob, **endless)
    with pytest.raises(openai.InternalServerError, match="2 responses are being made in the background"):
        create(bob, **endless)
    ann.responses.cancel(made.id)
    bob.responses.cancel(other.id)


def test_a_file_keeps_responses_over_a_restart(tiny_checkpoint: Path, tmp_path: Path) -> None:
    settings = {"MODEL_PATH": str(tiny_checkpoint), "RESPONSE_STORE": str(tmp_path / "r.db"), "DTYPE": "float32"}
    settings |= {"MAX_MODEL_LEN": "480", "SHUTDOWN_TIMEOUT": "0"}
    with serve(MAIN, **settings) as server:
        server.wait_until_healthy()
        with OpenAI(base_url=server.url + "/v1", api_key="none") as client:
            made = create(client)
            running = create(client, background=True, max_output_tokens=470)
    with serve(MAIN, **settings) as server:
        server.wait_until_healthy()
        with OpenAI(base_url=server.url + "/v1", api_key="none") as client:
            assert client.responses.retrieve(made.id).to_dict() == made.to_dict()
            assert create(client, "Two", previous_response_id=made.id).status == "incomplete"
            ended = client.responses.retrieve(running.id)
            assert ended.status in ("failed", "incomplete") and (ended.status == "incomplete") == (ended.error is None)


def test_a_response_in_the_background_is_found_after_its_server_was_killed(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    settings = {"MODEL_PATH": str(tiny_checkpoint), "RESPONSE_STORE": str(tmp_path / "r.db"), "DTYPE": "float32"}
    settings |= {"MAX_MODEL_LEN": "480", "SHUTDOWN_TIMEOUT": "0"}
    with serve(MAIN, **settings) as server, serve(MAIN, **settings) as other:
        server.wait_until_healthy()
        other.wait_until_healthy()
        with OpenAI(base_url=server.url + "/v1", api_key="none") as client:
            running = create(client, background=True, max_output_tokens=470)
            whole = create(client, "Two")
            with pytest.raises(openai.BadRequestError, match="still being made"):
                create(client, "Go on", previous_response_id=running.id)
        read = other.get(f"/v1/responses/{running.id}").json()
        server.process.kill()
        server.process.wait(30)
        ended = Response.model_validate(other.get(f"/v1/responses/{running.id}").json())
        assert read["status"] == "queued" and ended.status == "failed", "by another process of the same file"
    with serve(MAIN, **settings) as server:
        server.wait_until_healthy()
        with OpenAI(base_url=server.url + "/v1", api_key="none") as client:
            ended = client.responses.retrieve(running.id)
            assert ended.status == "failed" and ended.error and "restarted" in ended.error.message
            (*_, last) = client.responses.retrieve(running.id, stream=True)
            assert last.type == "response.failed" and client.responses.cancel(running.id).status == "failed"
            assert client.responses.retrieve(whole.id).to_dict() == whole.to_dict()
    assert not list(tmp_path.glob("*.alive"))


def test_a_file_that_fails_is_a_503_and_an_answer_says_that_it_is_not_stored(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.db"
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), RESPONSE_STORE=str(path), DTYPE="float32") as server:
        server.wait_until_healthy()
        body = {"model": MODEL, "input": "Hello", "max_output_tokens": 4}
        place = f"/v1/responses/{server.post('/v1/responses', **body).json()['id']}"
        with sqlite3.connect(path) as database:
            database.execute("DROP TABLE running")
            database.execute("DROP TABLE outputs")
            database.execute("DROP TABLE responses")
        database.close()
        refusals = [
            server.get(place),
            server.get(f"{place}?stream=true"),
            server.get(f"{place}/input_items"),
            server.post(f"{place}/cancel"),
            httpx2.delete(server.url + place, timeout=30),
            server.post("/v1/responses", **body, previous_response_id=place.rpartition("/")[2]),
            server.post("/v1/responses", **{**body, "input": [{"type": "item_reference", "id": "msg_1"}]}),
            server.post("/v1/responses", **body, background=True),
        ]
        for refusal in refusals:
            assert refusal.status_code == 503 and int(refusal.headers["retry-after"]) > 0, refusal.text
            assert "RESPONSE_STORE" in refusal.json()["error"]["message"]
        assert server.post("/v1/responses", **body).json()["store"] is False
        last = validated(server.post("/v1/responses", **body, stream=True).text)[-1]
        assert last.type == "response.incomplete" and last.response.to_dict()["store"] is False
        until(lambda: any("is not stored" in line and "no such table" in line for line in server.lines))


def test_a_file_that_cannot_be_used_is_said_at_the_start(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "r.db").write_text("This is no database, however long it may be." * 100)
    status, log = run_to_end(MAIN, MODEL_PATH=str(tiny_checkpoint), RESPONSE_STORE=str(tmp_path / "r.db"))
    assert status == 1 and log.splitlines()[-1].startswith("error: RESPONSE_STORE: the file ")


# --- what clients should not send


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", '"\\ud800"'),
        ("previous_response_id", '""'),
        ("previous_response_id", '"../../etc/passwd"'),
        ("previous_response_id", json.dumps("r" * 100_000)),
        ("input", '[{"type": "item_reference", "id": "\\ud800"}]'),
        ("input", '[{"type": "item_reference"}]'),
        ("input", '[{"id": "\'; DROP TABLE responses; --"}]'),
    ],
)
def test_ids_that_no_response_has_are_not_found(small: Server, field: str, value: str) -> None:
    body = f'{{"model": "{MODEL}", "input": "x", "max_output_tokens": 2, "{field}": {value}}}'
    headers = {"content-type": "application/json", "authorization": "Bearer a1"}
    refusal = httpx2.post(small.url + "/v1/responses", content=body.encode(), headers=headers, timeout=30)
    assert refusal.status_code == 404 and refusal.json()["error"]["param"].startswith(field)
    for path in ("%00", "%ff", "..%2f", "a" * 5000, "resp_%F0%9F%98%80", "input_tokens"):
        for method in ("GET", "DELETE"):
            answer = httpx2.request(method, f"{small.url}/v1/responses/{path}", headers=headers, timeout=30)
            assert answer.status_code == 404, (method, path)


@pytest.mark.parametrize("note", ['"\\ud800"', '{"a": ' * 150 + "1" + "}" * 150], ids=["surrogate", "deep"])
def test_an_input_that_json_cannot_hold_is_answered_and_not_stored(small: Server, note: str) -> None:
    items = f'[{{"role": "user", "content": "x", "note": {note}}}]'
    body = f'{{"model": "{MODEL}", "max_output_tokens": 2, "input": {items}}}'
    headers = {"content-type": "application/json", "authorization": "Bearer a1"}
    answer = httpx2.post(small.url + "/v1/responses", content=body.encode(), headers=headers, timeout=30)
    assert answer.status_code == 200
    listed = httpx2.get(f"{small.url}/v1/responses/{answer.json()['id']}/input_items", headers=headers, timeout=30)
    assert listed.status_code == (200 if answer.json()["store"] else 404)
    assert answer.json()["store"] is ("a" in note)
