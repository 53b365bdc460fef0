"""The output of a response as it comes, item by item: reasoning, a message, calls of functions; and its events.

Source: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, Protocol

from api.response_schemas import (
    ArgumentsDelta,
    ArgumentsDone,
    ContentPartEvent,
    OutputFunctionCall,
    OutputItem,
    OutputItemEvent,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputTextDelta,
    OutputTextDone,
    ReasoningText,
    ReasoningTextDelta,
    ReasoningTextDone,
    ResponsesEvent,
)
from schemas import ChunkChoice, TokenLogprob

Status = Literal["completed", "incomplete"]


class Output:
    """The items of a response as they come: reasoning, calls of functions, a message."""

    def __init__(self) -> None:
        self.items: list[OutputItem] = []
        self._open: Open | None = None

    def add(self, choice: ChunkChoice) -> Iterator[ResponsesEvent]:
        delta = choice.delta
        logprobs = choice.logprobs.content if choice.logprobs else []
        if delta.reasoning_content:
            yield from self._added(OpenReasoning, delta.reasoning_content, [])
        is_text = isinstance(self._open, OpenMessage) and not delta.reasoning_content and not delta.tool_calls
        if delta.content or (logprobs and is_text):  # those of calls and thoughts have no place
            yield from self._added(OpenMessage, delta.content or "", logprobs)
        for call in delta.tool_calls or ():
            if call.id is not None:
                yield from self._begin(partial(OpenCall, call_id=call.id, name=call.function.name or ""))
            yield from self._added(OpenCall, call.function.arguments or "", [])

    def end(self, status: Status) -> Iterator[ResponsesEvent]:
        """An answer of nothing is an empty message."""
        if not self.items and self._open is None:
            yield from self._begin(OpenMessage)
        yield from self._close(status)

    def _added(self, kind: "Kind", text: str, logprobs: list[TokenLogprob]) -> Iterator[ResponsesEvent]:
        if not isinstance(self._open, kind):
            yield from self._begin(kind)
        assert self._open is not None
        yield from self._open.add(text, logprobs)

    def _begin(self, opened: "Callable[[int], Open]") -> Iterator[ResponsesEvent]:
        yield from self._close("completed")
        self._open = opened(len(self.items))
        yield from self._open.opening()

    def _close(self, status: Status) -> Iterator[ResponsesEvent]:
        if self._open is not None:
            yield from self._open.closing(status)
            self.items.append(self._open.item)
            self._open = None


class Open(Protocol):
    """An item that is not complete yet."""

    @property
    def item(self) -> OutputItem: ...

    def opening(self) -> Iterator[ResponsesEvent]: ...

    def add(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[ResponsesEvent]: ...

    def closing(self, status: Status) -> Iterator[ResponsesEvent]: ...


class OpenMessage:
    def __init__(self, index: int) -> None:
        self.item = OutputMessage()
        self._part = OutputText()
        self._where: dict[str, Any] = {"output_index": index, "content_index": 0, "item_id": self.item.id}

    def opening(self) -> Iterator[ResponsesEvent]:
        yield _item_event("added", self._where["output_index"], self.item)
        yield ContentPartEvent(type="response.content_part.added", **self._where, part=OutputText())

    def add(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[ResponsesEvent]:
        self._part.text += text
        self._part.logprobs += logprobs
        if text:
            yield OutputTextDelta(**self._where, delta=text, logprobs=logprobs)

    def closing(self, status: Status) -> Iterator[ResponsesEvent]:
        self.item.status, self.item.content = status, [self._part]
        yield OutputTextDone(**self._where, text=self._part.text, logprobs=self._part.logprobs)
        yield ContentPartEvent(type="response.content_part.done", **self._where, part=self._part)
        yield _item_event("done", self._where["output_index"], self.item)


class OpenReasoning:
    def __init__(self, index: int) -> None:
        self.item = OutputReasoning()
        self._part = ReasoningText()
        self._where: dict[str, Any] = {"output_index": index, "content_index": 0, "item_id": self.item.id}

    def opening(self) -> Iterator[ResponsesEvent]:
        yield _item_event("added", self._where["output_index"], self.item)
        yield ContentPartEvent(type="response.content_part.added", **self._where, part=ReasoningText())

    def add(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[ResponsesEvent]:
        self._part.text += text
        yield ReasoningTextDelta(**self._where, delta=text)

    def closing(self, status: Status) -> Iterator[ResponsesEvent]:
        self.item.status, self.item.content = status, [self._part]
        yield ReasoningTextDone(**self._where, text=self._part.text)
        yield ContentPartEvent(type="response.content_part.done", **self._where, part=self._part)
        yield _item_event("done", self._where["output_index"], self.item)


class OpenCall:
    def __init__(self, index: int, call_id: str = "", name: str = "") -> None:
        self.item = OutputFunctionCall(call_id=call_id, name=name)
        self._where: dict[str, Any] = {"output_index": index, "item_id": self.item.id}

    def opening(self) -> Iterator[ResponsesEvent]:
        yield _item_event("added", self._where["output_index"], self.item)

    def add(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[ResponsesEvent]:
        self.item.arguments += text
        if text:
            yield ArgumentsDelta(**self._where, delta=text)

    def closing(self, status: Status) -> Iterator[ResponsesEvent]:
        self.item.status = status
        yield ArgumentsDone(**self._where, name=self.item.name, arguments=self.item.arguments)
        yield _item_event("done", self._where["output_index"], self.item)


def _item_event(what: str, index: int, item: OutputItem) -> OutputItemEvent:
    return OutputItemEvent(type=f"response.output_item.{what}", output_index=index, item=item.model_copy())


Kind = type[OpenMessage] | type[OpenReasoning] | type[OpenCall]
