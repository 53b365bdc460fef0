"""Calls of tools in Ollama's form, which has their arguments as objects and each call whole."""

import json
from collections.abc import Sequence
from typing import Any

from api.ollama.schemas import OllamaCall, OllamaFunction, OllamaMessage
from errors import InvalidRequest
from schemas import ChunkChoice, FunctionCall, ToolCall
from text.json_bounds import RELAYED, check_json


class CallCollector:
    """Puts calls together from their deltas, and gives each on when it is whole."""

    def __init__(self) -> None:
        self._open: ToolCall | None = None
        self._num_calls = 0

    def add(self, choice: ChunkChoice) -> list[OllamaCall]:
        """Returns the calls that the next one has ended."""
        ended: list[OllamaCall] = []
        for delta in choice.delta.tool_calls or ():
            if delta.id is not None:
                ended += self.end()
                self._open = ToolCall(id=delta.id, function=FunctionCall(name=delta.function.name or ""))
            if self._open is not None:
                self._open.function.arguments += delta.function.arguments or ""
        return ended

    def end(self) -> list[OllamaCall]:
        """Returns the last call, unless its arguments were cut and are no JSON: the form has no place for that."""
        call, self._open = self._open, None
        arguments = None if call is None else _parsed(call.function.arguments)
        if call is None or arguments is None:
            return []
        function = OllamaFunction(index=self._num_calls, name=call.function.name, arguments=arguments)
        self._num_calls += 1
        return [OllamaCall(id=call.id, function=function)]


def _parsed(arguments: str) -> dict[str, Any] | None:
    """Returns arguments as an object; None for what is none, or could not be sent as JSON."""
    try:
        value = json.loads(arguments or "{}")
        check_json(value, "arguments", RELAYED)
    except (ValueError, RecursionError, InvalidRequest):
        return None
    return value if isinstance(value, dict) else None


def with_ids(messages: Sequence[OllamaMessage]) -> list[OllamaMessage]:
    """Gives calls ids, and results those of their calls: of the first one that waits for a result and has the name.

    Chat templates and other providers match results with calls by ids, which Ollama's clients may leave out. Raises
    InvalidRequest for calls that are no JSON or nested too deeply.
    """
    waiting: list[tuple[str, str]] = []  # id and name of each call without a result
    numbered: list[OllamaMessage] = []
    for number, message in enumerate(messages):
        if message.tool_calls:
            check_json(message.tool_calls, f"messages[{number}].tool_calls", RELAYED)
            calls = [_call(call, f"call_{number}_{index}") for index, call in enumerate(message.tool_calls)]
            waiting = [(call["id"], call["function"]["name"]) for call in calls]
            message = message.model_copy(update={"tool_calls": calls})
        elif message.role == "tool":
            found = _called(message, waiting)
            waiting = [call for call in waiting if call != found]
            message = message.model_copy(update={"tool_call_id": message.tool_call_id or (found and found[0])})
        numbered.append(message)
    return numbered


def _called(result: OllamaMessage, waiting: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """Returns the call that a result belongs to."""
    if result.tool_call_id is not None:
        return next((call for call in waiting if call[0] == result.tool_call_id), None)
    return next((call for call in waiting if result.tool_name in (None, call[1])), None)


def _call(call: dict[str, Any], given_id: str) -> dict[str, Any]:
    """Returns a call in the form of chat completions, in which the arguments are a text."""
    function = call.get("function")
    function = function if isinstance(function, dict) else {}
    arguments = function.get("arguments")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
    identity = call.get("id")
    return {
        "id": identity if isinstance(identity, str) and identity else given_id,
        "type": "function",
        "function": {"name": str(function.get("name") or ""), "arguments": text},
    }
