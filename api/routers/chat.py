"""POST /v1/chat/completions."""

from fastapi import Request, Response

from api import legacy_functions
from api.answers import stream_or_whole
from api.routing import STREAM, V1Router
from api.services import UsesServices
from api.streaming import ChunkEncoder, collect_chat
from schemas import ChatCompletion, ChatCompletionRequest

router = V1Router()


@router.post("/chat/completions", response_model=ChatCompletion, responses=STREAM)
async def chat_completions(body: ChatCompletionRequest, request: Request, services: UsesServices) -> Response:
    model = await services.text_model(body.model)
    if legacy_functions.is_legacy(body):
        chunks = legacy_functions.with_function_calls(model.stream_chat(legacy_functions.as_tools(body)))
    else:
        chunks = model.stream_chat(body)
    return await stream_or_whole(request, body, chunks, collect_chat, ChunkEncoder(body.includes_usage))
