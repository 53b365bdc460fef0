"""Places where models come from, without a network: a package registry, and a Hub on this machine."""

import hashlib
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from checkpoints.demo_models import DemoModel
from checkpoints.sources import Sources

PARTS = [b"GGUF" + bytes(range(256)) * 300, b"second" * 5000, b"third"]
WHOLE = b"".join(PARTS)
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY_CONFIG = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}


def demo_of(parts: list[bytes], **changes: object) -> DemoModel:
    """Returns a demo model that packages part0, part1... carry in these parts."""
    whole = b"".join(parts)
    packages = tuple(f"part{number}==1.0" for number in range(len(parts)))
    settings = {"sha256": hashlib.sha256(whole).hexdigest(), "size": len(whole), "hub_file": None, **changes}
    return DemoModel(packages, "*/data/*.bin", **settings)


class Registry:
    """A package registry that makes wheels on the spot, and keeps the requirements that it was asked for."""

    def __init__(self, parts: list[bytes], before: Callable[[str], None] = lambda requirement: None) -> None:
        self.parts, self.before, self.asked = parts, before, list[str]()

    def __call__(self, requirement: str, directory: Path) -> None:
        self.asked.append(requirement)
        self.before(requirement)
        name = requirement.split("==")[0]
        with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(f"{name}/__init__.py", "raise SystemExit('package code must not run')")
            wheel.writestr(f"{name}/data/x.bin", self.parts[int(name.removeprefix("part"))])


def offline(registry: Registry) -> Sources:
    return Sources(endpoint=None, download_wheel=registry)


def ignore(what: str, fraction: float) -> None:
    pass


def left_over(cache: Path) -> list[str]:
    """Returns the names of all files in a cache, except locks."""
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock")


@contextmanager
def http_server(
    files: dict[str, bytes],
    asked: list[tuple[str, str | None]] | None = None,
    broken_at: int | None = None,
    has_ranges: bool = True,
) -> Iterator[str]:
    """Serves a Hub with these paths, and with the headers that huggingface_hub reads; yields its URL.

    asked: gets the path of each file that was read, and the range. broken_at: the bytes after which connections break
    while they send a file; ranges from there on get a 503. has_ranges: False sends the whole file whatever is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, wanted = self.path.split("?")[0], self.headers.get("Range") if has_ranges else None
            body, start = files.get(path), int((wanted or "bytes=0-")[6:-1])
            if self.command == "GET" and asked is not None and "/resolve/" in path:
                asked.append((path.rpartition("/")[2], wanted))
            if broken_at is not None and start >= broken_at:
                self.send_error(503)
                return
            self.send_response(404 if body is None else 206 if wanted else 200)
            self.send_header("Content-Length", str(len(body or b"") - start))
            self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if body is None and self.path.startswith("/api/models/"):
                self.send_header("X-Error-Code", "GatedRepo" if "gated" in self.path else "RepoNotFound")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write((body or b"")[start : broken_at if "/resolve/" in path else None])

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def hub_model(model_id: str, files: dict[str, bytes], large: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Returns the paths of a Hub that has one model. large: the files that it stores by their SHA-256."""
    listing: list[dict[str, object]] = [
        {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
        for name, body in files.items()
    ]
    for file in listing:
        if file["path"] in large:
            digest = hashlib.sha256(files[str(file["path"])]).hexdigest()
            file["lfs"] = {"oid": digest, "size": file["size"], "pointerSize": 100}
    info = {"id": model_id, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
    return {
        "/": b"",
        f"/api/models/{model_id}/revision/main": json.dumps(info).encode(),
        f"/api/models/{model_id}/tree/{COMMIT}": json.dumps(listing).encode(),
        **{f"/{model_id}/resolve/{COMMIT}/{name}": body for name, body in files.items()},
    }
