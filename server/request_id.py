"""RequestId: every response carries an `x-request-id`, and an unforeseen exception becomes a 500 that names it.

Pure ASGI, so that a client that leaves is still seen by the endpoint.
"""

import logging
import re
from collections.abc import Sequence
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from errors import APIError
from server.asgi_errors import send_error
from telemetry import request_record
from telemetry.request_record import RequestRecord

log = logging.getLogger(__name__)
VALID = re.compile(rb"[A-Za-z0-9._-]{1,128}")  # what a client may choose: nothing that forges logs or headers


class RequestId:
    def __init__(self, app: ASGIApp, secrets: Sequence[str] = ()) -> None:
        """secrets: what an id, which is logged, must not have in it."""
        self.app = app
        self._secrets = [secret.encode() for secret in secrets]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        is_fine = VALID.fullmatch(given) and not any(secret in given for secret in self._secrets)
        request_id = given if is_fine else f"req_{uuid4().hex}".encode()
        request_record.begin(RequestRecord(request_id=request_id.decode()))
        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id)]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s failed", request_id.decode())
            if has_begun:
                raise
            await send_error(scope, send_with_id, APIError("The server failed; the error is in its log."))
