"""The wire format of Anthropic's Messages API as pydantic models: requests, answers and the events of a stream.

Source: https://platform.claude.com/docs/en/api/messages, and the types of Anthropic's Python SDK 2.14.
"""

from typing import Annotated, Literal
from uuid import uuid4

from pydantic import BaseModel, Field, SerializeAsAny

from schemas import MAX_MESSAGES, Items, Object, RequestBody, SamplingFields, StopString, no_meaning, refused

# --- the request


class Source(RequestBody):
    """Where an image's bytes are."""

    type: str
    media_type: str | None = None
    data: str | None = None  # base64
    url: str | None = None


class Block(RequestBody):
    """A part of a message's content; the fields of the other types are None."""

    type: str
    text: str | None = None
    source: Source | str | None = None  # a text in results of searches
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None  # of thinking that Anthropic encrypted
    id: str | None = None
    name: str | None = None
    input: Object | None = None
    tool_use_id: str | None = None
    content: "str | Items[Block] | None" = None
    is_error: bool | None = None
    tool_name: str | None = None
    tool: Object | None = None  # that is added or removed
    title: str | None = None
    cache_control: Object | None = no_meaning("cached prompts are found by their tokens.")
    citations: Object | Items[Object] | None = no_meaning("no answer cites anything.")


class TurnConfig(RequestBody):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class MessageParam(RequestBody):
    role: Literal["user", "assistant", "system"]
    content: str | Items[Block] | None = None
    clear_at: Literal["next_user_message", "never"] | None = None  # of the system's: when it leaves the prompt
    output_config: TurnConfig | None = None  # of the system's: it applies from here on


class Thinking(RequestBody):
    type: Literal["adaptive", "enabled", "disabled"]
    budget_tokens: int | None = Field(None, ge=1)
    display: str | None = None  # omitted: the thoughts are in the signature alone; others show them


class OutputConfig(RequestBody):
    known_inside = {"format": frozenset({"type", "schema"})}

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Object | None = None


class ToolChoice(RequestBody):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Tool(RequestBody):
    """A tool of the client's. One of another type is run by Anthropic's servers, or described by its models."""

    name: str | None = None
    type: str | None = None
    description: str | None = None
    input_schema: Object | None = None
    strict: bool | None = None
    cache_control: Object | None = no_meaning("cached prompts are found by their tokens.")
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = no_meaning("arguments are always streamed as they are written.")
    input_examples: Items[Object] | None = no_meaning("chat templates have no place for them.")
    allowed_callers: Items[str] | None = no_meaning("only the model calls tools.")

    @property
    def is_custom(self) -> bool:
        return self.type in (None, "custom")


class CountTokensRequest(RequestBody):
    """The fields that decide the prompt."""

    model: str
    messages: Annotated[list[MessageParam], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: str | Items[Block] | None = None
    tools: Items[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: Object | None = None  # an older place of output_config.format
    timeout: float | None = Field(None, gt=0)  # seconds that the answer may take
    mcp_servers: Items[Object] | None = refused([])
    thread: Object | None = refused()  # a conversation that the server holds, and of which only the new turn is sent
    compaction: Object | None = refused()
    cache_control: Object | None = no_meaning("cached prompts are found by their tokens.")
    context_management: Object | None = no_meaning("the conversation is answered as it was sent.")
    speed: str | None = no_meaning("there is one speed.")
    user_profile_id: str | None = no_meaning("it is a label for the client.")

    @property
    def dropped_tools(self) -> dict[str, Tool]:
        """The tools that this server lacks, by their paths, such as `tools[2].web_search_20250305`."""
        return {
            f"tools[{number}].{tool.type}": tool for number, tool in enumerate(self.tools or ()) if not tool.is_custom
        }

    @property
    def ignored_fields(self) -> list[str]:
        return sorted([*super().ignored_fields, *self.dropped_tools])


class MessagesRequest(CountTokensRequest, SamplingFields):
    """A request for an answer. The sampling parameters that Anthropic does not have are vLLM's."""

    max_tokens: int = Field(ge=1)
    stop_sequences: Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    metadata: Object | None = no_meaning("it is a label for the client.")
    service_tier: str | None = no_meaning("there is one tier.")
    container: str | Object | None = refused()
    diagnostics: Object | None = no_meaning("the answer has no diagnostics.")
    billing_policy: Object | None = no_meaning("nothing is billed.")
    fallbacks: str | Items[Object] | None = no_meaning("a model here refuses nothing.")
    fallback_credit_token: str | Object | None = no_meaning("nothing is billed.")
    inference_geo: str | None = no_meaning("the model runs here.")
    workspace_id: str | None = no_meaning("it is a label for the client.")


# --- the answer


class TextBlock(BaseModel):
    type: Literal["text"] = "text"
    text: str = ""
    citations: None = None


class ThinkingBlock(BaseModel):
    type: Literal["thinking"] = "thinking"
    thinking: str = ""
    signature: str = ""


class ToolUseBlock(BaseModel):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: Object = {}


OutputBlock = TextBlock | ThinkingBlock | ToolUseBlock
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]


class MessageUsage(BaseModel):
    """Counts of tokens; the prompt has those of the three fields together."""

    input_tokens: int = 0
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0
    output_tokens: int = 0


class MessageAnswer(BaseModel):
    id: str = Field(default_factory=lambda: f"msg_{uuid4().hex}")
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[OutputBlock] = []
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: MessageUsage = MessageUsage()


class TokenCount(BaseModel):
    input_tokens: int


class ErrorDetails(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    type: Literal["error"] = "error"
    error: ErrorDetails
    request_id: str


# --- the events


class MessagesEvent(BaseModel):
    type: str


class MessageStart(MessagesEvent):
    type: Literal["message_start"] = "message_start"
    message: MessageAnswer


class Ping(MessagesEvent):
    type: Literal["ping"] = "ping"


class BlockStart(MessagesEvent):
    type: Literal["content_block_start"] = "content_block_start"
    index: int
    content_block: OutputBlock


class BlockDelta(MessagesEvent):
    type: Literal["content_block_delta"] = "content_block_delta"
    index: int
    delta: SerializeAsAny[BaseModel]


class BlockStop(MessagesEvent):
    type: Literal["content_block_stop"] = "content_block_stop"
    index: int


class MessageEnd(BaseModel):
    stop_reason: StopReason
    stop_sequence: str | None = None


class MessageDelta(MessagesEvent):
    type: Literal["message_delta"] = "message_delta"
    delta: MessageEnd
    usage: MessageUsage


class MessageStop(MessagesEvent):
    type: Literal["message_stop"] = "message_stop"
    answer: MessageAnswer = Field(exclude=True)  # everything that the stream has said


class TextDelta(BaseModel):
    type: Literal["text_delta"] = "text_delta"
    text: str


class ThinkingDelta(BaseModel):
    type: Literal["thinking_delta"] = "thinking_delta"
    thinking: str


class SignatureDelta(BaseModel):
    type: Literal["signature_delta"] = "signature_delta"
    signature: str


class InputJsonDelta(BaseModel):
    type: Literal["input_json_delta"] = "input_json_delta"
    partial_json: str
