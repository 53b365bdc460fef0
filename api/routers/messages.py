"""POST /v1/messages and /v1/messages/count_tokens, of Anthropic's API."""

import json
from functools import partial

from fastapi import Request, Response

from api.answers import whole
from api.chat_source import answer_view
from api.messages import view as messages
from api.messages.input import as_chat, named
from api.messages.schemas import AnthropicError, CountTokensRequest, MessageAnswer, MessagesRequest, TokenCount
from api.routing import STREAM, V1Router, errors_as
from api.services import Services, UsesServices
from errors import APIError
from schemas import ChatCompletionRequest
from text.canonical_messages import num_images
from text.surrogates import whole as whole_text

router = V1Router(errors_as(AnthropicError))
BYTES_PER_TOKEN, TOKENS_PER_IMAGE = 4, 1000  # about: for models of providers, which do not count


@router.post("/messages", response_model=MessageAnswer, responses=STREAM)
async def create_message(body: MessagesRequest, request: Request, services: UsesServices) -> Response:
    response = await answer_view(
        request,
        services,
        body,
        as_chat(body),
        view=partial(messages.stream, body),
        collect=messages.collect,
        encoder=messages.MessagesEncoder(),
    )
    response.headers.update(messages.ignored_betas_header(", ".join(request.headers.getlist("anthropic-beta"))))
    return response


@router.post("/messages/count_tokens", response_model=TokenCount)
async def count_tokens(body: CountTokensRequest, request: Request, services: UsesServices) -> Response:
    chat = as_chat(body)
    is_estimate = services.router.provider_of(chat.model) is not None
    response = await whole(request, body, _estimate(chat) if is_estimate else _count(services, body, chat))
    if is_estimate:
        response.headers["X-Estimated"] = "input_tokens"
    return response


async def _count(services: Services, body: CountTokensRequest, chat: ChatCompletionRequest) -> TokenCount:
    model = await services.text_model(chat.model)
    try:
        return TokenCount(input_tokens=await model.count_tokens(chat))
    except APIError as error:
        raise named(error, body) from None


async def _estimate(chat: ChatCompletionRequest) -> TokenCount:
    texts = [text for message in chat.messages for text in message.texts]
    sent = json.dumps([texts, [message.tool_calls for message in chat.messages], chat.tools], ensure_ascii=False)
    num_bytes = len(whole_text(sent).encode())
    return TokenCount(input_tokens=num_bytes // BYTES_PER_TOKEN + num_images(chat.messages) * TOKENS_PER_IMAGE)
