"""POST /v1/responses."""

from functools import partial

from fastapi import Request, Response

from api import responses
from api.chat_source import answer_view
from api.response_schemas import ResponseObject
from api.routing import STREAM, V1Router
from api.services import UsesServices
from api.streaming import ResponsesEncoder
from schemas import ResponsesRequest

router = V1Router()


@router.post("/responses", response_model=ResponseObject, responses=STREAM)
async def create_response(body: ResponsesRequest, request: Request, services: UsesServices) -> Response:
    return await answer_view(
        request,
        services,
        body,
        responses.as_chat(body),
        view=partial(responses.stream, body),
        collect=responses.collect,
        encoder=ResponsesEncoder(),
    )
