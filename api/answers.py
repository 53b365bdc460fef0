"""What endpoints return: a stream or a whole answer. The work behind either is cancelled when its client leaves."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel

from server.connection import CLIENT_GONE, unless_client_leaves
from server.deadline import deadline_of
from server.events import EventEncoder, EventStream, await_first, sse
from server.headers import header_value
from serving.embeddings import off_loop

Item = TypeVar("Item")
Answer = TypeVar("Answer", bound=BaseModel)


class Body(Protocol):
    """The fields of a request's body that every endpoint honours."""

    @property
    def timeout(self) -> float | None: ...

    @property
    def ignored_fields(self) -> list[str]: ...


class StreamableBody(Body, Protocol):
    @property
    def stream(self) -> bool | None: ...


async def stream_or_whole(
    request: Request,
    body: StreamableBody,
    chunks: AsyncGenerator[Item],
    collect: Callable[[AsyncIterator[Item]], Awaitable[Answer]],
    encoder: EventEncoder,
) -> Response:
    """Sends the chunks as server-sent events if the body asks for a stream, else what `collect` makes of them."""
    if not body.stream:
        return await whole(request, body, collect(chunks))
    deadline_of(request.scope).shorten(body.timeout)
    items = await unless_client_leaves(request, await_first(chunks))
    if items is None:
        return Response(status_code=CLIENT_GONE)
    headers = ignored_fields_header(body.ignored_fields)
    return EventStream(sse(items, encoder), encoder.failure, headers, format=encoder.format)


def _to_json(answer: BaseModel) -> bytes:
    return answer.model_dump_json().encode()


def _no_headers(answer: BaseModel) -> Mapping[str, str]:
    return {}


async def whole(
    request: Request,
    body: Body,
    work: Awaitable[Answer],
    *,
    num_rows: int = 1,
    to_json: Callable[[Answer], bytes] = _to_json,
    headers: Callable[[Answer], Mapping[str, str]] = _no_headers,
) -> Response:
    """Sends the result of `work` as JSON, with the headers that `headers` makes of it.

    The JSON of many rows, such as vectors, takes a while and is made in a thread.
    """
    deadline_of(request.scope).shorten(body.timeout)
    answer = await unless_client_leaves(request, work)
    if answer is None:
        return Response(status_code=CLIENT_GONE)
    content = await off_loop(partial(to_json, answer), num_rows)
    all_headers = {**ignored_fields_header(body.ignored_fields), **headers(answer)}
    return Response(content, media_type="application/json", headers=all_headers)


def ignored_fields_header(names: Sequence[str]) -> dict[str, str]:
    """Returns the header that tells a client which fields of its request are unknown; empty if there are none."""
    return {"X-Ignored-Fields": header_value(*names)} if names else {}


class _Truncatable(Protocol):
    num_truncated: int


def truncation_header(answer: _Truncatable) -> dict[str, str]:
    """Returns the header with the number of texts that were cut to the model's length; empty if none was."""
    return {"X-Gateway-Truncated": str(answer.num_truncated)} if answer.num_truncated else {}
