"""Loads that fail, take long or are left alone, and engines that die: of the chat models of a process."""

import asyncio
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from chat_models import Gate, ask, fail, memory_for, run, statuses, until

from checkpoints.progress import Progress
from config import Settings
from errors import EngineFailure, InvalidRequest, ModelLoading, Unavailable
from schemas import ChatCompletionRequest
from serving.chat_models import ChatModels
from serving.loading import LoadedModel, load


def test_who_cannot_wait_is_told_how_far_it_is_and_all_others_share_one_load(folder: Path) -> None:
    gate = Gate()

    async def scenario(models: ChatModels) -> None:
        stream = asyncio.create_task(ask(models, "b", stream=True))  # waits as long as it takes
        await until(lambda: gate.num_loads)
        with pytest.raises(ModelLoading, match=r"b is loading \(loading weights: 25 %\); try again later") as refusal:
            await ask(models, "b")
        assert refusal.value.status == 503 and refusal.value.retry_after
        gate.is_open = True
        assert (await stream).choices and gate.num_loads == 1

    run(scenario, load=gate, models_dir=folder, model_load_wait=0.1)


def test_two_models_whose_clients_come_again_do_not_push_each_other_out_for_ever(folder: Path) -> None:
    loads: list[str] = []

    def slow(path: str, settings: Settings, progress: Progress) -> LoadedModel:
        loads.append(path)
        time.sleep(0.3)
        return load(path, settings, progress)

    async def ask_until_answered(models: ChatModels, name: str) -> None:
        while True:
            try:
                await ask(models, name)
                return
            except ModelLoading:
                await asyncio.sleep(0.7)  # longer than the other model takes to load

    async def scenario(models: ChatModels) -> None:
        await asyncio.gather(*(ask_until_answered(models, name) for name in "ab"))
        assert len(loads) <= 3

    run(scenario, load=slow, models_dir=folder, models_memory=memory_for(1, folder), model_load_wait=0)


def test_a_load_that_fails_is_told_and_tried_again_later_and_harms_no_other_model(folder: Path) -> None:
    gate = Gate(num_failures=1)
    gate.is_open = True

    async def scenario(models: ChatModels) -> None:
        for _ in range(2):
            with pytest.raises(InvalidRequest, match=r"The file is broken\."):
                await ask(models, "b")
        failed = await models.model("b")
        assert gate.num_loads == 1 and failed.entry.status == "failed" and failed.entry.error == "The file is broken."
        assert (await ask(models, "c")).choices
        failed._failed_at = -1e9  # long ago
        assert (await ask(models, "b")).choices and failed.entry.error is None

    run(scenario, load=gate, models_dir=folder)


def test_a_failed_load_leaves_no_engine_behind(folder: Path) -> None:
    engines: list[weakref.ref[Any]] = []

    def noted(path: str, settings: Settings, progress: Progress) -> LoadedModel:
        loaded = load(path, settings, progress)
        engines.append(weakref.ref(loaded.engine))
        return loaded

    async def scenario(models: ChatModels) -> None:
        with pytest.raises(InvalidRequest, match="adapter"):
            await ask(models, "a")
        assert len(engines) == 1 and engines[0]() is None
        assert (await ask(models, "b")).choices, "it has no adapters"

    run(scenario, load=noted, models_dir=folder, lora_adapters={"x": str(folder / "none")})


def test_a_model_that_was_served_and_cannot_be_loaded_again_does_not_end_the_server(tiny_checkpoint: Path) -> None:
    gate, ends = Gate(), list[str]()
    gate.is_open = True

    async def scenario() -> None:
        settings = Settings(model_path=str(tiny_checkpoint), max_model_len=128, dtype="float32")
        models = ChatModels(settings, gate, on_failure=ends.append)
        await ask(models, models.first.name)
        await models.first.unload()
        gate.num_failures = 2
        with pytest.raises(InvalidRequest, match=r"The file is broken\."):
            await ask(models, models.first.name)
        assert ends == []
        models.first._failed_at = -1e9
        assert (await ask(models, models.first.name)).choices
        await models.close(0)

    asyncio.run(scenario())


def test_an_old_copy_that_fails_does_not_touch_the_new_one(folder: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        body = {"model": "a", "messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True, "stream": True}
        stream = models.first.stream_chat(ChatCompletionRequest.model_validate(body))
        await anext(stream)
        old = models.first.loaded
        assert old is not None
        unloading = asyncio.create_task(models.first.unload())
        await asyncio.sleep(0)
        await ask(models, "a")
        old.engine.runner.run = fail
        with pytest.raises(EngineFailure):
            async for _ in stream:
                pass
        await unloading
        assert models.first.status == "loaded" and models.first.loaded is not old and models.first.failure is None

    run(scenario, models_dir=folder)


def test_a_client_that_leaves_while_its_model_loads_ends_nothing(folder: Path) -> None:
    gate = Gate()

    async def scenario(models: ChatModels) -> None:
        left = asyncio.create_task(ask(models, "b"))
        await until(lambda: gate.num_loads)
        left.cancel()
        unloading = asyncio.create_task((await models.model("b")).unload())
        await asyncio.sleep(0.05)
        gate.is_open = True
        await unloading
        assert statuses(models)["b"] == "unloaded"
        assert (await ask(models, "b")).choices and gate.num_loads == 2

    run(scenario, load=gate, models_dir=folder)


@pytest.mark.parametrize("next_name", ["a", "b"])
def test_a_model_whose_engine_died_is_in_nobodys_way_and_is_loaded_anew(folder: Path, next_name: str) -> None:
    async def scenario(models: ChatModels) -> None:
        first = await models.model("a")
        (await first.wait()).engine.runner.run = fail
        with pytest.raises(EngineFailure):
            await ask(models, "a")
        await until(lambda: first.loaded is None)
        first._failed_at = -1e9
        assert (await ask(models, next_name)).choices

    run(scenario, models_dir=folder)


def test_closing_refuses_what_waits_for_a_load(folder: Path) -> None:
    gate = Gate()

    async def scenario(models: ChatModels) -> None:
        waiting = asyncio.create_task(ask(models, "b"))
        await until(lambda: gate.num_loads)
        await models.close(0)
        with pytest.raises(Unavailable, match="shutting down"):
            await waiting
        gate.is_open = True

    run(scenario, load=gate, models_dir=folder)
