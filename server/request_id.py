"""RequestId: every response carries an `x-request-id`, and an unforeseen exception becomes a 500 that names it.

It is pure ASGI, so that endpoints still see when their client disconnects.
"""

import logging
import re
from collections.abc import Sequence
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from errors import APIError
from server.asgi_errors import send_error
from server.error_formats import error_format
from telemetry import request_record
from telemetry.request_record import RequestRecord

log = logging.getLogger(__name__)
VALID = re.compile(rb"[A-Za-z0-9._-]{1,128}")  # an id from a client; it cannot forge log lines or headers


class RequestId:
    def __init__(self, app: ASGIApp, secrets: Sequence[str] = ()) -> None:
        """secrets: texts that must not be part of an id, because ids are logged."""
        self.app = app
        self._secrets = [secret.encode() for secret in secrets]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sent_id = dict(scope["headers"]).get(b"x-request-id", b"")
        is_valid = VALID.fullmatch(sent_id) and not any(secret in sent_id for secret in self._secrets)
        request_id = sent_id if is_valid else f"req_{uuid4().hex}".encode()
        request_record.begin(RequestRecord(request_id=request_id.decode()))
        names = [b"x-request-id"]
        if own_name := error_format(scope["path"]).id_header:
            names.append(own_name.encode())
        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                message["headers"] = [*message.get("headers", []), *((name, request_id) for name in names)]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            log.exception("request %s failed", request_id.decode())
            if has_begun:
                raise
            await send_error(scope, send_with_id, APIError("The server failed; the error is in its log."))
