"""From token ids to text, and from chunks to bytes on the wire. It knows neither the engine nor the model.

Decoder and finder work as transformers' `TextIteratorStreamer` does: `put` for each piece, then `end()`.
"""

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol

from api.response_schemas import ErrorEvent, ResponseObject, ResponsesEvent, ResponseStateEvent
from errors import APIError
from schemas import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    ToolCall,
    Usage,
)
from server.error_formats import OPENAI
from telemetry import request_record

log = logging.getLogger(__name__)


class Wire(Protocol):
    """How the objects of a stream become server-sent events."""

    def event(self, item: Any) -> bytes: ...

    def failure(self, error: APIError) -> bytes: ...

    def end(self) -> bytes: ...


class ChunkWire:
    """Chat completions and completions: `data: {json}`, at the end `data: [DONE]`; an error as the last event instead.

    `usage` is on every chunk, null but for the last one, if it was asked for; else there is no such key.
    """

    def __init__(self, include_usage: bool) -> None:
        self._include_usage = include_usage

    def event(self, item: ChatCompletionChunk | Completion) -> bytes:
        if self._include_usage:
            return _data(item.model_dump_json())
        return _data(item.model_dump_json(exclude={"usage"})) if item.choices else b""

    def failure(self, error: APIError) -> bytes:
        return OPENAI.event(error)

    def end(self) -> bytes:
        return _data("[DONE]")


class EventWire:
    """Responses: events with names. An error is one of them, and ends in a response that failed."""

    def __init__(self) -> None:
        self._number = 0
        self._response: ResponseObject | None = None

    def event(self, item: ResponsesEvent) -> bytes:
        self._number = item.sequence_number
        if isinstance(item, ResponseStateEvent):
            self._response = item.response
        return f"event: {item.type}\n".encode() + _data(item.model_dump_json())

    def failure(self, error: APIError) -> bytes:
        number = self._number + 1
        told = ErrorEvent(sequence_number=number, message=error.message, code=error.code, param=error.param)
        if self._response is None:
            return self.event(told)
        problem = {"code": "server_error", "message": error.message}
        failed = self._response.model_copy(update={"status": "failed", "error": problem})
        last = ResponseStateEvent(type="response.failed", sequence_number=number + 1, response=failed)
        return self.event(told) + self.event(last)

    def end(self) -> bytes:
        return b""


async def sse(items: AsyncGenerator[Any], wire: Wire) -> AsyncGenerator[bytes]:
    """Server-sent events of a stream, its errors among them."""
    try:
        async with aclosing(items):
            async for item in items:
                if event := wire.event(item):
                    yield event
        if end := wire.end():
            yield end
    except APIError as error:
        request_record.current().error = error.code or error.type
        yield wire.failure(error)
    except Exception:
        log.exception("a stream failed")
        request_record.current().error = "server_error"
        yield wire.failure(APIError("The server failed; the error is in its log."))


def _data(text: str) -> bytes:
    return b"data: " + text.encode() + b"\n\n"


async def collect_chat(chunks: AsyncIterator[ChatCompletionChunk]) -> ChatCompletion:
    """The fold of a stream: what a client that concatenates its chunks would hold."""
    last: ChatCompletionChunk | None = None
    usage: Usage | None = None
    answers: dict[int, _Answer] = {}
    async for chunk in chunks:
        last, usage = chunk, chunk.usage or usage
        for choice in chunk.choices:
            answers.setdefault(choice.index, _Answer()).add(choice)
    assert last is not None and usage is not None
    choices = [answers[index].choice(index) for index in sorted(answers)]
    return ChatCompletion(
        id=last.id, created=last.created, model=last.model, choices=choices, usage=usage, timings=last.timings
    )


class _Answer:
    """One choice of a chat completion."""

    def __init__(self) -> None:
        self._content = self._reasoning = ""
        self._calls: list[ToolCall] = []
        self._logprobs: ChoiceLogprobs | None = None
        self._reason: FinishReason | None = None

    def add(self, choice: ChunkChoice) -> None:
        self._content += choice.delta.content or ""
        self._reasoning += choice.delta.reasoning_content or ""
        self._reason = choice.finish_reason or self._reason
        for delta in choice.delta.tool_calls or ():
            if delta.index == len(self._calls):
                self._calls.append(ToolCall(id=delta.id or ""))
            function = self._calls[delta.index].function
            function.name += delta.function.name or ""
            function.arguments += delta.function.arguments or ""
        if choice.logprobs is not None:
            self._logprobs = self._logprobs or ChoiceLogprobs(content=[])
            self._logprobs.content += choice.logprobs.content

    def choice(self, index: int) -> Choice:
        assert self._reason is not None
        content = None if self._calls and not self._content else self._content
        message = AssistantMessage(
            content=content, reasoning_content=self._reasoning or None, tool_calls=self._calls or None
        )
        return Choice(index=index, message=message, logprobs=self._logprobs, finish_reason=self._reason)


async def collect_completion(chunks: AsyncIterator[Completion]) -> Completion:
    """The same for text completions."""
    choices: dict[int, CompletionChoice] = {}
    last: Completion | None = None
    async for chunk in chunks:
        last = chunk
        for choice in chunk.choices:
            whole = choices.setdefault(choice.index, CompletionChoice(index=choice.index, text=""))
            whole.text += choice.text
            whole.finish_reason = choice.finish_reason or whole.finish_reason
            if choice.logprobs:
                whole.logprobs = whole.logprobs or CompletionLogprobs()
                for name, values in choice.logprobs:
                    getattr(whole.logprobs, name).extend(values)
    assert last is not None
    return last.model_copy(update={"choices": [choices[index] for index in sorted(choices)]})
