"""Stored responses and their tools through the official SDK, with the demo model."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.responses import Response, ResponseStreamEvent
from process import Server, until
from pydantic import TypeAdapter

MODEL = "qwen2.5-coder-0.5b"
EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "weather", "description": "The weather of a city.", "parameters": CITY}
QUERY: Any = {
    "type": "custom",
    "name": "run_sql",
    "description": "Runs a query.",
    "format": {"type": "grammar", "syntax": "regex", "definition": r"SELECT [a-z*]{1,8} FROM [a-z]{1,12};"},
}


@pytest.fixture
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client:
        yield client


def create(client: OpenAI, text: Any, **fields: Any) -> Response:
    options: Any = {"model": MODEL, "temperature": 0, "max_output_tokens": 60, **fields}
    response: Response = client.responses.create(input=text, **options)
    assert Response.model_validate(response.to_dict())
    return response


def test_a_conversation_goes_on_from_the_response_before(client: OpenAI) -> None:
    first = create(client, "My name is Ada. Answer in five words.", instructions="Be friendly.")
    second = create(client, "What is my name?", previous_response_id=first.id)
    assert "Ada" in second.output_text and second.previous_response_id == first.id
    assert client.responses.retrieve(second.id).to_dict() == second.to_dict()
    listed = [item.to_dict() for item in client.responses.input_items.list(second.id, order="asc", limit=2)]
    assert [item["content"][0]["text"] for item in listed] == [
        "My name is Ada. Answer in five words.",
        first.output_text,
        "What is my name?",
    ]
    counted = client.responses.input_tokens.count(model=MODEL, input="What is my name?", previous_response_id=first.id)
    assert second.usage and counted.input_tokens == second.usage.input_tokens
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as refusal:
        create(client, "And again?", previous_response_id=first.id)
    assert refusal.value.code == "previous_response_not_found"


def test_a_stream_is_the_same_when_it_is_retrieved(client: OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="Say hello.", temperature=0, max_output_tokens=30) as stream:
        live = list(stream)
        whole = stream.get_final_response()
    again = list(client.responses.retrieve(whole.id, stream=True))
    for events in (live, again):
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert "".join(deltas) == whole.output_text
    assert [EVENT.validate_python(event.to_dict()).sequence_number for event in again] == [*range(len(again))]


def test_a_function_in_a_namespace_is_called_and_its_result_is_read(client: OpenAI) -> None:
    crm: Any = {"type": "namespace", "name": "info", "description": "Facts.", "tools": [WEATHER]}
    first = create(client, "What is the weather in Oslo?", tools=[crm, {"type": "web_search"}], tool_choice="required")
    call = first.output[0]
    assert call.type == "function_call" and (call.namespace, call.name) == ("info", "weather")
    assert "Oslo" in call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "It is 21 degrees and sunny."}
    second = create(client, [result], tools=[crm], tool_choice="none", previous_response_id=first.id)
    assert second.output_text and second.usage and first.usage
    spelled: Any = [{"role": "user", "content": "What is the weather in Oslo?"}, call.to_dict(), result]
    assert create(client, spelled, tools=[crm], tool_choice="none").output_text == second.output_text


def test_a_custom_tool_gets_text_that_fits_its_grammar(client: OpenAI) -> None:
    options: Any = {"tools": [QUERY], "tool_choice": {"type": "custom", "name": "run_sql"}}
    first = create(client, "How many users are there?", **options)
    call = first.output[0]
    assert call.type == "custom_tool_call" and call.input.startswith("SELECT ") and call.input.endswith(";")
    result: Any = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "42"}
    second = create(client, [result], previous_response_id=first.id)
    assert "42" in second.output_text
    with client.responses.stream(model=MODEL, input="How many users are there?", temperature=0, **options) as stream:
        deltas = [event.delta for event in stream if event.type == "response.custom_tool_call_input.delta"]
    assert "".join(deltas) == call.input and len(deltas) > 1


def test_a_response_in_the_background_is_polled_and_cancelled(client: OpenAI) -> None:
    made = create(client, "Say hello.", background=True)
    until(lambda: client.responses.retrieve(made.id).status in ("completed", "incomplete"), 300)
    assert client.responses.retrieve(made.id).output_text
    endless = create(client, "Count to a million.", background=True, max_output_tokens=3000)
    assert client.responses.cancel(endless.id).status == "cancelled"


async def test_the_asynchronous_client_does_the_same(server: Server) -> None:
    async with AsyncOpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0) as client:
        first = await client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=10, store=False)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(first.id)
