"""ElementCalls: calls of tools whose arguments models write one by one, as text between marks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from text.answer_parts import AnswerParts
from text.answer_text import End, NoCall, Steps
from text.argument_schemas import fits, is_judged, takes_any_text
from text.argument_values import argument_of, value_of
from text.lenient_json import BLANKS, json_of
from text.tool_formats import Elements, ToolFormat

MOST_OF_NAME = 200  # characters
_NAME_END = re.compile(r"[^\w.:/-]", re.ASCII)


@dataclass
class _ElementCall:
    """A call whose arguments come one by one."""

    style: ToolFormat
    elements: Elements
    schema: Mapping[str, Any]
    keys: list[str] = field(default_factory=list)  # so far
    found: dict[str, str] = field(default_factory=dict)  # JSON by name, of those in others' texts, if they do not come
    is_inside: bool = False  # of an element

    @property
    def opener(self) -> str:
        """Of the next element where the end of this one is forgotten."""
        return f"\n{self.elements.begin}" if self.elements.has_lines else self.elements.begin

    @property
    def closer(self) -> str:
        return f"\n{self.elements.close}" if self.elements.close else ""

    @cached_property
    def next_element(self) -> re.Pattern[str] | None:
        """What begins an element of a parameter of the tool's."""
        own, names = self.elements, "|".join(map(re.escape, self.known))
        line, value_begin = "(?<=\n)" if own.has_lines else "", re.escape(own.value_begin.strip())
        before_value = f"(?:[{BLANKS}]*{value_begin})?" if value_begin else ""
        pattern = f"{line}{re.escape(own.begin)}({names}){re.escape(own.key_end)}{before_value}"
        return re.compile(pattern) if names else None

    @property
    def opening(self) -> str:
        return ", " if self.keys else "{"

    @property
    def ends(self) -> tuple[str, ...]:
        """Marks that may end a value; the first one is its own, the others come where that is forgotten."""
        own = self.elements.end.strip()
        return tuple(filter(None, (own, self.opener, self.closer, self.style.end)))

    @property
    def followers(self) -> tuple[str, ...]:
        """What follows a value's own mark."""
        return self.elements.begin, self.elements.close, self.style.end

    @property
    def late_followers(self) -> dict[str, tuple[str, ...]]:
        """What follows the marks that may end a value where something is forgotten."""
        name_begin, begin, end = self.elements.name_begin, self.style.begin, self.style.end
        others = {self.closer: (end, begin, name_begin), end: (begin,)}
        return {**others, self.ends[0]: (name_begin, begin), self.opener: ()}

    @property
    def known(self) -> list[str]:
        """Names of parameters that have not come yet."""
        properties = self.schema.get("properties")
        return [key for key in properties if key not in self.keys] if isinstance(properties, dict) else []

    def schema_of(self, key: str) -> Any:
        properties = self.schema.get("properties")
        return properties.get(key) if isinstance(properties, dict) else None

    def argument(self, key: str, text: str, is_guarded: bool) -> str:
        return argument_of(text, self.schema_of(key), self.schema, is_guarded)

    def fits(self, key: str, argument: str, is_strict: bool) -> bool:
        """is_strict: limits and patterns, which are not looked at, must not be there."""
        own = self.schema_of(key)
        return fits(value_of(argument), own, self.schema) and (not is_strict or is_judged(own, self.schema))

    def value(self, text: str) -> str:
        return text.removeprefix("\n").removesuffix("\n") if self.elements.has_lines else text


class ElementCalls(AnswerParts):
    def _element_call(self, style: ToolFormat, elements: Elements, at: int, is_marked: bool) -> Steps[None]:
        if not (yield from self._starts_with(elements.name_begin, at)):
            raise NoCall
        name, end = yield from self._element_name(elements, at)
        if name not in self._reading.tools:
            raise NoCall
        if not is_marked and not elements.name_begin:  # a name alone is no sign of a call
            after = yield from self._after_blanks(end)
            if not (yield from self._starts_with(elements.begin, after)):
                raise NoCall
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

    def _elements(self, call: _ElementCall, name: str, end: int) -> Steps[None]:
        elements = call.elements
        self._take(end)
        self._begin_call(name)
        try:
            yield from self._optional(elements.name_end.strip())
            while (yield from self._optional(elements.begin)):
                yield from self._element(call)
            yield from self._closed(call)
        except End:
            if self._is_whole and not self._text.strip(BLANKS) and not call.is_inside:
                self._end_elements(call)
            raise
        self._end_elements(call)
        yield from self._optional(elements.close)

    def _end_elements(self, call: _ElementCall) -> None:
        for key, argument in call.found.items():
            if key not in call.keys:
                self._add_element(call, key, argument)
        self._add_arguments("}" if call.keys else "{}")
        self._end_call()

    def _element(self, call: _ElementCall) -> Steps[None]:
        call.is_inside = True
        key = yield from self._element_key(call)
        if self._is_held and key in call.keys:
            raise NoCall
        yield from self._optional(call.elements.value_begin.strip())
        value: list[str] = []
        try:
            yield from self._element_value(call, value)
        except End:
            text = "".join(value)
            if self._is_held:
                *others, (key, text) = self._split(call, key, text)
                self._add_elements(call, others)
            # the beginning of a text, which is all that there is of the call's last argument
            self._add_arguments(f"{call.opening}{json_of(key)}: {json_of(self._shown(text))[:-1]}")
            call.keys.append(key)
            raise
        text = "".join(value)
        if self._is_held:
            self._add_elements(call, self._split(call, key, text))
        else:
            self._add_guarded(call, key, text)
        call.is_inside = False

    def _split(self, call: _ElementCall, key: str, value: str) -> list[tuple[str, str]]:
        """Names and texts of the elements in a value: where the end of one is forgotten, the next one begins. Those
        that have an end of their own in the value are quoted in it."""
        if call.next_element is None:
            return [(key, value)]
        start, elements, seen = 0, list[tuple[str, str]](), {*call.keys, *call.found, key}
        for found in call.next_element.finditer(value, value.rfind(call.ends[0]) + 1):
            if found[1] not in seen:
                elements.append((key, value[start : found.start()]))
                key, start = found[1], found.end()
                seen.add(key)
        return [*elements, (key, value[start:])]

    def _add_elements(self, call: _ElementCall, elements: list[tuple[str, str]]) -> None:
        for key, value in elements:
            self._add_element(call, key, call.argument(key, self._shown(call.value(value)), is_guarded=False))

    def _add_guarded(self, call: _ElementCall, key: str, value: str) -> None:
        """A grammar that takes any text takes what is behind a forgotten end for it, and may ask for that again. It is
        what it is where that is valid, too; what comes again counts."""
        is_strict = self._reading.is_strict or self._reading.is_forced
        may_forget = takes_any_text(call.schema_of(key), call.schema)
        own, *others = [
            (name, call.argument(name, self._shown(call.value(text)), is_guarded=True))
            for name, text in (self._split(call, key, value) if may_forget else [(key, value)])
        ]
        if all(call.fits(*each, is_strict) for each in others):
            call.found |= dict(others)
        else:
            own = key, call.argument(key, self._shown(call.value(value)), is_guarded=True)
        self._add_element(call, *own)

    def _add_element(self, call: _ElementCall, key: str, argument: str) -> None:
        self._add_arguments(f"{call.opening}{json_of(key)}: {argument}")
        call.keys.append(key)

    def _element_key(self, call: _ElementCall) -> Steps[str]:
        """Its mark may be forgotten at the end of a line."""
        mark, pieces = call.elements.key_end, list[str]()
        marks = (mark, "\n") if self._is_held and call.elements.has_lines else (mark,)
        found = yield from self._until(marks, pieces.append)
        key = "".join(pieces)
        if found == mark:
            return key
        if key.strip() not in call.known:
            raise NoCall
        return key.strip()

    def _element_value(self, call: _ElementCall, value: list[str]) -> Steps[None]:
        """Up to its own mark, if another element or the call's end follows. Where other marks show that one of these
        was forgotten, the value ends with them, if no such end comes before the next element."""
        own, marks = call.ends[0], call.ends if self._is_held else call.ends[:1]
        num_pieces, mark = None, ""  # of the value, if something is forgotten
        try:
            while True:
                mark = yield from self._until(marks, value.append)
                if mark == own and (yield from self._is_followed(call.followers)):
                    return
                value.append(mark)
                if mark == call.opener and num_pieces is not None:
                    break
                if self._is_held and num_pieces is None and (yield from self._is_followed(call.late_followers[mark])):
                    num_pieces = len(value) - 1
        except End:
            if num_pieces is None:
                if mark != own:
                    value.append(self._take(len(self._text)))
                elif value[-1] == own:
                    value.pop()
                raise
        rest = "".join(value[num_pieces:])
        line = len(rest) - len(rest.lstrip("\n"))
        value[num_pieces:] = rest[:line]
        self._put_back(rest[line:].removeprefix(own))

    def _is_followed(self, marks: tuple[str, ...]) -> Steps[bool]:
        """Whether one of these comes next, or the end that the model gave the answer."""
        try:
            after = yield from self._after_blanks(0)
        except End:
            if self._is_whole and self._is_held:
                return True
            raise
        for mark in filter(None, marks):
            if (yield from self._starts_with(mark, after)):
                return True
        return False

    def _closed(self, call: _ElementCall) -> Steps[None]:
        """Raises NoCall if neither the call's end follows nor, where that is forgotten, what comes after it."""
        style, elements = call.style, call.elements
        after = yield from self._after_blanks(0)
        forgotten = (style.end, elements.name_begin, style.begin) if self._is_held else ()
        for mark in filter(None, (elements.close or style.end, *forgotten)):
            if (yield from self._starts_with(mark, after)):
                return
        raise NoCall
