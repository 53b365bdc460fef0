"""POST /v2/embed, /v2/rerank and /v1/embed, as Cohere has them."""

from fastapi import Request, Response

from api.answers import truncation_header, whole
from api.cohere import view as cohere
from api.cohere.schemas import (
    CohereEmbedRequest,
    CohereEmbedResponse,
    CohereError,
    CohereFloatsResponse,
    CohereRerankRequest,
    CohereRerankResponse,
    CohereV1EmbedRequest,
)
from api.routing import ERRORS, RootRouter, errors_as
from api.services import Services, UsesServices

router = RootRouter()
OURS = errors_as(CohereError)  # under /v2; /v1 has OpenAI's


@router.post("/v2/embed", response_model=CohereEmbedResponse, responses=OURS)
async def embed(body: CohereEmbedRequest, request: Request, services: UsesServices) -> Response:
    return await _embedded(body, request, services, "2")


@router.post("/v1/embed", response_model=CohereFloatsResponse | CohereEmbedResponse, responses=ERRORS)
async def embed_as_in_version_1(body: CohereV1EmbedRequest, request: Request, services: UsesServices) -> Response:
    return await _embedded(body, request, services, "1")


async def _embedded(body: cohere.AnyEmbedRequest, request: Request, services: Services, version: str) -> Response:
    shape = cohere.by_type if version == "2" or body.embedding_types else cohere.as_floats

    async def work() -> CohereEmbedResponse | CohereFloatsResponse:
        prompts = cohere.prompts_for(body)
        return shape(body, await services.embeddings.embed(cohere.as_embedding(body), prompts), version)

    num_rows = len(cohere.texts_of(body))
    return await whole(request, body, work(), num_rows=num_rows, to_json=_to_json, headers=truncation_header)


def _to_json(answer: CohereEmbedResponse | CohereFloatsResponse) -> bytes:
    return answer.model_dump_json(by_alias=True).encode()


@router.post("/v2/rerank", response_model=CohereRerankResponse, responses=OURS)
async def rerank(body: CohereRerankRequest, request: Request, services: UsesServices) -> Response:
    async def work() -> CohereRerankResponse:
        return cohere.ranked(body, await services.embeddings.rerank(cohere.as_rerank(body)))

    return await whole(request, body, work(), num_rows=len(body.documents), headers=truncation_header)
