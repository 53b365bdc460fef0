"""GemmaReader: turns the arguments of a call in Gemma's notation, piece by piece, into JSON.

    {city:<|"|>Oslo<|"|>,days:3,near:[<|"|>Bergen<|"|>],exact:{x:true}}

JSON is read in the same places, for models write both. A text between marks may be anything but the mark. Where no
grammar holds, a mark inside of a text that no argument and no end follows is a quotation mark, which models write so,
and words without marks are read by the schema. What the reader has given is always the beginning of JSON.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from text.argument_schemas import fits, resolved
from text.argument_values import argument_of, value_of
from text.detokenizer import overlap
from text.lenient_json import BLANKS, WORDS, JsonReader, json_of, number

MAX_WORD = 400  # characters of a word, or of a key, that has no marks around it
MAX_FOLLOWER = 256  # characters of the text behind a mark that say whether the mark ends a text
_BLANK = rf"[{BLANKS}]{{0,20}}"
BARE_KEY = re.compile(r"[^\s,:{}\[\]\"'<>|]{1,100}")  # a key that needs no quotes
_CLOSER = re.compile(rf"{_BLANK}([}}\]])")
_NEXT_KEY = re.compile(rf",{_BLANK}({BARE_KEY.pattern}){_BLANK}:{_BLANK}\Z")
_NO_BLANK = re.compile(rf"[^{BLANKS}]|\Z")
_HALF = re.compile("[\ud800-\udfff]")  # a character
_CLOSES = {"{": "}", "[": "]"}

# What may come next: a value, or the end of an empty list; a key, or the end of an object; a colon; a comma or an end
VALUE, ITEM, KEY, COLON, NEXT = "value", "item", "key", "colon", "next"

Found = tuple[int, str] | None  # the place behind what was read, and its JSON; None: more text must come to tell


@dataclass(frozen=True)
class Notation:
    """The marks of the notation, as they are in the text."""

    quote: str  # around texts
    end: str  # behind a call
    begin: str  # before one
    spelled: str  # the quote as the model's vocabulary has it
    is_marked: bool  # the call begins with its mark

    @cached_property
    def key_end(self) -> re.Pattern[str]:
        return re.compile(rf"[,:{{}}\[\]\"'\n]|{re.escape(self.quote)}|{re.escape(self.end)}")

    @cached_property
    def word_end(self) -> re.Pattern[str]:
        return re.compile(rf"[,:{{}}\[\]\n]|{re.escape(self.quote)}|{re.escape(self.end)}")

    @cached_property
    def followers(self) -> dict[str, re.Pattern[str]]:
        """By the bracket that is still open, what follows the end of a text; "": none is open."""
        quote, begin, end = map(re.escape, (self.quote, self.begin, self.end))
        quoted = rf"{quote}[^\n]{{1,100}}?{quote}|\"[^\"\n]{{1,100}}\"|'[^'\n]{{1,100}}'"
        key = rf",{_BLANK}(?:(?:{BARE_KEY.pattern}|{quoted}){_BLANK}:|}})"
        patterns = {"}": key, "]": ",", "": rf"\n|{end}|{begin}|call:" if self.is_marked else ""}
        return {closer: re.compile(rf"{_BLANK}(?:{pattern})") for closer, pattern in patterns.items()}


@dataclass
class _Level:
    """An object or a list that is not closed yet."""

    closer: str
    schema: Mapping[str, Any]
    key: str = ""  # of the value that is read
    keys: set[str] = field(default_factory=set)

    @property
    def inner(self) -> Any:
        """The schema of the value that is read."""
        parts = self.schema.get("items") if self.closer == "]" else self.schema.get("properties")
        return parts if self.closer == "]" else parts.get(self.key) if isinstance(parts, dict) else None

    def lacks(self, key: str) -> bool:
        """Returns whether this is an object whose schema has the key, which has not come."""
        properties = self.schema.get("properties")
        return self.closer == "}" and isinstance(properties, dict) and key in properties and key not in self.keys


def written(value: Any, quote: str) -> str:
    """Returns a value in the notation, with JSON in the place of what it cannot say."""
    if isinstance(value, dict):
        members = (f"{_written_key(key)}:{written(value[key], quote)}" for key in in_order(value))
        return f"{{{','.join(members)}}}"
    if isinstance(value, list):
        return f"[{','.join(written(item, quote) for item in value)}]"
    is_text = isinstance(value, str) and quote not in value
    return f"{quote}{value}{quote}" if is_text else json.dumps(value, ensure_ascii=False)


def _written_key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else json.dumps(key, ensure_ascii=False)


def in_order(keys: Iterable[str]) -> list[str]:
    """Returns keys in the order in which the template writes them."""
    return sorted(keys, key=str.lower)


class GemmaReader:
    """Reads one object."""

    def __init__(self, notation: Notation, schema: Mapping[str, Any], is_loose: bool) -> None:
        """schema: of the object. is_loose: no grammar keeps it valid."""
        self._notation, self._root, self._is_loose = notation, schema, is_loose
        self._open: list[_Level] = []
        self._expects = VALUE
        self._comma = ""  # given before what follows, if that is no end
        self._json: JsonReader | None = None  # of the string in quotes that it is in
        self._is_in_text = False  # between marks
        self._has_end = self._has_quote = False  # the mark of the call's end is in this text, or one that is a quote
        self._pieces: list[str] = []  # of the string that it is in; see `_is_held_back`
        self._ended = ""  # "cut" or "whole": no more text comes
        self.is_done = self.is_broken = False

    def feed(self, text: str) -> tuple[int, str]:
        """Returns how many of these characters were read, and the JSON that they make certain. The others may become
        something else, and must come again with those that follow."""
        at, given = 0, []
        while at < len(text) and not (self.is_done or self.is_broken):
            found = self._step(text, at)
            if found is None:
                break
            at, piece = found
            given.append(piece)
        return at, _without_halves("".join(given))

    def end(self, text: str, is_whole: bool) -> str:
        """Returns the JSON of the last text: the beginning of what is cut off. is_whole: the model itself ended here,
        and may have forgotten the last brace."""
        self._ended = "whole" if is_whole else "cut"
        length, given = self.feed(text)
        if self.is_done or self.is_broken:
            return given
        if is_whole and self._expects == NEXT and len(self._open) == 1:
            self.is_done = True
            return given + "}"
        return given + _without_halves(self._beginning(text[length:].strip(BLANKS)))

    def _beginning(self, rest: str) -> str:
        if self._is_in_text or self._json is not None:
            self.is_broken = self._has_quote or self._has_end
            return _escaped("".join(self._pieces)) if self._is_held_back else ""
        if not rest or self._expects not in (KEY, VALUE, ITEM):
            return ""
        if self._expects == KEY or (self._is_loose and not _may_be_literal(rest)):
            return self._behind_comma(json_of(rest)[:-1])
        return self._behind_comma(number(rest) or "")

    @property
    def _is_held_back(self) -> bool:
        """Whether what it reads is a text whose end may turn out to be elsewhere."""
        return self._is_loose and self._is_in_text and self._expects != KEY

    def _step(self, text: str, at: int) -> Found:
        if self._json is not None:
            return self._in_json(self._json, text, at)
        if self._is_in_text:
            return self._in_text(text, at)
        found = _NO_BLANK.search(text, at)
        assert found is not None
        if found.start() > at:
            return found.start(), ""
        return self._between(text, at)

    # --- strings

    def _in_json(self, reader: JsonReader, text: str, at: int) -> Found:
        length, given = reader.feed(text[at:])
        self._pieces.append(given)
        if reader.is_done:
            self._json = None
            self._end_string(json.loads("".join(self._pieces)))
        return at + length, given.replace(self._notation.quote, _escaped(self._notation.spelled))

    def _in_text(self, text: str, at: int) -> Found:
        quote = self._notation.quote
        found = text.find(quote, at)
        end = found if found >= 0 else len(text) - overlap(text[at:], quote)
        if end > at:
            return end, self._said(text[at:end])
        if found < 0:
            return None
        behind = found + len(quote)
        is_end = self._is_end(text, behind) if self._is_held_back else True
        if is_end is None:
            return None
        return (behind, self._end_text()) if is_end else self._inside(found, behind)

    def _said(self, text: str) -> str:
        end = self._notation.end
        before = "".join(self._pieces[1 - len(end) :])[1 - len(end) :] if len(end) > 1 else ""
        self._has_end = self._has_end or end in before + text
        self._pieces.append(text)
        return "" if self._is_held_back else _escaped(text)

    def _end_text(self) -> str:
        text = "".join(self._pieces)
        given = _escaped(text) if self._is_held_back else ""
        self._is_in_text = False
        self._end_string(text)
        return given + '"'

    def _end_string(self, value: str) -> None:
        if self._expects == KEY:
            self._take_key(value)
        else:
            self._expects = NEXT

    def _is_end(self, text: str, at: int) -> bool | None:
        """Returns whether the mark before this place ends a text: an argument or the call's end follows. None: more
        text must come to tell."""
        num_open = len(self._open)
        while num_open and (found := _CLOSER.match(text, at)):
            if found[1] != self._open[num_open - 1].closer:
                return False
            num_open, at = num_open - 1, found.end()
        closer, rest = self._open[num_open - 1].closer if num_open else "", text[at : at + MAX_FOLLOWER]
        lacks_brace = num_open == 1 and rest.lstrip(BLANKS).startswith(self._notation.end)
        if lacks_brace or self._notation.followers[closer].match(rest):
            return True
        if self._ended:
            return not rest.strip(BLANKS) or rest.lstrip(BLANKS)[0] == ","
        return False if len(rest) == MAX_FOLLOWER else None

    def _inside(self, found: int, behind: int) -> Found:
        """Reads a mark that ends no text: a quotation mark, or the beginning of the next argument's text."""
        if self._has_end:  # that may have been the end of the call
            return self._broken(found)
        level, tail = self._open[-1], "".join(self._pieces[-MAX_FOLLOWER:])
        next_key = _NEXT_KEY.search(tail[-MAX_FOLLOWER:])
        if next_key is None or not level.lacks(next_key[1]):
            self._pieces.append('"')
            self._has_quote = True
            return behind, ""
        said = "".join(self._pieces)[: -len(next_key[0])]
        self._is_in_text, self._comma = False, ", "
        return found, f'{_escaped(said)}"{self._take_key(next_key[1])}{self._take_colon()}'

    # --- keys, numbers and words

    def _bare_key(self, text: str, at: int) -> Found:
        found = self._notation.key_end.search(text, at, at + MAX_WORD)
        if found is None:
            return None if len(text) < at + MAX_WORD else self._broken(at)
        key = text[at : found.start()].rstrip(BLANKS)
        if not key or found[0] != ":":
            return self._broken(at)
        return found.start(), self._take_key(key)

    def _take_key(self, key: str) -> str:
        """Returns the JSON of a key that has not been given."""
        level = self._open[-1]
        self.is_broken = self._is_loose and key in level.keys
        level.key, self._expects = key, COLON
        level.keys.add(key)
        return self._behind_comma(json_of(key))

    def _take_colon(self) -> str:
        self._expects = VALUE
        return ": "

    def _word(self, text: str, at: int) -> Found:
        found = self._notation.word_end.search(text, at, at + MAX_WORD)
        if found is None and self._ended != "whole":
            return None if len(text) < at + MAX_WORD else self._broken(at)
        word = text[at : found.start() if found else len(text)].rstrip(BLANKS)
        if not word or (found is not None and found[0] not in (*",}]\n", self._notation.end)):
            return self._broken(at)
        self._expects = NEXT
        return at + len(word), self._behind_comma(self._value_of(word))

    def _value_of(self, word: str) -> str:
        """Returns the JSON of a word: a number or a name if it fits the schema or is nothing else, or else a text."""
        literal, schema = WORDS.get(word) or number(word), self._open[-1].inner
        is_certain = literal is not None and (not self._is_loose or literal == "null")
        if literal is not None and (is_certain or fits(value_of(literal), schema, self._root)):
            return literal
        argument = argument_of(word, schema, self._root)
        return argument if literal is None or fits(value_of(argument), schema, self._root) else literal

    # --- what is between them

    def _between(self, text: str, at: int) -> Found:
        character = text[at]
        if self._open and character == self._open[-1].closer and self._expects in (NEXT, KEY, ITEM):
            self._comma, self._expects = "", NEXT
            self._open.pop()
            self.is_done = not self._open
            return at + 1, character
        if self._expects == COLON:
            return (at + 1, self._take_colon()) if character == ":" else self._broken(at)
        return self._behind_value(text, at) if self._expects == NEXT else self._begun(text, at)

    def _behind_value(self, text: str, at: int) -> Found:
        if text[at] == ",":
            self._comma, self._expects = ", ", KEY if self._open[-1].closer == "}" else ITEM
            return at + 1, ""
        if len(self._open) > 1 or not text.startswith(self._notation.end, at):
            may_be_end = len(self._open) == 1 and self._notation.end.startswith(text[at:])
            return None if may_be_end else self._broken(at)
        self.is_done = True  # without its brace
        return at, "}"

    def _begun(self, text: str, at: int) -> Found:
        quote, character = self._notation.quote, text[at]
        if quote.startswith(text[at:]) and text[at:] != quote and not self._ended:
            return None
        self._has_end, self._has_quote, self._pieces = False, False, []
        if text.startswith(quote, at):
            self._is_in_text = True
            return at + len(quote), self._behind_comma('"')
        if character in "\"'":
            self._json = JsonReader()
            return at, self._behind_comma("")
        if self._expects == KEY:
            return self._bare_key(text, at)
        if character not in _CLOSES:
            return self._word(text, at)
        schema = resolved(self._open[-1].inner if self._open else self._root, self._root)
        self._open.append(_Level(_CLOSES[character], schema))
        self._expects = KEY if character == "{" else ITEM
        return at + 1, self._behind_comma(character)

    def _behind_comma(self, text: str) -> str:
        comma, self._comma = self._comma, ""
        return comma + text

    def _broken(self, at: int) -> Found:
        self.is_broken = True
        return at, ""


def _may_be_literal(word: str) -> bool:
    return number(word) is not None or any(name.startswith(word) for name in WORDS)


def _without_halves(text: str) -> str:
    """Returns the same JSON without halves of characters, which it can only have as escapes."""
    return _HALF.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _escaped(text: str) -> str:
    """Returns a text as it stands between the quotes of JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
