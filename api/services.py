"""Services: the models, providers and metrics of an app, in one typed object that its endpoints use."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, FastAPI, Request

from api.responses.background import BackgroundResponses
from api.responses.store import StoreBounds
from api.responses.stored import StoredResponses, open_store
from config import Settings
from providers.router import ProviderRouter
from providers.translated_chat import TranslatedChats
from serving.chat_models import ChatModels
from serving.embeddings import EmbeddingModels
from serving.folder import Folder
from serving.loading import LoadModel
from serving.local import LocalModel
from telemetry.metrics import Metrics


@dataclass(frozen=True)
class Services:
    """An endpoint gets it as its argument `services: UsesServices`."""

    settings: Settings
    metrics: Metrics
    chat: ChatModels
    embeddings: EmbeddingModels
    router: ProviderRouter
    responses: StoredResponses
    background: BackgroundResponses
    translated: TranslatedChats = field(default_factory=TranslatedChats)

    @classmethod
    def of(cls, settings: Settings, on_failure: Callable[[str], None], load: LoadModel) -> "Services":
        """Makes them; `start` then begins to load models. `on_failure` and `load` are those of ChatModels.

        Raises StoreFailure.
        """
        metrics = Metrics()
        folder = Folder(settings.models_dir)
        chat = ChatModels(settings, load, folder, on_failure=on_failure, metrics=metrics)
        embeddings = EmbeddingModels(settings, folder=folder)
        metrics.watch(lambda: chat.engines)
        return cls(
            settings=settings,
            metrics=metrics,
            chat=chat,
            embeddings=embeddings,
            router=ProviderRouter(settings, lambda name: chat.find(name) is not None or embeddings.lists(name)),
            responses=StoredResponses(open_store(settings), StoreBounds.of(settings)),
            background=BackgroundResponses(
                settings.max_background_responses, settings.response_store_size, settings.api_keys
            ),
        )

    def start(self) -> None:
        self.chat.start()
        self.embeddings.start()

    async def close_models(self, timeout: float) -> None:
        """Refuses new requests and gives those in progress `timeout` seconds to finish."""
        await asyncio.gather(*(models.close(timeout) for models in (self.chat, self.embeddings)))

    async def close(self) -> None:
        """Ends what is left when the models are closed."""
        await self.background.close()
        await asyncio.to_thread(self.responses.close)
        await self.router.close()

    async def text_model(self, name: str) -> LocalModel:
        """Returns the model here that answers, loaded or not. Raises ModelNotFound."""
        return await self.chat.model(name)


def services_of(app: FastAPI) -> Services:
    services: Services = app.state.services
    return services


async def _of_request(request: Request) -> Services:
    return services_of(request.app)


UsesServices = Annotated[Services, Depends(_of_request)]
