"""What the tests of the real process ask it."""

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
from process import Server

MODEL = "Tiny-Qwen3"
HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, 世界"}]


def raw_events(server: Server, path: str = "/v1/chat/completions", **body: Any) -> list[str]:
    body = {"model": MODEL, "stream": True, "max_tokens": 20, **body}
    with httpx2.stream("POST", server.url + path, json=body, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return b"".join(response.iter_raw()).decode().split("\n\n")[:-1]


LONG: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 400, "ignore_eos": True}


def in_background(work: Callable[[], Any]) -> Callable[[], Any]:
    """Starts `work` in a thread; call the result to wait for what it returns."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()

    def wait() -> Any:
        thread.join(60)
        return results[0]

    return wait


def wait_until_running(server: Server, num_sequences: int = 1) -> None:
    deadline = time.monotonic() + 30
    while server.get("/health").json()["running"] < num_sequences:
        assert time.monotonic() < deadline
        time.sleep(0.01)
