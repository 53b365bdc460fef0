"""GatewayRoute relays requests for other providers' models; all others go on to their endpoint.

It reads only the model's name and the time-out of a request, so fields that this server does not know are relayed.
"""

import json
import math
import re
from typing import Any, cast

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.requests import ClientDisconnect

from api.services import services_of
from api.strict_json import Handler, StrictRequest, StrictRoute, is_json, loads, strict
from errors import APIError, InvalidRequest, UpstreamError
from providers.base import PASSED_HEADERS, Provider
from providers.router import ProviderRouter
from server.connection import CLIENT_GONE, unless_client_leaves
from server.deadline import deadline_of
from server.error_formats import error_format
from server.events import EventStream, PassThroughEncoder, sse
from server.headers import header_value
from telemetry import request_record
from text.json_bounds import check_num_values

# A provider without these answers by chat completions
TRANSLATED = (
    *("responses", "responses/input_tokens", "messages", "messages/count_tokens"),
    *("api/chat", "api/generate"),
)
TAGS = {"api/chat": ":latest", "api/generate": ":latest"}  # path -> what its clients add to models' names
PATHS = ("chat/completions", "completions", "embeddings", *TRANSLATED)
# A name in `"model": "name"`, wherever it is; its parts are bounded, so that a long string costs no time
_MODEL = re.compile(rb'"model"\s*:\s*("[^"\\]{0,512}+(?:\\.[^"\\]{0,512}+){0,64}+")')


class GatewayRoute(StrictRoute):
    """A route that answers with another provider's answer if the request's model is one of that provider's."""

    def get_route_handler(self) -> Handler:
        local, path = super().get_route_handler(), self.path.removeprefix("/v1").strip("/")
        if path not in PATHS:
            return local

        async def handle(request: Request) -> Response:
            router = services_of(request.app).router
            request = strict(request)
            try:
                body = await routed_body(request, router, TAGS.get(path, ""))
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            return await local(request) if body is None else await _answer(request, router, path, body, local)

        return handle


async def routed_body(request: Request, router: ProviderRouter, tag: str = "") -> dict[str, Any] | None:
    """Returns the parsed body if any `"model": "name"` in it has a provider, an alias or fallbacks; else None.

    Most requests are local, and parsing a large body twice takes time, so a regex over the bytes comes first. It also
    finds names deeper in the body, such as that of a tool's argument. Then the body of a request for a local model is
    returned as well, and `_answer` passes it on to the local endpoint.

    tag: what the protocol's clients may add to names; the body is returned without it.
    """
    if not is_json(request):
        return None  # web pages of any origin may send other types: the endpoint refuses them
    content = await request.body()
    check_num_values(content)  # each value could be a name
    names = {_unquoted(quoted) for quoted in {match[1] for match in _MODEL.finditer(content)}}
    if not any(_is_routed(name.removesuffix(tag), router) for name in names):
        return None
    try:
        body = loads(content)
    except (ValueError, RecursionError):
        return None  # the endpoint says what is wrong
    has_model = isinstance(body, dict) and isinstance(body.get("model"), str)
    return {**body, "model": body["model"].removesuffix(tag)} if has_model else None


def _is_routed(name: str, router: ProviderRouter) -> bool:
    """Returns whether a model has an alias, a provider or fallbacks."""
    return router.alias(name) != name or router.provider_of(name) is not None or len(router.candidates(name)) > 1


def _unquoted(quoted: bytes) -> str:
    """Returns the text of a JSON string; empty if it is not valid."""
    try:
        return str(json.loads(quoted))
    except ValueError:
        return ""


async def _answer(
    request: Request, router: ProviderRouter, path: str, body: dict[str, Any], local: Handler
) -> Response:
    """Returns the answer of the first model that succeeds; if all fail, the first one's error.

    The second model is tried only after a transient failure of the first one's provider; from then on, every error
    leads to the next model.
    """
    requested = body["model"]
    first, *others = router.candidates(router.alias(requested))
    failure: UpstreamError | None = None
    for model in (first, *others):
        headers = {"x-gateway-model": header_value(model)} if model != requested else {}
        headers |= {"x-gateway-fallback-from": header_value(first)} if failure else {}
        route = router.provider_of(model)
        try:
            if route is not None and (route[1].speaks(path) or path not in TRANSLATED):
                return await _relayed(request, path, {**body, "model": route[2]}, route, headers)
            response = await local(_with_body(request, {**body, "model": model}))
            response.headers.update(headers if route is None else {"x-gateway-provider": route[0], **headers})
            return response
        except (APIError, RequestValidationError) as error:
            if failure is None and not (isinstance(error, UpstreamError) and error.is_transient):
                raise
            failure = failure or cast(UpstreamError, error)
    assert failure is not None
    raise failure


async def _relayed(
    request: Request, path: str, body: dict[str, Any], route: tuple[str, Provider, str], headers: dict[str, str]
) -> Response:
    """Returns a provider's answer, whole or as a stream; the request's record gets the provider and the model."""
    name, provider, model = route
    record = request_record.current()
    record.provider, record.model = name, model
    deadline_of(request.scope).shorten(_seconds(body.pop("timeout", None)))
    passed = {name: joined for name in PASSED_HEADERS if (joined := _joined(request, name))}
    relayed = await unless_client_leaves(request, provider.answer(path, body, passed))
    if relayed is None:
        return Response(status_code=CLIENT_GONE)
    headers = {"x-gateway-provider": name, **headers, **relayed.headers}
    if isinstance(relayed.content, bytes):
        return Response(relayed.content, media_type="application/json", headers=headers)
    failure = error_format(request.url.path).event
    return EventStream(sse(relayed.content, PassThroughEncoder(failure)), failure, headers)


def _joined(request: Request, name: str) -> str:
    """Returns the values of a header that may be there several times; empty for one that no provider could read."""
    joined = ", ".join(request.headers.getlist(name))
    return joined if joined.isascii() else ""


def _seconds(timeout: Any) -> float | None:
    """Returns the request's own time-out, a field that providers do not know. Raises InvalidRequest."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
        raise InvalidRequest(
            "timeout must be a number of seconds greater than 0.", param="timeout", code="invalid_value"
        )
    return float(timeout)


def _with_body(request: Request, body: dict[str, Any]) -> Request:
    """Returns the request with another body."""
    content: bytes | None = json.dumps(body).encode()

    async def receive() -> Any:
        nonlocal content
        if content is None:
            return await request.receive()
        message, content = {"type": "http.request", "body": content, "more_body": False}, None
        return message

    return StrictRequest(request.scope, receive)
