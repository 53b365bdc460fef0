"""Two replicas of a tiny model on Ray Serve answer as one server does, and go on as one where the other dies."""

import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from models import save_tiny_checkpoint
from process import MAIN, ROOT, serve

SETTINGS = {"DTYPE": "float32", "MAX_MODEL_LEN": "480", "OMP_NUM_THREADS": "1"}
GREEDY = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
PROMPTS = [f"Question {number}: what is the {number}th word?" for number in range(8)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def chat(url: str, prompt: str, session: str | None = None, **changes: Any) -> httpx2.Response:
    body = {"messages": [{"role": "user", "content": prompt}], "model": "Tiny-Qwen3", **GREEDY, **changes}
    headers = {"x-session-id": session} if session else {}
    return httpx2.post(url + "/v1/chat/completions", json=body, headers=headers, timeout=120)


def text(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


@contextmanager
def replicas(checkpoint: Path, log: Path, **environment: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Their address, when two of them are ready, and the process that holds all of it."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    own = {**SETTINGS, "HOST": "127.0.0.1", "PORT": str(port), "MODEL_PATH": str(checkpoint)}
    own |= {"REPLICAS_MIN": "2", "REPLICAS_CPUS": "0.5", **environment}
    command = ["env", *(f"{name}={value}" for name, value in own.items()), sys.executable, "-m", "deploy.ray_serve"]
    with log.open("wb") as output, subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as process:
        try:
            wait_for_two(url, process, log)
            yield url, process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def wait_for_two(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while len(seen(url, 4)) < 2:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(1)


def seen(url: str, num_requests: int) -> Counter[str]:
    """Who answers requests one after the other."""
    names: Counter[str] = Counter()
    for _ in range(num_requests):
        try:
            answer = httpx2.get(url + "/health", timeout=30)
        except httpx2.TransportError:  # nobody listens yet
            continue
        if answer.status_code == 200:
            names[answer.headers["x-served-by"]] += 1
    return names


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "ServeReplica" in " ".join(child.cmdline())]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("models") / "Tiny-Qwen3")


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    with replicas(checkpoint, tmp_path_factory.mktemp("log") / "load.log") as started:
        yield started


def test_answers_are_those_of_a_server_alone_and_both_replicas_work(cluster: Any, checkpoint: Path) -> None:
    url, _ = cluster
    with serve(MAIN, MODEL_PATH=str(checkpoint), **SETTINGS) as alone:
        alone.wait_until_healthy()
        expected = [text(chat(alone.url, prompt)) for prompt in PROMPTS]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda prompt: chat(url, prompt), PROMPTS * 4))
    assert [text(answer) for answer in answers] == expected * 4
    busy = Counter(answer.headers["x-served-by"] for answer in answers)
    assert len(busy) == 2 and min(busy.values()) >= 4, busy


def test_a_stream_arrives_while_it_is_made(cluster: Any) -> None:
    url, _ = cluster
    body = {"model": "Tiny-Qwen3", "prompt": "Once", **GREEDY, "max_tokens": 400, "stream": True}
    with httpx2.stream("POST", url + "/v1/completions", json=body, timeout=120) as answer:
        arrivals = [(time.monotonic(), chunk) for chunk in answer.iter_raw()]
    assert b"".join(chunk for _, chunk in arrivals).rstrip().endswith(b"data: [DONE]")
    assert len(arrivals) > 20
    assert arrivals[-1][0] - arrivals[0][0] > 0.1


def test_a_client_that_leaves_takes_its_request_along(cluster: Any) -> None:
    url, _ = cluster
    body = {"model": "Tiny-Qwen3", "prompt": "Once", **GREEDY, "max_tokens": 400, "n": 16, "stream": True}
    with httpx2.stream("POST", url + "/v1/completions", json=body, timeout=120) as answer:
        next(answer.iter_raw())
        left = time.monotonic()
    while any(running(url) for _ in range(8)):
        assert time.monotonic() - left < 10
    took = time.monotonic() - left
    whole = time.monotonic()
    httpx2.post(url + "/v1/completions", json={**body, "stream": False}, timeout=120)
    assert took < time.monotonic() - whole


def running(url: str) -> int:
    return int(httpx2.get(url + "/health", timeout=30).json()["running"])


def test_errors_pass_as_they_are_and_every_answer_has_one_id(cluster: Any) -> None:
    url, _ = cluster
    answer = chat(url, "hello", temperature=-1)
    assert len(answer.headers.get_list("x-request-id")) == 1
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "temperature"


def test_where_a_replica_dies_the_other_answers_and_a_new_one_comes(cluster: Any) -> None:
    url, process = cluster
    before = set(seen(url, 20))
    workers(process)[0].kill()
    time.sleep(0.5)  # what it was answering would be lost; nothing was
    assert [chat(url, prompt).status_code for prompt in PROMPTS] == [200] * len(PROMPTS)
    deadline = time.monotonic() + 120
    while not set(seen(url, 8)) - before:
        assert time.monotonic() < deadline
        time.sleep(1)


def test_a_conversation_stays_with_its_replica_until_the_signal_and_then_all_ends(
    checkpoint: Path, tmp_path: Path
) -> None:
    with replicas(checkpoint, tmp_path / "session.log", REPLICAS_ROUTING="session") as (url, process):
        homes = {}
        for session in map(str, range(12)):
            answers = [chat(url, prompt, session, max_tokens=2) for prompt in PROMPTS[:4]]
            served_by = {answer.headers["x-served-by"] for answer in answers}
            assert len(served_by) == 1, "a conversation moved"
            homes[session] = served_by.pop()
        assert len(set(homes.values())) == 2
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
    assert not re.search("Traceback", (tmp_path / "session.log").read_text())
