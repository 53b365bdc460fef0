"""Events of a provider's chat completion -> ChatCompletionChunks as this server's own models give them."""

import json
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any, cast
from uuid import uuid4

from errors import UpstreamError
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
from text.surrogates import SurrogateJoiner, whole

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
            for choice in list_or_empty(body.get("choices")):
                for read in reader.read(choice):
                    yield ChatCompletionChunk(model=model, choices=[read])
            if (usage := usage_of(object_or_empty(body.get("usage")))) is not None:
                yield ChatCompletionChunk(model=model, choices=[], usage=usage)
        for read in reader.end():
            yield ChatCompletionChunk(model=model, choices=[read])
    if not reader.has_begun:
        raise UpstreamError("The provider sent an empty answer.", code="upstream_invalid_response")


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
    """Reads the choices of one stream.

    The views of protocols take one part of an answer after the other, while providers may write several calls at once.
    So the deltas of the first call are passed on as they come, and what comes between them waits for the end.
    """

    def __init__(self) -> None:
        self._choices: dict[int, _Choice] = {}

    @property
    def has_begun(self) -> bool:
        return bool(self._choices)

    def read(self, choice: Any) -> Iterator[ChunkChoice]:
        choice = object_or_empty(choice)
        index = count_or_zero(choice.get("index"))
        yield from self._choices.setdefault(index, _Choice(index)).read(choice)

    def end(self) -> Iterator[ChunkChoice]:
        """Yields what still waits, of a stream without a finish reason."""
        for choice in self._choices.values():
            yield from choice.flush()


class _Choice:
    def __init__(self, index: int) -> None:
        self._index = index
        self._joiners: dict[str, SurrogateJoiner] = {}  # by what the text is part of
        self._first: int | None = None  # number of the first call
        self._begun: set[int] = set()  # numbers of calls whose id and name have come
        self._by_id: dict[str, int] = {}  # number of each call whose id is known
        self._current: dict[int | None, int] = {}  # number of the last call at each of the provider's indices
        self._waiting: dict[str, list[Delta]] = {}  # deltas by what they are part of, in the order of their beginnings

    def read(self, choice: Object) -> Iterator[ChunkChoice]:
        for part, delta in self._deltas(object_or_empty(choice.get("delta"))):
            if self._first is None or part == f"call {self._first}":
                yield ChunkChoice(index=self._index, delta=delta)
            else:
                self._waiting.setdefault(part, []).append(delta)
        reason = string_or_empty(choice.get("finish_reason"))
        if reason:
            yield from self.flush()
            known = REASONS.get(reason, "stop")
            # some providers end a call with `stop`
            ended = "tool_calls" if known == "stop" and self._begun else known
            stop = string_or_empty(choice.get("stop_reason")) or None  # vLLM's: the stop string that came
            yield ChunkChoice(index=self._index, delta=Delta(), finish_reason=ended, stop_reason=stop)

    def flush(self) -> Iterator[ChunkChoice]:
        waiting, self._waiting = self._waiting, {}
        for deltas in waiting.values():
            for delta in deltas:
                yield ChunkChoice(index=self._index, delta=delta)

    def _deltas(self, delta: Object) -> Iterator[tuple[str, Delta]]:
        """Yields the parts of a delta, each with what it is part of."""
        thought = string_or_empty(delta.get("reasoning_content") or delta.get("reasoning"))
        if text := self._joined("reasoning", thought):
            yield "reasoning", Delta(reasoning_content=text)
        said = string_or_empty(delta.get("content")) or string_or_empty(delta.get("refusal"))
        if text := self._joined("content", said):
            yield "content", Delta(content=text)
        for call in list_or_empty(delta.get("tool_calls")):
            made = self._call(object_or_empty(call))
            yield f"call {made.index}", Delta(tool_calls=[made])

    def _call(self, call: Object) -> ToolCallDelta:
        index, function = self._number(call), object_or_empty(call.get("function"))
        arguments = function.get("arguments")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        text = self._joined(f"call {index}", string_or_empty(arguments))
        if index in self._begun:
            return ToolCallDelta(index=index, function=FunctionDelta(arguments=text))
        self._begun.add(index)
        self._first = index if self._first is None else self._first
        name = whole(string_or_empty(function.get("name")))
        identity = whole(string_or_empty(call.get("id"))) or f"call_{uuid4().hex[:24]}"
        return ToolCallDelta(
            index=index, id=identity, type="function", function=FunctionDelta(name=name, arguments=text)
        )

    def _number(self, call: Object) -> int:
        """Returns the number of a call. Another id is another call, also at the same index, or where there is none."""
        index, identity = call.get("index"), string_or_empty(call.get("id"))
        place = index if isinstance(index, int) else None
        number = self._by_id.get(identity)
        if number is None and (identity == "" or self._current.get(place) not in self._by_id.values()):
            number = self._current.get(place)
        if number is None:
            number = len(self._begun)
        if identity:
            self._by_id[identity] = number
        self._current[place] = number
        return number

    def _joined(self, part: str, text: str) -> str:
        return self._joiners.setdefault(part, SurrogateJoiner()).put(text) if text else ""


def sent_chat(chat: Object) -> Object:
    """Returns a chat completion request as providers take it: a stream with its usage, without this server's fields.

    Images in the results of tools move to a message of the user, because providers take only text there.
    """
    body = {name: value for name, value in chat.items() if name in SENT and value is not None}
    if chat.get("enable_thinking") is False:
        body["reasoning_effort"] = "none"
    body["messages"] = _with_images_apart([_of_system(message) for message in body["messages"]])
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


def unsent(chat: Object) -> list[str]:
    """Returns the parameters of a chat completion request that no provider is sent."""
    return [name for name in LOCAL if chat.get(name) is not None]


LOCAL = (
    *("top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens"),
    *("thinking_token_budget", "chat_template_kwargs"),
)
SENT = frozenset(
    "model messages max_tokens temperature top_p stop tools tool_choice parallel_tool_calls response_format seed"
    " reasoning_effort presence_penalty frequency_penalty logit_bias logprobs top_logprobs".split()
)


def _of_system(message: Object) -> Object:
    """Gives a developer's message the role that every provider knows."""
    return {**message, "role": "system"} if message.get("role") == "developer" else message


def _with_images_apart(messages: Sequence[Object]) -> list[Object]:
    """Moves the images of results behind all results of the same turn, which have to follow their calls."""
    result: list[Object] = []
    images: list[Object] = []
    for message in messages:
        if images and message.get("role") != "tool":
            result.append({"role": "user", "content": images})
            images = []
        content = message.get("content")
        if message.get("role") == "tool" and isinstance(content, list):
            images = [*images, *(part for part in content if part.get("type") == "image_url")]
            texts = [cast(str, part.get("text") or "") for part in content if part.get("type") == "text"]
            message = {**message, "content": "\n".join(texts)}
        result.append(message)
    return [*result, {"role": "user", "content": images}] if images else result
