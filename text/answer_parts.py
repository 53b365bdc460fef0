"""AnswerParts: what has been found in an answer's text: reasoning, content and calls of tools.

A call that no grammar keeps valid is held: it is given when it has been read whole, and can be taken back until then.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from text.answer_text import AnswerText, End, NoCall, Steps
from text.argument_schemas import fits
from text.argument_values import fitted, value_of
from text.lenient_json import is_json
from text.tool_formats import ToolFormat


@dataclass(frozen=True)
class CallDelta:
    """What is added to a call: its name once, then pieces of its arguments, which are JSON."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class ContentDelta:
    """What a piece of the text is; one of the three."""

    content: str = ""
    reasoning: str = ""
    call: CallDelta | None = None


@dataclass(frozen=True)
class ParserOptions:
    """How an answer is to be read."""

    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the schema of each one's arguments
    format: ToolFormat | None = None  # None: whatever comes is no call
    is_parallel: bool = True  # else the first call ends the answer
    is_forced: bool = False  # the answer consists of calls
    is_strict: bool = False  # calls without a mark must have the one form that the grammar keeps valid
    is_guarded: bool = False  # a grammar keeps valid what follows the mark of a call
    is_structured: bool = False  # what begins as no call is JSON of another kind
    think: tuple[str, str] | None = None  # the marks around reasoning
    is_thinking: bool = False  # the prompt has the first of them
    marks: Mapping[str, str] = field(default_factory=dict)  # characters that stand for marks, and what they show as


class AnswerParts(AnswerText):
    def __init__(self, reading: ParserOptions) -> None:
        super().__init__()
        self._reading = reading
        self._parts: list[ContentDelta] = []
        self._blanks = ""  # of the content; shown before its next character
        self._ends_with_call = False  # the line so far
        self._is_at_start = False  # of what follows reasoning or a call: its leading blanks are not shown
        self._has_content = False
        self._num_calls = 0  # begun
        self._name = ""  # of the last one
        self._arguments: list[str] = []
        self._num_barren = 0  # characters of the text that are known to be no call
        self._inner: set[int] = set()  # places in JSON that has been read: no call without a mark begins there
        self._is_unguarded = False  # no grammar held where this text was written
        self._restored = str.maketrans(dict(reading.marks))
        self.num_complete = 0

    @property
    def is_done(self) -> bool:
        """Nothing that follows belongs to the answer."""
        return bool(self.num_complete) and not self._reading.is_parallel

    def _shown(self, text: str) -> str:
        return text if text.isascii() else text.translate(self._restored)

    def _add(self, part: ContentDelta) -> None:
        """Neighbours of one kind become one part."""
        last = self._parts[-1] if self._parts else None
        if last and part.content and last.content:
            self._parts[-1] = ContentDelta(content=last.content + part.content)
        elif last and part.reasoning and last.reasoning:
            self._parts[-1] = ContentDelta(reasoning=last.reasoning + part.reasoning)
        elif last and last.call and part.call and part.call.name is None:
            self._parts[-1] = ContentDelta(call=replace(last.call, arguments=last.call.arguments + part.call.arguments))
        else:
            self._parts.append(part)

    def _add_content(self, text: str) -> None:
        """Blanks around calls and behind reasoning are the format's, not the content's."""
        if self._reading.is_forced:  # the answer is calls alone: this is the beginning of one that was cut short
            return
        if shown := self._without_blanks(text, holds=self._reading.format is not None):
            self._has_content = True
            self._add(ContentDelta(content=self._shown(shown)))

    def _add_reasoning(self, text: str) -> None:
        if shown := self._without_blanks(text, holds=True):
            self._add(ContentDelta(reasoning=self._shown(shown)))

    def _without_blanks(self, text: str, holds: bool) -> str:
        """Those at its end are kept for what follows; nothing follows those that are the beginning."""
        text = self._blanks + text
        if self._is_at_start:
            text = text.lstrip()
        shown = text.rstrip() if holds else text
        self._blanks = text[len(shown) :]
        self._is_at_start = self._is_at_start and not shown
        return shown

    def _begin_call(self, name: str) -> None:
        self._blanks, self._is_at_start = "", not self._has_content
        self._name, self._arguments = name, []
        if not self._is_held:
            self._add(ContentDelta(call=CallDelta(self._num_calls, name)))
        self._num_calls += 1
        self._ends_with_call = True

    def _add_arguments(self, text: str) -> None:
        text = self._shown(text)
        self._arguments.append(text)
        if text and not self._is_held:
            self._add(ContentDelta(call=CallDelta(self._num_calls - 1, arguments=text)))

    def _end_call(self) -> None:
        """Raises NoCall if the arguments are no JSON."""
        if not any(self._arguments):
            self._add_arguments("{}")
        arguments = "".join(self._arguments)
        if not (arguments.lstrip().startswith("{") and is_json(arguments)):
            raise NoCall
        if self._is_held:
            self._arguments = [fitted(arguments, self._reading.tools[self._name])]
        self.num_complete += 1

    def _whole(self, call: Steps[None], must_fit: bool) -> Steps[None]:
        """Gives a call when it has been read whole. Raises NoCall for what turns out to be none; nothing is taken
        then. must_fit: the arguments are those that the schema asks for."""
        before = self._blanks, self._ends_with_call, self._is_at_start, self._num_calls, self.num_complete
        self._is_held, self._taken = True, []
        try:
            yield from self._checked(call, must_fit)
        except NoCall:
            taken = "".join(self._taken)
            self._text, self._num_barren = taken + self._text, len(taken)
            self._blanks, self._ends_with_call, self._is_at_start, self._num_calls, self.num_complete = before
            raise
        finally:
            self._is_held = False
            if self._num_calls > before[3]:
                self._add(ContentDelta(call=CallDelta(before[3], self._name, "".join(self._arguments))))

    def _checked(self, call: Steps[None], must_fit: bool) -> Steps[None]:
        """Raises NoCall for a call that is complete and does not fit, where the answer's end has closed it, too."""
        num_before = self.num_complete
        try:
            yield from call
        except End:
            if self.num_complete > num_before:
                self._check(must_fit)
            raise
        self._check(must_fit)

    def _check(self, must_fit: bool) -> None:
        schema = self._reading.tools[self._name]
        if must_fit and not fits(value_of("".join(self._arguments)), schema, schema):
            raise NoCall

    def _called(self, call: Steps[None], is_marked: bool, is_strict: bool) -> Steps[None]:
        """As it comes, or whole. is_strict: of strict tools, a grammar has kept this form valid."""
        reading = self._reading
        is_guarded = reading.is_forced or reading.is_structured or is_strict or (is_marked and reading.is_guarded)
        if not is_guarded or self._is_unguarded:
            has_mark = reading.format is not None and bool(reading.format.begin)
            has_grammar = reading.is_forced or reading.is_structured or reading.is_strict
            yield from self._whole(call, must_fit=has_grammar or (has_mark and not is_marked))
            return
        num_before = self._num_calls
        try:
            yield from call
        except NoCall:
            if self._num_calls == num_before:
                raise

    def _may_be_name(self, text: str) -> bool:
        return any(name.startswith(text.rstrip()) for name in self._reading.tools)
