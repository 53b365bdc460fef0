"""TranslatedChats: chats at providers for protocols that those do not speak, by their chat completions."""

import re
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field

from errors import InvalidRequest, UpstreamError
from providers.base import Provider, ProviderResponse
from providers.chat_chunks import chunks_of, sent_chat, unsent
from providers.json_values import Object
from providers.refused_parameters import RefusedParameters
from providers.upstream import DROPPED_PARAMS
from schemas import ChatCompletionChunk, ChatCompletionRequest
from server.headers import header_value

PATH = "chat/completions"
# What a model may refuse without harm to the answer, or with another name for it
OPTIONAL = (
    *("max_tokens", "reasoning_effort", "reasoning_content", "parallel_tool_calls", "stream_options"),
    *("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty"),
)
MAX_ATTEMPTS = 4
_TOO_MANY = re.compile(r"max_(?:completion_)?tokens\b.{0,200}?\b(?:at most|maximum|up to|<=)\D{0,60}(\d{2,7})\b", re.S)


@dataclass(frozen=True)
class ChatSource:
    """A chat's chunks, and the headers that go with them."""

    chunks: AsyncGenerator[ChatCompletionChunk]
    headers: Mapping[str, str] = field(default_factory=dict)


class TranslatedChats:
    def __init__(self) -> None:
        self._refused = RefusedParameters()

    async def open(self, name: str, provider: Provider, model: str, chat: ChatCompletionRequest) -> ChatSource:
        """Asks a provider and returns its answer. Raises APIError, also while the chunks are read.

        A model that refuses parameters is asked again without them, and from then on never sent them; one that refuses
        their values is asked again without them this time, and with the limit of tokens that it names.
        """
        sent = chat.model_dump(exclude_none=True)
        body, key = sent_chat({**sent, "model": model}), f"{name}/{model}"
        refused = self._refused.of(key)
        for attempt in range(MAX_ATTEMPTS):
            try:
                answer = await provider.answer(PATH, _without(body, refused))
            except UpstreamError as error:
                limit = _TOO_MANY.search(error.message) if error.status == 400 else None
                named = self._refused.named_in(error, OPTIONAL) - refused
                again = named | {param for param in OPTIONAL if param == error.param and param not in refused}
                if attempt == MAX_ATTEMPTS - 1 or not (again or limit):
                    raise
                if limit is not None and int(limit[1]) < body.get("max_tokens", 0):
                    body["max_tokens"] = int(limit[1])
                elif again:
                    self._refused.remember(key, named)
                    refused |= again
                else:
                    raise
            else:
                left_out = [param for param in refused - {"max_tokens", "stream_options"} if param in body]
                return _source(answer, name, chat.model, [*unsent(sent), *sorted(left_out)])
        raise AssertionError("the last attempt returns or raises")


def _source(answer: ProviderResponse, name: str, model: str, left_out: Iterable[str]) -> ChatSource:
    if isinstance(answer.content, bytes):
        raise InvalidRequest(f"{name} sent no stream.", param="model", code="unsupported_value")
    headers = dict(answer.headers)
    if dropped := ", ".join(filter(None, [headers.get(DROPPED_PARAMS), header_value(*left_out)])):
        headers[DROPPED_PARAMS] = dropped
    return ChatSource(chunks_of(answer.content, model), headers)


def _without(body: Object, refused: frozenset[str]) -> Object:
    """Returns a copy without what the model refuses; its limit of tokens has another name then."""
    result = {name: value for name, value in body.items() if name not in refused}
    if "max_tokens" in refused and "max_tokens" in body:
        result["max_completion_tokens"] = body["max_tokens"]
    result["messages"] = [
        {key: value for key, value in message.items() if key not in refused} for message in body["messages"]
    ]
    return result
