"""Errors of providers as this server's clients are told of them: in OpenAI's shape, and without anybody's key."""

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from errors import UpstreamError

# The provider's status: ours, type, code and whether to try again.
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
    """`body`: the JSON of the answer, or anything else, which is not shown."""
    error, headers = error_in(body) or {}, headers or {}
    told = error.get("message")
    said = redact(told)[:MAX_MESSAGE] if isinstance(told, str) and told else f"it answered with status {status}."
    ours, kind, code, is_passing = FAULTS.get(status) or _other(status)
    if ours in (401, 403):
        said = f"the request with the key in {key_variable} was refused: {said}"
    if ours == 400 and TOO_LONG.search(said):
        code = "context_length_exceeded"
    if status == 429 and _is_spent(error):
        code, is_passing = "insufficient_quota", False
    wait = retry_after(headers)
    return UpstreamError(
        f"{provider}: {said}",
        status=ours,
        type=kind,
        code=code or _text(error.get("code")),
        param=_text(error.get("param")),
        retry_after=None if wait is None else max(1, round(wait)),
        headers=_passed(headers),
        is_passing=is_passing and headers.get("x-should-retry") != "false",
    )


def _other(status: int) -> tuple[int, str, str | None, bool]:
    return (status, "invalid_request_error", None, False) if 400 <= status < 500 else (502, "api_error", None, True)


def _is_spent(error: Mapping[str, Any]) -> bool:
    """A limit of money, which passes with a payment."""
    details = error.get("details")
    code = details.get("error_code") if isinstance(details, dict) else None
    return "spend_limit" in str(code) or error.get("code") == "insufficient_quota"


def _text(value: Any) -> str | None:
    return redact(value)[:200] if isinstance(value, str) and value else None


def _passed(headers: Mapping[str, str]) -> dict[str, str]:
    """Both SDKs obey the last two."""
    given = {
        "x-upstream-request-id": headers.get("x-request-id") or headers.get("request-id"),
        "x-should-retry": headers.get("x-should-retry"),
        "retry-after-ms": headers.get("retry-after-ms") if _number(headers.get("retry-after-ms")) is not None else None,
    }
    return {name: value for name, value in given.items() if value and value.isascii() and value.isprintable()}


def redact(text: str) -> str:
    """Without what looks like a key: some providers repeat a part of it."""
    return KEYS.sub("[redacted]", text)


def error_in(answer: Any) -> dict[str, Any] | None:
    """The error that an answer consists of: OpenAI's object, a text, or either in a list, as Gemini has it."""
    if isinstance(answer, list) and answer:
        answer = answer[0]
    error = answer.get("error") if isinstance(answer, dict) else None
    if isinstance(error, str):
        return {"message": error}
    return error if isinstance(error, dict) and error else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, at least 0; the header has milliseconds, seconds or a date."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    given = headers.get("retry-after")
    if given is None or (seconds := _number(given)) is not None:
        return seconds if given else None
    try:
        return max(0.0, parsedate_to_datetime(given).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return max(0.0, number) if math.isfinite(number) else None
