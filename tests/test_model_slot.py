"""Models that load once for many, make room for each other, and go when nobody asks: with fakes, without a patch."""

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from errors import APIError, ModelLoading, Unavailable
from serving.model_pool import MAX_LOADING, ModelPool
from serving.model_slot import ModelSlot, in_daemon_thread


@dataclass
class Model:
    """It takes `size`, and notes the timeout with which it was closed."""

    name: str
    size: int = 1
    closed_with: list[float | None] = field(default_factory=list)


@dataclass
class Loader:
    """Loads when it is let, and fails as often as it is told; counts its loads."""

    model: Model
    num_failures: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    num_loads: int = 0

    async def load(self) -> Model:
        self.num_loads += 1
        await self.gate.wait()
        if self.num_loads <= self.num_failures:
            raise ValueError("broken")
        return self.model

    @property
    def ready(self) -> "Loader":
        self.gate.set()
        return self


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def within_seconds() -> None:
        async with asyncio.timeout(10):
            await scenario()

    asyncio.run(within_seconds())


async def until(is_true: Callable[[], object]) -> None:
    while not is_true():
        await asyncio.sleep(0.005)


def test_all_who_wait_share_one_load_and_one_who_leaves_does_not_end_it() -> None:
    async def scenario() -> None:
        loader = Loader(Model("a"))
        slot = ModelSlot("a", loader.load)
        slot.start()
        waiting = [asyncio.create_task(slot.wait()) for _ in range(5)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        assert slot.is_loading and slot.model is None
        loader.gate.set()
        assert all(model is loader.model for model in await asyncio.gather(*waiting[1:]))
        slot.start()
        assert loader.num_loads == 1 and slot.model is loader.model and not slot.is_loading and not slot.has_failed

    run(scenario)


def test_patience_ends_with_a_request_to_come_again_and_the_load_goes_on() -> None:
    async def scenario() -> None:
        loader = Loader(Model("a"))
        slot = ModelSlot("acme/a", loader.load)
        slot.start()
        with pytest.raises(ModelLoading, match=r"acme/a is loading; try again later\."):
            await slot.wait(0.01)
        loader.gate.set()
        assert await slot.wait(1) is loader.model and loader.num_loads == 1

    run(scenario)


def test_a_failure_is_remembered_until_the_next_start() -> None:
    async def scenario() -> None:
        loader = Loader(Model("a"), num_failures=1).ready
        slot = ModelSlot("a", loader.load)
        slot.start()
        for _ in range(2):
            with pytest.raises(ValueError, match="broken"):
                await slot.wait()
        assert slot.has_failed and slot.model is None and loader.num_loads == 1
        slot.start()
        assert await slot.wait() is loader.model and not slot.has_failed

    run(scenario)


def test_who_waits_for_a_load_that_is_cancelled_hears_of_the_shutdown() -> None:
    async def scenario() -> None:
        slot = ModelSlot("a", Loader(Model("a")).load)
        slot.start()
        waiting = asyncio.create_task(slot.wait())
        await asyncio.sleep(0)
        await slot.cancel()
        with pytest.raises(Unavailable, match="shutting down"):
            await waiting
        await slot.cancel()

    run(scenario)


def test_a_model_in_use_is_not_idle() -> None:
    async def scenario() -> None:
        slot = ModelSlot("a", Loader(Model("a")).ready.load)
        slot.start()
        async with slot.using() as model:
            assert model.name == "a" and slot.num_users == 1 and not slot.is_idle(0.0)
        assert slot.num_users == 0 and slot.is_idle(0.0) and not slot.is_idle(60.0)

    run(scenario)


def test_work_in_a_daemon_thread_returns_raises_and_is_left_alone_when_cancelled() -> None:
    release, names = threading.Event(), []

    def slow() -> None:
        names.append(threading.current_thread().daemon)
        release.wait()

    async def scenario() -> None:
        assert await in_daemon_thread(lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            await in_daemon_thread(lambda: 1 // 0)
        task = asyncio.create_task(in_daemon_thread(slow))
        await until(lambda: names)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        release.set()
        assert names == [True]

    run(scenario)


class Models:
    """A pool of models that take three units at most, and how each of them is loaded."""

    def __init__(self, capacity: int = 3, idle_limit: float | None = None) -> None:
        self.loaders: dict[str, Loader] = {}
        self.pool: ModelPool[str, Model, int] = ModelPool(
            size_of=lambda model: model.size,
            holds=lambda sizes: sum(sizes) <= capacity,
            close=self.close,
            reclaim=self.reclaim,
            idle_limit=idle_limit,
        )

    async def reclaim(self) -> None:
        pass

    async def close(self, model: Model, timeout: float | None) -> None:
        model.closed_with.append(timeout)

    def slot(self, name: str, size: int = 1, num_failures: int = 0, is_ready: bool = True) -> ModelSlot[Model]:
        loader = self.loaders.setdefault(name, Loader(Model(name, size), num_failures))
        if is_ready:
            loader.gate.set()

        async def load() -> Model:
            async with self.pool.room_for(size):
                return await loader.load()

        return self.pool.slot(name, load)

    async def get(self, name: str, size: int = 1, num_failures: int = 0) -> Model:
        return await self.slot(name, size, num_failures).wait()


def test_the_least_recently_used_models_make_room() -> None:
    async def scenario() -> None:
        models = Models()
        for name in "abc":
            await models.get(name)
        await models.get("a")
        await models.get("d", size=2)
        assert list(models.pool.models) == ["a", "d"]
        assert models.loaders["b"].model.closed_with == models.loaders["c"].model.closed_with == [None]
        assert models.loaders["a"].model.closed_with == []
        await models.get("too large", size=9)
        assert list(models.pool.models) == ["too large"], "its own bound is the caller's to check"
        await models.get("a")
        assert models.loaders["a"].num_loads == 2

    run(scenario)


def test_a_model_that_makes_room_lets_its_users_finish() -> None:
    async def scenario() -> None:
        models = Models(capacity=1)
        async with models.slot("a").using() as first:
            second = models.slot("b")
            await until(lambda: "a" not in models.pool.slots)
            await asyncio.sleep(0.05)
            assert first.closed_with == [] and second.is_loading and models.loaders["b"].num_loads == 0
        assert (await second.wait()).name == "b" and first.closed_with == [None]

    run(scenario)


def test_one_model_loads_at_a_time_and_not_too_many_wait_for_that() -> None:
    async def scenario() -> None:
        models = Models(capacity=99)
        slots = [models.slot(str(number), is_ready=False) for number in range(MAX_LOADING)]
        await asyncio.sleep(0.01)
        assert [models.loaders[str(number)].num_loads for number in range(3)] == [1, 0, 0]
        with pytest.raises(Unavailable, match=f"{MAX_LOADING} models are loading"):
            models.slot("one more")
        assert models.slot("0") is slots[0], "one that loads already is no more"
        for loader in models.loaders.values():
            loader.gate.set()
        assert [(await slot.wait()).name for slot in slots] == [str(number) for number in range(MAX_LOADING)]

    run(scenario)


def test_a_failed_load_pushes_nothing_else_out_and_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        models = Models()
        first = await models.get("a")
        with pytest.raises(ValueError, match="broken"):
            await models.get("b", num_failures=1)
        assert list(models.pool.slots) == ["a"] and first.closed_with == []
        assert (await models.get("b")).name == "b"

    run(scenario)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "b could not be loaded: broken"
    ]


def test_a_model_is_unloaded_when_idle_and_neither_while_in_use_nor_when_told_to_stay() -> None:
    async def scenario() -> None:
        models = Models(idle_limit=0.05)
        idle, _ = await models.get("idle"), await models.get("stays")
        models.slot("stays").idle_limit = math.inf
        async with models.slot("used").using() as used:
            await until(lambda: idle.closed_with)
            await asyncio.sleep(0.4)
            assert list(models.pool.models) == ["stays", "used"]
        await until(lambda: used.closed_with)
        assert models.pool.expires_in("stays") == math.inf
        models.slot("stays").idle_limit = 0
        await until(lambda: not models.pool.slots)
        assert (await models.get("idle")).name == "idle" and models.loaders["idle"].num_loads == 2
        await models.pool.close(0)

    run(scenario)


def test_a_model_that_nobody_uses_makes_room_before_one_that_was_used_earlier() -> None:
    async def scenario() -> None:
        models = Models(capacity=2)
        async with models.slot("a").using() as used:
            await models.get("b")
            await models.get("c")
            assert list(models.pool.models) == ["a", "c"] and used.closed_with == []

    run(scenario)


def test_memory_that_is_about_to_be_free_is_waited_for() -> None:
    async def scenario() -> None:
        models = Models(capacity=1)
        async with models.slot("a").using() as first:
            unloading = asyncio.create_task(models.pool.unload("a"))
            second = models.slot("b")
            await asyncio.sleep(0.05)
            assert second.is_loading and models.loaders["b"].num_loads == 0 and not unloading.done()
        assert (await second.wait()).name == "b" and first.closed_with == [None]
        await unloading

    run(scenario)


def test_a_model_that_is_dropped_is_gone_at_once_and_another_of_its_name_is_not() -> None:
    async def scenario() -> None:
        models = Models()
        model = await models.get("a")
        models.pool.drop("a", Model("a"))
        assert list(models.pool.slots) == ["a"]
        models.pool.drop("a", model)
        assert not models.pool.slots
        await until(lambda: model.closed_with)
        models.pool.drop("a", model)
        await models.get("a")
        assert models.loaders["a"].num_loads == 2

    run(scenario)


def test_closing_ends_loads_closes_models_with_the_timeout_and_refuses_others() -> None:
    async def scenario() -> None:
        models = Models()
        model = await models.get("a")
        waiting = asyncio.create_task(models.slot("b", is_ready=False).wait())
        await asyncio.sleep(0)
        await models.pool.close(7.0)
        assert model.closed_with == [7.0]
        with pytest.raises(Unavailable):
            await waiting
        for name in ("a", "b", "c"):
            with pytest.raises(APIError, match="shutting down"):
                models.slot(name)

    run(scenario)
