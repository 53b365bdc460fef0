"""Fake providers on this machine: servers in their formats, which fail in every way that a test asks for."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2


class Parts(httpx2.AsyncByteStream):
    """A body that arrives in these parts."""

    def __init__(self, parts: list[bytes]) -> None:
        self.parts = parts

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            yield part


@dataclass
class Asked:
    """A request that arrived."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes
    left_at: float | None = None  # time at which the client closed the connection

    @property
    def body(self) -> Any:
        return json.loads(self.content)


@dataclass
class Reply:
    """A scripted reply, piece by piece: a number is a pause in seconds, None drops the connection."""

    pieces: list[bytes | float | None] = field(default_factory=list)
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    is_whole: bool = True  # with a Content-Length

    @classmethod
    def of(cls, body: Any, status: int = 200, **headers: str) -> "Reply":
        kind = {"content-type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
        return cls([body if isinstance(body, bytes) else json.dumps(body).encode()], status, kind)

    @classmethod
    def stream(cls, *pieces: bytes | float | None) -> "Reply":
        return cls(list(pieces), headers={"content-type": "text/event-stream"}, is_whole=False)


Script = Callable[[Asked], Reply]  # the reply to each request


class Upstream:
    """A server that replies as its script says, and keeps the requests."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while True:
                asked = await self._read(reader)
                self.asked.append(asked)
                sending = asyncio.ensure_future(self._send(self.script(asked), writer))
                watching = asyncio.ensure_future(reader.read(1))
                await asyncio.wait({sending, watching}, return_when=asyncio.FIRST_COMPLETED)
                if not sending.done():
                    asked.left_at = time.monotonic()
                    sending.cancel()
                    await asyncio.gather(watching, return_exceptions=True)
                    break
                watching.cancel()
                await asyncio.wait({watching})  # only one may read at a time
                if not sending.result():
                    break
        writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Asked:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:]) if name}
        return Asked(method, path, headers, await reader.readexactly(int(headers.get("content-length", 0))))

    async def _send(self, reply: Reply, writer: asyncio.StreamWriter) -> bool:
        """Sends a reply; returns whether the connection can be used again."""
        length = sum(len(piece) for piece in reply.pieces if isinstance(piece, bytes)) + 100 * (None in reply.pieces)
        headers = {**reply.headers, **({"content-length": str(length)} if reply.is_whole else {"connection": "close"})}
        head = [f"HTTP/1.1 {reply.status} X", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        if not reply.pieces or not isinstance(reply.pieces[0], float):
            writer.write("\r\n".join(head).encode())
            head = []
        for piece in reply.pieces:
            if piece is None:
                writer.transport.abort()
                return False
            if isinstance(piece, float):
                await writer.drain()
                await asyncio.sleep(piece)
                continue
            writer.write("\r\n".join(head).encode() + piece)
            head = []
        await writer.drain()
        return reply.is_whole


@contextmanager
def upstream(script: Script) -> Iterator[Upstream]:
    server = Upstream(script)
    with listening(server.serve) as server.url:
        yield server


@contextmanager
def listening(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> Iterator[str]:
    """Serves on an event loop in another thread until the block ends; yields the address."""
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, limit=2**24))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        asyncio.run_coroutine_threadsafe(_stop(listening), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _stop(listening: asyncio.Server) -> None:
    listening.close()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def event(data: Any, name: str | None = None) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\n" if name else "").encode() + f"data: {text}\n\n".encode()


def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "theirs", "choices": [choice], **more}


def completion(text: str, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", **more}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "theirs",
        "choices": [choice],
        "usage": usage,
    }


def told(*texts: str, done: bool = True) -> list[bytes | float | None]:
    """A stream as OpenAI sends it."""
    first = event(chunk({"role": "assistant", "content": ""}))
    middle = [event(chunk({"content": text})) for text in texts]
    return [first, *middle, event(chunk({}, "stop")), *([event("[DONE]")] if done else [])]


def message(text: str) -> dict[str, Any]:
    """An answer of the Messages API."""
    usage = {"input_tokens": 3, "output_tokens": 2}
    return {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x", "usage": usage,
            "content": [{"type": "text", "text": text}], "stop_reason": "end_turn", "stop_sequence": None}  # fmt: skip


def message_events(*texts: str) -> list[bytes | float | None]:
    """The same as a stream."""
    block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    deltas = [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": t}} for t in texts]
    start = {**message(""), "content": [], "stop_reason": None}
    last = {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": start}, block, {"type": "ping"}, *deltas,
        {"type": "content_block_stop", "index": 0}, {**last, "usage": {"output_tokens": 2}}, {"type": "message_stop"},
    ]  # fmt: skip
    return [event(data, data["type"]) for data in events]
