"""GET /v1/models and /v1/models/{model}."""

from api.routing import V1Router
from api.services import UsesServices
from errors import ModelNotFound
from schemas import Model, ModelList

router = V1Router()


@router.get("/models")
async def list_models(services: UsesServices) -> ModelList:
    others = [Model.of_provider(provider, name) for provider, name in await services.router.listed()]
    return ModelList(data=[*services.local.models(), *services.embeddings.models(), *others])


@router.get("/models/{model:path}")
async def retrieve_model(model: str, services: UsesServices) -> Model:
    if services.local.serves(model):
        base, *adapters = services.local.models()
        return next((adapter for adapter in adapters if adapter.id.casefold() == model.casefold()), base)
    for embedding_model in services.embeddings.models():
        if embedding_model.id.casefold() == model.casefold():
            return embedding_model
    for provider, name in await services.router.listed():
        if model == f"{provider}/{name}":
            return Model.of_provider(provider, name)
    raise ModelNotFound(f"The model {model!r} does not exist.", param="model")
