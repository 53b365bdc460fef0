"""Every field of the requests: honoured, with an effect that is seen here; accepted, where it has no meaning; or
refused by its name."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
from field_effects import (
    EFFECTS,
    REQUESTS,
    TOOL,
    ask,
    texts,
)
from process import Server

from engine.sampling_params import SamplingParams
from schemas import ChatCompletionRequest, RequestBody, SamplingFields

# --- honoured: one function per field, for every request that has it


WITH_A = {"type": "object", "properties": {"a": {"const": 5}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    "given",
    [
        {"type": "json_object", "schema": WITH_A},
        {"type": "json_schema", "schema": WITH_A},
        {"type": "json_schema", "json_schema": {"schema": WITH_A}},
    ],
)
def test_a_schema_holds_wherever_clients_write_it(server: Server, given: dict[str, Any]) -> None:
    (answer,) = texts(server, "chat/completions", response_format=given, max_tokens=300)
    assert json.loads(answer) == {"a": 5}
    (answer,) = texts(server, "responses", text={"format": given}, max_output_tokens=300)
    assert json.loads(answer) == {"a": 5}
    for bad in (5, "x", []):
        refusal = ask(server, "chat/completions", response_format={"type": "json_object", "schema": bad})
        assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "response_format"


def test_a_format_of_a_response_that_has_no_schema_is_refused(server: Server) -> None:
    refusal = ask(server, "responses", text={"format": {"type": "json_schema", "name": "x"}})
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "text.format.schema"


@pytest.mark.parametrize(
    ("path", "body", "names"),
    [
        ("chat/completions", {"response_format": {"type": "text", "grammar": 1}}, "response_format.grammar"),
        (
            "chat/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "x": 1}, "y": 2}},
            "response_format.json_schema.x, response_format.y",
        ),
        ("chat/completions", {"stream_options": {"x": 1}, "stream": True}, "stream_options.x"),
        ("responses", {"text": {"format": {"type": "text", "x": 1}, "y": 2}}, "text.format.x, text.y"),
        ("responses", {"reasoning": {"effort": "low", "x": 1}}, "reasoning.x"),
        (
            "chat/completions",
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f", "x": 1}, "y": 2}},
            "tool_choice.function.x, tool_choice.y",
        ),
    ],
)
def test_unknown_fields_inside_of_objects_are_named_too(
    server: Server, path: str, body: dict[str, Any], names: str
) -> None:
    answer = ask(server, path, **body)
    assert answer.status_code == 200 and answer.headers["x-ignored-fields"] == names


BY_SUPPORT = [
    (path, name, request.support(name)) for path, (request, _, _) in REQUESTS.items() for name in request.model_fields
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("path", "name"), [(path, name) for path, name, kind in BY_SUPPORT if kind == "honoured"])
def test_an_honoured_field_has_its_effect(request: pytest.FixtureRequest, path: str, name: str) -> None:
    place, _ = inspect.signature(EFFECTS[name]).parameters
    EFFECTS[name](request.getfixturevalue(place), path)


VALUES: dict[str, Any] = {  # of the types that fields are declared with, the more special ones first
    "StreamOptions": {"include_obfuscation": True},
    "list[str]": ["audio"],
    "list": [{}],
    "dict": {"a": "b"},
    "bool": True,
    "int": 3,
    "str": "text",
}


def example(annotation: Any) -> Any:
    return next(value for kind, value in VALUES.items() if kind in str(annotation))


@pytest.mark.thinned(2)
@pytest.mark.parametrize(("path", "name"), [(path, name) for path, name, kind in BY_SUPPORT if kind == "refused"])
def test_a_refused_field_is_named_and_its_neutral_values_pass(server: Server, path: str, name: str) -> None:
    field = REQUESTS[path][0].model_fields[name]
    refusal = ask(server, path, **{name: example(field.annotation)})
    assert refusal.status_code == 400, refusal.text
    error = refusal.json()["error"]
    assert (error["param"], error["code"], error["type"]) == (name, "unsupported_value", "invalid_request_error")
    for neutral in field.json_schema_extra["x-neutral"]:
        assert texts(server, path, **{name: neutral}) == texts(server, path)


@pytest.mark.parametrize(
    ("path", "name"), [(path, name) for path, name, kind in BY_SUPPORT if kind == "no meaning here"]
)
def test_a_field_without_meaning_is_accepted(server: Server, path: str, name: str) -> None:
    request, _, _ = REQUESTS[path]
    answer = ask(server, path, **{name: example(request.model_fields[name].annotation)})
    assert answer.status_code == 200, answer.text
    assert "x-ignored-fields" not in answer.headers


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, name, kind in BY_SUPPORT if kind == "ignored"])
def test_an_ignored_field_is_named_unless_it_asks_for_nothing(server: Server, path: str, name: str) -> None:
    field = REQUESTS[path][0].model_fields[name]
    neutral, listed = field.json_schema_extra["x-neutral"], get_args(get_args(field.annotation)[0])
    for value in dict.fromkeys([*listed, *neutral]):
        answer = ask(server, path, **{name: value})
        assert answer.status_code == 200, answer.text
        assert answer.headers.get("x-ignored-fields") == (None if value in neutral else name)
        assert texts(server, path, **{name: value}) == texts(server, path)
    refusal = ask(server, path, **{name: "other"})
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == name


def bodies(kind: type[RequestBody] = RequestBody) -> Iterator[type[RequestBody]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from bodies(inner)


def lists(schema: Any) -> Iterator[Any]:
    """Of a body and all that it has inside, as pydantic reads them."""
    if isinstance(schema, dict) and schema.get("type") == "list":
        yield schema
    if isinstance(schema, dict | list | tuple):
        for inner in schema.values() if isinstance(schema, dict) else schema:
            yield from lists(inner)


@pytest.mark.parametrize("body", dict.fromkeys(bodies()), ids=lambda body: body.__name__)
def test_every_list_of_a_request_is_bounded_and_has_one_error_at_most(body: type[RequestBody]) -> None:
    found = list(lists(body.__pydantic_core_schema__))
    assert found or not any("list[" in str(field.annotation) for field in body.model_fields.values())
    assert all(schema.get("max_length") and schema.get("fail_fast") for schema in found), found


@pytest.mark.parametrize("path", REQUESTS)
def test_every_field_of_the_sdk_is_declared_and_unknown_ones_are_reported(server: Server, path: str) -> None:
    request, sdk, _ = REQUESTS[path]
    bases = [kind for name, kind in vars(sdk).items() if name.endswith("ParamsBase") or name.endswith("Streaming")]
    theirs = {name for base in bases for name in get_type_hints(base)}
    assert len(theirs) > 10 and theirs <= request.model_fields.keys()
    assert ask(server, path, foo=1, num_ctx=9, bar=None).headers["x-ignored-fields"] == "bar, foo, num_ctx"


def test_the_support_of_each_field_can_be_read_in_the_openapi_document(server: Server) -> None:
    schemas = server.get("/openapi.json").json()["components"]["schemas"]
    for path, name, kind in BY_SUPPORT:
        described = schemas[REQUESTS[path][0].__name__]["properties"][name]
        assert described["x-support"] == kind and (kind == "honoured" or described["description"])


def test_every_sampling_field_is_one_of_the_engines_and_only_what_is_sent_is_given_on() -> None:
    names = {field.name for field in fields(SamplingParams)}
    assert set(SamplingFields.model_fields) <= names - {"max_tokens", "num_logprobs", "num_prompt_logprobs"}
    values = {"temperature": 0.0, "top_k": 5, "logit_bias": {"3": 1.5}, "ignore_eos": False}
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "stop": "x", "user": "u", "n": 2}
    request = ChatCompletionRequest.model_validate({**body, **values, "seed": None})
    assert request.sampling_values == {**values, "logit_bias": {3: 1.5}}
