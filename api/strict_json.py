"""Bodies as JSON, strictly: UTF-8, and no NaN or Infinity, which Python's own parser takes and no other does."""

import json
import math
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from errors import InvalidRequest
from server.connection import CLIENT_GONE
from text.json_bounds import check_num_values

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def loads(body: bytes) -> Any:
    """Raises json.JSONDecodeError, RecursionError for what is too deep, InvalidRequest for NaN or too many values."""
    check_num_values(body)
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise json.JSONDecodeError("The body is not UTF-8", "", error.start) from error
    constants: list[str] = []

    def noted(name: str) -> float:
        constants.append(name)
        return math.nan

    value = json.loads(text, parse_constant=noted)
    if constants:
        path = _path_of_nan(value)
        raise InvalidRequest(f"{path}: {constants[0]} is not valid JSON.", param=path or None, code="invalid_value")
    return value


def _path_of_nan(value: Any) -> str:
    """`a.b[0]`"""
    left: list[tuple[str, Any]] = [("", value)]
    while left:
        path, value = left.pop()
        if isinstance(value, float) and math.isnan(value):
            return path
        if isinstance(value, dict):
            left += [(f"{path}.{key}" if path else key, item) for key, item in value.items()]
        elif isinstance(value, list):
            left += [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    return ""


def is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


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
        handler, has_body = super().get_route_handler(), self.body_field is not None

        async def handle(request: Request) -> Response:
            request = strict(request)
            try:
                if has_body:
                    await request.body()
                if is_json(request):
                    await request.json()
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            except (ValueError, RecursionError):
                pass  # the handler meets it again, and says what is wrong
            return await handler(request)

        return handle
