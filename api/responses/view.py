"""/v1/responses as a view of chat completions: its request becomes one, and the chunks become its events.

This module knows no provider and no store.
"""

import itertools
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

from pydantic_core import to_json

from api.error_handlers import validated
from api.responses.echo import echo_of
from api.responses.input import messages_of
from api.responses.output import Output, Status
from api.responses.requests import InputItem, ResponsesRequest
from api.responses.schemas import (
    InputTokensDetails,
    OutputTokensDetails,
    ResponseObject,
    ResponsesEvent,
    ResponseStateEvent,
    ResponsesUsage,
)
from api.responses.tools import chat_choice, name_tool_as_sent, offered_tools
from api.sent_fields import name_as_sent
from errors import APIError, InvalidRequest, unsupported
from schemas import MAX_MESSAGES, SAMPLING_FIELDS, ChatCompletionChunk, ChatCompletionRequest, Usage

SENT_AS = (  # what errors of chat completions name -> the field that the client sent
    (re.compile(r"\Amessages\b"), "input"),
    (re.compile(r"\bmax_tokens\b"), "max_output_tokens"),
    (re.compile(r"\bresponse_format(\.json_schema)?\b"), "text.format"),
    (re.compile(r"\btool_choice\.allowed_tools\b"), "tool_choice"),
)
# Why an answer ended: chat -> Responses, if it is not complete
INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
LOGPROBS, REASONING = "message.output_text.logprobs", "reasoning.encrypted_content"  # values of `include`


def as_chat(request: ResponsesRequest, earlier: Sequence[InputItem] = ()) -> ChatCompletionRequest:
    """Makes the equivalent chat completion request; its tools are all functions.

    earlier: the items of the responses that this one follows.

    Raises InvalidRequest with the field of this request as param.
    """
    for name in request.refused_fields:
        raise unsupported(name)
    tools, messages = offered_tools(request.tools), [message for message, _ in messages_of(request, earlier)]
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(
            f"The conversation has more than {MAX_MESSAGES} messages: begin a new one, or send fewer.",
            param="input",
            code="invalid_value",
        )
    shared: dict[str, Any] = request.model_dump(include=set(SAMPLING_FIELDS), exclude_none=True)
    wants_logprobs = LOGPROBS in (request.include or ()) or bool(request.top_logprobs)
    return validated(
        ChatCompletionRequest,
        {
            **shared,
            "messages": messages,
            "max_tokens": request.max_output_tokens,
            "logprobs": wants_logprobs or None,
            "top_logprobs": request.top_logprobs,
            "response_format": _response_format(request.text.format if request.text else None),
            "tools": None if request.tools is None else [tool.chat for tool in tools],
            "tool_choice": chat_choice(request.tool_choice, tools, len(request.tools or ())),
            "parallel_tool_calls": request.parallel_tool_calls,
            "reasoning_effort": (request.reasoning.effort if request.reasoning else None) or request.reasoning_effort,
            "enable_thinking": request.enable_thinking,
            "thinking_token_budget": request.thinking_token_budget,
            "chat_template_kwargs": request.chat_template_kwargs,
        },
    )


def _response_format(format: dict[str, Any] | None) -> dict[str, Any] | None:
    """Converts the format: Responses puts the schema next to `type`, chat nests it under `json_schema`."""
    if format is None or format.get("type") != "json_schema" or ("json_schema" in format and "schema" not in format):
        return format  # also a json_schema that is nested already
    if format.get("schema") is None:
        path = "text.format.schema"
        raise InvalidRequest(f"{path} is required.", param=path, code="missing_required_parameter")
    return {"type": "json_schema", "json_schema": {key: value for key, value in format.items() if key != "type"}}


async def stream(
    request: ResponsesRequest,
    chunks: AsyncGenerator[ChatCompletionChunk],
    response: ResponseObject | None = None,
    earlier: Sequence[InputItem] = (),
) -> AsyncGenerator[ResponsesEvent]:
    """Makes the events, from `response.created` on, with consecutive sequence numbers. Raises what the chunks raise.

    response: what `opened` made of the request; earlier: the items of the responses that it follows.
    """
    numbers = itertools.count()
    tools = offered_tools(request.tools)
    response = response or opened(request)
    output = Output({tool.flat_name: tool for tool in tools}, REASONING in (request.include or ()))
    usage: Usage | None = None
    has_begun = False
    with naming_fields(request, earlier):
        async with aclosing(chunks):
            async for chunk in chunks:
                if not has_begun:
                    has_begun, response.model, response.status = True, chunk.model, "in_progress"
                    for name in ("created", "in_progress"):
                        state = ResponseStateEvent(type=f"response.{name}", response=response.model_copy())
                        yield state.numbered(next(numbers))
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    if (reason := INCOMPLETE.get(choice.finish_reason or "")) is not None:
                        response.status, response.incomplete_details = "incomplete", {"reason": reason}
                    for event in output.add(choice):
                        yield event.numbered(next(numbers))
    status: Status = "incomplete" if response.status == "incomplete" else "completed"
    for event in output.end(status):
        yield event.numbered(next(numbers))
    done = {"status": status, "output": output.items, "completed_at": int(time.time()), "usage": _usage(usage)}
    last = ResponseStateEvent(type=f"response.{status}", response=response.model_copy(update=done))
    yield last.numbered(next(numbers))


@contextmanager
def naming_fields(request: ResponsesRequest, earlier: Sequence[InputItem] = ()) -> Iterator[None]:
    """Makes an error of chat name the fields that the client sent, such as input instead of messages."""
    try:
        yield
    except APIError as error:
        error = name_tool_as_sent(error, offered_tools(request.tools))
        raise name_as_sent(error, SENT_AS, [origin for _, origin in messages_of(request, earlier)]) from None


def opened(request: ResponsesRequest) -> ResponseObject:
    """Makes the response, with the fields of the request that it repeats. Whoever stores it sets `store`."""
    echo = echo_of(request)
    names = (ResponseObject.model_fields.keys() & ResponsesRequest.model_fields.keys()) - {"store"} - echo.keys()
    repeated = {name: value for name in names if (value := getattr(request, name)) is not None} | echo
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
