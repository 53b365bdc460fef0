"""The classes of routers that hold the endpoints, and what /openapi.json says of every endpoint."""

from typing import Any, ClassVar

from fastapi import APIRouter
from pydantic import BaseModel

from api.gateway import GatewayRoute
from api.strict_json import StrictRoute
from schemas import ErrorBody

Responses = dict[int | str, dict[str, Any]]  # status -> what a response with it holds
_EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
STREAM: Responses = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


def errors_as(model: type[BaseModel]) -> Responses:
    """Says that errors have the shape of `model`."""
    return {
        "4XX": {"model": model, "description": "The request is wrong; the message names the field"},
        "5XX": {"model": model, "description": "The server cannot answer; if it can later, `Retry-After` says when"},
    }


ERRORS = errors_as(ErrorBody)


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

    def __init__(self, errors: Responses = ERRORS) -> None:
        super().__init__(responses=errors, route_class=GatewayRoute)
