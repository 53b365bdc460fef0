"""Properties over generated input: whatever comes in, each parser gives what it promises or its own error."""

import asyncio
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.responses import JSONResponse
from gguf_files import write_tiny_gguf
from hypothesis import assume, example, given
from hypothesis import strategies as st
from models import CHATML, MARKS, SPECIAL, byte_tokenizer
from profiles import examples
from pydantic import ValidationError
from test_answer_parser import CALLS, TOOLS, read
from upstreams import Parts

import schemas
from api.answers import ignored_fields_header
from api.error_handlers import invalid_request_of
from api.responses import as_chat
from checkpoints import checkpoint, gguf_header
from config import Settings, parse_bytes, parse_fallbacks, parse_pairs
from errors import APIError, ModelLoadError, UpstreamError
from prompt_templates import TOOL_FORMATS, PromptTemplate, RenderOptions
from providers import openai_compatible
from providers.anthropic_request import to_messages
from providers.anthropic_response import StreamMapper, to_completion
from providers.router import gateways_of
from providers.upstream import Upstream, UpstreamConfig, events_of
from providers.upstream_errors import KEYS, error_of, redact, retry_after
from server.error_formats import OPENAI
from server.events import data_of, name_of
from serving.cl100k import Cl100k
from text.answer_parser import AnswerParser, ParserOptions
from text.canonical_messages import canonical
from text.structured_output import structure_of
from text.tool_calls.json_calls import LINES
from text.tool_calls.lark import Literals
from text.tool_calls.tool_format import ToolFormat
from text.tools import tool_set_of

# --- what is generated

TEXT = st.text(st.characters(exclude_categories=()) | st.sampled_from(["\ud800", "\x00", "\n"]), max_size=20)
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 2**63, 1e308, -0.0])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)


def json_of(words: str) -> st.SearchStrategy[Any]:
    """JSON whose keys, and many of its texts, are these words."""
    word = st.sampled_from(words.split())
    return st.recursive(
        SCALARS | word,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(word, inner, max_size=6),
        max_leaves=20,
    )


def object_of(words: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(words.split()), json_of(words), max_size=8)


def shaped(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with some of these fields, each as it should be or as anything else."""
    return st.fixed_dictionaries({}, optional={name: value | JSON for name, value in fields.items()})


def nested(depth: int, key: str = "a") -> Any:
    """As deep JSON as a request or an answer may be."""
    value: Any = {}
    for _ in range(depth):
        value = {key: [value]}
    return value


@st.composite
def splits(draw: st.DrawFn, whole: st.SearchStrategy[Any]) -> list[Any]:
    """A text or bytes in pieces, some of them empty perhaps."""
    text = draw(whole)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def mixed(pieces: Sequence[str], most: int = 12) -> st.SearchStrategy[str]:
    """Texts that a grammar's own marks are a large part of."""
    return st.lists(st.sampled_from(list(pieces)) | st.text(max_size=4), max_size=most).map("".join)


# --- server-sent events


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


# --- answers of models

STYLES: tuple[ToolFormat | None, ...] = (None, LINES, *TOOL_FORMATS)
ANSWER_PIECES = (
    *("<tool_call>", "</tool_call>", "<function=", "<function=weather>\n", "</function>", "<parameter=city>\n"),
    *("\n</parameter>\n", "weather", "now", "<arg_key>city</arg_key>", "\n<arg_value>", "</arg_value>\n"),
    *("<think>", "</think>", "```", "```json\n", "```tool_code\n", "weather('x')", '{"name": "weather"', "}", "{", "["),
    *("]", ", ", ": ", '"arguments": ', '"parameters": ', '{"city": "Paris"}', '"', "\\", "\n", " ", ";", "null"),
    *('{"name": "now", "arguments": {}}', "\ud800", "\\ud800", "é", "\u2028", "1e999", "-", "NaN"),
)
READINGS = st.fixed_dictionaries(
    {},
    optional={
        "is_parallel": st.booleans(),
        "is_forced": st.booleans(),
        "is_strict": st.booleans(),
        "is_structured": st.booleans(),
        "think": st.just(("<think>", "</think>")),
        "is_thinking": st.booleans(),
    },
)


@examples(500)
@given(splits(mixed(ANSWER_PIECES, 16)), st.sampled_from(STYLES), READINGS)
def test_an_answer_means_the_same_however_it_comes(
    pieces: list[str], style: ToolFormat | None, reading: dict[str, Any]
) -> None:
    answer = read(pieces, style, **reading)
    assert answer == read(["".join(pieces)], style, **reading)
    for name, arguments in answer.calls:
        assert name in TOOLS
        if answer.reason == "tool_calls":
            assert isinstance(json.loads(arguments), dict)


@examples(300)
@given(splits(mixed(ANSWER_PIECES)), st.sampled_from(STYLES), st.booleans())
def test_what_is_no_call_is_content_to_the_letter(pieces: list[str], style: ToolFormat | None, is_strict: bool) -> None:
    answer = read(pieces, style, is_strict=is_strict)
    assume(not answer.calls)
    assert answer.content == "".join(pieces)


PROSE = st.text("abc .,é", max_size=20)


@given(PROSE, PROSE, st.sampled_from(CALLS))
def test_text_around_calls_is_kept(before: str, behind: str, known: tuple[Any, ...]) -> None:
    style, text, content, calls = known
    assume(not style.is_whole_answer and style.begin)  # the others know a call by where it is
    answer = read([f"{before}\n{text}\n{behind}"], style)
    assert len(answer.calls) == len(calls)
    assert [*answer.content.split()] == [*before.split(), *content.split(), *behind.split()]


def seconds_to_read(style: ToolFormat | None, begin: str, unit: str, count: int) -> float:
    """Of the processor."""
    parser, start = AnswerParser(ParserOptions(TOOLS, style, think=("<think>", "</think>"))), time.process_time()
    for piece in [begin, *[unit] * count]:
        parser.put(piece)
    parser.end()
    return time.process_time() - start


@pytest.mark.thinned(3)
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name if style else "none")
def test_reading_takes_linear_time(style: ToolFormat | None) -> None:
    units = ["\n", "<tool_call>", "{", '{"name": "', "```", "```\n", "<think>", '"\\', " ", "[", "now\n", "<arg_key>"]
    begins = ["", '{"name": "', '<tool_call>{"name": "now", "arguments": "', "```tool_code\n", "[", "now\n"]
    begins += ["<tool_call>\n<function=weather>\n<parameter=city>\n", "<tool_call>weather\n<arg_key>city</arg_key>"]
    slowest = max((seconds_to_read(style, begin, unit, 2_000), begin, unit) for begin in begins for unit in units)
    assert slowest[0] < 0.3, slowest


# --- what other providers answer

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


def allows(work: Callable[[], Any], *errors: type[Exception]) -> Any:
    """What it gives; None where it raises what it may."""
    try:
        return work()
    except errors:
        return None


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
        theirs = gateways_of(Settings(_env_file=None, **keys), Answers(text))[provider]
        body = {"model": "x", "messages": [{"role": "user", "content": "Hi"}]}
        return asyncio.run(theirs.answer("chat/completions", body)).content

    for depth in [*range(850, 1000), 100_000]:
        text = answer.replace("DEEP", "[" * depth + "]" * depth)
        allows(partial(answered, text), APIError)


# --- requests


REQUESTS = {
    schemas.ChatCompletionRequest: {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
    schemas.CompletionRequest: {"model": "m", "prompt": "Hi"},
    schemas.ResponsesRequest: {"model": "m", "input": "Hi"},
    schemas.EmbeddingRequest: {"model": "m", "input": "Hi"},
    schemas.RerankRequest: {"model": "m", "query": "Hi", "documents": ["a"]},
    schemas.TokenizeRequest: {"messages": [{"role": "user", "content": "Hi"}]},
    schemas.DetokenizeRequest: {"tokens": [1]},
}
WORDS = (
    "role user assistant tool system content type text image_url url name function parameters arguments tool_calls id "
    "properties required items enum string object integer $ref #/$defs/x $defs anyOf strict json_schema schema json "
    "regex choice grammar auto none low effort format input_text output_text message function_call "
    "function_call_output call_id output input a b 1 -1 include_usage"
)


def told(error: ValidationError, body: Any) -> APIError:
    """The problem as a client hears of it."""
    return invalid_request_of([{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()], body)


def tried(kind: Any, body: dict[str, Any]) -> Any:
    """The request; None where it is refused, in a sentence that can be sent."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        assert JSONResponse(OPENAI.body(told(error, body))).body
    return None


@pytest.mark.parametrize("kind", REQUESTS)
@examples(60)
@given(st.data())
def test_any_value_of_any_field_is_taken_or_refused(kind: Any, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(list(kind.model_fields)), max_size=3) | TEXT.map(lambda text: [text]))
    body = {**REQUESTS[kind], **{name: data.draw(json_of(WORDS)) for name in names}}
    request = tried(kind, body)
    if request is not None:
        assert request.refused_fields is not None and ignored_fields_header(request.ignored_fields) is not None


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("value", [nested(400), [[[[]]]] * 100, 10**400, 1e400, float("nan"), "\ud800", {"\ud800": 1}])
def test_odd_values_of_every_field_are_taken_or_refused(kind: Any, value: Any) -> None:
    for name in [*kind.model_fields, "other", "\ud800"]:
        request = tried(kind, {**REQUESTS[kind], name: value})
        assert request is None or isinstance(ignored_fields_header(request.ignored_fields), dict)


@examples(80)
@given(object_of(WORDS + " instructions reasoning text tools tool_choice include"), st.data())
def test_a_response_is_asked_for_as_a_chat_or_refused(fields: dict[str, Any], data: Any) -> None:
    item = object_of("role user assistant content type message function_call function_call_output call_id output name")
    request = tried(
        schemas.ResponsesRequest, {"model": "m", "input": data.draw(st.lists(item, max_size=3) | TEXT), **fields}
    )
    chat = request and allows(lambda: as_chat(request), APIError)
    assert chat is None or isinstance(chat, schemas.ChatCompletionRequest)


@pytest.mark.parametrize("count", [9_999, 10_000, 10_001])
def test_a_response_of_many_messages_is_asked_for_or_refused(count: int) -> None:
    item = {"role": "user", "content": "x"}
    request = tried(schemas.ResponsesRequest, {"model": "m", "input": [item] * count, "instructions": "y"})
    assert request is None or len(as_chat(request).messages) == count + 1


SCHEMA = shaped(
    type=st.sampled_from(["object", "string", "integer"]),
    properties=st.dictionaries(st.sampled_from(["a", "b c", "<"]), json_of(WORDS), max_size=2),
    required=st.lists(json_of(WORDS), max_size=2),
    additionalProperties=st.booleans(),
    enum=st.lists(JSON, max_size=2),
)
TOOL = shaped(
    type=st.just("function"),
    function=shaped(name=st.sampled_from(["now", "weather"]), parameters=SCHEMA, strict=st.booleans()),
)
GOOD_TOOL = st.builds(lambda schema: {"type": "function", "function": {"name": "f", "parameters": schema}}, SCHEMA)
ASKED = shaped(
    tools=st.lists(GOOD_TOOL | TOOL, max_size=2),
    tool_choice=st.sampled_from(["auto", "required", "none"])
    | json_of("type function name f allowed_tools mode tools"),
    response_format=shaped(type=st.sampled_from(["json_schema", "json_object"]), json_schema=shaped(schema=SCHEMA)),
    guided_json=SCHEMA,
    guided_regex=TEXT,
    guided_choice=st.lists(TEXT, max_size=3),
    guided_grammar=TEXT,
    structured_outputs=shaped(json=SCHEMA, regex=TEXT, choice=st.lists(TEXT), grammar=TEXT),
)


@examples(80)
@given(ASKED, st.sampled_from([LINES, *TOOL_FORMATS]), st.booleans())
@example({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"required": [[]]}}}],
          "tool_choice": "required"}, TOOL_FORMATS[0], True)  # fmt: skip
@example({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"minimum": 10**400}}}]},
         LINES, False)  # fmt: skip
@example({"structured_outputs": {"\ud800": 1}}, LINES, True)
def test_what_an_answer_must_look_like_is_a_grammar_or_refused(
    fields: dict[str, Any], style: ToolFormat, has_tokens: bool
) -> None:
    request = tried(schemas.ChatCompletionRequest, {**REQUESTS[schemas.ChatCompletionRequest], **fields})
    assume(request is not None)
    literals = Literals({"<tool_call>", "</tool_call>"} if has_tokens else ())
    try:
        assert structure_of(request, tool_set_of(request), style, literals) is not False
    except APIError as error:
        assert error.status == 400 and JSONResponse(OPENAI.body(error)).body


# --- messages

CONTROL = mixed(
    [*SPECIAL, *MARKS, "<|im_", "start|>", "<", "|", "im_end", " ", "\n", "\ufdd0", "{{ 1 }}", "{%", "x"], 8
)
ROLES = ["system", "developer", "user", "assistant", "tool", "function"]
TOOLED = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ '<tool_call>' }}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{{ '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def template(chat_template: str | None, model_type: str = "qwen3") -> PromptTemplate:
    tokenizer = byte_tokenizer(has_marks=True)
    tokenizer.chat_template = chat_template
    return PromptTemplate(tokenizer, model_type)


TEMPLATES = {
    "chatml": template(CHATML),
    "tooled": template(TOOLED),
    "family": template(None),
    "gemma": template(None, "gemma3"),
    "generic": template(None, "mamba"),
}
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": CONTROL}, optional={"name": CONTROL})
CALL = st.builds(
    lambda name, arguments: {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}},
    CONTROL | JSON,
    CONTROL | JSON | JSON.map(json.dumps),
)
ANY_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES)},
    optional={
        "content": CONTROL | TEXT | st.lists(shaped(type=st.just("text"), text=CONTROL), max_size=2),
        "tool_calls": st.lists(CALL | object_of("function name arguments id"), max_size=2),
        "function_call": object_of("name arguments"),
        "name": TEXT,
        "tool_call_id": TEXT,
        "reasoning_content": CONTROL,
    },
)


@pytest.mark.parametrize("kind", TEMPLATES)
@examples(40)
@given(st.lists(ANY_MESSAGE, min_size=1, max_size=2), st.lists(GOOD_TOOL, max_size=1), st.booleans() | st.none())
def test_messages_are_a_prompt_or_refused(kind: str, given_messages: list[Any], tools: list[Any], thinks: Any) -> None:
    body = {"model": "m", "messages": given_messages, "tools": tools}
    request = tried(schemas.ChatCompletionRequest, body)
    assume(request is not None and allows(lambda: tool_set_of(request) or True, APIError))
    options = RenderOptions(tools=tools, thinks=thinks)
    token_ids = allows(lambda: TEMPLATES[kind].render_chat(request.messages, options), APIError)
    assert token_ids is None or len(token_ids) > 0
    assert allows(lambda: canonical(request.messages, "x"), APIError) is not False


@pytest.mark.parametrize("kind", TEMPLATES)
def test_calls_of_any_depth_are_a_prompt_or_refused(kind: str) -> None:
    for depth in [1, 50, *range(100, 500, 20)]:
        calls = [{"type": "function", "function": {"name": "f", "arguments": nested(depth)}}]
        asked = [schemas.Message(role="assistant", tool_calls=calls), schemas.Message(role="user", content="x")]
        allows(partial(TEMPLATES[kind].render_chat, asked), APIError)


def harmless(message: dict[str, str]) -> dict[str, str]:
    """Another text, blank if that is."""
    return {name: text if name == "role" or not text.strip() else "x" for name, text in message.items()}


@pytest.mark.parametrize("kind", TEMPLATES)
@examples(100)
@given(st.lists(MESSAGE, min_size=1, max_size=4))
def test_no_text_becomes_a_control_token(kind: str, given_messages: list[dict[str, str]]) -> None:
    subject = TEMPLATES[kind]
    ids = {subject.token_id(token) for token in SPECIAL}

    def controls(some: list[dict[str, str]]) -> list[int]:
        rendered = subject.render_chat([schemas.Message.model_validate(message) for message in some])
        return [token_id for token_id in rendered if token_id in ids]

    assert controls(given_messages) == controls([harmless(message) for message in given_messages])


@examples(100)
@given(st.lists(MESSAGE.filter(lambda message: message["role"] != "assistant"), min_size=1, max_size=4))
def test_only_the_assistants_text_has_marks_that_are_tokens(given_messages: list[dict[str, str]]) -> None:
    subject = TEMPLATES["tooled"]
    rendered = subject.render_chat([schemas.Message.model_validate(message) for message in given_messages])
    assert not {subject.token_id(mark) for mark in MARKS} & set(rendered)


# --- settings


@given(TEXT | mixed(["4", "Gi", "B", "K", ".", "-", " ", "e", "1" * 30, "inf", "nan", "٣", "_"], 5) | JSON)
@example("1e999g")
@example("9" * 5000)
def test_sizes_are_numbers_or_refused(value: Any) -> None:
    size = allows(lambda: parse_bytes(value), ValueError)
    assert size is None or isinstance(size, int) or not isinstance(value, str)


@given(mixed(["a", "b", "=", ",", ";", " ", "#", " # x"]) | JSON)
def test_lists_of_names_are_read_or_refused(value: Any) -> None:
    for parse in (parse_pairs, parse_fallbacks):
        read_value = allows(partial(parse, value), ValueError)
        assert not isinstance(value, str) or read_value is None or all(read_value.keys())


@given(st.dictionaries(st.integers(0, 50), st.binary(max_size=4)), st.lists(st.integers(0, 50)))
def test_token_ids_are_text_or_unknown(tokens: dict[int, bytes], token_ids: list[int]) -> None:
    text = allows(lambda: Cl100k(tokens).decode(token_ids), KeyError)
    assert (text is None) == any(token_id not in tokens for token_id in token_ids) and (text or "").encode() is not None


# --- files of models


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path


SIZES = [0, 1, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1]
NUMBER_BYTES = st.sampled_from([size.to_bytes(8, "little") for size in SIZES])
CHANGE = st.tuples(st.floats(0, 1), NUMBER_BYTES | st.binary(max_size=8))


def changed(content: bytes, changes: list[tuple[float, bytes]], length: float, header: int) -> bytes:
    """Bytes written over others, in the first `header` ones, and then only a part of them all."""
    mutable = bytearray(content)
    for place, written in changes:
        at = int(place * header)
        mutable[at : at + len(written)] = written
    return bytes(mutable[: 4 + int(length * (len(mutable) - 4))])


@examples(200)
@given(st.lists(CHANGE, max_size=3), st.just(1.0) | st.floats(0, 1), st.sampled_from([64, 700, 9_000, 12_000]))
def test_a_gguf_file_is_read_or_refused_in_no_time(
    gguf_file: Path, tmp_path: Path, changes: list[Any], length: float, header: int
) -> None:
    from gguf import GGUFReader

    path, start = tmp_path / "x.gguf", time.process_time()
    path.write_bytes(changed(gguf_file.read_bytes(), changes, length, header))
    with suppress(ValueError):
        gguf_header.read(path)
        with suppress(Exception), warnings.catch_warnings(action="ignore"):
            GGUFReader(path)  # in a process of its own, which may fail as it likes but must not take for ever
    assert time.process_time() - start < 2.0


def spent() -> float:
    """Processor seconds of this process and of those that it waited for, such as a conversion."""
    return sum(os.times()[:4])


def with_value(content: bytes, key: bytes, value: bytes) -> bytes:
    """A number in the metadata; key: its end."""
    at = content.index(key) + len(key) + 4  # behind the type
    return content[:at] + value + content[at + len(value) :]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"qwen2.block_count", b"\xff\xff\xff\x7f"),
        (b"tokenizer.ggml.tokens", b"\x08\0\0\0" + b"\xff" * 8),
        (b"tokenizer.ggml.token_type", b"\x05\0\0\0" + b"\xff" * 7 + b"\0"),
        (b"tokenizer.ggml.merges", b"\x09\0\0\0\x02\0\0\0\0\0\0\0"),
        (b"general.architecture", b"\xff" * 8),
    ],
)
def test_a_gguf_file_that_lies_is_refused_at_once_in_a_sentence(
    gguf_file: Path, tmp_path: Path, key: bytes, value: bytes
) -> None:
    path, start = tmp_path / "lies.gguf", spent()
    path.write_bytes(with_value(gguf_file.read_bytes(), key, value))
    with pytest.raises(ModelLoadError, match="lies.gguf could not be converted") as refusal:
        checkpoint.fetch(str(path), tmp_path / "cache", lambda what, fraction: None)
    assert "\n" not in str(refusal.value) and spent() - start < 2.0


BROKEN = [
    *("", "null", "[]", "{}", '"x"', "{", "\x00", "[" * 100_000, '{"model_type": []}', '{"model_type": "qwen3"}'),
    *('{"model_type": "x"}', '{"model_type": "qwen3", "architectures": 1}', "\udc80"),
]
LIES = {  # of a configuration
    "num_hidden_layers": [10**9, -1, 0, "x", 4],
    "hidden_size": [10**9, 0, -1, "x"],
    "vocab_size": [10**12, 0, "x"],
    "num_attention_heads": [0, 10**9],
    "num_key_value_heads": [0, 3],
    "head_dim": [0, 10**9],
    "rope_parameters": [[], {"rope_type": "x"}, {"rope_theta": "x"}],
    "layer_types": [["x"], 1],
    "torch_dtype": ["x", 1],
    "model_type": ["t5", 1, None],
    "hidden_act": ["x", 1],
    "quantization_config": [{}, 1, {"quant_method": "x"}],
    "max_position_embeddings": [-1, "x"],
}


def files_of(directory: Path, into: Path, **written: str | bytes) -> Path:
    """The same model with other files."""
    shutil.copytree(directory, into)
    for name, content in written.items():
        path = into / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode(errors="surrogateescape"))
    return into


def loaded(directory: Path) -> Any:
    """As the server does it, but for the cache and the engine. None where it is refused as it should be."""
    from engine.checked_model import check_model
    from engine.model_loader import load_model
    from serving.loading import load_template

    start = time.process_time()
    try:
        load_template(directory, "qwen3")
        return load_model(check_model(directory, "float32", "cpu"), lambda what, fraction: None)
    except ModelLoadError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    finally:
        assert time.process_time() - start < 20
    return None


@pytest.mark.parametrize("name", ["config", "tokenizer", "tokenizer_config", "generation_config"])
def test_files_that_are_broken_are_refused_in_a_sentence(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    for number, text in enumerate(BROKEN):
        directory = files_of(tiny_checkpoint, tmp_path / str(number), **{f"{name}__json": text})
        assert loaded(directory) is None or name != "config" or number > 8


@pytest.mark.parametrize("name", LIES)
def test_a_configuration_that_lies_is_refused_in_a_sentence(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    for number, value in enumerate(LIES[name]):
        text = json.dumps({**config, name: value})
        loaded(files_of(tiny_checkpoint, tmp_path / str(number), config__json=text))


@examples(60)
@given(st.data())
def test_weights_that_lie_are_refused_in_a_sentence(tiny_checkpoint: Path, tmp_path: Path, data: st.DataObject) -> None:
    from engine.checked_model import check_model

    content = (tiny_checkpoint / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    tensor = data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))
    header[tensor] |= data.draw(
        shaped(
            shape=st.lists(st.sampled_from(SIZES), max_size=3),
            data_offsets=st.lists(st.sampled_from(SIZES), min_size=2, max_size=2),
            dtype=st.sampled_from(["F32", "F64", "BF16", "x"]),
        )
    )
    text = json.dumps(header).encode()
    said = data.draw(st.sampled_from([len(text), *SIZES]))
    path = tmp_path / "lying"
    shutil.rmtree(path, ignore_errors=True)
    whole = said.to_bytes(8, "little") + text + content[8 + length :]
    length = data.draw(st.just(len(whole)) | st.integers(0, 900))
    directory = files_of(tiny_checkpoint, path, model__safetensors=whole[:length])
    with suppress(ModelLoadError):
        check_model(directory, "float32", "cpu")
