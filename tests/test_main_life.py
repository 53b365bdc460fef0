"""The life of the process: loading, clients that leave, signals, and models that cannot be served."""

import asyncio
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from main_requests import HELLO, LONG, MODEL, in_background, raw_events, wait_until_running
from process import MAIN, UVICORN, Server, run_to_end, serve


@pytest.mark.parametrize("stream", [True, False])
def test_fifty_clients_that_leave_stop_their_work(server: Server, stream: bool) -> None:
    body = {"model": MODEL, "messages": HELLO, "n": 2, "max_tokens": 400, "ignore_eos": True, "stream": stream}

    async def leave(client: httpx2.AsyncClient, number: int) -> None:
        async def request() -> None:
            async with client.stream("POST", server.url + "/v1/chat/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    if number % 2:
                        return

        try:
            await asyncio.wait_for(request(), timeout=0.3 + 0.02 * number)
        except TimeoutError:
            pass

    async def main() -> None:
        async with httpx2.AsyncClient(limits=httpx2.Limits(max_connections=60), timeout=30) as client:
            await asyncio.gather(*(leave(client, number) for number in range(50)))

    before = time.monotonic()
    asyncio.run(main())
    server.wait_until_idle(timeout=5)
    assert time.monotonic() - before < 15, "their answers were computed to the end"
    assert server.post("/v1/completions", model=MODEL, prompt="x", max_tokens=1).status_code == 200


def test_while_loading_models_answer_and_health_tells_the_progress(tiny_checkpoint: Path) -> None:
    with serve(UVICORN, is_cold=True, NANOVLLM_MODEL_PATH=str(tiny_checkpoint), MODEL_LOAD_WAIT="0") as server:
        health = server.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "loading"
        assert 0 <= health.json()["progress"]["fraction"] <= 1 and health.json()["progress"]["phase"]
        assert server.get("/v1/models").json()["data"][0]["id"] == MODEL
        early = server.post("/v1/chat/completions", model=MODEL, messages=HELLO)
        assert early.status_code == 503 and early.json()["error"]["code"] == "model_loading"
        assert int(early.headers["retry-after"]) > 0
        server.wait_until_healthy()
        assert server.get("/health").json()["status"] == "ok"


HOPELESS = [
    ("/nowhere/model", "/nowhere/model"),
    ("demo:nothing", "demo:nothing"),
    ("{tmp}/pickle", "safetensors"),
    ("{tmp}/bert", "not supported"),
    ("{tmp}/huge", "GiB"),
]


@pytest.mark.parametrize(
    ("path", "sentence", "command"),
    [
        *((*model, MAIN) for model in HOPELESS),
        (*HOPELESS[0], UVICORN),
        *(pytest.param(*model, UVICORN, marks=pytest.mark.slow) for model in HOPELESS[1:]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_a_model_that_cannot_be_served_ends_the_process_with_a_sentence(
    tmp_path: Path, path: str, sentence: str, command: list[str]
) -> None:
    write_hopeless_models(tmp_path)
    environment = {"MODEL_PATH": path.format(tmp=tmp_path), "CACHE_DIR": str(tmp_path / "cache")}
    status, log = run_to_end(command, is_cold=sentence == "/nowhere/model", **environment)
    assert status != 0
    said = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and sentence in said[0]
    assert "Traceback" not in log


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_address_in_use_ends_the_process_with_a_sentence(server: Server, host: str) -> None:
    port = server.url.rpartition(":")[2]
    status, log = run_to_end([*MAIN[:-1], port], HOST=host, MODEL_PATH="/nowhere/model")
    assert status == 1
    sentence = f"error: The server cannot listen on {host}:{port}: set another HOST or PORT, or stop what uses it."
    assert log.splitlines()[-1] == sentence
    assert "Traceback" not in log


def test_a_draft_model_changes_no_answer_and_must_have_the_same_vocabulary(
    server: Server, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 60, "seed": 5, "temperature": 0.9}
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    settings = {"MODEL_PATH": str(tiny_checkpoint), "DTYPE": "float32", "MAX_MODEL_LEN": "480"}
    with serve(MAIN, **settings, DRAFT_MODEL_PATH=str(other)) as drafting:
        drafting.wait_until_healthy()
        answers = [s.post("/v1/chat/completions", **body).json() for s in (drafting, server)]
    assert answers[0]["choices"] == answers[1]["choices"]
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer.replace('"A":', '"Alpha":'))
    status, log = run_to_end([*MAIN, "--model-path", str(tiny_checkpoint), "--draft-model-path", str(other)])
    assert status != 0 and "error: The model at DRAFT_MODEL_PATH has a different vocabulary" in log


def write_hopeless_models(directory: Path) -> None:
    def write(name: str, config: dict[str, Any], weights: str = "model.safetensors") -> None:
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps(config))
        (directory / name / weights).write_bytes((2).to_bytes(8, "little") + b"{}")

    write("pickle", {"model_type": "qwen3"}, "pytorch_model.bin")
    write("bert", {"model_type": "vit"})
    write("huge", {"model_type": "qwen3", "vocab_size": 2**40})
    (directory / "huge" / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(("command", "status"), [(MAIN, 0), (UVICORN, -signal.SIGTERM)], ids=["main.py", "uvicorn"])
def test_a_signal_lets_running_requests_finish(tiny_checkpoint: Path, command: list[str], status: int) -> None:
    with serve(command, MODEL_PATH=str(tiny_checkpoint), SHUTDOWN_TIMEOUT="120") as server:
        server.wait_until_healthy()
        stream = in_background(lambda: raw_events(server, **LONG))
        whole = in_background(lambda: server.post("/v1/chat/completions", **LONG))
        wait_until_running(server, 2)
        server.process.terminate()
        assert stream()[-1] == "data: [DONE]" and len(stream()) > 20
        assert whole().status_code == 200 and whole().json()["usage"]["completion_tokens"] == 400
        assert server.process.wait(60) == status
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("num_signals", [1, 2], ids=["after the grace time", "at a second signal"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_does_not_finish_in_time_gets_an_error(tiny_checkpoint: Path, number: int, num_signals: int) -> None:
    timeout = "0.1" if num_signals == 1 else "60"
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), SHUTDOWN_TIMEOUT=timeout) as server:
        server.wait_until_healthy()
        stream = in_background(lambda: raw_events(server, **LONG, n=16))
        whole = in_background(lambda: server.post("/v1/chat/completions", **LONG, n=16))
        wait_until_running(server, 32)
        for _ in range(num_signals):
            server.process.send_signal(number)
            time.sleep(0.05)
        error = json.loads(stream()[-1].removeprefix("data: "))["error"]
        assert "shutting down" in error["message"]
        assert whole().status_code == 503 and whole().json()["error"]["message"] == error["message"]
        assert server.process.wait(10) == 0
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_ends_the_process_at_once(tiny_checkpoint: Path, number: int) -> None:
    with serve(MAIN, is_cold=True, MODEL_PATH=str(tiny_checkpoint)) as server:
        assert server.get("/health").status_code == 503
        server.process.send_signal(number)
        assert server.process.wait(15) == 0
        assert not any("is ready" in line for line in server.lines)
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.parametrize("command", [MAIN, UVICORN], ids=["main.py", "uvicorn"])
def test_an_open_address_without_a_key_is_warned_about(tiny_checkpoint: Path, command: list[str]) -> None:
    opened = ["0.0.0.0" if word == "127.0.0.1" else word for word in [*command, "--host", "127.0.0.1"]]
    for words, is_warned in ((command, False), (opened, True)):
        with serve(words, MODEL_PATH=str(tiny_checkpoint)) as server:
            server.wait_until_listening()
        assert any("WARNING" in line and "no key" in line for line in server.lines) is is_warned
