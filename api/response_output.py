"""The output items of a response (reasoning, messages, function calls) as they grow, with their events.

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
    """Collects the items of a response; each change yields its events."""

    def __init__(self) -> None:
        self.items: list[OutputItem] = []
        self._open: Open | None = None

    def add(self, choice: ChunkChoice) -> Iterator[ResponsesEvent]:
        delta = choice.delta
        logprobs = choice.logprobs.content if choice.logprobs else []
        if delta.reasoning_content:
            yield from self._added(OpenReasoning, delta.reasoning_content, [])
        is_text = isinstance(self._open, OpenMessage) and not delta.reasoning_content and not delta.tool_calls
        if delta.content or (logprobs and is_text):  # the format has no place for logprobs of calls and reasoning
            yield from self._added(OpenMessage, delta.content or "", logprobs)
        for call in delta.tool_calls or ():
            if call.id is not None:
                yield from self._begin(partial(OpenCall, call_id=call.id, name=call.function.name or ""))
            yield from self._added(OpenCall, call.function.arguments or "", [])

    def end(self, status: Status) -> Iterator[ResponsesEvent]:
        """Closes the last item; an answer without any text gets one empty message."""
        if not self.items and self._open is None:
            yield from self._begin(OpenMessage)
        yield from self._close(status)

    def _added(self, item_class: "ItemClass", text: str, logprobs: list[TokenLogprob]) -> Iterator[ResponsesEvent]:
        if not isinstance(self._open, item_class):
            yield from self._begin(item_class)
        assert self._open is not None
        yield from self._open.add(text, logprobs)

    def _begin(self, open_item: "Callable[[int], Open]") -> Iterator[ResponsesEvent]:
        yield from self._close("completed")
        self._open = open_item(len(self.items))
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
        self._position: dict[str, Any] = {"output_index": index, "content_index": 0, "item_id": self.item.id}

    def opening(self) -> Iterator[ResponsesEvent]:
        yield _item_event("added", self._position["output_index"], self.item)
        yield ContentPartEvent(type="response.content_part.added", **self._position, part=OutputText())

    def add(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[ResponsesEvent]:
        self._part.text += text
        self._part.logprobs += logprobs
        if text:
            yield OutputTextDelta(**self._position, delta=text, logprobs=logprobs)

    def closing(self, status: Status) -> Iterator[ResponsesEvent]:
        self.item.status, self.item.content = status, [self._part]
        yield OutputTextDone(**self._position, text=self._part.text, logprobs=self._part.logprobs)
        yield ContentPartEvent(type="response.content_part.done", **self._position, part=self._part)
        yield _item_event("done", self._position["output_index"], self.item)


class OpenReasoning:
    def __init__(self, index: int) -> None:
        self.item = OutputReasoning()
        self._part = ReasoningText()
        self._position: dict[str, Any] = {"output_index": index, "content_index": 0, "item_id": self.item.id}

    def opening(self) -> Iterator[ResponsesEvent]:
        yield _item_event("added", self._position["output_index"], self.item)
        yield ContentPartEvent(type="response.content_part.added", **self._position, part=ReasoningText())

    def add(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[ResponsesEvent]:
        self._part.text += text
        yield ReasoningTextDelta(**self._position, delta=text)

    def closing(self, status: Status) -> Iterator[ResponsesEvent]:
        self.item.status, self.item.content = status, [self._part]
        yield ReasoningTextDone(**self._position, text=self._part.text)
        yield ContentPartEvent(type="response.content_part.done", **self._position, part=self._part)
        yield _item_event("done", self._position["output_index"], self.item)


class OpenCall:
    def __init__(self, index: int, call_id: str = "", name: str = "") -> None:
        self.item = OutputFunctionCall(call_id=call_id, name=name)
        self._position: dict[str, Any] = {"output_index": index, "item_id": self.item.id}

    def opening(self) -> Iterator[ResponsesEvent]:
        yield _item_event("added", self._position["output_index"], self.item)

    def add(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[ResponsesEvent]:
        self.item.arguments += text
        if text:
            yield ArgumentsDelta(**self._position, delta=text)

    def closing(self, status: Status) -> Iterator[ResponsesEvent]:
        self.item.status = status
        yield ArgumentsDone(**self._position, name=self.item.name, arguments=self.item.arguments)
        yield _item_event("done", self._position["output_index"], self.item)


def _item_event(change: str, index: int, item: OutputItem) -> OutputItemEvent:
    return OutputItemEvent(type=f"response.output_item.{change}", output_index=index, item=item.model_copy())


ItemClass = type[OpenMessage] | type[OpenReasoning] | type[OpenCall]
