"""POST /v1/messages and /v1/messages/count_tokens, of Anthropic's API."""

from functools import partial

from fastapi import Request, Response

from api.answers import whole
from api.chat_source import answer_view
from api.messages import view as messages
from api.messages.input import as_chat, named
from api.messages.schemas import AnthropicError, CountTokensRequest, MessageAnswer, MessagesRequest, TokenCount
from api.prompt_size import num_tokens, tell_estimate
from api.routing import STREAM, V1Router, errors_as
from api.services import Services, UsesServices
from errors import APIError

router = V1Router(errors_as(AnthropicError))


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
    response = await whole(request, body, _count(services, body))
    return tell_estimate(response, services, body.model)


async def _count(services: Services, body: CountTokensRequest) -> TokenCount:
    try:
        return TokenCount(input_tokens=await num_tokens(services, as_chat(body)))
    except APIError as error:
        raise named(error, body) from None
