"""Keys: every route but GET /health and the chat page needs one, in the one place where it belongs, before anything of
a body is read.

The numbers are rows of rows.md.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from process import MAIN, Server, serve, wait_for
from pydantic import SecretStr
from raw_http import JSON, Connection, Headers, Reply, bounded_peak, error_of, request

from errors import RateLimited
from server.api_keys import Client
from setting_values import ApiKey

ALICE, BOB = "sk-alice-0123456789abcdefABCDEF", "sk-bob-zyxwvutsrqponm9876543210"
CAROL, DAVE = "sk-carol-24681357900864297531", "sk-dave-135792468097531864200"  # one at a time, two a minute
MODEL, CHAT = "Tiny-Qwen3", "/v1/chat/completions"
BASE: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
BODY = json.dumps({**BASE, "temperature": 0}).encode()


def bearer(key: str | bytes) -> Headers:
    return (("authorization", b"Bearer " + (key if isinstance(key, bytes) else key.encode())),)


@pytest.fixture(scope="module")
def guarded(tiny_checkpoint: Path) -> Iterator[Server]:
    keys = f"alice:{ALICE},{BOB},carol:{CAROL};concurrent=1,dave:{DAVE};rpm=2"
    settings = {"API_KEYS": keys, "MODEL_PATH": str(tiny_checkpoint), "DTYPE": "float32"}
    with serve(MAIN, **settings, MAX_MODEL_LEN="480") as server:
        server.wait_until_healthy()
        yield server


def ask(server: Server, method: str, path: str | bytes, body: bytes = b"", headers: Headers = ()) -> Reply:
    """Over a connection of its own."""
    begin = time.monotonic()
    with Connection(server.url) as connection:
        reply = connection.ask(method, path, body, (*JSON, *headers) if body else headers)
    return Reply(reply.status, reply.headers, reply.body, time.monotonic() - begin)


def check_refused(reply: Reply, method: str = "GET") -> None:
    assert reply.status == 401, reply
    assert (reply.header("www-authenticate") or "").startswith("Bearer"), reply
    assert reply.seconds < 5, reply
    assert reply.header("x-request-id"), reply
    if method != "HEAD" and isinstance(reply.json.get("error"), dict):
        assert error_of(reply)["code"] == "invalid_api_key"
    elif method != "HEAD":  # another protocol's shape, such as Cohere's
        assert [text for text in reply.json.values() if "API key" in text]
    text = repr(reply.headers).encode() + reply.body
    assert ALICE.encode() not in text and BOB.encode() not in text


# --- row 49: routes

PATHS = (
    *("/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/rerank"),
    *("/models", "/chat/completions", "/completions", "/responses", "/embeddings", "/rerank", f"/v1/models/{MODEL}"),
    *("/tokenize", "/detokenize", "/version", "/metrics", "/docs", "/docs/", "/docs/oauth2-redirect", "/redoc"),
    *("/openapi.json", "/v1", "/v1/", "/nowhere", "/favicon.ico", "/v2/models", "/v1/files"),
    *("/page", "/page/", "/page/index.html", "/page/main.js/", "/page/../v1/models", "//", "/index.html"),
    *("/v2/embed", "/v2/rerank", "/v2/chat", "/v1/embed", "/tokenizer_info"),
    *("/api/chat", "/api/generate", "/api/embed", "/api/tags", "/api/ps", "/api/show", "/api/version", "/api/pull"),
    *("/V1/MODELS", "/v1/Models", "//v1/models", "/v1//models", "/v1/models/", "///v1/models", "/./v1/models"),
    *("/v1/../v1/models", "/health/../v1/models", "/v1/models/../../health", "/%76%31/models", "/v1%2fmodels"),
    *("/v1/models%00", "/v1/models;x", "/v1/models?x=/health", "/v1/models%3f", "/v1\\models", "/%2e/v1/models"),
    *(
        "/Health",
        "/HEALTH",
        "/health/",
        "//health",
        "/health/x",
        "/health%2f",
        "/health%00",
        "/healthz",
        "/health.json",
    ),
    *("/health;/v1/models", "/health%20", "/v1/health", "/health//", "/./health", "/x/../health", "/METRICS", "/Docs"),
    *("/ping", "/load", "/abort_requests", "/%", "/%ff", "/" + "a" * 10_000, "/livez", "/readyz", "/admin"),
)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:40])
def test_no_path_but_health_and_the_page_answers_without_a_key(guarded: Server, path: str) -> None:
    check_refused(ask(guarded, "GET", path))
    check_refused(ask(guarded, "POST", path, BODY))
    wrong = ask(guarded, "GET", path, b"", bearer("wrong"))
    check_refused(wrong)


METHODS = ("POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "PROPFIND", "LOCK")


@pytest.mark.parametrize("method", METHODS)
def test_no_method_answers_without_a_key(guarded: Server, method: str) -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/docs", "/nowhere"):
        check_refused(ask(guarded, method, path), method)


@pytest.mark.parametrize("method", sorted({*METHODS} - {"HEAD"}))
def test_health_is_open_to_get_alone(guarded: Server, method: str) -> None:
    check_refused(ask(guarded, method, "/health"), method)


def test_health_is_open_to_head(guarded: Server) -> None:
    reply = ask(guarded, "HEAD", "/health")
    assert reply.status == 200 and reply.body == b"" and reply.header("content-type") == "application/json"


def test_health_is_open_whatever_comes_with_it(guarded: Server) -> None:
    for headers in ((), bearer("wrong"), bearer(ALICE), bearer(b"\xff"), (("authorization", "Basic eDp5"),)):
        assert ask(guarded, "GET", "/health", b"", headers).status == 200
    assert ask(guarded, "GET", "/health?x=y").status == 200


@pytest.mark.parametrize("host", ["x?", "x#", "x/health?", "/health", "x/health#", "", b"\xff", "x:0", "health"])
def test_no_host_changes_what_needs_a_key_row26(guarded: Server, host: str | bytes) -> None:
    for path in ("/v1/models", "/docs"):
        reply = ask(guarded, "GET", path, b"", (("host", host),))
        assert reply.status in (400, 401), reply
    assert ask(guarded, "GET", "/health", b"", (("host", host),)).status in (200, 400)


RAW_TARGETS: dict[str, bytes] = {
    "absolute": b"GET http://127.0.0.1/v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    "absolute-health-host": b"GET http://health/v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    "absolute-userinfo": b"GET http://x/health@y/v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    "star": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "fragment": b"GET /v1/models#/health HTTP/1.1\r\nHost: x\r\n\r\n",
    "websocket": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    "h2c": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n\r\n",
    "old": b"GET /v1/models HTTP/1.0\r\n\r\n",
    "override": b"POST /health HTTP/1.1\r\nHost: x\r\nX-HTTP-Method-Override: GET\r\nContent-Length: 0\r\n\r\n",
    "original": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Original-URL: /health\r\nX-Rewrite-URL: /health\r\n\r\n",
    "forwarded": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 127.0.0.1\r\nX-Real-IP: 127.0.0.1\r\n\r\n",
    "after-health": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", RAW_TARGETS)
def test_no_form_of_a_request_needs_no_key(guarded: Server, name: str) -> None:
    with Connection(guarded.url, timeout=5) as connection:
        connection.send(RAW_TARGETS[name])
        reply = connection.reply()
        if name == "after-health":
            assert reply.status == 200
            reply = connection.reply()
        assert reply.status in (400, 401, 403, 404) if name in ("star", "websocket") else reply.status in (400, 401), (
            reply
        )
        assert b"permission" not in reply.body


# --- rows 48 and 50: keys

WRONG: dict[str, Headers] = {
    "none": (),
    "empty": (("authorization", ""),),
    "scheme-alone": (("authorization", "Bearer"),),
    "blank-key": (("authorization", "Bearer "),),
    "other": bearer("sk-nobody-0123456789abcdefABCDEF"),
    "prefix": bearer(ALICE[:-1]),
    "first-letter": bearer(ALICE[:1]),
    "suffix": bearer(ALICE[1:]),
    "longer": bearer(ALICE + "x"),
    "twice": bearer(ALICE + ALICE),
    "capitals": bearer(ALICE.upper()),
    "small": bearer(ALICE.lower()),
    "name": bearer("alice"),
    "name-and-key": bearer(f"alice:{ALICE}"),
    "with-limits": bearer(f"{ALICE};rpm=1"),
    "whole-setting": bearer(f"alice:{ALICE},{BOB}"),
    "both-keys": bearer(f"{ALICE},{BOB}"),
    "both-keys-blank": bearer(f"{ALICE} {BOB}"),
    "quoted": bearer(f'"{ALICE}"'),
    "percent": bearer(ALICE.replace("-", "%2d")),
    "accent": bearer("clé".encode()),
    "latin1": bearer(b"cl\xe9"),
    "bad-utf8": bearer(b"\xff\xfe\x80"),
    "right-with-accent": bearer(ALICE.encode() + b"\xe9"),
    "right-with-zero-width": bearer(ALICE.encode() + "\u200b".encode()),
    "fullwidth": bearer("".join(chr(ord(c) + 0xFEE0) for c in ALICE)),
    "emoji": bearer("🔑"),
    "20-kB": bearer("k" * 20_000),
    "20-kB-after-right": bearer(ALICE + "k" * 20_000),
    "sql": bearer("' OR '1'='1' --"),
    "sql-union": bearer("x'; DROP TABLE keys;--"),
    "star": bearer("*"),
    "regex": bearer(".*"),
    "format": bearer("%s{0}%n"),
    "template": bearer("{{ 7*7 }}"),
    "null": bearer("null"),
    "undefined": bearer("undefined"),
    "true": bearer("true"),
    "number": bearer("0"),
    "path": bearer("../../etc/passwd"),
    "jwt-none": bearer("eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbGljZSJ9."),
    "no-scheme": (("authorization", ALICE),),
    "no-blank": (("authorization", "Bearer" + ALICE),),
    "colon": (("authorization", f"Bearer: {ALICE}"),),
    "equals": (("authorization", f"Bearer={ALICE}"),),
    "basic": (("authorization", f"Basic {ALICE}"),),
    "basic-encoded": (("authorization", "Basic YWxpY2U6c2stYWxpY2UtMDEyMzQ1Njc4OWFiY2RlZkFCQ0RFRg=="),),
    "digest": (("authorization", f'Digest username="alice", response="{ALICE}"'),),
    "token": (("authorization", f"Token {ALICE}"),),
    "api-key-scheme": (("authorization", f"ApiKey {ALICE}"),),
    "bearer-twice": (("authorization", f"Bearer Bearer {ALICE}"),),
    "comma-after": (("authorization", f"Bearer {ALICE}, Bearer x"),),
    "two-wrong": (*bearer("x"), *bearer("y")),
    "right-then-wrong": (*bearer(ALICE), *bearer("x")),
    "wrong-then-right": (*bearer("x"), *bearer(ALICE)),
    "two-right": (*bearer(ALICE), *bearer(BOB)),
    "a wrong x-api-key": (("x-api-key", "nobody"),),
    "two of x-api-key": (("x-api-key", ALICE), ("x-api-key", BOB)),
    "an empty x-api-key": (("x-api-key", ""),),
    "api-key": (("api-key", ALICE),),
    "x-auth-token": (("x-auth-token", ALICE),),
    "proxy": (("proxy-authorization", f"Bearer {ALICE}"),),
    "x-authorization": (("x-authorization", f"Bearer {ALICE}"),),
    "underscore": (("http_authorization", f"Bearer {ALICE}"),),
    "cookie": (("cookie", f"api_key={ALICE}; token={ALICE}; authorization=Bearer {ALICE}; session={ALICE}"),),
    "referer": (("referer", f"http://x/?api_key={ALICE}"),),
    "user-agent": (("user-agent", f"Bearer {ALICE}"),),
    "request-id": (("x-request-id", ALICE),),
    "openai-organization": (("openai-organization", ALICE),),
    "websocket-protocol": (("sec-websocket-protocol", f"openai-insecure-api-key.{ALICE}"),),
}


@pytest.mark.parametrize("name", WRONG)
def test_no_wrong_key_is_taken(guarded: Server, name: str) -> None:
    reply = ask(guarded, "GET", "/v1/models", b"", WRONG[name])
    if name == "request-id":  # an id that a client chose is said again
        reply = Reply(reply.status, tuple(h for h in reply.headers if h[0] != "x-request-id"), reply.body)
        assert reply.status == 401 and ALICE.encode() not in reply.body
        return
    check_refused(reply)
    check_refused(ask(guarded, "POST", CHAT, BODY, WRONG[name]), "POST")


@pytest.mark.parametrize(
    "query", ["api_key", "key", "access_token", "token", "authorization", "apikey", "Authorization"]
)
def test_a_key_in_the_query_is_none(guarded: Server, query: str) -> None:
    for value in (ALICE, f"Bearer%20{ALICE}"):
        check_refused(ask(guarded, "GET", f"/v1/models?{query}={value}"))


@pytest.mark.parametrize("field", ["api_key", "key", "authorization", "token", "user"])
def test_a_key_in_the_body_is_none(guarded: Server, field: str) -> None:
    check_refused(ask(guarded, "POST", CHAT, json.dumps({**BASE, field: ALICE}).encode()), "POST")


@pytest.mark.parametrize("field", ["Authorization", "authorization"])
def test_a_key_behind_the_body_is_none(guarded: Server, field: str) -> None:
    """A proxy that takes keys out of requests does not look there."""
    chunks = b"%x\r\n%s\r\n0\r\n%s: Bearer %s\r\n\r\n" % (len(BODY), BODY, field.encode(), ALICE.encode())
    with Connection(guarded.url) as connection:
        connection.send(request("POST", CHAT, b"", (*JSON, ("transfer-encoding", "chunked"))) + chunks)
        check_refused(connection.reply("POST"))


@pytest.mark.parametrize("key", [ALICE, BOB], ids=["named", "without a name"])
def test_a_right_key_opens_every_route(guarded: Server, key: str) -> None:
    for path, status in (("/v1/models", 200), ("/docs", 200), ("/openapi.json", 200), ("/nowhere", 404), (CHAT, 405)):
        assert ask(guarded, "GET", path, b"", bearer(key)).status == status
    for name in ("Authorization", "AUTHORIZATION", "authorization"):
        assert ask(guarded, "POST", CHAT, BODY, ((name, f"Bearer {key}"),)).status == 200
    stream = ask(guarded, "POST", CHAT, BODY[:-1] + b', "stream": true}', bearer(key))
    assert stream.status == 200 and stream.body.rstrip().endswith(b"[DONE]")


def test_one_connection_has_no_memory_of_a_key(guarded: Server) -> None:
    with Connection(guarded.url) as connection:
        for headers, status in ((bearer(ALICE), 200), ((), 401), (bearer(BOB), 200), (bearer("x"), 401), ((), 401)):
            assert connection.ask("GET", "/v1/models", b"", headers).status == status


def test_keys_are_in_no_answer_and_no_log_row50(guarded: Server) -> None:
    """Neither the right ones, nor those that were tried: they may be right elsewhere."""
    tried = "sk-tried-5555444433332222"
    answers = [
        ask(guarded, "GET", f"/v1/models?api_key={ALICE}", b"", bearer(ALICE)),
        ask(guarded, "GET", f"/v1/models?api_key={ALICE}"),
        ask(guarded, "GET", f"/v1/models?key={tried}", b"", bearer(tried)),
        ask(guarded, "GET", "/v1/models/x", b"", bearer(ALICE)),
        ask(guarded, "POST", CHAT, b"{", bearer(ALICE)),
        ask(guarded, "POST", CHAT, json.dumps({**BASE, "model": "nobody"}).encode(), bearer(BOB)),
        ask(guarded, "POST", CHAT, BODY, (*bearer(ALICE), ("cookie", f"k={BOB}"))),
        ask(guarded, "POST", CHAT, BODY, (("x-api-key", tried),)),
    ]
    ids = [answer.header("x-request-id") or "none" for answer in answers]
    assert wait_for(lambda: all(any(own in line for line in guarded.lines) for own in ids), 30), "a line is missing"
    text = "".join(guarded.lines) + "".join(repr(a.headers) + a.body.decode() for a in answers)
    for key in (ALICE, BOB, tried):
        assert key not in text, [line for line in guarded.lines if key in line]


# --- limits of a key


def check_limited(reply: Reply, most: int) -> None:
    assert reply.status == 429 and error_of(reply)["code"] == "rate_limit_exceeded", reply
    assert 1 <= int(reply.header("retry-after") or 0) <= most


@contextmanager
def held(server: Server, body: bytes) -> Iterator[Connection]:
    """A request with Carol's key that is under way: its body is waited for."""
    with Connection(server.url) as connection:
        headers = (*JSON, *bearer(CAROL), ("expect", "100-continue"), ("content-length", str(len(body))))
        connection.send(request("POST", CHAT, b"", headers))
        assert connection.reply("POST").status == 100
        yield connection


def check_released(server: Server) -> None:
    def is_free() -> bool:
        return ask(server, "GET", "/v1/models", b"", bearer(CAROL)).status == 200

    assert wait_for(is_free, 30), "the key is still in use"


STREAMED = BODY[:-1] + b', "stream": true}'


@pytest.mark.parametrize(("body", "status"), [(STREAMED, 200), (BODY, 200), (b"{", 400)])
def test_a_key_has_one_request_at_a_time_until_its_answer_ends(guarded: Server, body: bytes, status: int) -> None:
    check_released(guarded)
    with held(guarded, body) as connection:
        for _ in range(3):
            check_limited(ask(guarded, "GET", "/v1/models", b"", bearer(CAROL)), 1)
            check_limited(ask(guarded, "POST", CHAT, BODY, bearer(CAROL)), 1)
        assert ask(guarded, "GET", "/v1/models", b"", bearer(ALICE)).status == 200
        connection.send(body)
        assert connection.reply("POST").status == status
        check_released(guarded)


def test_a_client_that_leaves_takes_none_of_its_keys_requests_along(guarded: Server) -> None:
    check_released(guarded)
    with held(guarded, BODY):
        check_limited(ask(guarded, "GET", "/v1/models", b"", bearer(CAROL)), 1)
    check_released(guarded)
    with held(guarded, STREAMED) as connection:
        connection.send(STREAMED)
        connection.read_some()
    check_released(guarded)


def test_a_key_has_so_many_requests_a_minute_whatever_becomes_of_them(guarded: Server) -> None:
    assert ask(guarded, "GET", "/v1/models", b"", bearer(DAVE)).status == 200
    assert ask(guarded, "POST", CHAT, b"{", bearer(DAVE)).status == 400
    check_limited(ask(guarded, "GET", "/v1/models", b"", bearer(DAVE)), 30)
    check_limited(ask(guarded, "POST", CHAT, BODY, bearer(DAVE)), 30)
    assert ask(guarded, "GET", "/health", b"", bearer(DAVE)).status == 200
    assert ask(guarded, "GET", "/v1/models", b"", bearer(BOB)).status == 200


def test_a_minutes_requests_come_back_as_the_minute_passes() -> None:
    client = Client(ApiKey("dave", SecretStr(DAVE), requests_per_minute=2), b"")
    for _ in range(2):
        client.admit()
    for seconds, is_admitted in ((20, False), (15, True), (20, False), (600, True), (0, True), (0, False)):
        client.counted_at -= seconds
        if is_admitted:
            client.admit()
        else:
            with pytest.raises(RateLimited):
                client.admit()


# --- row 22: bodies

LENGTHS: dict[str, Headers] = {
    "50-MB": (("content-length", "50000000"),),
    "beyond-the-limit": (("content-length", "500000000000"),),
    "chunked": (("transfer-encoding", "chunked"),),
    "expect": (("content-length", "50000000"), ("expect", "100-continue")),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_body_without_a_key_is_not_waited_for_row22(guarded: Server, name: str) -> None:
    for key in ((), bearer("wrong")):
        with Connection(guarded.url, timeout=3) as connection:
            begin = time.monotonic()
            connection.send(request("POST", CHAT, b"", (*JSON, *key, *LENGTHS[name])))
            reply = connection.reply("POST")
            check_refused(Reply(reply.status, reply.headers, reply.body, time.monotonic() - begin), "POST")


def test_50_megabytes_without_a_key_take_no_memory_row22(guarded: Server) -> None:
    piece = b" " * 2**20
    with bounded_peak(guarded, 20 * 2**20), Connection(guarded.url) as connection:
        connection.send(request("POST", CHAT, b"", (*JSON, ("content-length", str(50 * 2**20)))))
        connection.send_unless_closed(piece for _ in range(50))
        assert connection.reply("POST").status == 401


def test_after_all_of_it_the_server_answers(guarded: Server) -> None:
    answers = [ask(guarded, "POST", CHAT, BODY, bearer(key)).json["choices"] for key in (ALICE, BOB)]
    assert answers[0] == answers[1]
    guarded.wait_until_idle(5)
    assert "Traceback" not in "".join(guarded.lines)
