"""GET /: a chat page for people who have no other client yet, with its style and scripts, which lie in api/page/.

The page holds no secrets, so it needs no key; its requests do. It consists of the files in the table and no others.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from fastapi import Request, Response

from api.routing import RootRouter

FOLDER = Path(__file__).resolve().parents[1] / "page"
SCRIPTS = (
    *("answer", "chat", "composer", "conversation", "dom", "events", "main", "markdown", "picture", "server"),
    *("settings", "status", "turn"),
)
FILES = {  # path of the request -> file
    "/": "index.html",
    **{f"/page/{name}": name for name in ("style.css", "icon.svg", *(f"{script}.js" for script in SCRIPTS))},
}
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = {  # what the browser lets the page do: nothing but this
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data: blob:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",  # no text becomes markup
}
HEADERS = {
    "Cache-Control": "no-cache",  # kept, but asked for again: a new version of the server is seen at once
    "Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in POLICY.items()),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = RootRouter()


@dataclass(frozen=True)
class PageFile:
    content: bytes
    media_type: str
    etag: str

    @classmethod
    @cache
    def of(cls, name: str) -> "PageFile":
        content = (FOLDER / name).read_bytes()
        return cls(content, MEDIA_TYPES[Path(name).suffix], etag=f'"{sha256(content).hexdigest()[:32]}"')


def _sender_of(name: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(request: Request) -> Response:
        file = PageFile.of(name)
        headers = {**HEADERS, "ETag": file.etag}
        if _has(request, file.etag):
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    return send


def _has(request: Request, etag: str) -> bool:
    """Returns whether the client has this version already."""
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    return bool(known & {etag, "*"})


for _path, _name in FILES.items():
    router.add_api_route(_path, _sender_of(_name), methods=["GET", "HEAD"], include_in_schema=False)
