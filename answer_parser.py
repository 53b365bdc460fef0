"""AnswerParser: an answer's text, as it comes, into reasoning, content and calls of tools.

One parser reads streams and whole answers, so how the text is cut makes no difference. Each of its steps takes what is
certain from the text and waits for more where it is not. What looks like a call and is none, because it names no tool
of the request, say, is content; what has begun as a call stays one, complete or not.
"""

import ast
import json
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from schemas import FinishReason
from streaming import overlap
from tool_formats import Elements, ToolFormat, are_texts, is_plain_text

ARGUMENT_KEYS = ("arguments", "parameters")
CALL_KEYS = (*ARGUMENT_KEYS, "name", "id", "type")
BLANKS = " \t\r\n"
MOST_OF_NAME = 200  # characters
FENCE = "```"
_SCALAR_END, _NAME_END, _NO_BLANK = re.compile(r"[\s,}\]]"), re.compile(r"[\s<>]"), re.compile(rf"[^{BLANKS}]")
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
    is_structured: bool = False  # what begins as no call is JSON of another kind
    think: tuple[str, str] | None = None  # the marks around reasoning
    is_thinking: bool = False  # the prompt has the first of them
    marks: Mapping[str, str] = field(default_factory=dict)  # characters that stand for marks, and what they show as


class _NoCall(Exception):
    pass


class _End(Exception):
    """There is no more text."""


class AnswerParser:
    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._text = ""  # not taken yet
        self._is_ended = False
        self._parts: list[Part] = []
        self._blanks = ""  # of the content; shown before its next character
        self._ends_with_call = False  # the line so far
        self._is_at_start = False  # of what follows reasoning or a call: its leading blanks are not shown
        self._has_content = False
        self._num_calls = 0  # begun
        self._arguments = ""  # of the last one
        self.num_complete = 0
        self.is_reasoning = reading.is_thinking
        self._restored = str.maketrans(dict(reading.marks))
        self._steps = self._answer()

    def put(self, text: str) -> list[Part]:
        self._text += text
        return self._run()

    def end(self) -> list[Part]:
        self._is_ended = True
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
        self._blanks, self._is_at_start, self._arguments = "", not self._has_content, ""
        self._add(Part(call=CallDelta(self._num_calls, name)))
        self._num_calls += 1
        self._ends_with_call = True

    def _add_arguments(self, text: str) -> None:
        text = self._shown(text)
        self._arguments += text
        if text:
            self._add(Part(call=CallDelta(self._num_calls - 1, arguments=text)))

    def _end_call(self) -> None:
        if not self._arguments:
            self._add_arguments("{}")
        self.num_complete += self._arguments.lstrip().startswith("{") and is_json(self._arguments)

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
        yield from self._until((end,), self._add_reasoning)
        self.is_reasoning, self._blanks, self._is_at_start = False, "", True

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
                    self._take(at)
                    self._begin_call(name)
                    yield from self._stream_arguments()
                    self._end_call()
                    if self.is_done:
                        return
        except _End:
            if not self._num_calls:
                self._add_content(self._take(len(self._text)))
            raise
        yield from self._plain()

    def _may_be_name(self, text: str) -> bool:
        return any(name.startswith(text.rstrip()) for name in self._reading.tools)

    def _lines(self, style: ToolFormat) -> Steps[None]:
        """Calls are behind a mark, or JSON at the beginning of a line, fenced perhaps: models forget the mark."""
        while not self.is_done:
            num_before = self._num_calls
            try:
                at = yield from self._after_blanks(0)
                if style.begin and (yield from self._starts_with(style.begin, at)):
                    yield from self._marked_call(style, at + len(style.begin))
                elif self._has_marks_alone(style):
                    raise _NoCall
                elif self._text[at] in "{[":
                    yield from self._json_calls(at)
                    yield from self._optional(";")
                elif self._num_calls and self._text[at] == ";":
                    self._take(at + 1)
                elif (yield from self._starts_with(FENCE, at)):
                    yield from self._fenced(style, at)
                else:
                    raise _NoCall
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
        if begin and self._text.lstrip(BLANKS).startswith(begin):
            self._add_content(self._take(self._text.index(begin) + len(begin)))
        mark = yield from self._until(("\n", begin) if begin else ("\n",), self._add_content)
        self._ends_with_call = False
        if mark == "\n":
            self._add_content(mark)
        else:
            self._text = mark + self._text

    def _marked_call(self, style: ToolFormat, at: int) -> Steps[None]:
        at = yield from self._after_blanks(at)
        if self._text[at] in "{[":
            yield from self._json_calls(at)
        elif style.elements:
            yield from self._element_call(style, style.elements, at)
        else:
            raise _NoCall
        yield from self._optional(style.end)

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
                yield from self._json_calls(inside)
                yield from self._optional(FENCE)
                return
        if language in FENCED and not self._reading.is_strict:
            end = yield from self._find(FENCE, inside)
            if calls := python_calls(self._text[inside:end], self._reading.tools):
                self._take(end + len(FENCE))
                for name, arguments in calls[: None if self._reading.is_parallel else 1]:
                    self._begin_call(name)
                    self._add_arguments(arguments)
                    self._end_call()
                return
        self._add_content(self._take(start))
        yield from self._until((FENCE,), self._add_content)
        self._add_content(FENCE)
        yield from self._line("")

    # --- calls in JSON

    def _json_calls(self, at: int) -> Steps[None]:
        """One, or a list of them. Raises _NoCall while nothing is taken."""
        if self._text[at] == "{" or self._reading.is_strict:
            yield from self._json_call(at)
            return
        at = yield from self._after_blanks(at + 1)
        yield from self._json_call(at)
        while not self.is_done:
            at = yield from self._after_blanks(0)
            separator = self._text[at]
            if separator == "]":
                self._take(at + 1)
            if separator != ",":
                return
            at = yield from self._after_blanks(at + 1)
            with suppress(_NoCall):
                yield from self._json_call(at)
                continue
            return

    def _json_call(self, at: int) -> Steps[None]:
        """An object with a tool's name and its arguments, in any order."""
        num_before = self._num_calls
        try:
            yield from self._members(at)
        except _NoCall:
            if self._num_calls == num_before:
                raise

    def _members(self, at: int) -> Steps[None]:
        name: str | None = None
        arguments, has_begun = "{}", False
        style = self._reading.format
        assert style is not None
        at = yield from self._behind("{", at)
        while self._text[at] != "}":
            key, at = yield from self._string(at)
            if self._reading.is_strict and key != (style.key if name else "name"):
                raise _NoCall
            at = yield from self._behind(":", (yield from self._after_blanks(at)))
            if key in ARGUMENT_KEYS and name is not None and not has_begun:
                self._take(at)
                self._begin_call(name)
                yield from self._stream_arguments()
                has_begun, at = True, 0
            elif key == "name" and name is None:
                name, at = yield from self._string(at)
            elif key in CALL_KEYS:
                start, at = at, (yield from self._value_end(at))
                arguments = self._text[start:at] if key in ARGUMENT_KEYS else arguments
            if key not in CALL_KEYS or (name is not None and name not in self._reading.tools):
                raise _NoCall
            at = yield from self._after_blanks(at)
            if has_begun and style.end and (yield from self._starts_with(style.end, at)):
                self._end_call()  # small models forget the brace
                return
            if self._text[at] != "}":
                at = yield from self._behind(",", at)
        if name is None:
            raise _NoCall
        self._take(at + 1)
        if not has_begun:
            self._begin_call(name)
            self._add_arguments(_as_object(arguments))
        self._end_call()

    def _behind(self, character: str, at: int) -> Steps[int]:
        if self._text[at] != character:
            raise _NoCall
        return (yield from self._after_blanks(at + 1))

    def _string(self, at: int) -> Steps[tuple[str, int]]:
        if self._text[at] != '"':
            raise _NoCall
        end = yield from self._value_end(at)
        if self._reading.is_strict and "\\" in self._text[at:end]:
            raise _NoCall
        try:
            return str(json.loads(self._text[at:end])), end
        except ValueError as error:
            raise _NoCall from error

    def _stream_arguments(self) -> Steps[None]:
        """The value that begins here, as it comes; it is taken."""
        if self._text[0] != "{":
            end = yield from self._value_end(0)
            self._add_arguments(_as_object(self._take(end)))
            return
        scanner = ValueScanner()
        while not scanner.is_done:
            if not self._text:
                yield from self._more()
            self._add_arguments(self._take(scanner.feed(self._text)))

    def _value_end(self, at: int) -> Steps[int]:
        if self._text[at] not in '{["':
            while not (found := _SCALAR_END.search(self._text, at)):
                at = len(self._text)
                yield from self._more()
            return found.start()
        scanner, end = ValueScanner(), at
        while True:
            end += scanner.feed(self._text[end:])
            if scanner.is_done:
                return end
            yield from self._more()

    # --- calls in elements

    def _element_call(self, style: ToolFormat, elements: Elements, at: int) -> Steps[None]:
        if not (yield from self._starts_with(elements.name_begin, at)):
            raise _NoCall
        at += len(elements.name_begin)
        while not (found := _NAME_END.search(self._text, at)) and len(self._text) < at + MOST_OF_NAME:
            yield from self._more()
        name = self._text[at : found.start() if found else len(self._text)]
        if name not in self._reading.tools:
            raise _NoCall
        self._take(at + len(name))
        self._begin_call(name)
        yield from self._optional(elements.name_end.strip())
        opening = "{"
        while (yield from self._optional(elements.begin)):
            key = yield from self._before(elements.key_end)
            yield from self._optional(elements.value_begin.strip())
            value = yield from self._element_value(style, elements)
            text = _as_json(self._shown(value), self._reading.tools[name], key)
            self._add_arguments(f"{opening}{json.dumps(key, ensure_ascii=False)}: {text}")
            opening = ", "
        last = elements.close or style.end
        if not (yield from self._starts_with(last, (yield from self._after_blanks(0)))):
            return
        self._add_arguments("}" if opening != "{" else "{}")
        self._end_call()
        yield from self._optional(elements.close)

    def _before(self, mark: str) -> Steps[str]:
        end = yield from self._find(mark, 0)
        text = self._take(end)
        self._take(len(mark))
        return text

    def _element_value(self, style: ToolFormat, elements: Elements) -> Steps[str]:
        """Up to its end, which is one only if another element or the call's end follows."""
        mark, at = elements.end.strip(), 0
        while True:
            at = yield from self._find(mark, at)
            after = yield from self._after_blanks(at + len(mark))
            for follower in filter(None, (elements.begin, elements.close, style.end)):
                if (yield from self._starts_with(follower, after)):
                    value = self._take(at)
                    self._take(len(mark))
                    return value.removeprefix("\n").removesuffix("\n") if elements.has_lines else value
            at += len(mark)

    # --- the text

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken

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


class ValueScanner:
    """Finds the end of a JSON string, object or list, piece by piece. It does not check the rest of the syntax."""

    _STOPS = {True: re.compile(r'[\\"]'), False: re.compile(r'["{}\[\]]')}

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_string = self._is_escaped = False
        self.is_done = False

    def feed(self, text: str) -> int:
        """How many of these characters belong to the value."""
        at = int(self._is_escaped and bool(text))
        self._is_escaped = self._is_escaped and not text
        while found := self._STOPS[self._is_in_string].search(text, at):
            at = found.end()
            if found[0] == "\\":
                self._is_escaped = at == len(text)
                at += 1
                continue
            if found[0] == '"':
                self._is_in_string = not self._is_in_string
            else:
                self._depth += 1 if found[0] in "{[" else -1
            if self._depth <= 0 and not self._is_in_string:
                self.is_done = True
                return at
        return len(text)


def is_json(text: str) -> bool:
    """In the letter of RFC 8259, which knows no NaN and no infinity; numbers may be of any size."""
    try:
        json.loads(text, parse_constant=_refuse, parse_int=len, parse_float=len)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _dumps(value: Any) -> str:
    """Raises ValueError for what JSON cannot say."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character
        return json.dumps(value, allow_nan=False)
    return text


def _as_object(text: str) -> str:
    """Arguments that came as a string with JSON in it, or as null."""
    if text.strip() == "null":
        return "{}"
    if text.startswith('"') and is_json(text):
        inner = str(json.loads(text)).strip() or "{}"
        return inner if is_json(inner) and _dumps(inner) == json.dumps(inner, ensure_ascii=False) else text
    return text


def _as_json(text: str, schema: Mapping[str, Any], key: str) -> str:
    """What an element's text stands for: text, where the schema wants text, and else JSON as it was written."""
    properties = schema.get("properties")
    own = properties.get(key) if isinstance(properties, dict) else None
    wants_text = isinstance(own, dict) and own.get("type") == "string" and not text.startswith('"')
    if is_plain_text(own) or are_texts(own) or wants_text:
        return _dumps(text)
    return text if is_json(text) else {"True": "true", "False": "false", "None": "null"}.get(text) or _dumps(text)


def python_calls(code: str, tools: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]] | None:
    """Names and arguments of calls as Python writes them, alone, in a list or printed; None if the code is anything
    else."""
    try:
        statements = ast.parse(code.strip()).body
        expressions = [s.value if isinstance(s, ast.Expr | ast.Assign) else None for s in statements]
        return [_python_call(call, tools) for expression in expressions for call in _listed(expression)]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _listed(expression: ast.AST | None) -> Sequence[ast.AST | None]:
    return expression.elts if isinstance(expression, ast.List | ast.Tuple) else [expression]


def _python_call(call: ast.AST | None, tools: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    if isinstance(call, ast.Call) and ast.unparse(call.func) == "print" and len(call.args) == 1:
        call = call.args[0]
    if not isinstance(call, ast.Call) or (name := ast.unparse(call.func)) not in tools:
        raise ValueError("no call of a tool")
    names = list(tools[name].get("properties", {}))
    arguments = {names[number]: ast.literal_eval(value) for number, value in enumerate(call.args) if names[number:]}
    for keyword in call.keywords:
        arguments[str(keyword.arg)] = ast.literal_eval(keyword.value)
    return name, _dumps(arguments)
