"""HTTP as bytes on a socket: requests that no library would send, and checks that hold for every error."""

import json
import re
import socket
import ssl
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
from process import ROOT, Server

Headers = tuple[tuple[str | bytes, str | bytes], ...]
JSON: Headers = (("content-type", "application/json"),)
LEAK = re.compile(rb"Traceback|site-packages|\b0x[0-9a-f]{6,}|<class '|<function |object at |\.py\W*, line \d")


class Closed(Exception):
    """The connection ended before a whole answer came."""

    def __init__(self, so_far: bytes) -> None:
        super().__init__(f"closed after {so_far[:200]!r}")
        self.so_far = so_far


@dataclass(frozen=True)
class Reply:
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes = field(repr=False)
    seconds: float = 0.0

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    def names(self) -> list[str]:
        return [name for name, _ in self.headers]

    @property
    def json(self) -> Any:
        return strict_json(self.body)


class Connection:
    """One socket; replies are read one after the other, independently of what was sent."""

    def __init__(self, url: str, timeout: float = 30, receive_buffer: int | None = None) -> None:
        address = urlsplit(url)
        assert address.hostname and address.port
        self.host = f"{address.hostname}:{address.port}"
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(timeout)
        self.socket.connect((address.hostname, address.port))
        self._buffer = b""

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()

    def reset(self) -> None:
        """Ends the connection with a RST."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_unless_closed(self, data: bytes | Iterable[bytes]) -> int:
        """Returns the number of bytes that the system took before the server closed the connection."""
        sent = 0
        try:
            for piece in [data] if isinstance(data, bytes) else data:
                self.socket.sendall(piece)
                sent += len(piece)
        except (ConnectionError, TimeoutError, ssl.SSLError):
            pass
        return sent

    def ask(self, method: str, path: str | bytes, body: bytes = b"", headers: Headers = JSON) -> Reply:
        self.send(request(method, path, body, headers, self.host))
        return self.reply(method)

    def reply(self, method: str = "GET") -> Reply:
        """Reads the next reply. Raises Closed if the connection ends before it is whole."""
        begin = time.monotonic()
        head = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        status = int(head[0].split(" ")[1])
        pairs = (line.partition(":") for line in head[1:] if line)
        headers = tuple((name.lower(), value.strip()) for name, _, value in pairs)
        reply = Reply(status, headers, b"")
        if status < 200 or status in (204, 304) or method == "HEAD":
            body = b""
        elif "chunked" in (reply.header("transfer-encoding") or ""):
            body = b"".join(self._chunks())
        elif (length := reply.header("content-length")) is not None:
            body = self._exactly(int(length))
        else:
            body = self.rest()
        return Reply(status, headers, body, time.monotonic() - begin)

    def is_closed(self, within: float = 5) -> bool:
        """Returns whether the server ends the connection within so many seconds, without another byte."""
        self.socket.settimeout(within)
        try:
            return self._buffer == b"" and self.socket.recv(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def rest(self) -> bytes:
        """Returns all bytes until the server ends the connection."""
        pieces = [self._buffer]
        self._buffer = b""
        try:
            while data := self.socket.recv(65536):
                pieces.append(data)
        except ConnectionError:
            pass
        return b"".join(pieces)

    def read_some(self) -> bytes:
        data, self._buffer = self._buffer, b""
        return data or self.socket.recv(65536)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self._until(b"\r\n").split(b";")[0], 16):
            yield self._exactly(size + 2)[:-2]
        self._exactly(2)

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._buffer:
            self._more()
        found, _, self._buffer = self._buffer.partition(mark)
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._more()
        found, self._buffer = self._buffer[:size], self._buffer[size:]
        return found

    def _more(self) -> None:
        try:
            data = self.socket.recv(65536)
        except ConnectionError as error:
            raise Closed(self._buffer) from error
        if not data:
            raise Closed(self._buffer)
        self._buffer += data


def request(
    method: str, path: str | bytes, body: bytes = b"", headers: Headers = JSON, host: str | bytes = "127.0.0.1"
) -> bytes:
    """Returns a request with a Host and a Content-Length, unless `headers` has them."""
    names = {_bytes(name).lower() for name, _ in headers}
    added: Headers = (("host", host),) if b"host" not in names else ()
    if (body or method == "POST") and not names & {b"content-length", b"transfer-encoding"}:
        added = (*added, ("content-length", str(len(body))))
    lines = [b" ".join((method.encode(), _bytes(path), b"HTTP/1.1"))]
    lines += [_bytes(name) + b": " + _bytes(value) for name, value in (*added, *headers)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def _bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def strict_json(body: bytes) -> Any:
    """Parses JSON. Raises ValueError for what only Python accepts: NaN, Infinity, lone surrogates."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not valid JSON")

    value = json.loads(body.decode(), parse_constant=refuse)
    json.dumps(value, ensure_ascii=False).encode()
    return value


def error_of(reply: Reply, asked: bytes = b"") -> dict[str, Any]:
    """Returns the error object; fails unless it has OpenAI's shape and reveals nothing of the process.

    asked: the request, whose text the error may repeat."""
    assert (reply.header("content-type") or "").startswith("application/json"), (reply, reply.body[:200])
    assert reply.header("x-request-id"), reply
    body = reply.json
    assert body.keys() == {"error"}, body
    error = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}, error
    assert isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str), error
    assert all(error[name] is None or isinstance(error[name], str) for name in ("param", "code")), error
    for leak in (*LEAK.findall(reply.body), str(ROOT).encode()):
        assert leak not in reply.body or leak in asked, f"the error reveals {leak!r}: {reply.body[:500]!r}"
    return dict(error)


def memory(server: Server) -> int:
    """Returns the resident memory, in bytes."""
    return int(psutil.Process(server.process.pid).memory_info().rss)


def processor_seconds(server: Server) -> float:
    """Returns the processor time of all the server's threads; other processes do not change it."""
    times = psutil.Process(server.process.pid).cpu_times()
    return float(times.user + times.system)


def loop_seconds(server: Server) -> float:
    """Returns the processor time of the main thread, which runs the event loop."""
    threads = {thread.id: thread for thread in psutil.Process(server.process.pid).threads()}
    return float(threads[server.process.pid].user_time + threads[server.process.pid].system_time)


@contextmanager
def bounded_peak(server: Server, limit: int) -> Iterator[None]:
    """Fails if the server's memory grows by `limit` bytes or more at any time in the block."""
    status = Path(f"/proc/{server.process.pid}/status")
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # resets the peak
    before = memory(server)
    yield
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    assert peak, "the system reports no peak"
    grown = int(peak[1]) * 1024 - before
    assert grown < limit, f"{grown / 2**20:.0f} MiB more than before"
