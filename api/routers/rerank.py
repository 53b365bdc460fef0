"""POST /v1/rerank."""

from fastapi import Request, Response

from api.answers import truncation_header, whole
from api.routing import V1Router
from api.services import UsesServices
from schemas import RerankRequest, RerankResponse

router = V1Router()


@router.post("/rerank", response_model=RerankResponse)
async def rerank(body: RerankRequest, request: Request, services: UsesServices) -> Response:
    work = services.embeddings.rerank(body)
    return await whole(request, body, work, num_rows=len(body.documents), headers=truncation_header)
