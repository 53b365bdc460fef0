"""What the server answers to requests that are wrong: the same shape of error everywhere, before any byte."""

import json
from typing import Any

import httpx2
import openai
import pytest
from main_requests import HELLO, LONG, MODEL, in_background, raw_events, wait_until_running
from openai import OpenAI
from process import Server

MISSING = "missing_required_parameter"


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("chat/completions", {"model": "nobody"}, 404, "model", "model_not_found"),
        ("chat/completions", {"messages": []}, 400, "messages", "invalid_value"),
        (
            "chat/completions",
            {"messages": [{"role": "robot", "content": ""}]},
            400,
            "messages[0].role",
            "invalid_value",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": 5}]},
            400,
            "messages[0].content",
            "invalid_value",
        ),
        ("chat/completions", {"temperature": 2.1}, 400, "temperature", "invalid_value"),
        ("chat/completions", {"temperature": "hot"}, 400, "temperature", "invalid_value"),
        ("chat/completions", {"n": 129}, 400, "n", "invalid_value"),
        ("chat/completions", {"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ("chat/completions", {"max_tokens": 9999}, 400, "max_tokens", "invalid_value"),
        (
            "chat/completions",
            {"max_tokens": 5, "max_completion_tokens": 481},
            400,
            "max_completion_tokens",
            "invalid_value",
        ),
        ("completions", {"max_tokens": 481}, 400, "max_tokens", "invalid_value"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x" * 480}]},
            400,
            "messages",
            "context_length_exceeded",
        ),
        ("chat/completions", {"messages": [*HELLO, {"role": "user"}]}, 400, "messages[2].content", MISSING),
        *(
            ("chat/completions", {"messages": [{"role": role, "content": None}]}, 400, "messages[0].content", MISSING)
            for role in ("user", "system", "developer", "tool", "assistant")
        ),
        ("chat/completions", {"logprobs": 1}, 400, "logprobs", "invalid_value"),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs", "invalid_value"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
        ("chat/completions", {"logit_bias": {"5": 101}}, 400, "logit_bias.5", "invalid_value"),
        ("chat/completions", {"logit_bias": {"99999": 1}}, 400, "logit_bias", "invalid_value"),
        ("chat/completions", {"logit_bias": {"-1": 1}}, 400, "logit_bias.-1", "invalid_value"),
        ("chat/completions", {"min_tokens": 9, "max_tokens": 8}, 400, "min_tokens", "invalid_value"),
        ("chat/completions", {"audio": {"voice": "x"}}, 400, "audio", "unsupported_value"),
        ("completions", {"prompt": None}, 400, "prompt", "invalid_value"),
        ("completions", {"prompt": ""}, 400, "prompt", "invalid_value"),
        ("completions", {"prompt": [5, 10**6]}, 400, "prompt", "invalid_value"),
        ("completions", {"prompt": "x" * 1000}, 400, "prompt", "context_length_exceeded"),
        ("completions", {"suffix": "y"}, 400, "suffix", "unsupported_value"),
        ("completions", {"best_of": 2, "n": 3}, 400, "best_of", "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_refused_by_name_before_any_byte(
    server: Server, path: str, body: dict[str, Any], status: int, param: str, code: str | None, stream: bool
) -> None:
    good = {"messages": HELLO} if path.startswith("chat") else {"prompt": "x"}
    answer = server.post(f"/v1/{path}", **{"model": MODEL, "stream": stream, **good, **body})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("path", "text", "param"),
    [
        ("chat/completions", '{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages"),
        ("completions", '{"prompt": "\\ud800"}', "prompt"),
        ("completions", '{"prompt": {}}', "prompt"),
        ("completions", '{"prompt": [[]]}', "prompt"),
        ("completions", '{"prompt": []}', "prompt"),
        ("completions", '{"prompt": "x", "top_k": 1' + "0" * 400 + "}", "top_k"),
        ("completions", '{"prompt": "x", "temperature": NaN}', "temperature"),
        ("completions", '{"prompt": "x", "repetition_penalty": 1e-300}', "repetition_penalty"),
        ("completions", '{"prompt": "x", "logprobs": 6}', "logprobs"),
        ("completions", '{"prompt": "x", "stop": ' + json.dumps(["s"] * 17) + "}", "stop"),
        ("completions", '{"prompt": ' + json.dumps([[1]] * 5000) + "}", "prompt"),
        (
            "chat/completions",
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
            "messages[0].content[0]",
        ),
    ],
)
def test_hostile_requests_are_refused_by_name_and_others_live_on(
    server: Server, path: str, text: str, param: str
) -> None:
    bystander = in_background(lambda: raw_events(server, **{**LONG, "max_tokens": 150}))
    wait_until_running(server)
    body = '{"model": "' + MODEL + '", ' + text[1:]
    headers = {"content-type": "application/json"}
    answer = httpx2.post(f"{server.url}/v1/{path}", content=body.encode(), headers=headers, timeout=30)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert bystander()[-1] == "data: [DONE]"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 150}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": None}]},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "reasoning_content": "Well."},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": None}},
        {"role": "function", "content": None, "name": "f"},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "user", "content": ""},
        {"role": "user", "content": [], "name": "<|im_end|>"},
    ],
)
def test_odd_but_legal_messages_are_answered(server: Server, message: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": [*HELLO, message], "max_tokens": 2, "stop": ["", "x"], "top_k": -1}
    nulls = dict.fromkeys(["temperature", "top_p", "n", "seed", "stream", "user", "logit_bias", "stream_options"])
    assert server.post("/v1/chat/completions", **nulls, **body).status_code == 200


def test_missing_fields_broken_json_and_unknown_routes_have_the_same_shape(server: Server) -> None:
    missing = server.post("/v1/chat/completions", model=MODEL)
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "messages"
    broken = httpx2.post(
        server.url + "/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert broken.status_code == 400 and broken.json()["error"]["type"] == "invalid_request_error"
    unknown = server.get("/v3/nothing").json()["error"]
    assert unknown["type"] == "invalid_request_error"
    assert unknown["message"] == "The endpoint /v3/nothing does not exist: /docs shows those that do."
    wrong = server.get("/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["message"] == "The endpoint /v1/chat/completions does not take GET: use POST."


@pytest.mark.parametrize(
    ("body", "param", "constant"),
    [
        ('{"a": NaN, "b": Infinity}', "a", "NaN"),
        ('{"b": [1, {"c": -Infinity}, NaN], "a": NaN}', "b[1].c", "-Infinity"),
    ],
)
def test_the_first_number_that_no_json_has_is_named(server: Server, body: str, param: str, constant: str) -> None:
    headers = {"content-type": "application/json"}
    refusal = httpx2.post(server.url + "/v1/chat/completions", content=body, headers=headers, trust_env=False)
    error = refusal.json()["error"]
    assert refusal.status_code == 400 and error["param"] == param
    assert error["message"] == f"{param}: {constant} is not valid JSON: send a finite number or null."


def test_every_response_has_an_id_and_says_whether_to_try_again(server: Server) -> None:
    for path, status in (("/health", 200), ("/v1/nothing", 404), ("/v1/completions", 405), ("/v1/models/none", 404)):
        answer = server.get(path)
        assert answer.status_code == status and answer.headers["x-request-id"]
        assert answer.headers.get("x-should-retry") == (None if status == 200 else "false")
    events = httpx2.post(server.url + "/v1/completions", json={"model": MODEL, "prompt": "x", "stream": True})
    assert events.headers["x-request-id"]


def test_the_routes_answer_without_v1_too(server: Server) -> None:
    body = {"model": MODEL, "max_tokens": 2}
    assert server.get("/models").json()["data"][0]["id"] == MODEL
    assert server.get(f"/models/{MODEL}").json()["id"] == MODEL
    assert server.post("/chat/completions", messages=HELLO, **body).status_code == 200
    assert server.post("/completions", prompt="x", **body).status_code == 200
    assert server.get("/version").json()["version"]
    assert "/completions" not in server.get("/openapi.json").json()["paths"]


def test_the_sdk_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 480 tokens"):
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5000)


def test_pages_of_this_machine_may_call_and_others_may_not(server: Server) -> None:
    def allowed(origin: str) -> str | None:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        reply = httpx2.options(server.url + "/v1/chat/completions", headers=headers)
        return reply.headers.get("access-control-allow-origin")

    assert allowed("http://localhost:3000") == "http://localhost:3000"
    assert allowed("http://localhost.evil.example") is None and allowed("https://evil.example") is None


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("chat/completions", {"messages": HELLO}, "max_tokens"),
        ("chat/completions", {"messages": HELLO}, "max_completion_tokens"),
        ("completions", {"prompt": "Hello"}, "max_tokens"),
        ("responses", {"input": "Hello"}, "max_output_tokens"),
    ],
)
def test_as_many_tokens_as_the_context_has_are_a_bound_and_more_are_refused_by_name(
    server: Server, path: str, body: dict[str, Any], field: str
) -> None:
    """qwen-code asks for as many tokens as the context has, whatever the prompt takes."""
    whole = server.post(f"/v1/{path}", model=MODEL, ignore_eos=True, **body, **{field: 480})
    assert whole.status_code == 200 and whole.json()["usage"]["total_tokens"] == 480
    ended = whole.json().get("incomplete_details") or whole.json()["choices"][0]["finish_reason"]
    assert ended in ("length", {"reason": "max_output_tokens"})
    refusal = server.post(f"/v1/{path}", model=MODEL, **body, **{field: 481})
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == field
