"""Ollama's /api/embed and /api/embeddings as views of /v1/embeddings."""

import math
import time
from functools import partial

from api.ollama.models import embedding_model
from api.ollama.schemas import (
    OllamaEmbedAnswer,
    OllamaEmbeddingsAnswer,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
)
from api.services import Services
from errors import InvalidRequest
from schemas import EmbeddingRequest, EmbeddingResponse
from serving.embeddings import off_loop


async def embedded(services: Services, request: OllamaEmbedRequest) -> OllamaEmbedAnswer:
    """Computes vectors of length 1, as Ollama's are. Without a text, nothing is computed. Raises APIError."""
    begun = time.monotonic_ns()
    model = await embedding_model(services, request.model)
    if not request.input:
        return OllamaEmbedAnswer(model=request.model, embeddings=[])
    if isinstance(request.input, list) and not all(request.input):
        raise InvalidRequest("A text of the input is empty: leave it out.", param="input", code="invalid_value")
    answer = await services.embeddings.embed(
        EmbeddingRequest(
            model=model,
            input=request.input,
            dimensions=request.dimensions,
            truncate=request.truncate is not False,
            keep_alive=request.keep_alive,
        )
    )
    rows = await off_loop(partial(_unit_vectors, answer), len(answer.data))
    return OllamaEmbedAnswer(
        model=request.model,
        embeddings=rows,
        total_duration=time.monotonic_ns() - begun,
        load_duration=0,
        prompt_eval_count=answer.usage.prompt_tokens,
        num_truncated=answer.num_truncated,
    )


async def embedded_one(services: Services, request: OllamaEmbeddingsRequest) -> OllamaEmbeddingsAnswer:
    """Computes the vector of one text as the model gives it. Raises APIError."""
    model = await embedding_model(services, request.model)
    if not request.prompt:
        return OllamaEmbeddingsAnswer(embedding=[])
    answer = await services.embeddings.embed(
        EmbeddingRequest(model=model, input=request.prompt, truncate=True, keep_alive=request.keep_alive)
    )
    return OllamaEmbeddingsAnswer(embedding=_vectors(answer)[0])


def _vectors(answer: EmbeddingResponse) -> list[list[float]]:
    return [row.embedding for row in answer.data if isinstance(row.embedding, list)]


def _unit_vectors(answer: EmbeddingResponse) -> list[list[float]]:
    return [[value / length for value in row] if (length := math.hypot(*row)) else row for row in _vectors(answer)]
