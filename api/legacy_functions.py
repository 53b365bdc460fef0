"""Function calling of 2023 as a view of tools: `functions` and `function_call` become tools, and calls come back as
`function_call`.

Source: OpenAI's API reference of 2023. An answer holds one call at most, because the old form has no place for more.
"""

import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from errors import APIError, InvalidRequest
from schemas import ChatCompletionChunk, ChatCompletionRequest, ChunkChoice

NEWER = ("tools", "tool_choice")
# A path in an error about the tools -> the same in the request
SENT_AS = (
    (re.compile(r"tools(\[\d+\])?(?:\.function)?"), r"functions\1"),
    (re.compile("tool_choice.*"), "function_call"),
)


def is_legacy(request: ChatCompletionRequest) -> bool:
    """Returns whether the request uses the fields of 2023."""
    is_neutral = request.function_call == "auto" and bool(request.tools)
    return bool(request.functions) or (request.function_call is not None and not is_neutral)


def as_tools(request: ChatCompletionRequest) -> ChatCompletionRequest:
    """Returns the same request with tools. Raises InvalidRequest for one that uses both forms."""
    for name in NEWER:
        if getattr(request, name):
            raise InvalidRequest(
                f"{name} cannot be sent together with functions or function_call, which is the older form of it.",
                param=name,
                code="invalid_value",
            )
    replaced = {
        "tools": [{"type": "function", "function": function} for function in request.functions or ()],
        "tool_choice": _tool_choice(request.function_call),
        "parallel_tool_calls": False,
        "functions": None,
        "function_call": None,
    }
    return request.model_copy(update=replaced)


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, dict) and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    if choice not in (None, "none", "auto"):
        raise InvalidRequest(
            "function_call must be none, auto or an object with the name of a function.",
            param="function_call",
            code="invalid_value",
        )
    return choice


async def with_function_calls(chunks: AsyncGenerator[ChatCompletionChunk]) -> AsyncGenerator[ChatCompletionChunk]:
    """Yields the chunks with the calls of tools in the older form. Raises what the chunks raise, with the fields that
    the client sent as param."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield chunk.model_copy(update={"choices": [_older(choice) for choice in chunk.choices]})
    except APIError as error:
        raise _naming_functions(error) from None


def _older(choice: ChunkChoice) -> ChunkChoice:
    changes: dict[str, Any] = {}
    if calls := choice.delta.tool_calls:
        (call,) = calls
        changes["delta"] = choice.delta.model_copy(update={"tool_calls": None, "function_call": call.function})
    if choice.finish_reason == "tool_calls":
        changes["finish_reason"] = "function_call"
    return choice.model_copy(update=changes) if changes else choice


def _naming_functions(error: APIError) -> APIError:
    """Renames tools to functions, and tool_choice to function_call, where an error speaks of them."""
    param = error.param or ""
    for pattern, name in SENT_AS:
        if pattern.match(param):
            error.param = pattern.sub(name, param, count=1)
            error.message = error.message.replace(param, error.param)
    return error
