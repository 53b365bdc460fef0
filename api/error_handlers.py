"""Error handlers: every exception of an endpoint becomes a response with one sentence and the field that is wrong."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from api.endpoints import routers
from errors import APIError, InvalidRequest, MethodNotAllowed, NotFound
from server.asgi_errors import headers_of
from server.error_formats import error_format
from telemetry import request_record

Model = TypeVar("Model", bound=BaseModel)
VALUE_ERROR = "Value error, "  # pydantic puts it before the message of a ValueError


def add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def on_api_error(request: Request, error: APIError) -> JSONResponse:
        request_record.current().error = error.code or error.type
        return _response(request, error, headers_of(error))

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
        return await on_api_error(request, invalid_request_of(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        error_class = {404: NotFound, 405: MethodNotAllowed}.get(error.status_code, InvalidRequest)
        named = (error.headers or {}).get("Allow")
        allowed = {"Allow": _allowed(request, named)} if named else {}
        api_error = error_class(_sentence_of(error, request, allowed.get("Allow")))
        api_error.status = error.status_code
        request_record.current().error = str(error.status_code)
        headers = {**headers_of(api_error), **(error.headers or {}), **allowed}
        return _response(request, api_error, headers)


def _response(request: Request, error: APIError, headers: Mapping[str, str]) -> JSONResponse:
    return JSONResponse(error_format(request.scope["path"]).body(error), error.status, headers)


def validated(kind: type[Model], body: dict[str, Any]) -> Model:
    """Makes the request that a request of another protocol stands for, of which it may have more than there can be.

    Raises InvalidRequest.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise invalid_request_of(problems, body) from error


def invalid_request_of(problems: Sequence[Any], body: Any) -> InvalidRequest:
    """Returns the error that tells a client of the most precise of pydantic's `problems` with its `body`."""
    problem = _most_precise(problems)
    where, is_missing = problem["loc"][1:], problem["type"] == "missing"
    if problem["type"] == "json_invalid" or not where:
        detail = problem.get("ctx", {}).get("error", problem["msg"])
        return InvalidRequest(f"The body must be a JSON object, sent with Content-Type: application/json ({detail}).")
    param = str(where[0]) if problem["loc"][0] == "query" else _param_of(where, body, is_missing)
    if is_missing and param:
        return InvalidRequest(f"{param} is required.", param=param, code="missing_required_parameter")
    text = problem["msg"].removeprefix(VALUE_ERROR)
    return InvalidRequest(f"{param}: {text}" if param else text, param=param, code="invalid_value")


def _allowed(request: Request, named: str) -> str:
    """Returns the methods of all endpoints with the path of this one; the framework names those of the first one."""
    path = getattr(request.scope.get("route"), "path", None)
    endpoints = [route for router in routers() for route in router.routes if isinstance(route, APIRoute)]
    same = [endpoint.methods or () for endpoint in endpoints if endpoint.path == path]
    return ", ".join(sorted(set(named.split(", ")).union(*same)))


def _sentence_of(error: HTTPException, request: Request, allowed: str | None) -> str:
    """Returns a sentence for what the framework says in two words, such as `Not Found`."""
    path = request.url.path[:200]
    if error.status_code == 404:
        return f"The endpoint {path} does not exist: /docs shows those that do."
    if error.status_code == 405 and allowed:
        return f"The endpoint {path} does not take {request.method}: use {allowed}."
    return error.detail


def _most_precise(problems: Sequence[Any]) -> Any:
    """Returns the problem that reaches furthest into the first field that is wrong.

    Where a field may have several types, pydantic reports a problem for each of them; the one that the client meant
    got furthest.
    """

    def reach(problem: Any) -> tuple[list[int], bool, int]:
        where = problem["loc"]
        return [part for part in where if isinstance(part, int)], not problem["type"].endswith("_type"), len(where)

    field = problems[0]["loc"][:2]
    return max((problem for problem in problems if problem["loc"][:2] == field), key=reach)


def _param_of(location: Sequence[int | str], body: Any, is_missing: bool) -> str | None:
    """Returns the path of a field: ("messages", 0, "content", "str") -> "messages[0].content".

    pydantic also names the member of a union that it tried ("str"); such names are not in the body and are left out.
    """
    path = ""
    for number, part in enumerate(location):
        if isinstance(part, int) and isinstance(body, dict):  # a token id, which is a key of logit_bias
            path, body = f"{path}.{part}", None
        elif isinstance(part, int):
            path += f"[{part}]"
            body = body[part] if isinstance(body, list) and part < len(body) else None
        elif isinstance(body, dict) and (part in body or (is_missing and number == len(location) - 1)):
            path += f".{part}" if path else part
            body = body.get(part)
    return path or None
