"""The wire format of Ollama's API as pydantic models.

Source: https://docs.ollama.com/api, and the types of Ollama's Python client 0.6.
"""

import time
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from schemas import (
    MAX_MESSAGES,
    Items,
    KeepAlive,
    Object,
    RequestBody,
    Role,
    SamplingFields,
    StopString,
    TimedRequest,
    TokenLogprob,
    ignored,
    is_none,
    no_meaning,
    refused,
)
from serving.keep_alive import seconds_of

ENGINE = "it is a setting of Ollama's own engine."
SAMPLER = "this server's sampler has no such parameter."
FAR_AWAY = "2200-01-01T00:00:00Z"  # when a model is unloaded that never is


def now() -> str:
    """Returns the time in RFC 3339 with nanoseconds."""
    seconds, rest = divmod(time.time_ns(), 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


# --- requests


class OllamaOptions(SamplingFields):
    """Numbers may be of either type: clients send `40.0` for a count."""

    model_config = ConfigDict(strict=False)

    num_predict: int | None = None  # tokens at most; none below 1
    repeat_penalty: float | None = Field(None, ge=0.01, le=10)  # another name for repetition_penalty
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    num_ctx: Any = no_meaning("the context is MAX_MODEL_LEN tokens long.")
    num_keep: Any = no_meaning("no conversation is shortened.")
    num_batch: Any = no_meaning(ENGINE)
    num_gpu: Any = no_meaning(ENGINE)
    main_gpu: Any = no_meaning(ENGINE)
    num_thread: Any = no_meaning(ENGINE)
    numa: Any = no_meaning(ENGINE)
    low_vram: Any = no_meaning(ENGINE)
    f16_kv: Any = no_meaning(ENGINE)
    logits_all: Any = no_meaning(ENGINE)
    vocab_only: Any = no_meaning(ENGINE)
    embedding_only: Any = no_meaning(ENGINE)
    use_mmap: Any = no_meaning(ENGINE)
    use_mlock: Any = no_meaning(ENGINE)
    repeat_last_n: Any = ignored("penalties count the whole text.", -1)
    tfs_z: Any = ignored(SAMPLER, 1)
    typical_p: Any = ignored(SAMPLER, 1)
    mirostat: Any = ignored(SAMPLER, 0)
    mirostat_tau: Any = ignored(SAMPLER)
    mirostat_eta: Any = ignored(SAMPLER)
    penalize_newline: Any = ignored(SAMPLER)


class _OllamaRequest(TimedRequest):
    model: str = Field(min_length=1)
    options: OllamaOptions | None = None
    keep_alive: KeepAlive = None

    @property
    def asks_to_unload(self) -> bool:
        """Raises InvalidRequest for a keep_alive that is no duration."""
        return seconds_of(self.keep_alive) == 0


class _OllamaGeneration(_OllamaRequest):
    """The fields that chats and texts share."""

    stream: bool | None = True
    format: str | Object | None = None  # json, or a JSON schema
    think: bool | Literal["low", "medium", "high"] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("stream")
    @classmethod
    def _streams_unless_told(cls, value: bool | None) -> bool:
        return value is not False


class OllamaMessage(RequestBody):
    role: Role
    content: str | None = None
    thinking: str | None = None
    images: Items[str] | None = None  # base64
    tool_calls: Items[Object] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class OllamaChatRequest(_OllamaGeneration):
    messages: Annotated[list[OllamaMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Items[Object] | None = None


class OllamaGenerateRequest(_OllamaGeneration):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    images: Items[str] | None = None
    raw: bool | None = None
    template: str | None = refused("")
    context: Items[int] | None = refused([])


class OllamaEmbedRequest(_OllamaRequest):
    input: str | Annotated[list[str], Field(max_length=2048, fail_fast=True)] | None = None
    truncate: bool | None = None
    dimensions: int | None = Field(None, ge=1)


class OllamaEmbeddingsRequest(_OllamaRequest):
    """The older form, of one text."""

    prompt: str | None = None


class OllamaShowRequest(RequestBody):
    model: str = Field(min_length=1)
    verbose: bool | None = no_meaning("there is nothing more to show.")

    @model_validator(mode="before")
    @classmethod
    def _takes_the_older_name(cls, value: Any) -> Any:
        if isinstance(value, dict) and "model" not in value and "name" in value:
            return {**{key: item for key, item in value.items() if key != "name"}, "model": value["name"]}
        return value


# --- answers


class OllamaError(BaseModel):
    error: str


class OllamaFunction(BaseModel):
    index: int
    name: str
    arguments: Object


class OllamaCall(BaseModel):
    id: str
    function: OllamaFunction


class AnsweredMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str = ""
    thinking: str | None = Field(None, exclude_if=is_none)
    tool_calls: list[OllamaCall] | None = Field(None, exclude_if=is_none)


class OllamaStatistics(BaseModel):
    """Durations in nanoseconds, and counts of tokens; only in the last answer of a stream."""

    total_duration: int | None = Field(None, exclude_if=is_none)
    load_duration: int | None = Field(None, exclude_if=is_none)
    prompt_eval_count: int | None = Field(None, exclude_if=is_none)
    prompt_eval_duration: int | None = Field(None, exclude_if=is_none)
    eval_count: int | None = Field(None, exclude_if=is_none)
    eval_duration: int | None = Field(None, exclude_if=is_none)


class OllamaAnswer(OllamaStatistics):
    """One line of a stream, or a whole answer."""

    model: str
    created_at: str = Field(default_factory=now)
    done: bool = False
    done_reason: Literal["stop", "length", "load", "unload"] | None = Field(None, exclude_if=is_none)
    logprobs: list[TokenLogprob] | None = Field(None, exclude_if=is_none)


class OllamaChatAnswer(OllamaAnswer):
    message: AnsweredMessage = AnsweredMessage()


class OllamaGenerateAnswer(OllamaAnswer):
    response: str = ""
    thinking: str | None = Field(None, exclude_if=is_none)


class OllamaEmbedAnswer(OllamaStatistics):
    model: str
    embeddings: list[list[float]]
    num_truncated: int = Field(0, exclude=True)  # texts; it is sent as a header


class OllamaEmbeddingsAnswer(BaseModel):
    embedding: list[float]


class OllamaVersion(BaseModel):
    version: str


class OllamaDetails(BaseModel):
    parent_model: str = ""
    format: str = ""
    family: str = ""
    families: list[str] = []
    parameter_size: str = ""
    quantization_level: str = ""


class OllamaModel(BaseModel):
    name: str
    model: str
    modified_at: str
    size: int  # bytes
    digest: str
    details: OllamaDetails


class OllamaModels(BaseModel):
    models: list[OllamaModel]


class OllamaRunningModel(BaseModel):
    name: str
    model: str
    size: int  # bytes
    digest: str
    details: OllamaDetails
    expires_at: str
    size_vram: int  # bytes
    context_length: int


class OllamaRunningModels(BaseModel):
    models: list[OllamaRunningModel]


class OllamaShown(BaseModel):
    modelfile: str
    parameters: str
    template: str
    details: OllamaDetails
    model_info: Object
    capabilities: list[str]
    modified_at: str
