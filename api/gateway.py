"""GatewayRoute: requests for other providers' models are relayed as they came; all others go on to their endpoint.

It reads the model's name and nothing else of a request, so what a provider knows and this server does not gets there.
"""

import json
import math
import re
from typing import Any, cast

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.requests import ClientDisconnect

from api.strict_json import Handler, StrictRequest, StrictRoute, is_json, loads, strict
from errors import APIError, InvalidRequest, UpstreamError
from providers.base import Gateway
from providers.router import Router
from providers.upstream import failure_event
from server.connection import CLIENT_GONE, EventStream, unless_client_leaves
from telemetry import request_record
from text.json_bounds import check_num_values

PATHS = ("chat/completions", "completions", "embeddings", "responses")
_MODEL = re.compile(rb'"model"\s*:\s*("[^"\\]{0,512}+(?:\\.[^"\\]{0,512}+){0,64}+")')  # names are short


class GatewayRoute(StrictRoute):
    def get_route_handler(self) -> Handler:
        local, path = super().get_route_handler(), self.path.removeprefix("/v1").strip("/")
        if path not in PATHS:
            return local

        async def handle(request: Request) -> Response:
            router: Router = request.app.state.router
            request = strict(request)
            try:
                body = await _concerning(request, router)
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            return await local(request) if body is None else await _answer(request, router, path, body, local)

        return handle


async def _concerning(request: Request, router: Router) -> dict[str, Any] | None:
    """The body of a request that is not simply this server's. Others are not parsed here: they may be large."""
    if not is_json(request):
        return None  # pages of any origin may send other types: the endpoint refuses them
    content = await request.body()
    check_num_values(content)  # each could be a name
    names = {_text(quoted) for quoted in {match[1] for match in _MODEL.finditer(content)}}
    if not any(router.alias(name) != name or router.gateway(name) or len(router.tries(name)) > 1 for name in names):
        return None
    try:
        body = loads(content)
    except (ValueError, RecursionError):
        return None  # the endpoint says what is wrong
    is_one = isinstance(body, dict) and isinstance(body.get("model"), str)
    return body if is_one else None


def _text(quoted: bytes) -> str:
    try:
        return str(json.loads(quoted))
    except ValueError:
        return ""


async def _answer(request: Request, router: Router, path: str, body: dict[str, Any], local: Handler) -> Response:
    """Of the first who can; if nobody can, what the first one said."""
    asked = body["model"]
    first, *others = router.tries(router.alias(asked))
    failure: UpstreamError | None = None
    for model in (first, *others):
        headers = {"x-gateway-model": _in_ascii(model)} if model != asked else {}
        headers |= {"x-gateway-fallback-from": _in_ascii(first)} if failure else {}
        found = router.gateway(model)
        try:
            if found is not None:
                return await _relayed(request, path, {**body, "model": found[2]}, found, headers)
            response = await local(_with_body(request, {**body, "model": model}))
            response.headers.update(headers)
            return response
        except (APIError, RequestValidationError) as error:
            if failure is None and not (isinstance(error, UpstreamError) and error.is_passing):
                raise
            failure = failure or cast(UpstreamError, error)
    assert failure is not None
    raise failure


def _in_ascii(text: str) -> str:
    """For a header."""
    return json.dumps(text)[1:-1]


async def _relayed(
    request: Request, path: str, body: dict[str, Any], found: tuple[str, Gateway, str], headers: dict[str, str]
) -> Response:
    name, gateway, model = found
    seen = request_record.current()
    seen.provider, seen.model = name, model
    request.state.deadline.shorten(_seconds(body.pop("timeout", None)))
    relayed = await unless_client_leaves(request, gateway.answer(path, body))
    if relayed is None:
        return Response(status_code=CLIENT_GONE)
    headers = {"x-gateway-provider": name, **headers, **relayed.headers}
    if isinstance(relayed.content, bytes):
        return Response(relayed.content, media_type="application/json", headers=headers)
    return EventStream(relayed.content, failure_event, headers)


def _seconds(timeout: Any) -> float | None:
    """This server's field, which no provider knows."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise InvalidRequest(
            "timeout must be a number of seconds greater than 0.", param="timeout", code="invalid_value"
        )
    return float(timeout)


def _with_body(request: Request, body: dict[str, Any]) -> Request:
    """The same request with another body."""
    content: bytes | None = json.dumps(body).encode()

    async def receive() -> Any:
        nonlocal content
        if content is None:
            return await request.receive()
        message, content = {"type": "http.request", "body": content, "more_body": False}, None
        return message

    return StrictRequest(request.scope, receive)
