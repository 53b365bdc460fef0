"""The output items of a response (reasoning, messages, calls) as they grow, with their events.

Source: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, Protocol

from api import encrypted_reasoning
from api.responses.schemas import (
    ArgumentsDelta,
    ArgumentsDone,
    ContentPartEvent,
    CustomInputDelta,
    CustomInputDone,
    OutputCustomCall,
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
from api.responses.tools import OfferedTool
from schemas import ChunkChoice, TokenLogprob, ToolCallDelta
from text.custom_tools import TextArgument

Status = Literal["completed", "incomplete"]


class Output:
    """Collects the items of a response; each change yields its events.

    Deltas of several calls may alternate, and text may come between two of one call: a call stays open until its
    arguments are complete, or until the end.
    """

    def __init__(self, tools: Mapping[str, OfferedTool] | None = None, encrypts_reasoning: bool = False) -> None:
        """tools: those that the model may call, by the names that it sees."""
        self._tools = tools or {}
        self._encrypts_reasoning = encrypts_reasoning
        self._begun: list[Open] = []  # all, in the order of their items
        self._open: dict[int, Open] = {}  # position -> one that is not complete yet
        self._said: Open | None = None  # the message or the reasoning that is open
        self._calls: dict[int, Call] = {}  # index of a call in the chat -> its item, open or not

    @property
    def items(self) -> list[OutputItem]:
        return [begun.item for begun in self._begun]

    def add(self, choice: ChunkChoice) -> Iterator[ResponsesEvent]:
        delta = choice.delta
        logprobs = choice.logprobs.content if choice.logprobs else []
        if delta.reasoning_content:
            if not isinstance(self._said, OpenReasoning):
                yield from self._say(partial(OpenReasoning, is_encrypted=self._encrypts_reasoning))
            yield from self._added(OpenReasoning, delta.reasoning_content, [])
        is_text = isinstance(self._said, OpenMessage) and not delta.reasoning_content and not delta.tool_calls
        if delta.content or (logprobs and is_text):  # the format has no place for logprobs of calls and reasoning
            yield from self._added(OpenMessage, delta.content or "", logprobs)
        for call in delta.tool_calls or ():
            yield from self._add_call(call)

    def _add_call(self, call: ToolCallDelta) -> Iterator[ResponsesEvent]:
        known = self._calls.get(call.index)
        if call.id is not None and (known is None or known.item.call_id != call.id):
            if known is not None:  # one index for several calls: the next one tells that the last one is complete
                yield from self._close(known, "completed")
            self._calls[call.index] = known = self._call(call.id, call)(len(self._begun))
            yield from self._begin(known)
        if known is not None and known in self._open.values():
            yield from known.add(call.function.arguments or "", [])

    def _call(self, call_id: str, call: ToolCallDelta) -> "Callable[[int], Call]":
        """Returns what makes the item of a call, with the names that the request has for its tool."""
        name = call.function.name or ""
        tool = self._tools.get(name)
        if tool is None:
            return partial(OpenCall, call_id=call_id, name=name)
        kind = OpenCustomCall if tool.is_custom else OpenCall
        return partial(kind, call_id=call_id, name=tool.name, namespace=tool.namespace)

    def end(self, status: Status) -> Iterator[ResponsesEvent]:
        """Closes what is open; an answer without any text gets one empty message."""
        if not self._begun:
            yield from self._say(OpenMessage)
        last = self._begun[-1]
        for opened in [*self._open.values()]:
            is_cut = opened is last or not opened.is_complete
            yield from self._close(opened, status if is_cut else "completed")

    def _added(self, item_class: "ItemClass", text: str, logprobs: list[TokenLogprob]) -> Iterator[ResponsesEvent]:
        if not isinstance(self._said, item_class):
            yield from self._say(item_class)
        assert self._said is not None
        yield from self._said.add(text, logprobs)

    def _say(self, open_item: "Callable[[int], Open]") -> Iterator[ResponsesEvent]:
        said = open_item(len(self._begun))
        yield from self._begin(said)
        self._said = said

    def _begin(self, opened: "Open") -> Iterator[ResponsesEvent]:
        """Opens an item, after closing those that are complete."""
        for other in [*self._open.values()]:
            if other is self._said or other.is_complete:
                yield from self._close(other, "completed")
        self._open[len(self._begun)] = opened
        self._begun.append(opened)
        yield from opened.opening()

    def _close(self, opened: "Open", status: Status) -> Iterator[ResponsesEvent]:
        positions = [position for position, other in self._open.items() if other is opened]
        for position in positions:
            del self._open[position]
            yield from opened.closing(status)
        if opened is self._said:
            self._said = None


class Open(Protocol):
    """An item that is not complete yet."""

    @property
    def item(self) -> OutputItem: ...

    @property
    def is_complete(self) -> bool:
        """Whether nothing can be added to it."""
        ...

    def opening(self) -> Iterator[ResponsesEvent]: ...

    def add(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[ResponsesEvent]: ...

    def closing(self, status: Status) -> Iterator[ResponsesEvent]: ...


class OpenMessage:
    is_complete = False

    def __init__(self, index: int, item_id: str | None = None) -> None:
        """item_id: of an item that had one already, here and below."""
        self.item = OutputMessage(**_known(item_id))
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
    is_complete = False

    def __init__(self, index: int, is_encrypted: bool = False, item_id: str | None = None) -> None:
        """is_encrypted: the item gets `encrypted_content`."""
        self.item = OutputReasoning(**_known(item_id))
        self._is_encrypted = is_encrypted
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
        if self._is_encrypted:
            self.item.encrypted_content = encrypted_reasoning.encoded(self._part.text)
        yield ReasoningTextDone(**self._position, text=self._part.text)
        yield ContentPartEvent(type="response.content_part.done", **self._position, part=self._part)
        yield _item_event("done", self._position["output_index"], self.item)


class OpenCall:
    def __init__(
        self, index: int, *, call_id: str, name: str, namespace: str | None = None, item_id: str | None = None
    ) -> None:
        self.item = OutputFunctionCall(call_id=call_id, name=name, namespace=namespace, **_known(item_id))
        self._position: dict[str, Any] = {"output_index": index, "item_id": self.item.id}

    @property
    def is_complete(self) -> bool:
        return _is_object(self.item.arguments)

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


class OpenCustomCall:
    """A call of a custom tool: `add` gets the arguments of the function that stands for it."""

    def __init__(
        self, index: int, *, call_id: str, name: str, namespace: str | None = None, item_id: str | None = None
    ) -> None:
        self.item = OutputCustomCall(call_id=call_id, name=name, namespace=namespace, **_known(item_id))
        self._position: dict[str, Any] = {"output_index": index, "item_id": self.item.id}
        self._argument = TextArgument()
        self._written = ""

    @property
    def is_complete(self) -> bool:
        return _is_object(self._written)

    def opening(self) -> Iterator[ResponsesEvent]:
        yield _item_event("added", self._position["output_index"], self.item)

    def add(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[ResponsesEvent]:
        self._written += text
        yield from self._delta(self._argument.add(text))

    def _delta(self, text: str) -> Iterator[ResponsesEvent]:
        self.item.input += text
        if text:
            yield CustomInputDelta(**self._position, delta=text)

    def closing(self, status: Status) -> Iterator[ResponsesEvent]:
        yield from self._delta(self._argument.end())
        self.item.status = status
        yield CustomInputDone(**self._position, input=self.item.input)
        yield _item_event("done", self._position["output_index"], self.item)


def _is_object(arguments: str) -> bool:
    """Returns whether the arguments are a whole JSON object, behind which nothing can come."""
    if not arguments.rstrip().endswith("}"):
        return False
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _known(item_id: str | None) -> dict[str, Any]:
    return {} if item_id is None else {"id": item_id}


def _item_event(change: str, index: int, item: OutputItem) -> OutputItemEvent:
    return OutputItemEvent(type=f"response.output_item.{change}", output_index=index, item=item.model_copy())


ItemClass = type[OpenMessage] | type[OpenReasoning]
Call = OpenCall | OpenCustomCall
