"""POST /v1/completions."""

from fastapi import Request, Response

from api.answers import stream_or_whole
from api.routing import STREAM, V1Router
from api.services import UsesServices
from api.streaming import ChunkEncoder, collect_completion
from schemas import Completion, CompletionRequest

router = V1Router()


@router.post("/completions", response_model=Completion, responses=STREAM)
async def completions(body: CompletionRequest, request: Request, services: UsesServices) -> Response:
    model = await services.text_model(body.model)
    encoder = ChunkEncoder(body.includes_usage)
    return await stream_or_whole(request, body, model.stream_completion(body), collect_completion, encoder)
