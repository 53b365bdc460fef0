"""Bodies as JSON, strictly: UTF-8, and no NaN or Infinity, which Python's own parser takes and no other does."""

import json
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def loads(body: bytes) -> Any:
    """Raises json.JSONDecodeError, or RecursionError for what is too deep."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError("It is no UTF-8", "", error.start) from error
    return json.loads(text, parse_constant=_refuse)


def _refuse(constant: str) -> NoReturn:
    raise json.JSONDecodeError(f"{constant} is no number of JSON", "", 0)


class StrictRequest(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = loads(await self.body())
        return self._json


def strict(request: Request) -> StrictRequest:
    """The same one if it is strict already: its body may have been read."""
    return request if isinstance(request, StrictRequest) else StrictRequest(request.scope, request.receive)


class StrictRoute(APIRoute):
    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            return await handler(strict(request))

        return handle
