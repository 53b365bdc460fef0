"""The real server in a process of its own, as a user starts it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
from forked import ROOT, ForkedProcess, can_run

PACKAGES = ("api", "checkpoints", "engine", "providers", "server", "serving", "telemetry", "text", "vision")
UVICORN = [sys.executable, "-m", "uvicorn", "main:app", "--host", "127.0.0.1", "--port", "0"]
MAIN = [sys.executable, "main.py", "--port", "0"]


@dataclass
class Server:
    """A server's process, its log so far, and its address once it listens."""

    process: subprocess.Popen[str] | ForkedProcess
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
            assert time.monotonic() < deadline, "the server is not ready in time:\n" + "".join(self.lines)
            time.sleep(0.05)

    def read_log(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if found := re.search(r"running on (http://[\d.]+:\d+)", line):
                self.url = found[1].replace("0.0.0.0", "127.0.0.1")


def wait_for(condition: Callable[[], object], within: float) -> bool:
    """Returns whether `condition` holds within so many seconds."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def until(condition: Callable[[], object], within: float = 30) -> None:
    """Waits until `condition` holds; the test fails if that takes more seconds than `within`."""
    assert wait_for(condition, within), f"not within {within:g} s"


def start(command: list[str], environment: dict[str, str], *, is_cold: bool) -> subprocess.Popen[str] | ForkedProcess:
    """Starts `command` in the project's folder: as a fork if that makes no difference, else as a new process."""
    if not is_cold and can_run(command, environment):
        return ForkedProcess(command, environment)
    pipe, merged = subprocess.PIPE, subprocess.STDOUT
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=merged, text=True)


@contextmanager
def serve(command: list[str], *, is_cold: bool = False, **environment: str) -> Iterator[Server]:
    """Starts the server and stops it as a user does. It listens when the block begins; its model may still load."""
    with started(command, is_cold=is_cold, **environment) as server:
        server.wait_until_listening()
        yield server


def run_to_end(command: list[str], *, is_cold: bool = False, **environment: str) -> tuple[int, str]:
    """Returns the exit status and the output of a server that ends by itself within a minute."""
    with started(command, is_cold=is_cold, **environment) as server:
        status = server.process.wait(60)
    return status, "".join(server.lines)


@contextmanager
def started(command: list[str], *, is_cold: bool, **environment: str) -> Iterator[Server]:
    """Starts a server, which may not listen yet, and stops it; is_cold: as a new process in any case."""
    replaced = {"HOST", "PORT", "MODEL_PATH", "MODEL_DIR", "NANOVLLM_MODEL_PATH"}
    inherited = {name: value for name, value in os.environ.items() if name not in replaced}
    process = start(command, {**inherited, "OMP_NUM_THREADS": "1", **environment}, is_cold=is_cold)
    server = Server(process)
    reader = threading.Thread(target=server.read_log, daemon=True)
    reader.start()
    try:
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()  # does nothing if the process has ended
            reader.join()
            assert process.stdout is not None
            process.stdout.close()
