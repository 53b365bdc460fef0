"""TranslatedChats: chats at providers for protocols that those do not speak, by their chat completions."""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field

from errors import InvalidRequest, UpstreamError
from providers.base import Provider, ProviderResponse
from providers.chat_chunks import chunks_of, sent_chat
from providers.json_values import Object
from providers.refused_parameters import RefusedParameters
from schemas import ChatCompletionChunk, ChatCompletionRequest

PATH = "chat/completions"
# What a model may refuse without harm to the answer, or with another name for it
OPTIONAL = (
    *("max_tokens", "reasoning_effort", "reasoning_content", "parallel_tool_calls", "stream_options"),
    *("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty"),
)
MAX_ATTEMPTS = 4


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

        A model that refuses parameters is asked again without them, and from then on never sent them.
        """
        body = sent_chat({**chat.model_dump(exclude_none=True), "model": model})
        key = f"{name}/{model}"
        for _ in range(MAX_ATTEMPTS - 1):
            refused = self._refused.of(key)
            try:
                return self._source(await provider.answer(PATH, _without(body, refused)), name, chat.model)
            except UpstreamError as error:
                named = self._refused.named_in(error, OPTIONAL) - refused
                if not named:
                    raise
                self._refused.remember(key, named)
        return self._source(await provider.answer(PATH, _without(body, self._refused.of(key))), name, chat.model)

    def _source(self, answer: ProviderResponse, name: str, model: str) -> ChatSource:
        if isinstance(answer.content, bytes):
            raise InvalidRequest(f"{name} sent no stream.", param="model", code="unsupported_value")
        return ChatSource(chunks_of(answer.content, model), answer.headers)


def _without(body: Object, refused: frozenset[str]) -> Object:
    """Returns a copy without what the model refuses; its limit of tokens has another name then."""
    result = {name: value for name, value in body.items() if name not in refused}
    if "max_tokens" in refused and "max_tokens" in body:
        result["max_completion_tokens"] = body["max_tokens"]
    result["messages"] = [
        {key: value for key, value in message.items() if key not in refused} for message in body["messages"]
    ]
    return result
