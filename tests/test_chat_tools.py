"""Tools, structure and reasoning as the openai SDK sees them, on the tiny and on the demo model."""

import asyncio
import json
import random
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from models import byte_tokenizer
from openai import AsyncOpenAI, OpenAI
from process import Server
from pydantic import BaseModel
from test_grammar import random_schema

MODEL, DEMO = "Tiny-Qwen3", "qwen2.5-coder-0.5b"
HELLO: Any = [{"role": "user", "content": "Hello"}]
THINK, END = byte_tokenizer(has_marks=True).convert_tokens_to_ids(["<think>", "</think>"])


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Oslo"]
    days: int


class Now(BaseModel):
    """The time."""


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Now)]  # strict
FLAT: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
ANSWER = {"enable_thinking": False}
WEATHER = {"type": "function", "function": {"name": "Weather"}}


@pytest.fixture
def thinker(thinking_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=thinking_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def streamed(client: OpenAI, **body: Any) -> tuple[dict[str, Any], str | None]:
    """The message that a client puts together from the chunks of choice 0, and why it ended."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason = None
    with client.chat.completions.create(model=MODEL, stream=True, **body) as chunks:
        for choice in [choice for chunk in chunks for choice in chunk.choices]:
            delta, reason = choice.delta.model_dump(exclude_unset=True), choice.finish_reason or reason
            message["content"] += delta.get("content") or ""
            message["reasoning_content"] += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", ()):
                if call["index"] == len(message["tool_calls"]):
                    assert call["id"].startswith("call_") and call["type"] == "function"
                    message["tool_calls"].append({"name": call["function"]["name"], "arguments": ""})
                else:
                    assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
                message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
    return message, reason


def whole(client: OpenAI, **body: Any) -> tuple[dict[str, Any], str | None]:
    choice = client.chat.completions.create(model=MODEL, **body).choices[0]
    calls = [call.function.model_dump() for call in choice.message.tool_calls or ()]
    reasoning = getattr(choice.message, "reasoning_content", None)
    assert (choice.message.content is None) <= bool(calls)
    message = {"content": choice.message.content or "", "reasoning_content": reasoning or "", "tool_calls": calls}
    return message, choice.finish_reason


BODIES: dict[str, dict[str, Any]] = {
    "required": {"tools": TOOLS, "tool_choice": "required", "extra_body": ANSWER},
    "after thinking": {"tools": TOOLS, "tool_choice": "required", "extra_body": {"thinking_token_budget": 20}},
    "one": {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "extra_body": ANSWER},
    "cut": {"tools": TOOLS, "tool_choice": WEATHER, "max_tokens": 60, "extra_body": ANSWER},
    "auto": {"tools": TOOLS},
    "thoughts": {"logit_bias": {THINK: 50, END: 4}, "max_tokens": 60},
    "structure": {"response_format": {"type": "json_object"}, "extra_body": {"thinking_token_budget": 9}},
    "stop": {"tools": TOOLS, "tool_choice": WEATHER, "stop": ["city"], "extra_body": ANSWER},
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", BODIES)
def test_a_stream_says_the_same_as_the_whole_answer(thinker: OpenAI, name: str) -> None:
    for seed in range(4):
        body = {"messages": HELLO, "max_tokens": 300, "temperature": 1.2, "seed": seed, **BODIES[name]}
        message, reason = streamed(thinker, **body)
        assert (message, reason) == whole(thinker, **body)
        calls = [json.loads(call["arguments"]) for call in message["tool_calls"]] if reason == "tool_calls" else []
        assert all(call == {} or Weather.model_validate(call) for call in calls)
        assert (reason == "tool_calls") == bool(calls)
        if name == "one":
            assert len(calls) == 1
        if name in ("cut", "stop"):
            assert reason == ("length" if name == "cut" else "stop") and not message["content"]


@pytest.mark.parametrize("choice", ["required", WEATHER])
def test_a_forced_call_has_no_content_in_any_delta(thinker: OpenAI, choice: Any) -> None:
    options: Any = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 60, "seed": 1, "extra_body": ANSWER}
    for shows in (False, True):
        with thinker.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, logprobs=shows, **options
        ) as chunks:
            deltas = [choice.delta.model_dump(exclude_unset=True) for chunk in chunks for choice in chunk.choices]
        assert deltas[0] == {"role": "assistant"} and not any("content" in delta for delta in deltas)
        assert any("tool_calls" in delta for delta in deltas)


def test_reasoning_is_counted_and_stays_out_of_the_content(thinker: OpenAI) -> None:
    bias = {THINK: 30, END: 3}
    answer = thinker.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=200, temperature=1, seed=3, logit_bias=bias, logprobs=True
    )
    message, usage = answer.choices[0].message, answer.usage
    assert message.model_extra is not None and usage is not None and usage.completion_tokens_details is not None
    tokens = [token.token for token in answer.choices[0].logprobs.content or ()]
    assert tokens[0] == "<think>" and len(tokens) == usage.completion_tokens - (
        answer.choices[0].finish_reason == "stop"
    )
    count = tokens.index("</think>") + 1 if "</think>" in tokens else len(tokens)
    assert usage.completion_tokens_details.reasoning_tokens == count
    assert message.model_extra["reasoning_content"] and "<think>" not in (message.content or "")[:7]


@pytest.mark.parametrize("stop", [{"stop": "<think>"}, {"stop_token_ids": [THINK]}], ids=["string", "token"])
def test_what_stops_the_content_does_not_stop_the_thoughts(thinker: OpenAI, stop: dict[str, Any]) -> None:
    """A model that says nothing else: it comes among the thoughts, and again as the first word of the content."""
    body: dict[str, Any] = {"messages": HELLO, "max_tokens": 40, "temperature": 0, "logit_bias": {THINK: 100}}
    body["extra_body"] = {"thinking_token_budget": 6, **stop}
    message, reason = whole(thinker, **body)
    assert message["reasoning_content"] == "<think>" * 6 and not message["content"] and reason == "stop"
    assert streamed(thinker, **body) == (message, reason)


def test_several_choices_have_calls_of_their_own(thinker: OpenAI) -> None:
    answer = thinker.chat.completions.create(
        model=MODEL, messages=HELLO, tools=TOOLS, tool_choice="required", n=3, seed=1, temperature=1.5,
        max_tokens=400, parallel_tool_calls=False, extra_body=ANSWER,
    )  # fmt: skip
    calls = [choice.message.tool_calls for choice in answer.choices]
    assert len(calls) == 3 and all(own and len(own) == 1 for own in calls)
    assert len({own[0].id for own in calls if own}) == 3


def test_the_sdk_parses_structures_and_calls(thinker: OpenAI) -> None:
    parsed = thinker.chat.completions.parse(
        model=MODEL, messages=HELLO, response_format=Weather, max_tokens=400, seed=1, extra_body=ANSWER
    )
    assert isinstance(parsed.choices[0].message.parsed, Weather)
    called = thinker.chat.completions.parse(
        model=MODEL, messages=HELLO, tools=TOOLS, max_tokens=400, seed=1, parallel_tool_calls=False,
        tool_choice={"type": "function", "function": {"name": "Weather"}}, extra_body=ANSWER,
    )  # fmt: skip
    (call,) = called.choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather)


def test_the_sdks_streams_of_chats_put_calls_together(thinker: OpenAI) -> None:
    with thinker.chat.completions.stream(
        model=MODEL, messages=HELLO, tools=TOOLS, tool_choice="required", max_tokens=400, seed=2,
        parallel_tool_calls=False, extra_body=ANSWER,
    ) as stream:  # fmt: skip
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or ()
    assert "tool_calls.function.arguments.delta" in events and "tool_calls.function.arguments.done" in events
    assert final.choices[0].finish_reason == "tool_calls" and json.loads(call.function.arguments) is not None


def test_the_sdks_streams_of_responses_put_calls_and_reasoning_together(thinker: OpenAI) -> None:
    with thinker.responses.stream(
        model=MODEL, input="Hello", tools=FLAT, tool_choice="required", max_output_tokens=400, temperature=1.2,
        extra_body={"thinking_token_budget": 12, "logit_bias": {THINK: 50}, "seed": 4}, parallel_tool_calls=False,
    ) as stream:  # fmt: skip
        events = list(stream)
        final = stream.get_final_response()
    assert [item.type for item in final.output] == ["reasoning", "function_call"]
    assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == [*range(len(events))]
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    call = final.output[1]
    assert call.type == "function_call" and call.status == "completed" and call.arguments == arguments
    thoughts = "".join(event.delta for event in events if event.type == "response.reasoning_text.delta")
    assert final.output[0].type == "reasoning" and final.output[0].content
    assert final.output[0].content[0].text == thoughts != ""


def test_log_probabilities_break_no_item_of_a_response_in_two(thinker: OpenAI) -> None:
    options: Any = {"tools": FLAT, "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 400}
    budget: Any = {"thinking_token_budget": 9, "logit_bias": {THINK: 50}}
    with thinker.responses.stream(model=MODEL, input="Hello", top_logprobs=2, extra_body=budget, **options) as stream:
        assert [item.type for item in stream.until_done().get_final_response().output] == ["reasoning", "function_call"]


def test_a_conversation_goes_on_after_a_call(thinker: OpenAI) -> None:
    options: Any = {"model": MODEL, "tools": FLAT, "tool_choice": "required", "max_output_tokens": 300}
    first = thinker.responses.create(input="Hello", parallel_tool_calls=False, extra_body=ANSWER, **options)
    (call,) = first.output
    assert call.type == "function_call"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    history: Any = [{"role": "user", "content": "Hello"}, call.model_dump(), result]
    second = thinker.responses.create(input=history, **options)
    assert second.usage and first.usage and second.usage.input_tokens > first.usage.input_tokens


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "x", "strict": True, "parameters": {"not": {}}}}]},
         "tools[0].function.parameters"),
        ({"tools": [TOOLS[1], {"type": "function", "function": {"name": "x", "parameters": {"$ref": "http://a/b"}}}],
          "tool_choice": "required"}, "tools[1].function.parameters"),
        ({"tools": TOOLS, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
         "response_format"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_enforced_is_refused_by_name(thinker: OpenAI, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        thinker.chat.completions.create(model=MODEL, messages=HELLO, **body)
    assert refusal.value.param == param


def test_a_schema_that_need_not_be_enforced_is_not(thinker: OpenAI) -> None:
    loose: Any = [{"type": "function", "function": {"name": "x", "parameters": {"not": {}}}}]
    answer = thinker.chat.completions.create(model=MODEL, messages=HELLO, tools=loose, max_tokens=20)
    assert answer.choices[0].finish_reason in ("stop", "length")


# --- the demo model


@pytest.mark.slow
def test_a_hundred_random_schemas_are_kept_by_the_demo_model(demo_server: Server) -> None:
    rng = random.Random(7)
    schemas = [random_schema(rng) for _ in range(100)]

    async def ask(client: AsyncOpenAI, gate: asyncio.Semaphore, number: int) -> bool:
        schema: Any = {"name": "x", "strict": True, "schema": schemas[number]}
        async with gate:
            answer = await client.chat.completions.create(
                model=DEMO,
                messages=[{"role": "user", "content": "Answer with an example."}],
                response_format={"type": "json_schema", "json_schema": schema},
                temperature=1,
                seed=number,
                max_tokens=150,
            )
        if answer.choices[0].finish_reason == "stop":
            jsonschema.validate(json.loads(answer.choices[0].message.content or ""), schemas[number])
        return answer.choices[0].finish_reason == "stop"

    async def ask_all() -> list[bool]:
        gate = asyncio.Semaphore(16)
        async with AsyncOpenAI(base_url=demo_server.url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, gate, number) for number in range(100)))

    assert sum(asyncio.run(ask_all())) > 80


def test_the_demo_model_calls_a_tool_and_reads_its_result(demo_client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "What is the weather in Oslo for 2 days?"}]
    options: Any = {"model": DEMO, "tools": TOOLS, "temperature": 0, "max_tokens": 100}
    one = demo_client.chat.completions.create(messages=messages, tool_choice="required", **options).choices[0]
    assert one.message.tool_calls and len(one.message.tool_calls) == 1 and one.finish_reason == "tool_calls"
    for choice in ("auto", "required"):
        first = demo_client.chat.completions.create(
            messages=messages, tool_choice=choice, parallel_tool_calls=False, **options
        ).choices[0]
        assert first.finish_reason == "tool_calls"
        (call,) = first.message.tool_calls or ()
        assert json.loads(call.function.arguments) == {"city": "Oslo", "days": 2}
    result = {"role": "tool", "tool_call_id": call.id, "content": "snow, -7 degrees"}
    options["tool_choice"] = "none"  # so small a model would call it again
    asked = {"role": "user", "content": "Thanks. Is it cold there?"}
    second = demo_client.chat.completions.create(messages=[*messages, first.message, result, asked], **options)
    assert "Yes" in (second.choices[0].message.content or "")
