"""JsonReader: turns JSON as models write it, piece by piece, into JSON of RFC 8259.

What is not quite JSON is repaired where it can be read in one way alone: strings in single quotes, line breaks and
other control characters inside of strings, backslashes that escape nothing, a comma before the closing bracket,
Python's `True`, `False` and `None`, numbers such as `+5`, `.5` and `5.`. JSON itself passes unchanged, blanks and all.
Everything else is broken: bare words, missing commas, NaN. What the reader has given is always the beginning of JSON.
"""

import json
import re

BLANKS = " \t\r\n"
WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LOOSE_NUMBER = re.compile(r"([+-]?)(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][+-]?[0-9]+)?")
_BLANK = re.compile(rf"[{BLANKS}]+")
_WORD = re.compile(r"[^\s,:{}\[\]\"']*")
_WORD_STARTS = frozenset("+-.0123456789tfnTFN")
_PLAIN = {quote: re.compile(rf'[^{quote}"\\\x00-\x1f]+') for quote in "\"'"}
_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_CLOSES = {"{": "}", "[": "]"}
MAX_ESCAPE_LENGTH = 6  # characters: a backslash, u and four digits

# What may come next: a value, or the end of an empty list; a key, or the end of an object; a colon; a comma or an end
VALUE, ITEM, KEY, COLON, NEXT = "value", "item", "key", "colon", "next"


class JsonReader:
    """Reads one value."""

    def __init__(self) -> None:
        self._open: list[str] = []  # brackets that are not closed yet
        self._expects = VALUE
        self._quote = self._escape = ""  # of the string that it is in
        self._word: list[str] | None = None  # a number or a name, so far
        self._comma = ""  # with the blanks after it; given before what follows, if that is no end
        self._num_read = 0  # characters, before the text that it is in
        self.opened: list[int] = []  # where objects and lists begin, from the beginning of the text on
        self.is_done = self.is_broken = False

    def feed(self, text: str) -> tuple[int, str]:
        """Returns how many of these characters belong to the value, and the JSON that they make certain."""
        at, given = 0, []
        while at < len(text) and not (self.is_done or self.is_broken):
            step = self._in_string if self._quote else self._between if self._word is None else self._in_word
            at, piece = step(text, at)
            given.append(piece)
        self._num_read += at
        return at, "".join(given)

    @property
    def held(self) -> str:
        """The text that is not certain yet, as it was written."""
        return self._escape + "".join(self._word or ())

    # --- strings

    def _in_string(self, text: str, at: int) -> tuple[int, str]:
        if self._escape:
            return self._in_escape(text, at)
        if found := _PLAIN[self._quote].match(text, at):
            return found.end(), found[0]
        character = text[at]
        if character == self._quote:
            self._quote = ""
            self._expects = COLON if self._expects == KEY else NEXT
            self.is_done = not self._open
            return at + 1, '"'
        if character == "\\":
            self._escape = "\\"
            return at + 1, ""
        return at + 1, json.dumps(character)[1:-1]

    def _in_escape(self, text: str, at: int) -> tuple[int, str]:
        """A backslash that escapes nothing stands for itself, and what follows it is read again."""
        escape = self._escape + text[at]
        if escape == "\\'":
            self._escape = ""
            return at + 1, "'"
        if len(escape) == 2 and escape[1] in _ESCAPES:
            self._escape = ""
            return at + 1, escape
        if escape[1] == "u" and (len(escape) == 2 or escape[-1] in _HEX):
            self._escape = "" if len(escape) == MAX_ESCAPE_LENGTH else escape
            return at + 1, "" if self._escape else escape
        literal, self._escape = self._escape[1:], ""
        return at, "\\\\" + literal

    # --- numbers and names

    def _in_word(self, text: str, at: int) -> tuple[int, str]:
        assert self._word is not None
        found = _WORD.match(text, at)
        assert found is not None
        self._word.append(found[0])
        return (found.end(), "") if found.end() == len(text) else (found.end(), self.end())

    def end(self) -> str:
        """Ends a number or a name, since there is no more text; returns its JSON."""
        if self._word is None:
            return ""
        word, self._word, self._expects = "".join(self._word), None, NEXT
        self.is_done = not self._open
        strict = WORDS.get(word) or number(word)
        self.is_broken = strict is None
        return strict or ""

    # --- what is between them

    def _between(self, text: str, at: int) -> tuple[int, str]:
        if found := _BLANK.match(text, at):
            if self._comma:
                self._comma += found[0]
            return found.end(), "" if self._comma else found[0]
        character = text[at]
        if self._open and character == _CLOSES[self._open[-1]] and self._expects in (NEXT, KEY, ITEM):
            return at + 1, self._closed(character)
        if self._expects == NEXT and character == "," and not self._comma:
            self._expects, self._comma = KEY if self._open[-1] == "{" else ITEM, ","
            return at + 1, ""
        if self._expects == COLON and character == ":":
            self._expects = VALUE
            return at + 1, ":"
        return self._begun(character, at)

    def _closed(self, character: str) -> str:
        blanks, self._comma, self._expects = self._comma[1:], "", NEXT
        self._open.pop()
        self.is_done = not self._open
        return blanks + character

    def _begun(self, character: str, at: int) -> tuple[int, str]:
        before, self._comma = self._comma, ""
        if character in "\"'" and self._expects in (VALUE, ITEM, KEY):
            self._quote = character
            return at + 1, before + '"'
        if character in _CLOSES and self._expects in (VALUE, ITEM):
            self._open.append(character)
            self.opened.append(self._num_read + at)
            self._expects = KEY if character == "{" else ITEM
            return at + 1, before + character
        if character in _WORD_STARTS and self._expects in (VALUE, ITEM):
            self._word = []
            return at, before
        self.is_broken = True
        return at, ""


def number(word: str) -> str | None:
    """Returns a number as JSON writes it; None if the word is not a number."""
    if _NUMBER.fullmatch(word):
        return word
    found = _LOOSE_NUMBER.fullmatch(word)
    if found is None or not (found[2] or len(found[3] or "") > 1):
        return None
    sign, whole, fraction, exponent = (part or "" for part in found.groups())
    return f"{'-' if sign == '-' else ''}{whole or '0'}{fraction if len(fraction) > 1 else ''}{exponent}"


def read_json(text: str) -> str | None:
    """Returns the JSON of a text that is one value; None if it is anything else."""
    reader = JsonReader()
    length, given = reader.feed(text)
    given += reader.end()
    is_whole = reader.is_done and not reader.is_broken and not text[length:].strip(BLANKS)
    return given if is_whole else None


def is_json(text: str) -> bool:
    """Returns whether a text is JSON by the letter of RFC 8259: no NaN, no infinity; numbers may be of any size."""
    try:
        json.loads(text, parse_constant=_refuse, parse_int=len, parse_float=len)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def json_of(value: object) -> str:
    """Returns the JSON of a value. Raises ValueError for what JSON cannot say."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character
        return json.dumps(value, allow_nan=False)
    return text
