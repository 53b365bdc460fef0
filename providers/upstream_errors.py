"""Errors of providers become errors of this server, without the keys that some of them repeat."""

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from errors import UpstreamError

# The provider's status -> this server's, type, code, and whether another try may succeed
FAULTS: dict[int, tuple[int, str, str | None, bool]] = {
    400: (400, "invalid_request_error", None, False),
    401: (401, "authentication_error", "provider_auth_error", False),
    402: (402, "insufficient_quota", "insufficient_quota", False),
    403: (403, "authentication_error", "provider_auth_error", False),
    404: (404, "invalid_request_error", "model_not_found", False),
    408: (504, "timeout", "upstream_timeout", True),
    409: (409, "invalid_request_error", None, True),
    413: (413, "invalid_request_error", None, False),
    422: (422, "invalid_request_error", None, False),
    429: (429, "rate_limit_exceeded", "rate_limit_exceeded", True),
    500: (502, "api_error", None, True),
    502: (502, "api_error", None, True),
    503: (503, "api_error", None, True),
    504: (504, "timeout", "upstream_timeout", True),
    529: (503, "api_error", "overloaded", True),
}
TOO_LONG = re.compile(r"prompt is too long|context[ _-]?(window|length|limit|size)|exceeds?\b.{0,60}\bcontext", re.I)
KEYS = re.compile(
    r"(?<![A-Za-z])sk-[\w*.-]*[\w*]|AIza[\w-]{8,}|(?<![A-Za-z])hf_\w{8,}|\beyJ[\w.-]{8,}|\bbearer\s+[^\s\"',;]{8,}",
    re.IGNORECASE,
)
MAX_MESSAGE = 2000  # characters


def error_of(
    status: int, body: Any, provider: str, key_variable: str, headers: Mapping[str, str] | None = None
) -> UpstreamError:
    """Returns the error for a provider's answer. body: its JSON; of any other value only the status is reported."""
    error, headers = error_in(body) or {}, headers or {}
    text = error.get("message")
    message = redact(text)[:MAX_MESSAGE] if isinstance(text, str) and text else f"it answered with status {status}."
    our_status, kind, code, is_transient = FAULTS.get(status) or _other(status)
    if our_status in (401, 403):
        message = f"the request with the key in {key_variable} was refused: {message}"
    if our_status == 400 and TOO_LONG.search(message):
        code = "context_length_exceeded"
    if status == 429 and _is_spent(error):
        code, is_transient = "insufficient_quota", False
    wait = retry_after(headers)
    return UpstreamError(
        f"{provider}: {message}",
        status=our_status,
        type=kind,
        code=code or _text(error.get("code")),
        param=_text(error.get("param")),
        retry_after=None if wait is None else max(1, round(wait)),
        headers=_passed(headers),
        is_transient=is_transient and headers.get("x-should-retry") != "false",
    )


def _other(status: int) -> tuple[int, str, str | None, bool]:
    """Returns the row for a status that FAULTS does not list."""
    return (status, "invalid_request_error", None, False) if 400 <= status < 500 else (502, "api_error", None, True)


def _is_spent(error: Mapping[str, Any]) -> bool:
    """Returns whether the limit is one of money: another try does not help before a payment."""
    details = error.get("details")
    code = details.get("error_code") if isinstance(details, dict) else None
    return "spend_limit" in str(code) or error.get("code") == "insufficient_quota"


def _text(value: Any) -> str | None:
    return redact(value)[:200] if isinstance(value, str) and value else None


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    """Returns the headers that the client gets too; OpenAI's SDKs obey the last two."""
    passed = {
        "x-upstream-request-id": headers.get("x-request-id") or headers.get("request-id"),
        "x-should-retry": headers.get("x-should-retry"),
        "retry-after-ms": headers.get("retry-after-ms") if _number(headers.get("retry-after-ms")) is not None else None,
    }
    return {name: value for name, value in passed.items() if value and value.isascii() and value.isprintable()}


def redact(text: str) -> str:
    """Returns the text without what looks like a key: some providers repeat a part of it."""
    return KEYS.sub("[redacted]", text)


def error_in(answer: Any) -> dict[str, Any] | None:
    """Returns the error object of an answer: OpenAI's, one made of a text, or either in a list, as Gemini sends it."""
    if isinstance(answer, list) and answer:
        answer = answer[0]
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, str):
        return {"message": error}
    return error if isinstance(error, dict) and error else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds to wait, at least 0; None if no header says. Headers have milliseconds, seconds or a date."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    if text is None or (seconds := _number(text)) is not None:
        return seconds if text else None
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _number(text: str | None) -> float | None:
    """Returns a finite number of at least 0; None for any other text."""
    try:
        number = float(text or "")
    except ValueError:
        return None
    return max(0.0, number) if math.isfinite(number) else None
