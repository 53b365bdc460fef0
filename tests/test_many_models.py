"""Many models behind one address, as clients see them: the list, loading and unloading, Ollama's views, memory."""

import asyncio
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from openai import OpenAI
from process import MAIN, Server, serve
from tiny_encoders import save_tiny_encoder

from serving.folder import MAX_AGE

HELLO = [{"role": "user", "content": "Hello"}]
NAMES = ["one", "two", "three", "four"]
KEY = {"Authorization": "Bearer sk-1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """Four chat models, one that makes vectors, and one that is broken; a folder below another, hidden ones, notes."""
    directory = tmp_path_factory.mktemp("folder")
    for name in ("one", "two", "deep/three", "deep/er/four", ".cache/hidden", "broken"):
        shutil.copytree(tiny_checkpoint, directory / name)
    save_tiny_encoder(directory / "deep" / "encoder")
    (directory / "broken" / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    (directory / "notes.txt").write_text("no model")
    return directory


@pytest.fixture(scope="module")
def many(folder: Path) -> Iterator[Server]:
    weights = (folder / "one" / "model.safetensors").stat().st_size
    settings = {"DTYPE": "float32", "MAX_MODEL_LEN": "480", "KV_CACHE_MEMORY": "4MiB", "EMBEDDING_DEVICE": "cpu"}
    memory = str(int(2.5 * (weights + 4 * 2**20)))
    with serve(
        MAIN, MODELS_DIR=str(folder), MODEL_PATH=str(folder / "one"), MODELS_MEMORY=memory, **settings
    ) as server:
        server.wait_until_healthy()
        yield server


def models_of(server: Server) -> dict[str, dict[str, Any]]:
    return {model["id"]: model for model in server.get("/v1/models").json()["data"]}


def ask(server: Server, model: str, **more: Any) -> httpx2.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": 8, "temperature": 0, **more}
    return server.post("/v1/chat/completions", **body)


def test_the_list_tells_what_each_model_is_and_whether_it_is_loaded(many: Server, folder: Path) -> None:
    models = models_of(many)
    assert set(models) == {*NAMES, "encoder", "broken"}
    assert models["encoder"]["kind"] == "embedding" and models["two"]["kind"] == "chat"
    assert models["one"]["status"] == "loaded"
    assert models["two"]["size"] == (folder / "two" / "model.safetensors").stat().st_size
    assert many.get("/v1/models/three").json()["id"] == "three"
    health = many.get("/health").json()
    assert health["status"] == "ok" and {each["model"] for each in health["models"]} == set(models) - {"encoder"}


def test_models_are_loaded_and_unloaded_by_name(many: Server) -> None:
    loaded = many.post("/v1/models/load", model="two", keep_alive="10m")
    assert loaded.status_code == 200 and loaded.json()["status"] == "loaded" and loaded.json()["max_model_len"] == 480
    running = {model["name"]: model for model in many.get("/api/ps").json()["models"]}
    assert "two:latest" in running and running["two:latest"]["expires_at"] < "2200"
    assert many.post("/v1/models/unload", model="two").json()["status"] == "unloaded"
    assert models_of(many)["two"]["status"] == "unloaded"
    assert many.post("/v1/models/unload", model="two").status_code == 200
    for path in ("load", "unload"):
        assert many.post(f"/v1/models/{path}", model="none").json()["error"]["code"] == "model_not_found"
    vector = {"model": "encoder", "input": "a"}
    assert len(many.post("/v1/embeddings", **vector).json()["data"]) == 1
    assert models_of(many)["encoder"]["status"] == "loaded"
    assert many.post("/v1/models/unload", model="encoder").json()["status"] == "unloaded"
    assert many.post("/v1/models/load", model="encoder").json()["status"] == "loaded"


def test_a_broken_model_is_listed_with_the_sentence_and_the_others_answer(many: Server) -> None:
    refusal = ask(many, "broken")
    assert refusal.status_code == 400 and refusal.json()["error"]["code"] == "model_not_supported"
    broken = models_of(many)["broken"]
    assert broken["status"] == "failed" and broken["error"] == refusal.json()["error"]["message"]
    assert many.get("/health").status_code == 200 and ask(many, "one").status_code == 200


def test_ollamas_clients_see_them_and_say_how_long_they_stay(many: Server) -> None:
    tags = {model["name"] for model in many.get("/api/tags").json()["models"]}
    assert {f"{name}:latest" for name in NAMES} <= tags
    body = {"model": "three:latest", "messages": HELLO, "stream": False, "options": {"num_predict": 2}}
    assert many.post("/api/chat", **body, keep_alive=-1).status_code == 200
    running = {model["name"]: model for model in many.get("/api/ps").json()["models"]}
    assert running["three:latest"]["expires_at"].startswith("2200")
    for nothing in (0, "0m", "-0s", "0ms"):
        assert many.post("/api/generate", model="three", keep_alive=nothing).json()["done_reason"] == "unload"
    assert "three:latest" not in {model["name"] for model in many.get("/api/ps").json()["models"]}
    assert many.post("/api/show", model="three").json()["capabilities"] == ["completion", "tools"]
    assert many.post("/api/generate", model="three", stream=False).json()["done_reason"] == "load"
    assert many.post("/api/chat", **body, keep_alive="soon").status_code == 400
    assert many.post("/api/chat", **body, keep_alive=1e12).status_code == 200
    running = {model["name"]: model for model in many.get("/api/ps").json()["models"]}
    assert running["three:latest"]["expires_at"].startswith("2200")


def test_every_endpoint_finds_the_model_by_its_name(many: Server) -> None:
    texts = many.post("/tokenize", model="four", prompt="abc").json()
    assert many.post("/detokenize", model="four", tokens=texts["tokens"]).json()["prompt"] == "abc"
    assert many.get("/tokenizer_info?model=two").status_code == 200
    requests: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": "a"},
        "/v1/responses": {"input": "a", "store": False},
        "/v1/messages": {"messages": HELLO},
    }
    for path, fields in requests.items():
        limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        answer = many.post(path, model="four", **{limit: 2}, **fields)
        assert answer.status_code == 200, (path, answer.text)


def test_the_sdk_and_curls_streams_switch_between_models_and_answers_stay_the_same(many: Server) -> None:
    expected = ask(many, "one").json()["choices"][0]["message"]["content"]

    async def stream(client: httpx2.AsyncClient, model: str) -> str:
        body = {"model": model, "messages": HELLO, "max_tokens": 8, "temperature": 0, "stream": True}
        async with client.stream("POST", f"{many.url}/v1/chat/completions", json=body) as response:
            return "\n".join([line async for line in response.aiter_lines()])

    async def all_at_once() -> list[str]:
        async with httpx2.AsyncClient(timeout=120) as client:
            return await asyncio.gather(*(stream(client, NAMES[number % 4]) for number in range(16)))

    streams = asyncio.run(all_at_once())
    assert all(text.rstrip().endswith("data: [DONE]") and '"error"' not in text for text in streams)
    with OpenAI(base_url=f"{many.url}/v1", api_key="none", max_retries=5) as client:
        assert {model.id for model in client.models.list()} >= set(NAMES)
        for name in NAMES:
            answer = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": "Hello"}], max_tokens=8, temperature=0
            )
            assert answer.choices[0].message.content == expected and answer.model == name


@pytest.mark.slow
def test_memory_and_threads_stay_the_same_over_fifty_swaps(many: Server) -> None:
    process = psutil.Process(many.process.pid)

    def swapped(num_times: int) -> tuple[float, int]:
        for number in range(num_times):
            assert ask(many, NAMES[number % 4]).status_code == 200
        return process.memory_info().rss / 2**20, process.num_threads()

    swapped(12)
    before, after = swapped(12), swapped(50)
    assert after[0] - before[0] < 40, f"{before[0]:.0f} MiB before, {after[0]:.0f} MiB after"
    assert after[1] <= before[1] + 2


def test_loading_needs_the_key_where_there_is_one_and_tells_clients_that_cannot_wait_to_come_again(
    folder: Path,
) -> None:
    with serve(MAIN, MODELS_DIR=str(folder), API_KEYS="sk-1", MODEL_LOAD_WAIT="0", DTYPE="float32") as server:
        server.wait_until_listening()
        for path in ("load", "unload"):
            assert server.post(f"/v1/models/{path}", model="two").status_code == 401
        answer = httpx2.post(f"{server.url}/v1/models/load", json={"model": "two"}, headers=KEY)
        assert answer.status_code == 200 and answer.json()["status"] == "loading"
        body = {"model": "two", "messages": HELLO}
        early = httpx2.post(f"{server.url}/v1/chat/completions", json=body, headers=KEY)
        assert early.status_code == 503 and early.json()["error"]["code"] == "model_loading"
        assert int(early.headers["retry-after"]) > 0 and "%" in early.json()["error"]["message"]


def test_streams_of_all_kinds_wait_for_their_model_and_whole_answers_only_for_a_while(folder: Path) -> None:
    with serve(MAIN, MODELS_DIR=str(folder), MODEL_LOAD_WAIT="0.01", DTYPE="float32") as server:
        server.wait_until_healthy()
        for path in ("/api/chat", "/api/generate", "/v1/messages", "/v1/chat/completions"):
            text: dict[str, Any] = {"prompt": "a"} if path == "/api/generate" else {"messages": HELLO}
            limit: dict[str, Any] = {"options": {"num_predict": 2}} if path.startswith("/api") else {"max_tokens": 2}
            for is_stream in (False, True):
                server.post("/v1/models/unload", model="four")
                answer = server.post(path, model="four", stream=is_stream, **limit, **text)
                assert answer.status_code == (200 if is_stream else 503), (path, answer.text)
                assert not (is_stream and "error" in answer.text), (path, answer.text)


def test_models_of_vectors_that_come_into_the_folder_are_found_by_every_endpoint(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "chat")
    with serve(MAIN, MODELS_DIR=str(tmp_path), DTYPE="float32", EMBEDDING_DEVICE="cpu") as server:
        server.wait_until_healthy()
        for number, path in enumerate(("/v1/embeddings", "/api/embed", "/v1/models/load")):
            time.sleep(MAX_AGE + 0.1)
            save_tiny_encoder(tmp_path / f"new{number}")
            answer = server.post(path, model=f"new{number}", **({} if "load" in path else {"input": "a"}))
            assert answer.status_code == 200, (path, answer.text)


def test_a_folder_without_models_serves_what_would_be_served_without_it_and_one_that_is_not_there_too(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    with serve(MAIN, MODELS_DIR=str(tmp_path / "none"), MODEL_PATH=str(tiny_checkpoint)) as server:
        server.wait_until_healthy()
        assert set(models_of(server)) == {tiny_checkpoint.name}
