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
class CallOptions:
    """Which calls an answer may have, and what a grammar keeps valid of them."""

    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # the schema of each one's arguments
    is_parallel: bool = field(default=True, kw_only=True)  # else the first call ends the answer
    is_forced: bool = field(default=False, kw_only=True)  # the answer consists of calls
    is_strict: bool = field(default=False, kw_only=True)  # a grammar also keeps calls without a mark valid
    is_guarded: bool = field(default=False, kw_only=True)  # a grammar keeps valid what follows the mark of a call
    is_structured: bool = field(default=False, kw_only=True)  # an answer without calls is the JSON that was asked for
    marks: Mapping[str, str] = field(default_factory=dict, kw_only=True)  # characters -> the marks that they stand for


class AnswerParts(AnswerText):
    def __init__(self, options: CallOptions, mark: str | None) -> None:
        """mark: what calls begin with, "" where they have no mark; None: all text is content."""
        super().__init__()
        self.options = options
        self.places_in_json: set[int] = set()  # of brackets in values that were read: no call without a mark is there
        self.num_complete = 0  # calls
        self._mark = mark
        self._parts: list[ContentDelta] = []
        self._blanks = ""  # of the content; shown before its next character
        self._ends_with_call = False  # the line so far
        self._is_at_start = False  # of what follows reasoning or a call: its leading blanks are not shown
        self._has_content = False
        self._num_calls = 0  # begun
        self._name = ""  # of the last call
        self._arguments: list[str] = []
        self._num_barren = 0  # characters of the text that are known to be no call
        self._is_unguarded = False  # no grammar held where this text was written
        self._restored = str.maketrans(dict(options.marks))

    @property
    def is_done(self) -> bool:
        """Whether nothing that follows belongs to the answer."""
        return bool(self.num_complete) and not self.options.is_parallel

    def shown(self, text: str) -> str:
        """Returns the text with its marks as they look."""
        return text if text.isascii() else text.translate(self._restored)

    def _add(self, part: ContentDelta) -> None:
        """Adds a part; neighbours of one kind become one."""
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
        """Adds content without the blanks around calls and behind reasoning, which belong to the format."""
        if self.options.is_forced:  # the answer is calls alone: this is the beginning of one that was cut short
            return
        if shown := self._without_blanks(text, holds=self._mark is not None):
            self._has_content = True
            self._add(ContentDelta(content=self.shown(shown)))

    def _add_reasoning(self, text: str) -> None:
        if shown := self._without_blanks(text, holds=True):
            self._add(ContentDelta(reasoning=self.shown(shown)))

    def _without_blanks(self, text: str, holds: bool) -> str:
        """Returns the text without blanks that may be the format's: at its end (kept for what follows), and at the
        start."""
        text = self._blanks + text
        if self._is_at_start:
            text = text.lstrip()
        shown = text.rstrip() if holds else text
        self._blanks = text[len(shown) :]
        self._is_at_start = self._is_at_start and not shown
        return shown

    def begin_call(self, name: str) -> None:
        self._blanks, self._is_at_start = "", not self._has_content
        self._name, self._arguments = name, []
        if not self.is_held:
            self._add(ContentDelta(call=CallDelta(self._num_calls, name)))
        self._num_calls += 1
        self._ends_with_call = True

    def add_arguments(self, text: str) -> None:
        text = self.shown(text)
        self._arguments.append(text)
        if text and not self.is_held:
            self._add(ContentDelta(call=CallDelta(self._num_calls - 1, arguments=text)))

    def end_call(self) -> None:
        """Raises NoCall if the arguments are no JSON."""
        if not any(self._arguments):
            self.add_arguments("{}")
        arguments = "".join(self._arguments)
        if not (arguments.lstrip().startswith("{") and is_json(arguments)):
            raise NoCall
        if self.is_held:
            self._arguments = [fitted(arguments, self.options.tools[self._name])]
        self.num_complete += 1

    def _whole(self, call: Steps[None], must_fit: bool) -> Steps[None]:
        """Gives a call when it has been read whole.

        must_fit: its arguments must be those that the schema asks for. Raises NoCall, with all of its text put back,
        for what turns out to be no call.
        """
        before = self._blanks, self._ends_with_call, self._is_at_start, self._num_calls, self.num_complete
        self.is_held, self._taken = True, []
        try:
            yield from self._checked(call, must_fit)
        except NoCall:
            taken = "".join(self._taken)
            self.text, self._num_barren = taken + self.text, len(taken)
            self._blanks, self._ends_with_call, self._is_at_start, self._num_calls, self.num_complete = before
            raise
        finally:
            self.is_held = False
            if self._num_calls > before[3]:
                self._add(ContentDelta(call=CallDelta(before[3], self._name, "".join(self._arguments))))

    def _checked(self, call: Steps[None], must_fit: bool) -> Steps[None]:
        """Raises NoCall for a call that is complete and does not fit, also for one that the answer's end has closed."""
        num_before = self.num_complete
        try:
            yield from call
        except End:
            if self.num_complete > num_before:
                self._check(must_fit)
            raise
        self._check(must_fit)

    def _check(self, must_fit: bool) -> None:
        schema = self.options.tools[self._name]
        if must_fit and not fits(value_of("".join(self._arguments)), schema, schema):
            raise NoCall

    def deliver(self, call: Steps[None], is_marked: bool, is_strict: bool) -> Steps[None]:
        """Gives the call that these steps read: as it comes where a grammar keeps it valid, else when it is whole.

        is_strict: the tools are strict, and a grammar has kept this form valid.
        """
        options = self.options
        is_guarded = options.is_forced or options.is_structured or is_strict or (is_marked and options.is_guarded)
        if not is_guarded or self._is_unguarded:
            has_grammar = options.is_forced or options.is_structured or options.is_strict
            yield from self._whole(call, must_fit=has_grammar or (bool(self._mark) and not is_marked))
            return
        num_before = self._num_calls
        try:
            yield from call
        except NoCall:
            if self._num_calls == num_before:
                raise

    def may_be_name(self, text: str) -> bool:
        """Returns whether a tool's name begins with this text."""
        return any(name.startswith(text.rstrip()) for name in self.options.tools)
