"""What a text stands for where a schema says what it may be: values of calls' arguments.

A value is read as the first type that it fits without doubt. The types that a schema may take come from `type`, `enum`,
`const`, `anyOf`, `oneOf`, `allOf` and local `$ref`s; other keywords, such as limits and patterns, are not looked at.
What a schema says too deep down is not known: nothing fits it, and nothing is repaired by it.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from lenient_json import is_json, json_of, number, read_json
from tool_formats import are_texts, is_plain_text

MOST_REFERENCES = 60  # one behind the other
MOST_DEPTH = 60  # schemas inside of each other; those of a request have less than 100 levels of JSON, two for each
THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")
NULLS = {"null": "null", "None": "null"}
BOOLEANS = {"true": "true", "false": "false", "True": "true", "False": "false"}
WORDS = {"True": "true", "False": "false", "None": "null"}  # Python's, which are no JSON
MOST_DIGITS = 4000  # that Python reads as one number
_MEMBERS = json.JSONDecoder(parse_int=len, parse_float=len)  # numbers may be of any size
_BEFORE_KEY, _BEFORE_VALUE = re.compile(r"[\s,]*"), re.compile(r"[\s:]*")
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


def argument_of(text: str, schema: Any, root: Mapping[str, Any]) -> str:
    """The JSON of an argument that was written as plain text; the text as a string if it can be read as nothing else.

    schema: the argument's; root: the document that its references are in.
    """
    if is_plain_text(schema) or are_texts(schema):
        return json_of(text)
    kinds = kinds_of(schema, root)
    for candidate in _candidates(text, kinds, schema, root):
        if fits(value_of(candidate), schema, root):
            return candidate
    return text if "string" not in kinds and is_json(text) else json_of(text)


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
    items = _resolved(schema, root).get("items", {})
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


# --- schemas


def kinds_of(schema: Any, root: Mapping[str, Any]) -> list[str]:
    """The types that a schema may take, in its order; none: it says nothing of types, or too deep down."""
    return _Kinds(root).of(schema, 0)


class _Kinds:
    """Meets each schema once, since references can meet one often, or lead around in a circle."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._seen: dict[int, list[str]] = {}

    def of(self, schema: Any, depth: int) -> list[str]:
        schema = _resolved(schema, self._root)
        if depth > MOST_DEPTH:
            return []
        if id(schema) not in self._seen:
            self._seen[id(schema)] = []
            self._seen[id(schema)] = self._found(schema, depth + 1) if schema else []
        return self._seen[id(schema)]

    def _found(self, schema: Mapping[str, Any], depth: int) -> list[str]:
        found = [_named(schema.get("type"))]
        if "const" in schema or isinstance(schema.get("enum"), list):
            found.append([_kind(value) for value in _list(schema.get("enum")) or [schema.get("const")]])
        for key in ("anyOf", "oneOf"):
            choices = [self.of(own, depth) for own in _list(schema.get(key))]
            found.append([kind for own in choices for kind in own] if all(choices) else [])
        found += [self.of(own, depth) for own in _list(schema.get("allOf"))]
        return _common(found, schema.get("nullable") is True)


def _common(found: list[list[str]], is_nullable: bool) -> list[str]:
    """The types that all agree on who say something."""
    said = [own for own in found if own]
    kinds = [kind for kind in dict.fromkeys(said[0]) if all(_has(own, kind) for own in said[1:])] if said else []
    return [*kinds, "null"] if kinds and is_nullable else kinds


def fits(value: Any, schema: Any, root: Mapping[str, Any]) -> bool:
    """Whether a value has the types, choices and properties that a schema asks for."""
    return _Check(root).fits(value, schema, 0)


class _Check:
    """Meets each pair of a value and a schema once, however often references lead to it."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._seen: dict[tuple[int, int], bool] = {}

    def fits(self, value: Any, schema: Any, depth: int) -> bool:
        if schema is False or depth > MOST_DEPTH:
            return False
        schema = _resolved(schema, self._root)
        if not schema or (value is None and schema.get("nullable") is True):
            return True
        pair = id(value), id(schema)
        if pair not in self._seen:
            self._seen[pair] = True
            self._seen[pair] = self._is_chosen(value, schema, depth + 1) and self._has_parts(value, schema, depth + 1)
        return self._seen[pair]

    def _is_chosen(self, value: Any, schema: Mapping[str, Any], depth: int) -> bool:
        kinds = _named(schema.get("type"))
        if kinds and not any(_is(value, kind) for kind in kinds):
            return False
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(choices, list) and not any(_is_same(value, choice) for choice in choices):
            return False
        some = [own for key in ("anyOf", "oneOf") if (own := _list(schema.get(key)))]
        return all(any(self.fits(value, own, depth) for own in choices) for choices in some) and all(
            self.fits(value, own, depth) for own in _list(schema.get("allOf"))
        )

    def _has_parts(self, value: Any, schema: Mapping[str, Any], depth: int) -> bool:
        if isinstance(value, list):
            return all(self.fits(item, schema.get("items", True), depth) for item in value)
        if not isinstance(value, dict):
            return True
        properties = schema.get("properties")
        known: dict[str, Any] = properties if isinstance(properties, dict) else {}
        others = True if schema.get("patternProperties") else schema.get("additionalProperties", True)
        return all(key in value for key in _list(schema.get("required")) if isinstance(key, str)) and all(
            self.fits(own, known.get(key, others), depth) for key, own in value.items()
        )


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a schema's reference leads to, in the same document; nothing if it leads nowhere."""
    for _ in range(MOST_REFERENCES):
        path = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(path, str):
            return schema if isinstance(schema, dict) else {}
        target: Any = root if path.startswith("#") else None
        for step in filter(None, unquote(path.removeprefix("#")).split("/")):
            target = _part(target, step.replace("~1", "/").replace("~0", "~"))
        schema = target
    return {}


def _part(value: Any, key: str) -> Any:
    if isinstance(value, list) and key in map(str, range(len(value))):
        return value[int(key)]
    return value.get(key) if isinstance(value, dict) else None


def _named(kind: Any) -> list[str]:
    return [kind] if isinstance(kind, str) else [own for own in _list(kind) if isinstance(own, str)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _kind(value: Any) -> str:
    return KINDS.get(type(value), "null")


def _has(kinds: list[str], kind: str) -> bool:
    return kind in kinds or (kind == "integer" and "number" in kinds)


def _is(value: Any, kind: str) -> bool:
    own = _kind(value)
    is_whole = isinstance(value, float) and value.is_integer()
    return own == kind or (own == "integer" and kind == "number") or (kind == "integer" and is_whole)


def _is_same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
