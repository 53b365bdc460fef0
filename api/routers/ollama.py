"""The endpoints of Ollama's API under /api."""

from functools import partial
from typing import NoReturn

from fastapi import Request, Response

from api.answers import stream_or_whole, truncation_header, whole
from api.chat_source import answer_view
from api.ollama import embed as ollama_embed
from api.ollama import models as ollama_models
from api.ollama import view as ollama
from api.ollama.route import OllamaRoute
from api.ollama.schemas import (
    OllamaAnswer,
    OllamaChatAnswer,
    OllamaChatRequest,
    OllamaEmbedAnswer,
    OllamaEmbeddingsAnswer,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaError,
    OllamaGenerateAnswer,
    OllamaGenerateRequest,
    OllamaModels,
    OllamaRunningModels,
    OllamaShown,
    OllamaShowRequest,
    OllamaVersion,
)
from api.routing import Responses, RootRouter, errors_as
from api.services import Services, UsesServices
from errors import NotServed, unsupported

router = RootRouter(responses=errors_as(OllamaError), route_class=OllamaRoute)
LINES: Responses = {200: {"content": {"application/x-ndjson": {"schema": {"type": "object"}}}}}
FILES = (
    ("POST", "/api/pull"),
    ("POST", "/api/push"),
    ("POST", "/api/create"),
    ("POST", "/api/copy"),
    ("DELETE", "/api/delete"),
)


@router.post("/api/chat", response_model=OllamaChatAnswer, responses=LINES)
async def chat(body: OllamaChatRequest, request: Request, services: UsesServices) -> Response:
    model = await ollama_models.chat_model(services, body.model)
    if not body.messages:
        return await _loaded(body, request, services, model)
    return await _answer(body, request, services, model)


@router.post("/api/generate", response_model=OllamaGenerateAnswer, responses=LINES)
async def generate(body: OllamaGenerateRequest, request: Request, services: UsesServices) -> Response:
    model = await ollama_models.chat_model(services, body.model)
    if not body.prompt and not body.suffix and not body.images:
        return await _loaded(body, request, services, model)
    if not ollama.is_text(body):
        return await _answer(body, request, services, model)
    completion = ollama.as_completion(body, model)
    if services.router.provider_of(model) is not None:
        raise unsupported("raw" if body.raw else "suffix")
    chunks = (await services.text_model(model)).stream_completion(completion)
    answers = ollama.stream(body, ollama.as_chunks(chunks))
    return await stream_or_whole(request, body, answers, ollama.collect, ollama.LineEncoder())


async def _answer(body: ollama.AnyRequest, request: Request, services: Services, model: str) -> Response:
    return await answer_view(
        request,
        services,
        body,
        ollama.as_chat(body, model),
        view=partial(ollama.stream, body),
        collect=ollama.collect,
        encoder=ollama.LineEncoder(),
    )


async def _loaded(body: ollama.AnyRequest, request: Request, services: Services, model: str) -> Response:
    """Answers a request without a prompt, which is sent to load a model ahead of others, or to unload it."""

    async def work() -> OllamaAnswer:
        if services.router.provider_of(model) is None:
            known = await services.text_model(model)
            await (known.unload() if body.asks_to_unload else known.wait(body.keep_alive))
        return ollama.loaded(body)

    return await whole(request, body, work())


@router.post("/api/embed", response_model=OllamaEmbedAnswer)
async def embed(body: OllamaEmbedRequest, request: Request, services: UsesServices) -> Response:
    num_rows = len(body.input) if isinstance(body.input, list) else 1
    work = ollama_embed.embedded(services, body)
    return await whole(request, body, work, num_rows=num_rows, headers=truncation_header)


@router.post("/api/embeddings", response_model=OllamaEmbeddingsAnswer)
async def embed_one(body: OllamaEmbeddingsRequest, request: Request, services: UsesServices) -> Response:
    return await whole(request, body, ollama_embed.embedded_one(services, body))


@router.head("/api/tags", include_in_schema=False)
@router.get("/api/tags")
async def tags(services: UsesServices) -> OllamaModels:
    return await ollama_models.listed(services)


@router.get("/api/ps")
async def ps(services: UsesServices) -> OllamaRunningModels:
    return ollama_models.running(services)


@router.post("/api/show")
async def show(body: OllamaShowRequest, services: UsesServices) -> OllamaShown:
    return await ollama_models.shown(services, body.model)


@router.head("/api/version", include_in_schema=False)
@router.get("/api/version")
async def version() -> OllamaVersion:
    return OllamaVersion(version=ollama_models.VERSION)


async def _refuse() -> NoReturn:
    raise NotServed(
        "Models are not pulled, made, copied or deleted by requests: `python main.py pull` does that. Models of the "
        "Hub are served by the name huggingface/OWNER/NAME."
    )


for _method, _path in (*FILES, ("POST", "/api/blobs/{digest}"), ("HEAD", "/api/blobs/{digest}")):
    router.add_api_route(_path, _refuse, methods=[_method], include_in_schema=False, response_model=None)
