"""Every field of the Messages API: honoured, accepted where it has no meaning, or refused by its name."""

from typing import Any, get_type_hints

import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic_requests import HELLO, MODEL, ask, text_of
from models import byte_tokenizer
from process import Server

from api.messages.schemas import CountTokensRequest, MessagesRequest
from schemas import SamplingFields

EOS = byte_tokenizer().eos_token_id
A = 64  # the token id of "a"
SAMPLING: dict[str, Any] = {  # a value of each parameter that changes the answer
    "temperature": 1.5,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.02,
    "repetition_penalty": 1.5,
    "presence_penalty": 2.0,
    "frequency_penalty": 2.0,
    "seed": 8,
    "stop_token_ids": [A, A + 1, A + 2],
    "ignore_eos": False,
    "min_tokens": 5,
    "logit_bias": {"64": 100},
}
BESIDE: dict[str, Any] = {  # without which it would change nothing
    **dict.fromkeys(("top_p", "top_k", "min_p", "seed"), {"temperature": 2}),
    **dict.fromkeys(
        ("stop_token_ids", "presence_penalty", "frequency_penalty"), {"logit_bias": {"64": 100, "65": 100, "66": 100}}
    ),
    **dict.fromkeys(("ignore_eos", "min_tokens"), {"logit_bias": {str(EOS): 100}, "ignore_eos": False}),
}
VALUES: dict[str, Any] = {"list": [{"a": 1}], "dict": {"a": "b"}, "int": 3, "str": "text"}


def example(annotation: Any) -> Any:
    return next(value for kind, value in VALUES.items() if kind in str(annotation))


def supported(support: str) -> list[str]:
    return [name for name in MessagesRequest.model_fields if MessagesRequest.support(name) == support]


def test_every_field_of_the_sdk_is_declared_and_unknown_ones_are_reported(server: Server) -> None:
    for sdk, request in ((message_create_params, MessagesRequest), (message_count_tokens_params, CountTokensRequest)):
        bases = [kind for name, kind in vars(sdk).items() if name.endswith(("ParamsBase", "Streaming", "TokensParams"))]
        theirs = {name for base in bases for name in get_type_hints(base)}
        assert len(theirs) > 5 and theirs <= request.model_fields.keys()
    assert ask(server, foo=1, keep_alive="5m", bar=None).headers["x-ignored-fields"] == "bar, foo, keep_alive"
    deep = [{"role": "user", "content": [{"type": "text", "text": "x", "y": 1}]}]
    assert ask(server, messages=deep).headers["x-ignored-fields"] == "messages[0].content[0].y"


@pytest.mark.parametrize("name", SamplingFields.model_fields)
def test_a_sampling_parameter_has_the_effect_that_it_has_in_a_chat(server: Server, name: str) -> None:
    body = {**BESIDE.get(name, {}), name: SAMPLING[name]}
    start = {"model": MODEL, "messages": HELLO, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "seed": 1}
    chat = server.post("/v1/chat/completions", **{**start, **body}).json()
    expected = chat["choices"][0]["message"]["content"], chat["usage"]["completion_tokens"]
    without = {key: value for key, value in body.items() if key != name}
    told, other = (ask(server, **{"seed": 1, **given}).json() for given in (body, without))
    assert (text_of(told), told["usage"]["output_tokens"]) == expected
    assert (text_of(other), other["usage"]["output_tokens"]) != expected


@pytest.mark.parametrize("name", supported("no meaning here"))
def test_a_field_without_meaning_is_accepted(server: Server, name: str) -> None:
    reply = ask(server, **{name: example(MessagesRequest.model_fields[name].annotation)})
    assert reply.status_code == 200 and "x-ignored-fields" not in reply.headers, reply.text


@pytest.mark.parametrize("name", supported("refused"))
def test_a_refused_field_is_named_and_its_neutral_values_pass(server: Server, name: str) -> None:
    field = MessagesRequest.model_fields[name]
    refusal = ask(server, **{name: example(field.annotation)})
    assert refusal.status_code == 400 and name in refusal.json()["error"]["message"]
    extra: Any = field.json_schema_extra
    for neutral in extra["x-neutral"]:
        assert ask(server, **{name: neutral}).status_code == 200


def test_a_time_limit_ends_the_answer(server: Server) -> None:
    late = ask(server, timeout=1e-6)
    assert late.status_code == 504 and late.json()["error"]["type"] == "timeout_error"


def test_a_conversation_that_the_server_is_to_hold_is_refused_as_the_sdk_recognises_it(server: Server) -> None:
    """Only its new turn would be answered otherwise, without what was said before."""
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
        response = ask(server, thread=thread)
        assert response.status_code == 400
        assert response.json()["error"]["details"]["error_code"] == "thread_unsupported_request"
    assert "details" not in ask(server, compaction={"type": "summarize"}).json()["error"]
