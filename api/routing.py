"""The classes of routers that hold the endpoints, and what /openapi.json says of every endpoint."""

from typing import Any, ClassVar

from fastapi import APIRouter

from api.gateway import GatewayRoute
from api.strict_json import StrictRoute
from schemas import ErrorBody

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong; `param` names the field"},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer; if it can later, `Retry-After` says when"},
}
_EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


class RootRouter(APIRouter):
    """A router for endpoints at the root, such as /health."""

    prefixes: ClassVar[tuple[str, ...]] = ("",)  # only the first is in /openapi.json

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"route_class": StrictRoute, **options})


class V1Router(RootRouter):
    """A router for endpoints of the API, such as /v1/chat/completions.

    They are also served without /v1, because some clients are given the address without it.
    """

    prefixes = ("/v1", "")

    def __init__(self) -> None:
        super().__init__(responses=ERRORS, route_class=GatewayRoute)
