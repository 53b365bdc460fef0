"""Argument values: what a text in a call stands for, by the schema of the argument.

A value is read as the first type that it fits without doubt; where a schema cannot be read, nothing is repaired.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from text.argument_schemas import NULLS, fits, is_written_as_text, kinds_of, resolved, takes_any_text
from text.lenient_json import is_json, json_of, number, read_json

THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")
BOOLEANS = {"true": "true", "false": "false", "True": "true", "False": "false"}
WORDS = {"True": "true", "False": "false", "None": "null"}  # Python's words and JSON's
MAX_DIGITS = 4000  # Python reads no longer integers
_MEMBERS = json.JSONDecoder(parse_int=len, parse_float=len)  # numbers may be of any size
_BEFORE_KEY, _BEFORE_VALUE = re.compile(r"[\s,]*"), re.compile(r"[\s:]*")


def argument_of(text: str, schema: Any, root: Mapping[str, Any], is_guarded: bool = False) -> str:
    """Returns the JSON of an argument that was written as plain text: the most certain value that fits its schema.

    root: the document that the schema's references lead into; is_guarded: a grammar kept the text valid.
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
    """Returns the same object; texts where the schema takes none are read as what it takes there."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return arguments
    pieces, at = [], 0
    try:
        for key, start, end in _members(arguments):
            if arguments[start] == '"' and key in properties:
                value = _fitted_text(arguments[start:end], properties[key], schema)
                pieces += [arguments[at:start], value]
                at = end
    except (ValueError, IndexError, RecursionError):  # not an object
        return arguments
    return "".join(pieces) + arguments[at:]


def _members(text: str) -> Iterator[tuple[str, int, int]]:
    """Yields the keys of an object and the places of their values. Raises ValueError or IndexError for other JSON."""
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
    """Returns a JSON string, or the value that it stands for."""
    text = json.loads(literal)
    if fits(text, schema, root):
        return literal
    value = argument_of(text, schema, root)
    return value if fits(value_of(value), schema, root) else literal


def _candidates(text: str, kinds: list[str], schema: Any, root: Mapping[str, Any]) -> Iterator[str]:
    """Yields what a text may stand for, the most certain first."""
    stripped = text.strip()
    is_literal = stripped.startswith('"') and is_json(stripped)
    if not kinds:
        yield stripped if is_json(stripped) else WORDS.get(stripped, json_of(text))
    if "null" in kinds and stripped in NULLS:
        yield NULLS[stripped]
    if "boolean" in kinds and stripped in BOOLEANS:
        yield BOOLEANS[stripped]
    if stripped.startswith(("{", "[")) and (read := read_json(stripped)) is not None:
        yield read
    for kind in kinds:
        if kind == "string":
            yield json_of(text)
        elif kind in ("integer", "number") and (found := _number(stripped)) is not None:
            yield found
    if is_literal:
        yield stripped
    if is_literal and "string" not in kinds:  # JSON inside of JSON
        yield from _candidates(json.loads(stripped), kinds, schema, root)
    if "array" in kinds and stripped and stripped not in NULLS:
        yield from _lists_of_one(stripped, is_literal, schema, root)


def _number(text: str) -> str | None:
    return number(text.replace(",", "") if THOUSANDS.fullmatch(text) else text)


def _lists_of_one(text: str, is_literal: bool, schema: Any, root: Mapping[str, Any]) -> Iterator[str]:
    """Yields a list of one value, where a list is wanted; a text with commas or lines may be several values."""
    items = resolved(schema, root).get("items", {})
    kinds = kinds_of(items, root)
    if "array" in kinds:
        return
    if is_literal:
        yield f"[{text}]"
    if not re.search(r"[,\n\[]", text) or (text.startswith("{") and "object" in kinds):
        yield f"[{argument_of(text, items, root)}]"


def value_of(text: str) -> Any:
    """Returns Python's value of JSON, for comparisons: the longest numbers are cut. None if the text is not JSON."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits[:MAX_DIGITS]))
    except (ValueError, RecursionError):
        return None
