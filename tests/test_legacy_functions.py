"""Function calling of 2023 says the same as tools do, streamed and whole."""

from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from process import Server

WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
}
TIME = {"name": "time", "parameters": {"type": "object", "properties": {}}}
HISTORY = [
    {"role": "user", "content": "Weather in Rome?"},
    {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}},
    {"role": "function", "name": "weather", "content": "sunny"},
]


def ask(server: Server, **body: Any) -> Any:
    start = {"model": "Tiny-Qwen3", "messages": HISTORY, "max_tokens": 200, "temperature": 1, "enable_thinking": False}
    return server.post("/v1/chat/completions", **{**start, **body})


def as_tools(functions: list[dict[str, Any]], choice: Any) -> dict[str, Any]:
    if isinstance(choice, dict):
        choice = {"type": "function", "function": choice}
    tools = [{"type": "function", "function": function} for function in functions]
    return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": False}


def chunks_of(text: str) -> list[ChatCompletionChunk]:
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    return [ChatCompletionChunk.model_validate_json(event) for event in events[:-1]]


@pytest.mark.parametrize("choice", ["auto", "none", {"name": "weather"}, {"name": "time"}, None])
def test_an_answer_is_that_of_the_same_request_with_tools(thinking_server: Server, choice: Any) -> None:
    for seed in range(3):
        body = {"functions": [WEATHER, TIME], "function_call": choice, "seed": seed}
        newer = ask(thinking_server, **as_tools([WEATHER, TIME], choice), seed=seed).json()
        older = ask(thinking_server, **body).json()
        assert older["usage"]["prompt_tokens"] == newer["usage"]["prompt_tokens"]
        (new,), (old,) = ChatCompletion.model_validate(newer).choices, ChatCompletion.model_validate(older).choices
        assert old.message.content == new.message.content and old.message.tool_calls is None
        calls = [call.function for call in new.message.tool_calls or ()]
        found = old.message.function_call
        assert [call.model_dump() for call in calls] == ([found.model_dump()] if found else [])
        assert old.finish_reason == ("function_call" if new.finish_reason == "tool_calls" else new.finish_reason)
        if isinstance(choice, dict):
            assert found is not None and found.name == choice["name"]

        chunks = chunks_of(ask(thinking_server, **body, stream=True).text)
        deltas = [chunk.choices[0].delta for chunk in chunks]
        parts = [delta.function_call for delta in deltas if delta.function_call]
        names = [part.name for part in parts if part.name is not None]
        assert ("".join(names), "".join(part.arguments or "" for part in parts)) == (
            (found.name, found.arguments) if found else ("", "")
        )
        assert len(names) == bool(found) and not any(delta.tool_calls for delta in deltas)
        assert chunks[-1].choices[0].finish_reason == old.finish_reason


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"functions": [WEATHER], **as_tools([TIME], "auto")}, "tools"),
        ({"function_call": "none", **as_tools([TIME], None)}, "tools"),
        ({"functions": [WEATHER], "tool_choice": "auto"}, "tool_choice"),
        ({"functions": [{"name": "no name"}]}, "functions[0].name"),
        ({"functions": [WEATHER, {"name": "x", "parameters": []}]}, "functions[1].parameters"),
        ({"functions": [WEATHER, WEATHER]}, "functions"),
        ({"functions": [TIME] * 600}, "functions"),
        ({"functions": [WEATHER], "function_call": "required"}, "function_call"),
        ({"functions": [WEATHER], "function_call": {}}, "function_call"),
        ({"functions": [WEATHER], "function_call": {"name": "other"}}, "function_call"),
        ({"function_call": {"name": "weather"}}, "function_call"),
    ],
)
def test_what_is_wrong_is_named_as_the_client_sent_it(server: Server, body: dict[str, Any], param: str) -> None:
    refusal = ask(server, **body)
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == param
    message = refusal.json()["error"]["message"]
    assert param in message or "function" in message
