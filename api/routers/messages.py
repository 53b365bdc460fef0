"""POST /v1/messages and /v1/messages/count_tokens, of Anthropic's API."""

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

router = V1Router(errors_as(AnthropicError))
BYTES_PER_TOKEN = 4  # about: for models of providers, which do not count


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
    response.headers.update(messages.ignored_betas_header(request.headers.get("anthropic-beta", "")))
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
    sent = chat.model_dump_json(include={"messages", "tools"}, exclude_none=True)
    return TokenCount(input_tokens=len(sent.encode()) // BYTES_PER_TOKEN)
