"""Cohere's embed and rerank endpoints say what /v1/embeddings and /v1/rerank say, in Cohere's shapes."""

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from models import save_tiny_checkpoint
from process import MAIN, Server, serve
from tiny_encoders import save_tiny_encoder, vectors

MODEL = "tiny-encoder"
TEXTS = ["a cat", "a kitten in the sun", "word " * 100]
PROMPTS = {"query": "search: ", "passage": "passage: "}


@pytest.fixture(scope="module")
def prompted_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    encoder = save_tiny_encoder(folder / MODEL, prompts=PROMPTS)
    chat = save_tiny_checkpoint(folder / "Tiny-Qwen3")
    settings = {"EMBEDDING_MODEL_PATH": str(encoder), "HF_HUB_OFFLINE": "1"}
    with serve(MAIN, MODEL_PATH=str(chat), DTYPE="float32", **settings) as server:
        server.wait_until_healthy()
        yield server


def embed(server: Server, version: int = 2, **body: Any) -> Any:
    return server.post(f"/v{version}/embed", **{"model": MODEL, "texts": TEXTS, **body})


@pytest.mark.parametrize(
    ("input_type", "prompt"),
    [("search_query", "query"), ("search_document", "passage"), ("classification", None), (None, None)],
)
def test_the_vectors_are_those_of_the_prompt_for_their_use(
    prompted_server: Server, input_type: str | None, prompt: str | None
) -> None:
    answer = embed(prompted_server, input_type=input_type, embedding_types=["float", "base64"])
    expected = vectors(prompted_server, TEXTS, model=MODEL, prompt_name=prompt)
    assert answer.status_code == 200 and answer.headers["x-gateway-truncated"] == "1"
    body = answer.json()
    assert body["embeddings"]["float"] == expected and body["texts"] == TEXTS
    raw = [np.frombuffer(base64.b64decode(row), "<f4") for row in body["embeddings"]["base64"]]
    assert np.array_equal(raw, np.asarray(expected, "<f4"))
    usage = prompted_server.post("/v1/embeddings", model=MODEL, input=TEXTS, prompt_name=prompt).json()["usage"]
    assert body["meta"]["billed_units"] == {"input_tokens": usage["prompt_tokens"]}
    assert body["meta"]["api_version"] == {"version": "2"} and body["response_type"] == "embeddings_by_type"


def test_inputs_are_texts_in_parts(prompted_server: Server) -> None:
    parts = [{"content": [{"type": "text", "text": "a "}, {"type": "text", "text": "cat"}]}]
    answer = embed(prompted_server, texts=None, inputs=parts).json()
    assert answer["embeddings"] == embed(prompted_server, texts=["a cat"]).json()["embeddings"]
    assert answer["texts"] == ["a cat"] and answer["embeddings"].keys() == {"float"}


def test_the_older_version_holds_the_vectors_themselves(prompted_server: Server) -> None:
    newer = embed(prompted_server).json()["embeddings"]
    older = embed(prompted_server, version=1).json()
    assert older["response_type"] == "embeddings_floats" and older["embeddings"] == newer["float"]
    assert older["meta"]["api_version"] == {"version": "1"}
    assert embed(prompted_server, version=1, embedding_types=["float"]).json()["embeddings"] == newer


def test_the_ranks_are_those_of_v1(prompted_server: Server) -> None:
    body: dict[str, Any] = {"model": MODEL, "query": "cats", "documents": TEXTS}
    theirs = prompted_server.post("/v1/rerank", **body).json()["results"]
    answer = prompted_server.post("/v2/rerank", **body, max_tokens_per_doc=10, priority=3)
    assert answer.headers["x-ignored-fields"] == "max_tokens_per_doc"
    assert answer.json()["results"] == theirs and answer.json()["meta"]["billed_units"] == {"search_units": 1}
    assert prompted_server.post("/v2/rerank", **body, top_n=1).json()["results"] == theirs[:1]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"texts": None}, "texts"),
        ({"inputs": [{"content": [{"type": "text", "text": "x"}]}]}, "texts"),
        ({"texts": [""]}, "texts"),
        ({"texts": None, "inputs": [{"content": [{"type": "image_url", "image_url": {}}]}]}, "inputs[0].content[0]"),
        ({"texts": None, "inputs": [{"content": [{"type": "text"}]}]}, "inputs[0].content[0].text"),
        ({"images": ["data:"]}, "images"),
        ({"embedding_types": ["float", "int8"]}, "embedding_types[1]"),
        ({"embedding_types": ["half"]}, "embedding_types[0]"),
        ({"truncate": "START"}, "truncate"),
        ({"truncate": "NONE"}, "tokens"),
        ({"input_type": "image"}, "input_type"),
        ({"output_dimension": 7}, "dimensions"),
    ],
)
def test_what_is_wrong_is_named_in_coheres_shape(prompted_server: Server, body: dict[str, Any], words: str) -> None:
    refusal = embed(prompted_server, **body)
    assert refusal.status_code == 400 and refusal.json().keys() == {"message"}
    assert words in refusal.json()["message"]


def test_what_is_not_there_is_not_found_in_coheres_shape(prompted_server: Server) -> None:
    for path in ("/v2/chat", "/v2/embed-jobs"):
        answer = prompted_server.post(path, model=MODEL)
        assert answer.status_code == 404 and path in answer.json()["message"]
    assert embed(prompted_server, model="other").status_code == 404
