"""The app: endpoints, their errors, and its life. `python main.py` or `uvicorn main:app` starts it."""

import argparse
import asyncio
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

import errors
from api import responses
from api.gateway import GatewayRoute
from api.response_schemas import ResponseObject
from api.streaming import ChunkWire, EventWire, collect_chat, collect_completion
from api.strict_json import StrictRoute
from config import LOCAL_ORIGINS, Settings, from_command_line, is_open_to_network
from engine import memory
from providers.router import Router
from schemas import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    EmbeddingRequest,
    EmbeddingResponse,
    ErrorBody,
    Model,
    ModelList,
    RequestBody,
    RerankRequest,
    RerankResponse,
    ResponsesRequest,
    TokenizeRequest,
    TokenizeResponse,
)
from server.api_keys import ApiKeyAuth
from server.asgi_errors import headers_of
from server.body_limit import BodyLimit
from server.connection import CLIENT_GONE, unless_client_leaves
from server.deadline import Shutdown, TimeLimit
from server.events import EventStream, Wire, await_first, sse
from server.headers import header_value
from server.http_protocol import with_bounds
from server.observer import Observer
from server.request_id import RequestId
from serving.embeddings import EmbeddingModels, as_json, off_loop
from serving.hub import HubModels
from serving.loading import LoadModel, load
from serving.local import LocalModel
from telemetry import logs, request_record, tracing
from telemetry.metrics import CONTENT_TYPE, Metrics

log = logging.getLogger("main")
FORCED = 1.0  # seconds after a second signal

VALUE_ERROR = "Value error, "  # pydantic begins with it what a validator of ours says


def create_app(settings: Settings, stop: Callable[[], None] | None = None, load: LoadModel = load) -> FastAPI:
    """The application. `stop` ends the process when the model cannot be loaded; `load` loads it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        logs.configure(settings.log_level, settings.log_format)
        _warn_if_open(settings)
        if settings.hf_token is not None:  # huggingface_hub reads it there, and not in .env
            os.environ.setdefault("HF_TOKEN", settings.hf_token.get_secret_value())
        _drain_on_signals(drain, settings.shutdown_timeout)
        local.start()
        embeddings.start()
        yield
        await drain(settings.shutdown_timeout)
        await app.state.router.close()

    async def drain(timeout: float) -> None:
        """Requests get so many seconds to finish, wherever they are answered; whoever asks now is refused."""
        asyncio.get_running_loop().call_later(timeout, shutdown.come)
        await asyncio.gather(*(models.close(timeout) for models in (local, embeddings, hub)))

    def on_failure(sentence: str) -> None:
        print(f"\nerror: {sentence}", file=sys.stderr, flush=True)
        app.state.failure = sentence
        (stop or _terminate)()

    metrics, shutdown = Metrics(), Shutdown()
    local = LocalModel(settings, on_failure, load, metrics)
    embeddings = EmbeddingModels(settings)
    app = FastAPI(
        title="Gemma 3 / Qwen server",
        version="0.1.0",
        lifespan=lifespan,
        telemetry=tracing.configuration(),
        redirect_slashes=False,
    )
    app.state.failure = None
    app.state.settings = settings
    app.state.metrics = metrics
    app.state.local = local
    app.state.embeddings = embeddings
    app.state.hub = hub = HubModels(settings, load, metrics=metrics)
    app.state.router = Router(settings, lambda name: local.serves(name) or embeddings.is_own(name))
    metrics.watch(lambda: (*local.engines, *hub.engines))
    app.router.route_class = StrictRoute
    app.add_middleware(
        BodyLimit,
        max_body_size=settings.max_body_size,
        max_body_memory=settings.max_body_memory,
        on_release=memory.trim_after,
    )
    app.add_middleware(TimeLimit, seconds=settings.request_timeout, shutdown=shutdown)
    app.add_middleware(ApiKeyAuth, keys=settings.api_keys)
    _add_cors(app, settings)  # before keys are asked for: a browser asks without one whether it may call
    app.add_middleware(Observer, metrics=metrics, span=tracing.span())
    app.add_middleware(RequestId, secrets=[key.secret.get_secret_value() for key in settings.api_keys])
    _add_error_handlers(app)
    _add_endpoints(app)
    return app


# What /openapi.json says of every endpoint
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is wrong; `param` names the field"},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer; if it can later, `Retry-After` says when"},
}
_EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


def _add_endpoints(app: FastAPI) -> None:
    router: Router = app.state.router
    local: LocalModel = app.state.local
    embeddings: EmbeddingModels = app.state.embeddings
    hub: HubModels = app.state.hub

    async def answering(model: str) -> LocalModel:
        """The main model, or the one beside it."""
        return await hub.provider(model) if hub.serves(model) and not local.serves(model) else local

    api = APIRouter(responses=_ERRORS, route_class=GatewayRoute)

    @api.post("/chat/completions", response_model=ChatCompletion, responses=_STREAM)
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        wire = ChunkWire(body.includes_usage)
        provider = await answering(body.model)
        return await _respond(request, body, provider.stream_chat(body), collect_chat, wire)

    @api.post("/completions", response_model=Completion, responses=_STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        wire = ChunkWire(body.includes_usage)
        provider = await answering(body.model)
        return await _respond(request, body, provider.stream_completion(body), collect_completion, wire)

    @api.post("/responses", response_model=ResponseObject, responses=_STREAM)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        chat, provider = responses.as_chat(body), await answering(body.model)
        events = responses.stream(body, provider.stream_chat(chat))
        return await _respond(request, body, events, responses.collect, EventWire())

    @api.post("/embeddings", response_model=EmbeddingResponse)
    async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
        return await _answer(request, body, embeddings.embed(body), len(body.inputs))

    @api.post("/rerank", response_model=RerankResponse)
    async def rerank(body: RerankRequest, request: Request) -> Response:
        return await _answer(request, body, embeddings.rerank(body), len(body.documents))

    @api.get("/models")
    async def list_models() -> ModelList:
        others = [Model.of_provider(owner, name) for owner, name in await router.listed()]
        return ModelList(data=[*local.models(), *embeddings.models(), *others])

    @api.get("/models/{model:path}")
    async def retrieve_model(model: str) -> Model:
        if local.serves(model):
            return local.models()[0]
        for found in embeddings.models():
            if found.id.casefold() == model.casefold():
                return found
        for owner, name in await router.listed():
            if model == f"{owner}/{name}":
                return Model.of_provider(owner, name)
        raise errors.ModelNotFound(f"The model {model!r} does not exist.", param="model")

    app.include_router(api, prefix="/v1")
    app.include_router(api, include_in_schema=False)  # for clients that were given the address without /v1

    @app.post("/tokenize", responses=_ERRORS)
    async def tokenize(body: TokenizeRequest, response: Response) -> TokenizeResponse:
        response.headers.update(_ignored_fields_header(body))
        return await local.tokenize(body)

    @app.post("/detokenize", responses=_ERRORS)
    async def detokenize(body: DetokenizeRequest, response: Response) -> DetokenizeResponse:
        response.headers.update(_ignored_fields_header(body))
        return await local.detokenize(body)

    @app.get("/metrics", response_class=Response)
    async def read_metrics() -> Response:
        return Response(await asyncio.to_thread(app.state.metrics.text), media_type=CONTENT_TYPE)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": app.version}

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: {"description": "The model is loading, or failed"}})
    async def health() -> JSONResponse:
        is_healthy, report = local.health
        others = {"providers": router.health} if router.health else {}
        return JSONResponse({**report, **others}, 200 if is_healthy else 503)


async def _respond(
    request: Request,
    body: ChatCompletionRequest | CompletionRequest | ResponsesRequest,
    chunks: AsyncGenerator[Any],
    collect: Callable[[AsyncIterator[Any]], Awaitable[Any]],
    wire: Wire,
) -> Response:
    """A stream or its fold. Either stops the work behind it when the client leaves."""
    request.state.deadline.shorten(body.timeout)
    headers = _ignored_fields_header(body)
    if body.stream:
        items = await unless_client_leaves(request, await_first(chunks))
        if items is None:
            return Response(status_code=CLIENT_GONE)
        return EventStream(sse(items, wire), wire.failure, headers)
    answer = await unless_client_leaves(request, collect(chunks))
    if answer is None:
        return Response(status_code=CLIENT_GONE)
    return Response(answer.model_dump_json(), media_type="application/json", headers=headers)


async def _answer(
    request: Request,
    body: EmbeddingRequest | RerankRequest,
    work: Awaitable[EmbeddingResponse | RerankResponse],
    num_texts: int,
) -> Response:
    """What is never streamed. The work stops when the client leaves."""
    request.state.deadline.shorten(body.timeout)
    answer = await unless_client_leaves(request, work)
    if answer is None:
        return Response(status_code=CLIENT_GONE)
    headers = _ignored_fields_header(body)
    if answer.num_truncated:
        headers["X-Gateway-Truncated"] = str(answer.num_truncated)
    content = await off_loop(partial(as_json, answer), num_texts)  # of thousands of vectors, it takes a while
    return Response(content, media_type="application/json", headers=headers)


def _ignored_fields_header(body: RequestBody) -> dict[str, str]:
    names = body.ignored_fields
    return {"X-Ignored-Fields": header_value(*names)} if names else {}


# --- errors


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(errors.APIError)
    async def on_api_error(request: Request, error: errors.APIError) -> JSONResponse:
        request_record.current().error = error.code or error.type
        return JSONResponse(error.body(), error.status, headers_of(error))

    @app.exception_handler(RequestValidationError)
    async def on_invalid_request(request: Request, error: RequestValidationError) -> JSONResponse:
        problem = _most_precise(error.errors())
        where, kind = problem["loc"][1:], problem["type"]
        if kind == "json_invalid" or not where:
            message = "The body must be a JSON object, sent with Content-Type: application/json"
            detail = problem.get("ctx", {}).get("error", problem["msg"])
            return await on_api_error(request, errors.InvalidRequest(f"{message} ({detail})."))
        param = _param_of(where, error.body, kind == "missing")
        if kind == "missing" and param:
            missing = errors.InvalidRequest(f"{param} is required.", param=param, code="missing_required_parameter")
            return await on_api_error(request, missing)
        said = problem["msg"].removeprefix(VALUE_ERROR)
        message = f"{param}: {said}" if param else said
        return await on_api_error(request, errors.InvalidRequest(message, param=param, code="invalid_value"))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        kind = {404: errors.NotFound, 405: errors.MethodNotAllowed}.get(error.status_code, errors.InvalidRequest)
        known = kind(_sentence_of(error, request))
        request_record.current().error = str(error.status_code)
        return JSONResponse(known.body(), error.status_code, {**headers_of(known), **(error.headers or {})})


def _sentence_of(error: HTTPException, request: Request) -> str:
    """What the framework says in two words is said in a sentence."""
    path, allowed = request.url.path[:200], (error.headers or {}).get("Allow")
    if error.status_code == 404:
        return f"The endpoint {path} does not exist: /docs shows those that do."
    if error.status_code == 405 and allowed:
        return f"The endpoint {path} does not take {request.method}: use {allowed}."
    return error.detail


def _most_precise(problems: Sequence[Any]) -> Any:
    """Of the first field that is wrong, the furthest place: where a field has several types, each of them complains,
    and the one that was meant got furthest."""

    def reach(problem: Any) -> tuple[list[int], bool, int]:
        where = problem["loc"]
        return [part for part in where if isinstance(part, int)], not problem["type"].endswith("_type"), len(where)

    field = problems[0]["loc"][:2]
    return max((problem for problem in problems if problem["loc"][:2] == field), key=reach)


def _param_of(location: Sequence[int | str], body: Any, is_missing: bool) -> str | None:
    """("messages", 0, "content", "str") -> "messages[0].content": pydantic also names the union member it tried."""
    path = ""
    for number, part in enumerate(location):
        if isinstance(part, int) and isinstance(body, dict):  # a token id
            path, body = f"{path}.{part}", None
        elif isinstance(part, int):
            path += f"[{part}]"
            body = body[part] if isinstance(body, list) and part < len(body) else None
        elif isinstance(body, dict) and (part in body or (is_missing and number == len(location) - 1)):
            path += f".{part}" if path else part
            body = body.get(part)
    return path or None


def _add_cors(app: FastAPI, settings: Settings) -> None:
    """Pages of these origins may call; by default those of this machine."""
    origins = settings.cors_allow_origins
    where: dict[str, Any] = {"allow_origin_regex": LOCAL_ORIGINS} if origins is None else {"allow_origins": origins}
    app.add_middleware(CORSMiddleware, **where, allow_methods=["GET", "POST"], allow_headers=["*"])


# --- the process


def _warn_if_open(settings: Settings) -> None:
    host = _listening_host(settings)
    if is_open_to_network(host) and not settings.api_keys:
        log.warning(
            "HOST=%s: anyone who reaches this address can use the model, because there is no key: set API_KEYS", host
        )


def _listening_host(settings: Settings) -> str:
    """Also where `uvicorn main:app --host H` decides it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default=os.environ.get("UVICORN_HOST", settings.host))
    return str(parser.parse_known_args()[0].host)


def _drain_on_signals(drain: Callable[[float], Coroutine[Any, Any, None]], timeout: float) -> None:
    """The first SIGTERM or SIGINT lets requests finish for `timeout` seconds; a second one ends them with an error.

    uvicorn's own handlers, which stop it from listening and wait for the connections to end, stay in place.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    draining: list[asyncio.Task[None]] = []

    def handler(previous: Any) -> Callable[[int, FrameType | None], None]:
        def on_signal(number: int, frame: FrameType | None) -> None:
            if callable(previous) and not draining:
                previous(number, frame)
            loop.call_soon_threadsafe(begin, previous)

        return on_signal

    def begin(previous: Any) -> None:
        if draining and callable(previous):  # the errors get a moment to be sent; what hangs then is not waited for
            loop.call_later(FORCED, previous, signal.SIGINT, None)
        draining.append(loop.create_task(drain(0.0 if draining else timeout)))

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler(signal.getsignal(number)))


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def main(load: LoadModel = load) -> None:
    """Serves until a signal; exits with 1 and a sentence if the model cannot be served any more."""
    settings = _settings_or_exit(from_command_line)
    logs.configure(settings.log_level, settings.log_format)
    _allow_many_files()
    app = create_app(settings, lambda: setattr(server, "should_exit", True), load)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        log_level=settings.log_level,
        http=with_bounds(settings),
        timeout_keep_alive=75,  # longer than clients keep idle connections, so that none meets a closing one
        timeout_graceful_shutdown=math.ceil(settings.shutdown_timeout) + 5,  # the drain comes first
    )
    server = uvicorn.Server(config)
    connections = server.server_state.connections
    app.state.metrics.gauge("http_connections", "Open connections", lambda: len(connections))
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again when it has ended: that is all then
        signal.signal(number, lambda number, frame: None)
    _run(server)
    if app.state.failure is not None or not server.started:
        sys.exit(1)


def _run(server: uvicorn.Server) -> None:
    """uvicorn logs why it cannot listen; the last line then says what to do."""
    try:
        server.run()
    except SystemExit:
        if server.started or server.lifespan.should_exit:  # then it is not for the address
            raise
        host, port = server.config.host, server.config.port
        sys.exit(f"error: The server cannot listen on {host}:{port}: set another HOST or PORT, or stop what uses it.")


def _allow_many_files() -> None:
    """A connection is a file, and the usual bound is 1024."""
    if sys.platform == "win32":
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if most == resource.RLIM_INFINITY else min(most, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _settings_or_exit(read: Callable[[], Settings]) -> Settings:
    try:
        return read()
    except ValidationError as error:
        problem = error.errors()[0]
        sys.exit(f"error: {str(problem['loc'][0]).upper()}: {problem['msg'].removeprefix(VALUE_ERROR)}")


def __getattr__(name: str) -> FastAPI:
    """`main:app` is made when uvicorn asks for it, so that an import does nothing."""
    if name == "app":
        app = globals()["app"] = create_app(_settings_or_exit(Settings))
        return app
    raise AttributeError(name)


if __name__ == "__main__":
    main()
