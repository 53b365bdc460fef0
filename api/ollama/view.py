"""Ollama's /api/chat and /api/generate as views of chat completions and completions: their requests become those, and
the chunks become Ollama's lines of JSON.

This module knows no provider.
"""

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from api.error_handlers import validated
from api.ollama.calls import CallCollector, with_ids
from api.ollama.schemas import (
    AnsweredMessage,
    OllamaAnswer,
    OllamaCall,
    OllamaChatAnswer,
    OllamaChatRequest,
    OllamaGenerateAnswer,
    OllamaGenerateRequest,
    OllamaOptions,
    OllamaStatistics,
)
from api.sent_fields import name_as_sent
from errors import APIError, InvalidRequest, unsupported
from schemas import (
    ChatCompletionChunk,
    ChunkChoice,
    Completion,
    CompletionRequest,
    Delta,
    SamplingFields,
    Timings,
    TranslatedChatRequest,
    Usage,
)
from server.error_formats import OLLAMA
from server.events import StreamFormat

AnyRequest = OllamaChatRequest | OllamaGenerateRequest
NANOSECONDS = 1e6  # in a millisecond
# What errors of chats and completions name -> the field that the client sent
SENT_AS = (
    (re.compile(r"\b(response_format(\.json_schema)?(\.schema)?|guided_json)\b"), "format"),
    (re.compile(r"\bmax_(completion_)?tokens\b"), "options.num_predict"),
)


class CappedCompletionRequest(CompletionRequest):
    """A completion in which `max_tokens` is a bound that may be larger than the context."""

    is_capped = True


# --- requests


def is_text(request: OllamaGenerateRequest) -> bool:
    """Returns whether the request asks for the continuation of a text, and not for a chat's answer."""
    return bool(request.raw or request.suffix)


def as_chat(request: AnyRequest, model: str) -> TranslatedChatRequest:
    """Makes the equivalent chat completion request for a model of that name. Raises InvalidRequest."""
    _check(request)
    messages = _chat(request) if isinstance(request, OllamaChatRequest) else _turns(request)
    return validated(
        TranslatedChatRequest,
        {
            **_sampling(request.options),
            "model": model,
            "timeout": request.timeout,
            "keep_alive": request.keep_alive,
            "stream": request.stream,
            "messages": messages,
            "tools": _tools(request),
            "response_format": _response_format(request.format),
            "enable_thinking": request.think if isinstance(request.think, bool) else None,
            "reasoning_effort": request.think if isinstance(request.think, str) else None,
            "logprobs": request.logprobs or bool(request.top_logprobs) or None,
            "top_logprobs": request.top_logprobs,
        },
    )


def as_completion(request: OllamaGenerateRequest, model: str) -> CappedCompletionRequest:
    """Makes the equivalent completion request for a text that is continued, or whose gap is filled."""
    _check(request)
    for name in ("system", "images", "logprobs", "top_logprobs"):
        if getattr(request, name):
            raise unsupported(name)
    format = request.format or None
    return validated(
        CappedCompletionRequest,
        {
            **_sampling(request.options),
            "model": model,
            "timeout": request.timeout,
            "keep_alive": request.keep_alive,
            "stream": request.stream,
            "prompt": request.prompt or "",
            "suffix": request.suffix,
            "guided_json": {"type": "object"} if format == "json" else format,
        },
    )


def _check(request: AnyRequest) -> None:
    for name in request.refused_fields:
        raise unsupported(name)
    if isinstance(request.format, str) and request.format not in ("", "json"):
        raise InvalidRequest(
            "The format must be json or a JSON schema, which is an object.", param="format", code="invalid_value"
        )


def _sampling(options: OllamaOptions | None) -> dict[str, Any]:
    """Returns the sampling parameters under their names in completions."""
    if options is None:
        return {}
    values = options.model_dump(include={*SamplingFields.model_fields, "stop"}, exclude_none=True)
    if options.repeat_penalty is not None:
        values["repetition_penalty"] = options.repeat_penalty
    if options.num_predict is not None and options.num_predict > 0:  # -1 and -2: as many as the context takes
        values["max_tokens"] = options.num_predict
    return values


def _tools(request: AnyRequest) -> list[dict[str, Any]] | None:
    if not isinstance(request, OllamaChatRequest) or not request.tools:
        return None
    return [{"type": "function", **tool} for tool in request.tools]


def _response_format(format: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if isinstance(format, dict):
        return {"type": "json_schema", "json_schema": {"name": "format", "schema": format}}
    return {"type": "json_object"} if format else None


def _turns(request: OllamaGenerateRequest) -> list[dict[str, Any]]:
    """Returns the messages that a prompt of one text stands for."""
    system = [{"role": "system", "content": request.system}] if request.system else []
    return [*system, {"role": "user", "content": _content(request.prompt or "", request.images)}]


def _chat(request: OllamaChatRequest) -> list[dict[str, Any]]:
    messages = []
    for message in with_ids(request.messages or []):
        messages.append(
            {
                "role": message.role,
                "content": _content(message.content or "", message.images),
                "reasoning_content": message.thinking,
                "tool_calls": message.tool_calls or None,
                "tool_call_id": message.tool_call_id,
                "name": message.tool_name,
            }
        )
    return messages


def _content(text: str, images: list[str] | None) -> str | list[dict[str, Any]]:
    """Returns a text with its images, which are base64 without a type: the bytes tell what they are."""
    if not images:
        return text
    urls = [image if image.startswith("data:") else f"data:image/png;base64,{image}" for image in images]
    return [{"type": "image_url", "image_url": {"url": url}} for url in urls] + [{"type": "text", "text": text}]


# --- answers


async def as_chunks(completion: AsyncGenerator[Completion]) -> AsyncGenerator[ChatCompletionChunk]:
    """Yields a completion's chunks as those of a chat."""
    async with aclosing(completion):
        async for chunk in completion:
            choices = [
                ChunkChoice(index=choice.index, delta=Delta(content=choice.text), finish_reason=choice.finish_reason)
                for choice in chunk.choices
            ]
            yield ChatCompletionChunk(model=chunk.model, choices=choices, usage=chunk.usage, timings=chunk.timings)


async def stream(request: AnyRequest, chunks: AsyncGenerator[ChatCompletionChunk]) -> AsyncGenerator[OllamaAnswer]:
    """Yields the parts of the answer as they come, then an empty one with the statistics. Raises what the chunks
    raise, with the client's names of fields."""
    begun, calls, reason = time.monotonic_ns(), CallCollector(), "stop"
    usage: Usage | None = None
    timings: Timings | None = None
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                usage, timings = chunk.usage or usage, chunk.timings or timings
                for choice in chunk.choices:
                    reason = choice.finish_reason or reason
                    if part := _part(request, choice, calls.add(choice)):
                        yield part
    except APIError as error:
        raise name_as_sent(error, SENT_AS) from None
    if rest := calls.end():
        yield _answer(request, calls=rest)
    last = _answer(request).model_copy(update={"done": True, "done_reason": "length" if reason == "length" else "stop"})
    yield last.model_copy(update=_statistics(usage, timings, time.monotonic_ns() - begun).model_dump())


def _part(request: AnyRequest, choice: ChunkChoice, calls: list[OllamaCall]) -> OllamaAnswer | None:
    """Returns what a chunk adds; None if that is nothing."""
    content, thinking = choice.delta.content or "", choice.delta.reasoning_content or ""
    logprobs = choice.logprobs.content if choice.logprobs else []
    if not (content or thinking or calls or logprobs):
        return None
    answer: OllamaAnswer = _answer(request, content, thinking, calls)
    return answer.model_copy(update={"logprobs": logprobs}) if logprobs else answer


def _answer(request: AnyRequest, content: str = "", thinking: str = "", calls: list[OllamaCall] | None = None) -> Any:
    """Returns an answer, or a part of one, in the shape of the request's endpoint."""
    if isinstance(request, OllamaGenerateRequest):
        return OllamaGenerateAnswer(model=request.model, response=content, thinking=thinking or None)
    message = AnsweredMessage(content=content, thinking=thinking or None, tool_calls=calls or None)
    return OllamaChatAnswer(model=request.model, message=message)


def _statistics(usage: Usage | None, timings: Timings | None, elapsed: int) -> OllamaStatistics:
    """elapsed: nanoseconds. A model of another provider tells no durations, so all of it counts as the answer's."""
    prompt = int(timings.prompt_ms * NANOSECONDS) if timings else 0
    answer = int(timings.predicted_ms * NANOSECONDS) if timings else elapsed
    return OllamaStatistics(
        total_duration=max(elapsed, prompt + answer),
        load_duration=0,
        prompt_eval_count=usage and usage.prompt_tokens,
        prompt_eval_duration=max(prompt, 1),  # clients divide by it
        eval_count=usage and usage.completion_tokens,
        eval_duration=max(answer, 1),
    )


async def collect(answers: AsyncIterator[OllamaAnswer]) -> OllamaAnswer:
    """Returns the whole answer of a stream: the last part, with the texts and calls of all."""
    parts = [answer async for answer in answers]
    last, logprobs = parts[-1], [token for part in parts for token in part.logprobs or ()]
    shared = {"logprobs": logprobs} if logprobs else {}
    if isinstance(last, OllamaGenerateAnswer):
        generated = [part for part in parts if isinstance(part, OllamaGenerateAnswer)]
        texts = {"response": _joined(generated, "response"), "thinking": _joined(generated, "thinking") or None}
        return last.model_copy(update={**texts, **shared})
    messages = [part.message for part in parts if isinstance(part, OllamaChatAnswer)]
    message = AnsweredMessage(
        content=_joined(messages, "content"),
        thinking=_joined(messages, "thinking") or None,
        tool_calls=[call for message in messages for call in message.tool_calls or ()] or None,
    )
    return last.model_copy(update={"message": message, **shared})


def _joined(parts: list[Any], name: str) -> str:
    return "".join(getattr(part, name) or "" for part in parts)


def loaded(request: AnyRequest) -> OllamaAnswer:
    """Returns the answer to a request without messages, which asks to load the model or to unload it."""
    reason = "unload" if request.asks_to_unload else "load"
    answer: OllamaAnswer = _answer(request).model_copy(update={"done": True, "done_reason": reason})
    return answer


class LineEncoder:
    """Writes each part of an answer as a line of JSON; the last line may be an error."""

    format = StreamFormat(media_type="application/x-ndjson", keep_alive=b"")

    def event(self, item: OllamaAnswer) -> bytes:
        return item.model_dump_json().encode() + b"\n"

    def failure(self, error: APIError) -> bytes:
        return OLLAMA.event(error)

    def end(self) -> bytes:
        return b""
