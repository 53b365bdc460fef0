"""POST /v1/responses."""

from fastapi import Request, Response

from api import responses
from api.answers import stream_or_whole
from api.response_schemas import ResponseObject
from api.routing import STREAM, V1Router
from api.services import UsesServices
from api.streaming import ResponsesEncoder
from schemas import ResponsesRequest

router = V1Router()


@router.post("/responses", response_model=ResponseObject, responses=STREAM)
async def create_response(body: ResponsesRequest, request: Request, services: UsesServices) -> Response:
    chat = responses.as_chat(body)
    model = await services.text_model(body.model)
    events = responses.stream(body, model.stream_chat(chat))
    return await stream_or_whole(request, body, events, responses.collect, ResponsesEncoder())
