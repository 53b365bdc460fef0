"""The outside of a request, its path, method, headers and encoding: rows 18 to 20, 26 and 51 to 53 of rows.md."""

import time
import zlib

import pytest
from hostile import (
    ANY_OR_REFUSED,
    BASE,
    CHAT,
    EMBED,
    MODEL,
    RESPONSES,
    TEXT,
    TOKENS,
    Case,
    Target,
    as_bytes,
    cases,
    chat,
    check,
    slug,
)
from raw_http import JSON, Connection, Headers, bounded_peak

GET_404 = frozenset({404})
PATHS = {
    "page": "/page",
    "v1": "/v1",
    "v1-slash": "/v1/",
    "v3": "/v3/models",
    "capitals": "/V1/MODELS",
    "two-slashes": "//v1/models",
    "inner-slashes": "/v1//models",
    "files": "/v1/files",
    "admin": "/admin",
    "metrics-inside": "/v1/metrics/x",
    "env": "/.env",
    "git": "/.git/config",
    "main": "/main.py",
    "dots": "/../main.py",
    "encoded-dots": "/%2e%2e/main.py",
    "double-encoded": "/%252e%252e/main.py",
    "backslash": "/v1\\models",
    "nul": "/v1/model%00s",
    "crlf": "/x%0d%0aSet-Cookie:%20a=b",
    "bad-utf8": "/%ff%fe",
    "bad-percent": "/%zz%",
    "semicolon": "/v1/models;x=y",
    "long": "/" + "a" * 10_000,
    "very-long": "/" + "a" * 60_000,
    "many-parts": "/a" * 5_000,
    "fragment": "/v1/model%23s",
    "unicode": "/v1/%e6%a8%a1%e5%9e%8b",
    "at": "/@127.0.0.1",
    "colon": "/http:/127.0.0.1/",
    "template": "/%7B%7B7*7%7D%7D",
    "docs-inside": "/docs/../../main.py",
    "static": "/static/..%2f..%2fmain.py",
    "abort": "/abort_requests",
    "load": "/load_model",
    "reset": "/reset",
    "invocations": "/invocations",
    "trailing-slash": "/v1/chat/completions/",
    "trailing-slash-health": "/health/",
    "format": "/v1/models.json",
}
ROUTES = {CHAT: {"POST"}, "/v1/models": {"GET"}, "/health": {"GET"}, TOKENS: {"POST"}, f"/v1/models/{MODEL}": {"GET"}}
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "PROPFIND", "OPTIONS", "LOCK", "SEARCH")
ROW_18 = [Case(18, f"get-{name}", b"", GET_404, path=path, method="GET") for name, path in PATHS.items()]
ROW_18 += [Case(18, f"post-{name}", as_bytes(BASE), GET_404, path=path) for name, path in PATHS.items()]
ROW_18 += [
    Case(18, f"{method.lower()}-{slug(path)}", b"", frozenset({405}), path=path, method=method)
    for path, known in ROUTES.items()
    for method in METHODS
    if method not in known
]

FORM = "multipart/form-data; boundary=x"
KINDS: dict[str, tuple[Headers, frozenset[int]]] = {
    "none": ((), frozenset({200, 400, 415})),
    "empty": ((("content-type", ""),), frozenset({200, 400, 415})),
    "text": ((("content-type", "text/plain"),), frozenset({200, 400, 415})),
    "text-charset": ((("content-type", "text/plain;charset=UTF-8"),), frozenset({200, 400, 415})),
    "form": ((("content-type", "application/x-www-form-urlencoded"),), frozenset({400, 415})),
    "multipart": ((("content-type", FORM),), frozenset({400, 415})),
    "multipart-without-boundary": ((("content-type", "multipart/form-data"),), frozenset({400, 415})),
    "multipart-long-boundary": ((("content-type", FORM + "x" * 20_000),), frozenset({400, 415})),
    "slow-expression": ((("content-type", "application/x-www-form-urlencoded; !=\"" + "\\" * 20_000),),
        frozenset({400, 415})),
    "many-parameters": ((("content-type", "text/plain" + ";a=b" * 8_000),), frozenset({200, 400, 415})),
    "xml": ((("content-type", "application/xml"),), frozenset({200, 400, 415})),
    "bytes": ((("content-type", "application/octet-stream"),), frozenset({200, 400, 415})),
    "pickle": ((("content-type", "application/x-python-pickle"),), frozenset({200, 400, 415})),
    "star": ((("content-type", "*/*"),), frozenset({200, 400, 415})),
    "garbage": ((("content-type", "///;;;==,,"),), frozenset({200, 400, 415})),
    "latin1": ((("content-type", b"application/\xe9\xff"),), frozenset({200, 400, 415})),
    "almost": ((("content-type", "application/jsonp"),), frozenset({200, 400, 415})),
    "prefix": ((("content-type", "xapplication/json"),), frozenset({200, 400, 415})),
    "capitals": ((("content-type", "Application/JSON"),), frozenset({200})),
    "charset": ((("content-type", "application/json; charset=utf-8"),), frozenset({200})),
    "utf16-charset": ((("content-type", "application/json; charset=utf-16"),), frozenset({200, 400, 415})),
    "unknown-charset": ((("content-type", "application/json; charset=../../x"),), frozenset({200, 400, 415})),
    "suffix": ((("content-type", "application/vnd.api+json"),), frozenset({200, 400, 415})),
    "two": ((("content-type", "application/json"), ("content-type", FORM)), frozenset({200, 400, 415})),
    "two-reversed": ((("content-type", FORM), ("content-type", "application/json")), frozenset({200, 400, 415})),
}  # fmt: skip
MULTIPART = b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\n' + MODEL.encode() + b"\r\n--x--\r\n"
ROW_19 = [Case(19, name, as_bytes(BASE), statuses, headers=headers) for name, (headers, statuses) in KINDS.items()]
ROW_19 += [
    Case(19, f"{slug(path)}-{name}", body, frozenset({400, 415}), headers=KINDS[name][0], path=path)
    for path in (CHAT, TEXT, RESPONSES, EMBED, TOKENS)
    for name, body in {
        "form": b"model=x&messages=y",
        "multipart": MULTIPART,
        "multipart-without-boundary": MULTIPART,
        "text": b"hello",
    }.items()
]
ROW_19 += [
    Case(19, "multipart-many-parts", MULTIPART[:-6] * 20_000 + b"--x--\r\n", frozenset({400, 415}),
        headers=KINDS["multipart"][0]),
    Case(19, "multipart-open", MULTIPART[:40], frozenset({400, 415}), headers=KINDS["multipart"][0]),
    Case(19, "form-many-fields", b"a=b&" * 200_000, frozenset({400, 415}), headers=KINDS["form"][0]),
]  # fmt: skip


def squeezed(kind: int, size: int = 50_000_000) -> bytes:
    """kind: as zlib's wbits."""
    packer = zlib.compressobj(9, zlib.DEFLATED, kind)
    return packer.compress(b'{"model": "' + b" " * size) + packer.flush()


ENCODINGS = frozenset({400, 415})
BOMBS = {"gzip": squeezed(31), "deflate": squeezed(15), "raw-deflate": squeezed(-15)}
ROW_20 = [
    *(
        Case(20, f"bomb-{name}", body, ENCODINGS, headers=(*JSON, ("content-encoding", encoding)))
        for name, body, encoding in (
            ("gzip", BOMBS["gzip"], "gzip"),
            ("x-gzip", BOMBS["gzip"], "x-gzip"),
            ("deflate", BOMBS["deflate"], "deflate"),
            ("raw-deflate", BOMBS["raw-deflate"], "deflate"),
            ("gzip-twice", zlib.compress(BOMBS["gzip"]), "gzip, gzip"),
            ("no-header", BOMBS["gzip"], "identity"),
            ("brotli", b"\x8b\x7f\x80\x00\xff" * 100, "br"),
            ("zstd", b"\x28\xb5\x2f\xfd" + b"\xff" * 100, "zstd"),
            ("capitals", BOMBS["gzip"], "GZIP"),
        )
    ),
    Case(20, "bomb-as-transfer", BOMBS["gzip"], ENCODINGS, headers=(*JSON, ("te", "gzip"))),
    Case(20, "identity", as_bytes(BASE), frozenset({200}), headers=(*JSON, ("content-encoding", "identity"))),
]

SANE = {"/v1/models": 200, "/health": 200, "/nowhere": 404, CHAT: 405}
HOSTS = {
    "question": "x?", "fragment": "x#", "slash": "x/", "path": "x/v1/models?", "other-path": "x/health?",
    "health": "/health",
    "health-fragment": "x/health#", "at": "user:pass@x", "port": "x:99999", "letters": "x:port", "minus": "x:-1",
    "empty": "",
    "brackets": "[::1", "v6": "[::1]:80", "zone": "[fe80::1%25eth0]", "two-colons": "a:b:c", "backslash": "x\\y",
    "blank": "x y",
    "tab": "x\ty", "latin1": b"\xe9\xff", "quotes": '"x"', "angle": "<x>", "percent": "%00", "comma": "x, y",
    "dots": "../x",
    "long": "x" * 10_000, "url": "http://x/", "semicolon": "x;y", "braces": "{x}", "star": "*", "dot": ".",
    "trailing-dot": "x.",
}  # fmt: skip
ROW_26 = [
    Case(26, f"{name}-{slug(path)}", b"", frozenset({status, 400}), path=path, method="GET", headers=(("host", host),))
    for name, host in HOSTS.items()
    for path, status in SANE.items()
]
ROW_26 += [
    Case(26, f"chat-{name}", as_bytes(BASE), ANY_OR_REFUSED, headers=(*JSON, ("host", HOSTS[name])), is_same=True)
    for name in ("question", "fragment", "slash", "path", "health", "at", "empty", "latin1")
]
ROW_26 += [
    Case(26, f"two-{slug(path)}", b"", frozenset({status, 400}), path=path, method="GET",
        headers=(("host", "x"), ("host", "y")))
    for path, status in SANE.items()
]  # fmt: skip

EVIL_IDS = {
    "blank": "a b", "long": "x" * 129, "very-long": "x" * 20_000, "latin1": b"\xe9\xff", "utf8": "ид".encode(),
    "tab": "a\tb", "ansi": b"\x9b[31m", "html": "<script>",
    "quotes": '"x"', "comma": "a,b", "slash": "../../x", "braces": "{x}", "percent": "%0d%0aX-Evil:%201",
    "semicolon": "a;b", "backslash": "a\\r\\nX-Evil: 1", "empty": "",
}  # fmt: skip
ROW_53 = [
    Case(53, f"{method.lower()}-{name}", body, frozenset({status}), path=path, method=method,
        headers=(*JSON, ("x-request-id", given)))
    for name, given in EVIL_IDS.items()
    for method, path, body, status in (("GET", "/health", b"", 200), ("GET", "/nowhere", b"", 404),
        ("POST", CHAT, b"{", 400))
]  # fmt: skip
ROW_53 += [
    Case(
        53,
        "two",
        b"",
        frozenset({200}),
        path="/health",
        method="GET",
        headers=(("x-request-id", "good"), ("x-request-id", "a b")),
    )
]


@pytest.mark.parametrize("case", cases(ROW_18, ROW_19, ROW_20, ROW_26, ROW_53))
def test_a_hostile_request_gets_the_answer_that_it_must(targets: dict[bool, Target], case: Case) -> None:
    check(targets, case)


def test_compressed_bodies_are_not_inflated_row20(targets: dict[bool, Target]) -> None:
    with bounded_peak(targets[False].server, 40 * 2**20):
        for case in ROW_20:
            targets[False].ask(case)


ORIGINS = (
    "https://evil.example",
    "null",
    "http://localhost.evil.example",
    "http://127.0.0.1.evil.example",
    "file://",
    "*",
)


@pytest.mark.parametrize("origin", ORIGINS, ids=slug)
def test_pages_of_other_origins_may_not_call_row52(targets: dict[bool, Target], origin: str) -> None:
    wanted: Headers = (("access-control-request-method", "POST"), ("access-control-request-headers", "authorization"))
    with Connection(targets[False].server.url) as connection:
        for method, headers in (("OPTIONS", wanted), ("GET", ()), ("OPTIONS", ())):
            reply = connection.ask(method, "/v1/models", b"", (("origin", origin), ("cookie", "a=b"), *headers))
            assert reply.header("access-control-allow-origin") is None, reply
            assert reply.header("access-control-allow-credentials") is None, reply


def test_no_origin_is_allowed_together_with_credentials_row52(targets: dict[bool, Target]) -> None:
    with Connection(targets[False].server.url) as connection:
        for origin in (*ORIGINS, "http://localhost:3000", "http://127.0.0.1", "http://[::1]:80"):
            reply = connection.ask("GET", "/v1/models", b"", (("origin", origin),))
            assert reply.header("access-control-allow-origin") != "*", reply
            assert reply.header("access-control-allow-credentials") is None, reply


FORGED = "2026-01-01 00:00:00,000 ERROR forged"
LINE_ENDS = ("\r\n", "\n", "\r", "\u2028", "\x0b", "\x85", "\x1b[2K\r", "\x1b]0;x\x07")


def test_nothing_that_a_client_sends_forges_a_line_of_the_log_row51(targets: dict[bool, Target]) -> None:
    target = targets[False]
    with Connection(target.server.url) as connection:
        for end in LINE_ENDS:
            evil = f"x{end}{FORGED}{end}"
            quoted = "".join(f"%{byte:02x}" for byte in evil.encode())
            for case in (
                chat(51, "model", model=evil),
                chat(51, "hub", model="huggingface/" + evil),
                chat(51, "provider", model="openai/" + evil),
                chat(51, "embedding", path=EMBED, model="sentence-transformers/" + evil),
                chat(51, "user", user=evil),
                chat(51, "unknown", **{evil: evil}),
                Case(51, "path", path=f"/{quoted}", method="GET"),
                Case(51, "query", path=f"/v1/models?{quoted}", method="GET"),
                Case(51, "model-path", path=f"/v1/models/{quoted}", method="GET"),
            ):
                connection.ask(case.method, case.path, case.body, case.headers)
        for name in ("user-agent", "x-request-id", "x-forwarded-for", "referer", "authorization"):
            connection.ask("GET", "/nowhere", b"", ((name, f"x\x1b[2K{FORGED}".replace("\x1b", "\xa0")),))
    time.sleep(0.2)  # the log comes through a pipe
    lines = list(target.server.lines)
    assert not [line for line in lines if line.startswith(FORGED)]
    assert not [line for line in lines if any(ord(c) < 32 and c not in "\n\t" or c in "\x7f\x85\u2028" for c in line)]
