"""A request of Anthropic's Messages API becomes a chat completion request."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from pydantic import ValidationError

from api.anthropic_schemas import Block, CountTokensRequest, MessageParam, MessagesRequest, Tool
from api.error_handlers import invalid_request_of
from errors import APIError, InvalidRequest
from schemas import CappedChatRequest, ChatCompletionRequest, Object, SamplingFields

Part = Object  # of a chat message's content
T = TypeVar("T")

# A line in front of Claude Code's system prompt that changes with each request, and would cost all cached tokens
BILLING_HEADER = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
EFFORTS = {"max": "xhigh"}  # the others have the same names in chat completions
SENT_AS = (  # what errors of chat completions name -> the field that the client sent
    (re.compile(r"\Astop\b"), "stop_sequences"),
    (re.compile(r"\bresponse_format\b"), "output_config.format"),
    (re.compile(r"\.function\.parameters\b"), ".input_schema"),
    (re.compile(r"\.function\b"), ""),
)


def as_chat(request: CountTokensRequest) -> ChatCompletionRequest:
    """Makes the equivalent chat completion request. Raises InvalidRequest, which names the field of this request."""
    refused = request.refused_fields
    if refused:
        raise _invalid(f"{refused[0]}, or the value that it has, is not supported: change it or leave it out.")
    body: Object = {
        "model": request.model,
        "messages": [message for message, _ in _messages(request)],
        "tools": [_function(tool, f"tools[{n}]") for n, tool in enumerate(request.tools or ()) if tool.is_custom],
        "response_format": _response_format(request),
        **_tool_choice(request),
        **_thinking(request),
    }
    if isinstance(request, MessagesRequest):
        body |= request.model_dump(include=set(SamplingFields.model_fields), exclude_none=True)
        body |= {"max_tokens": request.max_tokens, "stop": request.stop_sequences}
    body = {name: value for name, value in body.items() if value not in (None, [])}
    try:
        return CappedChatRequest.model_validate(body)
    except ValidationError as error:  # of what is more than a chat may have, such as messages
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise named(invalid_request_of(problems, body), request) from error


def named(error: APIError, request: CountTokensRequest) -> APIError:
    """Makes an error of the chat name the client's fields, which have other names and places."""
    origins = [origin for _, origin in _messages(request)]

    def place(match: re.Match[str]) -> str:
        number = int(match[1])
        return origins[number] if number < len(origins) else match[0]

    def sent_as(text: str) -> str:
        text = re.sub(r"\bmessages\[(\d+)\]", place, text)
        for pattern, name in SENT_AS:
            text = pattern.sub(name, text)
        return text

    error.message, error.param = sent_as(error.message), error.param and sent_as(error.param)
    return error


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_value")


# --- messages


def _messages(request: CountTokensRequest) -> list[tuple[Object, str]]:
    """Returns the messages of the chat, each with the place of what it came from."""
    system = _system(request.system)
    result = [({"role": "system", "content": system}, "system")] if system else []
    for number, message in enumerate(request.messages):
        path = f"messages[{number}]"
        result += [(made, path) for made in _MESSAGES[message.role](message, path)]
    return result


def _system(system: str | Sequence[Block] | None) -> str:
    """Returns the system's text, without the line that names who pays."""
    if system is None:
        return ""
    first, *others = _texts(system, "system") or [""]
    return "\n\n".join(filter(None, [BILLING_HEADER.sub("", first), *others]))


def _texts(content: str | Sequence[Block], path: str) -> list[str]:
    if isinstance(content, str):
        return [content]
    for number, block in enumerate(content):
        if block.type != "text":
            raise _wrong_type(block, f"{path}[{number}]", ("text",))
    return [_required(block.text, f"{path}[{number}].text") for number, block in enumerate(content)]


def _system_message(message: MessageParam, path: str) -> list[Object]:
    return [{"role": "system", "content": "\n\n".join(_texts(message.content, f"{path}.content"))}]


def _user_messages(message: MessageParam, path: str) -> list[Object]:
    """Makes a message of each tool's result, and one of what is said between them."""
    if isinstance(message.content, str):
        return [{"role": "user", "content": message.content}]
    result: list[Object] = []
    for number, block in enumerate(message.content):
        place = f"{path}.content[{number}]"
        if block.type == "tool_result":
            result.append(_tool_message(block, place))
        else:
            if not result or result[-1]["role"] != "user":
                result.append({"role": "user", "content": []})
            result[-1]["content"].append(_part(block, place, _USER_PARTS))
    for made in result:
        made["content"] = _joined(made["content"])
    return result or [{"role": "user", "content": ""}]


def _tool_message(block: Block, path: str) -> Object:
    content = block.content or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else []
    if not isinstance(content, str):
        parts = [_part(inner, f"{path}.content[{n}]", _RESULT_PARTS) for n, inner in enumerate(content)]
    if block.is_error:
        parts = [{"type": "text", "text": "Error:"}, *parts]
    return {"role": "tool", "tool_call_id": _required(block.tool_use_id, f"{path}.tool_use_id"), "content": parts}


def _assistant_message(message: MessageParam, path: str) -> list[Object]:
    if isinstance(message.content, str):
        return [{"role": "assistant", "content": message.content}]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Object] = []
    for number, block in enumerate(message.content):
        place = f"{path}.content[{number}]"
        if block.type == "text":
            texts.append(_required(block.text, f"{place}.text"))
        elif block.type == "thinking":
            thoughts.append(reasoning_of(block))
        elif block.type == "tool_use":
            calls.append(_call(block, place))
        elif block.type != "redacted_thinking":  # which only Anthropic can read
            raise _wrong_type(block, place, ("text", "thinking", "redacted_thinking", "tool_use"))
    made: Object = {"role": "assistant", "content": "\n".join(texts)}
    made |= {"reasoning_content": "".join(thoughts)} if any(thoughts) else {}
    return [made | ({"tool_calls": calls} if calls else {})]


def reasoning_of(block: Block) -> str:
    return block.thinking or ""


def _call(block: Block, path: str) -> Object:
    arguments = json.dumps(_required(block.input, f"{path}.input"), ensure_ascii=False)
    function = {"name": _required(block.name, f"{path}.name"), "arguments": arguments}
    return {"id": _required(block.id, f"{path}.id"), "type": "function", "function": function}


_MESSAGES: dict[str, Callable[[MessageParam, str], list[Object]]] = {
    "user": _user_messages,
    "assistant": _assistant_message,
    "system": _system_message,
}


# --- parts of messages


def _part(block: Block, path: str, makers: Mapping[str, Callable[[Block, str], Part]]) -> Part:
    if block.type not in makers:
        raise _wrong_type(block, path, makers)
    return makers[block.type](block, path)


def _text_part(block: Block, path: str) -> Part:
    return {"type": "text", "text": _required(block.text, f"{path}.text")}


def _image_part(block: Block, path: str) -> Part:
    source = _required(block.source, f"{path}.source")
    if source.type == "base64":
        media_type = _required(source.media_type, f"{path}.source.media_type")
        url = f"data:{media_type};base64,{_required(source.data, f'{path}.source.data')}"
    elif source.type == "url":
        url = _required(source.url, f"{path}.source.url")
    else:
        raise _invalid(f"{path}.source.type must be base64 or url, not {source.type!r}: this server stores no files.")
    return {"type": "image_url", "image_url": {"url": url}}


def _reference_part(block: Block, path: str) -> Part:
    """Makes a text of a tool that a search has found; it was in the prompt before."""
    return {"type": "text", "text": f"The tool {_required(block.tool_name, f'{path}.tool_name')} can be called."}


_USER_PARTS = {"text": _text_part, "image": _image_part}
_RESULT_PARTS = {**_USER_PARTS, "tool_reference": _reference_part}


def _joined(parts: str | list[Part]) -> str | list[Part]:
    """Joins neighbouring texts by line breaks, because chat templates put nothing between them."""
    joined: list[Part] = []
    for part in parts if isinstance(parts, list) else ():
        if joined and joined[-1]["type"] == part["type"] == "text":
            joined[-1] = {"type": "text", "text": f"{joined[-1]['text']}\n{part['text']}"}
        else:
            joined.append(part)
    if isinstance(parts, str) or [part["type"] for part in joined] not in ([], ["text"]):
        return parts if isinstance(parts, str) else joined
    return "".join(part["text"] for part in joined)


def _required(value: T | None, path: str) -> T:
    if value is None:
        raise _invalid(f"{path} is required.")
    return value


def _wrong_type(block: Block, path: str, allowed: Iterable[str]) -> InvalidRequest:
    return _invalid(
        f"{path}.type must be {', '.join(allowed)}, not {block.type!r}, which local models and other providers cannot "
        "read: leave it out."
    )


# --- tools, thinking and the answer's form


def _function(tool: Tool, path: str) -> Object:
    name = _required(tool.name, f"{path}.name")
    function: Object = {"name": name, "description": tool.description, "parameters": tool.input_schema}
    function |= {"strict": True} if tool.strict else {}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


def _tool_choice(request: CountTokensRequest) -> Object:
    choice = request.tool_choice
    if choice is None:
        return {}
    parallel = {"parallel_tool_calls": False} if choice.disable_parallel_tool_use else {}
    if choice.type != "tool":
        return {"tool_choice": CHOICES[choice.type], **parallel}
    name = _required(choice.name, "tool_choice.name")
    lacking = next((path for path, tool in request.dropped_tools.items() if tool.name == name), None)
    if lacking is not None:
        raise _invalid(f"tool_choice names {lacking}, a kind of tool that this server lacks: choose another one.")
    return {"tool_choice": {"type": "function", "function": {"name": name}}, **parallel}


def _thinking(request: CountTokensRequest) -> Object:
    """Returns the switches of reasoning. Where the request is silent or says adaptive, the template decides."""
    effort = request.output_config.effort if request.output_config else None
    thinking = request.thinking
    if thinking is not None and thinking.type == "disabled":
        return {"enable_thinking": False}
    result: Object = {} if effort is None else {"reasoning_effort": EFFORTS.get(effort, effort)}
    if thinking is not None and thinking.type == "enabled":
        result |= {"enable_thinking": True, "thinking_token_budget": thinking.budget_tokens}
    return result


def _response_format(request: CountTokensRequest) -> Object | None:
    format = (request.output_config.format if request.output_config else None) or request.output_format
    if format is None:
        return None
    if format.get("type") != "json_schema" or not isinstance(format.get("schema"), dict):
        raise _invalid("output_config.format must have the type json_schema, and a schema.")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": format["schema"], "strict": True}}
