"""Any conversation becomes a request that Anthropic's own SDK finds valid, or is refused by name."""

import json
import random
from typing import Any

import pytest
from claude_requests import (
    MIDDLE,
    NEW,
    ODD,
    OLD,
    PDF,
    PNG,
    TOOL,
    Object,
    call,
    calling,
    mapped,
    places,
    random_text,
    result,
)

from errors import InvalidRequest
from providers.anthropic_request import to_messages
from server.error_formats import OPENAI


def random_part(rng: random.Random, role: str) -> Object:
    parts: list[Object] = [{"type": "text", "text": random_text(rng)}]
    if role in ("user", "tool"):
        parts.append({"type": "image_url", "image_url": rng.choice([PNG, {"url": "https://example.org/a"}])})
    if role == "user":
        parts.append({"type": "file", "file": {"file_data": PDF}})
    return rng.choice(parts)


def random_content(rng: random.Random, role: str) -> Any:
    return random_text(rng) if rng.random() < 0.5 else [random_part(rng, role) for _ in range(rng.randrange(1, 4))]


def random_messages(rng: random.Random) -> list[Object]:
    messages: list[Object] = [{"role": "user", "content": "Hello"}]
    for _ in range(rng.randrange(6)):
        role = rng.choice(["system", "developer", "user", "assistant", "calls"])
        if role != "calls":
            messages.append({"role": role, "content": random_content(rng, role)})
            continue
        ids = rng.sample(["a", "b:1", "b.1", "b_1", "é"], rng.randrange(1, 4))
        thoughts = [{"type": "thinking", "thinking": random_text(rng), "signature": "s"}] * rng.randrange(2)
        arguments = json.dumps({random_text(rng): random_text(rng)})
        messages.append(calling(*(call(name, arguments) for name in ids), thinking_blocks=thoughts))
        messages += [result(name, random_content(rng, "tool")) for name in rng.sample(ids, len(ids))]
    return messages


def random_body(rng: random.Random) -> Object:
    fields: dict[str, list[Any]] = {
        "temperature": [0, 0.7, 2],
        "top_p": [0, 0.5, 1],
        "top_k": [-1, 5],
        "max_tokens": [1, 2000],
        "max_completion_tokens": [1500],
        "stop": ["a", ["a", " "], []],
        "tool_choice": ["none", "auto"],
        "tools": [[TOOL], []],
        "parallel_tool_calls": [True, False],
        "reasoning_effort": ["none", "low", "max"],
        "response_format": [
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        ],
        "user": ["u", ""],
        "service_tier": ["auto", "default", "flex"],
        "stream": [True, False],
        "seed": [1],
    }
    chosen = {name: rng.choice([None, *values]) for name, values in fields.items() if rng.random() < 0.5}
    return {"model": rng.choice([OLD, MIDDLE, NEW]), "messages": random_messages(rng), **chosen}


@pytest.mark.parametrize("seed", range(200))
def test_any_conversation_gives_a_valid_request_of_alternating_turns(seed: int) -> None:
    body = random_body(random.Random(seed))
    before = json.dumps(body)
    made = mapped(**body).body
    assert json.dumps(body) == before  # what a client sent is not changed
    assert made == mapped(**body).body
    pending: set[str] = set()
    for turn in made["messages"]:
        blocks = turn["content"] if isinstance(turn["content"], list) else []
        kinds = [block["type"] for block in blocks]
        results = {block["tool_use_id"] for block in blocks if block["type"] == "tool_result"}
        assert "tool_result" not in kinds[len(results) :]
        assert results == pending
        pending = {block["id"] for block in blocks if block["type"] == "tool_use"}
        texts = [block["text"] for block in blocks if block["type"] == "text"]
        assert all(text.strip() for text in texts) and turn["content"]
    assert not pending


DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]


@pytest.mark.parametrize("seed", range(300))
def test_malformed_requests_are_refused_and_nothing_else_happens(seed: int) -> None:
    rng = random.Random(seed)
    body = json.loads(json.dumps(random_body(rng)))
    for container, key in rng.sample(places(body), rng.randrange(1, 3)):
        container[key] = rng.choice([*ODD, DEEP])
    try:
        made = to_messages(body, 4096).body
    except InvalidRequest as error:
        json.dumps(OPENAI.body(error), ensure_ascii=False).encode()
        return
    json.dumps(made, ensure_ascii=False, allow_nan=False).encode()
