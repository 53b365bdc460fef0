"""A second chat model beside the main one: on demand, one at a time, and gone when nobody asks."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from api.streaming import collect_chat
from checkpoints.sources import Sources
from config import Settings
from engine.batch import Batch
from errors import APIError, EngineFailure, InvalidRequest, ModelNotFound, Unavailable, UpstreamUnreachable
from schemas import ChatCompletionRequest
from serving.hub import SETTLING, HubModels
from serving.loading import load

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


def with_models(cache: Path, scenario: Callable[[HubModels], Any], **settings: Any) -> None:
    async def run() -> None:
        own = Settings(_env_file=None, max_model_len=128, dtype="float32", **settings)
        models = HubModels(own, load, Sources(endpoint=None, hub_cache=cache))
        try:
            await scenario(models)
        finally:
            await models.close(1)

    asyncio.run(run())


async def ask(models: HubModels, model: str) -> Any:
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
    model = await models.model(model)
    return await collect_chat(model.stream_chat(ChatCompletionRequest.model_validate(body)))


def test_a_model_of_the_hub_answers_under_its_name_and_makes_room_for_the_next(cache: Path) -> None:
    async def scenario(models: HubModels) -> None:
        both = await asyncio.gather(ask(models, "huggingface/acme/one"), ask(models, "huggingface/acme/one"))
        assert {answer.model for answer in both} == {"huggingface/acme/one"}
        assert both[0].choices == both[1].choices
        first = await models.model("huggingface/acme/one")
        with pytest.raises(Unavailable):  # somebody may be about to ask it
            await models.model("huggingface/acme/two")
        await asyncio.sleep(SETTLING)
        other = await ask(models, "huggingface/acme/two")
        assert other.model == "huggingface/acme/two" and other.choices == both[0].choices
        assert first.loaded is None

    with_models(cache, scenario)


def test_a_model_that_answers_is_not_pushed_out(cache: Path) -> None:
    async def scenario(models: HubModels) -> None:
        model = await models.model("huggingface/acme/one")
        body = {"model": "huggingface/acme/one", "messages": [{"role": "user", "content": "Hi"}], "ignore_eos": True}
        stream = model.stream_chat(ChatCompletionRequest.model_validate(body))
        await anext(stream)
        with pytest.raises(Unavailable):
            await models.model("huggingface/acme/two")
        await stream.aclose()

    with_models(cache, scenario)


def fail(batch: Batch) -> None:
    raise torch.AcceleratorError("an illegal access")


@pytest.mark.parametrize("next_name", ["one", "two"])
def test_a_model_whose_engine_died_is_in_nobodys_way_and_is_loaded_anew(cache: Path, next_name: str) -> None:
    async def scenario(models: HubModels) -> None:
        first = await models.model("huggingface/acme/one")
        assert first.loaded is not None
        first.loaded.engine.runner.run = fail
        with pytest.raises(EngineFailure):
            await ask(models, "huggingface/acme/one")
        assert (await ask(models, f"huggingface/acme/{next_name}")).choices
        assert first.loaded is None, "its memory is given back"
        assert await models.model(f"huggingface/acme/{next_name}") is not first

    with_models(cache, scenario)


def test_a_name_that_does_not_exist_pushes_nothing_out(cache: Path) -> None:
    async def scenario(models: HubModels) -> None:
        model = await models.model("huggingface/acme/one")
        await asyncio.sleep(SETTLING)
        both = await asyncio.gather(
            models.model("huggingface/acme/none"), models.model("huggingface/acme/none"), return_exceptions=True
        )
        assert all(isinstance(error, UpstreamUnreachable) for error in both)
        assert model.loaded is not None and await models.model("huggingface/acme/one") is model

    with_models(cache, scenario)


def test_a_model_that_nobody_asks_is_unloaded(cache: Path) -> None:
    async def scenario(models: HubModels) -> None:
        model = await models.model("huggingface/acme/one")
        for _ in range(100):
            if model.loaded is None:
                break
            await asyncio.sleep(0.05)
        assert model.loaded is None
        assert (await ask(models, "huggingface/acme/one")).choices

    with_models(cache, scenario, huggingface_idle=0.4)


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
    cache: Path, model: str, error: type[APIError], status: int
) -> None:
    async def scenario(models: HubModels) -> None:
        for _ in range(2):
            with pytest.raises(error) as refusal:
                await models.model(model)
            assert refusal.value.status == status

    with_models(cache, scenario)


def test_a_model_beyond_the_bound_is_refused(cache: Path) -> None:
    async def scenario(models: HubModels) -> None:
        with pytest.raises(InvalidRequest, match="HUGGINGFACE_MEMORY"):
            await models.model("huggingface/acme/one")

    with_models(cache, scenario, huggingface_memory=1000)
