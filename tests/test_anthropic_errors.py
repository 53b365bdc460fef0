"""Claude's errors become this server's, with their statuses and without keys."""

from typing import Any

import pytest
from claude_requests import Object

from errors import APIError
from providers.anthropic_response import StreamMapper
from providers.upstream_errors import error_of, redact
from server.error_formats import OPENAI


def body_of(kind: str, message: str = "m", **more: Any) -> Object:
    return {"type": "error", "error": {"type": kind, "message": message, **more}, "request_id": "req_1"}


@pytest.mark.parametrize(
    ("status", "expected", "kind", "code", "retryable"),
    [
        (400, 400, "invalid_request_error", None, False),
        (401, 401, "authentication_error", "provider_auth_error", False),
        (402, 402, "insufficient_quota", "insufficient_quota", False),
        (403, 403, "authentication_error", "provider_auth_error", False),
        (404, 404, "invalid_request_error", "model_not_found", False),
        (409, 409, "invalid_request_error", None, True),
        (413, 413, "invalid_request_error", None, False),
        (418, 418, "invalid_request_error", None, False),
        (422, 422, "invalid_request_error", None, False),
        (429, 429, "rate_limit_exceeded", "rate_limit_exceeded", True),
        (500, 502, "api_error", None, True),
        (504, 504, "timeout", "upstream_timeout", True),
        (529, 503, "api_error", "overloaded", True),
        (599, 502, "api_error", None, True),
    ],
)
@pytest.mark.parametrize("body", [body_of("x"), None, [], "<html>", {"error": "x"}, {"error": {"message": 5}}])
def test_errors_have_counterparts(
    status: int, expected: int, kind: str, code: str | None, retryable: bool, body: Any
) -> None:
    fault = error_of(status, body, "claude", "ANTHROPIC_API_KEY")
    assert (fault.status, fault.type, fault.code, fault.is_transient) == (expected, kind, code, retryable)
    assert "claude" in fault.message and "html" not in fault.message
    assert ("ANTHROPIC_API_KEY" in fault.message) == (status in (401, 403))
    assert OPENAI.body(fault)["error"]["type"] == kind


def test_a_prompt_that_is_too_long_is_told_apart() -> None:
    for text in ("prompt is too long: 210000 tokens > 200000 maximum", "input exceeds the context window"):
        assert error_of(400, body_of("invalid_request_error", text), "claude", "K").code == "context_length_exceeded"
    assert error_of(400, body_of("invalid_request_error", "context_management: no"), "claude", "K").code is None


def test_spending_limits_are_not_tried_again() -> None:
    body = body_of("rate_limit_error", details={"error_code": "enforced_spend_limit_reached"})
    fault = error_of(429, body, "claude", "K")
    assert (fault.status, fault.code, fault.is_transient) == (429, "insufficient_quota", False)


def test_keys_are_not_shown() -> None:
    for key in ("sk-ant-api03-aB_c-9", "sk-abc***xyz", "AIzaSyA-1234567", "Bearer abc.def/ghi+=", "hf_abcdefghijk"):
        text = f"wrong key: {key}, (task-force)"
        assert key not in redact(text) and redact(text).endswith(", (task-force)")
        assert key not in error_of(401, body_of("authentication_error", text), "claude", "K").message


@pytest.mark.parametrize(
    ("kind", "status"),
    [("overloaded_error", 503), ("api_error", 502), ("rate_limit_error", 429), ("timeout_error", 504), ("new", 502)],
)
def test_an_error_in_a_stream_is_raised(kind: str, status: int) -> None:
    mapper = StreamMapper("m", 1, True)
    with pytest.raises(APIError) as caught:
        mapper.events("error", body_of(kind, "Overloaded sk-ant-1"))
    assert caught.value.status == status and "sk-ant" not in caught.value.message
    assert not mapper.is_complete
