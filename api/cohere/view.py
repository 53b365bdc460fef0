"""Cohere's embed and rerank endpoints as views of /v1/embeddings and /v1/rerank."""

import base64
import struct
from collections.abc import Sequence

from api.cohere.schemas import (
    ApiVersion,
    BilledUnits,
    CohereEmbeddings,
    CohereEmbedRequest,
    CohereEmbedResponse,
    CohereFloatsResponse,
    CohereInput,
    CohereRanked,
    CohereRerankRequest,
    CohereRerankResponse,
    CohereV1EmbedRequest,
    Meta,
)
from errors import InvalidRequest, unsupported
from schemas import EmbeddingRequest, EmbeddingResponse, RerankRequest, RerankResponse

MADE = ("float", "base64")  # types of embeddings
# What a text is for -> names that models give their prompts for it; the first that a model has is used
PROMPTS = {
    "search_query": ("query", "search_query"),
    "search_document": ("document", "passage", "search_document"),
    "classification": ("classification", "Classification"),
    "clustering": ("clustering", "Clustering"),
}
DOCUMENTS_OF_UNIT = 100  # of a search unit
AnyEmbedRequest = CohereEmbedRequest | CohereV1EmbedRequest


def texts_of(request: AnyEmbedRequest) -> list[str]:
    """Returns the texts, one for each vector. Raises InvalidRequest if there are none, or if they are sent twice."""
    inputs = request.inputs if isinstance(request, CohereEmbedRequest) else None
    if (request.texts is None) == (inputs is None):
        fields = "either texts or inputs" if isinstance(request, CohereEmbedRequest) else "texts"
        raise InvalidRequest(f"Send {fields}.", param="texts", code="missing_required_parameter")
    return request.texts or [_text(item, number) for number, item in enumerate(inputs or ())]


def _text(item: CohereInput, number: int) -> str:
    for index, part in enumerate(item.content):
        path = f"inputs[{number}].content[{index}]"
        if part.type != "text":
            raise unsupported(f"{path}.type")
        if not part.text:
            raise InvalidRequest(f"{path}.text is required.", param=f"{path}.text", code="missing_required_parameter")
    return "".join(part.text or "" for part in item.content)


def as_embedding(request: AnyEmbedRequest) -> EmbeddingRequest:
    """Makes the equivalent request for embeddings. Raises InvalidRequest."""
    for name in request.refused_fields:
        raise unsupported(name)
    for number, kind in enumerate(request.embedding_types or ()):
        if kind not in MADE:
            raise InvalidRequest(
                f"The type {kind} in embedding_types[{number}] is not supported: use float or base64.",
                param=f"embedding_types[{number}]",
                code="unsupported_value",
            )
    if request.truncate == "START":
        raise InvalidRequest(
            "The value START of truncate is not supported, because texts are cut at their ends: use END or NONE.",
            param="truncate",
            code="unsupported_value",
        )
    return EmbeddingRequest(
        model=request.model,
        input=texts_of(request),
        dimensions=request.output_dimension if isinstance(request, CohereEmbedRequest) else None,
        truncate=request.truncate != "NONE",
    )


def prompts_for(request: AnyEmbedRequest) -> Sequence[str]:
    """Returns the names of prompts that suit the request. Raises InvalidRequest for a use that Cohere does not have."""
    if request.input_type is None:
        return ()
    if request.input_type not in PROMPTS:
        raise InvalidRequest(
            f"input_type must be one of {', '.join(PROMPTS)}, not {request.input_type!r}.",
            param="input_type",
            code="invalid_value",
        )
    return PROMPTS[request.input_type]


def by_type(request: AnyEmbedRequest, answer: EmbeddingResponse, version: str) -> CohereEmbedResponse:
    """Makes the answer with the vectors in each of the types that the request asks for."""
    vectors, types = _vectors(answer), request.embedding_types or ["float"]
    return CohereEmbedResponse(
        embeddings=CohereEmbeddings(
            float_=vectors if "float" in types else None,
            base64=[_in_base64(row) for row in vectors] if "base64" in types else None,
        ),
        texts=texts_of(request),
        meta=_meta(version, BilledUnits(input_tokens=answer.usage.prompt_tokens)),
        num_truncated=answer.num_truncated,
    )


def as_floats(request: AnyEmbedRequest, answer: EmbeddingResponse, version: str) -> CohereFloatsResponse:
    return CohereFloatsResponse(
        embeddings=_vectors(answer),
        texts=texts_of(request),
        meta=_meta(version, BilledUnits(input_tokens=answer.usage.prompt_tokens)),
        num_truncated=answer.num_truncated,
    )


def _vectors(answer: EmbeddingResponse) -> list[list[float]]:
    return [row.embedding for row in answer.data if isinstance(row.embedding, list)]


def _in_base64(vector: list[float]) -> str:
    """Writes a vector as base64 of little-endian float32."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _meta(version: str, units: BilledUnits) -> Meta:
    return Meta(api_version=ApiVersion(version=version), billed_units=units)


def as_rerank(request: CohereRerankRequest) -> RerankRequest:
    """Makes the equivalent request of /v1/rerank. Raises InvalidRequest."""
    for name in request.refused_fields:
        raise unsupported(name)
    return RerankRequest(
        model=request.model, query=request.query, documents=list(request.documents), top_n=request.top_n, truncate=True
    )


def ranked(request: CohereRerankRequest, answer: RerankResponse) -> CohereRerankResponse:
    num_units = -(-len(request.documents) // DOCUMENTS_OF_UNIT)
    return CohereRerankResponse(
        results=[CohereRanked(index=found.index, relevance_score=found.relevance_score) for found in answer.results],
        meta=_meta("2", BilledUnits(search_units=num_units)),
        num_truncated=answer.num_truncated,
    )
