"""Cohere's own SDK embeds and ranks, and its errors are of its classes."""

from collections.abc import Iterator

import cohere
import pytest
from cohere.errors import BadRequestError, NotFoundError
from conftest import interpreter
from openai import OpenAI
from process import Server, serve

MODEL = "all-minilm-l6-v2"
TEXTS = ["Cars need fuel.", "Cats sleep in the sun.", "A hash table maps keys to values."]


@pytest.fixture(scope="module")
def embedder() -> Iterator[Server]:
    """A server of its own: models that were used are listed, and other tests know of one."""
    with serve([interpreter("SERVER_PYTHON"), "main.py", "--port", "0"], MAX_MODEL_LEN="4096") as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture
def client(embedder: Server) -> cohere.ClientV2:
    return cohere.ClientV2(api_key="unused", base_url=embedder.url)


def test_version_2_embeds_and_ranks(client: cohere.ClientV2, embedder: Server) -> None:
    with OpenAI(base_url=embedder.url + "/v1", api_key="unused") as sdk:
        expected = [item.embedding for item in sdk.embeddings.create(model=MODEL, input=TEXTS).data]
    answer = client.embed(model=MODEL, texts=TEXTS, input_type="search_document", embedding_types=["float", "base64"])
    assert answer.embeddings.float_ is not None and answer.embeddings.base64 is not None
    for ours, theirs in zip(answer.embeddings.float_, expected, strict=True):
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-5
    assert len(answer.embeddings.base64) == 3 and answer.texts == TEXTS and answer.meta is not None
    ranks = client.rerank(model=MODEL, query="Where do cats sleep?", documents=TEXTS, top_n=2)
    assert [result.index for result in ranks.results][0] == 1 and len(ranks.results) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the SDK's own
def test_version_1_embeds_and_ranks(embedder: Server) -> None:
    client = cohere.Client(api_key="unused", base_url=embedder.url)
    answer = client.embed(model=MODEL, texts=TEXTS, input_type="search_query")
    assert answer.response_type == "embeddings_floats" and len(answer.embeddings) == 3
    typed = client.embed(model=MODEL, texts=TEXTS, input_type="search_query", embedding_types=["float"])
    assert typed.response_type == "embeddings_by_type" and typed.embeddings.float_ == answer.embeddings
    ranks = client.rerank(model=MODEL, query="Where do cats sleep?", documents=TEXTS, top_n=1)
    assert ranks.results[0].index == 1


def test_errors_are_its_own(client: cohere.ClientV2) -> None:
    with pytest.raises(BadRequestError) as refused:
        client.embed(model=MODEL, texts=TEXTS, input_type="search_query", embedding_types=["int8"])
    assert "embedding_types[0]" in refused.value.body["message"]
    with pytest.raises(NotFoundError) as missing:
        client.chat(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
    assert "/v2/chat" in missing.value.body["message"]
