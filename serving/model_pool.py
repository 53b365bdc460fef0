"""ModelPool: the slots of several models, of which the least recently used make room for a new one."""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Hashable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Generic, TypeVar

from errors import Unavailable
from serving.model_slot import ModelSlot

log = logging.getLogger(__name__)
K = TypeVar("K", bound=Hashable)
M = TypeVar("M")
S = TypeVar("S")  # a model's size
MAX_LOADING = 8  # models
WATCH = 0.25  # seconds between two looks for models that are idle


class ModelPool(Generic[K, M, S]):
    """Models by key, of which `str` gives the name; they are loaded one at a time, and only as many as fit."""

    def __init__(
        self,
        *,
        size_of: Callable[[M], S],
        holds: Callable[[list[S]], bool],
        close: Callable[[M, float | None], Awaitable[None]],
        reclaim: Callable[[], Awaitable[None]],
        idle_limit: float | None = None,
    ) -> None:
        """holds: whether models of these sizes fit together; `close` gets the seconds that requests may take to
        finish, or None; `reclaim` frees the memory of models that are forgotten.

        idle_limit: seconds without a user after which a model is unloaded, if its slot has no limit of its own; None:
        it stays.
        """
        self.slots: OrderedDict[K, ModelSlot[M]] = OrderedDict()  # the least recently used first
        self.idle_limit = idle_limit
        self._size_of, self._holds, self._close_model, self._reclaim = size_of, holds, close, reclaim
        self._one_at_a_time = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._leaving: dict[ModelSlot[M], asyncio.Task[None]] = {}
        self._reserved: dict[asyncio.Task[Any], S] = {}  # of loads that have had their turn, and have not ended yet
        self._is_closing = False

    def slot(
        self, key: K, load: Callable[[], Coroutine[Any, Any, M]], progress: Callable[[], str] = lambda: ""
    ) -> ModelSlot[M]:
        """Returns the model's slot, now the most recently used one; a model that is not there begins to load.

        `load` waits for `room_for` the model. Raises Unavailable while closing, or while too many models load.
        """
        if self._is_closing:
            raise Unavailable("The server is shutting down.", retry_after=10)
        slot = self.slots.get(key)
        if slot is None:
            slot = self._add(key, load, progress)
        self.slots.move_to_end(key)
        slot.touch()
        return slot

    def _add(self, key: K, load: Callable[[], Coroutine[Any, Any, M]], progress: Callable[[], str]) -> ModelSlot[M]:
        num_loading = sum(slot.is_loading for slot in (*self.slots.values(), *self._leaving))
        if num_loading >= MAX_LOADING:
            raise Unavailable(f"{num_loading} models are loading; try again later.", retry_after=5)
        slot = self.slots[key] = ModelSlot(str(key), load, progress)
        slot.start().add_done_callback(partial(self._forget_failed, key, slot))
        if self._watch is None:
            self._watch = asyncio.create_task(self._unload_idle())
        return slot

    def _forget_failed(self, key: K, slot: ModelSlot[M], task: "asyncio.Task[M]") -> None:
        """The next request for a model that could not be loaded tries again."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.warning("%s could not be loaded: %s", key, error.__cause__ or error)
        if slot.has_failed and self.slots.get(key) is slot:
            del self.slots[key]

    @property
    def models(self) -> dict[K, M]:
        """The loaded models, the least recently used first."""
        return {key: slot.model for key, slot in self.slots.items() if slot.model is not None}

    def expires_in(self, key: K) -> float:
        """Returns the seconds until a loaded model is unloaded if nobody uses it; infinity for one that stays."""
        return self.slots[key].expires_in(self.idle_limit) if key in self.slots else math.inf

    # --- room

    @asynccontextmanager
    async def room_for(self, size: S) -> AsyncIterator[None]:
        """Inside the block a model of that size can be loaded, and no other one is loaded meanwhile.

        Models are unloaded until it fits: the least recently used one that nobody uses, or else the least recently
        used one when its requests have finished. One whose clients were told to come again is left to them for a
        while, so that two such models do not push each other out for ever. The room stays reserved until the task that
        asked for it ends.
        """
        async with self._one_at_a_time:
            if reclaiming := [task for slot, task in self._leaving.items() if slot.is_empty]:
                await asyncio.wait(reclaiming)
            while not self._holds([*map(self._size_of, self._present), *self._reserved.values(), size]):
                waiting = [task for slot, task in self._leaving.items() if slot.model is not None]
                if waiting or self._reserved:  # never for a model that loads: that may be this one
                    await asyncio.wait({*waiting, *self._reserved}, return_when=asyncio.FIRST_COMPLETED)
                    await asyncio.sleep(0)  # the callbacks of what has ended come first
                elif (key := self._next_to_go()) is not None:
                    await self.unload(key)
                elif self.models:
                    await asyncio.sleep(WATCH)
                else:
                    break  # whether it fits alone is the caller's to check
            yield
            if (task := asyncio.current_task()) is not None:
                self._reserved[task] = size
                task.add_done_callback(self._reserved.pop)

    def _next_to_go(self) -> K | None:
        """Returns the model that makes room; None for none, or while the next one is awaited."""
        models, now = self.models, time.monotonic()
        unused = [key for key in models if not self.slots[key].num_users]
        if any(self.slots[key].awaited_until > now for key in unused):
            return next((key for key in unused if self.slots[key].awaited_until <= now), None)
        return next(iter([*unused, *models]), None)

    @property
    def _present(self) -> list[M]:
        """The models that take memory: the loaded ones, and those whose last requests are not finished."""
        leaving = [slot.model for slot in self._leaving if slot.model is not None]
        return [*self.models.values(), *leaving]

    async def unload(self, key: K) -> None:
        """Forgets a model at once, and closes it when its users have finished; one that loads, when it is loaded."""
        if key in self.slots:
            await asyncio.shield(self._remove(key))

    def drop(self, key: K, model: M) -> None:
        """Forgets a model that has failed, so that the next request loads it anew, and closes it in the background."""
        if key in self.slots and self.slots[key].model is model:
            self._remove(key)

    def _remove(self, key: K) -> "asyncio.Task[None]":
        slot = self.slots.pop(key)
        task = self._leaving[slot] = asyncio.create_task(self._finish(key, slot))
        task.add_done_callback(lambda _: self._leaving.pop(slot))
        return task

    async def _finish(self, key: K, slot: ModelSlot[M]) -> None:
        await slot.settled()
        while slot.num_users:
            await asyncio.sleep(0.02)
        if slot.model is not None:
            await self._close_model(slot.model, None)
            slot.clear()
            await self._reclaim()
            log.info("%s was unloaded", key)

    async def _unload_idle(self) -> None:
        while True:
            await asyncio.sleep(WATCH)
            for key, slot in list(self.slots.items()):
                if slot.model is not None and not slot.num_users and not slot.expires_in(self.idle_limit):
                    self._remove(key)

    async def close(self, timeout: float) -> None:
        """Ends the loads in progress, lets requests finish for `timeout` seconds, and refuses new ones."""
        self._is_closing = True
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.gather(*[slot.cancel() for slot in (*self.slots.values(), *self._leaving)])
        leaving = [slot.model for slot in self._leaving if slot.model is not None]
        await asyncio.gather(*[self._close_model(model, timeout) for model in (*self.models.values(), *leaving)])
