"""Schemas that no answer comes to the end of are refused where they must hold, and only those."""

from typing import Any

import pytest

from errors import InvalidRequest
from schemas import ChatCompletionRequest
from text.endless_schemas import is_endless
from text.structured_output import structure_of
from text.tool_calls.gemma_calls import GEMMA_CALLS
from text.tool_calls.json_calls import MARKED
from text.tool_calls.lark import Literals
from text.tools import tool_set_of

TEXT = {"type": "string"}


def of(part: Any, **definitions: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": part}, "required": ["a"], "$defs": definitions}


def holding(name: str, *required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"$ref": "#/$defs/A"}, **properties}, "required": [name, *required]}


A, B = {"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}
MANY = {"type": "array", "items": A}
ENDLESS = {
    "itself": of(A, A=A),
    "one of its own kind": of(A, A=holding("a")),
    "one another": of(
        A, A={"type": "object", "properties": {"b": {"$ref": "#/$defs/B"}}, "required": ["b"]}, B=holding("a")
    ),
    "a list of at least one": of(A, A={"type": "array", "items": A, "minItems": 1}),
    "whatever is chosen": of(A, A={"anyOf": [holding("a"), holding("b")]}),
    "all of it": of(A, A={"allOf": [TEXT, holding("a")]}),
    "the whole": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
}
ENDING = {
    "not required": of(A, A={"type": "object", "properties": {"a": A}}),
    "or nothing": of(A, A={"anyOf": [holding("a"), {"type": "null"}]}),
    "or another type": of(A, A={**holding("a"), "type": ["object", "null"]}),
    "a list of any length": of(A, A=MANY),
    "a list of them": of(
        A, A={"type": "object", "properties": {"a": {"type": "array", "items": A}}, "required": ["a"]}
    ),
    "used twice": of(A, A=of(TEXT)),
    "led nowhere": of({"$ref": "#/nowhere"}),
    "none": {},
    "text": TEXT,
    "no schema": True,
    "malformed": {"type": "object", "properties": [], "required": "a", "anyOf": {}, "allOf": 5, "minItems": "x"},
}


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_schema_is_found(name: str) -> None:
    assert is_endless(ENDLESS[name])


@pytest.mark.parametrize("name", ENDING)
def test_other_schemas_have_an_end(name: str) -> None:
    assert not is_endless(ENDING[name])


def request(schema: Any, **fields: Any) -> ChatCompletionRequest:
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    messages = [{"role": "user", "content": "go"}]
    return ChatCompletionRequest.model_validate({"messages": messages, "model": "m", "tools": [tool], **fields})


@pytest.mark.parametrize("style", [GEMMA_CALLS, MARKED])
@pytest.mark.parametrize("name", ENDLESS)
def test_forced_calls_and_structures_without_an_end_are_refused_by_name(name: str, style: Any) -> None:
    literals = Literals(())
    asked = request(ENDLESS[name], tool_choice="required")
    with pytest.raises(InvalidRequest, match="without an end") as refusal:
        structure_of(asked, tool_set_of(asked), style, literals)
    assert refusal.value.param == "tools[0].function.parameters"
    free = request(ENDLESS[name])
    assert structure_of(free, tool_set_of(free), style, literals) is None
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": ENDLESS[name]}}
    with pytest.raises(InvalidRequest, match="without an end"):
        structure_of(request(TEXT | {"type": "object"}, tools=None, response_format=form), None, style, literals)
