"""GET /v1/models and /v1/models/{model}, POST /v1/models/load and /v1/models/unload."""

from contextlib import suppress

from fastapi import Request, Response

from api.answers import whole
from api.routing import V1Router
from api.services import Services, UsesServices
from errors import ModelLoading, ModelNotFound
from schemas import Model, ModelList, ModelRequest

router = V1Router()


@router.get("/models")
async def list_models(services: UsesServices) -> ModelList:
    await services.chat.refresh()
    others = [Model.of_provider(provider, name) for provider, name in await services.router.listed()]
    return ModelList(data=[*_here(services), *others])


def _here(services: Services) -> list[Model]:
    return [*(entry for model in services.chat.all for entry in model.entries), *services.embeddings.models()]


@router.post("/models/load", response_model=Model)
async def load_model(body: ModelRequest, request: Request, services: UsesServices) -> Response:
    """Loads a model; one whose load takes longer than MODEL_LOAD_WAIT is answered as `loading`, and goes on."""

    async def load() -> Model:
        name = services.router.alias(body.model)
        if await _is_embedding_model(services, name):
            return await services.embeddings.load(name, body.keep_alive)
        model = await services.chat.model(name)
        with suppress(ModelLoading):
            await model.wait(body.keep_alive)
        return model.entry_of(name)

    return await whole(request, body, load())


@router.post("/models/unload", response_model=Model)
async def unload_model(body: ModelRequest, request: Request, services: UsesServices) -> Response:
    """Unloads a model when its requests have finished; the next request for it loads it again."""

    async def unload() -> Model:
        name = services.router.alias(body.model)
        if await _is_embedding_model(services, name):
            return await services.embeddings.unload(name)
        model = await services.chat.model(name)
        await model.unload()
        return model.entry_of(name)

    return await whole(request, body, unload())


async def _is_embedding_model(services: Services, name: str) -> bool:
    await services.chat.refresh()  # the folder's models of both kinds
    return services.embeddings.knows(name) and services.chat.find(name) is None


@router.get("/models/{model:path}")
async def retrieve_model(model: str, services: UsesServices) -> Model:
    await services.chat.refresh()
    known = services.chat.find(model)
    if known is not None:
        return known.entry_of(model)
    for embedding_model in services.embeddings.models():
        if embedding_model.id.casefold() == model.casefold():
            return embedding_model
    for provider, name in await services.router.listed():
        if model == f"{provider}/{name}":
            return Model.of_provider(provider, name)
    raise ModelNotFound(f"The model {model!r} does not exist.", param="model")
