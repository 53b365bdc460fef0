"""Error formats: the shape of an error on the wire, by the protocol of the endpoint that a request is for.

Everything that answers with an error asks `error_format` for the shape, also before the request has been routed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from errors import APIError, ThreadsUnsupported
from telemetry import request_record


@dataclass(frozen=True)
class ErrorFormat:
    body: Callable[[APIError], dict[str, Any]]  # the JSON of a response
    event: Callable[[APIError], bytes]  # the last server-sent event of a stream
    id_header: str | None = None  # where clients look for the request's id, beside x-request-id


def _openai_body(error: APIError) -> dict[str, Any]:
    """The `Error` schema of the OpenAI OpenAPI document, in which all four fields are required."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def _openai_event(error: APIError) -> bytes:
    return b"data: " + json.dumps(_openai_body(error)).encode() + b"\n\n"


def _anthropic_body(error: APIError) -> dict[str, Any]:
    """An error of https://platform.claude.com/docs/en/api/errors. It has no place for the field that is wrong, which
    the message names."""
    kind = ANTHROPIC_TYPES.get(error.status) or ("invalid_request_error" if error.status < 500 else "api_error")
    request_id = request_record.current().request_id
    told = {"type": kind, "message": _anthropic_message(error), **_anthropic_details(error)}
    return {"type": "error", "error": told, "request_id": request_id}


def _anthropic_message(error: APIError) -> str:
    """Names the field, which has no place of its own, and says of a prompt that is too long what Anthropic says."""
    if error.code == "context_length_exceeded":
        counts = getattr(error, "counts", None)
        about = error.message if counts is None else f"{counts[0]} tokens > {counts[1]} maximum"
        return f"prompt is too long: {about}"  # to the letter: Claude Code then makes the conversation shorter
    is_named = error.param is None or error.param in error.message
    return error.message if is_named else f"{error.param}: {error.message}"


def _anthropic_details(error: APIError) -> dict[str, Any]:
    is_of_threads = isinstance(error, ThreadsUnsupported)
    return {"details": {"error_code": error.code, "unsupported": ["thread"]}} if is_of_threads else {}


def _anthropic_event(error: APIError) -> bytes:
    return b"event: error\ndata: " + json.dumps(_anthropic_body(error)).encode() + b"\n\n"


ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
OPENAI = ErrorFormat(body=_openai_body, event=_openai_event)
ANTHROPIC = ErrorFormat(body=_anthropic_body, event=_anthropic_event, id_header="request-id")


def _cohere_body(error: APIError) -> dict[str, Any]:
    return {"message": error.message}


def _cohere_event(error: APIError) -> bytes:
    return b"data: " + json.dumps(_cohere_body(error)).encode() + b"\n\n"


def _ollama_body(error: APIError) -> dict[str, Any]:
    return {"error": error.message}


def _ollama_line(error: APIError) -> bytes:
    return json.dumps(_ollama_body(error)).encode() + b"\n"


COHERE = ErrorFormat(body=_cohere_body, event=_cohere_event)
OLLAMA = ErrorFormat(body=_ollama_body, event=_ollama_line)

# Beginning of the path -> format; the first row that fits is taken, so the default comes last
FORMATS = (
    *((beginning, ANTHROPIC) for beginning in ("/v1/messages", "/messages")),
    ("/v2/", COHERE),
    ("/api/", OLLAMA),
    ("", OPENAI),
)


def error_format(path: str) -> ErrorFormat:
    """Finds the format for a request's path, which may be empty as long as it is not known."""
    return next(format for beginning, format in FORMATS if path.startswith(beginning))
