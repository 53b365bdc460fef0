"""The answers of /v1/responses as pydantic models: a response, its output items, and the events of its stream."""

import time
from typing import Literal
from uuid import uuid4

from pydantic import (
    BaseModel,
    Field,
    SerializeAsAny,
)

from schemas import Object, TokenLogprob, is_none


class OutputText(BaseModel):
    type: Literal["output_text"] = "output_text"
    text: str = ""
    annotations: list[Object] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(BaseModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str = ""


class OutputItem(BaseModel):
    """One item of a response's output."""

    id: str
    type: str
    status: Literal["in_progress", "completed", "incomplete"] = "in_progress"


class OutputReasoning(OutputItem):
    id: str = Field(default_factory=lambda: f"rs_{uuid4().hex}")
    type: Literal["reasoning"] = "reasoning"
    summary: list[Object] = []
    content: list[ReasoningText] = []
    encrypted_content: str | None = Field(None, exclude_if=is_none)


class OutputFunctionCall(OutputItem):
    id: str = Field(default_factory=lambda: f"fc_{uuid4().hex}")
    type: Literal["function_call"] = "function_call"
    call_id: str
    name: str
    namespace: str | None = Field(None, exclude_if=is_none)
    arguments: str = ""


class OutputCustomCall(OutputItem):
    id: str = Field(default_factory=lambda: f"ctc_{uuid4().hex}")
    type: Literal["custom_tool_call"] = "custom_tool_call"
    call_id: str
    name: str
    namespace: str | None = Field(None, exclude_if=is_none)
    input: str = ""


class OutputMessage(OutputItem):
    id: str = Field(default_factory=lambda: f"msg_{uuid4().hex}")
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class InputTokensDetails(BaseModel):
    cached_tokens: int = 0
    cache_write_tokens: int = 0


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int = 0


class ResponsesUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputTokensDetails = InputTokensDetails()
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class ResponseObject(BaseModel):
    id: str = Field(default_factory=lambda: f"resp_{uuid4().hex}")
    object: Literal["response"] = "response"
    created_at: int = Field(default_factory=lambda: int(time.time()))
    completed_at: int | None = None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool = False
    error: Object | None = None
    incomplete_details: Object | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: Object = {}
    model: str
    output: list[SerializeAsAny[OutputItem]] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    store: bool = False  # whether it can be retrieved when it is over
    temperature: float | None = None
    text: Object = {"format": {"type": "text"}}
    reasoning: Object | None = None
    tool_choice: str | Object = "auto"
    tools: list[Object] = []
    top_logprobs: int | None = None
    top_p: float | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    usage: ResponsesUsage | None = None
    user: str | None = None


class ResponsesEvent(BaseModel):
    type: str
    sequence_number: int = 0

    def numbered(self, sequence_number: int) -> "ResponsesEvent":
        self.sequence_number = sequence_number
        return self


class ResponseStateEvent(ResponsesEvent):
    response: ResponseObject


class OutputItemEvent(ResponsesEvent):
    output_index: int
    item: SerializeAsAny[OutputItem]


class ContentPartEvent(ResponsesEvent):
    output_index: int
    content_index: int
    item_id: str
    part: OutputText | ReasoningText


class OutputTextDelta(ResponsesEvent):
    type: Literal["response.output_text.delta"] = "response.output_text.delta"
    output_index: int
    content_index: int
    item_id: str
    delta: str
    logprobs: list[TokenLogprob]


class OutputTextDone(ResponsesEvent):
    type: Literal["response.output_text.done"] = "response.output_text.done"
    output_index: int
    content_index: int
    item_id: str
    text: str
    logprobs: list[TokenLogprob]


class ReasoningTextDelta(ResponsesEvent):
    type: Literal["response.reasoning_text.delta"] = "response.reasoning_text.delta"
    output_index: int
    content_index: int
    item_id: str
    delta: str


class ReasoningTextDone(ResponsesEvent):
    type: Literal["response.reasoning_text.done"] = "response.reasoning_text.done"
    output_index: int
    content_index: int
    item_id: str
    text: str


class ArgumentsDelta(ResponsesEvent):
    type: Literal["response.function_call_arguments.delta"] = "response.function_call_arguments.delta"
    output_index: int
    item_id: str
    delta: str


class ArgumentsDone(ResponsesEvent):
    type: Literal["response.function_call_arguments.done"] = "response.function_call_arguments.done"
    output_index: int
    item_id: str
    name: str
    arguments: str


class CustomInputDelta(ResponsesEvent):
    type: Literal["response.custom_tool_call_input.delta"] = "response.custom_tool_call_input.delta"
    output_index: int
    item_id: str
    delta: str


class CustomInputDone(ResponsesEvent):
    type: Literal["response.custom_tool_call_input.done"] = "response.custom_tool_call_input.done"
    output_index: int
    item_id: str
    input: str


class ErrorEvent(ResponsesEvent):
    type: Literal["error"] = "error"
    message: str
    code: str | None
    param: str | None


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputTokens(BaseModel):
    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int
