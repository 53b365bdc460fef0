"""Events of a provider's chat completion -> ChatCompletionChunks as this server's own models give them."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast
from uuid import uuid4

from providers.json_values import Object, count_or_zero, list_or_empty, object_or_empty, string_or_empty
from schemas import (
    ChatCompletionChunk,
    ChunkChoice,
    CompletionTokensDetails,
    Delta,
    FinishReason,
    FunctionDelta,
    PromptTokensDetails,
    ToolCallDelta,
    Usage,
)
from server.events import data_of

REASONS: dict[str, FinishReason] = {
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}  # others are an ordinary end


async def chunks_of(events: AsyncGenerator[bytes], model: str) -> AsyncGenerator[ChatCompletionChunk]:
    """Yields a chunk for each event with something in it. Raises what `events` raises, which it closes."""
    reader = _Reader()
    async with aclosing(events):
        async for event in events:
            data = data_of(event)
            if data is None or data == b"[DONE]":
                continue
            body = object_or_empty(json.loads(data))  # the provider has checked it
            choices = [reader.choice(choice) for choice in list_or_empty(body.get("choices")) if choice]
            usage = usage_of(object_or_empty(body.get("usage")))
            if choices or usage:
                yield ChatCompletionChunk(model=model, choices=choices, usage=usage)


def usage_of(usage: Object) -> Usage | None:
    """Returns the counts that a provider sent; None if it sent none."""
    if not usage:
        return None
    prompt, completion = count_or_zero(usage.get("prompt_tokens")), count_or_zero(usage.get("completion_tokens"))
    cached = count_or_zero(object_or_empty(usage.get("prompt_tokens_details")).get("cached_tokens"))
    reasoning = count_or_zero(object_or_empty(usage.get("completion_tokens_details")).get("reasoning_tokens"))
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning),
    )


class _Reader:
    """Reads the choices of one stream; each call's id and name are only in its first delta."""

    def __init__(self) -> None:
        self._begun: set[tuple[int, int]] = set()  # choice and call

    def choice(self, choice: Any) -> ChunkChoice:
        choice = object_or_empty(choice)
        index, delta = count_or_zero(choice.get("index")), object_or_empty(choice.get("delta"))
        reason = string_or_empty(choice.get("finish_reason"))
        return ChunkChoice(
            index=index,
            delta=Delta(
                content=string_or_empty(delta.get("content")) or string_or_empty(delta.get("refusal")) or None,
                reasoning_content=string_or_empty(delta.get("reasoning_content") or delta.get("reasoning")) or None,
                tool_calls=[self._call(index, call) for call in list_or_empty(delta.get("tool_calls"))] or None,
            ),
            finish_reason=REASONS.get(reason, "stop") if reason else None,
        )

    def _call(self, choice: int, call: Any) -> ToolCallDelta:
        call = object_or_empty(call)
        index, function = count_or_zero(call.get("index")), object_or_empty(call.get("function"))
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        text = string_or_empty(arguments)
        if (choice, index) in self._begun:
            return ToolCallDelta(index=index, function=FunctionDelta(arguments=text))
        self._begun.add((choice, index))
        name = string_or_empty(function.get("name"))
        identity = string_or_empty(call.get("id")) or f"call_{uuid4().hex[:24]}"
        return ToolCallDelta(
            index=index, id=identity, type="function", function=FunctionDelta(name=name, arguments=text)
        )


def sent_chat(chat: Object) -> Object:
    """Returns a chat completion request as providers take it: a stream with its usage, without this server's fields.

    Images in the results of tools move to a message of the user, because providers take only text there.
    """
    body = {name: value for name, value in chat.items() if name in SENT and value is not None}
    body["messages"] = [moved for message in body["messages"] for moved in _with_images_apart(message)]
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


SENT = frozenset(
    "model messages max_tokens temperature top_p stop tools tool_choice parallel_tool_calls response_format seed"
    " reasoning_effort presence_penalty frequency_penalty logit_bias logprobs top_logprobs".split()
)


def _with_images_apart(message: Object) -> list[Object]:
    content = message.get("content")
    if message.get("role") != "tool" or not isinstance(content, list):
        return [message]
    texts = [part for part in content if part.get("type") == "text"]
    images = [part for part in content if part.get("type") == "image_url"]
    said = {**message, "content": "\n".join(cast(str, part.get("text") or "") for part in texts)}
    return [said, {"role": "user", "content": images}] if images else [said]
