"""What every answer on the wire has to be: valid for the official types, with its events in their order."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from anthropic.types import Message, RawMessageStreamEvent
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from recording_proxy import Exchange

Object = dict[str, Any]
MESSAGE = re.compile(
    r"message_start(?: content_block_start(?: content_block_delta)* content_block_stop)* message_delta message_stop"
)


@dataclass(frozen=True)
class Answered:
    """What a model said in one answer."""

    text: str
    call_ids: tuple[str, ...]


@dataclass(frozen=True)
class Form:
    """The answers of one path: their types, the order of their events, and what they say."""

    whole: type[BaseModel]
    event: TypeAdapter[Any]
    order: Callable[[list[Object]], None]
    says: Callable[[list[Object]], Answered]  # of the events of a stream, or of a whole answer alone


def checked(exchange: Exchange) -> Answered:
    """Checks an exchange with a model, and returns what the model said. A client may leave after the last event."""
    assert exchange.status == 200, f"{exchange}: {exchange.answer[-2000:]!r}"
    assert exchange.route in FORMS, f"a client asked for {exchange.path}, of which nothing is known here"
    form = FORMS[exchange.route]
    if not exchange.is_stream:
        assert exchange.is_whole
        form.whole.model_validate_json(exchange.answer, strict=True)
        return form.says([exchange.told])
    told = events_of(exchange)
    form.order(told)
    assert exchange.route != "/v1/chat/completions" or exchange.answer.endswith(b"data: [DONE]\n\n")
    return form.says(told)


def events_of(exchange: Exchange) -> list[Object]:
    """The events of a stream, which the official types find valid; the last may be missing if it was cut off."""
    *parts, rest = exchange.answer.decode().split("\n\n")
    assert rest == "" or not exchange.is_whole
    found = _parsed(parts)
    for event in found:
        if event.get("type") != "ping":
            FORMS[exchange.route].event.validate_json(json.dumps(event), strict=True)
    return found


def _parsed(parts: list[str]) -> list[Object]:
    """Each event is one line of data, with its type as its name if it has one; comments keep a connection alive."""
    found: list[Object] = []
    for part in parts:
        lines = dict(line.split(": ", 1) for line in part.split("\n") if not line.startswith(":"))
        assert lines.keys() <= {"event", "data"}, part
        if "data" in lines and lines["data"] != "[DONE]":
            found.append(json.loads(lines["data"]))
            assert lines.get("event") in (None, found[-1].get("type")), part
    return found


# --- chat completions


def _chat_order(chunks: list[Object]) -> None:
    assert len({chunk["id"] for chunk in chunks}) == 1
    reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert reasons[-1] and not any(reasons[:-1]), reasons


def _chat_says(told: list[Object]) -> Answered:
    parts = [choice["delta"] if "delta" in choice else choice["message"] for one in told for choice in one["choices"]]
    calls = [call["id"] for part in parts for call in part.get("tool_calls") or [] if call.get("id")]
    return Answered("".join(part.get("content") or "" for part in parts), tuple(calls))


# --- messages


def _message_order(events: list[Object]) -> None:
    kinds = " ".join(event["type"] for event in events if event["type"] != "ping")
    assert MESSAGE.fullmatch(kinds), kinds
    indexes = [event["index"] for event in events if "index" in event]
    assert [index for index, _ in groupby(indexes)] == [*range(len(set(indexes)))]


def _message_says(told: list[Object]) -> Answered:
    blocks = [event["content_block"] for event in told if "content_block" in event] or told[0].get("content", [])
    deltas = [event["delta"] for event in told if event.get("type") == "content_block_delta"]
    text = "".join(part.get("text", "") for part in [*blocks, *deltas])
    return Answered(text, tuple(block["id"] for block in blocks if block["type"] == "tool_use"))


# --- responses


def _response_order(events: list[Object]) -> None:
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] in ("response.completed", "response.incomplete")
    assert sum(event["type"] in ("response.completed", "response.incomplete") for event in events) == 1


def _response_says(told: list[Object]) -> Answered:
    response = told[-1].get("response", told[-1])
    parts = [part for item in response["output"] if item["type"] == "message" for part in item["content"]]
    calls = [item["call_id"] for item in response["output"] if "call_id" in item]
    return Answered("".join(part.get("text", "") for part in parts), tuple(calls))


FORMS = {
    "/v1/chat/completions": Form(ChatCompletion, TypeAdapter(ChatCompletionChunk), _chat_order, _chat_says),
    "/v1/messages": Form(Message, TypeAdapter(RawMessageStreamEvent), _message_order, _message_says),
    "/v1/responses": Form(Response, TypeAdapter(ResponseStreamEvent), _response_order, _response_says),
}
