"""JSON schemas as they come in requests: where the schemas in them are, and what they say that no grammar can hold.

Source: https://json-schema.org/draft/2020-12. Text such as a description is no pattern and no schema, whatever it looks
like, nor are the values of `enum`, `const`, `default` and `examples`, unless a `$ref` leads there.
"""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

Object = dict[str, Any]
_NAMES = re.compile(r"\^(?:([\w-]+)|\((?:\?:)?([\w-]+(?:\|[\w-]+)*)\))\$")  # a pattern of some names and no others
VALUES = frozenset({"const", "default", "enum", "example", "examples"})  # keywords that hold any values
BY_NAME = frozenset({"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"})  # name -> schema
ANNOTATIONS = frozenset(  # what is valid is the same with them and without
    {"title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "$comment"}
)
ENFORCED_FORMATS = frozenset(  # that llguidance holds an answer to; the others are annotations, as in the standard
    {"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uri", "uuid"}
)


def enforceable(schema: Any) -> Any:
    """Returns the schema in a form that llguidance holds an answer to: without formats that nothing enforces (a
    property may be named `format`), and with the patterns of listed properties beside those."""
    values = _values_in(schema)

    def copied(schema: Any) -> Any:
        if isinstance(schema, list):
            return [copied(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        own = {key: copied_value(key, value) for key, value in schema.items() if not _is_annotation(key, value)}
        return _with_listed_patterns(own)

    def copied_value(key: str, value: Any) -> Any:
        if key in values:
            return value
        if key in BY_NAME and isinstance(value, dict):
            return {name: copied(own) for name, own in value.items()}
        return copied(value)

    return copied(schema)


def _with_listed_patterns(schema: Object) -> Object:
    """Patterns that fit listed properties alone go to these: for one more key there would be a comma and no key."""
    patterns, properties = schema.get("patternProperties"), schema.get("properties")
    if not isinstance(patterns, dict) or not isinstance(properties, dict):
        return schema
    listed, others = dict(properties), {}
    for pattern, own in patterns.items():
        found = _NAMES.fullmatch(pattern)
        names = (found[1] or found[2]).split("|") if found else []
        if not names or not set(names) <= listed.keys():
            others[pattern] = own
            continue
        listed |= {name: {"allOf": [listed[name], own]} for name in names}
    return {**schema, "properties": listed, "patternProperties": others}


def patterns_of(schema: Any) -> Iterator[str]:
    """Yields all regular expressions in a schema, at any level."""
    values, level = _values_in(schema), [schema]
    while level:
        schemas, level = [item for item in level if isinstance(item, dict)], _inside(level, values)
        for own in schemas:
            named = own.get("patternProperties")
            yield from named if isinstance(named, dict) else ()
            if isinstance(own.get("pattern"), str):
                yield own["pattern"]


def _inside(level: list[Any], values: frozenset[str]) -> list[Any]:
    """Returns the schemas one level below, in objects and lists."""
    found: list[Any] = []
    for item in level:
        found += item if isinstance(item, list) else ()
        for key, value in item.items() if isinstance(item, dict) else ():
            if key not in values:
                found += value.values() if key in BY_NAME and isinstance(value, dict) else [value]
    return found


def _values_in(schema: Any) -> frozenset[str]:
    """Returns the keywords whose values are no schemas here: none if a reference may lead into one."""
    level = [schema]
    while level:
        references = [item["$ref"] for item in level if isinstance(item, dict) and isinstance(item.get("$ref"), str)]
        if any(VALUES & set(unquote(reference).split("/")) for reference in references):
            return frozenset()
        level = _inside(level, frozenset())
    return VALUES


def _is_annotation(key: str, value: Any) -> bool:
    return key == "format" and (value is None or (isinstance(value, str) and value not in ENFORCED_FORMATS))
