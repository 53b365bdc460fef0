"""JsonCalls: calls of tools that models write as JSON, or nearly."""

import json
from contextlib import suppress
from dataclasses import dataclass

from text.answer_parts import AnswerParts
from text.answer_text import End, NoCall, Steps
from text.lenient_json import BLANKS, JsonReader, json_of, read_json

ARGUMENT_KEYS = ("arguments", "parameters")
CALL_KEYS = (*ARGUMENT_KEYS, "name", "id", "type")
NAME_KEYS = ("name", "function")


@dataclass
class _Head:
    """What has been read of a call in JSON."""

    name: str | None = None
    arguments: str | None = None  # JSON, if they came before the name
    has_begun: bool = False  # its arguments have been read behind its name
    is_nested: bool = False  # it is inside of another object, as on the wire


class JsonCalls(AnswerParts):
    def _json_calls(self, at: int, is_marked: bool) -> Steps[None]:
        """One, or a list of them. Raises NoCall while nothing is taken."""
        if not is_marked and self._place(at) in self._inner:
            raise NoCall
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
            with suppress(NoCall):
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
        except End:
            if head.has_begun and self._is_whole and not self._text.strip(BLANKS):
                self._end_call()  # small models forget the brace
            elif head.has_begun and self._text.lstrip(BLANKS).startswith(","):
                raise NoCall from None  # the beginning of something else
            raise
        if head.name is None:
            raise NoCall
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
                raise NoCall
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
        if key in NAME_KEYS:
            if head.name is not None:
                raise NoCall
            head.name, at = yield from self._string(at)
            if head.name not in self._reading.tools:
                raise NoCall
            return at
        if key in ARGUMENT_KEYS and (head.has_begun or head.arguments is not None):
            raise NoCall
        if key in ARGUMENT_KEYS and head.name is not None:
            self._take(at)
            self._begin_call(head.name)
            yield from self._stream_arguments()
            head.has_begun = True
            return 0
        if key not in CALL_KEYS:
            raise NoCall
        text, at = yield from self._value(at)
        head.arguments = text if key in ARGUMENT_KEYS else head.arguments
        return at

    def _behind(self, character: str, at: int) -> Steps[int]:
        if self._text[at] != character:
            raise NoCall
        return (yield from self._after_blanks(at + 1))

    def _string(self, at: int) -> Steps[tuple[str, int]]:
        is_strict = self._reading.is_strict
        if self._text[at] not in ('"' if is_strict else "\"'"):
            raise NoCall
        text, end = yield from self._value(at)
        if is_strict and "\\" in self._text[at:end]:
            raise NoCall
        return str(json.loads(text)), end

    def _stream_arguments(self) -> Steps[None]:
        """The value that begins here, as it comes; it is taken. Raises NoCall for what is no object."""
        reader = JsonReader()
        try:
            if self._text[0] != "{":
                text, end = yield from self._value(0)
                arguments = _object_of(text)
                self._take(end)
                self._add_arguments(arguments)
                return
            while not reader.is_done:
                if not self._text:
                    yield from self._more()
                length, text = reader.feed(self._text)
                self._take(length)
                self._add_arguments(text)
                if reader.is_broken:
                    raise NoCall
        except End:
            self._add_arguments(reader.held + self._take(len(self._text)))
            raise

    def _value(self, at: int) -> Steps[tuple[str, int]]:
        """The JSON of a value, and where it ends; nothing is taken. Raises NoCall for what is no value."""
        reader, given, place = JsonReader(), [], self._place(at)
        while True:
            length, text = reader.feed(self._text[at:])
            at += length
            given.append(text)
            self._inner.update(place + opened for opened in reader.opened)
            reader.opened.clear()
            if reader.is_broken:
                raise NoCall
            if reader.is_done:
                return "".join(given), at
            yield from self._more()


def _object_of(text: str) -> str:
    """Arguments that came as JSON, as a string with JSON in it, or as null. Raises NoCall for what is no object."""
    if text == "null":
        return "{}"
    if text.startswith('"'):
        inner = str(json.loads(text)).strip() or "{}"
        is_text = json_of(inner) == json.dumps(inner, ensure_ascii=False)  # no half of a character is in it
        text = (read_json(inner) if is_text else None) or ""
    if not text.startswith("{"):
        raise NoCall
    return text
