"""The wire format of OpenAI's API as pydantic models, and nothing else.

Source: https://platform.openai.com/docs/api-reference (chat, completions, responses, models). These names are vLLM's:
top_k, min_p, repetition_penalty, ignore_eos, min_tokens, stop_token_ids, continue_final_message,
add_generation_prompt, structured_outputs and guided_*; timings is llama.cpp's.
"""

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar, cast
from uuid import uuid4

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticKnownError

# content_filter comes from other providers only, and function_call where a request has functions
FinishReason = Literal["stop", "length", "tool_calls", "function_call", "content_filter"]
Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
Object = dict[str, Any]
MAX_MESSAGES = 10_000  # of a conversation
MAX_ITEMS = 10_000  # of every list without a limit of its own
MAX_BIASES = 1024
Item = TypeVar("Item")
Items = Annotated[list[Item], Field(max_length=MAX_ITEMS, fail_fast=True)]  # one error, not one for each item
Support = Literal["honoured", "no meaning here", "ignored", "refused"]  # a field's `x-support` in /openapi.json


def no_meaning(why: str) -> Any:
    """Declares a field that cannot change the answer of a local model."""
    return Field(
        None, description=f"Accepted, but without effect: {why}", json_schema_extra={"x-support": "no meaning here"}
    )


def ignored(why: str, *neutral: Any) -> Any:
    """Declares a field that could change the answer but cannot here; the client is told, unless the value is in
    `neutral`."""
    return Field(
        None,
        description=f"Accepted, but without effect, and named as ignored: {why}",
        json_schema_extra={"x-support": "ignored", "x-neutral": [None, *neutral]},
    )


def refused(*neutral: Any) -> Any:
    """Declares a field that would change the answer but is not supported, except for the values in `neutral`."""
    return Field(
        None,
        description=f"The local model refuses other values than {', '.join(map(json.dumps, [None, *neutral]))}.",
        json_schema_extra={"x-support": "refused", "x-neutral": [None, *neutral]},
    )


def _mark_honoured(schema: Object) -> None:
    """Marks every field of the schema that has no mark yet as honoured."""
    for field in schema.get("properties", {}).values():
        field.setdefault("x-support", "honoured")


class RequestBody(BaseModel):
    """An object that a client sends. Fields that are absent are None; unknown ones are listed in `ignored_fields`."""

    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=(), json_schema_extra=_mark_honoured
    )

    known_inside: ClassVar[Mapping[str, frozenset[str]]] = {}  # path of an object that has no class here -> its fields

    @classmethod
    def support(cls, name: str) -> Support:
        """Returns what the server does with a field."""
        return cast(Support, cls._mark(name).get("x-support", "honoured"))

    @classmethod
    def _mark(cls, name: str) -> Object:
        return cast(Object, cls.model_fields[name].json_schema_extra or {})

    @property
    def _sent_fields(self) -> set[str]:
        return self.model_fields_set & type(self).model_fields.keys()

    @property
    def refused_fields(self) -> list[str]:
        """The paths of fields that ask for something unsupported, such as `audio` or `messages[0].audio`."""
        return sorted(path + name for path, part in self._parts() for name in part._without("refused"))

    @property
    def ignored_fields(self) -> list[str]:
        """The paths of fields that the client sent and the server does not know, or has no means for."""
        return sorted(
            path + name for path, part in self._parts() for name in (*part._unknown_fields(), *part._without("ignored"))
        )

    def _without(self, support: Support) -> Iterator[str]:
        """Yields the fields with this support whose values ask for something."""
        for name in self._sent_fields:
            if self.support(name) == support and getattr(self, name) not in self._mark(name)["x-neutral"]:
                yield name

    def _unknown_fields(self) -> Iterator[str]:
        yield from self.model_extra or ()
        for path, known in self.known_inside.items():
            value: Any = self.__dict__
            for name in path.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            yield from (f"{path}.{name}" for name in value if name not in known) if isinstance(value, dict) else ()

    def _parts(self, path: str = "") -> Iterator[tuple[str, "RequestBody"]]:
        """Yields this object and all objects in it, each with the path that leads to it."""
        yield path, self
        for name in self._sent_fields:
            value = getattr(self, name)
            if isinstance(value, RequestBody):
                yield from value._parts(f"{path}{name}.")
            elif isinstance(value, list):
                for index, item in enumerate(value):
                    if isinstance(item, RequestBody):
                        yield from item._parts(f"{path}{name}[{index}].")


class ImageURL(RequestBody):
    url: str | None = None
    detail: str | None = None


class ContentPart(RequestBody):
    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: ImageURL | str | None = None

    @property
    def image(self) -> tuple[str | None, str]:
        """The URL of the image, and its `detail`."""
        if isinstance(self.image_url, ImageURL):
            return self.image_url.url, self.image_url.detail or "auto"
        return self.image_url, "auto"


class Message(RequestBody):
    role: Role
    content: str | Items[ContentPart] | None = None
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None  # the assistant's reasoning, as it was in the answer
    reasoning: str | None = None  # another name for reasoning_content
    tool_calls: Items[Object] | None = None
    tool_call_id: str | None = None
    function_call: Object | None = None  # the older form of one tool call

    @property
    def texts(self) -> list[str]:
        """All texts of the message, without tool calls."""
        if not isinstance(self.content, list):
            return [self.content or ""]
        return [part.text for part in self.content if part.text]

    audio: Object | None = refused()


class StreamOptions(RequestBody):
    include_usage: bool | None = None
    include_obfuscation: bool | None = no_meaning("nothing is added to the chunks.")


StopString = Annotated[str, Field(max_length=1024)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(max_length=2**20, fail_fast=True)]


def _type_of_texts(value: Any) -> str:
    """Tells the type of a prompt or input by its first element.

    A plain union would try every type and report an error for each element of a long list.
    """
    if not isinstance(value, list) or not value:
        return "texts" if isinstance(value, list) else "text"
    first = value[0]
    return "lists of tokens" if isinstance(first, list) else "texts" if isinstance(first, str) else "tokens"


class TimedRequest(RequestBody):
    timeout: float | None = Field(None, gt=0)  # seconds that the answer may take


KeepAlive = Annotated[float | str | None, Field(union_mode="left_to_right")]  # as Ollama means it


class SamplingFields(RequestBody):
    """The sampling parameters of a request. The engine's SamplingParams has fields of the same names."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)  # 0 keeps the best token alone
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=MAX_BIASES)

    @property
    def sampling_values(self) -> Object:
        """The sampling parameters that the request has a value for."""
        return {name: value for name in SamplingFields.model_fields if (value := self.__dict__[name]) is not None}

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _token_ids_are_numbers(cls, value: Any) -> Any:
        """Converts the keys to numbers, because keys in JSON are always strings."""
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_BIASES:  # checked first: else there is an error for each of them
            bounds = {"field_type": "Dictionary", "max_length": MAX_BIASES, "actual_length": len(value)}
            raise PydanticKnownError("too_long", bounds)
        return {int(key) if isinstance(key, str) and key.isdecimal() else key: bias for key, bias in value.items()}


class SamplingRequest(SamplingFields, TimedRequest):
    """The fields that all requests for text share."""

    model: str
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None  # OpenAI takes 4
    stream: bool | None = None
    user: str | None = no_meaning("it is a label for the client.")


SAMPLING_FIELDS = tuple(SamplingRequest.model_fields)


class _CompletionRequest(SamplingRequest):
    """The fields that chat completions and completions share."""

    keep_alive: KeepAlive = None

    is_capped: ClassVar[bool] = False  # whether `max_tokens` may be larger than the context

    max_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=128)
    stream_options: StreamOptions | None = None
    guided_json: Object | str | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: Object | None = None  # the newer way to send one of the four, without `guided_`

    @property
    def stop_strings(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    @property
    def limit_field(self) -> str:
        """The name of the field that the limit of tokens was sent in."""
        return "max_tokens"

    @property
    def includes_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


# What no client may set: what the prompt itself is made of, and how it is rendered
RESERVED_TEMPLATE_ARGUMENTS = re.compile(
    r"messages|conversations?|tools|documents|chat_template|tokenize|tokenizer(_kwargs)?"
    r"|add_generation_prompt|add_special_tokens|continue_final_message"
    r"|padding|truncation|max_length|return_\w+|(additional_)?\w*_tokens?|self|(?!\w).*|\w*\W.*|__.*",
    re.DOTALL,
)


class TemplateArguments(RequestBody):
    """The arguments of the chat template. All that are not reserved reach the template; a reserved one is ignored and
    listed as ignored."""

    enable_thinking: bool | None = None
    thinking: bool | None = None  # another name for enable_thinking
    reasoning_effort: str | None = None

    @property
    def others(self) -> Object:
        """The arguments without a meaning of their own here, such as preserve_thinking."""
        return {k: v for k, v in (self.model_extra or {}).items() if not RESERVED_TEMPLATE_ARGUMENTS.fullmatch(k)}

    def _unknown_fields(self) -> Iterator[str]:
        yield from (name for name in super()._unknown_fields() if name not in self.others)


def _ignored_tools(tools: list[Any], path: str = "tools") -> Iterator[str]:
    """Yields `tools[8].web_search` for a tool that the server would have to run, and `tools[2].format` for a grammar
    that is shown to the model and not enforced."""
    for number, tool in enumerate(tools):
        kind, place = tool.get("type") if isinstance(tool, dict) else None, f"{path}[{number}]"
        if kind == "namespace" and isinstance(tool.get("tools"), list):
            yield from _ignored_tools(tool["tools"], f"{place}.tools")
        elif kind == "custom":
            own, place = (tool["custom"], f"{place}.custom") if isinstance(tool.get("custom"), dict) else (tool, place)
            grammar = own.get("format")
            nested = grammar.get("grammar", grammar) if isinstance(grammar, dict) else None
            if isinstance(nested, dict) and nested.get("syntax") == "lark":
                yield f"{place}.format"
        elif isinstance(kind, str) and kind != "function":
            yield f"{place}.{kind}"


class _RenderedRequest(RequestBody):
    """The fields that decide how messages become a prompt."""

    tools: Items[Object] | None = None
    tool_choice: str | Object | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None
    reasoning_effort: str | None = None

    def _unknown_fields(self) -> Iterator[str]:
        yield from super()._unknown_fields()
        yield from _ignored_tools(self.tools or [])

    @property
    def effort(self) -> str | None:
        """The reasoning effort, wherever the request has it."""
        arguments = self.chat_template_kwargs
        return self.reasoning_effort or (arguments.reasoning_effort if arguments else None)

    @property
    def template_arguments(self) -> Object:
        """What the chat template gets beside the messages, the tools and the switches of reasoning."""
        return self.chat_template_kwargs.others if self.chat_template_kwargs else {}

    @property
    def thinks(self) -> bool | None:
        """Whether the model should think; None leaves it to the model's template."""
        arguments = self.chat_template_kwargs or TemplateArguments()
        for value in (self.enable_thinking, arguments.enable_thinking, arguments.thinking):
            if value is not None:
                return value
        if self.effort is None:
            return None
        return self.effort != "none"


class ConversationRequest(_RenderedRequest):
    """The fields that chat completions and responses share."""

    parallel_tool_calls: bool | None = None
    thinking_token_budget: int | None = Field(None, ge=0)
    moderation: Object | None = refused()
    metadata: Object | None = no_meaning("it is returned by /v1/responses.")
    prompt_cache_key: str | None = no_meaning("cached prompts are found by their tokens.")
    prompt_cache_options: Object | None = no_meaning("cached prompts are found by their tokens.")
    prompt_cache_retention: str | None = no_meaning("cached prompts are kept while there is room.")
    safety_identifier: str | None = no_meaning("it is a label for the client.")
    service_tier: str | None = no_meaning("there is one tier.")
    store: bool | None = no_meaning("chats are not stored, responses are unless it is false.")


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


Verbosity = Literal["low", "medium", "high"]
JSON_SCHEMA = frozenset({"name", "description", "schema", "strict"})


class ChatCompletionRequest(_CompletionRequest, ConversationRequest):
    known_inside = {
        "response_format": frozenset({"type", "json_schema", "schema"}),
        "response_format.json_schema": JSON_SCHEMA,
        "tool_choice": frozenset({"type", "function", "custom", "allowed_tools", "mode", "tools"}),
        "tool_choice.function": frozenset({"name"}),
        "tool_choice.custom": frozenset({"name"}),
    }
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    functions: Items[Object] | None = None  # the form of 2023 of tools
    function_call: str | Object | None = None  # of 2023, too: none, auto, or the name of a function
    response_format: Object | None = None
    audio: Object | None = refused()
    modalities: Items[str] | None = refused(["text"])
    verbosity: Verbosity | None = ignored("no chat template knows it.", "medium")
    web_search_options: Object | None = refused()
    prediction: Object | None = no_meaning("it can only make an answer faster.")

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @field_validator("top_logprobs")
    @classmethod
    def _needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("it needs logprobs to be true")
        return value

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatCompletionRequest":
        """Copies `max_completion_tokens`, the newer name, to `max_tokens`; it has priority."""
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    @field_validator("add_generation_prompt")
    @classmethod
    def _continues_or_answers(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.data.get("continue_final_message"):
            raise ValueError("it cannot be true together with continue_final_message")
        return value


class TranslatedChatRequest(ChatCompletionRequest):
    """A request of another protocol, in which `max_tokens` is a bound that may be larger than the context."""

    is_capped = True
    unshown_tools: Items[str] = []  # names of tools that can be called, and are described by a message


class CompletionRequest(_CompletionRequest):
    max_tokens: int | None = Field(None, ge=0)  # 0 generates nothing; echo then returns the prompt
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=128)
    suffix: str | None = None
    prompt: (
        Annotated[str, Tag("text")]
        | Annotated[list[str], Field(max_length=2048, fail_fast=True), Tag("texts")]
        | Annotated[TokenIds, Tag("tokens")]
        | Annotated[list[TokenIds], Field(max_length=2048, fail_fast=True), Tag("lists of tokens")]
    ) = Field(discriminator=Discriminator(_type_of_texts))

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.logprobs if self.echo else None

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one element each."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


class TokenizeRequest(_RenderedRequest):
    """A text, or a conversation that is rendered as for an answer. The shape is vLLM's."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TokenizerInfo(BaseModel):
    """What tokenizer_config.json says of the tokenizer. The shape is vLLM's; tokens are texts, null for none."""

    tokenizer_class: str
    chat_template: str  # the one that is used, in Jinja: the tokenizer's own, or that of the model's family
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    additional_special_tokens: list[str]  # special to the tokenizer, and none of those above
    added_tokens_decoder: dict[int, str]  # all tokens that are whole texts to it, by their ids
    model_max_length: int


class DetokenizeRequest(RequestBody):
    model: str | None = None
    tokens: TokenIds


class DetokenizeResponse(BaseModel):
    prompt: str


def is_none(value: Any) -> bool:
    return value is None


# --- embeddings

NonEmpty = Annotated[str, Field(min_length=1)]
SomeTokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=2**20, fail_fast=True)]
SomeTexts = Annotated[list[NonEmpty], Field(min_length=1, max_length=2048, fail_fast=True)]
ManyTokenIds = Annotated[list[SomeTokenIds], Field(min_length=1, max_length=2048, fail_fast=True)]


class ModelRequest(TimedRequest):
    """The body of /v1/models/load and /v1/models/unload."""

    model: str = Field(min_length=1)
    keep_alive: KeepAlive = None


class EmbeddingRequest(TimedRequest):
    """The fields `prompt_name` and `truncate` are those of text-embeddings-inference."""

    model: str
    input: (
        Annotated[NonEmpty, Tag("text")]
        | Annotated[SomeTexts, Tag("texts")]
        | Annotated[SomeTokenIds, Tag("tokens")]
        | Annotated[ManyTokenIds, Tag("lists of tokens")]
    ) = Field(discriminator=Discriminator(_type_of_texts))
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    prompt_name: str | None = None  # one of the model's prompts, such as query or document
    truncate: bool | None = None  # whether a text that is too long is cut instead of refused
    keep_alive: KeepAlive = None
    user: str | None = no_meaning("it is a label for the client.")

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs, one element per vector."""
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    embedding: list[float] | str
    index: int


class EmbeddingUsage(BaseModel):
    """Counts of tokens after truncation, with special tokens."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    num_truncated: int = Field(0, exclude=True)  # texts; it is sent as a header


class RerankDocument(RequestBody):
    text: NonEmpty


class RerankRequest(TimedRequest):
    """The shape is that of Cohere and Jina."""

    model: str
    query: NonEmpty
    documents: list[NonEmpty | RerankDocument] = Field(min_length=1, max_length=2048, fail_fast=True)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool | None = None
    truncate: bool | None = None  # whether a text that is too long is cut instead of refused


class RerankedDocument(BaseModel):
    text: str


class RerankResult(BaseModel):
    index: int
    relevance_score: float
    document: RerankedDocument | None = Field(None, exclude_if=is_none)


class RerankResponse(BaseModel):
    id: str = Field(default_factory=lambda: f"rerank-{uuid4().hex}")
    object: Literal["list"] = "list"
    results: list[RerankResult]  # the best first
    model: str
    usage: EmbeddingUsage
    scored_by: Literal["cross-encoder", "embeddings"]  # embeddings: by the cosine of the vectors
    num_truncated: int = Field(0, exclude=True)  # texts; it is sent as a header


def _now() -> int:
    return int(time.time())


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetails


class PromptTokensDetails(BaseModel):
    cached_tokens: int = 0  # found in the prefix cache


class CompletionTokensDetails(BaseModel):
    reasoning_tokens: int = 0  # of the completion tokens, those of its reasoning


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()
    completion_tokens_details: CompletionTokensDetails = CompletionTokensDetails()


class Timings(BaseModel):
    """The durations of prompt and answer; the prompt's lasts from the request's arrival to the first token."""

    prompt_n: int  # tokens
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]  # UTF-8; a token may be part of a character


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(BaseModel):
    """The legacy shape: parallel lists, one element per token."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []  # None for a prompt's first token
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []  # characters from the beginning of the choice's text


class FunctionDelta(BaseModel):
    name: str | None = Field(None, exclude_if=is_none)
    arguments: str | None = Field(None, exclude_if=is_none)


class CustomDelta(BaseModel):
    name: str | None = Field(None, exclude_if=is_none)
    input: str = ""


class ToolCallDelta(BaseModel):
    """A part of a tool call; id, type and name are only in the first part of each call."""

    index: int
    id: str | None = Field(None, exclude_if=is_none)
    type: Literal["function", "custom"] | None = Field(None, exclude_if=is_none)
    function: FunctionDelta = Field(FunctionDelta(), exclude_if=lambda function: function == FunctionDelta())
    custom: CustomDelta | None = Field(None, exclude_if=is_none)  # instead of the function


class Delta(BaseModel):
    """What a chunk adds to the message: clients concatenate the fields that are present."""

    role: Literal["assistant"] | None = Field(None, exclude_if=is_none)
    content: str | None = Field(None, exclude_if=is_none)
    reasoning_content: str | None = Field(None, exclude_if=is_none)
    tool_calls: list[ToolCallDelta] | None = Field(None, exclude_if=is_none)
    function_call: FunctionDelta | None = Field(None, exclude_if=is_none)  # a call in the form of 2023


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | None = Field(None, exclude_if=is_none)  # the stop string that came; the name is vLLM's


class ChatCompletionChunk(BaseModel):
    id: str = Field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int = Field(default_factory=_now)
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    known_usage: Usage | None = Field(
        None, exclude=True
    )  # with a choice's first token, for protocols that send it first
    timings: Timings | None = Field(None, exclude_if=is_none)


class FunctionCall(BaseModel):
    name: str = ""
    arguments: str = ""  # JSON


class CustomCall(BaseModel):
    name: str = ""
    input: str = ""


class ToolCall(BaseModel):
    id: str = ""
    type: Literal["function", "custom"] = "function"
    function: FunctionCall = Field(default_factory=FunctionCall, exclude_if=lambda function: not function.name)
    custom: CustomCall | None = Field(None, exclude_if=is_none)  # instead of the function


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None  # None if there are only tool calls
    refusal: None = None
    reasoning_content: str | None = Field(None, exclude_if=is_none)
    tool_calls: list[ToolCall] | None = Field(None, exclude_if=is_none)
    function_call: FunctionCall | None = Field(None, exclude_if=is_none)  # a call in the form of 2023


class Choice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: str | None = Field(None, exclude_if=is_none)


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    timings: Timings | None = Field(None, exclude_if=is_none)


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """A whole completion or one chunk of it, for which OpenAI uses the same object."""

    id: str = Field(default_factory=lambda: f"cmpl-{uuid4().hex}")
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=_now)
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timings: Timings | None = Field(None, exclude_if=is_none)


class ModelPermission(BaseModel):
    id: str = Field(default_factory=lambda: f"modelperm-{uuid4().hex}")
    object: Literal["model_permission"] = "model_permission"
    created: int
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


ModelStatus = Literal["loaded", "loading", "unloaded", "failed"]


class LoadAdapterRequest(RequestBody):
    """An adapter (LoRA) that is to be served as a model. The shape is vLLM's."""

    lora_name: str | None = None
    lora_path: str | None = None
    load_inplace: bool | None = None  # whether it may take the place of one that has the name already


class UnloadAdapterRequest(RequestBody):
    """An adapter that is to be served no longer. The shape is vLLM's."""

    lora_name: str | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "local"
    permission: list[ModelPermission]
    root: str
    parent: str | None = None
    kind: Literal["chat", "embedding"] | None = None  # None for models of other providers
    status: ModelStatus | None = None
    error: str | None = None  # why it could not be loaded
    size: int | None = None  # bytes of its files
    max_model_len: int | None = None  # tokens; None unless it is loaded
    family: str | None = None  # None unless it is loaded
    chat_template: Literal["own", "family"] | None = None  # whose template is used; base models have none of their own
    recommended_quantization: str | None = None

    @classmethod
    def of_server(cls, name: str, created: int, **known: Any) -> "Model":
        """Makes the entry for a model of this server; `known` are further fields of it."""
        fields = {"root": name, **known}
        return cls(id=name, created=created, permission=[ModelPermission(created=created)], **fields)

    @classmethod
    def of_provider(cls, owner: str, name: str) -> "Model":
        """Makes the entry for a model of another provider."""
        return cls(id=f"{owner}/{name}", created=0, owned_by=owner, permission=[], root=name)


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
