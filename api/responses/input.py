"""The items of a /v1/responses request become the messages of a chat."""

import json
from collections.abc import Sequence
from typing import Any

from api import encrypted_reasoning
from api.responses.requests import InputItem, InputPart, ResponsesRequest
from api.responses.tools import flat_name
from errors import InvalidRequest, unsupported

# Types of parts: Responses -> chat
PART_TYPES = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
Content = str | Sequence[InputPart]
Message = dict[str, Any]  # of a chat


def messages_of(request: ResponsesRequest, earlier: Sequence[InputItem] = ()) -> list[tuple[Message, str]]:
    """Returns the instructions, the items of earlier responses, and the input as messages. Raises InvalidRequest.

    Each has the place of what it came from.
    """
    messages: list[Message] = []
    origins: list[str] = []

    def add(item: InputItem, path: str) -> None:
        _add(messages, item, path)
        origins.extend([path] * (len(messages) - len(origins)))

    if request.instructions:
        add(InputItem(role="system", content=request.instructions), "instructions")
    for item in earlier:
        add(item, "previous_response_id")
    if isinstance(request.input, str):
        add(InputItem(role="user", content=request.input), "input")
    else:
        for number, item in enumerate(request.input):
            add(item, f"input[{number}]")
    if not messages:
        raise InvalidRequest("input must not be empty.", param="input", code="invalid_value")
    return [*zip(messages, origins, strict=True)]


def _add(messages: list[Message], item: InputItem, path: str) -> None:
    add = _ITEMS.get(item.type)
    if add is None:
        raise unsupported(f"{path}.type")
    add(messages, item, path)


def _add_message(messages: list[Message], item: InputItem, path: str) -> None:
    if item.role is None:
        raise InvalidRequest(f"{path} has no role.", param=f"{path}.role", code="missing_required_parameter")
    content = _content(_required(item.content, f"{path}.content"), f"{path}.content")
    last = messages[-1] if messages else {}
    if item.role == "assistant" and last.get("role") == "assistant" and last["content"] is None:
        last["content"] = content  # joins the reasoning or the calls of the same turn
    else:
        messages.append({"role": item.role, "content": content})


def _add_call(messages: list[Message], item: InputItem, path: str) -> None:
    """Adds a call; all calls of one turn become one message."""
    arguments = item.arguments or "" if item.input is None else json.dumps({"input": item.input}, ensure_ascii=False)
    function = {"name": flat_name(item.name or "", item.namespace), "arguments": arguments}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _add_result(messages: list[Message], item: InputItem, path: str) -> None:
    content = _content(_required(item.output, f"{path}.output"), f"{path}.output")
    messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})


def _add_reasoning(messages: list[Message], item: InputItem, path: str) -> None:
    """Adds the reasoning of an earlier turn, which comes before the text or the calls of that turn."""
    if text := _reasoning(item):
        messages.append({"role": "assistant", "content": None, "reasoning_content": text})


def _reasoning(item: InputItem) -> str | None:
    """Returns the reasoning itself, in whichever form the item has it; else its summary."""
    content = "".join(part.text or "" for part in item.content or () if isinstance(part, InputPart))
    summary = "\n\n".join(part.text or "" for part in item.summary or ())
    return content or encrypted_reasoning.decoded(item.encrypted_content or "") or summary


_ITEMS = {
    "message": _add_message,
    "function_call": _add_call,
    "function_call_output": _add_result,
    "custom_tool_call": _add_call,
    "custom_tool_call_output": _add_result,
    "reasoning": _add_reasoning,
}


def _required(content: Content | None, path: str) -> Content:
    if content is None:
        raise InvalidRequest(f"{path} is required.", param=path, code="missing_required_parameter")
    return content


def _content(content: Content, path: str) -> str | list[dict[str, Any]]:
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for number, part in enumerate(content):
        if part.type == "input_image":
            if part.image_url is None:
                raise InvalidRequest(
                    f"{path}[{number}].image_url is required: this server stores no files.",
                    param=f"{path}[{number}].image_url",
                    code="missing_required_parameter",
                )
            parts.append({"type": "image_url", "image_url": {"url": part.image_url, "detail": part.detail or "auto"}})
            continue
        chat_type = PART_TYPES.get(part.type)
        if chat_type is None:
            raise InvalidRequest(
                f"{path}[{number}].type must be one of {', '.join((*PART_TYPES, 'input_image'))}, not {part.type!r}.",
                param=f"{path}[{number}].type",
                code="unsupported_value",
            )
        text = part.refusal if chat_type == "refusal" else part.text
        if text is None:
            raise InvalidRequest(
                f"{path}[{number}].{chat_type if chat_type == 'refusal' else 'text'} is required.",
                param=f"{path}[{number}]",
                code="missing_required_parameter",
            )
        parts.append({"type": chat_type, chat_type: text})
    return parts
