"""The chat models of a process: on demand, as many as fit, and gone when nobody asks."""

import asyncio
import shutil
import weakref
from pathlib import Path

import pytest
from chat_models import Gate, ask, memory_for, run, statuses, until

from checkpoints.model_folder import find_models
from checkpoints.progress import Progress
from config import Settings
from errors import InvalidRequest, ModelNotFound, UpstreamUnreachable
from schemas import ChatCompletionRequest
from serving.chat_models import ChatModels
from serving.loading import load
from serving.memory_budget import CPU, MachineMemory, MemoryBudget, on_devices
from serving.model_loader import ModelLoader, weights_bytes

COMMIT = "0" * 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """What a Hub that is out of reach has left here."""
    directory = tmp_path_factory.mktemp("hub")
    for name in ("one", "two"):
        folder = directory / f"models--acme--{name}"
        shutil.copytree(tiny_checkpoint, folder / "snapshots" / COMMIT)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
    return directory


# --- which there are


def test_all_models_of_a_folder_are_known_and_the_first_one_is_loaded(folder: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        models.start()
        assert statuses(models) == {"a": "loading", "b": "unloaded", "c": "unloaded", "d": "unloaded"}
        assert models.health[0] is False and models.health[1]["model"] == "a"
        await until(lambda: models.first.loaded)
        is_well, report = models.health
        assert is_well and [each["status"] for each in report["models"]] == ["ok", *["unloaded"] * 3]
        entry = models.first.entry
        assert entry.kind == "chat" and entry.size == (folder / "a" / "model.safetensors").stat().st_size
        assert {(await ask(models, name)).model for name in ("b", "B", "b")} == {"b"}

    run(scenario, models_dir=folder)


def test_model_path_may_name_several_and_the_folder_follows_without_repeating_them(folder: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        assert [model.name for model in models.all] == ["c", "a", "b", "d"]
        assert models.first.name == "c" and not models.is_alone
        assert (await models.model(str(folder / "a"))).name == "a"
        with pytest.raises(ModelNotFound, match="does not exist; this server has 'c', 'a', 'b', 'd'"):
            await models.model("e")

    run(scenario, model_path=f"{folder / 'c'}, {folder / 'a'}", models_dir=folder)


def test_a_model_that_comes_into_the_folder_is_served_and_one_that_goes_is_not(folder: Path, tmp_path: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        models._folder._scanned_at = -1e9  # it was looked through long ago
        shutil.copytree(folder / "a", tmp_path / "models" / "new")
        shutil.rmtree(tmp_path / "models" / "b")
        assert (await ask(models, "new")).choices
        assert set(statuses(models)) == {"a", "new"}

    for name in "ab":
        shutil.copytree(folder / name, tmp_path / "models" / name)
    run(scenario, models_dir=tmp_path / "models")


def test_a_model_that_moved_is_found_at_its_new_place_and_listed_once(folder: Path, tmp_path: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        for is_loaded in (True, False):
            old = await models.model("b")
            if is_loaded:
                await ask(models, "b")
            else:
                await old.unload()
            there = Path(old.path).parent / "further"
            there.mkdir()
            shutil.move(old.path, there / "b")
            models._folder._scanned_at = -1e9
            await models.refresh() if is_loaded else None
            assert (await ask(models, "b")).model == "b"
            assert (await models.model("b")).path == str(there / "b")
            assert [model.name for model in models.all] == ["a", "b"]
        shutil.rmtree(there / "b")
        await (await models.model("b")).unload()
        models._folder._scanned_at = -1e9
        with pytest.raises(ModelNotFound, match="this server has 'a'"):
            await models.model("b")

    for name in "ab":
        shutil.copytree(folder / name, tmp_path / "models" / name)
    run(scenario, models_dir=tmp_path / "models")


def test_a_name_that_two_models_had_is_the_others_when_one_goes(folder: Path, tmp_path: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        assert set(statuses(models)) == {"a", "x/m", "y/m"}
        shutil.rmtree(tmp_path / "x")
        models._folder._scanned_at = -1e9
        assert (await ask(models, "m")).model == "m"
        assert set(statuses(models)) == {"a", "m"}

    for name in ("a", "x/m", "y/m"):
        shutil.copytree(folder / "a", tmp_path / name)
    run(scenario, models_dir=tmp_path)


def test_all_who_ask_for_a_new_model_at_the_same_moment_find_it(folder: Path, tmp_path: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        models._folder._scanned_at = -1e9
        shutil.copytree(folder / "a", tmp_path / "models" / "new")
        answers = await asyncio.gather(*(ask(models, "new") for _ in range(6)))
        assert {answer.model for answer in answers} == {"new"}

    shutil.copytree(folder / "a", tmp_path / "models" / "a")
    run(scenario, models_dir=tmp_path / "models")


def test_what_is_no_model_or_cannot_be_read_does_not_hide_the_others(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a", tmp_path / "a")
    for name in ("mmproj-F16.gguf", "a-mmproj-f16.gguf", "a.imatrix.gguf", "a-imatrix.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    shutil.copytree(folder / "a", tmp_path / "deep")
    (tmp_path / "deep" / "config.json").write_text("[" * 100_000)
    assert [(model.name, model.kind) for model in find_models(tmp_path)] == [("a", "chat"), ("deep", "chat")]

    async def scenario(models: ChatModels) -> None:
        assert (await ask(models, "a")).choices
        with pytest.raises(InvalidRequest):
            await ask(models, "deep")

    run(scenario, models_dir=tmp_path)


# --- room for them


def test_the_least_recently_used_makes_room_and_answers_are_the_same_after_it_came_back(folder: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        answers = [await ask(models, name) for name in ("a", "b", "a", "c")]
        assert statuses(models) == {"a": "loaded", "b": "unloaded", "c": "loaded", "d": "unloaded"}
        again = await ask(models, "b")
        assert statuses(models)["a"] == "unloaded" and again.choices == answers[1].choices == answers[0].choices

    run(scenario, models_dir=folder, models_memory=memory_for(2, folder))


def test_a_model_that_answers_is_not_unloaded_and_one_that_nobody_uses_goes_before_it(folder: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        body = {"model": "a", "messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True, "stream": True}
        stream = models.first.stream_chat(ChatCompletionRequest.model_validate(body))
        await anext(stream)
        await ask(models, "b")
        await ask(models, "c")
        assert statuses(models)["a"] == "loaded" and statuses(models)["b"] == "unloaded"
        unloading = asyncio.create_task(models.first.unload())
        await asyncio.sleep(0.1)
        assert not unloading.done()
        assert len([chunk async for chunk in stream]) > 50, "its answer is whole"
        await unloading

    run(scenario, models_dir=folder, models_memory=memory_for(2, folder))


def test_many_clients_switch_between_more_models_than_fit(folder: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        expected = (await ask(models, "a")).choices[0].message

        async def client(number: int) -> None:
            for turn in range(4):
                answer = await ask(models, "abcd"[(number + turn) % 4])
                assert answer.choices[0].message == expected

        await asyncio.gather(*map(client, range(8)))
        assert sum(status == "loaded" for status in statuses(models).values()) <= 2

    run(scenario, models_dir=folder, models_memory=memory_for(2, folder), model_load_wait=100)


def test_two_that_are_asked_for_at_the_same_moment_never_take_more_than_there_is(folder: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        watched = asyncio.create_task(most_loaded(models))
        await asyncio.gather(*(ask(models, name) for name in "bcdb"))
        watched.cancel()
        assert sum(status == "loaded" for status in statuses(models).values()) == 1 and most == [1]

    most = [0]

    async def most_loaded(models: ChatModels) -> None:
        while True:
            most[0] = max(most[0], sum(model.loaded is not None for model in models.all))
            await asyncio.sleep(0)

    run(scenario, models_dir=folder, models_memory=memory_for(1, folder), model_load_wait=100)


def test_a_model_that_is_unloaded_while_it_waits_for_room_holds_up_no_other(folder: Path) -> None:
    gate = Gate()

    async def scenario(models: ChatModels) -> None:
        gate.is_open = True
        await ask(models, "a")
        gate.is_open = False
        second, third = (asyncio.create_task(ask(models, name)) for name in "bc")
        await until(lambda: gate.num_loads == 2)
        unloading = [asyncio.create_task((await models.model(name)).unload()) for name in "bc"]
        await asyncio.sleep(0.05)
        gate.is_open = True
        assert (await second).choices and (await third).choices
        await asyncio.gather(*unloading)
        assert (await ask(models, "d")).choices

    run(scenario, load=gate, models_dir=folder, models_memory=memory_for(1, folder), model_load_wait=100)


def test_weights_and_caches_beyond_the_budget_are_refused_by_name(folder: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        with pytest.raises(InvalidRequest, match="but MODELS_MEMORY is 0.00 GiB: raise it, or use a smaller model"):
            await ask(models, "a")

    run(scenario, models_dir=folder, models_memory=1000)

    async def with_cache(models: ChatModels) -> None:
        with pytest.raises(InvalidRequest, match="but MODELS_MEMORY is .* GiB: raise it, or lower KV_CACHE_MEMORY"):
            await ask(models, "a")

    run(with_cache, models_dir=folder, models_memory=memory_for(1, folder), kv_cache_memory=memory_for(1, folder))


def test_a_model_that_can_never_fit_pushes_no_other_out(folder: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        await ask(models, "a")
        taken = next(iter(models._pool.models.values())).footprint[CPU]
        models._memory.__dict__["budget"] = MemoryBudget({CPU: taken - 1})  # as if the machine had no more
        with pytest.raises(InvalidRequest, match=r"b takes .* GiB with its cache, but models may take"):
            await ask(models, "b")
        assert statuses(models)["a"] == "loaded"

    run(scenario, models_dir=folder)


def test_the_room_for_weights_is_that_of_the_type_they_will_have_and_of_a_draft_model_too(folder: Path) -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        own = Settings.model_validate({"dtype": dtype, "quantization": "none"})
        sizes[dtype] = weights_bytes(folder / "a", own)
        loader = ModelLoader(
            settings=own.model_copy(update={"draft_model_path": str(folder / "b")}),
            load=load,
            memory=MachineMemory(None, "cpu"),
        )
        assert loader._weights("a", folder / "a", Progress()) == 2 * sizes[dtype]
    assert sizes["float32"] == 2 * sizes["bfloat16"]


@pytest.mark.parametrize(
    ("device_map", "devices"), [("auto", {"cuda:0", "cuda:1"}), ("cuda", {"cuda:0"}), ("cuda:1", {"cuda:1"})]
)
def test_the_memory_is_that_of_the_devices_that_a_setting_names(device_map: str, devices: set[str]) -> None:
    assert set(on_devices(device_map, {"cuda:0": 100, "cuda:1": 100})) == devices


def test_a_model_that_was_unloaded_takes_no_memory_any_more(folder: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        loaded = await (await models.model("b")).wait()
        engine = weakref.ref(loaded.engine)
        del loaded
        await (await models.model("b")).unload()
        assert engine() is None

    run(scenario, models_dir=folder)


# --- when they go


def test_a_model_that_nobody_asks_is_unloaded_but_not_the_first_unless_a_setting_says_so(folder: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        models.start()
        await ask(models, "b")
        await until(lambda: statuses(models)["b"] == "unloaded")
        assert (await ask(models, "b")).choices
        await until(lambda: statuses(models)["a"] == "unloaded")

    run(scenario, models_dir=folder, model_idle=0.4)

    async def unset(models: ChatModels) -> None:
        await ask(models, "a")
        await ask(models, "b")
        assert models.first.expires_in == float("inf") and 500 < (await models.model("b")).expires_in <= 600

    run(unset, models_dir=folder)


@pytest.mark.parametrize(("keep_alive", "seconds"), [("10m", 600), (-1, float("inf")), ("1h30m", 5400), (90, 90)])
def test_keep_alive_says_how_long_a_model_stays(folder: Path, keep_alive: str | int, seconds: float) -> None:
    async def scenario(models: ChatModels) -> None:
        await ask(models, "b", keep_alive=keep_alive)
        assert (await models.model("b")).expires_in == pytest.approx(seconds, abs=5)
        await ask(models, "b", keep_alive=0)
        await until(lambda: statuses(models)["b"] == "unloaded")

    run(scenario, models_dir=folder)


@pytest.mark.parametrize("keep_alive", ["soon", "", "5 minutes", "5m5"])
def test_what_is_no_duration_is_refused_before_a_model_is_loaded(folder: Path, keep_alive: str) -> None:
    async def scenario(models: ChatModels) -> None:
        with pytest.raises(InvalidRequest, match="is not a duration: send seconds, or a text such as 5m"):
            await ask(models, "b", keep_alive=keep_alive)
        assert statuses(models)["b"] == "unloaded"

    run(scenario, models_dir=folder)


# --- of the Hub


def test_a_model_of_the_hub_answers_under_its_name_beside_others(cache: Path, tiny_checkpoint: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        both = await asyncio.gather(ask(models, "huggingface/acme/one"), ask(models, "huggingface/acme/one"))
        assert {answer.model for answer in both} == {"huggingface/acme/one"}
        other = await ask(models, "huggingface/acme/two")
        assert other.model == "huggingface/acme/two" and other.choices == both[0].choices == both[1].choices
        listed = statuses(models)
        assert listed == {tiny_checkpoint.name: "unloaded", **dict.fromkeys(list(listed)[1:], "loaded")}
        await (await models.model("huggingface/acme/one")).unload()
        assert set(statuses(models)) == {tiny_checkpoint.name, "huggingface/acme/two"}

    run(scenario, hub=cache, model_path=str(tiny_checkpoint))


def test_a_model_of_the_hub_takes_no_name_that_may_mean_another_one(cache: Path, tiny_checkpoint: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        await ask(models, "huggingface/acme/one")
        assert models.find("one") is None and models.find("acme/one") is None

    run(scenario, hub=cache, model_path=str(tiny_checkpoint))


@pytest.mark.parametrize(
    ("model", "error", "status"),
    [
        ("huggingface/acme/unknown", UpstreamUnreachable, 502),
        ("huggingface/../../etc/passwd", ModelNotFound, 404),
        ("huggingface//etc/passwd", ModelNotFound, 404),
        ("huggingface/acme/..", ModelNotFound, 404),
        ("huggingface/alone", ModelNotFound, 404),
    ],
)
def test_what_is_not_there_is_said_at_once_and_no_path_is_a_name(
    cache: Path, tiny_checkpoint: Path, model: str, error: type[Exception], status: int
) -> None:
    async def scenario(models: ChatModels) -> None:
        for _ in range(2):
            with pytest.raises(error) as refusal:
                await ask(models, model)
            assert getattr(refusal.value, "status", None) == status
        assert len(models.all) == 1

    run(scenario, hub=cache, model_path=str(tiny_checkpoint))


def test_a_model_beyond_the_bound_is_refused(cache: Path, tiny_checkpoint: Path) -> None:
    async def scenario(models: ChatModels) -> None:
        with pytest.raises(InvalidRequest, match="HUGGINGFACE_MEMORY"):
            await ask(models, "huggingface/acme/one")

    run(scenario, hub=cache, model_path=str(tiny_checkpoint), huggingface_memory=1000)
