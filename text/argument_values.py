"""What a text stands for where a schema says what it may be: values of calls' arguments.

A value is read as the first type that it fits without doubt; by a schema that is not known nothing is repaired.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from text.argument_schemas import NULLS, fits, is_written_as_text, kinds_of, resolved, takes_any_text
from text.lenient_json import is_json, json_of, number, read_json

THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")
BOOLEANS = {"true": "true", "false": "false", "True": "true", "False": "false"}
WORDS = {"True": "true", "False": "false", "None": "null"}  # Python's, which are no JSON
MOST_DIGITS = 4000  # that Python reads as one number
_MEMBERS = json.JSONDecoder(parse_int=len, parse_float=len)  # numbers may be of any size
_BEFORE_KEY, _BEFORE_VALUE = re.compile(r"[\s,]*"), re.compile(r"[\s:]*")


def argument_of(text: str, schema: Any, root: Mapping[str, Any], is_guarded: bool = False) -> str:
    """The JSON of an argument that was written as plain text; the text as a string if it can be read as nothing else.

    schema: the argument's; root: the document that its references are in; is_guarded: a grammar kept the text valid.
    """
    if is_guarded and not is_written_as_text(schema, root) and is_json(text):
        return text.strip()
    kinds = kinds_of(schema, root)
    for candidate in _candidates(text, kinds, schema, root):
        if fits(value_of(candidate), schema, root):
            return candidate
    is_text = "string" in kinds or not is_json(text) or takes_any_text(schema, root)
    return json_of(text) if is_text else text


def fitted(arguments: str, schema: Mapping[str, Any]) -> str:
    """The same object, with texts read as what the schema asks for where it takes no text there."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return arguments
    pieces, at = [], 0
    try:
        for key, start, end in _members(arguments):
            if arguments[start] == '"' and key in properties:
                own = _fitted_text(arguments[start:end], properties[key], schema)
                pieces += [arguments[at:start], own]
                at = end
    except (ValueError, IndexError, RecursionError):  # it is no object
        return arguments
    return "".join(pieces) + arguments[at:]


def _members(text: str) -> Iterator[tuple[str, int, int]]:
    """The keys of an object, and where their values are. Raises ValueError or IndexError if it is none."""
    at = text.index("{") + 1
    while text[at := _behind(_BEFORE_KEY, text, at)] != "}":
        key, at = _MEMBERS.raw_decode(text, at)
        start = _behind(_BEFORE_VALUE, text, at)
        _, at = _MEMBERS.raw_decode(text, start)
        yield key, start, at


def _behind(gap: re.Pattern[str], text: str, at: int) -> int:
    found = gap.match(text, at)
    return found.end() if found else at


def _fitted_text(literal: str, schema: Any, root: Mapping[str, Any]) -> str:
    """A string of JSON, or the value that it stands for."""
    text = json.loads(literal)
    if fits(text, schema, root):
        return literal
    own = argument_of(text, schema, root)
    return own if fits(value_of(own), schema, root) else literal


def _candidates(text: str, kinds: list[str], schema: Any, root: Mapping[str, Any]) -> Iterator[str]:
    """What a text may stand for, the most certain first."""
    own = text.strip()
    is_literal = own.startswith('"') and is_json(own)
    if not kinds:
        yield own if is_json(own) else WORDS.get(own, json_of(text))
    if "null" in kinds and own in NULLS:
        yield NULLS[own]
    if "boolean" in kinds and own in BOOLEANS:
        yield BOOLEANS[own]
    if own.startswith(("{", "[")) and (read := read_json(own)) is not None:
        yield read
    for kind in kinds:
        if kind == "string":
            yield json_of(text)
        elif kind in ("integer", "number") and (found := _number(own)) is not None:
            yield found
    if is_literal:
        yield own
    if is_literal and "string" not in kinds:  # JSON inside of JSON
        yield from _candidates(json.loads(own), kinds, schema, root)
    if "array" in kinds and own and own not in NULLS:
        yield from _lists_of_one(own, is_literal, schema, root)


def _number(text: str) -> str | None:
    return number(text.replace(",", "") if THOUSANDS.fullmatch(text) else text)


def _lists_of_one(text: str, is_literal: bool, schema: Any, root: Mapping[str, Any]) -> Iterator[str]:
    """A value alone where a list is asked for; one with commas or lines may be several, and none is a list of lists."""
    items = resolved(schema, root).get("items", {})
    kinds = kinds_of(items, root)
    if "array" in kinds:
        return
    if is_literal:
        yield f"[{text}]"
    if not re.search(r"[,\n\[]", text) or (text.startswith("{") and "object" in kinds):
        yield f"[{argument_of(text, items, root)}]"


def value_of(text: str) -> Any:
    """Python's value of JSON, for comparisons: the longest numbers are cut. None if it is no JSON."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits[:MOST_DIGITS]))
    except (ValueError, RecursionError):
        return None
