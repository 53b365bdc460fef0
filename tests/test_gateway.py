"""Other providers' models through this server: what arrives there, what comes back, and what is said if not."""

import asyncio
import base64
import json
import re
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, get_args

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from process import MAIN, Server, serve
from raw_http import processor_seconds
from upstreams import Asked, Reply, Upstream, chunk, completion, event, message, message_events, told, upstream

from config import Settings
from provider_table import PROVIDERS, AdapterName, ProtocolName
from providers.openai_compatible import ADAPTERS, GeminiAdapter, MiniMaxAdapter, OllamaAdapter
from providers.router import PROTOCOLS, gateways_of
from providers.upstream_errors import redact

KEYS = {name: f"sk-secret-{name.lower()}" for name in ("OPENAI", "GOOGLE", "ANTHROPIC", "DEEPSEEK", "MINMAX")}
KEYS["OLLAMA"] = "zz-SECRET0123456789"  # of no known form
KEYS["MY_GROQ"] = "zz-groq-SECRET012345"
HELLO = [{"role": "user", "content": "你好！"}]


@dataclass
class Gateway:
    server: Server
    providers: dict[str, Upstream]

    def post(
        self, path: str, timeout: float = 30, headers: dict[str, str] | None = None, **body: Any
    ) -> httpx2.Response:
        return httpx2.post(f"{self.server.url}/v1/{path}", json=body, timeout=timeout, headers=headers)

    def chat(self, model: str, **body: Any) -> httpx2.Response:
        return self.post("chat/completions", **{"model": model, "messages": HELLO, **body})


def answer(asked: Asked) -> Reply:
    """What each of them says to a request that is right."""
    if asked.method == "GET":
        return Reply.of({"object": "list", "data": [{"id": "models/one"}, {"id": "two"}]})
    if asked.path.endswith("/messages"):
        return Reply.stream(*message_events("Hi", "!")) if asked.body.get("stream") else Reply.of(message("Hi!"))
    if asked.path.endswith("/embeddings"):
        return Reply.of({"object": "list", "data": [], "model": "theirs", "usage": {}})
    return Reply.stream(*told("Hi", "!")) if asked.body.get("stream") else Reply.of(completion("Hi!"))


@pytest.fixture(scope="module")
def running(tiny_checkpoint: Any) -> Iterator[Gateway]:
    names = ("openai", "gemini", "claude", "deepseek", "deepseek-whole", "minmax", "ollama", "my-groq", "keyless")
    with ExitStack() as stack:
        found = {name: stack.enter_context(upstream(answer)) for name in names}
        settings = {
            **{f"{name}_API_KEY": key for name, key in KEYS.items()},
            "OPENAI_BASE_URL": found["openai"].url + "/v1",
            "GEMINI_BASE_URL": found["gemini"].url + "/v1beta/openai/",
            "ANTHROPIC_BASE_URL": found["claude"].url,
            "DEEPSEEK_API_URL": found["deepseek"].url,
            "DEEPSEEK_API_ENDPOINT_NONSTREAM": found["deepseek-whole"].url + "/chat/completions",
            "MINMAX_API_URL": found["minmax"].url + "/v1/text/chatcompletion_v2",
            "OLLAMA_BASEURL": found["ollama"].url + "/",
            "OLLAMA_API_KEY": KEYS["OLLAMA"],
            "OLLAMA_TIMEOUT": "2 # 秒",
            "PROVIDERS": f"my-groq={found['my-groq'].url}/openai/v1/,keyless={found['keyless'].url}/v1",
            "GATEWAY_TIMEOUT": "2",
            "MODEL_ALIASES": "old-gpt=openai/gpt-new,mine=Tiny-Qwen3,other=openai/模型",
            "MODEL_FALLBACKS": "openai/falls=claude/second;openai/lands=Tiny-Qwen3",
            "LOG_LEVEL": "info",
        }
        server = stack.enter_context(
            serve(MAIN, MODEL_PATH=str(tiny_checkpoint), MAX_MODEL_LEN="480", DTYPE="float32", **settings)
        )
        server.wait_until_healthy()
        yield Gateway(server, found)


@pytest.fixture
def gateway(running: Gateway) -> Iterator[Gateway]:
    for provider in running.providers.values():
        provider.script = answer
        provider.asked.clear()
    yield running


# --- where requests go

SAMPLES = [  # the interface document's, with what each becomes: model, body, provider, path, name there, key's header
    ("openai/gpt-3.5-turbo", "openai", "/v1/chat/completions", "gpt-3.5-turbo", "OPENAI"),
    ("claude/claude-3-haiku-20240307", "claude", "/v1/messages", "claude-3-haiku-20240307", "ANTHROPIC"),
    (
        "gemini/gemini-1.5-flash-latest",
        "gemini",
        "/v1beta/openai/chat/completions",
        "gemini-1.5-flash-latest",
        "GOOGLE",
    ),
    ("deepseek/deepseek-chat", "deepseek", "/chat/completions", "deepseek-chat", "DEEPSEEK"),
    ("minmax/abab6-chat", "minmax", "/v1/text/chatcompletion_v2", "abab6-chat", "MINMAX"),
    ("minimax/MiniMax-M3", "minmax", "/v1/text/chatcompletion_v2", "MiniMax-M3", "MINMAX"),
    ("ollama/llama3", "ollama", "/v1/chat/completions", "llama3", "OLLAMA"),
    ("gpt-4o", "openai", "/v1/chat/completions", "gpt-4o", "OPENAI"),
    ("my-groq/llama-3.3", "my-groq", "/openai/v1/chat/completions", "llama-3.3", "MY_GROQ"),
    ("keyless/org/model", "keyless", "/v1/chat/completions", "org/model", None),
]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("model", "provider", "path", "name", "key"), SAMPLES)
def test_a_chat_goes_to_its_provider_and_comes_back(
    gateway: Gateway, model: str, provider: str, path: str, name: str, key: str | None, is_stream: bool
) -> None:
    system = {"role": "system", "content": "你是一個有用的助手。"}
    body = {"messages": [system, *HELLO], "temperature": 0.7, **({"stream": True} if is_stream else {})}
    got = gateway.chat(model, headers={"authorization": "Bearer dummy-key"}, **body)
    assert got.status_code == 200, got.text
    where = "deepseek-whole" if provider == "deepseek" and not is_stream else provider
    (asked,) = gateway.providers[where].asked
    assert (asked.path, asked.body["model"]) == (path, name)
    assert "你好" in json.dumps(asked.body, ensure_ascii=False) and asked.body["temperature"] == 0.7
    sent = asked.headers.get("authorization", "") + asked.headers.get("x-api-key", "")
    assert sent.removeprefix("Bearer ") == ("" if key is None else KEYS[key]) and "dummy-key" not in str(asked)
    assert got.headers["x-gateway-provider"] in (provider, model.partition("/")[0])
    if not is_stream:
        assert ChatCompletion.model_validate(got.json()).choices[0].message.content == "Hi!"
        return
    events = got.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [ChatCompletionChunk.model_validate_json(e[6:]) for e in events[:-2] if e.startswith("data: ")]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Hi!"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_what_openai_sends_is_relayed_to_the_byte_and_so_is_what_it_is_sent(gateway: Gateway) -> None:
    odd = b'{"id":"x",  "choices" : [],"future":{"a":1.50}}'
    stream = [
        b": hello\n\n",
        b'data:{"choices":[{"x":  "\xe4\xbd\xa0"}]}\r\n\r\n',
        event(chunk({}, "stop")),
        b"data: [DONE]\n\n",
    ]
    cut = b"".join(stream)
    gateway.providers["openai"].script = lambda asked: (
        Reply.stream(*(cut[at : at + 7] for at in range(0, len(cut), 7))) if asked.body.get("stream") else Reply.of(odd)
    )
    future = {"temperature": 9, "n": 500, "new_field": {"deep": [1]}, "messages": [{"role": "robot", "parts": 3}]}
    assert gateway.chat("openai/x", **future).content == odd
    assert gateway.providers["openai"].asked[-1].body == {"model": "x", **future}
    assert gateway.chat("openai/x", stream=True).content == cut


@pytest.mark.parametrize(
    ("model", "provider", "path", "name"),
    [
        ("text-embedding-3-small", "openai", "/v1/embeddings", "text-embedding-3-small"),
        ("openai/text-embedding-3-small", "openai", "/v1/embeddings", "text-embedding-3-small"),
        ("models/embedding-001", "gemini", "/v1beta/openai/embeddings", "models/embedding-001"),
        ("ollama/nomic-embed-text", "ollama", "/v1/embeddings", "nomic-embed-text"),
    ],
)
def test_embeddings_go_to_their_provider(gateway: Gateway, model: str, provider: str, path: str, name: str) -> None:
    got = gateway.post("embeddings", model=model, input="這是一段需要嵌入的文本。")
    assert got.status_code == 200, got.text
    (asked,) = gateway.providers[provider].asked
    assert (asked.path, asked.body["model"], asked.body["input"]) == (path, name, "這是一段需要嵌入的文本。")


def test_geminis_vectors_are_as_long_as_they_should_be_and_in_the_format_that_was_asked(gateway: Gateway) -> None:
    rows = [{"object": "embedding", "embedding": [3.0, 4.0]}, {"object": "embedding", "index": 1, "embedding": [0, 0]}]
    gateway.providers["gemini"].script = lambda asked: Reply.of({"object": "list", "data": rows, "model": "theirs"})
    got = gateway.post("embeddings", model="gemini/e", input=["a", "b"], dimensions=2, encoding_format="base64").json()
    decoded = [struct.unpack("<2f", base64.b64decode(item["embedding"])) for item in got["data"]]
    assert decoded == [pytest.approx((0.6, 0.8)), (0, 0)] and [item["index"] for item in got["data"]] == [0, 1]
    assert got["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
    (asked,) = gateway.providers["gemini"].asked
    assert asked.body["encoding_format"] == "float" and asked.body["dimensions"] == 2
    got = gateway.post("embeddings", model="gemini/e", input=["a", "b"]).json()
    assert [item["embedding"] for item in got["data"]] == [[3.0, 4.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("model", "path"), [("claude/x", "embeddings"), ("deepseek/x", "embeddings"), ("claude/x", "completions")]
)
def test_what_a_provider_does_not_have_is_refused_here(gateway: Gateway, model: str, path: str) -> None:
    got = gateway.post(path, model=model, input="x", prompt="x")
    assert got.status_code == 400 and got.json()["error"]["param"] == "model"
    assert not any(provider.asked for provider in gateway.providers.values())


def test_names_of_this_servers_models_stay_here_and_unknown_ones_are_not_found(gateway: Gateway) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"model": "openai/x"}}}
    assert gateway.chat("Tiny-Qwen3", max_tokens=2, tools=[tool], tool_choice="none").status_code == 200
    for name in ("nobody/x", "gemma", ""):
        assert gateway.chat(name).json()["error"]["code"] == "model_not_found"
    assert not any(provider.asked for provider in gateway.providers.values())


def test_aliases_stand_for_other_models(gateway: Gateway) -> None:
    got = gateway.chat("old-gpt")
    assert gateway.providers["openai"].asked[0].body["model"] == "gpt-new"
    assert got.headers["x-gateway-model"] == "openai/gpt-new"
    assert gateway.chat("other").status_code == 200 and gateway.providers["openai"].asked[1].body["model"] == "模型"
    mine = gateway.chat("mine", max_tokens=2)
    assert mine.json()["model"] == "Tiny-Qwen3" and mine.headers["x-gateway-model"] == "Tiny-Qwen3"


def test_a_missing_key_is_named_at_once(tiny_checkpoint: Any) -> None:
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), DTYPE="float32") as server:
        for model, variable in (("openai/x", "OPENAI"), ("claude/x", "ANTHROPIC"), ("minmax/x", "MINMAX")):
            got = server.post("/v1/chat/completions", model=model, messages=HELLO)
            assert got.status_code == 401 and got.json()["error"]["code"] == "provider_not_configured"
            assert f"{variable}_API_KEY" in got.json()["error"]["message"]


def test_every_row_has_its_adapter_and_its_protocol() -> None:
    assert ADAPTERS.keys() == set(get_args(AdapterName)) and PROTOCOLS.keys() == set(get_args(ProtocolName))
    prefixes = [prefix for row in PROVIDERS for prefix in row.prefixes]
    assert gateways_of(Settings(_env_file=None)).keys() == set(prefixes) and len(prefixes) == len(set(prefixes))


def test_the_list_of_models_has_all_of_them(gateway: Gateway) -> None:
    ids = [model["id"] for model in gateway.server.get("/v1/models").json()["data"]]
    assert ids[0] == "Tiny-Qwen3" and {"openai/two", "claude/two", "gemini/one", "ollama/two", "my-groq/two"} <= set(
        ids
    )
    assert gateway.server.get("/v1/models/gemini/one").json()["owned_by"] == "gemini"
    assert gateway.server.get("/v1/models/gemini/none").status_code == 404
    num_asked = [len(provider.asked) for provider in gateway.providers.values()]
    gateway.server.get("/v1/models")
    assert [len(provider.asked) for provider in gateway.providers.values()] == num_asked, "they are remembered"


# --- faults

ERROR = {"error": {"message": "Wrong key sk-abc123456 given", "type": "t", "code": None, "param": None}}
QUIET: list[Any] = [event(chunk({"role": "assistant", "content": "a"}))]
FAULTS: dict[str, tuple[Reply, int, str | None]] = {
    "400": (Reply.of({"error": {"message": "no", "param": "n", "code": "bad"}}, 400), 400, "bad"),
    "401": (Reply.of(ERROR, 401), 401, "provider_auth_error"),
    "402": (Reply.of(ERROR, 402), 402, "insufficient_quota"),
    "404": (Reply.of(ERROR, 404), 404, "model_not_found"),
    "too long": (Reply.of({"error": {"message": "prompt is too long: 9 tokens"}}, 400), 400, "context_length_exceeded"),
    "429 for long": (Reply.of(ERROR, 429, retry_after="90"), 429, "rate_limit_exceeded"),
    "429 until a date": (Reply.of(ERROR, 429, retry_after="Wed, 21 Oct 2099 07:28:00 GMT"), 429, "rate_limit_exceeded"),
    "500": (Reply.of(ERROR, 500, x_should_retry="false"), 502, None),
    "529": (Reply.of(ERROR, 529, x_should_retry="false"), 503, "overloaded"),
    "redirect": (Reply.of(b"", 302, location="http://127.0.0.1:1/"), 502, None),
    "an error in a list": (
        Reply.of([{"error": {"code": 404, "message": "gone", "status": "NOT_FOUND"}}], 404),
        404,
        "model_not_found",
    ),
    "an error as a text": (Reply.of({"error": "model not loaded"}, 404), 404, "model_not_found"),
    "HTML": (Reply.of(b"<html>", 503, x_should_retry="false"), 503, None),
    "no JSON": (Reply.of(b"<html>"), 502, "upstream_invalid_response"),
    "empty": (Reply.of(b""), 502, "upstream_invalid_response"),
    "an error with success": (Reply.of(ERROR), 502, None),
    "silence": (Reply([5.0, b"{}"]), 504, "upstream_timeout"),
    "broken": (Reply([b'{"id": ', None]), 502, "upstream_disconnected"),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_a_failure_has_its_status_before_anything_is_answered(gateway: Gateway, name: str, is_stream: bool) -> None:
    reply, status, code = FAULTS[name]
    gateway.providers["openai"].script = lambda asked: reply
    got = gateway.chat("openai/x", stream=is_stream)
    error = got.json()["error"]
    assert (got.status_code, error["code"]) == (status, code), got.text
    assert set(error) == {"message", "type", "param", "code"} and "openai" in error["message"]
    assert "sk-abc" not in got.text and "secret" not in got.text
    if status == 401:
        assert "OPENAI_API_KEY" in error["message"]
    if "429" in name:
        assert int(got.headers["retry-after"]) >= 90


STREAM_FAULTS: dict[str, tuple[list[Any], str | None]] = {
    "cut": (QUIET, "upstream_stream_truncated"),
    "dropped": ([*QUIET, None], "upstream_stream_truncated"),
    "stalled": ([*QUIET, 5.0, b"x"], "upstream_timeout"),
    "an error": (
        [*QUIET, event({"error": {"message": "sk-abc123456 overloaded", "code": 429}})],
        "rate_limit_exceeded",
    ),
    "no JSON": ([*QUIET, b'data: {"error" \n\n'], "upstream_invalid_response"),
}


@pytest.mark.parametrize("name", STREAM_FAULTS)
def test_a_failure_in_a_stream_is_its_last_event(gateway: Gateway, name: str) -> None:
    pieces, code = STREAM_FAULTS[name]
    gateway.providers["openai"].script = lambda asked: Reply.stream(*pieces)
    got = gateway.chat("openai/x", stream=True)
    *_, last, end = got.text.split("\n\n")
    codes = {code, "upstream_disconnected"} if name == "dropped" else {code}  # as the system sees it
    assert got.status_code == 200 and end == "" and json.loads(last[6:])["error"]["code"] in codes, got.text
    assert "[DONE]" not in got.text and "sk-abc" not in got.text


def test_a_stream_that_ended_without_saying_so_is_ended_here(gateway: Gateway) -> None:
    gateway.providers["openai"].script = lambda asked: Reply.stream(*told("x", done=False))
    assert gateway.chat("openai/x", stream=True).text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("is_stream", [False, True])
def test_passing_failures_are_tried_again_before_anything_was_answered(gateway: Gateway, is_stream: bool) -> None:
    provider = gateway.providers["openai"]
    replies = [Reply.of(ERROR, 503), Reply.of(ERROR, 429, retry_after_ms="10"), None]

    def script(asked: Asked) -> Reply:
        return replies[len(provider.asked) - 1] or answer(asked)

    provider.script = script
    assert gateway.chat("openai/x", stream=is_stream).status_code == 200 and len(provider.asked) == 3
    provider.asked.clear()
    provider.script = lambda asked: Reply.of(ERROR, 400)
    gateway.chat("openai/x", stream=is_stream)
    assert len(provider.asked) == 1
    provider.asked.clear()
    provider.script = lambda asked: Reply.of(ERROR, 500, retry_after="0")
    assert gateway.chat("openai/x", stream=is_stream).status_code == 502 and len(provider.asked) == 3


def test_others_answer_where_a_provider_cannot_if_that_is_set(gateway: Gateway) -> None:
    gateway.providers["openai"].script = lambda asked: Reply.of(ERROR, 500, retry_after="0")
    got = gateway.chat("openai/falls")
    assert got.headers["x-gateway-provider"] == "claude" and got.headers["x-gateway-fallback-from"] == "openai/falls"
    landed = gateway.chat("openai/lands", max_tokens=2)
    assert landed.json()["model"] == "Tiny-Qwen3" and landed.headers["x-gateway-model"] == "Tiny-Qwen3"
    gateway.providers["openai"].script = lambda asked: Reply.of(ERROR, 400)
    assert gateway.chat("openai/falls").status_code == 400


def test_claude_drops_what_a_model_turned_out_to_refuse(gateway: Gateway) -> None:
    provider = gateway.providers["claude"]

    def script(asked: Asked) -> Reply:
        told_off = {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "`temperature` is deprecated"},
        }
        return Reply.of(told_off, 400) if "temperature" in asked.body else answer(asked)

    provider.script = script
    for count in (2, 3):
        got = gateway.chat("claude/claude-next", temperature=0.5, seed=1)
        assert got.status_code == 200 and len(provider.asked) == count
        assert set(got.headers["x-gateway-dropped-params"].split(", ")) == {"temperature", "seed"}


# --- leaving


async def leave(gateway: Gateway, body: dict[str, Any], after: float) -> float:
    async with httpx2.AsyncClient(timeout=30) as client:
        sending = asyncio.ensure_future(client.post(f"{gateway.server.url}/v1/chat/completions", json=body))
        await asyncio.sleep(after)
        sending.cancel()
        left = time.monotonic()
        await asyncio.gather(sending, return_exceptions=True)
    return left


SLOW = {
    "whole": (Reply([30.0, b"{}"]), False),
    "before the first byte": (Reply([30.0, b"x"]), True),
    "before the first event": (Reply.stream(b": wait\n\n"[:1], 30.0, b"x"), True),
    "in the middle": (Reply.stream(*QUIET, 30.0, b"x"), True),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("model", ["openai/x", "claude/x"])
@pytest.mark.parametrize("name", SLOW)
def test_a_client_that_leaves_ends_the_work_there(gateway: Gateway, name: str, model: str) -> None:
    reply, is_stream = SLOW[name]
    provider = gateway.providers[model.partition("/")[0]]
    if model == "claude/x" and name == "in the middle":
        reply = Reply.stream(*message_events("a")[:4], 30.0, b"x")
    provider.script = lambda asked: reply
    body = {"model": model, "messages": HELLO, "stream": is_stream}
    left = asyncio.run(leave(gateway, body, 0.5))
    deadline = time.monotonic() + 20
    while provider.asked[0].left_at is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert provider.asked[0].left_at is not None
    assert provider.asked[0].left_at - left < 1.2, "it took its own time-out"  # 5 ms on an idle machine
    gateway.server.wait_until_idle()


def test_keys_are_in_no_log(gateway: Gateway) -> None:
    gateway.providers["openai"].script = lambda asked: Reply.of(ERROR, 500, retry_after="0")
    gateway.chat("openai/x")
    log = "".join(gateway.server.lines)
    assert "secret" not in log and "sk-abc" not in log
    assert redact("Bearer abcdefghijkl") == "[redacted]"


# --- what is put right


def test_geminis_calls_are_numbered_and_end_as_calls() -> None:
    fixes = GeminiAdapter()
    first = chunk(
        {"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}, "extra_content": {"g": 1}}]}
    )
    second = chunk({"tool_calls": [{"id": "b", "function": {"name": "f", "arguments": "{}"}}]})
    last = chunk({}, "stop")
    assert fixes.chunk(first) and fixes.chunk(second) and fixes.chunk(last)
    calls = [c["choices"][0]["delta"]["tool_calls"][0] for c in (first, second)]
    assert [call["index"] for call in calls] == [0, 1] and calls[0]["extra_content"] == {"g": 1}
    assert last["choices"][0]["finish_reason"] == "tool_calls"
    assert not GeminiAdapter().chunk(chunk({"content": "x"}, "stop"))
    for fixed in (first, second, last):
        ChatCompletionChunk.model_validate(fixed)


def test_minimax_errors_thoughts_and_odd_chunks_are_put_right(gateway: Gateway) -> None:
    provider = gateway.providers["minmax"]
    provider.script = lambda asked: Reply.of({"base_resp": {"status_code": 1004, "status_msg": "login fail"}})
    for is_stream in (False, True):
        got = gateway.chat("minmax/x", stream=is_stream)
        assert got.status_code == 401 and "MINMAX_API_KEY" in got.json()["error"]["message"]
    texts = ["<th", "ink>Hm", "</think>\n\nYes", "."]
    chunks = [event(chunk({"role": "", "content": text})) for text in texts]
    odd = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [{"index": 0}]}
    provider.script = lambda asked: Reply.stream(*chunks, event(chunk({}, "stop")), event(odd))
    parts = [json.loads(e[6:]) for e in gateway.chat("minmax/x", stream=True).text.split("\n\n")[:-2]]
    deltas = [ChatCompletionChunk.model_validate(part).choices[0].delta for part in parts if part["choices"]]
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    assert "".join((delta.model_extra or {}).get("reasoning_content", "") for delta in deltas) == "Hm"
    assert MiniMaxAdapter().request("chat/completions", body := {"temperature": 0, "max_tokens": 3}) == ["temperature"]
    assert body == {"temperature": 0.01, "max_completion_tokens": 3}


def test_ollama_is_not_sent_what_it_would_ignore(gateway: Gateway) -> None:
    got = gateway.chat("ollama/x", tool_choice="required", user="u")
    assert got.headers["x-gateway-dropped-params"] == "tool_choice, user"
    assert not {"tool_choice", "user"} & gateway.providers["ollama"].asked[0].body.keys()
    image = {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}
    refusal = gateway.chat("ollama/x", messages=[{"role": "user", "content": [image]}])
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "messages[0].content[0]"
    assert gateway.post("embeddings", model="ollama/x", input=[[1, 2]]).status_code == 400
    thought = chunk({"reasoning": "Hm"})
    assert OllamaAdapter().chunk(thought) and thought["choices"][0]["delta"]["reasoning_content"] == "Hm"


# --- the SDK


def test_the_openai_sdk_reads_relayed_answers_and_errors(gateway: Gateway) -> None:
    with OpenAI(base_url=gateway.server.url + "/v1", api_key="dummy-key", max_retries=0) as client:
        for model in ("openai/gpt-4", "claude/claude-3-opus-20240229", "gemini/gemini-1.5-pro-latest"):
            whole = client.chat.completions.create(model=model, messages=HELLO)
            stream = client.chat.completions.create(model=model, messages=HELLO, stream=True)
            text = "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
            assert whole.choices[0].message.content == text == "Hi!"
        gateway.providers["claude"].script = lambda asked: Reply.of(
            {"type": "error", "error": {"type": "x"}}, 529, x_should_retry="false"
        )
        with pytest.raises(openai.InternalServerError, match="claude"):
            client.chat.completions.create(model="claude/x", messages=HELLO)


def test_pages_of_other_origins_cannot_spend_the_keys(gateway: Gateway) -> None:
    headers = {"content-type": "text/plain", "origin": "https://evil.example"}
    content = json.dumps({"model": "openai/x", "messages": HELLO}).encode()
    got = httpx2.post(gateway.server.url + "/v1/chat/completions", content=content, headers=headers)
    assert got.status_code == 400 and not gateway.providers["openai"].asked


def test_a_name_without_end_costs_nothing(gateway: Gateway) -> None:
    content = b'{"model": "' + b"a" * 8_000_000 + b'", ' + b'"model":"openai/a",' * 100_000 + b'"x": 1}'
    before = processor_seconds(gateway.server)
    got = httpx2.post(
        gateway.server.url + "/v1/completions",
        content=content,
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert got.status_code in (200, 400) and processor_seconds(gateway.server) - before < 5


def test_a_stream_ends_with_its_own_end_and_cut_events_are_not_passed_on(gateway: Gateway) -> None:
    provider = gateway.providers["openai"]
    provider.script = lambda asked: Reply.stream(*told("x"), 30.0, b"more")
    begin = time.monotonic()
    got = gateway.chat("openai/x", stream=True)
    assert got.text.endswith("data: [DONE]\n\n") and time.monotonic() - begin < 15
    provider.script = lambda asked: Reply.stream(*QUIET, b'data: {"choices":[{"finish_reason":"stop","del')
    *_, last, _ = gateway.chat("openai/x", stream=True).text.split("\n\n")
    assert json.loads(last[6:])["error"]["code"] == "upstream_stream_truncated"


def test_a_key_that_a_provider_repeats_is_not_passed_on(gateway: Gateway) -> None:
    told_off = {"error": {"message": f"Incorrect key: {KEYS['OLLAMA']}"}}
    gateway.providers["ollama"].script = lambda asked: Reply.of(told_off, 401)
    got = gateway.chat("ollama/x")
    assert got.status_code == 401 and KEYS["OLLAMA"] not in got.text


def test_a_value_that_claude_refuses_is_no_parameter_that_a_model_refuses(gateway: Gateway) -> None:
    provider = gateway.providers["claude"]

    def script(asked: Asked) -> Reply:
        told_off = {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "`top_k`: must be below 500"},
        }
        return Reply.of(told_off, 400) if asked.body.get("top_k", 0) >= 500 else answer(asked)

    provider.script = script
    assert gateway.chat("claude/claude-3-x", top_k=9999).status_code == 400
    assert gateway.chat("claude/claude-3-x", top_k=40).status_code == 200 and provider.asked[-1].body["top_k"] == 40


@pytest.mark.parametrize("model", ["deepseek/x", "ollama/x", "minmax/x", "gemini/x", "claude/x", "openai/x"])
def test_odd_bodies_are_nobodys_failure(gateway: Gateway, model: str) -> None:
    for messages in (5, True, [5], [{"content": 5}], {"a": 1}):
        assert gateway.chat(model, messages=messages).status_code in (200, 400)


def test_a_body_that_is_no_request_is_refused_by_the_endpoint(gateway: Gateway) -> None:
    for content in (b'{"model": "openai/x", ', b'["openai/x"]', b'{"x": {"model": "openai/x"}}', b'{"model": 3}'):
        headers = {"content-type": "application/json"}
        got = httpx2.post(gateway.server.url + "/v1/chat/completions", content=content, headers=headers)
        assert got.status_code == 400 and re.search("error", got.text)
