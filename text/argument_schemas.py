"""Argument schemas: which types a schema takes, whether a value fits it, and whether any text would.

The types that a schema may take come from `type`, `enum`, `const`, `anyOf`, `oneOf`, `allOf` and local `$ref`s; other
keywords, such as limits and patterns, are not looked at. What a schema says too deep down is not read, and nothing
fits it.
"""

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from text.json_schemas import ANNOTATIONS

MAX_REFERENCES = 60  # one behind another
MAX_DEPTH = 60  # schemas inside of each other; those of a request have less than 100 levels of JSON, two for each
NULLS = {"null": "null", "None": "null"}
OF_PARTS = {"properties", "required", "items", "additionalProperties"}  # keywords of objects and lists
KNOWN = {  # keywords of a schema that `fits` judges rightly
    *("type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "nullable", *OF_PARTS),
    *("$defs", "definitions", *ANNOTATIONS),
}
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


def kinds_of(schema: Any, root: Mapping[str, Any]) -> list[str]:
    """Returns the types that a schema may take, in its order; none if it names no types, or only too deep down."""
    return _Kinds(root).of(schema, 0)


class _Kinds:
    """Reads each schema once, since references can lead to it often, or around in a circle."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._seen: dict[int, list[str]] = {}

    def of(self, schema: Any, depth: int) -> list[str]:
        schema = resolved(schema, self._root)
        if depth > MAX_DEPTH:
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
            choices = [self.of(inner, depth) for inner in _list(schema.get(key))]
            found.append([kind for inner in choices for kind in inner] if all(choices) else [])
        found += [self.of(inner, depth) for inner in _list(schema.get("allOf"))]
        return _common(found, schema.get("nullable") is True)


def _common(found: list[list[str]], is_nullable: bool) -> list[str]:
    """Returns the types that are in all lists that are not empty."""
    said = [inner for inner in found if inner]
    kinds = [kind for kind in dict.fromkeys(said[0]) if all(_has(inner, kind) for inner in said[1:])] if said else []
    return [*kinds, "null"] if kinds and is_nullable else kinds


def fits(value: Any, schema: Any, root: Mapping[str, Any]) -> bool:
    """Returns whether a value has the types, choices and properties that a schema asks for."""
    return _Check(root).fits(value, schema, 0)


class _Check:
    """Compares each pair of a value and a schema once, however often references lead to it."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._seen: dict[tuple[int, int], bool] = {}

    def fits(self, value: Any, schema: Any, depth: int) -> bool:
        if schema is False or depth > MAX_DEPTH:
            return False
        schema = resolved(schema, self._root)
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
        some = [inner for key in ("anyOf", "oneOf") if (inner := _list(schema.get(key)))]
        return all(any(self.fits(value, inner, depth) for inner in choices) for choices in some) and all(
            self.fits(value, inner, depth) for inner in _list(schema.get("allOf"))
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
            self.fits(inner, known.get(key, others), depth) for key, inner in value.items()
        )


def resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follows a schema's references in the same document; returns an empty schema where they lead nowhere."""
    for _ in range(MAX_REFERENCES):
        path = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(path, str):
            return schema if isinstance(schema, dict) else {}
        schema = target_of(path, root)
    return {}


def target_of(path: str, root: Mapping[str, Any]) -> Any:
    """Returns what a reference leads to in the same document; None where it leads nowhere."""
    target: Any = root if path.startswith("#") else None
    for step in filter(None, unquote(path.removeprefix("#")).split("/")):
        target = _part(target, step.replace("~1", "/").replace("~0", "~"))
    return target


def _part(value: Any, key: str) -> Any:
    if isinstance(value, list) and key in map(str, range(len(value))):
        return value[int(key)]
    return value.get(key) if isinstance(value, dict) else None


def _named(kind: Any) -> list[str]:
    return [kind] if isinstance(kind, str) else [inner for inner in _list(kind) if isinstance(inner, str)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _kind(value: Any) -> str:
    return KINDS.get(type(value), "null")


def _has(kinds: list[str], kind: str) -> bool:
    return kind in kinds or (kind == "integer" and "number" in kinds)


def _is(value: Any, kind: str) -> bool:
    inner = _kind(value)
    is_whole = isinstance(value, float) and value.is_integer()
    return inner == kind or (inner == "integer" and kind == "number") or (kind == "integer" and is_whole)


def _is_same(value: Any, other: Any) -> bool:
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


# --- what a grammar lets a model write between marks


def is_written_as_text(schema: Any, root: Mapping[str, Any]) -> bool:
    """Returns whether a grammar lets the model write a value as plain text, as it was taught to, and not as JSON."""
    return takes_any_text(schema, root) or bool(choices_of(schema, root))


def takes_any_text(schema: Any, root: Mapping[str, Any]) -> bool:
    """Returns whether every text is a valid value, as `argument_of` reads it."""
    return _Strings(root).hold_all(schema, 0) and is_judged(schema, root)


def choices_of(schema: Any, root: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the texts (null may be one) that a schema is a choice of, as written; none if it takes others."""
    values = _Choices(root).of(schema, 0) or []
    has_null = None in values
    texts = [value for value in values if isinstance(value, str)]
    are_clear = all(text and text == text.strip() and not (has_null and text in NULLS) for text in texts)
    return tuple(dict.fromkeys([*texts, *(["null"] if has_null else [])])) if texts and are_clear else ()


def is_judged(schema: Any, root: Mapping[str, Any]) -> bool:
    """Returns whether every value that `fits` is valid, since the schema says nothing that `fits` does not judge."""
    return _Known(root).holds(schema, 0)


class _Strings:
    """Whether every string is valid as far as known keywords say. It reads each schema once."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._seen: dict[int, bool] = {}

    def hold_all(self, schema: Any, depth: int) -> bool:
        if schema is False or depth > MAX_DEPTH:
            return False
        schema = resolved(schema, self._root)
        if id(schema) not in self._seen:
            self._seen[id(schema)] = False
            self._seen[id(schema)] = not schema or self._found(schema, depth + 1)
        return self._seen[id(schema)]

    def _found(self, schema: Mapping[str, Any], depth: int) -> bool:
        kinds = _named(schema.get("type"))
        limits = {"enum", "const"} if kinds else {"enum", "const", *OF_PARTS}
        if (kinds and "string" not in kinds) or schema.keys() & limits:
            return False
        some = [inner for key in ("anyOf", "oneOf") if (inner := _list(schema.get(key)))]
        return all(any(self.hold_all(one, depth) for one in inner) for inner in some) and all(
            self.hold_all(one, depth) for one in _list(schema.get("allOf"))
        )


class _Choices:
    """The strings and null that a schema is a choice of; None for another schema. It reads each schema once."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._seen: dict[int, list[str | None] | None] = {}

    def of(self, schema: Any, depth: int) -> list[str | None] | None:
        if depth > MAX_DEPTH or not isinstance(schema, dict):
            return None
        if "$ref" in schema and schema.keys() - ANNOTATIONS - {"$ref"}:
            return None
        schema = resolved(schema, self._root)
        if id(schema) not in self._seen:
            self._seen[id(schema)] = None
            found, kinds = self._found(schema, depth + 1), _named(schema.get("type"))
            if found is not None and all(isinstance(value, str | None) for value in found):
                self._seen[id(schema)] = [v for v in found if not kinds or any(_is(v, kind) for kind in kinds)]
        return self._seen[id(schema)]

    def _found(self, schema: Mapping[str, Any], depth: int) -> list[Any] | None:
        match sorted(schema.keys() - ANNOTATIONS - {"type", "nullable"}):
            case ["enum"]:
                return _list(schema["enum"])
            case ["const"]:
                return [schema["const"]]
            case []:
                return [None] if _named(schema.get("type")) == ["null"] else None
            case ["anyOf"] | ["allOf"]:
                some = [self.of(inner, depth) for inner in _list(schema.get("anyOf", schema.get("allOf")))]
                if all(inner is not None for inner in some) and ("anyOf" in schema or len(some) == 1):
                    return [*dict.fromkeys(value for inner in some for value in inner or ())]
        return None


class _Known:
    """Whether `fits` judges all that a schema says. It reads each schema once: references can lead in a circle."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._seen: set[int] = set()

    def holds(self, schema: Any, depth: int) -> bool:
        if isinstance(schema, bool) or id(schema) in self._seen:
            return True
        if not isinstance(schema, dict) or depth > MAX_DEPTH:
            return False
        self._seen.add(id(schema))
        if "$ref" in schema:  # what stands beside it is ignored
            target = resolved(schema, self._root)
            return not schema.keys() - ANNOTATIONS - {"$ref"} and bool(target) and self.holds(target, depth + 1)
        if not schema.keys() <= KNOWN or not self._are_apart(_list(schema.get("oneOf"))):
            return False
        properties = schema.get("properties", {})
        lists = [inner for key in ("anyOf", "oneOf", "allOf") for inner in _list(schema.get(key))]
        others = [schema[key] for key in ("items", "additionalProperties") if key in schema]
        named = [*properties.values()] if isinstance(properties, dict) else [None]
        return all(self.holds(inner, depth + 1) for inner in [*lists, *others, *named])

    def _are_apart(self, schemas: list[Any]) -> bool:
        """Returns whether no value fits two of the schemas."""
        kinds = [{"number" if kind == "integer" else kind for kind in kinds_of(inner, self._root)} for inner in schemas]
        return len(schemas) < 2 or (all(kinds) and sum(map(len, kinds)) == len(set().union(*kinds)))
