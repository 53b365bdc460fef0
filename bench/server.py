"""A server in a process of its own for the benchmarks: started on a free port, awaited, and ended."""

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

ROOT = Path(__file__).parents[1]
MAIN = (sys.executable, "main.py")
START_TIMEOUT = 600.0  # seconds
STOP_TIMEOUT = 60.0  # seconds
POLL_INTERVAL = 0.02  # seconds
LOG_TAIL = 2000  # characters of the log in an error
MIB = 2**20


@dataclass(frozen=True)
class Server:
    """A running server of this machine."""

    process: psutil.Popen
    port: int
    started: float  # perf_counter
    output: Path  # its standard output and error

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_ready(self) -> float:
        """Returns the seconds from the start until /health is 200; exits with the end of the log if it never is."""
        with httpx2.Client(trust_env=False, timeout=5.0) as client:
            while time.perf_counter() - self.started < START_TIMEOUT and self.process.poll() is None:
                try:
                    if client.get(f"{self.url}/health").status_code == 200:
                        return time.perf_counter() - self.started
                except httpx2.TransportError:
                    pass  # not listening yet
                time.sleep(POLL_INTERVAL)
        sys.exit(f"error: the server did not start\n{self.output.read_text()[-LOG_TAIL:]}")

    def memory(self) -> float:
        """Returns the resident memory, in MiB."""
        return float(self.process.memory_info().rss / MIB)


@contextmanager
def serving(*command: str, **environment: str) -> Iterator[Server]:
    """Runs a server on a free port of this machine until the block ends.

    command: default `python main.py`; environment: variables beside this process's own, and HOST and PORT.
    """
    port = _free_port()
    variables = {**os.environ, **environment, "HOST": "127.0.0.1", "PORT": str(port)}
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "server.log"
        with output.open("w") as log:
            started = time.perf_counter()
            process = psutil.Popen(command or MAIN, cwd=ROOT, env=variables, stdout=log, stderr=log)
        try:
            yield Server(process, port, started, output)
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _stop(process: psutil.Popen) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT)
    except psutil.TimeoutExpired:
        process.kill()
        raise
