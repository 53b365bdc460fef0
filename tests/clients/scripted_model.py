"""A model whose answers a test has written down, behind the server as another provider's: only the wire is judged."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from upstreams import Asked, Reply, chunk, completion, event, told

Object = dict[str, Any]
USAGE = {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50}


@dataclass(frozen=True)
class Call:
    """An answer that calls a tool."""

    name: str
    arguments: Object


@dataclass(frozen=True)
class ScriptedModel:
    """The script of an upstream: a conversation gets the answers in turn, and one without tools the last at once."""

    answers: tuple[str | Call, ...]

    def __call__(self, asked: Asked) -> Reply:
        if asked.method == "GET":
            return Reply.of({"object": "list", "data": [{"id": "model", "object": "model"}]})
        number = self._number(asked.body)
        answer = self.answers[number]
        if not asked.body.get("stream"):
            return Reply.of(completion(answer) if isinstance(answer, str) else _whole_call(answer, number))
        pieces = told(*_words(answer)) if isinstance(answer, str) else [*_streamed_call(answer, number)]
        return Reply.stream(*pieces[:-1], event({**chunk({}), "choices": [], "usage": USAGE}), pieces[-1])

    def _number(self, body: Object) -> int:
        """The answers that the conversation holds are counted, so that a request asked twice is answered alike."""
        last = len(self.answers) - 1
        made = sum(bool(message.get("tool_calls")) for message in body["messages"])
        return min(made, last) if body.get("tools") else last


def _words(text: str) -> list[str]:
    return [word + " " for word in text.split(" ")[:-1]] + [text.split(" ")[-1]]


def _whole_call(call: Call, number: int) -> Object:
    answer = completion("")
    function = {"name": call.name, "arguments": json.dumps(call.arguments)}
    tool_calls = [{"id": f"call_{number}", "type": "function", "function": function}]
    answer["choices"][0]["finish_reason"] = "tool_calls"
    answer["choices"][0]["message"] |= {"content": None, "tool_calls": tool_calls}
    return answer


def _streamed_call(call: Call, number: int) -> Iterator[bytes]:
    """The name first, then the arguments in two pieces, as OpenAI streams them."""
    arguments = json.dumps(call.arguments)
    start = {"id": f"call_{number}", "type": "function", "function": {"name": call.name, "arguments": ""}}
    half = len(arguments) // 2
    pieces = [start, {"function": {"arguments": arguments[:half]}}, {"function": {"arguments": arguments[half:]}}]
    yield event(chunk({"role": "assistant", "content": None}))
    for piece in pieces:
        yield event(chunk({"tool_calls": [{"index": 0, **piece}]}))
    yield event(chunk({}, "tool_calls"))
    yield event("[DONE]")
