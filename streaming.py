"""From token ids to text, and from chunks to bytes on the wire. It knows neither the engine nor the model.

The streamer belongs to the family of transformers' `TextIteratorStreamer`: `put(token_ids)`, then `end()`.
"""

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import record
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
    ErrorEvent,
    FinishReason,
    ResponseObject,
    ResponsesEvent,
    ResponseStateEvent,
    ToolCall,
    Usage,
)

log = logging.getLogger(__name__)
REPLACEMENT = "\ufffd"  # what a tokenizer gives for bytes that are no whole character


class Detokenizer(Protocol):
    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str | list[str]: ...


class MarkingDetokenizer:
    """Shows some tokens, special ones perhaps, as characters of their own."""

    def __init__(self, detokenizer: Detokenizer, marks: Mapping[int, str]) -> None:
        self._detokenizer, self._marks = detokenizer, marks
        self._never = str.maketrans(dict.fromkeys(marks.values(), REPLACEMENT))

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        text, start = "", 0
        for place, token_id in enumerate(token_ids):
            if token_id in self._marks:
                text += self._text(token_ids[start:place]) + self._marks[token_id]
                start = place + 1
        return text + self._text(token_ids[start:])

    def _text(self, token_ids: list[int]) -> str:
        text = str(self._detokenizer.decode(token_ids, skip_special_tokens=True)) if token_ids else ""
        return text if text.isascii() else text.translate(self._never)


class TextStreamer:
    """Token ids in, text out as early as it is certain.

    Held back are only the bytes of an incomplete character and a suffix that may become a stop string. Bytes that
    never become a character are dropped. `prefix` is text before the answer that decides how its first token reads.
    """

    def __init__(self, tokenizer: Detokenizer, stop: Sequence[str] = (), prefix: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids = list(prefix)  # a window: the tokens of the last character before, and those after it
        self._read = len(self._ids)
        self._shown = self._decode(self._ids).rstrip(REPLACEMENT)  # a character that the answer may complete
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self.num_characters = 0  # decoded so far
        self.num_released = 0  # of them
        self.is_stopped = False

    def put(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make certain. After a stop string, which is cut off, there is no more."""
        text = ""
        for token_id in token_ids:
            if self.is_stopped:
                break
            text += self._release(self._decode_next(token_id))
        self.num_released += len(text)
        return text

    def end(self) -> str:
        """What was held back for a stop string or a character that did not come; incomplete bytes are dropped."""
        if self.is_stopped:
            return ""
        rest = self._decode(self._ids)[len(self._shown) :].replace(REPLACEMENT, "")
        self._ids, self._shown = [], ""
        text = self._release(rest)
        text += "" if self.is_stopped else self._held
        self.num_released += len(text)
        return text

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _decode_next(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(REPLACEMENT) and len(self._ids) - self._read < 8:  # a character has at most 4 bytes
            return ""
        new = text[len(self._shown) :]
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._shown = self._decode(self._ids).rstrip(REPLACEMENT)
        return new.replace(REPLACEMENT, "")

    def _release(self, text: str) -> str:
        self.num_characters += len(text)
        if not self._stop:
            return text
        self._held += text
        found = [(start + len(stop), start) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if found:  # the one that was complete first, so that it does not matter how the text was split
            text, self._held, self.is_stopped = self._held[: min(found)[1]], "", True
            return text
        keep = max((overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


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
        return _data(json.dumps(error.body()))

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
        record.current().error = error.code or error.type
        yield wire.failure(error)
    except Exception:
        log.exception("a stream failed")
        record.current().error = "server_error"
        yield wire.failure(APIError("The server failed; it has been logged."))


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
