"""/v1/responses as a view of chat completions: its request becomes one, and the chunks become its events.

Nothing is stored, so fields that refer to an earlier response are refused by name. This module knows no provider.
"""

import itertools
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from pydantic_core import to_json

from api.response_output import Output, Status
from api.response_schemas import (
    InputTokensDetails,
    OutputTokensDetails,
    ResponseObject,
    ResponsesEvent,
    ResponseStateEvent,
    ResponsesUsage,
)
from errors import APIError, InvalidRequest, unsupported
from schemas import (
    SAMPLING_FIELDS,
    ChatCompletionChunk,
    ChatCompletionRequest,
    InputItem,
    InputPart,
    ResponsesRequest,
    Usage,
)

# Types of parts: Responses -> chat. Names of fields: chat -> Responses
PART_TYPES = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
SENT_AS = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text.format"}
Content = str | Sequence[InputPart]
LOGPROBS = "message.output_text.logprobs"  # the value of `include` that asks for them


def as_chat(request: ResponsesRequest) -> ChatCompletionRequest:
    """Makes the equivalent chat completion request. Raises InvalidRequest with the field of this request as param."""
    for name in request.refused_fields:
        raise unsupported(name)
    shared: dict[str, Any] = request.model_dump(include=set(SAMPLING_FIELDS), exclude_none=True)
    wants_logprobs = LOGPROBS in (request.include or ()) or bool(request.top_logprobs)
    return ChatCompletionRequest.model_validate(
        {
            **shared,
            "messages": _messages(request),
            "max_tokens": request.max_output_tokens,
            "logprobs": wants_logprobs or None,
            "top_logprobs": request.top_logprobs,
            "response_format": _response_format(request.text.format if request.text else None),
            "tools": None if request.tools is None else [_nested(tool) for tool in request.tools],
            "tool_choice": _tool_choice(request.tool_choice),
            "parallel_tool_calls": request.parallel_tool_calls,
            "reasoning_effort": (request.reasoning.effort if request.reasoning else None) or request.reasoning_effort,
            "enable_thinking": request.enable_thinking,
            "thinking_token_budget": request.thinking_token_budget,
            "chat_template_kwargs": request.chat_template_kwargs,
        }
    )


def _nested(tool: dict[str, Any]) -> dict[str, Any]:
    """Converts a tool: Responses puts the function's fields next to `type`, chat nests them under `function`."""
    if tool.get("type") != "function" or "function" in tool:
        return tool
    function = {key: value for key, value in tool.items() if key != "type" and (key, value) != ("strict", False)}
    return {"type": "function", "function": function}


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        tools = [_nested(tool) if isinstance(tool, dict) else tool for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {**choice, "tools": tools}}
    return _nested(choice)


def _response_format(format: dict[str, Any] | None) -> dict[str, Any] | None:
    """Converts the format: Responses puts the schema next to `type`, chat nests it under `json_schema`."""
    if format is None or format.get("type") != "json_schema" or ("json_schema" in format and "schema" not in format):
        return format  # also a json_schema that is nested already
    if format.get("schema") is None:
        path = "text.format.schema"
        raise InvalidRequest(f"{path} is required.", param=path, code="missing_required_parameter")
    return {"type": "json_schema", "json_schema": {key: value for key, value in format.items() if key != "type"}}


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.instructions:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for number, item in enumerate(request.input):
        add = _ITEMS.get(item.type)
        if add is None:
            raise unsupported(f"input[{number}].type")
        add(messages, item, f"input[{number}]")
    if not messages:
        raise InvalidRequest("input must not be empty.", param="input", code="invalid_value")
    return messages


def _add_message(messages: list[dict[str, Any]], item: InputItem, path: str) -> None:
    if item.role is None:
        raise InvalidRequest(f"{path} has no role.", param=f"{path}.role", code="missing_required_parameter")
    content = _content(_required(item.content, f"{path}.content"), f"{path}.content")
    last = messages[-1] if messages else {}
    if item.role == "assistant" and last.get("role") == "assistant" and last["content"] is None:
        last["content"] = content  # joins the reasoning or the calls of the same turn
    else:
        messages.append({"role": item.role, "content": content})


def _add_call(messages: list[dict[str, Any]], item: InputItem, path: str) -> None:
    """Adds a call; all calls of one turn become one message."""
    arguments = item.arguments or "" if item.input is None else json.dumps({"input": item.input}, ensure_ascii=False)
    function = {"name": item.name or "", "arguments": arguments}
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("tool_calls", []).append({"id": item.call_id, "type": "function", "function": function})


def _add_result(messages: list[dict[str, Any]], item: InputItem, path: str) -> None:
    content = _content(_required(item.output, f"{path}.output"), f"{path}.output")
    messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})


def _add_reasoning(messages: list[dict[str, Any]], item: InputItem, path: str) -> None:
    """Adds the reasoning of an earlier turn, which comes before the text or the calls of that turn."""
    if text := "".join(part.text or "" for part in item.content or () if isinstance(part, InputPart)):
        messages.append({"role": "assistant", "content": None, "reasoning_content": text})


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


async def stream(
    request: ResponsesRequest, chunks: AsyncGenerator[ChatCompletionChunk]
) -> AsyncGenerator[ResponsesEvent]:
    """Makes the events, from `response.created` on, with consecutive sequence numbers. Raises what the chunks raise."""
    numbers = itertools.count()
    response, output = _response(request), Output()
    usage: Usage | None = None
    has_begun = False
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                if not has_begun:
                    has_begun, response.model = True, chunk.model
                    for name in ("created", "in_progress"):
                        state = ResponseStateEvent(type=f"response.{name}", response=response.model_copy())
                        yield state.numbered(next(numbers))
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    if choice.finish_reason == "length":
                        response.status, response.incomplete_details = "incomplete", {"reason": "max_output_tokens"}
                    for event in output.add(choice):
                        yield event.numbered(next(numbers))
    except APIError as error:
        raise _naming_input(error) from None
    status: Status = "incomplete" if response.status == "incomplete" else "completed"
    for event in output.end(status):
        yield event.numbered(next(numbers))
    done = {"status": status, "output": output.items, "completed_at": int(time.time()), "usage": _usage(usage)}
    last = ResponseStateEvent(type=f"response.{status}", response=response.model_copy(update=done))
    yield last.numbered(next(numbers))


def _naming_input(error: APIError) -> APIError:
    """Renames the param of an error of chat to the field that the client sent, such as messages to input."""
    field = (error.param or "").partition("[")[0].partition(".")[0]
    if field in SENT_AS:
        error.param = SENT_AS[field]
    return error


def _response(request: ResponsesRequest) -> ResponseObject:
    """Makes the response, with the fields of the request that it repeats."""
    names = (ResponseObject.model_fields.keys() & ResponsesRequest.model_fields.keys()) - {"text", "store"}
    repeated = {name: value for name in names if (value := getattr(request, name)) is not None}
    for name, value in repeated.items():
        try:
            to_json(value)
        except (ValueError, RecursionError) as error:  # an unpaired surrogate, or nested too deeply to be written
            raise InvalidRequest(
                f"{name} cannot be sent back: it has an unpaired surrogate or is nested too deeply.",
                param=name,
                code="invalid_value",
            ) from error
    return ResponseObject(**repeated, status="in_progress")


def _usage(usage: Usage | None) -> ResponsesUsage | None:
    if usage is None:
        return None
    return ResponsesUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=usage.completion_tokens_details.reasoning_tokens),
        total_tokens=usage.total_tokens,
    )


async def collect(events: AsyncIterator[ResponsesEvent]) -> ResponseObject:
    """Returns the response of the last event of a stream, which holds everything."""
    last: ResponsesEvent | None = None
    async for event in events:
        last = event
    assert isinstance(last, ResponseStateEvent)
    return last.response
