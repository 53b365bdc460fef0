"""A text is read as the first of its schema's types that it fits, and what fits a schema is what a validator says."""

import json
from typing import Any

import jsonschema
import pytest

from text.argument_schemas import fits
from text.argument_values import argument_of

VALUES: list[tuple[Any, str, Any]] = [
    ({"type": ["string", "null"]}, "123", "123"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "123", "123"),
    ({"oneOf": [{"type": "null"}, {"$ref": "#/$defs/text"}]}, "123", "123"),
    ({"$ref": "#/$defs/text"}, "123", "123"),
    ({"$ref": "#/$defs/chain"}, "123", "123"),
    ({"allOf": [{"$ref": "#/$defs/text"}, {"maxLength": 9}]}, "123", "123"),
    ({"const": "123"}, "123", "123"),
    ({"enum": ["1", "2", None]}, "1", "1"),
    ({"enum": [1, "a"]}, "1", 1),
    ({"enum": ["1", 2]}, "2", 2),
    ({"type": "string", "nullable": True}, "5", "5"),
    ({"type": "string", "pattern": "^1"}, "123", "123"),
    ({"type": ["integer", "null"]}, "null", None),
    ({"type": ["integer", "null"]}, "None", None),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": "string"}, "null", "null"),
    ({"type": "string"}, '["a"]', '["a"]'),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "12", 12),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "12 km", "12 km"),
    ({"anyOf": [{"type": "string"}, {"type": "array"}]}, '["a"]', ["a"]),
    ({"type": "array", "items": {"type": "string"}}, "['it\\'s', \"b\"]", ["it's", "b"]),
    ({"type": "array", "items": {"type": "string"}}, "a.txt", ["a.txt"]),
    ({"type": "array", "items": {"type": "string"}}, '"a.txt"', ["a.txt"]),
    ({"type": "array", "items": {"type": "integer"}}, "7", [7]),
    ({"type": "array", "items": {"$ref": "#/$defs/point"}}, "{'x': 1}", [{"x": 1}]),
    ({"type": "array"}, '"[1, 2]"', [1, 2]),
    ({"type": "array", "items": {"type": "string"}}, "a, b", "a, b"),
    ({"type": "object"}, "{'a': True, 'b': None}", {"a": True, "b": None}),
    ({"$ref": "#/$defs/point"}, "{'x': 1,}", {"x": 1}),
    ({"type": "number"}, "1,000.5", 1000.5),
    ({"type": "number"}, "+5", 5),
    ({"type": "number"}, ".5", 0.5),
    ({"type": "integer"}, "1,00", "1,00"),
    ({"type": "integer"}, "about 3", "about 3"),
    ({"type": "integer"}, " 3 ", 3),
    ({"type": "boolean"}, "True", True),
    ({"type": "boolean"}, "yes", "yes"),
    ({}, "5", 5),
    ({}, "+5", "+5"),
    (None, "text", "text"),
    ({"$ref": "#/$defs/circle"}, "5", 5),
    ({"$ref": "#/nowhere"}, "5", 5),
]
ROOT: dict[str, Any] = {
    "$defs": {
        "text": {"type": "string"},
        "chain": {"$ref": "#/$defs/text"},
        "point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
        "circle": {"anyOf": [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/circle"}]},
    }
}


@pytest.mark.parametrize(("schema", "text", "value"), VALUES)
def test_a_text_is_read_as_the_first_type_that_it_fits_without_doubt(schema: Any, text: str, value: Any) -> None:
    read_as = json.loads(argument_of(text, schema, ROOT))
    assert (read_as, type(read_as)) == (value, type(value))


def test_what_fits_a_schema_is_what_its_validator_says() -> None:
    values = ["x", "1", 1, 1.0, 1.5, True, None, [], ["a"], [1], {}, {"x": 1}, {"x": "1"}, {"y": 1}]
    schemas = [
        schema for schema, *_ in VALUES if schema and "circle" not in str(schema) and "nowhere" not in str(schema)
    ]
    schemas += [
        {"type": "object", "properties": {"x": {"type": "string"}}, "additionalProperties": False},
        {"enum": [1, True]},
    ]
    for schema in [schema for schema in schemas if not schema.get("nullable")]:
        known = {key: own for key, own in schema.items() if key not in ("pattern", "maxLength")}
        validator = jsonschema.Draft202012Validator({**known, **ROOT})
        for value in values:
            assert fits(value, schema, ROOT) == validator.is_valid(value), (schema, value)
