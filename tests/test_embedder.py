"""The embedder: texts of several requests share batches, and one that fails, leaves or hangs harms no other."""

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import byte_tokenizer
from process import until
from tiny_encoders import TEXTS, close, encoder, save_tiny_encoder
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
)

from engine.embedding.argument_errors import ArgumentError, TextTooLong
from engine.embedding.embedder import CHARACTERS, CHARACTERS_PER_TOKEN, Embedder, EmbedderInfo, Embeddings
from engine.embedding.loader import load_embedder
from engine.embedding.text_models import TaskPrompt
from errors import (
    EngineFailure,
    ModelLoadError,
    Overloaded,
    Unavailable,
)


class Echo:
    """Stands in for a model: a text's vector is its length; it waits until it may go on."""

    max_length = 50
    tokenizer = None

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.tokenized: list[str] = []
        self.may_go_on = threading.Event()
        self.fails_on = "never"

    def lengths(self, texts: Sequence[str], prompt: TaskPrompt) -> list[int]:
        self.tokenized += texts
        return [len(prompt.text + text) for text in texts]

    def compute(self, texts: Sequence[str], prompt: TaskPrompt) -> tuple[Any, list[int]]:
        self.batches.append(list(texts))
        self.may_go_on.wait(20)
        if self.fails_on in texts:
            raise RuntimeError("it fails")
        return np.array([[len(prompt.text + text), 1] for text in texts], dtype=np.float32), [
            len(text) for text in texts
        ]

    def release(self) -> None:
        pass


def on_echo(scenario: Callable[[Embedder, Echo], Any], max_batch_tokens: int = 1000) -> None:
    async def run() -> None:
        echo = Echo()
        embedder = Embedder(echo, EmbedderInfo(dims=2, prompts={"query": "q: "}), max_batch_tokens)
        try:
            await scenario(embedder, echo)
        finally:
            echo.may_go_on.set()
            await embedder.close(5)

    asyncio.run(run())


def test_requests_that_come_while_a_batch_is_computed_share_the_next_one() -> None:
    async def scenario(embedder: Embedder, echo: Echo) -> None:
        first = asyncio.create_task(embedder.embed(["first"]))
        await asyncio.to_thread(until, lambda: echo.batches)
        others = [asyncio.create_task(embedder.embed([f"other {number}"])) for number in range(9)]
        await asyncio.sleep(0.05)
        echo.may_go_on.set()
        found = await asyncio.gather(first, *others)
        assert [len(batch) for batch in echo.batches] == [1, 9]
        assert [one.vectors[0, 0] for one in found] == [5, *[7] * 9] and embedder.num_waiting == 0

    on_echo(scenario)


def test_leaving_drops_what_no_batch_has_begun_with() -> None:
    async def scenario(embedder: Embedder, echo: Echo) -> None:
        task = asyncio.create_task(embedder.embed(["abcdefgh"] * 100))
        await asyncio.to_thread(until, lambda: echo.batches)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        echo.may_go_on.set()
        await embedder.embed(["xy"])
        assert len(echo.batches) == 2 and embedder.num_waiting == 0

    on_echo(scenario, max_batch_tokens=16)


def test_a_batch_that_fails_fails_its_own_requests_alone() -> None:
    async def scenario(embedder: Embedder, echo: Echo) -> None:
        echo.may_go_on.set()
        echo.fails_on = "bad"
        with pytest.raises(EngineFailure):
            await embedder.embed(["bad", "a long one that is in another batch"])
        assert (await embedder.embed(["good"])).vectors.tolist() == [[4, 1]]
        echo.may_go_on.clear()
        first = asyncio.create_task(embedder.embed(["first"]))
        await asyncio.to_thread(until, lambda: len(echo.batches) == 4)
        together = [asyncio.create_task(embedder.embed([text])) for text in ("one", "bad", "two")]
        await asyncio.sleep(0.05)
        echo.may_go_on.set()
        one, bad, two = await asyncio.gather(*together, return_exceptions=True)
        assert echo.batches[4:] == [["one", "bad", "two"], ["one"], ["bad"], ["two"]]
        assert isinstance(bad, EngineFailure) and isinstance(one, Embeddings) and isinstance(two, Embeddings)
        await first

    on_echo(scenario)


def test_no_more_of_a_text_is_tokenized_than_a_model_could_read() -> None:
    async def scenario(embedder: Embedder, echo: Echo) -> None:
        echo.may_go_on.set()
        found = await embedder.embed(["x" * 10_000_000])
        assert found.vectors[0, 0] == CHARACTERS + CHARACTERS_PER_TOKEN * echo.max_length and found.num_truncated == 1
        with pytest.raises(TextTooLong):
            await embedder.embed(["x" * 10_000_000], may_truncate=False)

    on_echo(scenario)


def test_who_left_before_the_model_was_free_costs_nothing() -> None:
    async def scenario(embedder: Embedder, echo: Echo) -> None:
        first = asyncio.create_task(embedder.embed(["first"]))
        await asyncio.to_thread(until, lambda: echo.batches)
        gone = asyncio.create_task(embedder.embed(["gone"]))
        await asyncio.sleep(0.02)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        echo.may_go_on.set()
        await first
        await embedder.embed(["last"])
        assert echo.batches == [["first"], ["last"]] and echo.tokenized == ["first", "last"]

    on_echo(scenario)


def test_a_question_that_is_too_long_leaves_no_documents_behind() -> None:
    async def scenario(embedder: Embedder, echo: Echo) -> None:
        echo.may_go_on.set()
        with pytest.raises(TextTooLong):
            await embedder.score("x" * 60, ["y"] * 1000, may_truncate=False)
        assert embedder.num_waiting == 0 and not echo.batches

    on_echo(scenario)


def test_prompts_truncation_and_dimensions_are_checked() -> None:
    async def scenario(embedder: Embedder, echo: Echo) -> None:
        echo.may_go_on.set()
        assert (await embedder.embed(["x"], "query")).vectors.tolist() == [[4, 1]]
        with pytest.raises(ArgumentError, match="query"):
            await embedder.embed(["x"], "other")
        assert (await embedder.embed(["x" * 60, "y"])).num_truncated == 1
        with pytest.raises(TextTooLong, match="60"):
            await embedder.embed(["y", "x" * 60], may_truncate=False)
        for dimensions in (1, 3):
            with pytest.raises(ArgumentError):
                await embedder.embed(["x"], dimensions=dimensions)
        with pytest.raises(Overloaded):
            await embedder.embed(["x"] * (2**16 + 1))

    on_echo(scenario)


def test_a_batch_that_hangs_does_not_keep_the_embedder_from_closing() -> None:
    async def scenario(embedder: Embedder, echo: Echo) -> None:
        asking = asyncio.create_task(embedder.embed(["a"]))
        await asyncio.to_thread(until, lambda: echo.batches)
        async with asyncio.timeout(10):
            await embedder.close(0.0, patience=0.05)
        asking.cancel()

    on_echo(scenario)


def test_closing_lets_requests_finish_and_ends_those_that_do_not() -> None:
    async def scenario(embedder: Embedder, echo: Echo) -> None:
        tasks = [asyncio.create_task(embedder.embed(["ab"] * 20)) for _ in range(2)]
        await asyncio.to_thread(until, lambda: echo.batches)
        closing = asyncio.create_task(embedder.close(0.05))
        await asyncio.sleep(0.2)
        echo.may_go_on.set()
        await closing
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, Unavailable) for one in found)
        with pytest.raises(Unavailable):
            await embedder.embed(["late"])

    on_echo(scenario, max_batch_tokens=4)


def test_a_tiny_models_vectors_are_those_of_encode_with_its_prompts(tiny_encoder: Path) -> None:
    expected = encoder(tiny_encoder)

    async def run() -> None:
        embedder = load_embedder(tiny_encoder, "tiny", "cpu", may_shorten=True)
        try:
            for prompt_name in (None, "query", "document"):
                found = await embedder.embed(TEXTS[:40], prompt_name)
                assert close(found.vectors, expected.encode(TEXTS[:40], prompt_name=prompt_name))
            short = (await embedder.embed(TEXTS[:9], dimensions=8)).vectors
            whole = expected.encode(TEXTS[:9], truncate_dim=8, normalize_embeddings=True)
            assert short.shape == (9, 8) and short.dtype == np.float32 and close(short, whole)
        finally:
            await embedder.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("name", "config", "may"),
    [
        ("tiny", {}, False),
        ("google/embeddinggemma-300m", {}, True),
        ("Qwen/Qwen3-Embedding-0.6B", {}, True),
        ("nomic-ai/nomic-embed-text-v1.5", {}, True),
        ("nomic-ai/nomic-embed-text-v1", {}, False),
        ("tiny", {"truncate_dim": 16}, True),
    ],
)
def test_dimensions_are_for_models_that_were_trained_for_them(
    tmp_path: Path, name: str, config: dict[str, Any], may: bool
) -> None:
    directory = save_tiny_encoder(tmp_path / "model", **config)
    embedder = load_embedder(directory, name, "cpu")
    asyncio.run(embedder.close())
    assert embedder.about.may_shorten == may and embedder.about.dims == config.get("truncate_dim", 32)


def test_code_of_a_models_own_is_not_run(tmp_path: Path) -> None:
    directory = save_tiny_encoder(tmp_path / "model")
    modules = json.loads((directory / "modules.json").read_text())
    modules[1]["type"] = "custom_code.Pooling"
    (directory / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelLoadError, match="never run"):
        load_embedder(directory, "model", "cpu")


def save_tiny_clip(directory: Path) -> Path:
    """It takes images beside texts, and sentence-transformers reads texts that are paths or addresses as images."""
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 64
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "eos_token_id": tokenizer.eos_token_id}
    vision = {**size, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(directory)
    CLIPProcessor(image_processor=CLIPImageProcessor(), tokenizer=tokenizer).save_pretrained(directory)
    return directory


def test_models_that_would_fetch_what_a_text_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="image.*only text"):
        load_embedder(save_tiny_clip(tmp_path / "clip"), "clip", "cpu")
