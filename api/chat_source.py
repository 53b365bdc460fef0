"""A chat's chunks from whichever model the request names: the local one, one of the Hub, or another provider's.

Protocols that are views of chat completions, such as /v1/messages, use it. GatewayRoute has already chosen among the
model's fallbacks, and has relayed the request if its provider speaks the protocol itself.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from fastapi import Request, Response

from api.answers import Answer, Item, StreamableBody, stream_or_whole
from api.services import Services
from providers.translated_chat import ChatSource
from schemas import ChatCompletionChunk, ChatCompletionRequest
from server.connection import CLIENT_GONE, unless_client_leaves
from server.deadline import deadline_of
from server.events import EventEncoder
from telemetry import request_record


async def open_chat(services: Services, chat: ChatCompletionRequest) -> ChatSource:
    """Returns the chunks of a chat's answer. Raises APIError, also while they are read."""
    route = services.router.provider_of(chat.model)
    if route is None:
        model = await services.text_model(chat.model)
        return ChatSource(model.stream_chat(chat))
    name, provider, model_there = route
    record = request_record.current()
    record.provider, record.model = name, model_there
    return await services.translated.open(name, provider, model_there, chat)


async def answer_view(
    request: Request,
    services: Services,
    body: StreamableBody,
    chat: ChatCompletionRequest,
    *,
    view: Callable[[AsyncGenerator[ChatCompletionChunk]], AsyncGenerator[Item]],
    collect: Callable[[AsyncIterator[Item]], Awaitable[Answer]],
    encoder: EventEncoder,
) -> Response:
    """Answers a request of another protocol, whose equivalent is `chat`.

    view: turns the chunks into the protocol's items; collect: the items into a whole answer; encoder: the items into
    a stream.
    """
    deadline_of(request.scope).shorten(body.timeout)
    source = await unless_client_leaves(request, open_chat(services, chat))
    if source is None:
        return Response(status_code=CLIENT_GONE)
    response = await stream_or_whole(request, body, view(source.chunks), collect, encoder)
    response.headers.update(source.headers)
    return response


async def planned_chat(services: Services, chat: ChatCompletionRequest) -> AsyncGenerator[ChatCompletionChunk]:
    """Returns the same chunks for a request that no client waits for; the model is asked when they are read.

    Raises APIError for all that a local model finds wrong before it computes: the model's name and whether it is
    loaded, tools, schemas, the prompt's length. Of a provider's model that is its name and key; the rest its provider
    finds when it is asked.
    """
    route = services.router.provider_of(chat.model)
    if route is None:
        return await (await services.text_model(chat.model)).planned_chat(chat)
    route[1].upstream.check_key()
    return _asked_later(services, chat)


async def _asked_later(services: Services, chat: ChatCompletionRequest) -> AsyncGenerator[ChatCompletionChunk]:
    source = await open_chat(services, chat)
    async with aclosing(source.chunks):
        async for chunk in source.chunks:
            yield chunk
