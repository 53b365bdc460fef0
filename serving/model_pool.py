"""ModelPool: the slots of several models, of which the least recently used make room for a new one."""

import asyncio
import logging
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
MAX_LOADING = 8  # models


class ModelPool(Generic[K, M]):
    """Models by key, of which `str` gives the name; they are loaded one at a time, within a capacity."""

    def __init__(
        self,
        *,
        capacity: int,
        size_of: Callable[[M], int],
        close: Callable[[M, float | None], Awaitable[None]],
        is_busy: Callable[[M], bool] = lambda model: False,
        idle_limit: float | None = None,
    ) -> None:
        """capacity: of all models together, in the unit of `size_of`; `close` gets the seconds that requests may take
        to finish, or None; idle_limit: seconds without a request after which a model is unloaded, unless `is_busy`."""
        self.slots: OrderedDict[K, ModelSlot[M]] = OrderedDict()  # the least recently used first
        self._capacity, self._size_of, self._close_model = capacity, size_of, close
        self._is_busy, self._idle_limit = is_busy, idle_limit
        self._one_at_a_time = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._unloading: set[asyncio.Task[None]] = set()
        self._is_closing = False

    def slot(self, key: K, load: Callable[[], Coroutine[Any, Any, M]]) -> ModelSlot[M]:
        """Returns the model's slot, now the most recently used one; a model that is not there begins to load.

        `load` waits for `room_for` the model. Raises Unavailable while closing, or while too many models load.
        """
        if self._is_closing:
            raise Unavailable("The server is shutting down.", retry_after=10)
        slot = self.slots.get(key)
        if slot is None:
            slot = self._add(key, load)
        self.slots.move_to_end(key)
        slot.touch()
        return slot

    def _add(self, key: K, load: Callable[[], Coroutine[Any, Any, M]]) -> ModelSlot[M]:
        num_loading = sum(slot.is_loading for slot in self.slots.values())
        if num_loading >= MAX_LOADING:
            raise Unavailable(f"{num_loading} models are loading; try again later.", retry_after=5)
        slot = self.slots[key] = ModelSlot(str(key), load)
        slot.start().add_done_callback(partial(self._forget_failed, key))
        if self._watch is None and self._idle_limit is not None:
            self._watch = asyncio.create_task(self._unload_idle(self._idle_limit))
        return slot

    def _forget_failed(self, key: K, task: "asyncio.Task[M]") -> None:
        """The next request for a model that could not be loaded tries again."""
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.warning("%s could not be loaded: %s", key, error.__cause__ or error)
        if task.cancelled() or error is not None:
            self.slots.pop(key, None)

    @property
    def models(self) -> dict[K, M]:
        """The loaded models, the least recently used first."""
        return {key: slot.model for key, slot in self.slots.items() if slot.model is not None}

    @asynccontextmanager
    async def room_for(self, size: int) -> AsyncIterator[None]:
        """Inside the block a model of that size can be loaded, and no other one is loaded meanwhile.

        The least recently used models are unloaded until it fits; their requests are finished first.
        """
        async with self._one_at_a_time:
            while (models := self.models) and sum(map(self._size_of, models.values())) + size > self._capacity:
                await self.unload(next(iter(models)))
            yield

    async def unload(self, key: K) -> None:
        """Forgets a loaded model at once, and closes it when its users have finished."""
        await self._finish(self._remove(key))

    def drop(self, key: K, model: M) -> None:
        """Forgets a model that has failed, so that the next request loads it anew, and closes it in the background."""
        if key in self.slots and self.slots[key].model is model:
            task = asyncio.create_task(self._finish(self._remove(key)))
            self._unloading.add(task)
            task.add_done_callback(self._unloading.discard)

    def _remove(self, key: K) -> ModelSlot[M]:
        log.info("%s was unloaded", key)
        return self.slots.pop(key)

    async def _finish(self, slot: ModelSlot[M]) -> None:
        while slot.num_users:
            await asyncio.sleep(0.02)
        if slot.model is not None:
            await self._close_model(slot.model, None)

    async def _unload_idle(self, limit: float) -> None:
        while True:
            await asyncio.sleep(min(limit / 4, 10.0))
            for key, slot in list(self.slots.items()):
                if slot.model is None or self.slots.get(key) is not slot:
                    continue
                if self._is_busy(slot.model):
                    slot.touch()
                elif slot.is_idle(limit):
                    await self.unload(key)

    async def close(self, timeout: float) -> None:
        """Ends the loads in progress, lets requests finish for `timeout` seconds, and refuses new ones."""
        self._is_closing = True
        if self._watch is not None:
            self._watch.cancel()
        await asyncio.gather(*[slot.cancel() for slot in self.slots.values()])
        await asyncio.gather(*[self._close_model(model, timeout) for model in self.models.values()])
