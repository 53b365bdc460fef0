"""BodyLimit: a request's body beyond a size is refused with 413, before it is read if it says how long it is.

Pure ASGI, as Starlette's own, which answers in plain text instead of this server's error format.
"""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    def __init__(self, app: ASGIApp, max_body_size: int) -> None:
        self.app = app
        self.max_body_size = max_body_size  # bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "")
        size = int(declared) if declared.isdecimal() else 0
        num_read = 0

        async def receive_up_to_limit() -> Message:
            nonlocal num_read
            if size > self.max_body_size:
                raise self._too_large()
            message = await receive()
            num_read += len(message.get("body", b""))
            if num_read > self.max_body_size:
                raise self._too_large()
            return message

        await self.app(scope, receive_up_to_limit, send)

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"The body is larger than {self.max_body_size} bytes")
