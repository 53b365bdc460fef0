"""POST /v1/responses, and what is stored of its answers."""

from collections.abc import AsyncGenerator, Mapping
from functools import partial
from typing import Annotated, Literal

from fastapi import Query, Request, Response

from api.answers import ignored_fields_header, stream_or_whole, whole
from api.chat_source import answer_view, planned_chat
from api.prompt_size import num_tokens, tell_estimate
from api.responses import view as responses
from api.responses.encoder import ResponsesEncoder
from api.responses.input_items import MAX_LISTED, InputItemList, page_of
from api.responses.replay import replayed
from api.responses.requests import InputTokensRequest, ResponsesRequest
from api.responses.schemas import DeletedResponse, InputTokens, ResponseObject, ResponsesEvent
from api.responses.truncation import PromptSize, truncated
from api.routing import STREAM, V1Router
from api.services import UsesServices
from errors import InvalidRequest
from schemas import ChatCompletionChunk, ChatCompletionRequest
from server.events import EventStream, await_first, sse
from serving.local import LocalModel

router = V1Router()


@router.post("/responses", response_model=ResponseObject, responses=STREAM)
async def create_response(body: ResponsesRequest, request: Request, services: UsesServices) -> Response:
    earlier, complete = await services.responses.context_of(body)
    chat = responses.as_chat(complete, earlier)
    if body.truncation == "auto" and services.router.provider_of(body.model) is None:
        with responses.naming_fields(complete, earlier):
            chat = await truncated(chat, partial(_size, await services.text_model(body.model)))
    response = responses.opened(body)
    opened = services.responses.open(complete, response, earlier)

    def view(chunks: AsyncGenerator[ChatCompletionChunk]) -> AsyncGenerator[ResponsesEvent]:
        return opened.kept(responses.stream(complete, chunks, response, earlier))

    encoder = ResponsesEncoder()
    if not body.background:
        return await answer_view(request, services, body, chat, view=view, collect=responses.collect, encoder=encoder)
    if not opened.is_kept:
        raise InvalidRequest(
            "A response in the background has to be stored: leave store out, or send less.",
            param="background",
            code="invalid_value",
        )
    with responses.naming_fields(complete, earlier):
        events = view(await planned_chat(services, chat))
    response.status = "queued"
    limits = [seconds for seconds in (body.timeout, services.settings.request_timeout) if seconds is not None]
    seconds = min(limits, default=None)
    job = await services.background.start(opened, events, seconds=seconds, is_streamed=bool(body.stream))
    if body.stream:
        return await stream_or_whole(request, body, job.follow(), responses.collect, ResponsesEncoder())
    return _json(job.response.model_dump_json().encode(), ignored_fields_header(body.ignored_fields))


async def _size(model: LocalModel, chat: ChatCompletionRequest) -> PromptSize:
    """Renders the prompt of a chat and counts its tokens. Raises APIError."""
    return PromptSize(await model.count_tokens(chat), (await model.wait()).engine.max_model_len)


@router.post("/responses/input_tokens", response_model=InputTokens)
async def count_input_tokens(body: InputTokensRequest, request: Request, services: UsesServices) -> Response:
    """Counts the tokens of a request's prompt; nothing is generated."""
    body.model = body.model or services.chat.first.name
    earlier, complete = await services.responses.context_of(body)

    async def count() -> InputTokens:
        with responses.naming_fields(complete, earlier):
            return InputTokens(input_tokens=await num_tokens(services, responses.as_chat(complete, earlier)))

    return tell_estimate(await whole(request, body, count()), services, body.model)


@router.get("/responses/{response_id}", response_model=ResponseObject, responses=STREAM)
async def retrieve_response(
    response_id: str,
    services: UsesServices,
    stream: bool = False,
    starting_after: Annotated[int, Query(ge=-1)] = -1,
) -> Response:
    """Returns a stored response, or one that is made in the background; as a stream, its events."""
    job = services.background.find(response_id)
    if job is not None:
        if not stream:
            return _json(job.response.model_dump_json().encode())
        return _streamed(await await_first(job.follow(starting_after)))
    stored = await services.responses.get(response_id)
    return _streamed(replayed(stored.body, starting_after)) if stream else _json(stored.response)


def _streamed(events: AsyncGenerator[ResponsesEvent]) -> Response:
    encoder = ResponsesEncoder()
    return EventStream(sse(events, encoder), encoder.failure, {})


def _json(content: bytes, headers: Mapping[str, str] | None = None) -> Response:
    return Response(content, media_type="application/json", headers=headers)


@router.delete("/responses/{response_id}")
async def delete_response(response_id: str, services: UsesServices) -> DeletedResponse:
    """Deletes a stored response; one that is still being made is cancelled."""
    if (job := services.background.find(response_id)) is not None:
        await services.background.cancel(job)
    await services.responses.delete(response_id)
    return DeletedResponse(id=response_id)


@router.post("/responses/{response_id}/cancel", response_model=ResponseObject)
async def cancel_response(response_id: str, services: UsesServices) -> Response:
    """Ends a response that is made in the background; one that is over is returned as it is."""
    if (job := services.background.find(response_id)) is not None:
        return _json((await services.background.cancel(job)).model_dump_json().encode())
    stored = await services.responses.get(response_id)
    if not stored.body["background"]:
        raise InvalidRequest("A response that was not made in the background cannot be cancelled.")
    return _json(stored.response)


@router.get("/responses/{response_id}/input_items")
async def list_input_items(
    response_id: str,
    services: UsesServices,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
) -> InputItemList:
    """Lists what a response answers: the items of its request, behind those of the responses that it follows."""
    job = services.background.find(response_id)
    if job is not None:
        own, previous = job.opened.input_items, job.response.previous_response_id
    else:
        stored = await services.responses.get(response_id)
        own, previous = stored.input_items, stored.body["previous_response_id"]
    items = await services.responses.input_of(previous, own)
    return page_of(items, is_ascending=order == "asc", after=after, limit=limit)
