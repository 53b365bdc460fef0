"""What a text stands for where a schema says what it may be: values of calls' arguments.

A value is read as the first type that it fits without doubt. The types that a schema may take come from `type`, `enum`,
`const`, `anyOf`, `oneOf`, `allOf` and local `$ref`s; other keywords, such as limits and patterns, are not looked at.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from lenient_json import is_json, json_of, number, read_json
from tool_formats import are_texts, is_plain_text

MOST_REFERENCES = 60  # one behind the other
THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")
NULLS = {"null": "null", "None": "null"}
BOOLEANS = {"true": "true", "false": "false", "True": "true", "False": "false"}
WORDS = {"True": "true", "False": "false", "None": "null"}  # Python's, which are no JSON
MOST_DIGITS = 4000  # that Python reads as one number
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
    values, properties = value_of(arguments), schema.get("properties")
    if not isinstance(values, dict) or not isinstance(properties, dict):
        return arguments
    read: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, str) and key in properties and not fits(value, properties[key], schema):
            own = argument_of(value, properties[key], schema)
            if fits(value_of(own), properties[key], schema):
                read[key] = own
    if not read:
        return arguments
    try:
        whole = json.loads(arguments)
    except ValueError:  # a number of more digits than Python reads
        return arguments
    members = [f"{json_of(key)}: {read.get(key) or json_of(value)}" for key, value in whole.items()]
    return f"{{{', '.join(members)}}}"


def _candidates(text: str, kinds: list[str], schema: Any, root: Mapping[str, Any]) -> Iterator[str]:
    """What a text may stand for, the most certain first."""
    own = text.strip()
    is_literal = own.startswith('"') and is_json(own)
    if is_literal or (not kinds and is_json(own)):
        yield own
    if not kinds:
        yield WORDS.get(own, json_of(text))
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
    if is_literal and "string" not in kinds:  # JSON inside of JSON
        yield from _candidates(json.loads(own), kinds, schema, root)
    if "array" in kinds and own:
        yield from _lists_of_one(own, is_literal, schema, root)


def _number(text: str) -> str | None:
    return number(text.replace(",", "") if THOUSANDS.fullmatch(text) else text)


def _lists_of_one(text: str, is_literal: bool, schema: Any, root: Mapping[str, Any]) -> Iterator[str]:
    """A value alone where a list is asked for; one with commas or lines may be several."""
    if is_literal:
        yield f"[{text}]"
    items = _resolved(schema, root).get("items", {})
    if not re.search(r"[,\n\[]", text) or (text.startswith("{") and "object" in kinds_of(items, root)):
        yield f"[{argument_of(text, items, root)}]"


def value_of(text: str) -> Any:
    """Python's value of JSON, for comparisons: the longest numbers are cut. None if it is no JSON."""
    try:
        return json.loads(text, parse_int=lambda digits: int(digits[:MOST_DIGITS]))
    except (ValueError, RecursionError):
        return None


# --- schemas


def kinds_of(schema: Any, root: Mapping[str, Any], seen: dict[int, list[str]] | None = None) -> list[str]:
    """The types that a schema may take, in its order; none: it says nothing of types.

    seen: the types of the schemas met so far, since references can meet one often, or lead around in a circle.
    """
    schema, seen = _resolved(schema, root), {} if seen is None else seen
    if id(schema) not in seen:
        seen[id(schema)] = []
        seen[id(schema)] = _kinds(schema, root, seen) if schema else []
    return seen[id(schema)]


def _kinds(schema: Mapping[str, Any], root: Mapping[str, Any], seen: dict[int, list[str]]) -> list[str]:
    found = [_named(schema.get("type"))]
    if "const" in schema or isinstance(schema.get("enum"), list):
        found.append([_kind(value) for value in schema.get("enum", [schema.get("const")])])
    for key in ("anyOf", "oneOf"):
        choices = [kinds_of(own, root, seen) for own in _list(schema.get(key))]
        found.append([kind for own in choices for kind in own] if all(choices) else [])
    found += [kinds_of(own, root, seen) for own in _list(schema.get("allOf"))]
    said = [own for own in found if own]
    kinds = [kind for kind in dict.fromkeys(said[0]) if all(_has(own, kind) for own in said[1:])] if said else []
    return [*kinds, "null"] if kinds and schema.get("nullable") is True else kinds


def fits(value: Any, schema: Any, root: Mapping[str, Any]) -> bool:
    """Whether a value has the types, choices and properties that a schema asks for."""
    return _Check(root).fits(value, schema)


class _Check:
    """Meets each pair of a value and a schema once, however often references lead to it."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._seen: dict[tuple[int, int], bool] = {}

    def fits(self, value: Any, schema: Any) -> bool:
        if schema is False:
            return False
        schema = _resolved(schema, self._root)
        if not schema or (value is None and schema.get("nullable") is True):
            return True
        pair = id(value), id(schema)
        if pair not in self._seen:
            self._seen[pair] = True
            self._seen[pair] = self._is_chosen(value, schema) and self._has_parts(value, schema)
        return self._seen[pair]

    def _is_chosen(self, value: Any, schema: Mapping[str, Any]) -> bool:
        kinds = _named(schema.get("type"))
        if kinds and not any(_is(value, kind) for kind in kinds):
            return False
        choices = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(choices, list) and not any(_is_same(value, choice) for choice in choices):
            return False
        some = [own for key in ("anyOf", "oneOf") if (own := _list(schema.get(key)))]
        return all(any(self.fits(value, own) for own in choices) for choices in some) and all(
            self.fits(value, own) for own in _list(schema.get("allOf"))
        )

    def _has_parts(self, value: Any, schema: Mapping[str, Any]) -> bool:
        if isinstance(value, list):
            return all(self.fits(item, schema.get("items", True)) for item in value)
        if not isinstance(value, dict):
            return True
        properties = schema.get("properties")
        known: dict[str, Any] = properties if isinstance(properties, dict) else {}
        others = True if schema.get("patternProperties") else schema.get("additionalProperties", True)
        return all(key in value for key in _list(schema.get("required"))) and all(
            self.fits(own, known.get(key, others)) for key, own in value.items()
        )


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a schema's reference leads to, in the same document; nothing if it leads nowhere."""
    for _ in range(MOST_REFERENCES):
        path = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(path, str):
            return schema if isinstance(schema, dict) else {}
        target: Any = root if path.startswith("#") else None
        for step in path.removeprefix("#").strip("/").split("/"):
            if step:
                target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        schema = target
    return {}


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
