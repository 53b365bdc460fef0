"""POST /v1/chat/completions."""

from fastapi import Request, Response

from api.answers import stream_or_whole
from api.routing import STREAM, V1Router
from api.services import UsesServices
from api.streaming import ChunkEncoder, collect_chat
from schemas import ChatCompletion, ChatCompletionRequest

router = V1Router()


@router.post("/chat/completions", response_model=ChatCompletion, responses=STREAM)
async def chat_completions(body: ChatCompletionRequest, request: Request, services: UsesServices) -> Response:
    model = await services.text_model(body.model)
    encoder = ChunkEncoder(body.includes_usage)
    return await stream_or_whole(request, body, model.stream_chat(body), collect_chat, encoder)
