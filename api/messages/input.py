"""A request of Anthropic's Messages API becomes a chat completion request."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from api import encrypted_reasoning
from api.error_handlers import validated
from api.messages.schemas import Block, CountTokensRequest, MessageParam, MessagesRequest, Source
from api.messages.tools import Toolbox, changed_name, invalid
from api.sent_fields import name_as_sent
from errors import APIError, InvalidRequest, ThreadsUnsupported
from schemas import ChatCompletionRequest, Object, SamplingFields, TranslatedChatRequest

Part = Object  # of a chat message's content
T = TypeVar("T")

# A line in front of Claude Code's system prompt that changes with each request, and would cost all cached tokens
BILLING_HEADER = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n*")
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
    if "thread" in refused:
        raise ThreadsUnsupported(
            "The field thread is not supported: send all messages of the conversation in each request."
        )
    if refused:
        raise invalid(f"{refused[0]}, or the value that it has, is not supported: change it or leave it out.")
    toolbox = Toolbox.of(request)
    body: Object = {
        "model": request.model,
        "messages": [message for message, _ in _messages(request, toolbox)],
        "response_format": _response_format(request),
        **toolbox.fields(request),
        **_thinking(request),
    }
    if isinstance(request, MessagesRequest):
        body |= request.model_dump(include=set(SamplingFields.model_fields), exclude_none=True)
        body |= {"max_tokens": request.max_tokens, "stop": request.stop_sequences, "stream": request.stream}
    body = {name: value for name, value in body.items() if value not in (None, [])}
    try:
        return validated(TranslatedChatRequest, body)
    except InvalidRequest as error:
        raise named(error, request) from None


def named(error: APIError, request: CountTokensRequest) -> APIError:
    """Makes an error of the chat name the client's fields, which have other names and places."""
    origins = [origin for _, origin in _messages(request, Toolbox.of(request))]
    return name_as_sent(error, SENT_AS, origins)


# --- messages


def _messages(request: CountTokensRequest, toolbox: Toolbox) -> list[tuple[Object, str]]:
    """Returns the messages of the chat, each with the place of what it came from."""
    system = _system(request.system)
    result = [({"role": "system", "content": system}, "system")] if system else []
    last_user = max((n for n, message in enumerate(request.messages) if message.role == "user"), default=-1)
    for number, message in enumerate(request.messages):
        path = f"messages[{number}]"
        if message.clear_at == "next_user_message" and number < last_user:
            continue
        if message.content is None and message.output_config is None:
            raise invalid(f"{path}.content is required.")
        result += [(made, path) for made in _MESSAGES[message.role](message, path, toolbox)]
    if not result:
        raise invalid("messages is empty but for the system: send at least one message of the user.")
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


def _system_message(message: MessageParam, path: str, toolbox: Toolbox) -> list[Object]:
    if not message.content or isinstance(message.content, str):
        return [{"role": "system", "content": message.content}] if message.content else []
    parts = _parts(message.content, f"{path}.content", toolbox, _SYSTEM_PARTS)
    return [{"role": "system", "content": "\n\n".join(part["text"] for part in parts)}]


def _user_messages(message: MessageParam, path: str, toolbox: Toolbox) -> list[Object]:
    """Makes a message of each tool's result, and one of what is said between them."""
    if not message.content or isinstance(message.content, str):
        return [{"role": "user", "content": message.content or ""}]
    result: list[Object] = []
    for number, block in enumerate(message.content):
        place = f"{path}.content[{number}]"
        if block.type == "tool_result":
            result.append(_tool_message(block, place, toolbox))
        else:
            if not result or result[-1]["role"] != "user":
                result.append({"role": "user", "content": []})
            result[-1]["content"].append(_part(block, place, toolbox, _USER_PARTS))
    for made in result:
        made["content"] = _joined(made["content"])
    return result


def _tool_message(block: Block, path: str, toolbox: Toolbox) -> Object:
    content = block.content or ""
    parts = [{"type": "text", "text": content}]
    if not isinstance(content, str):
        parts = _parts(content, f"{path}.content", toolbox, _RESULT_PARTS)
    if block.is_error:
        parts = [{"type": "text", "text": "Error:"}, *parts]
    return {"role": "tool", "tool_call_id": _required(block.tool_use_id, f"{path}.tool_use_id"), "content": parts}


def _assistant_message(message: MessageParam, path: str, toolbox: Toolbox) -> list[Object]:
    if not message.content or isinstance(message.content, str):
        return [{"role": "assistant", "content": message.content or ""}]
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Object] = []
    for number, block in enumerate(message.content):
        place = f"{path}.content[{number}]"
        if block.type == "text":
            texts.append(_required(block.text, f"{place}.text"))
        elif block.type == "thinking":
            thoughts.append(_thoughts(block))
        elif block.type == "tool_use":
            calls.append(_call(block, place))
        elif block.type != "redacted_thinking":  # which only Anthropic can read
            raise _wrong_type(block, place, ("text", "thinking", "redacted_thinking", "tool_use"))
    made: Object = {"role": "assistant", "content": "\n".join(texts)}
    made |= {"reasoning_content": "".join(thoughts)} if any(thoughts) else {}
    return [made | ({"tool_calls": calls} if calls else {})]


def _thoughts(block: Block) -> str:
    """Returns the text of a block of thoughts, which may be in its signature alone."""
    return block.thinking or encrypted_reasoning.decoded(block.signature or "") or ""


def _call(block: Block, path: str) -> Object:
    arguments = json.dumps(_required(block.input, f"{path}.input"), ensure_ascii=False)
    function = {"name": _required(block.name, f"{path}.name"), "arguments": arguments}
    return {"id": _required(block.id, f"{path}.id"), "type": "function", "function": function}


_MESSAGES: dict[str, Callable[[MessageParam, str, Toolbox], list[Object]]] = {
    "user": _user_messages,
    "assistant": _assistant_message,
    "system": _system_message,
}


# --- parts of messages


MakePart = Callable[[Block, str, Toolbox], Part]


def _parts(blocks: Sequence[Block], path: str, toolbox: Toolbox, makers: Mapping[str, MakePart]) -> list[Part]:
    return [_part(block, f"{path}[{number}]", toolbox, makers) for number, block in enumerate(blocks)]


def _part(block: Block, path: str, toolbox: Toolbox, makers: Mapping[str, MakePart]) -> Part:
    if block.type not in makers:
        raise _wrong_type(block, path, makers)
    return makers[block.type](block, path, toolbox)


def _text_part(block: Block, path: str, toolbox: Toolbox) -> Part:
    return {"type": "text", "text": _required(block.text, f"{path}.text")}


def _image_part(block: Block, path: str, toolbox: Toolbox) -> Part:
    source = block.source
    if not isinstance(source, Source):
        raise invalid(f"{path}.source is required, and must be an object.")
    if source.type == "base64":
        media_type = _required(source.media_type, f"{path}.source.media_type")
        url = f"data:{media_type};base64,{_required(source.data, f'{path}.source.data')}"
    elif source.type == "url":
        url = _required(source.url, f"{path}.source.url")
    else:
        raise invalid(f"{path}.source.type must be base64 or url, not {source.type!r}: this server stores no files.")
    return {"type": "image_url", "image_url": {"url": url}}


def _loading_part(block: Block, path: str, toolbox: Toolbox) -> Part:
    return {"type": "text", "text": toolbox.description(changed_name(block, path))}


def _removing_part(block: Block, path: str, toolbox: Toolbox) -> Part:
    return {"type": "text", "text": f"The tool {changed_name(block, path)} can no longer be called."}


_USER_PARTS = {"text": _text_part, "image": _image_part}
_RESULT_PARTS = {**_USER_PARTS, "tool_reference": _loading_part}
_SYSTEM_PARTS = {"text": _text_part, "tool_addition": _loading_part, "tool_removal": _removing_part}


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
        raise invalid(f"{path} is required.")
    return value


def _wrong_type(block: Block, path: str, allowed: Iterable[str]) -> InvalidRequest:
    return invalid(
        f"{path}.type must be {', '.join(allowed)}, not {block.type!r}, which local models and other providers cannot "
        "read: leave it out."
    )


# --- thinking, and the answer's form


def _thinking(request: CountTokensRequest) -> Object:
    """Returns the switches of reasoning. Where the request is silent or says adaptive, the template decides."""
    config = next((m.output_config for m in reversed(request.messages) if m.output_config), request.output_config)
    effort, thinking = config.effort if config else None, request.thinking
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
        raise invalid("output_config.format must have the type json_schema, and a schema.")
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": format["schema"], "strict": True}}
