"""HubModels: a second chat model beside the main one, loaded when a request names it and unloaded when idle."""

import asyncio
import gc
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints import hub_snapshot
from checkpoints.progress import Progress
from checkpoints.sources import Sources
from config import Settings
from errors import ModelNotFound, Unavailable
from serving.loading import LoadModel, to_api_error
from serving.local import LocalModel
from serving.model_pool import ModelPool
from serving.model_slot import ModelSlot, in_daemon_thread
from telemetry.metrics import Metrics

if TYPE_CHECKING:
    from engine.engine import Engine

log = logging.getLogger(__name__)

PREFIX = "huggingface/"
SETTLING = 2.0  # seconds that a request may take from its model's name to the engine: its prompt is rendered before
PATIENCE = 30.0  # seconds that a request waits for a model before it gets a 503


class HubModels:
    def __init__(
        self,
        settings: Settings,
        load: LoadModel,
        sources: Sources | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._settings, self._load_model, self._sources = settings, load, sources
        self._metrics = metrics or Metrics()
        self._pool: ModelPool[str, LocalModel] = ModelPool(
            capacity=1,  # model; HUGGINGFACE_MEMORY bounds its size before it is downloaded
            size_of=lambda model: 1,
            close=_close,
            is_busy=_is_busy,
            idle_limit=settings.huggingface_idle,
        )

    def serves(self, model: str) -> bool:
        return model.startswith(PREFIX)

    async def model(self, model: str) -> LocalModel:
        """Returns the model of that name, loading it first if necessary.

        Raises ModelNotFound for a name that is not a Hub id, UpstreamUnreachable while the Hub is out of reach,
        Unavailable while another model is loading or in use, and ModelLoading after PATIENCE.
        """
        name = model.removeprefix(PREFIX)
        if not hub_snapshot.is_hub_id(name):
            raise ModelNotFound(f"{model!r} is not a Hub model id: use huggingface/OWNER/NAME.", param="model")
        self._check_free(name)
        return await self._pool.slot(name, partial(self._load, name)).wait(PATIENCE)

    @property
    def engines(self) -> "list[tuple[str, Engine]]":
        return [named for model in self._pool.models.values() for named in model.engines]

    @property
    def models(self) -> list[LocalModel]:
        """The models that are loaded."""
        return [*self._pool.models.values()]

    def _check_free(self, name: str) -> None:
        """Raises Unavailable if another model is loading or in use: it is not pushed out."""
        for other, slot in self._pool.slots.items():
            if other != name and slot.is_loading:
                raise Unavailable(
                    f"{other} is loading, and only one model can load at a time; try again later.", retry_after=10
                )
            if other != name and name not in self._pool.slots and not _is_free(slot):
                raise Unavailable(
                    f"{other} is in use, and only one such model fits at a time; try again later.", retry_after=10
                )

    def _on_failure(self, model: LocalModel, sentence: str) -> None:
        """Drops a model whose engine has stopped: the next request loads it anew."""
        log.error("%s", sentence)
        self._pool.drop(model.name.removeprefix(PREFIX), model)

    async def _load(self, name: str) -> LocalModel:
        named = {"model_path": name, "served_model_name": PREFIX + name}
        settings = self._settings.model_copy(update={**named, "lora_adapters": {}})  # which are the main model's
        model = LocalModel(settings, lambda sentence: self._on_failure(model, sentence), metrics=self._metrics)
        try:
            directory = await in_daemon_thread(partial(self._fetch, name, model.progress))
            async with self._pool.room_for(1):  # the old model stays until the new one is downloaded
                work = partial(self._load_model, str(directory), settings, model.progress)
                model.begin(await in_daemon_thread(work))
        except Exception as error:
            raise to_api_error(error, name) from error
        return model

    def _fetch(self, name: str, progress: Progress) -> Path:
        sources, settings = self._sources or Sources(), self._settings
        bound = hub_snapshot.MemoryBound("HUGGINGFACE_MEMORY", settings.huggingface_memory)
        return hub_snapshot.fetch(name, progress.report, sources, bound)

    async def close(self, timeout: float) -> None:
        await self._pool.close(timeout)


async def _close(model: LocalModel, timeout: float | None) -> None:
    await model.close(timeout or 0.0)
    model.loaded = None
    await asyncio.to_thread(gc.collect)


def _is_busy(model: LocalModel) -> bool:
    """Returns whether the model is answering a request, or one waits for it."""
    return any(engine.failure is None and engine.num_running + engine.num_waiting for _, engine in model.engines)


def _is_free(slot: ModelSlot[LocalModel]) -> bool:
    """Returns whether no request uses the model or may be about to; a model whose engine has stopped is free at
    once."""
    if slot.model is None or any(engine.failure is not None for _, engine in slot.model.engines):
        return True
    return not _is_busy(slot.model) and slot.is_idle(SETTLING)
