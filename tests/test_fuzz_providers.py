"""Whatever a provider sends, the client gets valid JSON or an error."""

import asyncio
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx2
import pytest
from fastapi.responses import JSONResponse
from fuzz_inputs import JSON, NUMBERS, TEXT, allows, json_of, mixed, object_of, shaped, splits
from hypothesis import example, given
from hypothesis import strategies as st
from profiles import examples
from upstreams import Parts

from config import Settings
from errors import APIError, UpstreamError
from providers import openai_compatible
from providers.anthropic_request import to_messages
from providers.anthropic_response import StreamMapper, to_completion
from providers.router import providers_of
from providers.upstream import Upstream, UpstreamConfig, events_of
from providers.upstream_errors import KEYS, error_of, redact, retry_after
from server.error_formats import OPENAI
from server.events import data_of, name_of


def upstream() -> Upstream:
    config = UpstreamConfig(
        name="theirs", key_variable="THEIR_KEY", headers={}, needs_key=False, timeout=5, total_timeout=5
    )
    return Upstream(config)


def events(parts: list[bytes]) -> list[bytes]:
    async def collected() -> list[bytes]:
        return [event async for event in events_of(httpx2.Response(200, stream=Parts(parts)), upstream())]

    return asyncio.run(collected())


BOM = b"\xef\xbb\xbf"
STREAM_PIECES = (
    *(b"\n", b"\r", b"\r\n", b"\n\n", b"data:", b"data: ", b"event: x", b": comment", b"[DONE]", BOM),
    *(b'{"a": 1}', b'"\\n"', b"id: 1", b"\x00", b"\xff", b"\xe2\x80\xa8", b"\x0b", b"\x85"),
)
STREAM = st.lists(st.sampled_from(STREAM_PIECES) | st.binary(max_size=3), max_size=16).map(b"".join)


@given(splits(STREAM))
@example([b"\xef", b"\xbb\xbfdata: 1\n\n"])
@example([b"data: 1\r\n\r", b"\n"])
def test_events_are_the_same_however_they_come_and_nothing_is_added(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    found = events(parts)
    assert found == events([whole])
    assert (whole.removeprefix(BOM) + b"\n\n").startswith(b"".join(found))


@given(STREAM)
def test_what_an_event_says_is_found_or_it_says_nothing(event: bytes) -> None:
    data, name = data_of(event), name_of(event)
    assert (
        data is None or data.replace(b"\n", b"") in event.replace(b"\n", b"").replace(b"\r", b"") or b"data:" in event
    )
    assert name is None or name.strip() == name or "\ufffd" in name


def test_an_event_without_end_is_refused_and_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("providers.upstream.LARGEST", 1000)
    with pytest.raises(UpstreamError, match="an event of more than 1000 bytes"):
        events([b"x" * 100] * 20)


CLAUDE = (
    "type message content text id model usage input_tokens output_tokens stop_reason stop_sequence stop_details index "
    "delta content_block tool_use thinking redacted_thinking signature data input name partial_json text_delta error "
    "thinking_delta signature_delta input_json_delta refusal explanation max_tokens end_turn message_start "
    "content_block_start content_block_delta content_block_stop message_delta message_stop ping overloaded_error "
    "output_tokens_details thinking_tokens cache_read_input_tokens"
)
EVENTS = (
    "message_start content_block_start content_block_delta content_block_stop message_delta message_stop error".split()
)


def block_event(kind: str, index: Any, part: Any) -> dict[str, Any]:
    place = {"content_block_start": "content_block", "content_block_delta": "delta", "message_start": "message"}
    return {"type": kind, "index": index, place.get(kind, "delta"): part}


CLAUDE_EVENT = st.builds(
    block_event, st.sampled_from(EVENTS), st.sampled_from([0, 1, 2]) | JSON, object_of(CLAUDE)
) | object_of(CLAUDE)


@examples(60)
@given(st.lists(st.tuples(st.none() | st.sampled_from(EVENTS), CLAUDE_EVENT), max_size=6), st.booleans())
def test_claudes_streams_are_chunks_or_an_error(events: list[tuple[str | None, Any]], includes_usage: bool) -> None:
    mapper = StreamMapper("claude", 0, includes_usage)
    for name, event in events:
        for chunk in allows(partial(mapper.events, name, event), APIError) or ():
            assert chunk["object"] == "chat.completion.chunk" and json.dumps(chunk)


@given(object_of(CLAUDE))
def test_claudes_answers_are_completions_or_an_error(message: dict[str, Any]) -> None:
    answer = allows(lambda: to_completion(message, "claude", 0), APIError)
    assert answer is None or json.dumps(answer)


CLAUDE_PART = object_of(
    "type text image_url url data: data:image/png;base64,AA file file_data cache_control refusal role id function name "
    "arguments {} thinking signature content tool_call_id tool_use"
)
CLAUDE_MESSAGE = shaped(
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=TEXT | st.lists(CLAUDE_PART, max_size=2),
    tool_calls=st.lists(
        shaped(id=TEXT, type=st.just("function"), function=shaped(name=TEXT, arguments=TEXT)), max_size=2
    ),
    tool_call_id=TEXT,
    thinking_blocks=st.lists(CLAUDE_PART, max_size=1),
)
CLAUDE_REQUEST = shaped(
    messages=st.lists(CLAUDE_MESSAGE, min_size=1, max_size=3),
    tools=st.lists(
        shaped(type=st.just("function"), function=shaped(name=TEXT, parameters=object_of("type"))), max_size=2
    ),
    tool_choice=st.sampled_from(["auto", "required", "none"]),
    temperature=NUMBERS,
    max_tokens=NUMBERS,
    reasoning_effort=st.sampled_from(["none", "high", "max"]),
    thinking=object_of("type enabled budget_tokens"),
    model=st.sampled_from(["claude-opus-4-1", "claude-sonnet-5", "claude-3-haiku", "x"]),
)


@examples(100)
@given(
    CLAUDE_REQUEST
    | object_of(
        "model messages role content system user assistant tool type text image_url url name tool_calls id function "
        "arguments tool_call_id tools parameters tool_choice auto required max_tokens temperature top_p stop thinking "
        "reasoning_effort high response_format json_schema schema thinking_blocks signature data: cache_control file "
        "file_data stream n claude-opus-4-1 {} output_config service_tier metadata"
    )
)
def test_requests_to_claude_are_written_or_refused(body: dict[str, Any]) -> None:
    mapped = allows(lambda: to_messages({"model": "claude-sonnet-4-5", **body}, 100), APIError)
    assert mapped is None or json.dumps(mapped.body, allow_nan=False).encode()


ERROR = "error message code param type details error_code status sk-abc insufficient_quota"


@example(400, {"error": {"message": "\ud800", "code": "\ud800", "param": "\ud800"}}, {})
@given(st.integers(100, 999), object_of(ERROR) | json_of(ERROR), st.dictionaries(TEXT, TEXT, max_size=2))
def test_a_providers_error_is_told_in_our_shape(status: int, body: Any, headers: dict[str, str]) -> None:
    error = error_of(status, body, "theirs", "THEIR_KEY", headers)
    assert 400 <= error.status < 600
    assert JSONResponse(OPENAI.body(error)).body


DATES = st.datetimes().map(lambda when: when.strftime("%a, %d %b %Y %H:%M:%S GMT"))
TIMES = mixed(["Mon", "Tue, ", "31 ", "Dec", "9999", "0", "-", ":", "23:59:60", "GMT", "+9999", "1e400", "nan", " "], 8)


@examples(300)
@given(st.sampled_from(["retry-after", "retry-after-ms"]), NUMBERS.map(str) | DATES | TIMES)
@example("retry-after", "Fri, 31 Dec 9999 23:59:59 -2359")
@example("retry-after", "Mon, 01 Jan 0001 00:00:00 +2359")
def test_how_long_to_wait_is_a_number_or_unknown(name: str, value: str) -> None:
    wait = retry_after({name: value})
    assert wait is None or wait >= 0
    assert error_of(429, None, "theirs", "THEIR_KEY", {name: value}).status == 429


@given(mixed(["sk-", "Bearer ", "AIza", "hf_", "eyJ", "x" * 12, "-", "."]))
def test_what_looks_like_a_key_is_gone(text: str) -> None:
    assert not KEYS.search(redact(text).replace("[redacted]", " "))


@pytest.mark.parametrize(
    "text", ["sk-", "bearer ", "bearer  " * 2, "AIza", "eyJ.", "sk-." * 2, "hf_", "context exceed "]
)
def test_looking_for_keys_takes_linear_time(text: str) -> None:
    start = time.process_time()
    error_of(400, {"error": {"message": text * 40_000}}, "theirs", "THEIR_KEY")
    assert time.process_time() - start < 2.0


ANSWER = (
    "choices index delta message content role tool_calls id finish_reason stop usage prompt_cache_hit_tokens data "
    "prompt_tokens_details embedding reasoning reasoning_content base_resp status_code status_msg error code n "
    "temperature tool_choice auto messages image_url url input encoding_format base64 dimensions max_tokens <think> "
    "developer user max_completion_tokens object response"
)
PART = object_of("content role tool_calls id index reasoning reasoning_content type image_url url <think> developer")
CHOICE = shaped(
    index=st.integers(0, 1),
    delta=PART,
    message=PART,
    finish_reason=st.just("stop"),
)
BODY = object_of(ANSWER) | shaped(
    choices=st.lists(CHOICE, max_size=2),
    base_resp=shaped(status_code=st.sampled_from([0, 1002, 1004])),
    data=st.lists(shaped(embedding=st.lists(NUMBERS | st.booleans(), max_size=3)), max_size=2),
    usage=object_of(ANSWER),
    messages=st.lists(PART | shaped(content=st.lists(PART, max_size=2)), max_size=2),
    error=object_of("message code status"),
    dimensions=st.just(2),
    encoding_format=st.just("base64"),
    temperature=NUMBERS,
)
FIXES = [
    openai_compatible.Adapter,
    openai_compatible.GeminiAdapter,
    openai_compatible.DeepSeekAdapter,
    openai_compatible.OllamaAdapter,
    openai_compatible.MiniMaxAdapter,
]


@pytest.mark.parametrize("adapter", FIXES)
@examples(60)
@given(BODY, st.lists(BODY, max_size=2), BODY)
@example({}, [], {"base_resp": {"status_code": [1]}})
@example({"dimensions": 1, "encoding_format": "base64"}, [], {"data": [{"embedding": [10**400]}]})
@example({"encoding_format": "base64"}, [], {"data": [{"embedding": [1e300]}]})
def test_what_is_put_right_is_json_or_an_error(
    adapter: Callable[[], openai_compatible.Adapter], request_body: Any, chunks: list[Any], answer: Any
) -> None:
    one = adapter()
    for path in ("embeddings", "chat/completions"):
        allows(partial(one.request, path, request_body), APIError)
    for chunk in chunks:
        allows(partial(one.chunk, chunk), APIError)
    allows(lambda: one.answer(answer), APIError)
    failure = openai_compatible.failure_in(answer)
    assert failure is None or upstream().error_from(failure["status"], {"error": failure}).status >= 400
    assert json.dumps([request_body, chunks, answer])


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_a_providers_bytes_are_an_object_or_an_error(text: bytes) -> None:
    theirs = openai_compatible.OpenAICompatible(upstream(), openai_compatible.Urls("http://x"))
    answer = allows(lambda: theirs._checked(text), APIError)
    assert answer is None or isinstance(openai_compatible.model_ids(answer), list)


class Answers(httpx2.AsyncBaseTransport):
    """A provider that always says the same."""

    def __init__(self, text: str) -> None:
        self._text = text

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, stream=Parts([self._text.encode()]))


@pytest.mark.parametrize(
    ("provider", "answer"),
    [
        ("claude", '{"content": [{"type": "tool_use", "input": {"a": DEEP}}]}'),
        ("claude", '{"content": [{"type": "redacted_thinking", "data": DEEP}]}'),
        ("minmax", '{"choices": [{"message": {"content": "<think>a</think>b", "deep": DEEP}}]}'),
        ("gemini", '{"choices": [{"finish_reason": "stop", "message": {"tool_calls": [DEEP]}}]}'),
    ],
)
def test_answers_of_any_depth_are_relayed_or_an_error(provider: str, answer: str) -> None:
    keys = dict.fromkeys(("anthropic_api_key", "minmax_api_key", "google_api_key"), "k")

    def answered(text: str) -> Any:
        theirs = providers_of(Settings(_env_file=None, **keys), Answers(text))[provider]
        body = {"model": "x", "messages": [{"role": "user", "content": "Hi"}]}
        return asyncio.run(theirs.answer("chat/completions", body)).content

    for depth in [*range(850, 1000), 100_000]:
        text = answer.replace("DEEP", "[" * depth + "]" * depth)
        allows(partial(answered, text), APIError)
