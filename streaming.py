"""From token ids to text, and from chunks to bytes on the wire. It knows neither the engine nor the model.

The streamer belongs to the family of transformers' `TextIteratorStreamer`: `put(token_ids)`, then `end()`.
"""

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from errors import APIError
from schemas import (
    AssistantMessage,
    ChatCompletion,
    ChatCompletionChunk,
    Choice,
    ChoiceLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    ErrorEvent,
    FinishReason,
    ResponseObject,
    ResponsesEvent,
    ResponseStateEvent,
    TokenLogprob,
    Usage,
)

log = logging.getLogger(__name__)
REPLACEMENT = "\ufffd"  # what a tokenizer gives for bytes that are no whole character


class Detokenizer(Protocol):
    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str | list[str]: ...


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
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
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


async def sse(first: Any, rest: AsyncGenerator[Any], wire: Wire) -> AsyncGenerator[bytes]:
    """Server-sent events of a stream that has begun, its errors among them."""
    try:
        async with aclosing(rest):
            if event := wire.event(first):
                yield event
            async for item in rest:
                if event := wire.event(item):
                    yield event
        if end := wire.end():
            yield end
    except APIError as error:
        yield wire.failure(error)
    except Exception:
        log.exception("a stream failed")
        yield wire.failure(APIError("The server failed; it has been logged."))


def _data(text: str) -> bytes:
    return b"data: " + text.encode() + b"\n\n"


async def collect_chat(chunks: AsyncIterator[ChatCompletionChunk]) -> ChatCompletion:
    """The fold of a stream: what a client that concatenates its chunks would hold."""
    fold = _Fold()
    logprobs: dict[int, list[TokenLogprob]] = {}
    async for chunk in chunks:
        fold.add(chunk)
        for choice in chunk.choices:
            fold.add_text(choice.index, choice.delta.content or "", choice.finish_reason)
            if choice.logprobs:
                logprobs.setdefault(choice.index, []).extend(choice.logprobs.content)
    choices = [
        Choice(
            index=index,
            message=AssistantMessage(content=text),
            logprobs=ChoiceLogprobs(content=logprobs[index]) if index in logprobs else None,
            finish_reason=fold.reasons[index],
        )
        for index, text in sorted(fold.texts.items())
    ]
    assert fold.last is not None and fold.usage is not None
    last = fold.last
    return ChatCompletion(
        id=last.id, created=last.created, model=last.model, choices=choices, usage=fold.usage, timings=last.timings
    )


async def collect_completion(chunks: AsyncIterator[Completion]) -> Completion:
    """The same for text completions."""
    fold = _Fold()
    logprobs: dict[int, CompletionLogprobs] = {}
    async for chunk in chunks:
        fold.add(chunk)
        for choice in chunk.choices:
            fold.add_text(choice.index, choice.text, choice.finish_reason)
            if choice.logprobs:
                whole = logprobs.setdefault(choice.index, CompletionLogprobs())
                for name, values in choice.logprobs:
                    getattr(whole, name).extend(values)
    choices = [
        CompletionChoice(index=index, text=text, logprobs=logprobs.get(index), finish_reason=fold.reasons[index])
        for index, text in sorted(fold.texts.items())
    ]
    assert isinstance(fold.last, Completion)
    return fold.last.model_copy(update={"choices": choices})


class _Fold:
    """What is gathered from either kind of chunk."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.usage: Usage | None = None
        self.last: ChatCompletionChunk | Completion | None = None

    def add(self, chunk: ChatCompletionChunk | Completion) -> None:
        self.last = chunk
        self.usage = chunk.usage or self.usage

    def add_text(self, index: int, text: str, reason: FinishReason | None) -> None:
        self.texts[index] = self.texts.get(index, "") + text
        if reason:
            self.reasons[index] = reason
