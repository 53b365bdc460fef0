"""/v1/responses through the official SDK, and its events byte by byte."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response
from process import Server

from api.responses.encoder import ResponsesEncoder
from api.responses.requests import InputItem, ResponsesRequest
from api.responses.schemas import OutputTextDelta
from api.responses.view import as_chat, collect, stream
from errors import ContextLengthExceeded, Overloaded
from schemas import ChatCompletionChunk, ChunkChoice, Delta, Usage
from server.events import sse

MODEL = "Tiny-Qwen3"
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def request(**fields: Any) -> ResponsesRequest:
    return ResponsesRequest.model_validate({"model": "m", "input": "Hello", **fields})


def messages(**fields: Any) -> list[dict[str, Any]]:
    return [message.model_dump(exclude_none=True) for message in as_chat(request(**fields)).messages]


def test_the_sdk_reads_an_answer_and_its_stream_and_they_are_equal(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "input": "Hello", "max_output_tokens": 60, "temperature": 1.0, "top_logprobs": 2}
    options |= {"metadata": {"k": "v"}, "store": True, "extra_body": {"seed": 5, "ignore_eos": True}}
    whole = client.responses.create(**options)
    assert Response.model_validate(whole.model_dump()) and whole.metadata == {"k": "v"} and whole.model == MODEL
    events = list(client.responses.create(**options, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(delta.delta for delta in deltas) == whole.output_text
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.output_text == whole.output_text
    assert last.response.usage is not None and whole.usage is not None and last.response.output[0].type == "message"
    for name in ("input_tokens", "output_tokens", "total_tokens"):
        assert getattr(last.response.usage, name) == getattr(whole.usage, name)
    assert len(last.response.output[0].content[0].logprobs) == 60
    kinds = [kind for i, kind in enumerate(e.type for e in events) if i == 0 or events[i - 1].type != kind]
    assert kinds == [*ORDER[:-1], "response.incomplete"]


def test_times_are_whole_seconds(server: Server) -> None:
    """As clients with integers for them read them."""
    body: dict[str, Any] = {"model": MODEL, "max_output_tokens": 2}
    whole = server.post("/v1/responses", input="Hello", **body).json()
    assert type(whole["created_at"]) is int and type(whole["completed_at"]) is int
    assert 0 <= whole["completed_at"] - whole["created_at"] < 60
    lines = server.post("/v1/responses", input="Hello", stream=True, **body).text.splitlines()
    states = [json.loads(line[6:])["response"] for line in lines if line.startswith("data: ") and '"response":' in line]
    assert len(states) == 3 and all(type(state["created_at"]) is int for state in states)
    (model,) = server.get("/v1/models").json()["data"]
    chat = server.post("/v1/chat/completions", model=MODEL, messages=[{"role": "user", "content": "x"}], max_tokens=2)
    assert type(chat.json()["created"]) is int and type(model["created"]) is int


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"role": "user"}, "input[1].content"),
        ({"role": "assistant", "content": None}, "input[1].content"),
        ({"type": "function_call_output", "call_id": "c"}, "input[1].output"),
        ({"type": "custom_tool_call_output", "call_id": "c", "output": None}, "input[1].output"),
    ],
)
def test_an_item_that_says_nothing_is_named(server: Server, item: dict[str, Any], param: str) -> None:
    refusal = server.post("/v1/responses", model=MODEL, input=[{"role": "user", "content": "Hello"}, item])
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == param


def test_the_sdks_stream_helper_follows_the_events(client: OpenAI) -> None:
    eos = {"extra_body": {"logit_bias": {"258": 100}, "min_tokens": 9}}
    with client.responses.stream(
        model=MODEL, input=[{"role": "user", "content": "Hi"}], temperature=0, **eos
    ) as events:
        seen = [event.type for event in events]
        answer = events.get_final_response()
    assert seen[-1] == "response.completed" and answer.status == "completed" and answer.usage.output_tokens == 10


def test_a_conversation_with_a_tool_becomes_messages() -> None:
    items = [
        {"role": "developer", "content": "D"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "U"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "custom_tool_call", "call_id": "c3", "name": "h", "input": "text"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "A"}, {"type": "refusal", "refusal": "R"}]},
        {"role": "user", "content": "again"},
    ]
    result = messages(input=items, instructions="S")
    assert [m["role"] for m in result] == [
        *("system", "developer", "user", "assistant", "tool", "tool", "assistant", "user")
    ]
    assert [call["id"] for call in result[3]["tool_calls"]] == ["c1", "c2", "c3"]
    assert result[3]["tool_calls"][2]["function"] == {"name": "h", "arguments": '{"input": "text"}'}
    assert [m["tool_call_id"] for m in result[4:6]] == ["c1", "c2"]


def test_sampling_parameters_are_passed_on() -> None:
    given = {"temperature": 0.3, "top_p": 0.9, "seed": 4, "stop": ["x"], "top_k": 3, "min_p": 0.1, "user": "u"}
    chat = as_chat(request(**given, max_output_tokens=7, top_logprobs=2))
    assert {name: getattr(chat, name) for name in given} == given
    assert (chat.max_tokens, chat.logprobs, chat.top_logprobs) == (7, True, 2)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]},
            "input[0].content[0].image_url",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_data": "x"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0]"),
        ({"input": [{"content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": "x" * 999}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity"),
        ({"include": ["nonsense"]}, "include[0]"),
    ],
)
@pytest.mark.parametrize("is_stream", [True, False])
def test_bad_requests_are_refused_by_name(server: Server, body: dict[str, Any], param: str, is_stream: bool) -> None:
    refusal = server.post("/v1/responses", **{"model": MODEL, "input": "x", "stream": is_stream, **body})
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == param


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", '"\\ud800"'),
        ("instructions", '"\\ud800"'),
        ("metadata", '{"a": "\\ud800"}'),
        ("tools", '[{"type": "function", "name": "x", "description": "\\ud800"}]'),
        ("metadata", '{"a": ' * 150 + "1" + "}" * 150),
        ("tools", '[{"type": "function", "name": "x", "parameters": ' + '{"a": ' * 150 + "1" + "}" * 150 + "}]"),
    ],
)
def test_what_cannot_be_sent_back_is_refused_by_name(server: Server, field: str, value: str, is_stream: bool) -> None:
    body = f'{{"model": "{MODEL}", "input": "x", "stream": {json.dumps(is_stream)}, "{field}": {value}}}'
    headers = {"content-type": "application/json"}
    refusal = httpx2.post(server.url + "/v1/responses", content=body.encode(), headers=headers, timeout=30)
    assert refusal.status_code in (200, 400) and (refusal.status_code == 400 or "completed" in refusal.text)
    if refusal.status_code == 400:
        assert refusal.json()["error"]["param"] in (field, None)  # None: not even JSON, for its depth


def test_the_sdk_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="nobody", input="x")
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.responses.create(model=MODEL, input="x" * 480, max_output_tokens=5, stream=True)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")


def chunk(**delta: str) -> ChatCompletionChunk:
    return ChatCompletionChunk(id="1", created=1, model="m", choices=[ChunkChoice(index=0, delta=Delta(**delta))])


async def chunks(error: Exception | None = None) -> AsyncIterator[ChatCompletionChunk]:
    yield chunk(role="assistant", content="")
    yield chunk(content='say "hi"\n')
    if error:
        raise error
    done = chunk()
    done.choices[0].finish_reason = "stop"
    yield done
    usage = Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5)
    yield ChatCompletionChunk(id="1", created=1, model="m", choices=[], usage=usage)


def events(error: Exception | None = None) -> list[tuple[str, Any]]:
    """(name, data) of each."""

    async def read() -> bytes:
        return b"".join([event async for event in sse(stream(request(), chunks(error)), ResponsesEncoder())])

    blocks = [block.split("\n") for block in asyncio.run(read()).decode().split("\n\n")[:-1]]
    assert all(name.startswith("event: ") and data.startswith("data: ") for name, data in blocks)
    return [(name[7:], json.loads(data[6:])) for name, data in blocks]


def test_the_events_come_in_the_order_of_the_specification() -> None:
    assert [name for name, _ in events()] == ORDER
    assert [data["type"] for _, data in events()] == ORDER
    item_ids = {data["item_id"] for _, data in events()[3:7]}
    assert len(item_ids) <= 4
    response = asyncio.run(collect(stream(request(), chunks())))
    assert response.output[0].content[0].text == 'say "hi"\n' and response.status == "completed"
    assert response.usage is not None and response.usage.total_tokens == 5


def test_an_error_in_a_stream_is_an_event_and_the_response_has_failed() -> None:
    *_, error, failed = events(Overloaded('no "room"\n'))
    assert error[0] == "error" and error[1]["message"] == 'no "room"\n' and error[1]["code"] == "server_is_overloaded"
    assert failed[0] == "response.failed" and failed[1]["response"]["status"] == "failed"
    assert failed[1]["response"]["error"]["code"] == "server_error"
    assert failed[1]["sequence_number"] == error[1]["sequence_number"] + 1
    assert "TypeError" not in json.dumps(events(TypeError("a secret path"))[-2:])


def test_an_event_that_cannot_be_written_takes_no_number() -> None:
    encoder = ResponsesEncoder()
    place: dict[str, Any] = {"output_index": 0, "content_index": 0, "item_id": "msg_1", "logprobs": []}
    encoder.event(OutputTextDelta(**place, delta="x").numbered(3))
    with pytest.raises(ValueError):
        encoder.event(OutputTextDelta(**place, delta="\ud800").numbered(4))
    assert json.loads(encoder.failure(Overloaded("No room.")).split(b"data: ")[1])["sequence_number"] == 4


EARLIER = [InputItem(role="user", content="Before")]


@pytest.mark.parametrize(
    ("message", "param", "told", "field"),
    [
        ("long", "messages", "long", "input"),
        ("messages has an unpaired surrogate", "messages", "input has an unpaired surrogate", "input"),
        ("response_format: Invalid type", "response_format", "text.format: Invalid type", "text.format"),
        ("response_format.type must be text.", "response_format.type", "text.format.type must be text.",
         "text.format.type"),
        ("max_tokens is too large", "max_tokens", "max_output_tokens is too large", "max_output_tokens"),
        ("messages[0].content is bad", "messages[0].content", "instructions.content is bad", "instructions.content"),
        ("messages[1]", "messages[1]", "previous_response_id", "previous_response_id"),
        ("messages[3].content[1] is no image", "messages[3].content[1]", "input[3].content[1] is no image",
         "input[3].content[1]"),
        ("Too long, shorten the messages", "messages[9]", "Too long, shorten the messages", "input[9]"),
    ],
)  # fmt: skip
def test_an_error_names_the_field_that_was_sent(message: str, param: str, told: str, field: str) -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
    body = request(
        instructions="S", input=[{"role": "assistant", "content": "A"}, call, call, {"role": "user", "content": "U"}]
    )
    error = ContextLengthExceeded(message, param=param)
    with pytest.raises(ContextLengthExceeded) as refusal:
        asyncio.run(collect(stream(body, chunks(error), None, EARLIER)))
    assert (refusal.value.message, refusal.value.param) == (told, field)
