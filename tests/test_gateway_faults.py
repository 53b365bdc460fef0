"""What clients of this server get when a provider fails, is slow, or sends what it should not."""

import asyncio
import json
import re
import time
from typing import Any

import httpx2
import pytest
from raw_http import processor_seconds
from running_gateway import HELLO, KEYS, Gateway, answer
from upstreams import Asked, Reply, chunk, event, message_events, told

from providers.upstream_errors import redact

ERROR = {"error": {"message": "Wrong key sk-abc123456 given", "type": "t", "code": None, "param": None}}
QUIET: list[Any] = [event(chunk({"role": "assistant", "content": "a"}))]
FAULTS: dict[str, tuple[Reply, int, str | None]] = {
    "400": (Reply.of({"error": {"message": "no", "param": "n", "code": "bad"}}, 400), 400, "bad"),
    "401": (Reply.of(ERROR, 401), 401, "provider_auth_error"),
    "402": (Reply.of(ERROR, 402), 402, "insufficient_quota"),
    "404": (Reply.of(ERROR, 404), 404, "model_not_found"),
    "too long": (Reply.of({"error": {"message": "prompt is too long: 9 tokens"}}, 400), 400, "context_length_exceeded"),
    "429 for long": (Reply.of(ERROR, 429, retry_after="90"), 429, "rate_limit_exceeded"),
    "429 until a date": (Reply.of(ERROR, 429, retry_after="Wed, 21 Oct 2099 07:28:00 GMT"), 429, "rate_limit_exceeded"),
    "500": (Reply.of(ERROR, 500, x_should_retry="false"), 502, None),
    "529": (Reply.of(ERROR, 529, x_should_retry="false"), 503, "overloaded"),
    "redirect": (Reply.of(b"", 302, location="http://127.0.0.1:1/"), 502, None),
    "an error in a list": (
        Reply.of([{"error": {"code": 404, "message": "gone", "status": "NOT_FOUND"}}], 404),
        404,
        "model_not_found",
    ),
    "an error as a text": (Reply.of({"error": "model not loaded"}, 404), 404, "model_not_found"),
    "HTML": (Reply.of(b"<html>", 503, x_should_retry="false"), 503, None),
    "no JSON": (Reply.of(b"<html>"), 502, "upstream_invalid_response"),
    "empty": (Reply.of(b""), 502, "upstream_invalid_response"),
    "an error with success": (Reply.of(ERROR), 502, None),
    "silence": (Reply([5.0, b"{}"]), 504, "upstream_timeout"),
    "broken": (Reply([b'{"id": ', None]), 502, "upstream_disconnected"),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_has_its_status_before_anything_is_answered(gateway: Gateway, name: str, is_stream: bool) -> None:
    reply, status, code = FAULTS[name]
    gateway.providers["openai"].script = lambda asked: reply
    got = gateway.chat("openai/x", stream=is_stream)
    error = got.json()["error"]
    assert (got.status_code, error["code"]) == (status, code), got.text
    assert set(error) == {"message", "type", "param", "code"} and "openai" in error["message"]
    assert "sk-abc" not in got.text and "secret" not in got.text
    if status == 401:
        assert "OPENAI_API_KEY" in error["message"]
    if "429" in name:
        assert int(got.headers["retry-after"]) >= 90


STREAM_FAULTS: dict[str, tuple[list[Any], str | None]] = {
    "cut": (QUIET, "upstream_stream_truncated"),
    "dropped": ([*QUIET, None], "upstream_stream_truncated"),
    "stalled": ([*QUIET, 5.0, b"x"], "upstream_timeout"),
    "an error": (
        [*QUIET, event({"error": {"message": "sk-abc123456 overloaded", "code": 429}})],
        "rate_limit_exceeded",
    ),
    "no JSON": ([*QUIET, b'data: {"error" \n\n'], "upstream_invalid_response"),
}


@pytest.mark.parametrize("name", STREAM_FAULTS)
def test_a_failure_in_a_stream_is_its_last_event(gateway: Gateway, name: str) -> None:
    pieces, code = STREAM_FAULTS[name]
    gateway.providers["openai"].script = lambda asked: Reply.stream(*pieces)
    got = gateway.chat("openai/x", stream=True)
    *_, last, end = got.text.split("\n\n")
    codes = {code, "upstream_disconnected"} if name == "dropped" else {code}  # as the system sees it
    assert got.status_code == 200 and end == "" and json.loads(last[6:])["error"]["code"] in codes, got.text
    assert "[DONE]" not in got.text and "sk-abc" not in got.text


def test_a_stream_that_ended_without_saying_so_is_ended_here(gateway: Gateway) -> None:
    gateway.providers["openai"].script = lambda asked: Reply.stream(*told("x", done=False))
    assert gateway.chat("openai/x", stream=True).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("is_stream", [False, True])
def test_passing_failures_are_tried_again_before_anything_was_answered(gateway: Gateway, is_stream: bool) -> None:
    provider = gateway.providers["openai"]
    replies = [Reply.of(ERROR, 503), Reply.of(ERROR, 429, retry_after_ms="10"), None]

    def script(asked: Asked) -> Reply:
        return replies[len(provider.asked) - 1] or answer(asked)

    provider.script = script
    assert gateway.chat("openai/x", stream=is_stream).status_code == 200 and len(provider.asked) == 3
    provider.asked.clear()
    provider.script = lambda asked: Reply.of(ERROR, 400)
    gateway.chat("openai/x", stream=is_stream)
    assert len(provider.asked) == 1
    provider.asked.clear()
    provider.script = lambda asked: Reply.of(ERROR, 500, retry_after="0")
    assert gateway.chat("openai/x", stream=is_stream).status_code == 502 and len(provider.asked) == 3


def test_others_answer_where_a_provider_cannot_if_that_is_set(gateway: Gateway) -> None:
    gateway.providers["openai"].script = lambda asked: Reply.of(ERROR, 500, retry_after="0")
    got = gateway.chat("openai/falls")
    assert got.headers["x-gateway-provider"] == "claude" and got.headers["x-gateway-fallback-from"] == "openai/falls"
    landed = gateway.chat("openai/lands", max_tokens=2)
    assert landed.json()["model"] == "Tiny-Qwen3" and landed.headers["x-gateway-model"] == "Tiny-Qwen3"
    gateway.providers["openai"].script = lambda asked: Reply.of(ERROR, 400)
    assert gateway.chat("openai/falls").status_code == 400


def test_claude_drops_what_a_model_turned_out_to_refuse(gateway: Gateway) -> None:
    provider = gateway.providers["claude"]

    def script(asked: Asked) -> Reply:
        told_off = {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "`temperature` is deprecated"},
        }
        return Reply.of(told_off, 400) if "temperature" in asked.body else answer(asked)

    provider.script = script
    for count in (2, 3):
        got = gateway.chat("claude/claude-next", temperature=0.5, seed=1)
        assert got.status_code == 200 and len(provider.asked) == count
        assert set(got.headers["x-gateway-dropped-params"].split(", ")) == {"temperature", "seed"}


async def leave(gateway: Gateway, body: dict[str, Any], after: float) -> float:
    async with httpx2.AsyncClient(timeout=30) as client:
        sending = asyncio.ensure_future(client.post(f"{gateway.server.url}/v1/chat/completions", json=body))
        await asyncio.sleep(after)
        sending.cancel()
        left = time.monotonic()
        await asyncio.gather(sending, return_exceptions=True)
    return left


SLOW = {
    "whole": (Reply([30.0, b"{}"]), False),
    "before the first byte": (Reply([30.0, b"x"]), True),
    "before the first event": (Reply.stream(b": wait\n\n"[:1], 30.0, b"x"), True),
    "in the middle": (Reply.stream(*QUIET, 30.0, b"x"), True),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("model", ["openai/x", "claude/x"])
@pytest.mark.parametrize("name", SLOW)
def test_a_client_that_leaves_ends_the_work_there(gateway: Gateway, name: str, model: str) -> None:
    reply, is_stream = SLOW[name]
    provider = gateway.providers[model.partition("/")[0]]
    if model == "claude/x" and name == "in the middle":
        reply = Reply.stream(*message_events("a")[:4], 30.0, b"x")
    provider.script = lambda asked: reply
    body = {"model": model, "messages": HELLO, "stream": is_stream}
    left = asyncio.run(leave(gateway, body, 0.5))
    deadline = time.monotonic() + 20
    while provider.asked[0].left_at is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert provider.asked[0].left_at is not None
    assert provider.asked[0].left_at - left < 1.2, "it took its own time-out"  # 5 ms on an idle machine
    gateway.server.wait_until_idle()


def test_keys_are_in_no_log(gateway: Gateway) -> None:
    gateway.providers["openai"].script = lambda asked: Reply.of(ERROR, 500, retry_after="0")
    gateway.chat("openai/x")
    log = "".join(gateway.server.lines)
    assert "secret" not in log and "sk-abc" not in log
    assert redact("Bearer abcdefghijkl") == "[redacted]"


def test_pages_of_other_origins_cannot_spend_the_keys(gateway: Gateway) -> None:
    headers = {"content-type": "text/plain", "origin": "https://evil.example"}
    content = json.dumps({"model": "openai/x", "messages": HELLO}).encode()
    got = httpx2.post(gateway.server.url + "/v1/chat/completions", content=content, headers=headers)
    assert got.status_code == 400 and not gateway.providers["openai"].asked


def test_a_name_without_end_costs_nothing(gateway: Gateway) -> None:
    content = b'{"model": "' + b"a" * 8_000_000 + b'", ' + b'"model":"openai/a",' * 100_000 + b'"x": 1}'
    before = processor_seconds(gateway.server)
    got = httpx2.post(
        gateway.server.url + "/v1/completions",
        content=content,
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert got.status_code in (200, 400) and processor_seconds(gateway.server) - before < 5


def test_a_stream_ends_with_its_own_end_and_cut_events_are_not_passed_on(gateway: Gateway) -> None:
    provider = gateway.providers["openai"]
    provider.script = lambda asked: Reply.stream(*told("x"), 30.0, b"more")
    begin = time.monotonic()
    got = gateway.chat("openai/x", stream=True)
    assert got.text.endswith("data: [DONE]\n\n") and time.monotonic() - begin < 15
    provider.script = lambda asked: Reply.stream(*QUIET, b'data: {"choices":[{"finish_reason":"stop","del')
    *_, last, _ = gateway.chat("openai/x", stream=True).text.split("\n\n")
    assert json.loads(last[6:])["error"]["code"] == "upstream_stream_truncated"


def test_a_key_that_a_provider_repeats_is_not_passed_on(gateway: Gateway) -> None:
    told_off = {"error": {"message": f"Incorrect key: {KEYS['OLLAMA']}"}}
    gateway.providers["ollama"].script = lambda asked: Reply.of(told_off, 401)
    got = gateway.chat("ollama/x")
    assert got.status_code == 401 and KEYS["OLLAMA"] not in got.text


def test_a_value_that_claude_refuses_is_no_parameter_that_a_model_refuses(gateway: Gateway) -> None:
    provider = gateway.providers["claude"]

    def script(asked: Asked) -> Reply:
        told_off = {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "`top_k`: must be below 500"},
        }
        return Reply.of(told_off, 400) if asked.body.get("top_k", 0) >= 500 else answer(asked)

    provider.script = script
    assert gateway.chat("claude/claude-3-x", top_k=9999).status_code == 400
    assert gateway.chat("claude/claude-3-x", top_k=40).status_code == 200 and provider.asked[-1].body["top_k"] == 40


@pytest.mark.parametrize("model", ["deepseek/x", "ollama/x", "minmax/x", "gemini/x", "claude/x", "openai/x"])
def test_odd_bodies_are_nobodys_failure(gateway: Gateway, model: str) -> None:
    for messages in (5, True, [5], [{"content": 5}], {"a": 1}):
        assert gateway.chat(model, messages=messages).status_code in (200, 400)


def test_a_body_that_is_no_request_is_refused_by_the_endpoint(gateway: Gateway) -> None:
    for content in (b'{"model": "openai/x", ', b'["openai/x"]', b'{"x": {"model": "openai/x"}}', b'{"model": 3}'):
        headers = {"content-type": "application/json"}
        got = httpx2.post(gateway.server.url + "/v1/chat/completions", content=content, headers=headers)
        assert got.status_code == 400 and re.search("error", got.text)
