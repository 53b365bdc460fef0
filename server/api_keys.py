"""ApiKeyAuth: with API_KEYS set, every route but /health and the files of the page requires one of them, as a bearer
token or as x-api-key.

It is pure ASGI. It looks at the path that routing sees, and decides before any of the body is read.
"""

import hashlib
import hmac
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Receive, Scope, Send

from errors import InvalidKey, RateLimited
from server.asgi_errors import send_error
from setting_values import ApiKey
from telemetry import request_record

OPEN_METHODS = ("GET", "HEAD")
OPEN_PATHS = frozenset({"/health"})
MINUTE = 60.0
KEY_HEADERS = (b"authorization", b"x-api-key")  # OpenAI's clients send the first, Anthropic's either


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
        owner = None
        for token in _tokens(scope):
            digest = _digest(token)
            for client in self._clients:
                if hmac.compare_digest(client.digest, digest) and token:
                    owner = client
        return owner


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _tokens(scope: Scope) -> list[bytes]:
    """Reads the keys that a client sent, at most one from each header: one that is there twice is not read."""
    sent = {header: [value for name, value in scope["headers"] if name == header] for header in KEY_HEADERS}
    values = {header: found[0] for header, found in sent.items() if len(found) == 1}
    scheme, _, token = values.get(b"authorization", b"").partition(b" ")
    tokens = [token.strip()] if scheme.lower() == b"bearer" else []
    return [*tokens, values[b"x-api-key"].strip()] if b"x-api-key" in values else tokens


def _refusal(scope: Scope) -> InvalidKey:
    is_silent = not any(name in KEY_HEADERS for name, _ in scope["headers"])
    problem = "No API key was sent" if is_silent else "No valid API key was sent"
    return InvalidKey(f"{problem}: send one as `Authorization: Bearer KEY` or `x-api-key: KEY`.")
