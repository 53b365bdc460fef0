"""Adapters over HTTP: each is a model of its own, by vLLM's endpoints and OpenAI's client."""

import json
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from lora_files import TinyAdapter
from openai import NotFoundError, OpenAI
from process import MAIN, Server, run_to_end, serve
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEXT = "The quick brown fox"


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyAdapter]:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    return {name: TinyAdapter(model, TARGETS, seed=seed) for seed, name in enumerate(("sql", "poems", "Later"), 1)}


@pytest.fixture(scope="module")
def folder(made: dict[str, TinyAdapter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for name, adapter in made.items():
        adapter.save(folder / f"{name}-v1")
    (folder.parent / "secret").mkdir(exist_ok=True)
    os.symlink(folder.parent / "secret", folder / "link")
    return folder


@pytest.fixture(scope="module")
def adapted(tiny_checkpoint: Path, folder: Path) -> Iterator[Server]:
    settings = {
        "MODEL_PATH": str(tiny_checkpoint),
        "LORA_ADAPTERS": f"sql={folder}/sql-v1,poems={folder}/poems-v1",
        "LORA_DIR": str(folder),
        "MAX_LORA_ADAPTERS": "3",
        "MODEL_ALIASES": "queries=sql",
        "SERVED_MODEL_NAME": "base",
    }
    with serve(MAIN, **settings, MAX_MODEL_LEN="480", DTYPE="float32") as server:
        server.wait_until_healthy()
        yield server


def expected(tiny_checkpoint: Path, adapter: TinyAdapter | None, count: int = 12) -> str:
    """transformers' answer of the merged model."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32) if adapter is None else None
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    output = (model or adapter.merged()).generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def completed(server: Server, model: str, count: int = 12) -> httpx2.Response:
    body = {"model": model, "prompt": TEXT, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    return server.post("/v1/completions", **body)


def text_of(server: Server, model: str) -> str:
    response = completed(server, model)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_adapters_are_listed_as_children_of_the_model(adapted: Server) -> None:
    models = {model["id"]: model for model in adapted.get("/v1/models").json()["data"]}
    assert models["base"]["parent"] is None and models["base"]["root"] == "base"
    for name in ("sql", "poems"):
        assert (models[name]["parent"], models[name]["root"]) == ("base", f"{name}-v1")
        assert models[name]["max_model_len"] == 480
        assert adapted.get(f"/v1/models/{name}").json()["parent"] == "base"
    assert {"sql:latest", "base:latest"} <= {model["name"] for model in adapted.get("/api/tags").json()["models"]}


def test_each_model_answers_as_transformers_does_also_at_once(
    adapted: Server, made: dict[str, TinyAdapter], tiny_checkpoint: Path
) -> None:
    right = {name: expected(tiny_checkpoint, made.get(name)) for name in ("base", "sql", "poems")}
    assert len(set(right.values())) == 3
    names = [*right] * 4
    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(lambda name: text_of(adapted, name), names))
    assert texts == [right[name] for name in names]
    assert text_of(adapted, "SQL") == text_of(adapted, "queries") == right["sql"], "in any case, and by an alias"


def test_every_protocol_answers_with_the_adapter_under_its_name(adapted: Server) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    common = {"messages": messages, "max_tokens": 8, "temperature": 0}
    with OpenAI(base_url=adapted.url + "/v1", api_key="none") as client:
        contents = {}
        for name in ("base", "sql"):
            chat = client.chat.completions.create(model=name, **common)
            assert chat.model == name
            contents[name] = chat.choices[0].message.content
            chunks = list(client.chat.completions.create(model=name, stream=True, **common))
            assert {chunk.model for chunk in chunks} == {name}
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            assert streamed == contents[name]
            answer = client.responses.create(model=name, input="Hello", max_output_tokens=16, temperature=0)
            assert answer.model == name and answer.output_text.startswith(contents[name][:4])
            claude = adapted.post("/v1/messages", model=name, **common).json()
            assert claude["model"] == name and claude["content"][0]["text"] == contents[name]
            assert adapted.post("/tokenize", model=name, prompt="Hi").json()["count"] == 2
        assert contents["base"] != contents["sql"]


def test_adapters_are_loaded_and_unloaded_while_the_server_runs(
    adapted: Server, made: dict[str, TinyAdapter], tiny_checkpoint: Path
) -> None:
    assert completed(adapted, "Later").status_code == 404
    loaded = adapted.post("/v1/load_lora_adapter", lora_name="Later", lora_path="Later-v1", extra=1)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'Later' added successfully.")
    assert loaded.headers["x-ignored-fields"] == "extra"
    assert text_of(adapted, "later") == expected(tiny_checkpoint, made["Later"])
    full = adapted.post("/v1/load_lora_adapter", lora_name="more", lora_path="sql-v1")
    assert full.status_code == 400 and "MAX_LORA_ADAPTERS" in full.json()["error"]["message"]
    again = {"lora_name": "Later", "lora_path": "poems-v1"}
    assert "load_inplace" in adapted.post("/v1/load_lora_adapter", **again).json()["error"]["message"]
    assert adapted.post("/v1/load_lora_adapter", **again, load_inplace=True).status_code == 200
    assert text_of(adapted, "Later") == text_of(adapted, "poems"), "no block of the other weights is used"
    gone = adapted.post("/v1/unload_lora_adapter", lora_name="Later")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'Later' removed successfully.")
    assert completed(adapted, "Later").status_code == 404
    assert adapted.post("/v1/unload_lora_adapter", lora_name="Later").status_code == 404
    with OpenAI(base_url=adapted.url + "/v1", api_key="none") as client, pytest.raises(NotFoundError):
        client.models.retrieve("Later")


def test_a_request_that_runs_keeps_the_weights_that_it_began_with(
    adapted: Server, made: dict[str, TinyAdapter], tiny_checkpoint: Path
) -> None:
    right = expected(tiny_checkpoint, made["Later"], 200)
    load = {"lora_name": "Later", "lora_path": "Later-v1"}
    assert adapted.post("/v1/load_lora_adapter", **load).status_code == 200
    body = {"model": "Later", "prompt": TEXT, "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
    texts, begun = [], threading.Event()

    def read() -> None:
        with httpx2.stream("POST", adapted.url + "/v1/completions", json=body, timeout=60) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    choices = json.loads(line[6:])["choices"]
                    texts.append(choices[0]["text"] if choices else "")
                    begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(30)
    assert adapted.post("/v1/load_lora_adapter", **load | {"lora_path": "sql-v1", "load_inplace": True}).is_success
    assert adapted.post("/v1/unload_lora_adapter", lora_name="Later").is_success
    reader.join(60)
    assert "".join(texts) == right


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({}, 400, "Both lora_name and lora_path must be provided"),
        ({"lora_name": "x"}, 400, "Both lora_name and lora_path"),
        ({"lora_name": "x", "lora_path": 3}, 400, "lora_path"),
        ({"lora_name": "base", "lora_path": "sql-v1"}, 400, "cannot be the name of an adapter"),
        ({"lora_name": "Tiny-Qwen3", "lora_path": "sql-v1"}, 400, "cannot be the name of an adapter"),
        ({"lora_name": "openai/gpt", "lora_path": "sql-v1"}, 400, "is taken by another model"),
        ({"lora_name": "gpt-4", "lora_path": "sql-v1"}, 400, "is taken by another model"),
        ({"lora_name": "queries", "lora_path": "sql-v1"}, 400, "is taken by another model"),
        ({"lora_name": "a/b", "lora_path": "sql-v1"}, 400, "cannot be the name of an adapter"),
        ({"lora_name": "x\n", "lora_path": "sql-v1"}, 400, "cannot be the name of an adapter"),
        *(
            ({"lora_name": "x", "lora_path": path}, 404, "There is no adapter .* below LORA_DIR")
            for path in ("..", "../secret", "/etc", "link", ".", "nothing", "a\0b", "x" * 5000, "~", "/")
        ),
    ],
)
def test_names_and_paths_that_are_not_allowed_are_refused(
    adapted: Server, body: dict[str, Any], status: int, reason: str
) -> None:
    response = adapted.post("/v1/load_lora_adapter", **body)
    assert response.status_code == status, response.text
    assert re.search(reason, response.json()["error"]["message"])
    assert len(adapted.get("/v1/models").json()["data"]) == 3


def test_an_adapter_that_does_not_fit_is_refused_with_the_reason(adapted: Server, folder: Path) -> None:
    (folder / "empty").mkdir(exist_ok=True)
    response = adapted.post("/v1/load_lora_adapter", lora_name="x", lora_path="empty")
    assert response.status_code == 400
    assert "is not an adapter: it has no adapter_config.json" in response.json()["error"]["message"]


def test_without_a_folder_only_the_configured_adapters_can_be_loaded(tiny_checkpoint: Path, folder: Path) -> None:
    settings = {"MODEL_PATH": str(tiny_checkpoint), "LORA_ADAPTERS": f"sql={folder}/sql-v1"}
    with serve(MAIN, **settings, MAX_MODEL_LEN="480", DTYPE="float32") as server:
        server.wait_until_healthy()
        refused = server.post("/v1/load_lora_adapter", lora_name="x", lora_path=f"{folder}/poems-v1")
        assert refused.status_code == 400 and "set LORA_DIR" in refused.json()["error"]["message"]
        before = text_of(server, "sql")
        assert server.post("/v1/unload_lora_adapter", lora_name="sql").is_success
        path = f"{folder}/sql-v1"
        assert server.post("/v1/load_lora_adapter", lora_name="sql", lora_path=path).is_success
        assert text_of(server, "sql") == before


@pytest.mark.parametrize(
    ("adapters", "reason"),
    [
        ("sql=/nowhere", "error: /nowhere is not an adapter: it has no adapter_config.json."),
        ("Tiny-Qwen3={}/sql-v1", "error: LORA_ADAPTERS: 'Tiny-Qwen3' cannot be the name of an adapter"),
        ("sql", "error: LORA_ADAPTERS: 'sql' is not a list such as name=other,name=other"),
    ],
)
def test_a_wrong_setting_ends_the_start_with_a_sentence(
    tiny_checkpoint: Path, folder: Path, adapters: str, reason: str
) -> None:
    settings = {"MODEL_PATH": str(tiny_checkpoint), "LORA_ADAPTERS": adapters.format(folder)}
    status, output = run_to_end(MAIN, **settings, DTYPE="float32")
    assert status == 1 and reason in output
