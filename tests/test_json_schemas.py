"""What in a JSON schema is a pattern or a format, and what only looks like one."""

import json
import random
from typing import Any

import jsonschema
import pytest
from test_grammar import COMPILER, TOKENIZER

from errors import InvalidRequest
from schemas import ChatCompletionRequest
from text import structured_output
from text.json_schemas import ENFORCED_FORMATS, enforceable, patterns_of
from text.structured_output import structure_of
from text.tool_calls.json_calls import MARKED
from text.tool_calls.lark import Literals
from text.tools import tool_set_of

UNKNOWN = ["path", "password", "binary", "byte", "uuid4", "uri-reference", "regex", "int64", "idn-email", "own-kind"]
BOMB, TEXT = "(a{1000}){1000}", r"Returns at most {100000} rows, \\frac{1000000}{3}"
PLACES: dict[str, Any] = {  # where a schema can be inside another one
    "itself": lambda inner: inner,
    "a property": lambda inner: {"type": "object", "properties": {"a": inner}},
    "a property named as a keyword": lambda inner: {"properties": {"enum": inner, "format": inner, "default": inner}},
    "items": lambda inner: {"type": "array", "items": inner, "prefixItems": [inner]},
    "a union": lambda inner: {"anyOf": [inner, {"type": "null"}]},
    "a definition": lambda inner: {"$defs": {"format": inner}, "$ref": "#/$defs/format"},
    "elsewhere": lambda inner: {"components": {"schemas": {"A": inner}}, "$ref": "#/components/schemas/A"},
    "other properties": lambda inner: {
        "type": "object",
        "additionalProperties": inner,
        "patternProperties": {"b": inner},
    },
    "deep inside": lambda inner: {"allOf": [{"properties": {"a": {"items": {"anyOf": [inner]}}}}]},
}


def body(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields}
    )


def ways(schema: Any) -> list[ChatCompletionRequest]:
    """To ask for an answer with that schema."""
    at_root = {key: schema[key] for key in ("$defs", "components") if key in schema}
    inner = {"type": "object", **at_root, "properties": {"x": schema}, "required": ["x"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": inner}}
    return [
        body(tools=[tool], tool_choice="required"),
        body(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}),
        body(structured_outputs={"json": schema}),
        body(guided_json=schema),
        body(guided_json=json.dumps(schema)),
    ]


def compile_all(schema: Any) -> None:
    for request in ways(schema):
        asked = structure_of(request, tool_set_of(request), MARKED, Literals([]))
        assert asked is not None
        COMPILER.compile(asked.text)


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_format_is_an_annotation_at_every_level(place: str) -> None:
    for name in UNKNOWN:
        schema = PLACES[place]({"type": "string", "format": name, "minLength": 2})
        assert name not in json.dumps(enforceable(schema))
        compile_all(schema)


@pytest.mark.parametrize("name", sorted(ENFORCED_FORMATS))
def test_a_known_format_stays(name: str) -> None:
    for place in PLACES.values():
        schema = place({"type": "string", "format": name})
        assert enforceable(schema) == schema
    matcher = COMPILER.compile(structured_output.KINDS["json"].grammar({"type": "string", "format": name}))
    assert matcher.matcher().mask([]) != COMPILER.compile(
        structured_output.KINDS["json"].grammar({"enum": [1, "x"]})
    ).matcher().mask([])


def test_values_that_look_like_schemas_stay_as_they_are() -> None:
    value = {"format": "own-kind", "pattern": BOMB}
    for key, values in {"const": value, "enum": [value, "x"], "default": value, "examples": [value]}.items():
        schema = {"properties": {"a": {key: values}}}
        assert enforceable(schema) == schema and list(patterns_of(schema)) == []
    jsonschema.validate(value, enforceable({"const": value}))


@pytest.mark.parametrize("pattern", ["^a$", "^(a)$", "^(?:a|b)$", "^(b|a)$"])
def test_a_pattern_that_fits_listed_properties_alone_leaves_no_comma_without_a_key(pattern: str) -> None:
    listed = {"a": {"enum": [1, 2, "x"]}, "b": {"enum": [2, 3]}}
    schema = {"properties": listed, "required": ["a", "b"], "additionalProperties": False}
    schema |= {"type": "object", "patternProperties": {pattern: {"type": "integer"}}}
    rng, found = random.Random(1), set()
    for _ in range(60):
        matcher, token_ids = COMPILER.compile(structured_output.KINDS["json"].grammar(schema)).matcher(), list[int]()
        while not matcher.is_finished and len(token_ids) < 600:
            bits = int.from_bytes(matcher.mask([]) or b"", "little")
            token_ids.append(rng.choice([i for i in range(len(TOKENIZER)) if bits >> i & 1]))
            matcher.accept(token_ids[-1])
        answer = json.loads(TOKENIZER.decode(token_ids, skip_special_tokens=True))
        jsonschema.validate(answer, schema)
        found.add(json.dumps(answer))
    assert len(found) == 4


@pytest.mark.parametrize("place", PLACES)
def test_only_patterns_are_patterns(place: str) -> None:
    words: dict[str, Any] = {"title": TEXT, "description": TEXT, "default": TEXT, "examples": [TEXT], "$comment": TEXT}
    for schema in ({"type": "string", **words}, {"enum": [TEXT, "x"]}, {"const": TEXT}, {"properties": {TEXT: {}}}):
        compile_all(PLACES[place](schema))


@pytest.mark.parametrize("place", PLACES)
def test_bombs_are_found_at_every_level(place: str) -> None:
    for schema in ({"type": "string", "pattern": BOMB}, {"type": "object", "patternProperties": {BOMB: {}}}):
        for request in ways(PLACES[place](schema)):
            with pytest.raises(InvalidRequest, match="repetition counts add more than 50000 characters"):
                structure_of(request, tool_set_of(request), MARKED, Literals([]))


@pytest.mark.parametrize("reference", ["#/default", "#/examples/0", "#/d%65fault", "#/properties/a/default"])
def test_a_reference_cannot_lead_to_a_hidden_pattern(reference: str) -> None:
    hidden = {"type": "string", "pattern": BOMB}
    schema = {
        "default": hidden,
        "examples": [hidden],
        "properties": {"a": {"default": hidden}, "b": {"$ref": reference}},
    }
    assert BOMB in list(patterns_of(schema))


@pytest.mark.parametrize(
    ("kind", "value"), [("guided_choice", [TEXT]), ("guided_regex", "a{3}"), ("guided_grammar", 'start: "x"')]
)
def test_other_structures_are_read_as_what_they_are(kind: str, value: Any) -> None:
    assert structure_of(body(**{kind: value}), None, MARKED, Literals([])) is not None
    if kind != "guided_choice":
        bomb = BOMB if kind == "guided_regex" else f"start: /{BOMB}/"
        with pytest.raises(InvalidRequest, match="repetition counts add more than 50000 characters"):
            structure_of(body(**{kind: bomb}), None, MARKED, Literals([]))


NO_ARGUMENTS: dict[str, Any] = {
    "absent": {},
    "null": {"parameters": None},
    "empty": {"parameters": {}},
    "an object": {"parameters": {"type": "object"}},
    "no properties": {"parameters": {"type": "object", "properties": {}, "required": []}},
}


@pytest.mark.parametrize("name", NO_ARGUMENTS)
def test_a_tool_without_parameters_takes_no_arguments(name: str) -> None:
    tools = [{"type": "function", "function": {"name": "now", **NO_ARGUMENTS[name]}}]
    box = tool_set_of(body(tools=tools))
    assert box is not None and list(box.shown) == tools
    jsonschema.validate({}, box.schemas["now"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"message": "Hello, world!"}, box.schemas["now"])


@pytest.mark.parametrize(
    "own",
    [
        {"additionalProperties": True},
        {"additionalProperties": {"type": "string"}},
        {"required": ["message"]},
        {"minProperties": 1},
        {"anyOf": [{"required": ["message"]}, {"required": ["m"]}]},
        {"const": {"message": "x"}},
    ],
)
def test_what_says_something_of_other_properties_stays_open(own: dict[str, Any]) -> None:
    box = tool_set_of(body(tools=[{"type": "function", "function": {"name": "f", "parameters": own}}]))
    assert box is not None
    jsonschema.validate({"message": "x"}, box.schemas["f"])
