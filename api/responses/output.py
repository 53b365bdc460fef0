"""The output items of a response (reasoning, messages, calls) as they grow, with their events.

Source: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

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
    """Collects the items of a response; each change yields its events."""

    def __init__(self, tools: Mapping[str, OfferedTool] | None = None, encrypts_reasoning: bool = False) -> None:
        """tools: those that the model may call, by the names that it sees."""
        self.items: list[OutputItem] = []
        self._tools = tools or {}
        self._encrypts_reasoning = encrypts_reasoning
        self._open: Open | None = None

    def add(self, choice: ChunkChoice) -> Iterator[ResponsesEvent]:
        delta = choice.delta
        logprobs = choice.logprobs.content if choice.logprobs else []
        if delta.reasoning_content:
            if not isinstance(self._open, OpenReasoning):
                yield from self._begin(partial(OpenReasoning, is_encrypted=self._encrypts_reasoning))
            yield from self._added(OpenReasoning, delta.reasoning_content, [])
        is_text = isinstance(self._open, OpenMessage) and not delta.reasoning_content and not delta.tool_calls
        if delta.content or (logprobs and is_text):  # the format has no place for logprobs of calls and reasoning
            yield from self._added(OpenMessage, delta.content or "", logprobs)
        for call in delta.tool_calls or ():
            if call.id is not None:
                yield from self._begin(self._call(call.id, call))
            if isinstance(self._open, OpenCall | OpenCustomCall):
                yield from self._open.add(call.function.arguments or "", [])

    def _call(self, call_id: str, call: ToolCallDelta) -> "Callable[[int], Open]":
        """Returns what makes the item of a call, with the names that the request has for its tool."""
        name = call.function.name or ""
        tool = self._tools.get(name)
        if tool is None:
            return partial(OpenCall, call_id=call_id, name=name)
        kind = OpenCustomCall if tool.is_custom else OpenCall
        return partial(kind, call_id=call_id, name=tool.name, namespace=tool.namespace)

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

    def opening(self) -> Iterator[ResponsesEvent]:
        yield _item_event("added", self._position["output_index"], self.item)

    def add(self, text: str, logprobs: list[TokenLogprob]) -> Iterator[ResponsesEvent]:
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


def _known(item_id: str | None) -> dict[str, Any]:
    return {} if item_id is None else {"id": item_id}


def _item_event(change: str, index: int, item: OutputItem) -> OutputItemEvent:
    return OutputItemEvent(type=f"response.output_item.{change}", output_index=index, item=item.model_copy())


ItemClass = type[OpenMessage] | type[OpenReasoning]
