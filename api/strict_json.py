"""Strict JSON bodies: UTF-8, without NaN and Infinity, which Python's parser accepts and the standard does not."""

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
    """Parses a body.

    Raises json.JSONDecodeError, RecursionError for a body nested too deeply, and InvalidRequest for NaN or too many
    values.
    """
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
        raise InvalidRequest(
            f"{path}: {constants[0]} is not valid JSON: send a finite number or null.",
            param=path or None,
            code="invalid_value",
        )
    return value


def _path_of_nan(value: Any) -> str:
    """Finds the first NaN and returns its path, such as `a.b[0]`."""
    stack: list[tuple[str, Any]] = [("", value)]
    while stack:
        path, value = stack.pop()
        if isinstance(value, float) and math.isnan(value):
            return path
        if isinstance(value, dict):
            stack += [(f"{path}.{key}" if path else key, value[key]) for key in reversed(value)]
        elif isinstance(value, list):
            stack += [(f"{path}[{index}]", value[index]) for index in reversed(range(len(value)))]
    return ""


def is_json(request: Request) -> bool:
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return media_type == "application/json" or media_type.endswith("+json")


class StrictRequest(Request):
    """A request whose JSON is parsed by `loads`."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = loads(await self.body())
        return self._json


def strict(request: Request) -> StrictRequest:
    """Makes a request strict; a strict one is returned as it is, because its body may have been read."""
    return request if isinstance(request, StrictRequest) else StrictRequest(request.scope, request.receive)


class StrictRoute(APIRoute):
    """A route whose requests are strict. It answers 499 if the client leaves before its body has arrived."""

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
                pass  # the endpoint's handler raises it again, as a validation error
            return await handler(request)

        return handle
