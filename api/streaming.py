"""Chunks become server-sent events, or the one answer that a client which joins them would hold."""

from collections.abc import AsyncIterator
from typing import Any

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
    CustomCall,
    FinishReason,
    FunctionCall,
    FunctionDelta,
    ToolCall,
    Usage,
)
from server.error_formats import OPENAI
from server.events import DONE, EVENTS, encode_event


class ChunkEncoder:
    """Writes chunks of chat completions and completions: `data: {json}`, then `data: [DONE]` or an error.

    If the client asked for the usage, every chunk has it, null in all but the last; else no chunk has the key.
    """

    format = EVENTS

    def __init__(self, include_usage: bool) -> None:
        self._include_usage = include_usage

    def event(self, item: ChatCompletionChunk | Completion) -> bytes:
        if self._include_usage:
            return encode_event(item.model_dump_json())
        return encode_event(item.model_dump_json(exclude={"usage"})) if item.choices else b""

    def failure(self, error: APIError) -> bytes:
        return OPENAI.event(error)

    def end(self) -> bytes:
        return DONE


async def collect_chat(chunks: AsyncIterator[ChatCompletionChunk]) -> ChatCompletion:
    """Returns the whole answer of a stream: what a client that joins its chunks would hold."""
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
    """One choice of a chat completion, which grows with its chunks."""

    def __init__(self) -> None:
        self._content = self._reasoning = ""
        self._calls: list[ToolCall] = []
        self._older_call: FunctionCall | None = None
        self._logprobs: ChoiceLogprobs | None = None
        self._reason: FinishReason | None = None
        self._stop: str | None = None

    def add(self, choice: ChunkChoice) -> None:
        self._content += choice.delta.content or ""
        self._reasoning += choice.delta.reasoning_content or ""
        self._reason, self._stop = choice.finish_reason or self._reason, choice.stop_reason or self._stop
        for delta in choice.delta.tool_calls or ():
            if delta.index == len(self._calls):
                custom = CustomCall() if delta.custom else None
                self._calls.append(ToolCall(id=delta.id or "", type=delta.type or "function", custom=custom))
            if custom := self._calls[delta.index].custom:
                custom.name += (delta.custom and delta.custom.name) or ""
                custom.input += (delta.custom and delta.custom.input) or ""
            _extend(self._calls[delta.index].function, delta.function)
        if choice.delta.function_call is not None:
            self._older_call = self._older_call or FunctionCall()
            _extend(self._older_call, choice.delta.function_call)
        if choice.logprobs is not None:
            self._logprobs = self._logprobs or ChoiceLogprobs(content=[])
            self._logprobs.content += choice.logprobs.content

    def choice(self, index: int) -> Choice:
        assert self._reason is not None
        has_calls = bool(self._calls or self._older_call)
        message = AssistantMessage(
            content=None if has_calls and not self._content else self._content,
            reasoning_content=self._reasoning or None,
            tool_calls=self._calls or None,
            function_call=self._older_call,
        )
        end: dict[str, Any] = {"finish_reason": self._reason, "stop_reason": self._stop}
        return Choice(index=index, message=message, logprobs=self._logprobs, **end)


def _extend(call: FunctionCall, delta: FunctionDelta) -> None:
    call.name += delta.name or ""
    call.arguments += delta.arguments or ""


async def collect_completion(chunks: AsyncIterator[Completion]) -> Completion:
    """Returns the whole answer of a stream of text completions."""
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
