"""AnswerParser: an answer's text, as it comes, into reasoning, content and calls of tools.

One parser reads streams and whole answers, so how the text is cut makes no difference. Each of its steps takes what is
certain from the text and waits for more where it is not.

There is one rule for calls that are not written as the model was taught (docs/tool-calls.md has it with examples): what
can be read in one way alone is repaired, and what cannot stays content, all of it. Arguments that reach a client are
JSON, and fit the tool's schema where they could be read so. A call is therefore given when it has been read whole,
unless a grammar keeps it valid: then its arguments are given as they come. A call without the mark that the format
begins it with must fit its schema, since it may be an example in a text. An answer that ends in the middle of a call
gives the beginning of that call.
"""

import json
import re
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from argument_values import argument_of, fits, fitted, value_of
from lenient_json import BLANKS, JsonReader, is_json, json_of, read_json
from python_calls import python_calls
from schemas import FinishReason
from streaming import overlap
from tool_formats import Elements, ToolFormat

ARGUMENT_KEYS = ("arguments", "parameters")
CALL_KEYS = (*ARGUMENT_KEYS, "name", "id", "type")
NAME_KEYS = ("name", "function")
MOST_OF_NAME = 200  # characters
FENCE = "```"
_NAME_END, _NO_BLANK = re.compile(r"[^\w.:/-]", re.ASCII), re.compile(rf"[^{BLANKS}]")
FENCED = ("json", "tool_code", "tool_call", "tool_calls", "python", "")  # languages of fences that may hold calls

T = TypeVar("T")
Steps = Generator[None, None, T]  # yields to wait for text


@dataclass(frozen=True)
class CallDelta:
    """What is added to a call: its name once, then pieces of its arguments, which are JSON."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Part:
    """What a piece of the text is; one of the three."""

    content: str = ""
    reasoning: str = ""
    call: CallDelta | None = None


@dataclass(frozen=True)
class Reading:
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


class _NoCall(Exception):
    pass


class _End(Exception):
    """There is no more text."""


@dataclass
class _Head:
    """What has been read of a call in JSON."""

    name: str | None = None
    arguments: str | None = None  # JSON, if they came before the name
    has_begun: bool = False  # its arguments have been read behind its name
    is_nested: bool = False  # it is inside of another object, as on the wire


class AnswerParser:
    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._text = ""  # not taken yet
        self._is_ended = False
        self._is_whole = False  # the model itself ended the answer
        self._parts: list[Part] = []
        self._blanks = ""  # of the content; shown before its next character
        self._ends_with_call = False  # the line so far
        self._is_at_start = False  # of what follows reasoning or a call: its leading blanks are not shown
        self._has_content = False
        self._num_calls = 0  # begun
        self._name = ""  # of the last one
        self._arguments: list[str] = []
        self._is_held = False  # the call is not given before it has been read whole
        self._taken: list[str] = []  # the text of a call that is held
        self._num_barren = 0  # characters of the text that are known to be no call
        self._is_unguarded = False  # no grammar held where this text was written
        self.num_complete = 0
        self.is_reasoning = reading.is_thinking
        self._restored = str.maketrans(dict(reading.marks))
        self._steps = self._answer()

    def put(self, text: str) -> list[Part]:
        self._text += text
        return self._run()

    def end(self, is_whole: bool = False) -> list[Part]:
        """is_whole: the model itself ended the answer, so that what it left open is closed."""
        self._is_ended, self._is_whole = True, is_whole
        return self._run()

    @property
    def is_done(self) -> bool:
        """Nothing that follows belongs to the answer."""
        return bool(self.num_complete) and not self._reading.is_parallel

    def finish_reason(self, reason: FinishReason | None) -> FinishReason | None:
        """`tool_calls` for calls that are all complete, and only if the model ended by itself."""
        has_calls = 0 < self._num_calls == self.num_complete
        return "tool_calls" if reason == "stop" and has_calls else reason

    def _run(self) -> list[Part]:
        next(self._steps, None)
        parts, self._parts = self._parts, []
        return parts

    # --- what is found

    def _shown(self, text: str) -> str:
        return text if text.isascii() else text.translate(self._restored)

    def _add(self, part: Part) -> None:
        """Neighbours of one kind become one part."""
        last = self._parts[-1] if self._parts else None
        if last and part.content and last.content:
            self._parts[-1] = Part(content=last.content + part.content)
        elif last and part.reasoning and last.reasoning:
            self._parts[-1] = Part(reasoning=last.reasoning + part.reasoning)
        elif last and last.call and part.call and part.call.name is None:
            self._parts[-1] = Part(call=replace(last.call, arguments=last.call.arguments + part.call.arguments))
        else:
            self._parts.append(part)

    def _add_content(self, text: str) -> None:
        """Blanks around calls and behind reasoning are the format's, not the content's."""
        if self._reading.is_forced:  # the answer is calls alone: this is the beginning of one that was cut short
            return
        if shown := self._without_blanks(text, holds=self._reading.format is not None):
            self._has_content = True
            self._add(Part(content=self._shown(shown)))

    def _add_reasoning(self, text: str) -> None:
        if shown := self._without_blanks(text, holds=True):
            self._add(Part(reasoning=self._shown(shown)))

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
            self._add(Part(call=CallDelta(self._num_calls, name)))
        self._num_calls += 1
        self._ends_with_call = True

    def _add_arguments(self, text: str) -> None:
        text = self._shown(text)
        self._arguments.append(text)
        if text and not self._is_held:
            self._add(Part(call=CallDelta(self._num_calls - 1, arguments=text)))

    def _end_call(self) -> None:
        """Raises _NoCall if the arguments are no JSON."""
        if not any(self._arguments):
            self._add_arguments("{}")
        arguments = "".join(self._arguments)
        if not (arguments.lstrip().startswith("{") and is_json(arguments)):
            raise _NoCall
        if self._is_held:
            self._arguments = [fitted(arguments, self._reading.tools[self._name])]
        self.num_complete += 1

    def _whole(self, call: Steps[None], must_fit: bool) -> Steps[None]:
        """Gives a call when it has been read whole. Raises _NoCall for what turns out to be none; nothing is taken
        then. must_fit: the arguments are those that the schema asks for."""
        before = self._blanks, self._ends_with_call, self._is_at_start, self._num_calls, self.num_complete
        self._is_held, self._taken = True, []
        try:
            yield from call
            self._check(must_fit)
        except _NoCall:
            taken = "".join(self._taken)
            self._text, self._num_barren = taken + self._text, len(taken)
            self._blanks, self._ends_with_call, self._is_at_start, self._num_calls, self.num_complete = before
            raise
        finally:
            self._is_held = False
            if self._num_calls > before[3]:
                self._add(Part(call=CallDelta(before[3], self._name, "".join(self._arguments))))

    def _check(self, must_fit: bool) -> None:
        schema = self._reading.tools[self._name]
        if must_fit and not fits(value_of("".join(self._arguments)), schema, schema):
            raise _NoCall

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
        except _NoCall:
            if self._num_calls == num_before:
                raise

    # --- the steps

    def _answer(self) -> Steps[None]:
        try:
            if self._reading.think is not None:
                yield from self._thinking(*self._reading.think)
            yield from self._after_thinking()
        except _End:
            if self._blanks and not self._num_calls and not self.is_reasoning:
                self._add(Part(content=self._blanks))

    def _after_thinking(self) -> Steps[None]:
        style = self._reading.format
        if style is None:
            yield from self._plain()
        elif style.is_named:
            yield from self._named()
        else:
            yield from self._lines(style)

    def _thinking(self, begin: str, end: str) -> Steps[None]:
        if not self.is_reasoning:
            try:
                at = yield from self._after_blanks(0)
                if not (yield from self._starts_with(begin, at)):
                    return
            except _End:
                self._add_content(self._take(len(self._text)))
                raise
            self._take(at + len(begin))
        self.is_reasoning = self._is_at_start = True
        yield from self._thoughts(end)
        self.is_reasoning, self._blanks, self._is_at_start = False, "", not self._has_content

    def _thoughts(self, end: str) -> Steps[None]:
        """Up to their end. Where the answer ends before them, they end with the first call in them, if one is there:
        its mark begins a line, or is a token that stands for nothing else. Such a call is held until that is known."""
        style = self._reading.format
        if style is None or not style.begin or self._reading.is_strict:
            yield from self._until((end,), self._add_reasoning)
            return
        line = _Line()
        while True:
            mark = yield from self._until((end, style.begin), lambda text: self._add_reasoning(line.add(text)))
            if mark == end:
                return
            is_token = mark in self._reading.marks
            if not (is_token or line.is_blank) or not (yield from self._begins_call(style)):
                self._add_reasoning(line.add(mark))
                continue
            held: list[str] = []
            try:
                yield from self._until((end,), held.append)
                self._add_reasoning(mark + "".join(held))
                return
            except _End:
                self._text = mark + "".join(held) + self._text
            if (yield from self._call_in_thoughts(style)):
                return
            line.add(mark)

    def _begins_call(self, style: ToolFormat) -> Steps[bool]:
        """Whether what follows a mark may be a call."""
        with suppress(_End):
            at = yield from self._after_blanks(0)
            if self._text[at] in "{[`":
                return True
            if style.elements and (yield from self._starts_with(style.elements.name_begin, at)):
                name, _ = yield from self._element_name(style.elements, at)
                return name in self._reading.tools
        return False

    def _call_in_thoughts(self, style: ToolFormat) -> Steps[bool]:
        """The text is all there is. Without a call at its beginning, that becomes reasoning."""
        num_before, self._is_unguarded = self._num_calls, True
        blanks, self._blanks = self._blanks, ""
        try:
            yield from self._marked_call(style, len(style.begin))
        except _NoCall:
            self._blanks, self._is_unguarded = blanks, False
            self._add_reasoning(self._take(max(self._num_barren, len(style.begin))))
            self._num_barren = 0
            return False
        except _End:
            if self._num_calls == num_before:
                self._blanks = blanks
                self._add_reasoning(self._take(len(self._text)))
            else:
                self.is_reasoning = False
            raise
        return True

    def _plain(self) -> Steps[None]:
        while True:
            self._add_content(self._take(len(self._text)))
            yield from self._more()

    def _named(self) -> Steps[None]:
        """A call is the whole answer: the tool's name on a line, and its arguments below."""
        try:
            at = yield from self._after_blanks(0)
            while "\n" not in self._text[at:] and self._may_be_name(self._text[at:]):
                yield from self._more()
            name = self._text[at:].partition("\n")[0].strip()
            if name in self._reading.tools and "\n" in self._text[at:]:
                at = yield from self._after_blanks(self._text.index("\n", at))
                if self._text[at] == "{":
                    yield from self._called(self._named_call(name, at), False, self._reading.is_strict)
                    if self.is_done:
                        return
        except _NoCall:
            pass
        except _End:
            if not self._num_calls:
                self._add_content(self._take(len(self._text)))
            raise
        yield from self._plain()

    def _named_call(self, name: str, at: int) -> Steps[None]:
        self._take(at)
        self._begin_call(name)
        yield from self._stream_arguments()
        self._end_call()

    def _may_be_name(self, text: str) -> bool:
        return any(name.startswith(text.rstrip()) for name in self._reading.tools)

    def _lines(self, style: ToolFormat) -> Steps[None]:
        """Calls are behind a mark, or what one looks like at the beginning of a line, fenced perhaps: models forget
        the mark."""
        while not self.is_done:
            num_before = self._num_calls
            try:
                at = yield from self._after_blanks(0)
                if style.begin and (yield from self._starts_with(style.begin, at)):
                    yield from self._marked_call(style, at + len(style.begin))
                elif self._has_marks_alone(style):
                    raise _NoCall
                elif self._num_calls and self._text[at] == ";":
                    self._take(at + 1)
                elif (yield from self._starts_with(FENCE, at)):
                    yield from self._fenced(style, at)
                else:
                    yield from self._call(style, at, is_marked=False)
                    yield from self._optional(style.end or ";")
            except _NoCall:
                if self._reading.is_structured and not style.begin:
                    yield from self._plain()
                yield from self._line(style.begin)
            except _End:
                if self._num_calls == num_before:
                    self._add_content(self._take(len(self._text)))
                raise

    def _has_marks_alone(self, style: ToolFormat) -> bool:
        """Whether nothing here is a call unless it has the mark."""
        is_inside_line = self._reading.is_strict and self._ends_with_call
        return is_inside_line or (self._reading.is_structured and bool(style.begin))

    def _line(self, begin: str) -> Steps[None]:
        """The rest of a line is content, up to the mark of a call; one at the line's beginning was of none."""
        if self._num_barren:
            self._add_content(self._take(self._num_barren))
            self._num_barren = 0
        elif begin and self._text.lstrip(BLANKS).startswith(begin):
            self._add_content(self._take(self._text.index(begin) + len(begin)))
        mark = yield from self._until(("\n", begin) if begin else ("\n",), self._add_content)
        self._ends_with_call = False
        if mark == "\n":
            self._add_content(mark)
        else:
            self._text = mark + self._text

    def _marked_call(self, style: ToolFormat, at: int) -> Steps[None]:
        """One, or several behind the same mark; fenced perhaps."""
        at = yield from self._after_blanks(at)
        is_fenced = yield from self._starts_with(FENCE, at)
        if is_fenced:
            at = yield from self._after_blanks((yield from self._find("\n", at)))
        yield from self._call(style, at, is_marked=True)
        with suppress(_NoCall):
            while not self.is_done and (yield from self._begins_another(style)):
                yield from self._call(style, (yield from self._after_blanks(0)), is_marked=True)
        if is_fenced:
            yield from self._optional(FENCE)
        yield from self._optional(style.end)

    def _begins_another(self, style: ToolFormat) -> Steps[bool]:
        at = yield from self._after_blanks(0)
        begin = style.elements.name_begin if style.elements else ""
        return self._text[at] in "{[" or (bool(begin) and (yield from self._starts_with(begin, at)))

    def _call(self, style: ToolFormat, at: int, is_marked: bool) -> Steps[None]:
        if self._text[at] in "{[":
            yield from self._json_calls(at, is_marked)
        elif style.elements and (is_marked or not self._reading.is_strict):
            yield from self._element_call(style, style.elements, at, is_marked)
        else:
            raise _NoCall

    def _fenced(self, style: ToolFormat, at: int) -> Steps[None]:
        """A block of code, of calls perhaps."""
        start = yield from self._find("\n", at)
        language = self._text[at + len(FENCE) : start].strip()
        inside = yield from self._after_blanks(start)
        if style.begin and (yield from self._starts_with(style.begin, inside)):
            with suppress(_NoCall):
                yield from self._marked_call(style, inside + len(style.begin))
                yield from self._optional(FENCE)
                return
        if language in FENCED and self._text[inside] in "{[":
            with suppress(_NoCall):
                yield from self._json_calls(inside, is_marked=False)
                yield from self._optional(FENCE)
                return
        if language in FENCED and not self._reading.is_strict:
            end = yield from self._find(FENCE, inside)
            if calls := python_calls(self._text[inside:end], self._reading.tools):
                self._take(end + len(FENCE))
                for name, arguments in calls[: None if self._reading.is_parallel else 1]:
                    self._begin_call(name)
                    self._add_arguments(fitted(arguments, self._reading.tools[name]))
                    self._end_call()
                return
        self._num_barren = 0
        self._add_content(self._take(start))
        yield from self._until((FENCE,), self._add_content)
        self._add_content(FENCE)
        yield from self._line("")

    # --- calls in JSON

    def _json_calls(self, at: int, is_marked: bool) -> Steps[None]:
        """One, or a list of them. Raises _NoCall while nothing is taken."""
        if self._text[at] == "{" or self._reading.is_strict:
            yield from self._json_call(at, is_marked)
            return
        at = yield from self._after_blanks(at + 1)
        yield from self._json_call(at, is_marked)
        while not self.is_done:
            at = yield from self._after_blanks(0)
            separator = self._text[at]
            if separator == "]":
                self._take(at + 1)
            if separator != ",":
                return
            at = yield from self._after_blanks(at + 1)
            with suppress(_NoCall):
                yield from self._json_call(at, is_marked)
                continue
            return

    def _json_call(self, at: int, is_marked: bool) -> Steps[None]:
        """An object with a tool's name and its arguments, in any order."""
        yield from self._called(self._object_call(at), is_marked, self._reading.is_strict)

    def _object_call(self, at: int) -> Steps[None]:
        head = _Head()
        try:
            at = yield from self._members(head, (yield from self._behind("{", at)))
        except _End:
            if head.has_begun and self._is_whole and not self._text.strip(BLANKS):
                self._end_call()  # small models forget the brace
            elif head.has_begun and self._text.lstrip(BLANKS).startswith(","):
                raise _NoCall from None  # the beginning of something else
            raise
        if head.name is None:
            raise _NoCall
        self._take(at)
        if not head.has_begun:
            self._begin_call(head.name)
            self._add_arguments(_object_of(head.arguments or "null"))
        self._end_call()

    def _members(self, head: _Head, at: int) -> Steps[int]:
        """Those of an object, up to its end: its brace, or the mark behind the call where that is forgotten."""
        style = self._reading.format
        assert style is not None
        while self._text[at] != "}":
            key, at = yield from self._string(at)
            if self._reading.is_strict and key != (style.key if head.name else "name"):
                raise _NoCall
            at = yield from self._behind(":", (yield from self._after_blanks(at)))
            at = yield from self._after_blanks((yield from self._member(head, key, at)))
            if head.has_begun and style.end and (yield from self._starts_with(style.end, at)):
                return at
            if self._text[at] != "}":
                at = yield from self._behind(",", at)
        return at + 1

    def _member(self, head: _Head, key: str, at: int) -> Steps[int]:
        """The end of its value."""
        if key == "function" and self._text[at] == "{" and not head.is_nested:
            head.is_nested = True
            return (yield from self._members(head, (yield from self._behind("{", at))))
        if key in NAME_KEYS and head.name is None:
            head.name, at = yield from self._string(at)
            if head.name not in self._reading.tools:
                raise _NoCall
            return at
        if key in ARGUMENT_KEYS and (head.has_begun or head.arguments is not None):
            raise _NoCall
        if key in ARGUMENT_KEYS and head.name is not None:
            self._take(at)
            self._begin_call(head.name)
            yield from self._stream_arguments()
            head.has_begun = True
            return 0
        if key not in CALL_KEYS:
            raise _NoCall
        text, at = yield from self._value(at)
        head.arguments = text if key in ARGUMENT_KEYS else head.arguments
        return at

    def _behind(self, character: str, at: int) -> Steps[int]:
        if self._text[at] != character:
            raise _NoCall
        return (yield from self._after_blanks(at + 1))

    def _string(self, at: int) -> Steps[tuple[str, int]]:
        is_strict = self._reading.is_strict
        if self._text[at] not in ('"' if is_strict else "\"'"):
            raise _NoCall
        text, end = yield from self._value(at)
        if is_strict and "\\" in self._text[at:end]:
            raise _NoCall
        return str(json.loads(text)), end

    def _stream_arguments(self) -> Steps[None]:
        """The value that begins here, as it comes; it is taken. Raises _NoCall for what is no object."""
        reader = JsonReader()
        try:
            if self._text[0] != "{":
                text, end = yield from self._value(0)
                self._take(end)
                self._add_arguments(_object_of(text))
                return
            while not reader.is_done:
                if not self._text:
                    yield from self._more()
                length, text = reader.feed(self._text)
                self._take(length)
                self._add_arguments(text)
                if reader.is_broken:
                    raise _NoCall
        except _End:
            self._add_arguments(reader.held + self._take(len(self._text)))
            raise

    def _value(self, at: int) -> Steps[tuple[str, int]]:
        """The JSON of a value, and where it ends; nothing is taken. Raises _NoCall for what is no value."""
        reader, given = JsonReader(), []
        while True:
            length, text = reader.feed(self._text[at:])
            at += length
            given.append(text)
            if reader.is_broken:
                raise _NoCall
            if reader.is_done:
                return "".join(given), at
            yield from self._more()

    # --- calls in elements

    def _element_call(self, style: ToolFormat, elements: Elements, at: int, is_marked: bool) -> Steps[None]:
        if not (yield from self._starts_with(elements.name_begin, at)):
            raise _NoCall
        name, end = yield from self._element_name(elements, at)
        if name not in self._reading.tools:
            raise _NoCall
        if not is_marked and not elements.name_begin:  # a name alone is no sign of a call
            after = yield from self._after_blanks(end)
            if not (yield from self._starts_with(elements.begin, after)):
                raise _NoCall
        is_strict = self._reading.is_strict and self._reading.is_guarded
        call = _ElementCall(style, elements, self._reading.tools[name])
        yield from self._called(self._elements(call, name, end), is_marked, is_strict)

    def _element_name(self, elements: Elements, at: int) -> Steps[tuple[str, int]]:
        """And where it ends."""
        at += len(elements.name_begin)
        while not (found := _NAME_END.search(self._text, at)) and len(self._text) < at + MOST_OF_NAME:
            if not elements.name_begin and not self._may_be_name(self._text[at:]):
                break
            yield from self._more()
        end = found.start() if found else len(self._text)
        return self._text[at:end], end

    def _elements(self, call: "_ElementCall", name: str, end: int) -> Steps[None]:
        elements = call.elements
        self._take(end)
        self._begin_call(name)
        try:
            yield from self._optional(elements.name_end.strip())
            while (yield from self._optional(elements.begin)):
                yield from self._element(call)
            yield from self._closed(call)
        except _End:
            if self._is_whole and not self._text.strip(BLANKS) and not call.is_inside:
                self._add_arguments("}" if call.keys else "{}")
                self._end_call()
            raise
        self._add_arguments("}" if call.keys else "{}")
        self._end_call()
        yield from self._optional(elements.close)

    def _element(self, call: "_ElementCall") -> Steps[None]:
        call.is_inside = True
        key = yield from self._element_key(call)
        yield from self._optional(call.elements.value_begin.strip())
        opening = ", " if call.keys else "{"
        call.keys.append(key)
        value: list[str] = []
        try:
            yield from self._element_value(call, value)
        except _End:  # the beginning of a text, which is all that there is of the call's last argument
            self._add_arguments(f"{opening}{json_of(key)}: {json_of(self._shown(''.join(value)))[:-1]}")
            raise
        text = self._shown(call.value("".join(value)))
        self._add_arguments(f"{opening}{json_of(key)}: {argument_of(text, call.schema_of(key), call.schema)}")
        call.is_inside = False

    def _element_key(self, call: "_ElementCall") -> Steps[str]:
        """Its mark may be forgotten at the end of a line."""
        mark, pieces = call.elements.key_end, list[str]()
        marks = (mark, "\n") if self._is_held and call.elements.has_lines else (mark,)
        found = yield from self._until(marks, pieces.append)
        key = "".join(pieces)
        if found == mark:
            return key
        if key.strip() not in call.known:
            raise _NoCall
        return key.strip()

    def _element_value(self, call: "_ElementCall", value: list[str]) -> Steps[None]:
        """Up to its end, which is one only if another element or the call's end follows."""
        marks = call.ends if self._is_held else call.ends[:1]
        while True:
            mark = yield from self._until(marks, value.append)
            try:
                ends = yield from self._ends_value(call, mark)
            except _End:
                value.append("" if mark == marks[0] else mark + self._take(len(self._text)))
                raise
            if not ends:
                value.append(mark)
                continue
            if mark != marks[0]:  # it is what follows the value
                value.append(mark[: len(mark) - len(mark.lstrip("\n"))])
                self._put_back(mark.lstrip("\n"))
            return

    def _ends_value(self, call: "_ElementCall", mark: str) -> Steps[bool]:
        style, elements = call.style, call.elements
        if mark == call.opener:
            return (yield from self._begins_element(call))
        others = (elements.name_begin, style.begin) if self._is_held else ()
        followers = {
            call.ends[0]: (elements.begin, elements.close, style.end, *others),
            call.closer: (style.end, style.begin, elements.name_begin),
            style.end: (style.begin,),
        }[mark]
        try:
            after = yield from self._after_blanks(0)
        except _End:
            if self._is_whole and self._is_held:
                return True
            raise
        for follower in filter(None, followers):
            if (yield from self._starts_with(follower, after)):
                return True
        return False

    def _begins_element(self, call: "_ElementCall") -> Steps[bool]:
        """Whether the name of a parameter follows that has not come yet."""
        heads = [key + call.elements.key_end for key in call.known]
        while not any(self._text.startswith(head) for head in heads):
            if not any(head.startswith(self._text) for head in heads):
                return False
            yield from self._more()
        return True

    def _closed(self, call: "_ElementCall") -> Steps[None]:
        """Raises _NoCall if neither the call's end follows nor, where that is forgotten, what comes after it."""
        style, elements = call.style, call.elements
        after = yield from self._after_blanks(0)
        forgotten = (style.end, elements.name_begin, style.begin) if self._is_held else ()
        for mark in filter(None, (elements.close or style.end, *forgotten)):
            if (yield from self._starts_with(mark, after)):
                return
        raise _NoCall

    # --- the text

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        if self._is_held:
            self._taken.append(taken)
        return taken

    def _put_back(self, text: str) -> None:
        """The last that was taken, or its end."""
        self._text = text + self._text
        if self._is_held:
            self._taken[-1] = self._taken[-1].removesuffix(text)

    def _more(self) -> Steps[None]:
        if self._is_ended:
            raise _End
        yield

    def _until(self, marks: tuple[str, ...], add: Callable[[str], None]) -> Steps[str]:
        """Adds the text before the first of the marks as it comes, and skips that; which one it was."""
        while not (found := [(at, mark) for mark in marks if (at := self._text.find(mark)) >= 0]):
            held = 0 if self._is_ended else max(overlap(self._text, mark) for mark in marks)
            add(self._take(len(self._text) - held))
            yield from self._more()
        at, mark = min(found)
        add(self._take(at))
        self._take(len(mark))
        return mark

    def _find(self, mark: str, at: int) -> Steps[int]:
        while (found := self._text.find(mark, at)) < 0:
            at = max(at, len(self._text) - len(mark) + 1)
            yield from self._more()
        return found

    def _after_blanks(self, at: int) -> Steps[int]:
        """Where the next character is that is no blank; there is one."""
        while not (found := _NO_BLANK.search(self._text, at)):
            at = len(self._text)
            yield from self._more()
        return found.start()

    def _starts_with(self, mark: str, at: int) -> Steps[bool]:
        while len(self._text) < at + len(mark) and mark.startswith(self._text[at:]):
            yield from self._more()
        return self._text.startswith(mark, at)

    def _optional(self, mark: str) -> Steps[bool]:
        """Skips the mark, and blanks before it, if it comes."""
        if not mark:
            return False
        at = yield from self._after_blanks(0)
        comes = yield from self._starts_with(mark, at)
        self._take(at + len(mark) if comes else 0)
        return comes


@dataclass
class _ElementCall:
    """A call whose arguments come one by one."""

    style: ToolFormat
    elements: Elements
    schema: Mapping[str, Any]
    keys: list[str] = field(default_factory=list)  # so far
    is_inside: bool = False  # of an element

    @property
    def opener(self) -> str:
        """Of the next element where the end of this one is forgotten."""
        return f"\n{self.elements.begin}" if self.elements.has_lines else self.elements.begin

    @property
    def closer(self) -> str:
        return f"\n{self.elements.close}" if self.elements.close else ""

    @property
    def ends(self) -> tuple[str, ...]:
        """Marks that may end a value; the first one is its own, the others come where that is forgotten."""
        own = self.elements.end.strip()
        return tuple(filter(None, (own, self.opener, self.closer, self.style.end)))

    @property
    def known(self) -> list[str]:
        """Names of parameters that have not come yet."""
        properties = self.schema.get("properties")
        return [key for key in properties if key not in self.keys] if isinstance(properties, dict) else []

    def schema_of(self, key: str) -> Any:
        properties = self.schema.get("properties")
        return properties.get(key) if isinstance(properties, dict) else None

    def value(self, text: str) -> str:
        return text.removeprefix("\n").removesuffix("\n") if self.elements.has_lines else text


class _Line:
    """What stands on a line so far."""

    def __init__(self) -> None:
        self.is_blank = True

    def add(self, text: str) -> str:
        """The same text."""
        before, newline, last = text.rpartition("\n")
        self.is_blank = not last.strip(BLANKS) and (bool(newline) or self.is_blank)
        return text


def _object_of(text: str) -> str:
    """Arguments that came as JSON, as a string with JSON in it, or as null. Raises _NoCall for what is no object."""
    if text == "null":
        return "{}"
    if text.startswith('"'):
        inner = str(json.loads(text)).strip() or "{}"
        is_text = json_of(inner) == json.dumps(inner, ensure_ascii=False)  # no half of a character is in it
        text = (read_json(inner) if is_text else None) or ""
    if not text.startswith("{"):
        raise _NoCall
    return text
