"""Anthropic's SDK of today: plain and asynchronous, streams and their helpers, tools, counts, and errors."""

import json
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic, beta_async_tool, beta_tool
from process import Server
from pydantic import BaseModel
from recording_proxy import recording
from scripted_model import Call, ScriptedModel
from upstreams import Upstream
from wire_checks import checked

MODEL, SCRIPTED = "qwen2.5-coder-0.5b", "deepseek/model"
Object = dict[str, Any]
ADD: Object = {
    "model": MODEL,
    "max_tokens": 60,
    "messages": [{"role": "user", "content": "Write add(a, b) in Python."}],
}
GREEDY: Object = {"extra_body": {"temperature": 0}}
WEATHER: Object = {
    "name": "weather",
    "description": "Tells the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "enum": [1, 2, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
OSLO = [{"role": "user", "content": "What will the weather be like in Oslo in the next two days?"}]


class City(BaseModel):
    name: str
    country: str


@pytest.fixture
def client(server: Server) -> Anthropic:
    return Anthropic(base_url=server.url, api_key="unused", max_retries=0)


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def test_an_answer_has_text_a_reason_usage_and_a_request_id(client: Anthropic) -> None:
    message = client.messages.create(**ADD, system="Answer with code only.", **GREEDY)
    assert "def add" in text_of(message) and message.stop_reason in ("end_turn", "max_tokens")
    assert (message.role, message.model, message.type) == ("assistant", MODEL, "message")
    assert message.id.startswith("msg_") and message.usage.output_tokens > 5
    assert message._request_id and message._request_id.startswith("req_")


def test_every_way_to_stream_gives_the_answer_that_is_not_streamed(client: Anthropic) -> None:
    whole = client.messages.create(**ADD, **GREEDY)
    events = [*client.messages.create(**ADD, **GREEDY, stream=True)]
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    assert "".join(delta.text for delta in deltas if delta.type == "text_delta") == text_of(whole)
    with client.messages.stream(**ADD, **GREEDY) as stream:
        assert "".join(stream.text_stream) == text_of(whole)
        final = stream.get_final_message()
    assert (text_of(final), final.stop_reason) == (text_of(whole), whole.stop_reason)
    assert final.usage.output_tokens == whole.usage.output_tokens
    with client.messages.stream(**ADD, **GREEDY) as stream:
        kinds = [event.type for event in stream]
    assert {"text", "content_block_stop", "message_stop"} <= {*kinds}


async def test_the_asynchronous_client_gives_the_same(server: Server, client: Anthropic) -> None:
    whole = client.messages.create(**ADD, **GREEDY)
    async with AsyncAnthropic(base_url=server.url, auth_token="unused", max_retries=0) as other:
        assert text_of(await other.messages.create(**ADD, **GREEDY)) == text_of(whole)
        async with other.messages.stream(**ADD, **GREEDY) as stream:
            assert "".join([text async for text in stream.text_stream]) == text_of(whole)
        count = await other.messages.count_tokens(model=MODEL, messages=ADD["messages"])
    usage = whole.usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_tools_are_counted(client: Anthropic) -> None:
    plain = client.messages.count_tokens(model=MODEL, messages=OSLO, system="Be brief.")
    with_tools = client.messages.count_tokens(model=MODEL, messages=OSLO, system="Be brief.", tools=[WEATHER])
    assert with_tools.input_tokens > plain.input_tokens + 30


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_forced_call_is_valid_whole_and_streamed(client: Anthropic, choice: Any) -> None:
    asked: Object = {"model": MODEL, "max_tokens": 200, "messages": OSLO, "tools": [WEATHER], "tool_choice": choice}
    message = client.messages.create(**asked, **GREEDY)
    (block,) = [block for block in message.content if block.type == "tool_use"]
    assert message.stop_reason == "tool_use" and block.name == "weather"
    assert block.input["city"] == "Oslo" and block.input["days"] in (1, 2, 3)
    with client.messages.stream(**asked, **GREEDY) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        (streamed,) = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert streamed.input == block.input == json.loads("".join(pieces))


def test_a_call_and_its_result_are_a_conversation(client: Anthropic) -> None:
    call = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo", "days": 2}}
    result = {
        "type": "tool_result",
        "tool_use_id": "toolu_1",
        "content": [{"type": "text", "text": "Snow, -7 degrees."}],
    }
    messages = [*OSLO, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    asked: Object = {"model": MODEL, "max_tokens": 60, "tools": [WEATHER], "tool_choice": {"type": "none"}}
    message = client.messages.create(**asked, messages=messages, **GREEDY)
    assert text_of(message) and message.stop_reason in ("end_turn", "max_tokens")


def test_parse_returns_an_object_of_the_callers_class(client: Anthropic) -> None:
    question = [{"role": "user", "content": "Which city is the capital of France?"}]
    message = client.messages.parse(model=MODEL, max_tokens=100, messages=question, output_format=City, **GREEDY)
    assert message.parsed_output == City(name="Paris", country="France")


def test_a_stop_sequence_is_named(client: Anthropic) -> None:
    asked = {**ADD, "messages": [{"role": "user", "content": "Count from 1 to 9 with commas."}]}
    message = client.messages.create(**asked, stop_sequences=["5"], **GREEDY)
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "5") and "4" in text_of(message)


def test_errors_are_the_sdks_own(client: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(**{**ADD, "model": "claude-none"})
    assert unknown.value.body["error"]["type"] == "not_found_error" and unknown.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(**{**ADD, "max_tokens": 0})
    with pytest.raises(anthropic.BadRequestError, match="too long|context"):
        client.messages.create(**{**ADD, "messages": [{"role": "user", "content": "hello " * 9000}]})


def test_betas_are_accepted_and_unknown_ones_named(client: Anthropic) -> None:
    raw = client.beta.messages.with_raw_response.create(**ADD, betas=["of-tomorrow-2030-01-01"])
    assert "of-tomorrow-2030-01-01" in raw.headers["x-ignored-betas"]
    assert raw.parse().stop_reason in ("end_turn", "max_tokens")


def test_models_are_listed(client: Anthropic) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


# --- the SDK's own loop over tools, with a model whose answers are written down

SUNNY = "It will be sunny in Oslo."
CALLS = (Call("forecast", {"city": "Oslo", "days": 2}), Call("forecast", {"city": "Rome", "days": 1}), SUNNY)


def forecast(city: str, days: int) -> str:
    """Tells the weather.

    Args:
        city: The name of the city.
        days: For how many days.
    """
    return f"{city} for {days}: sun"


async def forecast_later(city: str, days: int) -> str:
    return forecast(city, days)


@pytest.mark.parametrize("is_stream", [False, True])
def test_the_tool_runner_calls_until_the_model_has_an_answer(
    agents_server: Server, provider: Upstream, is_stream: bool
) -> None:
    provider.script = ScriptedModel(CALLS)
    """The SDK first asks the server to hold the conversation, and sends all of it once that is refused."""
    with recording(agents_server.url) as recorder:
        client = Anthropic(base_url=recorder.url, api_key="unused", max_retries=0)
        runner = client.beta.messages.tool_runner(
            model=SCRIPTED, max_tokens=200, messages=OSLO, tools=[beta_tool(forecast)], stream=is_stream
        )
        assert text_of(runner.until_done()) == SUNNY
        client.close()
        refused, *others = recorder.exchanges
        assert refused.status == 400 and refused.sent.get("thread") == {"type": "create"}
        assert [len(checked(exchange).call_ids) for exchange in others] == [1, 1, 0]
    results = [message["content"] for message in provider.asked[-1].body["messages"] if message["role"] == "tool"]
    assert [str(result) for result in results] == ["Oslo for 2: sun", "Rome for 1: sun"]


async def test_the_asynchronous_tool_runner_does_the_same(agents_server: Server, provider: Upstream) -> None:
    provider.script = ScriptedModel(CALLS)
    tool = beta_async_tool(forecast_later, name="forecast", description="Tells the weather.")
    async with AsyncAnthropic(base_url=agents_server.url, api_key="unused", max_retries=0) as client:
        runner = client.beta.messages.tool_runner(model=SCRIPTED, max_tokens=200, messages=OSLO, tools=[tool])
        assert text_of(await runner.until_done()) == SUNNY
