"""Error formats: the shape of an error on the wire, by the protocol of the endpoint that a request is for.

Everything that answers with an error asks `error_format` for the shape, also before the request has been routed.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from errors import APIError


@dataclass(frozen=True)
class ErrorFormat:
    body: Callable[[APIError], dict[str, Any]]  # the JSON of a response
    event: Callable[[APIError], bytes]  # the last server-sent event of a stream


def _openai_body(error: APIError) -> dict[str, Any]:
    """The `Error` schema of the OpenAI OpenAPI document, in which all four fields are required."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def _openai_event(error: APIError) -> bytes:
    return b"data: " + json.dumps(_openai_body(error)).encode() + b"\n\n"


OPENAI = ErrorFormat(body=_openai_body, event=_openai_event)


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

# Beginning of the path below /v1 -> format; the first row that fits is taken, so the default comes last
FORMATS = (("/v2/", COHERE), ("/api/", OLLAMA), ("", OPENAI))


def error_format(path: str) -> ErrorFormat:
    """Finds the format for a request's path, which may be empty as long as it is not known."""
    below = path.removeprefix("/v1")
    return next(format for prefix, format in FORMATS if below.startswith(prefix))
