"""Requests of Anthropic's Messages API, as its clients send them, and how its official types read the answers."""

import json
import random
from typing import Any

from anthropic.types import Message, RawMessageStreamEvent
from claude_requests import REQUESTS, Object, assert_same, random_text
from process import Server
from pydantic import TypeAdapter

MODEL = "Tiny-Qwen3"
HELLO = [{"role": "user", "content": "Hello"}]
PNG = "iVBORw0KGgo="
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
}
WEATHER["input_schema"]["additionalProperties"] = False


def ask(server: Server, path: str = "", **body: Any) -> Any:
    """An answer that is the same each time, unless the body says otherwise."""
    start: Object = {"model": MODEL, "messages": HELLO}
    start |= {} if path else {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
    return server.post(f"/v1/messages{path}", **{**start, **body})


def answer(server: Server, **body: Any) -> Object:
    """A whole answer, which the official types find valid and complete."""
    response = ask(server, **body)
    assert response.status_code == 200, response.text
    told: Object = response.json()
    assert_same(Message.model_validate(told, strict=True), told)
    return told


def events(text: str) -> list[Object]:
    """The events of a stream, which the official types find valid; pings are in none of them."""
    found = []
    for event in text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        told = json.loads(data.removeprefix("data: "))
        assert name == f"event: {told['type']}"
        if told["type"] not in ("ping", "error"):
            assert_same(EVENT.validate_python(told, strict=True), told)
        found.append(told)
    return found


def text_of(told: Object) -> str:
    return "".join(block["text"] for block in told["content"] if block["type"] == "text")


def folded(told: list[Object]) -> Object:
    """The answer that a client has at the end of a stream."""
    message: Object = {}
    inputs: dict[int, str] = {}
    for event in json.loads(json.dumps(told)):
        match event["type"]:
            case "message_start":
                message = event["message"]
            case "content_block_start":
                assert event["index"] == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_delta":
                block, delta = message["content"][event["index"]], event["delta"]
                assert event["index"] == len(message["content"]) - 1
                if delta["type"] == "input_json_delta":
                    inputs[event["index"]] = inputs.get(event["index"], "") + delta["partial_json"]
                else:
                    name = delta["type"].removesuffix("_delta")
                    block[name] += delta[name]
            case "message_delta":
                message |= {**event["delta"], "usage": event["usage"]}
    for index, written in inputs.items():
        message["content"][index]["input"] = json.loads(written)
    return message


# --- any conversation


def random_conversation(rng: random.Random) -> list[Object]:
    """A conversation as agents have it: turns alternate, and each call has its result in the next one."""
    messages: list[Object] = []
    waiting: list[str] = []
    for number in range(rng.randrange(1, 8)):
        if number % 2 == 0:
            messages.append({"role": "user", "content": _user_blocks(rng, waiting)})
            continue
        waiting = [f"toolu_{number}_{index}" for index in range(rng.randrange(3))]
        messages.append({"role": "assistant", "content": _assistant_blocks(rng, waiting)})
    if messages[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": _user_blocks(rng, waiting)})
    return messages


def _text(rng: random.Random) -> Object:
    return {"type": "text", "text": f"x{random_text(rng)}x"}


def _user_blocks(rng: random.Random, waiting: list[str]) -> list[Object]:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    results: list[Object] = [
        {"type": "tool_result", "tool_use_id": name, "content": [_text(rng)], "is_error": False} for name in waiting
    ]
    return [*results, _text(rng), *([image, _text(rng)] if rng.random() < 0.3 else [])]


def _assistant_blocks(rng: random.Random, calls: list[str]) -> list[Object]:
    uses = [{"type": "tool_use", "id": name, "name": "weather", "input": {"city": random_text(rng)}} for name in calls]
    return [_text(rng), *uses]


def is_valid(body: Object) -> bool:
    """Whether Anthropic's own types take a request."""
    assert_same(REQUESTS[body.get("stream") is True].validate_python(body), body)
    return True
