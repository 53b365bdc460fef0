"""BodyLimit: a body that is too large is refused with 413, before it is read if the request declares its length.

It is pure ASGI, like Starlette's own limit, which answers in plain text instead of this server's error format. The
bodies of all requests together have a limit too, because many small ones could fill the memory.
"""

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from errors import Overloaded


class BodyLimit:
    def __init__(
        self,
        app: ASGIApp,
        max_body_size: int,
        max_body_memory: int,
        on_release: Callable[[int], object] = lambda num_bytes: None,
    ) -> None:
        """on_release: is called with the size of each body, in bytes, when the body is no longer needed."""
        self.app = app
        self.max_body_size = max_body_size  # bytes
        self.max_body_memory = max_body_memory  # bytes
        self._on_release = on_release
        self._num_held = 0  # bytes of the bodies of all requests in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "")
        size = int(declared) if declared.isdecimal() and len(declared) < 20 else 0
        num_read, is_whole = 0, False

        async def receive_up_to_limit() -> Message:
            nonlocal num_read, is_whole
            if is_whole:  # the next message says that the client disconnected
                return await receive()
            self._check(size, num_to_come=0)
            message = await receive()
            num_new = len(message.get("body", b""))
            num_read += num_new
            self._num_held += num_new
            self._check(num_read, num_to_come=size - num_read)
            is_whole = not message.get("more_body", False)
            return message

        try:
            await self.app(scope, receive_up_to_limit, send)
        finally:
            self._num_held -= num_read
            self._on_release(num_read)

    def _check(self, size: int, num_to_come: int) -> None:
        if size > self.max_body_size:
            raise HTTPException(
                413, f"The body is larger than the limit of {self.max_body_size} bytes: send a smaller one."
            )
        if self._num_held + max(0, num_to_come) > self.max_body_memory:
            raise Overloaded(
                f"All request bodies together may take {self.max_body_memory} bytes, and this one has no room: "
                "try again later.",
                retry_after=5,
            )
