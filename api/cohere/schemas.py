"""The wire format of Cohere's embed and rerank endpoints.

Source: https://docs.cohere.com/reference/embed, https://docs.cohere.com/reference/rerank, and Cohere's SDK.
"""

from typing import Annotated, Literal
from uuid import uuid4

from pydantic import BaseModel, Field

from schemas import NonEmpty, RequestBody, SomeTexts, TimedRequest, ignored, is_none, no_meaning, refused

MAX_INPUTS = 2048
ONE_QUEUE = "requests take turns."
Contents = Annotated[list["CohereContent"], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
EmbeddingType = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]


class CohereContent(RequestBody):
    type: str = "text"
    text: str | None = None


class CohereInput(RequestBody):
    content: Contents


class _CohereEmbedRequest(TimedRequest):
    """The fields that both versions have."""

    model: str
    texts: SomeTexts | None = None
    input_type: str | None = None  # chooses the model's prompt
    embedding_types: Annotated[list[EmbeddingType], Field(max_length=6, fail_fast=True)] | None = None
    truncate: Literal["NONE", "START", "END"] | None = None
    images: Annotated[list[str], Field(max_length=MAX_INPUTS, fail_fast=True)] | None = refused([])


class CohereEmbedRequest(_CohereEmbedRequest):
    inputs: Annotated[list[CohereInput], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)] | None = None
    output_dimension: int | None = Field(None, ge=1)
    max_tokens: int | None = ignored("texts are cut at the model's own limit only.")
    priority: int | None = no_meaning(ONE_QUEUE)


class CohereV1EmbedRequest(_CohereEmbedRequest):
    """The older version: without `embedding_types`, its answer holds the vectors themselves."""


class CohereRerankRequest(TimedRequest):
    model: str
    query: NonEmpty
    documents: SomeTexts
    top_n: int | None = Field(None, ge=1)
    max_tokens_per_doc: int | None = ignored("documents are cut at the model's own limit only.")
    priority: int | None = no_meaning(ONE_QUEUE)
    relevant_spans: dict[str, object] | None = refused()


class CohereError(BaseModel):
    message: str


class ApiVersion(BaseModel):
    version: str


class BilledUnits(BaseModel):
    """Nothing is billed here: these are the numbers that Cohere would count."""

    input_tokens: int | None = Field(None, exclude_if=is_none)
    search_units: int | None = Field(None, exclude_if=is_none)


class Meta(BaseModel):
    api_version: ApiVersion
    billed_units: BilledUnits


class _CohereResponse(BaseModel):
    id: str = Field(default_factory=lambda: str(uuid4()))
    meta: Meta
    num_truncated: int = Field(0, exclude=True)  # texts; it is sent as a header


class CohereEmbeddings(BaseModel):
    float_: list[list[float]] | None = Field(None, serialization_alias="float", exclude_if=is_none)
    base64: list[str] | None = Field(None, exclude_if=is_none)


class CohereEmbedResponse(_CohereResponse):
    embeddings: CohereEmbeddings
    texts: list[str]
    response_type: Literal["embeddings_by_type"] = "embeddings_by_type"


class CohereFloatsResponse(_CohereResponse):
    embeddings: list[list[float]]
    texts: list[str]
    response_type: Literal["embeddings_floats"] = "embeddings_floats"


class CohereRanked(BaseModel):
    index: int
    relevance_score: float


class CohereRerankResponse(_CohereResponse):
    results: list[CohereRanked]  # the best first
