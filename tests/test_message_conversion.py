"""The conversion between Anthropic's protocol and chat completions, there and back again."""

import asyncio
import json
import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from anthropic_requests import EVENT, events, folded, is_valid, random_conversation
from claude_requests import MIDDLE, ODD, Object, mapped, places, random_text
from pydantic import ValidationError

from api.messages.input import as_chat
from api.messages.schemas import MessagesRequest
from api.messages.view import MessagesEncoder, stream
from errors import InvalidRequest
from providers.anthropic_response import StreamMapper
from providers.chat_chunks import chunks_of, sent_chat
from server.events import DONE, encode_event, sse


def requested(messages: list[Object], **more: Any) -> MessagesRequest:
    body = {"model": MIDDLE, "max_tokens": 100, "messages": messages, **more}
    assert is_valid(body)
    return MessagesRequest.model_validate(body)


def normal(content: str | list[Object]) -> list[Object]:
    """Neighbouring texts as one, as they are in chat completions."""
    result: list[Object] = []
    for block in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if block["type"] == "tool_result":
            block = {"type": "tool_result", "id": block["tool_use_id"], "content": normal(block["content"])}
        if result and result[-1]["type"] == block["type"] == "text":
            result[-1] = {"type": "text", "text": f"{result[-1]['text']}\n{block['text']}"}
        else:
            result.append(dict(block))
    return result


@pytest.mark.parametrize("seed", range(300))
def test_a_conversation_that_goes_to_claude_by_chat_completions_is_the_same_there(seed: int) -> None:
    rng = random.Random(seed)
    conversation = random_conversation(rng)
    system = random_text(rng) or "S"
    chat = as_chat(requested(conversation, system=f"x{system}")).model_dump(exclude_none=True)
    again = mapped(**{key: chat[key] for key in ("messages", "max_tokens")}).body  # valid by Anthropic's types
    assert "".join(block["text"] for block in again["system"]) == f"x{system}"
    assert [turn["role"] for turn in again["messages"]] == [turn["role"] for turn in conversation]
    for turn, sent in zip(again["messages"], conversation, strict=True):
        assert normal(turn["content"]) == normal(sent["content"])


def claude_events(rng: random.Random) -> list[Object]:
    """An answer of Claude's, piece by piece, valid by Anthropic's types."""
    usage = {"input_tokens": 3, "output_tokens": 1, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 0}
    start = {"id": "m", "type": "message", "role": "assistant", "model": MIDDLE, "content": [], "usage": usage}
    told: list[Object] = [{"type": "message_start", "message": {**start, "stop_reason": None, "stop_sequence": None}}]
    kinds = [*(["thinking"] * rng.randrange(2)), *(["text"] * rng.randrange(2)), *(["tool_use"] * rng.randrange(3))]
    for index, kind in enumerate(kinds):
        told += [{**event, "index": index} for event in _block(rng, kind, index)]
    reason = "tool_use" if "tool_use" in kinds else rng.choice(["end_turn", "max_tokens"])
    told.append({"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": {
        "output_tokens": 9}})  # fmt: skip
    return [*told, {"type": "message_stop"}]


def _block(rng: random.Random, kind: str, index: int) -> list[Object]:
    texts = [f"{random_text(rng)}x" for _ in range(rng.randrange(1, 4))]
    if kind == "tool_use":
        written = json.dumps({text: text for text in texts})
        at = rng.randrange(len(written))
        empty: Object = {"type": kind, "id": f"toolu_{index}", "name": "f", "input": {}}
        deltas: list[Object] = [{"type": "input_json_delta", "partial_json": p} for p in (written[:at], written[at:])]
    else:
        empty = {"type": kind, kind: "", **({"signature": ""} if kind == "thinking" else {})}
        deltas = [{"type": f"{kind}_delta", kind: text} for text in texts]
    wrapped = [{"type": "content_block_delta", "delta": delta} for delta in deltas]
    return [{"type": "content_block_start", "content_block": empty}, *wrapped, {"type": "content_block_stop"}]


@pytest.mark.parametrize("seed", range(200))
def test_an_answer_of_claude_that_comes_by_chat_completions_is_the_same_here(seed: int) -> None:
    told = claude_events(random.Random(seed))
    for event in told:
        EVENT.validate_python(event)
    mapper = StreamMapper("m", 1, includes_usage=True)

    async def chat_events() -> AsyncGenerator[bytes]:
        for event in told:
            for chunk in mapper.events(event["type"], event):
                yield encode_event(json.dumps(chunk))
        yield DONE

    async def answer() -> str:
        request = requested([{"role": "user", "content": "Hello"}])
        made = sse(stream(request, chunks_of(chat_events(), "m")), MessagesEncoder())
        return b"".join([event async for event in made]).decode()

    expected, again = folded(told), folded(events(asyncio.run(answer())))
    for block in again["content"]:
        block.pop("signature", None)
        block.pop("citations", None)
    for block in expected["content"]:
        block.pop("signature", None)
    assert again["content"] == expected["content"]
    assert again["stop_reason"] == expected["stop_reason"]
    assert again["usage"] == {**told[0]["message"]["usage"], "output_tokens": 9}


@pytest.mark.parametrize("seed", range(300))
def test_a_malformed_request_is_refused_and_nothing_else_happens(seed: int) -> None:
    rng = random.Random(seed)
    tool = {"name": "f", "input_schema": {"type": "object"}}
    body: Object = {"model": "m", "max_tokens": 9, "messages": random_conversation(rng), "system": [], "tools": [tool]}
    body |= {"thinking": {"type": "adaptive"}, "tool_choice": {"type": "auto"}, "output_config": {"effort": "low"}}
    body = json.loads(json.dumps(body))
    for container, key in rng.sample(places(body), 2):
        container[key] = rng.choice(ODD)
    try:
        made = as_chat(MessagesRequest.model_validate(body))
    except (InvalidRequest, ValidationError):
        return
    sent_chat(made.model_dump(exclude_none=True))
