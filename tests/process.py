"""The real server in a process of its own, as a user starts it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

ROOT = Path(__file__).resolve().parents[1]
UVICORN = [sys.executable, "-m", "uvicorn", "main:app", "--host", "127.0.0.1", "--port", "0"]
MAIN = [sys.executable, "main.py", "--port", "0"]


@dataclass
class Server:
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    url: str = ""

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=30)

    def post(self, path: str, **body: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=120)

    def wait_until_listening(self, timeout: float = 60) -> None:
        self._wait(lambda: bool(self.url), timeout)

    def wait_until_healthy(self, timeout: float = 300) -> None:
        self.wait_until_listening()
        self._wait(lambda: self.get("/health").status_code == 200, timeout)

    def wait_until_idle(self, timeout: float = 10) -> None:
        idle = {"running": 0, "waiting": 0, "kv_blocks": 0}
        self._wait(lambda: idle.items() <= self.get("/health").json().items(), timeout)

    def _wait(self, condition: Any, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, "the server ended:\n" + "".join(self.lines)
            assert time.monotonic() < deadline, "the server does not get there:\n" + "".join(self.lines)
            time.sleep(0.05)

    def read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"running on (http://[\d.]+:\d+)", line):
                self.url = found[1].replace("0.0.0.0", "127.0.0.1")


@contextmanager
def serve(command: list[str], **environment: str) -> Iterator[Server]:
    """Starts the server and stops it as a user does; it listens, perhaps its model still loads."""
    own = {"HOST", "PORT", "MODEL_PATH", "MODEL_DIR", "NANOVLLM_MODEL_PATH"}
    inherited = {name: value for name, value in os.environ.items() if name not in own}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    server = Server(process)
    reader = threading.Thread(target=server.read_log, daemon=True)
    reader.start()
    try:
        server.wait_until_listening()
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)
        reader.join()
        assert process.stderr is not None
        process.stderr.close()
