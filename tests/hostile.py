"""Hostile requests to the real process: each gets the answer that its row demands, and leaves nothing behind.

The chapters are tests/test_hostile_*.py, the rows those of rows.md. A case's name begins with its row.
After every row the server answers as it did before.
"""

import base64
import io
import json
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from process import MAIN, Server, serve
from raw_http import JSON, Closed, Connection, Headers, Reply, error_of, memory, processor_seconds, strict_json
from upstreams import Asked, Upstream, upstream
from upstreams import Reply as Said

MODEL, SEEING = "Tiny-Qwen3", "Tiny-Gemma3"
CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
EMBED, RERANK, TOKENS, TEXTS = "/v1/embeddings", "/v1/rerank", "/tokenize", "/detokenize"
REFUSED = frozenset({400})
ANY_OR_REFUSED = frozenset({200, 400})
LISTENER = "http://listener.invalid"  # replaced by the URL of a server on this machine that must get no request
GROWTH = 150 * 2**20  # bytes of memory that one kind of request may leave behind
KEPT = 256 * 2**20  # bytes that all together may leave behind: the heaps of many threads stay larger than needed
AGAIN = 32 * 2**20  # bytes that all heavy requests may leave behind when they are repeated
SETTINGS = {"DTYPE": "float32", "MAX_MODEL_LEN": "480", "MAX_NUM_SEQS": "16"}
PATIENCE = 5.0  # seconds of wall time that other processes may take
ANYTHING = "*"
OPTIONS = ("code", "seconds", "path", "is_same", "sees")  # fields of a Case; other names are fields of its body
ADDRESSES = (
    "OPENAI_BASE_URL",
    "GEMINI_BASE_URL",
    "ANTHROPIC_BASE_URL",
    "DEEPSEEK_API_URL",
    "MINMAX_API_URL",
    "HF_ENDPOINT",
)


@dataclass(frozen=True)
class Case:
    """A request, and the answers that are right."""

    row: int
    name: str
    body: bytes = field(default=b"", repr=False)
    statuses: frozenset[int] = REFUSED
    param: str | None = ANYTHING  # the error's param, or a prefix of it; ANYTHING: not checked
    code: str | None = ANYTHING
    path: str = CHAT
    method: str = "POST"
    headers: Headers = field(default=JSON, repr=False)
    seconds: float = 1.0  # of the server's processor time
    is_same: bool = False  # the answer must be the one to BASE
    sees: bool = False  # for the model that takes images
    is_slow: bool = False  # takes a second, and is much like another case: only `make test-all` sends it

    def __str__(self) -> str:
        return f"row{self.row:02}-{self.name}"


def as_bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value).encode()


def raw(text: str) -> bytes:
    """Puts text that `json.dumps` would not write into the body of the greedy request."""
    return as_bytes(BASE)[:-1] + b", " + text.encode("utf-8", "surrogatepass") + b"}"


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


BASE: dict[str, Any] = {"model": MODEL, "messages": [user("Hello")], "max_tokens": 4, "temperature": 0}
PROMPT: dict[str, Any] = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, "temperature": 0}
INPUT: dict[str, Any] = {"model": MODEL, "input": "Hello", "max_output_tokens": 4, "temperature": 0}
GOOD = {
    CHAT: BASE,
    TEXT: PROMPT,
    RESPONSES: INPUT,
    EMBED: {"model": MODEL, "input": "x"},
    RERANK: {"model": MODEL, "query": "x", "documents": ["y"]},
    TOKENS: {"prompt": "x"},
    TEXTS: {"tokens": [5]},
}


def chat(row: int, name: str, statuses: Iterable[int] = REFUSED, param: str | None = ANYTHING, **changes: Any) -> Case:
    options = {key: changes.pop(key) for key in OPTIONS if key in changes}
    good = GOOD[options.get("path", CHAT)]
    return Case(row, name, as_bytes({**good, **changes}), frozenset(statuses), param, **options)


def slug(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._+-") else "_" for c in text)
    return kept[:40] or "empty"


def image_part(url: Any) -> list[dict[str, Any]]:
    return [user([{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}])]


def sees(row: int, name: str, url: Any, statuses: Iterable[int] = REFUSED, **options: Any) -> Case:
    changes = {"model": SEEING, "messages": image_part(url), "sees": True, "seconds": 3.0, **options}
    return chat(row, name, statuses, **{"param": "messages[0].content[0]", **changes})


def data_url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def png(width: int, height: int, *chunks: tuple[bytes, bytes], pixels: bytes = b"") -> bytes:
    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = block(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    inner = b"".join(block(*chunk) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + head + inner + block(b"IDAT", zlib.compress(pixels)) + block(b"IEND", b"")


def picture(kind: str, size: tuple[int, int] = (40, 30), colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def function(parameters: Any = None, **changes: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters or {"type": "object"}, **changes}}


def schema_of(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


# --- the servers


@dataclass
class Target:
    """A server that gets hostile requests."""

    server: Server
    listener: Upstream
    answer: Any = None
    before: int = 0  # bytes of memory
    connection: Connection | None = None
    used_at: float = 0.0

    def ask(self, case: Case) -> Reply:
        """Sends over one connection, as long as it lasts; the reply's seconds are the server's processor time.

        If the server waits for long, they are the wall time instead, less what a busy machine may take.
        """
        port = self.listener.url.rpartition(":")[2]
        body = case.body.replace(b"{port}", port.encode()).replace(LISTENER.encode(), self.listener.url.encode())
        now, spent = time.monotonic(), processor_seconds(self.server)
        if self.connection is None or now - self.used_at > 30:  # the server may have closed an old one
            self.close()
            self.connection = Connection(self.server.url, timeout=20 + case.seconds)
        self.used_at = now
        try:
            reply = self.connection.ask(case.method, case.path, body, case.headers)
        except (Closed, TimeoutError):
            self.close()
            raise
        if (reply.header("connection") or "") == "close":
            self.close()
        waited = time.monotonic() - now - PATIENCE
        return replace(reply, seconds=max(waited, processor_seconds(self.server) - spent))

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.connection = None


@contextmanager
def started(blind: Path, seeing: Path) -> Iterator[dict[bool, Target]]:
    """Yields targets, by whether they take images. All providers' addresses lead to a listener on this machine.

    At the end nothing runs or waits, memory is as before, and the log has no traceback.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(upstream(_found_out))
        settings = {**dict.fromkeys(ADDRESSES, listener.url), **SETTINGS}
        servers = [stack.enter_context(serve(MAIN, MODEL_PATH=str(path), **settings)) for path in (blind, seeing)]
        found = {sees: Target(server, listener) for sees, server in zip((False, True), servers, strict=True)}
        for sees_images, target in found.items():
            stack.callback(target.close)
            target.server.wait_until_healthy()
            target.answer = _message(target.ask(alive(0, sees_images)))
            name = SEEING if sees_images else MODEL
            assert _message(target.ask(chat(0, "json", {200}, model=name, response_format={"type": "json_object"})))
            target.before = memory(target.server)
        yield found
        for target in found.values():
            check_nothing_remains(target)


def check_nothing_remains(target: Target) -> None:
    target.server.wait_until_idle()
    grown = memory(target.server) - target.before
    assert grown < KEPT, f"{grown / 2**20:.0f} MiB more than at the beginning"
    log = "".join(target.server.lines)
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:4000]


def _found_out(asked: Asked) -> Said:
    return Said.of({"error": "this must not be asked"}, 500)


def _message(reply: Reply) -> Any:
    return reply.json["choices"][0]["message"]


def alive(row: int, is_seeing: bool) -> Case:
    """Returns the case that ends a row: the answer must be the one from before."""
    model = SEEING if is_seeing else MODEL
    return chat(row, "alive", {200}, model=model, sees=is_seeing, is_same=True, seconds=5)


def cases(*rows: list[Case]) -> list[pytest.ParameterSet]:
    """Returns the cases of each row, and after each row one that shows that the server is alive."""
    asked = [case for row in rows for case in (*row, alive(row[0].row, any(case.sees for case in row)))]
    return [pytest.param(case, id=str(case), marks=[pytest.mark.slow] * case.is_slow) for case in asked]


def check(targets: dict[bool, Target], case: Case) -> None:
    """Sends a case, and fails unless the answer is right."""
    target = targets[case.sees]
    reply = target.ask(case)
    for _ in range(2):  # the server may have finished work of an earlier request: the least time counts
        if case.seconds < reply.seconds < 5:
            reply = min(reply, target.ask(case), key=lambda reply: reply.seconds)
    assert reply.status in case.statuses, (reply, reply.body[:500])
    assert reply.seconds <= case.seconds, reply
    check_headers(reply)
    if reply.status >= 400:
        check_error(case, reply)
    elif case.method == "POST":
        check_answer(case, reply, target.answer)
    asked, target.listener.asked[:] = list(target.listener.asked), []
    assert not asked, asked


def check_headers(reply: Reply) -> None:
    assert reply.names().count("x-request-id") == 1, reply
    assert not {"x-evil", "set-cookie", "x", "server-error"} & set(reply.names()), reply
    request_id = reply.header("x-request-id") or ""
    assert len(request_id) <= 128 and request_id.replace("-", "").replace("_", "").replace(".", "").isalnum(), reply


def check_error(case: Case, reply: Reply) -> None:
    assert not (reply.header("content-type") or "").startswith("text/event-stream")
    if case.method == "HEAD":
        return
    error = error_of(reply, case.body + case.path.encode())
    if reply.status == 405:
        assert reply.header("allow"), reply
    if case.param not in (ANYTHING, None):
        found = error["param"] or ""
        is_inside = found.startswith((f"{case.param}.", f"{case.param}["))
        assert found == case.param or is_inside, error
    if case.code != ANYTHING:
        assert error["code"] == case.code, error


def check_answer(case: Case, reply: Reply, expected: Any) -> None:
    answer = strict_json(reply.body)
    assert "error" not in answer or answer["error"] is None, answer
    if case.is_same:
        assert answer["choices"][0]["message"] == expected
