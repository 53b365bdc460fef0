"""The events of a stored response, made anew: those of its stream, with each text in one piece."""

import json
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from api.responses.output import Open, OpenCall, OpenCustomCall, OpenMessage, OpenReasoning, Status
from api.responses.schemas import ResponseObject, ResponsesEvent, ResponseStateEvent
from schemas import TokenLogprob
from text.custom_tools import ARGUMENT

Object = dict[str, Any]
_OF_THE_END = ("completed_at", "usage", "error", "incomplete_details")  # what a response has when it is over


async def replayed(body: Object, after: int = -1) -> AsyncGenerator[ResponsesEvent]:
    """Yields the events of a response that is over, from its JSON; those up to the number `after` are left out.

    The last one always comes: a number that a client has of the first stream may be greater than any here.
    """
    events = [*_events(body)]
    first = max(0, min(after + 1, len(events) - 1))
    for number, event in enumerate(events[first:], max(first, after + 1)):
        yield event.numbered(number)


def last_event(response: ResponseObject) -> ResponsesEvent:
    """Returns the event that ends a stream; there is none for a cancelled response but that for an incomplete one."""
    kind = "incomplete" if response.status == "cancelled" else response.status
    return ResponseStateEvent(type=f"response.{kind}", response=response)


def _events(body: Object) -> Iterator[ResponsesEvent]:
    whole = ResponseObject.model_validate({**body, "output": []})
    begun = whole.model_copy(update={"status": "in_progress", **dict.fromkeys(_OF_THE_END)})
    for name in ("created", "in_progress"):
        yield ResponseStateEvent(type=f"response.{name}", response=begun)
    outputs = []
    for index, item in enumerate(body["output"]):
        opened, text, logprobs = _opened(item, index)
        yield from opened.opening()
        yield from opened.add(text, logprobs)
        yield from opened.closing(_status(item))
        outputs.append(opened.item)
    yield last_event(whole.model_copy(update={"output": outputs}))


def _status(item: Object) -> Status:
    return "incomplete" if item["status"] == "incomplete" else "completed"


def _opened(item: Object, index: int) -> tuple[Open, str, list[TokenLogprob]]:
    """Returns an item as it was when it began, and what was then added to it."""
    opened: Open
    parts = item.get("content") or [{"text": ""}]
    if item["type"] == "message":
        opened, text = OpenMessage(index, item["id"]), parts[0]["text"]
        return opened, text, [TokenLogprob.model_validate(token) for token in parts[0].get("logprobs") or ()]
    if item["type"] == "reasoning":
        return OpenReasoning(index, bool(item.get("encrypted_content")), item["id"]), parts[0]["text"], []
    names = {"call_id": item["call_id"], "name": item["name"], "namespace": item.get("namespace")}
    if item["type"] == "custom_tool_call":
        return OpenCustomCall(index, **names, item_id=item["id"]), json.dumps({ARGUMENT: item["input"]}), []
    return OpenCall(index, **names, item_id=item["id"]), item["arguments"], []
