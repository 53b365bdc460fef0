"""Responses in the background: how they are followed, cancelled, and refused."""

from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response
from process import MAIN, Server, serve, until

MODEL = "Tiny-Qwen3"


def create(client: OpenAI, text: Any = "Hello", **fields: Any) -> Response:
    options: Any = {"model": MODEL, "input": text, "max_output_tokens": 4, "temperature": 0, **fields}
    options["extra_body"] = {"ignore_eos": True, **fields.get("extra_body", {})}
    response: Response = client.responses.create(**options)
    return response


def test_a_response_in_the_background_is_made_without_its_client(client: OpenAI) -> None:
    made = create(client, background=True, max_output_tokens=30)
    assert made.status == "queued" and made.background is True and made.output == []
    until(lambda: client.responses.retrieve(made.id).status == "incomplete")
    whole = client.responses.retrieve(made.id)
    assert whole.id == made.id and whole.output_text == create(client, max_output_tokens=30).output_text
    assert client.responses.cancel(made.id).to_dict() == whole.to_dict(), "one that is over stays as it is"
    with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
        client.responses.cancel(create(client).id)


def test_a_response_in_the_background_can_be_followed_and_left(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "input": "Hello", "max_output_tokens": 400, "extra_body": {"ignore_eos": True}}
    events = client.responses.create(**options, stream=True, background=True)
    first = next(iter(events))
    assert first.type == "response.created" and first.response.background is True
    events.close()
    response_id = first.response.id
    rest = list(client.responses.retrieve(response_id, stream=True, starting_after=0))
    assert [event.sequence_number for event in rest] == [*range(1, len(rest) + 1)]
    last = rest[-1]
    assert last.type == "response.incomplete" and last.response.usage and last.response.usage.output_tokens == 400
    assert client.responses.retrieve(response_id).to_dict() == last.response.to_dict()
    for number in (last.sequence_number - 1, last.sequence_number + 5):
        (end,) = client.responses.retrieve(response_id, stream=True, starting_after=number)
        assert end.to_dict() == {**last.to_dict(), "sequence_number": number + 1}, "also when it is over"


@pytest.mark.parametrize("after", [0, 10_000])
def test_who_follows_a_response_always_hears_how_it_ended(client: OpenAI, after: int) -> None:
    options: Any = {"model": MODEL, "input": "Hello", "max_output_tokens": 450, "extra_body": {"ignore_eos": True}}
    with client.responses.create(**options, stream=True, background=True) as events:
        first = next(iter(events))
        assert first.type == "response.created"
        with client.responses.retrieve(first.response.id, stream=True, starting_after=after) as followed:
            client.responses.cancel(first.response.id)
            numbers = [(event.type, event.sequence_number) for event in followed]
    assert numbers[-1][0] == "response.incomplete" and numbers[-1][1] > after


def test_a_response_in_the_background_can_be_cancelled(client: OpenAI, server: Server) -> None:
    made = create(client, background=True, max_output_tokens=450)
    assert len(list(client.responses.input_items.list(made.id))) == 1
    with pytest.raises(openai.BadRequestError, match="only if it was asked for with stream"):
        client.responses.retrieve(made.id, stream=True)
    ended = client.responses.cancel(made.id)
    assert ended.status == "cancelled" and client.responses.retrieve(made.id).to_dict() == ended.to_dict()
    server.wait_until_idle()
    other = create(client, background=True, max_output_tokens=450)
    client.responses.delete(other.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(other.id)
    server.wait_until_idle()


def test_what_goes_wrong_in_the_background_is_told_by_the_response(client: OpenAI, server: Server) -> None:
    late = create(client, background=True, extra_body={"timeout": 1e-6})
    until(lambda: client.responses.retrieve(late.id).status == "failed")
    error = client.responses.retrieve(late.id).error
    assert error and error.code == "server_error" and "longer than the limit" in error.message
    server.wait_until_idle()


@pytest.mark.parametrize(
    "body",
    [
        {"model": "nobody"},
        {"input": "x" * 600},
        {"input": []},
        {"tools": [{"type": "function", "name": "b c"}]},
        {"tools": [{"type": "function", "name": "f", "parameters": {"type": "zzz"}}], "tool_choice": "required"},
        {"tool_choice": {"type": "function", "name": "other"}},
        {"tool_choice": "required"},
        {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": 5}}}},
        {"text": {"format": {"type": "zzz"}}},
        {"temperature": 9},
        {"max_output_tokens": 10**6},
    ],
)
@pytest.mark.parametrize("is_stream", [True, False])
def test_what_cannot_run_is_refused_in_the_background_as_in_the_foreground(
    server: Server, body: dict[str, Any], is_stream: bool
) -> None:
    sent = {"model": MODEL, "input": "Hello", "max_output_tokens": 2, "stream": is_stream, **body}
    there, here = (server.post("/v1/responses", **sent, background=value) for value in (True, False))
    assert there.status_code == here.status_code and there.json() == here.json() and here.status_code in (400, 404)


@pytest.mark.parametrize("model", ["openai/gpt-4", "huggingface/no-owner"])
def test_a_model_that_no_one_can_ask_is_refused_in_the_background(server: Server, model: str) -> None:
    sent = {"model": model, "input": "Hello"}
    there, here = (server.post("/v1/responses", **sent, background=value) for value in (True, False))
    assert there.status_code == here.status_code >= 400 and there.json() == here.json()


def test_a_response_in_the_background_waits_for_no_model(tiny_checkpoint: Path) -> None:
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), DTYPE="float32") as server:
        refusal = server.post("/v1/responses", model=MODEL, input="Hello", background=True, max_output_tokens=2)
        if server.get("/health").json()["status"] != "ok":
            assert refusal.status_code == 503 and int(refusal.headers["retry-after"]) > 0
        server.wait_until_healthy()
        made = server.post("/v1/responses", model=MODEL, input="Hello", background=True, max_output_tokens=2).json()
        until(lambda: server.get(f"/v1/responses/{made['id']}").json()["status"] in ("completed", "incomplete"))
        assert server.get(f"/v1/responses/{made['id']}").json()["usage"]["output_tokens"] > 0
