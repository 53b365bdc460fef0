"""Requests to Claude for the tests: how they are made, and that the SDK of Anthropic finds them valid."""

import random
from typing import Any

from anthropic.types.message_create_params import MessageCreateParamsNonStreaming, MessageCreateParamsStreaming
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel, TypeAdapter

from providers.anthropic_request import Mapped, to_messages
from providers.anthropic_response import StreamMapper

Object = dict[str, Any]


REQUESTS: dict[bool, TypeAdapter[Any]] = {
    False: TypeAdapter(MessageCreateParamsNonStreaming),
    True: TypeAdapter(MessageCreateParamsStreaming),
}


OLD, MIDDLE, NEW = "claude-sonnet-4-5-20250929", "claude-opus-4-6", "claude-opus-4-8"


HELLO = [{"role": "user", "content": "Hello"}]


PNG = "data:image/png;base64,iVBORw0KGgo="


PDF = "data:application/pdf;base64,JVBERi0="


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "$defs": {"a": {}}}}}


def assert_same(validated: Any, given: Any, place: str = "") -> None:
    """Validated to the end, which iterables are only when read, and without keys that the types do not know."""
    if isinstance(validated, BaseModel):
        validated = validated.model_dump(exclude_unset=True)
    if isinstance(given, dict):
        assert validated.keys() == given.keys(), place
        for key in given:
            assert_same(validated[key], given[key], f"{place}.{key}")
    elif isinstance(given, list):
        items = list(validated)
        assert len(items) == len(given), place
        for index, item in enumerate(given):
            assert_same(items[index], item, f"{place}[{index}]")
    else:
        assert validated == given, place


def mapped(messages: Any = HELLO, model: str = MIDDLE, **body: Any) -> Mapped:
    result = to_messages({"model": model, "messages": messages, **body}, 4096)
    assert_same(REQUESTS[body.get("stream") is True].validate_python(result.body), result.body)
    return result


def call(name: str = "call_1", arguments: Any = "{}") -> Object:
    return {"id": name, "type": "function", "function": {"name": "look_up", "arguments": arguments}}


def calling(*calls: Object, **more: Any) -> Object:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


def result(name: str = "call_1", content: Any = "found") -> Object:
    return {"role": "tool", "tool_call_id": name, "content": content}


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(["a", " ", "\n", "é", "猫", '"', "\\", "🙂"]) for _ in range(rng.randrange(6)))


ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    [],
    {},
    [None],
    [[1]],
    {"type": 1},
    {"a": {}},
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each container inside with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def stream(events: list[Object], includes_usage: bool = True) -> list[Object]:
    mapper = StreamMapper("asked", 7, includes_usage)
    chunks = []
    for event in events:
        assert not mapper.is_complete
        chunks += mapper.events(event["type"], event)
    assert mapper.is_complete
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    return chunks
