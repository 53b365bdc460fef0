"""What a text stands for is found for any schema that a request may have, and nothing else of a call is touched."""

import json
import random
from typing import Any

import jsonschema
import pytest

from text.answer_parser import AnswerParser, ParserOptions
from text.argument_schemas import choices_of, fits, kinds_of, takes_any_text
from text.argument_values import argument_of, fitted
from text.tool_calls.element_calls import QWEN_XML
from text.tool_calls.json_calls import LINES, MARKED
from text.tool_calls.tool_format import ToolFormat

ITSELF = {"type": "array", "items": {"$ref": "#/$defs/a"}}
CHAIN = {f"d{step}": {"allOf": [{"$ref": f"#/$defs/d{step + 1}"}]} for step in range(2000)}
ROOT: dict[str, Any] = {
    "properties": {"u": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
    "definitions": {"Id<string>": {"type": "string"}, "a/b~c": {"type": "string"}},
    "$defs": {"a": ITSELF, "text": {"type": "string"}, **CHAIN, "d2000": {"type": "integer"}},
}
STRINGS = {"type": "array", "items": {"type": "string"}}


def test_values_are_read_by_schemas_of_any_depth_without_an_error() -> None:
    for text in ("x", '"x"', "5", "null", "[" * 900 + "]" * 900, "[" * 90 + '"x"' + "]" * 90):
        for schema in (ITSELF, {"$ref": "#/$defs/a"}, {"$ref": "#/$defs/d0"}, {"anyOf": [{"$ref": "#/$defs/d0"}]}):
            json.loads(argument_of(text, schema, ROOT))
            arguments = f'{{"x": {text if text != "x" else "1"}, "y": "5"}}'
            assert fitted(arguments, {**ROOT, "properties": {"x": schema}}) == arguments
    assert kinds_of({"$ref": "#/$defs/d0"}, ROOT) == []
    assert kinds_of({"$ref": "#/$defs/d1990"}, ROOT) == ["integer"]
    assert not fits(5, {"$ref": "#/$defs/d0"}, ROOT)
    assert fits([[[]]], ITSELF, ROOT)


TEXTS = [
    "",
    "a",
    "b c",
    "null",
    "None",
    "true",
    "5",
    "+5",
    "1,000",
    '"a"',
    '["a"]',
    "['a',]",
    '{"a": "x"}',
    "[1",
    "a\n",
]


def random_schema(rng: random.Random, depth: int = 0) -> Any:
    """Of texts more often than of others."""
    kinds = ("string", "string", "null", "integer", "number", "boolean", "array", "object")
    own = rng.choice([
        {"type": rng.choice(kinds)}, {"type": rng.sample(kinds[1:], 2)},
        {"enum": rng.sample(["a", "b c", "5", None, 5], 2)},
        {"const": rng.choice(["a", "null", 5])}, {}, {"$ref": "#/$defs/text"}, {"$ref": "#/$defs/point"},
        {"type": "array", "items": {"type": "string"}},
        {"type": "object", "properties": {"a": {"type": "integer"}}},
    ])  # fmt: skip
    if depth < 2 and rng.random() < 0.5:
        branches = [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 3))]
        own = {rng.choice(["anyOf", "anyOf", "oneOf", "allOf"]): branches}
    limits: list[dict[str, Any]] = [{"minLength": 2}, {"maxLength": 1}, {"pattern": "^a"}, {"minimum": 6}, {"not": {}}]
    return own | (rng.choice(limits) if rng.random() < 0.2 else {}) | (rng.choice([{}, {"title": "x"}]))


def test_every_text_is_valid_where_a_grammar_takes_any_and_every_choice_where_it_takes_these() -> None:
    rng, numbers = random.Random(1), [0, 0]
    root = {"$defs": {"text": {"type": "string"}, "point": {"type": "object", "required": ["x"]}}}
    for _ in range(4000):
        schema = random_schema(rng)
        validator = jsonschema.Draft202012Validator({**schema, **root})
        if takes_any_text(schema, root):
            numbers[0] += 1
            for text in TEXTS:
                assert validator.is_valid(json.loads(argument_of(text, schema, root, True))), (schema, text)
        for text in choices_of(schema, root):
            numbers[1] += 1
            value = json.loads(argument_of(text, schema, root, True))
            assert value in (text, None) and validator.is_valid(value), (schema, text)
    assert min(numbers) > 300, numbers


def test_a_schema_is_known_in_time_however_its_references_lead() -> None:
    ladder = {f"s{n}": {"anyOf": [{"$ref": f"#/$defs/s{n + 1}"}] * 3 + [{"type": "null"}]} for n in range(20)}
    for last in ({"type": "string"}, {"type": "integer"}, {"enum": ["a"]}, {"$ref": "#/$defs/s0"}):
        root = {"$defs": {**ladder, "s20": last}}
        schema = {"$ref": "#/$defs/s0"}
        assert takes_any_text(schema, root) == (last == {"type": "string"})
        assert choices_of(schema, root) == (("a", "null") if "enum" in last else ())
    many = [f"v{number}" for number in range(20_000)]
    assert len(choices_of({"anyOf": [{"enum": many}, {"type": "null"}]}, {})) == 20_001


ODD: list[dict[str, Any]] = [
    {"required": [["a"]]}, {"required": [{}]}, {"required": [1, None]}, {"properties": None}, {"properties": ["a"]},
    {"properties": {"a": {"enum": 5, "const": 1}}}, {"properties": {"a": {"type": [["string"]]}}},
    {"properties": {"a": {"$ref": "#/properties/a/0"}}}, {"properties": {"a": {"items": [[]], "type": "array"}}},
    {"properties": {"a": {"allOf": [5, None]}}}, {"properties": {"a": {"$ref": "#/%zz/-1"}}},
]  # fmt: skip
CALLS = [
    (MARKED, '{"name": "f", "arguments": {"a": "1", "b": ["x"]}}'),
    (QWEN_XML, "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>"),
    (LINES, '[f(a="1")]'),
    (LINES, "```python\nf(1)\n```"),
]


@pytest.mark.parametrize("schema", ODD)
@pytest.mark.parametrize(("style", "text"), CALLS)
def test_calls_are_read_by_odd_schemas_without_an_error(schema: dict[str, Any], style: ToolFormat, text: str) -> None:
    parser = AnswerParser(ParserOptions({"f": schema}, style))
    assert [*parser.put(text), *parser.end(True)]


VALUES: list[tuple[Any, str, Any]] = [
    (STRINGS, "null", None),
    (STRINGS, "None", "None"),
    ({"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}, "5", 5),
    ({"$ref": "#/properties/u/anyOf/0"}, "123", "123"),
    ({"$ref": "#/properties/u/anyOf/2"}, "123", 123),
    ({"$ref": "#/properties/u/anyOf/01"}, "123", 123),
    ({"$ref": "#/definitions/Id%3Cstring%3E"}, "123", "123"),
    ({"$ref": "#/definitions/a~1b~0c"}, "123", "123"),
    *((schema, '"exact phrase"', '"exact phrase"') for schema in (
        {"type": "string"}, {"type": "string", "minLength": 1}, {"type": ["string", "null"]},
        {"$ref": "#/$defs/text"}, {"allOf": [{"$ref": "#/$defs/text"}]}, {"type": ["integer", "string"]})),
    ({"enum": ["a", 1]}, '"a"', "a"),
    (STRINGS, '"exact phrase"', ["exact phrase"]),
    ({}, '"exact phrase"', "exact phrase"),
    ({"type": ["string", "boolean"]}, "true", True),
    ({"type": ["string", "boolean"]}, "yes", "yes"),
    ({"type": ["string", "object"]}, "{'a': 1}", {"a": 1}),
    ({"type": ["string", "array"]}, "[1]", [1]),
    ({"type": ["string", "array"]}, "a", "a"),
    ({"type": ["string", "number"]}, "5", "5"),
    ({"type": ["number", "string"]}, "5", 5),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "text", "value"), VALUES)
def test_a_text_is_what_the_table_of_values_says(schema: Any, text: str, value: Any) -> None:
    read_as = json.loads(argument_of(text, schema, ROOT))
    assert (read_as, type(read_as)) == (value, type(value))


def test_what_stands_beside_a_repaired_argument_stays_to_the_letter() -> None:
    schema = {"properties": {"b": {"type": "integer"}, "s": {"type": "string"}, "c": STRINGS}}
    for beside in ("1e400", "12345678901234567890.123456789", "1.10", "9" * 5000, '"\\u00e9\\/"', '{ "b":"5" }', "-0"):
        for before, behind in ((f'{{"a":{beside},"b":', "}"), ('{ "b" : ', f' ,\n"a":{beside} }}')):
            assert fitted(f'{before}"5"{behind}', schema) == f"{before}5{behind}"
            assert fitted(f'{before}"five"{behind}', schema) == f'{before}"five"{behind}'
    assert fitted('{"s":"5","c":"null"}', schema) == '{"s":"5","c":"null"}'
    assert fitted("{}", schema) == "{}"
