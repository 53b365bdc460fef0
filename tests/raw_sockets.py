"""A server with small bounds for the tests of raw sockets, and the requests that they send as bytes."""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from process import MAIN, Server, serve, wait_for
from raw_http import Connection

MODEL, CHAT = "Tiny-Qwen3", "/v1/chat/completions"
LIMIT = 2 * 2**20  # bytes of a body
WAITS = 2.0  # seconds that a request's headers may take, and its body besides what its size allows
READS = 3.0  # seconds after which a client that reads nothing is cut off
MOST = 260  # connections
SETTINGS = {
    "MAX_BODY_SIZE": str(LIMIT),
    "HEADER_TIMEOUT": str(WAITS),
    "BODY_TIMEOUT": str(WAITS),
    "WRITE_TIMEOUT": str(READS),
    "MAX_CONNECTIONS": str(MOST),
}
HELLO: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
BODY = json.dumps({**HELLO, "temperature": 0}).encode()
SMALL = b'{"prompt": "x"}'
LASTING: dict[str, Any] = {**HELLO, "max_tokens": 440, "ignore_eos": True, "stream": True, "n": 80}  # seconds
SMUGGLED = b"GET /v1/models/SMUGGLED HTTP/1.1\r\nHost: x\r\n\r\n"
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
GET = "GET /v1/models HTTP/1.1"
LENGTH, CHUNKED = f"Content-Length: {len(SMALL)}", "Transfer-Encoding: chunked"


@contextmanager
def bounded_server(checkpoint: Path) -> Iterator[Server]:
    """Runs a server; at the end it must be idle, and its log without a traceback."""
    with serve(MAIN, MODEL_PATH=str(checkpoint), DTYPE="float32", MAX_MODEL_LEN="480", **SETTINGS) as server:
        server.wait_until_healthy()
        yield server
        server.wait_until_idle(5)
        text = "".join(server.lines)
        assert "Traceback" not in text, text[text.index("Traceback") - 300 :][:3000]


@contextmanager
def served_as_before(server: Server) -> Iterator[None]:
    """Checks that a client after the block gets the same answer as one before it."""
    before = greedy(server)
    yield
    assert wait_for(lambda: greedy(server) == before, 5)


def greedy(server: Server) -> Any:
    with Connection(server.url) as connection:
        reply = connection.ask("POST", CHAT, BODY)
        return reply.json["choices"][0]["message"] if reply.status == 200 else reply.status


def converse(server: Server, data: bytes, within: float = 5) -> tuple[bytes, bool]:
    """Returns all bytes that come back, and whether the server ended the connection."""
    answer, deadline = b"", time.monotonic() + within
    with Connection(server.url) as connection:
        connection.send_unless_closed(data)
        while (left := deadline - time.monotonic()) > 0:
            connection.socket.settimeout(left)
            try:
                data = connection.read_some()
            except TimeoutError:
                break
            except ConnectionError:
                return answer, True
            if not data:
                return answer, True
            answer += data
    return answer, False


def head(*lines: str | bytes, first: str = "POST /tokenize HTTP/1.1") -> bytes:
    given = [line.encode() if isinstance(line, str) else line for line in lines]
    return b"\r\n".join((first.encode(), b"Host: x", b"Content-Type: application/json", *given)) + b"\r\n\r\n"


def chunked(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + end


def num_sockets(server: Server) -> int:
    folder = f"/proc/{server.process.pid}/fd"
    found = 0
    for name in os.listdir(folder):
        try:
            found += os.readlink(f"{folder}/{name}").startswith("socket:")
        except FileNotFoundError:
            pass
    return found


def is_idle(server: Server) -> bool:
    return bool({"running": 0, "waiting": 0}.items() <= server.get("/health").json().items())
