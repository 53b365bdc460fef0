"""The content blocks of an answer in Anthropic's form, as they grow, with their events."""

import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Protocol

from pydantic_core import from_json

from api import encrypted_reasoning
from api.messages.schemas import (
    BlockDelta,
    BlockStart,
    BlockStop,
    InputJsonDelta,
    MessagesEvent,
    OutputBlock,
    SignatureDelta,
    TextBlock,
    TextDelta,
    ThinkingBlock,
    ThinkingDelta,
    ToolUseBlock,
)
from schemas import ChunkChoice, Object
from text.surrogates import whole


class Blocks:
    """Collects the blocks of an answer; each change yields its events."""

    def __init__(self, omits_thoughts: bool = False) -> None:
        """omits_thoughts: a block of thoughts has its signature alone, from which the thoughts can be read again."""
        self._omits_thoughts = omits_thoughts
        self.finished: list[OutputBlock] = []
        self._open: OpenBlock | None = None

    def add(self, choice: ChunkChoice) -> Iterator[MessagesEvent]:
        delta = choice.delta
        if delta.reasoning_content:
            yield from self._added(lambda: OpenThinking(self._omits_thoughts), OpenThinking, delta.reasoning_content)
        if delta.content:
            yield from self._added(OpenText, OpenText, delta.content)
        for call in delta.tool_calls or ():
            if call.id is not None:
                yield from self._begin(OpenCall(ToolUseBlock(id=call.id, name=call.function.name or "")))
            if call.function.arguments and isinstance(self._open, OpenCall):
                yield from self._open.add(call.function.arguments, len(self.finished))

    def end(self) -> Iterator[MessagesEvent]:
        """Closes the last block; an answer without any text has none."""
        if self._open is not None:
            yield from self._open.closing(len(self.finished))
            yield BlockStop(index=len(self.finished))
            self.finished.append(self._open.block)
            self._open = None

    def _added(
        self, make: "Callable[[], OpenBlock]", kind: "type[OpenText | OpenThinking]", text: str
    ) -> Iterator[MessagesEvent]:
        if not isinstance(self._open, kind):
            yield from self._begin(make())
        assert self._open is not None
        yield from self._open.add(text, len(self.finished))

    def _begin(self, block: "OpenBlock") -> Iterator[MessagesEvent]:
        yield from self.end()
        self._open = block
        yield BlockStart(index=len(self.finished), content_block=block.block.model_copy())


class OpenBlock(Protocol):
    """A block that is not complete yet."""

    @property
    def block(self) -> OutputBlock: ...

    def add(self, text: str, index: int) -> Iterator[MessagesEvent]: ...

    def closing(self, index: int) -> Iterator[MessagesEvent]: ...


class OpenText:
    def __init__(self) -> None:
        self.block = TextBlock()

    def add(self, text: str, index: int) -> Iterator[MessagesEvent]:
        self.block.text += text
        yield BlockDelta(index=index, delta=TextDelta(text=text))

    def closing(self, index: int) -> Iterator[MessagesEvent]:
        yield from ()


class OpenThinking:
    def __init__(self, is_omitted: bool) -> None:
        self.block = ThinkingBlock()
        self._thoughts, self._is_omitted = "", is_omitted

    def add(self, text: str, index: int) -> Iterator[MessagesEvent]:
        self._thoughts += text
        if not self._is_omitted:
            self.block.thinking += text
            yield BlockDelta(index=index, delta=ThinkingDelta(thinking=text))

    def closing(self, index: int) -> Iterator[MessagesEvent]:
        signed = sha256(self._thoughts.encode()).hexdigest()
        self.block.signature = encrypted_reasoning.encoded(self._thoughts) if self._is_omitted else signed
        yield BlockDelta(index=index, delta=SignatureDelta(signature=self.block.signature))


class OpenCall:
    def __init__(self, block: ToolUseBlock) -> None:
        self.block = block
        self._arguments = ""

    def add(self, text: str, index: int) -> Iterator[MessagesEvent]:
        self._arguments += text
        yield BlockDelta(index=index, delta=InputJsonDelta(partial_json=text))

    def closing(self, index: int) -> Iterator[MessagesEvent]:
        self.block.input = _object(self._arguments)
        yield from ()


def _object(arguments: str) -> Object:
    """Returns the arguments of a call; those of one that was cut off as far as they came, as Anthropic's SDK does."""
    try:
        value = json.loads(arguments)
        written = json.dumps(value, ensure_ascii=False)
        if (encodable := whole(written)) != written:  # an unpaired surrogate, which was escaped
            value = json.loads(encodable)
    except (ValueError, RecursionError):
        value = _begun(arguments)
    return value if isinstance(value, dict) else {}


def _begun(arguments: str) -> object:
    try:
        return from_json(arguments, allow_partial=True)
    except ValueError:
        return None
