"""POST /v1/embeddings."""

from fastapi import Request, Response

from api.answers import truncation_header, whole
from api.routing import V1Router
from api.services import UsesServices
from schemas import EmbeddingRequest, EmbeddingResponse

router = V1Router()


@router.post("/embeddings", response_model=EmbeddingResponse)
async def create_embeddings(body: EmbeddingRequest, request: Request, services: UsesServices) -> Response:
    work = services.embeddings.embed(body)
    return await whole(
        request, body, work, num_rows=len(body.inputs), to_json=vectors_to_json, headers=truncation_header
    )


def vectors_to_json(answer: EmbeddingResponse) -> bytes:
    """Returns the JSON of the answer, made row by row, so that other threads can run in between."""
    rows = ",".join(row.model_dump_json() for row in answer.data)
    return f'{answer.model_dump_json(exclude={"data"})[:-1]},"data":[{rows}]}}'.encode()
