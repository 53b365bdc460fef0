"""The requests of OpenAI's Responses API as pydantic models."""

from typing import Annotated, Any, Literal

from pydantic import Field

from schemas import (
    JSON_SCHEMA,
    MAX_MESSAGES,
    ConversationRequest,
    Items,
    Object,
    RequestBody,
    SamplingRequest,
    StreamOptions,
    ignored,
    no_meaning,
    refused,
)

Includable = Literal[
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class InputPart(RequestBody):
    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: str | None = None
    detail: str | None = None
    annotations: Any = no_meaning("an answer's text has none.")
    logprobs: Any = no_meaning("they are of an answer that is over.")


class InputItem(RequestBody):
    """A message, a tool call, its result or reasoning; the fields of the other types are None."""

    type: str = "message"
    id: str | None = None  # of an item that an answer had, or that is referred to
    status: str | None = no_meaning("what is sent is read as it is.")
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | Items[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    namespace: str | None = None
    arguments: str | None = None
    input: str | None = None
    output: str | Items[InputPart] | None = None
    summary: Items[InputPart] | None = None
    encrypted_content: str | None = None  # reasoning, as the answer had it

    @property
    def is_reference(self) -> bool:
        """Whether this stands for a stored item; SDKs may leave the type out."""
        is_bare = "type" not in self.model_fields_set and self.role is None and self.content is None
        return self.type == "item_reference" or (is_bare and self.id is not None)


class TextConfig(RequestBody):
    known_inside = {"format": frozenset({"type", "json_schema", *JSON_SCHEMA})}
    format: Object | None = None
    verbosity: Literal["low", "medium", "high"] | None = ignored("no chat template knows it.", "medium")


class ReasoningConfig(RequestBody):
    effort: str | None = None
    summary: str | None = no_meaning("the reasoning itself is in the response.")
    generate_summary: str | None = no_meaning("the reasoning itself is in the response.")


class ResponsesRequest(SamplingRequest, ConversationRequest):
    known_inside = {"tool_choice": frozenset({"type", "name", "namespace", "function", "custom", "mode", "tools"})}
    input: str | Annotated[list[InputItem], Field(max_length=MAX_MESSAGES - 1, fail_fast=True)]  # 1: instructions
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: Items[Includable] | None = Field(
        None,
        description=(
            "message.output_text.logprobs adds log-probabilities, reasoning.encrypted_content adds the reasoning in a "
            "form that can be sent back; the others have no effect."
        ),
    )
    text: TextConfig | None = None
    background: bool | None = None
    store: bool | None = None
    context_management: Items[Object] | None = refused([])
    conversation: str | Object | None = refused()
    previous_response_id: str | None = None
    prompt: Object | None = refused()
    truncation: Literal["auto", "disabled"] | None = None
    access_programs: Object | None = no_meaning("there are no access programs.")
    background_options: Object | None = no_meaning("a response in the background begins as soon as there is room.")
    image: Object | None = no_meaning("no image is made.")
    max_tool_calls: int | None = no_meaning("the server calls no tools.")
    reasoning: ReasoningConfig | None = None
    stream_options: StreamOptions | None = no_meaning("nothing is added to the events.")


class InputTokensRequest(ResponsesRequest):
    """A request for a response of which only the prompt's tokens are counted."""

    model: str = ""  # the main model
    input: str | Annotated[list[InputItem], Field(max_length=MAX_MESSAGES - 1, fail_fast=True)] = ""
    personality: str | None = no_meaning("no model here has several.")
