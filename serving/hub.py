"""HubModels: a second chat model beside the main one, loaded when it is asked for and unloaded when nobody does."""

import asyncio
import gc
import logging
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from checkpoints import hub_snapshot
from checkpoints.progress import Progress
from checkpoints.sources import Sources
from config import Settings
from errors import ModelLoading, ModelNotFound, Unavailable
from serving.loading import LoadModel, in_daemon_thread, to_api_error
from serving.local import LocalModel
from telemetry.metrics import Metrics

if TYPE_CHECKING:
    from engine.engine import Engine

log = logging.getLogger(__name__)

PREFIX = "huggingface/"
SETTLING = 2.0  # seconds that a request may take from its model's name to the engine: its prompt is rendered before
PATIENCE = 30.0  # seconds that a request waits for a model; then it is told to come again


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
        self._provider: LocalModel | None = None
        self._name: str | None = None  # of the provider's model, or of the one that is being loaded
        self._loading: asyncio.Task[LocalModel] | None = None
        self._used_at = 0.0
        self._watch: asyncio.Task[None] | None = None
        self._unloading: asyncio.Task[None] | None = None  # of a model whose engine has ended

    def serves(self, model: str) -> bool:
        return model.startswith(PREFIX)

    async def provider(self, model: str) -> LocalModel:
        """Raises APIError: for a name that is none, a Hub that has or says nothing, and while it takes long."""
        name = model.removeprefix(PREFIX)
        if not hub_snapshot.is_hub_id(name):
            raise ModelNotFound(f"{model!r} is not a Hub model id: use huggingface/OWNER/NAME.", param="model")
        if self._name != name:
            await self._replace(name)
        else:
            self._used_at = time.monotonic()
        loading = self._loading
        assert loading is not None
        done, _ = await asyncio.wait({loading}, timeout=PATIENCE)
        if not done:
            raise ModelLoading(f"The model {name} is loading; try again later.", retry_after=5)
        if loading.cancelled():
            raise Unavailable("The server is shutting down.", retry_after=10)
        self._used_at = time.monotonic()
        return loading.result()

    @property
    def engines(self) -> "list[tuple[str, Engine]]":
        return [] if self._provider is None else self._provider.engines

    async def _replace(self, name: str) -> None:
        """One at a time: another one that is loading, or answering, is not pushed out."""
        if self._loading is not None and not self._loading.done():
            raise Unavailable(
                f"{self._name} is loading, and only one model can load at a time; try again later.", retry_after=10
            )
        if self._provider is not None and not self._is_idle(SETTLING):
            raise Unavailable(
                f"{self._name} is in use, and only one such model fits at a time; try again later.", retry_after=10
            )
        self._name = name
        self._loading = asyncio.create_task(self._load(name))
        self._loading.add_done_callback(self._forget_failed)
        self._watch = self._watch or asyncio.create_task(self._unload_when_idle())

    def _on_failure(self, provider: LocalModel, sentence: str) -> None:
        """Its engine has ended: the next request loads it anew."""
        log.error("%s", sentence)
        if provider is not self._provider:  # it was being replaced
            return
        if self._loading is not None and self._loading.done():
            self._name = self._loading = None
        self._unloading = asyncio.create_task(self._unload())

    def _forget_failed(self, task: "asyncio.Task[LocalModel]") -> None:
        is_lost = task.cancelled() or task.exception() is not None
        if is_lost and task is self._loading:
            self._name = None if self._provider is None else self._provider.name.removeprefix(PREFIX)
            self._loading = None if self._provider is None else _done(self._provider)

    async def _load(self, name: str) -> LocalModel:
        begin, served = time.monotonic(), PREFIX + name
        settings = self._settings.model_copy(update={"model_path": name, "served_model_name": served})
        provider = LocalModel(settings, lambda why: self._on_failure(provider, why), metrics=self._metrics)
        try:
            directory = await in_daemon_thread(partial(self._fetch, name, provider.progress))
            await self._unload()  # not before the new one is there
            loaded = await in_daemon_thread(partial(self._load_model, str(directory), settings, provider.progress))
        except Exception as error:
            log.warning("%s could not be loaded: %s", name, error)
            raise to_api_error(error, name) from error
        provider.begin(loaded)
        self._provider, self._used_at = provider, time.monotonic()
        log.info("%s is ready after %.1f s", served, time.monotonic() - begin)
        return provider

    def _fetch(self, name: str, progress: Progress) -> Path:
        sources, settings = self._sources or Sources(), self._settings
        bound = hub_snapshot.MemoryBound("HUGGINGFACE_MEMORY", settings.huggingface_memory)
        return hub_snapshot.fetch(name, progress.report, sources, bound)

    async def _unload(self) -> None:
        provider, self._provider = self._provider, None
        if provider is not None:
            log.info("%s was unloaded", provider.name)
            await provider.close(0.0)
            provider.loaded = None
            await asyncio.to_thread(gc.collect)

    async def _unload_when_idle(self) -> None:
        limit = self._settings.huggingface_idle
        while True:
            await asyncio.sleep(min(limit / 4, 10.0))
            if self._provider is not None and not self._is_idle(0.0):
                self._used_at = time.monotonic()
            elif self._provider is not None and self._is_idle(limit):
                self._name = self._loading = None
                await self._unload()

    def _is_idle(self, seconds: float) -> bool:
        """Whether nothing was asked of the model for so long, and it answers nobody."""
        engine = self._provider.loaded.engine if self._provider and self._provider.loaded else None
        if engine is not None and engine.failure is not None:
            return True
        is_quiet = engine is None or engine.num_running + engine.num_waiting == 0
        return is_quiet and time.monotonic() - self._used_at >= seconds

    async def close(self, timeout: float) -> None:
        for task in filter(None, (self._watch, self._loading)):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
        if self._provider is not None:
            await self._provider.close(timeout)


def _done(provider: LocalModel) -> "asyncio.Task[LocalModel]":
    async def known() -> LocalModel:
        return provider

    return asyncio.ensure_future(known())
