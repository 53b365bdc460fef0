"""Errors as ASGI messages, for middleware that answers before the request reaches an endpoint."""

import json

from starlette.types import Scope, Send

from errors import APIError
from server.error_formats import error_format


def headers_of(error: APIError) -> dict[str, str]:
    """Makes the headers that tell a client whether and when to try again; the openai SDK obeys x-should-retry."""
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status // 100 == 4 and not error.is_transient and not error.retry_after:
        headers["x-should-retry"] = "false"
    return {**headers, **error.headers}


async def send_error(scope: Scope, send: Send, error: APIError) -> None:
    """Answers the request of `scope` with an error, in the format of its protocol."""
    body = json.dumps(error_format(scope["path"]).body(error)).encode()
    headers = {**headers_of(error), "content-type": "application/json", "content-length": str(len(body))}
    encoded = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
