"""ApiKeyAuth: with API_KEYS set, every route but /health and the files of the page requires one of them in the
Authorization header.

It is pure ASGI. It looks at the path that routing sees, and decides before any of the body is read.
"""

import hashlib
import hmac
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from config import ApiKey
from errors import InvalidKey, RateLimited
from server.asgi_errors import send_error
from telemetry import request_record

OPEN_METHODS = ("GET", "HEAD")
OPEN_PATHS = frozenset({"/health"})
MINUTE = 60.0


@dataclass
class Client:
    """A client, known by its key, with the state of its limits."""

    key: ApiKey
    digest: bytes
    num_running: int = 0
    allowance: float = field(init=False)  # requests that may still come now
    counted_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.allowance = self.key.requests_per_minute or 0.0

    def admit(self) -> None:
        """Counts a request, which has to be subtracted from `num_running` when it ends. Raises RateLimited."""
        if self.key.concurrent is not None and self.num_running >= self.key.concurrent:
            raise RateLimited(
                f"This API key allows {self.key.concurrent} requests at a time; try again when one has finished.",
                retry_after=1,
            )
        rate = self.key.requests_per_minute
        if rate is not None:
            now = time.monotonic()
            self.allowance = min(rate, self.allowance + (now - self.counted_at) * rate / MINUTE)
            self.counted_at = now
            if self.allowance < 1:
                wait = max(1, round((1 - self.allowance) * MINUTE / rate))
                raise RateLimited(
                    f"This API key allows {rate:g} requests per minute; try again in {wait} seconds.", retry_after=wait
                )
            self.allowance -= 1
        self.num_running += 1


class ApiKeyAuth:
    def __init__(self, app: ASGIApp, keys: Sequence[ApiKey], open_paths: Collection[str] = ()) -> None:
        """open_paths: can be read without a key, as /health can."""
        self.app = app
        self._open_paths = OPEN_PATHS.union(open_paths)
        self._clients = [Client(key, digest=_digest(key.secret.get_secret_value().encode())) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._clients or self._is_open(scope):
            return await self.app(scope, receive, send)
        client = self._client(scope)
        if client is None:
            request_record.current().error = InvalidKey.code
            return await send_error(scope, send, _refusal(scope))
        request_record.current().client = client.key.name
        try:
            client.admit()
        except RateLimited as error:
            request_record.current().error = error.code
            return await send_error(scope, send, error)
        try:
            await self.app(scope, receive, send)
        finally:
            client.num_running -= 1

    def _is_open(self, scope: Scope) -> bool:
        return scope["method"] in OPEN_METHODS and scope["path"] in self._open_paths

    def _client(self, scope: Scope) -> Client | None:
        """Finds the client by its key, in a time that does not depend on how much of a wrong key is right."""
        token = _token(scope)
        digest, owner = _digest(token or b""), None
        for client in self._clients:
            if hmac.compare_digest(client.digest, digest):
                owner = client
        return owner if token else None


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _token(scope: Scope) -> bytes | None:
    """Reads the bearer token; None unless there is exactly one Authorization header and its scheme is Bearer."""
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, token = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
    return token.strip() if scheme.lower() == b"bearer" else None


def _refusal(scope: Scope) -> InvalidKey:
    is_silent = not any(name == b"authorization" for name, _ in scope["headers"])
    problem = "No API key was sent" if is_silent else "The Authorization header holds no valid API key"
    return InvalidKey(f"{problem}: send a valid key as `Authorization: Bearer KEY`.")
