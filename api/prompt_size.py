"""The number of tokens of a chat's prompt, for endpoints that only count: exact here, about for other providers."""

import json

from fastapi import Response

from api.services import Services
from schemas import ChatCompletionRequest
from text.canonical_messages import num_images
from text.surrogates import whole

BYTES_PER_TOKEN, TOKENS_PER_IMAGE = 4, 1000  # about


async def num_tokens(services: Services, chat: ChatCompletionRequest) -> int:
    """Counts with the model's tokenizer; estimates for a model of another provider. Raises APIError."""
    if is_estimate(services, chat.model):
        return _estimate(chat)
    return await (await services.text_model(chat.model)).count_tokens(chat)


def is_estimate(services: Services, model: str) -> bool:
    return services.router.provider_of(model) is not None


def tell_estimate(response: Response, services: Services, model: str) -> Response:
    """Adds the header that says so to a response with an estimate."""
    if is_estimate(services, model):
        response.headers["X-Estimated"] = "input_tokens"
    return response


def _estimate(chat: ChatCompletionRequest) -> int:
    texts = [text for message in chat.messages for text in message.texts]
    sent = json.dumps([texts, [message.tool_calls for message in chat.messages], chat.tools], ensure_ascii=False)
    return len(whole(sent).encode()) // BYTES_PER_TOKEN + num_images(chat.messages) * TOKENS_PER_IMAGE
