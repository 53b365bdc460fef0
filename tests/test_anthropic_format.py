"""Requests are valid by Anthropic's own types, answers by OpenAI's, and streams add up to whole answers."""

import json
import random
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming, MessageCreateParamsStreaming
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel, TypeAdapter

from errors import APIError, InvalidRequest
from providers.anthropic_request import Mapped, samples, to_messages, version_of
from providers.anthropic_response import StreamMapper, to_completion
from providers.upstream_errors import error_of, redact
from server.error_formats import OPENAI

Object = dict[str, Any]
REQUESTS: dict[bool, TypeAdapter[Any]] = {
    False: TypeAdapter(MessageCreateParamsNonStreaming),
    True: TypeAdapter(MessageCreateParamsStreaming),
}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
OLD, MIDDLE, NEW = "claude-sonnet-4-5-20250929", "claude-opus-4-6", "claude-opus-4-8"
HELLO = [{"role": "user", "content": "Hello"}]
PNG = "data:image/png;base64,iVBORw0KGgo="
PDF = "data:application/pdf;base64,JVBERi0="
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "$defs": {"a": {}}}}}


def assert_same(validated: Any, given: Any, place: str = "") -> None:
    """Validated to the end, which iterables are only when read, and without keys that the types do not know."""
    if isinstance(validated, BaseModel):
        validated = validated.model_dump(exclude_unset=True)
    if isinstance(given, dict):
        assert validated.keys() == given.keys(), place
        for key in given:
            assert_same(validated[key], given[key], f"{place}.{key}")
    elif isinstance(given, list):
        items = list(validated)
        assert len(items) == len(given), place
        for index, item in enumerate(given):
            assert_same(items[index], item, f"{place}[{index}]")
    else:
        assert validated == given, place


def mapped(messages: Any = HELLO, model: str = MIDDLE, **body: Any) -> Mapped:
    result = to_messages({"model": model, "messages": messages, **body}, 4096)
    assert_same(REQUESTS[body.get("stream") is True].validate_python(result.body), result.body)
    return result


def refusal_of(messages: Any = HELLO, **body: Any) -> tuple[str | None, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        to_messages({"model": MIDDLE, "messages": messages, **body}, 4096)
    assert caught.value.param is None or caught.value.param in caught.value.message
    return caught.value.param, caught.value.code


def call(name: str = "call_1", arguments: Any = "{}") -> Object:
    return {"id": name, "type": "function", "function": {"name": "look_up", "arguments": arguments}}


def calling(*calls: Object, **more: Any) -> Object:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **more}


def result(name: str = "call_1", content: Any = "found") -> Object:
    return {"role": "tool", "tool_call_id": name, "content": content}


# --- what tells a valid request


def test_the_validation_finds_what_is_wrong_and_what_is_unknown() -> None:
    good = mapped([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]).body
    for path in ({"temperatur": 1}, {"messages": [{"role": "user", "content": [{"type": "text", "txt": "a"}]}]}):
        wrong = {**good, **path}
        with pytest.raises((AssertionError, ValueError)):
            assert_same(REQUESTS[False].validate_python(wrong), wrong)


# --- messages


def test_system_messages_are_hoisted_in_order() -> None:
    parts = [{"type": "text", "text": "three"}]
    messages = [
        {"role": "system", "content": "one"},
        *HELLO,
        {"role": "developer", "content": "two"},
        {"role": "system", "content": parts},
    ]
    body = mapped(messages).body
    assert [block["text"] for block in body["system"]] == ["one", "two", "three"]
    assert body["messages"] == HELLO


def test_blank_texts_and_messages_left_with_nothing_are_dropped() -> None:
    blank = [{"type": "text", "text": " \n"}]
    messages = [
        {"role": "system", "content": " "},
        {"role": "user", "content": blank},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": [*blank, {"type": "text", "text": "Hello"}]},
    ]
    body = mapped(messages).body
    assert body["messages"] == HELLO and "system" not in body
    for alone in ([{"role": "user", "content": blank}], [{"role": "system", "content": "Be kind."}], []):
        assert refusal_of(alone) == ("messages", "invalid_value")


@pytest.mark.parametrize("image_url", [PNG, {"url": PNG, "detail": "high"}, {"url": PNG.replace("GgA", " G\ng")}])
def test_images_are_sent_as_their_data(image_url: Any) -> None:
    part = {"type": "image_url", "image_url": image_url}
    (message,) = mapped([{"role": "user", "content": [part]}]).body["messages"]
    source = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    assert message["content"] == [{"type": "image", "source": source}]


def test_image_urls_and_documents_are_passed_on_with_their_cache_control() -> None:
    url = "https://example.org/cat.png"
    parts = [
        {"type": "image_url", "image_url": {"url": url}, "cache_control": {"type": "ephemeral"}},
        {"type": "file", "file": {"filename": "a.pdf", "file_data": PDF}},
    ]
    image, document = mapped([{"role": "user", "content": parts}]).body["messages"][0]["content"]
    assert image["source"] == {"type": "url", "url": url} and image["cache_control"] == {"type": "ephemeral"}
    assert document["source"] == {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}


@pytest.mark.parametrize(
    ("role", "part", "place"),
    [
        ("user", {"type": "image_url", "image_url": "data:image/bmp;base64,aa"}, "image_url"),
        ("user", {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "image_url.url"),
        ("user", {"type": "image_url", "image_url": "data:image/png;base64,a b!"}, "image_url"),
        ("user", {"type": "image_url", "image_url": "data:image/png,aaaa"}, "image_url"),
        ("user", {"type": "file", "file": {"file_id": "file-1"}}, "file.file_id"),
        ("user", {"type": "input_audio", "input_audio": {}}, "type"),
        ("assistant", {"type": "file", "file": {"file_data": PDF}}, "type"),
        ("system", {"type": "image_url", "image_url": PNG}, "type"),
    ],
)
def test_parts_that_cannot_be_sent_are_refused_by_name(role: str, part: Object, place: str) -> None:
    param, code = refusal_of([*HELLO, {"role": role, "content": [part]}])
    assert param == f"messages[1].content[0].{place}" and code in ("unsupported_value", "invalid_value")


def test_results_of_parallel_calls_come_first_in_one_user_message() -> None:
    messages = [
        *HELLO,
        calling(call("a"), call("b", '{"x": 1}'), content="Looking."),
        result("b", [{"type": "text", "text": "B"}, {"type": "image_url", "image_url": PNG}]),
        {"role": "user", "content": "And?"},
        result("a", ""),
    ]
    _, answer, results = mapped(messages, tools=[TOOL]).body["messages"]
    assert [block["type"] for block in answer["content"]] == ["text", "tool_use", "tool_use"]
    assert answer["content"][2] == {"type": "tool_use", "id": "b", "name": "look_up", "input": {"x": 1}}
    assert [block["type"] for block in results["content"]] == ["tool_result", "tool_result", "text"]
    assert [block.get("tool_use_id") for block in results["content"]] == ["b", "a", None]
    assert "content" not in results["content"][1]


def test_ids_of_other_providers_are_made_valid_and_stay_pairs() -> None:
    names = ["call:1", "call.1", "call_1", "ü", "call:1"]  # the last again, in a later turn
    messages = HELLO + [message for name in names for message in (calling(call(name)), result(name))]
    turns = mapped(messages, tools=[TOOL]).body["messages"][1:]
    calls = [turn["content"][0]["id"] for turn in turns[::2]]
    assert calls == [turn["content"][0]["tool_use_id"] for turn in turns[1::2]]
    assert len(set(calls)) == len(names) and all(name.replace("_", "a").isalnum() and name.isascii() for name in calls)


@pytest.mark.parametrize(
    "arguments", ["{", "[1]", "1", "[" * 100_000, '{"a": NaN}', '{"a": 1e999}', 5, '{"a":"\\ud800"}']
)
def test_arguments_that_are_no_object_are_refused_by_the_name_of_the_call(arguments: Any) -> None:
    param, code = refusal_of([*HELLO, calling(call("a"), call("b", arguments))])
    assert (param, code) == ("messages[1].tool_calls[1].function.arguments", "invalid_value")


@pytest.mark.parametrize("arguments", ["", " ", "{}", None])
def test_no_arguments_are_an_empty_object(arguments: Any) -> None:
    assert mapped([*HELLO, calling(call("a", arguments))]).body["messages"][1]["content"][0]["input"] == {}


def test_an_answer_to_be_continued_does_not_end_in_blanks() -> None:
    said = {"role": "assistant", "content": "Once upon \n"}
    assert mapped([*HELLO, said]).body["messages"][-1] == {"role": "assistant", "content": "Once upon"}
    assert mapped([*HELLO, said, {"role": "system", "content": "x"}]).body["messages"][-1]["content"] == "Once upon"
    assert mapped([*HELLO, said, *HELLO]).body["messages"][1]["content"] == "Once upon \n"


def test_thinking_blocks_come_first_and_unchanged_and_unsigned_thoughts_do_not() -> None:
    signed = {"type": "thinking", "thinking": " so ", "signature": "s"}
    hidden = {"type": "redacted_thinking", "data": "d"}
    unsigned = {"type": "thinking", "thinking": "so"}
    said = calling(call(), content="Well.", reasoning_content=" so ", thinking_blocks=[signed, unsigned, hidden])
    content = mapped([*HELLO, said, result()]).body["messages"][1]["content"]
    assert content[:2] == [signed, hidden] and [block["type"] for block in content[2:]] == ["text", "tool_use"]


def test_a_refusal_is_text() -> None:
    for said in ({"content": None, "refusal": "No."}, {"content": [{"type": "refusal", "refusal": "No."}]}):
        assert mapped([*HELLO, {"role": "assistant", **said}, *HELLO]).body["messages"][1]["content"] == "No."


# --- parameters


@pytest.mark.parametrize(
    ("model", "version"),
    [
        ("claude-opus-4-8-20260301", (4, 8)),
        ("claude-opus-4-20250514", (4, 0)),
        ("claude-sonnet-5", (5, 0)),
        ("claude-haiku-5-5", (5, 5)),
        ("claude-3-haiku-20240307", (3, 0)),
        ("claude-3-5-sonnet-latest", (3, 5)),
        ("claude-opus-4.10", (4, 10)),
        ("us.anthropic.claude-opus-4-6-v1:0", (4, 6)),
        ("claude-2.1", (2, 1)),
        ("claude-mythos-preview", None),
        ("claude-20260301", None),
        ("llama-3-8b", None),
    ],
)
def test_versions_are_read_from_names(model: str, version: tuple[int, int] | None) -> None:
    assert version_of(model) == version
    assert samples(model) == (version is None or version < (4, 7))


def test_sampling_parameters_go_where_they_are_taken() -> None:
    asked = {"temperature": 1.5, "top_p": 0.5, "top_k": 7}
    kept = mapped(model=MIDDLE, **asked)
    assert (kept.body["temperature"], kept.body["top_k"], kept.dropped) == (1, 7, ("top_p",))
    assert mapped(model=MIDDLE, top_p=0.5, top_k=-1).body.keys() == {"model", "max_tokens", "messages", "top_p"}
    for dropping in (mapped(model=NEW, **asked), mapped(thinking={"type": "adaptive"}, **asked)):
        assert not asked.keys() & dropping.body.keys() and dropping.dropped == tuple(asked)
    stripped = to_messages({"model": MIDDLE, "messages": HELLO, **asked}, 4096, stripped=["temperature"])
    assert stripped.body["top_p"] == 0.5 and stripped.dropped == ("temperature",)


def test_the_limit_is_the_newer_field_then_the_older_then_ours() -> None:
    assert mapped(max_completion_tokens=5, max_tokens=6).body["max_tokens"] == 5
    assert mapped(max_tokens=6).body["max_tokens"] == 6
    assert mapped().body["max_tokens"] == 4096


@pytest.mark.parametrize("effort", ["none", "minimal", "low", "medium", "high", "xhigh", "max"])
@pytest.mark.parametrize("max_tokens", [None, 1, 1024, 1025, 3000, 100_000])
def test_thinking_leaves_room_for_the_answer(effort: str, max_tokens: int | None) -> None:
    old = mapped(model=OLD, reasoning_effort=effort, max_tokens=max_tokens)
    if effort == "none":
        assert old.body["thinking"] == {"type": "disabled"}
    elif max_tokens is not None and max_tokens <= 1024:
        assert "thinking" not in old.body and old.dropped == ("reasoning_effort",)
    else:
        assert 1024 <= old.body["thinking"]["budget_tokens"] < old.body["max_tokens"] and old.dropped == ()
    assert old.body["max_tokens"] == max_tokens or max_tokens is None


def test_effort_is_named_where_models_have_it() -> None:
    body = mapped(model=NEW, reasoning_effort="minimal").body
    assert body["thinking"] == {"type": "adaptive"} and body["output_config"] == {"effort": "low"}
    assert mapped(model=NEW, reasoning_effort="none").body["thinking"] == {"type": "disabled"}
    first = mapped(model="claude-3-haiku-20240307", reasoning_effort="high")
    assert "thinking" not in first.body and first.dropped == ("reasoning_effort",)
    assert {"thinking", "output_config"}.isdisjoint(mapped().body)


def test_there_is_no_thinking_beside_forced_calls_or_after_calls_without_thoughts() -> None:
    forced = mapped(model=NEW, reasoning_effort="high", tools=[TOOL], tool_choice="required")
    assert "thinking" not in forced.body and forced.body["output_config"] == {"effort": "high"}
    assert forced.dropped == ("reasoning_effort",)
    signed = {"type": "thinking", "thinking": "so", "signature": "s"}
    for blocks, thinks in ([], False), ([signed], True):
        messages = [*HELLO, calling(call(), thinking_blocks=blocks), result()]
        body = mapped(messages, OLD, reasoning_effort="high", tools=[TOOL]).body
        assert ("thinking" in body) == thinks
        assert (
            "thinking"
            in mapped([*messages, calling(content="x", thinking_blocks=[]), *HELLO], NEW, reasoning_effort="high").body
        )


def test_anthropics_own_fields_pass_untouched() -> None:
    thinking = {"type": "enabled", "budget_tokens": 2000}
    body = mapped(thinking=thinking, output_config={"effort": "max"}, reasoning_effort="low").body
    assert body["thinking"] == thinking and body["max_tokens"] == 6096
    assert body["output_config"] == {"effort": "max"}
    assert mapped(cache_control={"type": "ephemeral"}).body["cache_control"] == {"type": "ephemeral"}


def test_schemas_of_tools_are_whole() -> None:
    tools = [TOOL, {"type": "function", "function": {"name": "b", "description": "B", "strict": True}}]
    first, second = mapped(tools=tools).body["tools"]
    assert first == {"name": "look_up", "input_schema": TOOL["function"]["parameters"]}
    schema = {"type": "object", "properties": {}}
    assert second == {"name": "b", "description": "B", "strict": True, "input_schema": schema}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None),
        ("none", {"type": "none"}),
        ("auto", {"type": "auto"}),
        ("required", {"type": "any"}),
        ({"type": "function", "function": {"name": "look_up"}}, {"type": "tool", "name": "look_up"}),
    ],
)
def test_choices_of_tools_have_counterparts(choice: Any, expected: Object | None) -> None:
    assert mapped(tools=[TOOL], tool_choice=choice).body.get("tool_choice") == expected
    one = mapped(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False).body["tool_choice"]
    if choice != "none":
        expected = {"type": "auto", **(expected or {}), "disable_parallel_tool_use": True}
    assert one == expected


def test_formats_of_answers() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}}
    config = mapped(response_format=asked, reasoning_effort="low").body["output_config"]
    assert config == {"effort": "low", "format": {"type": "json_schema", "schema": schema}}
    hinted = mapped(response_format={"type": "json_object"})
    assert "JSON" in hinted.body["system"][-1]["text"] and hinted.dropped == ("response_format",)
    assert mapped(response_format={"type": "text"}) == mapped()


def test_the_rest_has_counterparts() -> None:
    body = mapped(stop=["a", " ", "b"], stream=True, user="u", service_tier="default", stream_options={}).body
    assert body["stop_sequences"] == ["a", "b"] and body["stream"] is True
    assert body["metadata"] == {"user_id": "u"} and body["service_tier"] == "standard_only"
    assert mapped(stop="a").body["stop_sequences"] == ["a"]
    assert mapped(stop=["", " "]).dropped == ("stop",) and "stop_sequences" not in mapped(stop=" ").body


def test_what_has_no_counterpart_is_dropped_by_name() -> None:
    odd = {"seed": 1, "logit_bias": {}, "metadata": {}, "store": False, "min_p": 0.1, "top_logprobs": 0}
    result = mapped(**odd, prediction=None, service_tier="flex", modalities=["text"], n=1, logprobs=False)
    assert result.dropped == (*odd, "modalities", "service_tier")
    assert result.body == mapped().body


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("modalities", ["text", "audio"]),
        ("audio", {}),
        ("web_search_options", {}),
        ("functions", [{"name": "a"}]),
        ("function_call", "auto"),
        ("reasoning_effort", "much"),
        ("tool_choice", "sometimes"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(name: str, value: Any) -> None:
    assert refusal_of(**{name: value}) == (name, "unsupported_value")


def test_older_and_unknown_forms_are_refused_by_name() -> None:
    assert refusal_of([{"role": "function", "name": "a", "content": "b"}])[0] == "messages[0].role"
    assert refusal_of([*HELLO, {"role": "assistant", "function_call": {}}])[0] == "messages[1].function_call"
    assert refusal_of(tools=[{"type": "custom", "custom": {}}]) == ("tools[0].type", "unsupported_value")
    assert refusal_of(response_format={"type": "grammar"})[0] == "response_format.type"
    assert refusal_of(tool_choice="required")[0] == "tool_choice"
    assert refusal_of([*HELLO, calling(call("a"), call("a"))])[0] == "messages[1].tool_calls[1].id"


# --- any request


def random_part(rng: random.Random, role: str) -> Object:
    parts: list[Object] = [{"type": "text", "text": random_text(rng)}]
    if role in ("user", "tool"):
        parts.append({"type": "image_url", "image_url": rng.choice([PNG, {"url": "https://example.org/a"}])})
    if role == "user":
        parts.append({"type": "file", "file": {"file_data": PDF}})
    return rng.choice(parts)


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(["a", " ", "\n", "é", "猫", '"', "\\", "🙂"]) for _ in range(rng.randrange(6)))


def random_content(rng: random.Random, role: str) -> Any:
    return random_text(rng) if rng.random() < 0.5 else [random_part(rng, role) for _ in range(rng.randrange(1, 4))]


def random_messages(rng: random.Random) -> list[Object]:
    messages: list[Object] = [{"role": "user", "content": "Hello"}]
    for _ in range(rng.randrange(6)):
        role = rng.choice(["system", "developer", "user", "assistant", "calls"])
        if role != "calls":
            messages.append({"role": role, "content": random_content(rng, role)})
            continue
        ids = rng.sample(["a", "b:1", "b.1", "b_1", "é"], rng.randrange(1, 4))
        thoughts = [{"type": "thinking", "thinking": random_text(rng), "signature": "s"}] * rng.randrange(2)
        arguments = json.dumps({random_text(rng): random_text(rng)})
        messages.append(calling(*(call(name, arguments) for name in ids), thinking_blocks=thoughts))
        messages += [result(name, random_content(rng, "tool")) for name in rng.sample(ids, len(ids))]
    return messages


def random_body(rng: random.Random) -> Object:
    fields: dict[str, list[Any]] = {
        "temperature": [0, 0.7, 2],
        "top_p": [0, 0.5, 1],
        "top_k": [-1, 5],
        "max_tokens": [1, 2000],
        "max_completion_tokens": [1500],
        "stop": ["a", ["a", " "], []],
        "tool_choice": ["none", "auto"],
        "tools": [[TOOL], []],
        "parallel_tool_calls": [True, False],
        "reasoning_effort": ["none", "low", "max"],
        "response_format": [
            {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
        ],
        "user": ["u", ""],
        "service_tier": ["auto", "default", "flex"],
        "stream": [True, False],
        "seed": [1],
    }
    chosen = {name: rng.choice([None, *values]) for name, values in fields.items() if rng.random() < 0.5}
    return {"model": rng.choice([OLD, MIDDLE, NEW]), "messages": random_messages(rng), **chosen}


@pytest.mark.parametrize("seed", range(200))
def test_any_conversation_gives_a_valid_request_of_alternating_turns(seed: int) -> None:
    body = random_body(random.Random(seed))
    before = json.dumps(body)
    made = mapped(**body).body
    assert json.dumps(body) == before  # what a client sent is not changed
    assert made == mapped(**body).body
    pending: set[str] = set()
    for turn in made["messages"]:
        blocks = turn["content"] if isinstance(turn["content"], list) else []
        kinds = [block["type"] for block in blocks]
        results = {block["tool_use_id"] for block in blocks if block["type"] == "tool_result"}
        assert "tool_result" not in kinds[len(results) :]
        assert results == pending
        pending = {block["id"] for block in blocks if block["type"] == "tool_use"}
        texts = [block["text"] for block in blocks if block["type"] == "text"]
        assert all(text.strip() for text in texts) and turn["content"]
    assert not pending


DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    1.5,
    float("nan"),
    "",
    "x",
    "\ud800",
    [],
    {},
    [None],
    [[1]],
    {"type": 1},
    {"a": {}},
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Each container inside with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@pytest.mark.parametrize("seed", range(300))
def test_malformed_requests_are_refused_and_nothing_else_happens(seed: int) -> None:
    rng = random.Random(seed)
    body = json.loads(json.dumps(random_body(rng)))
    for container, key in rng.sample(places(body), rng.randrange(1, 3)):
        container[key] = rng.choice([*ODD, DEEP])
    try:
        made = to_messages(body, 4096).body
    except InvalidRequest as error:
        json.dumps(OPENAI.body(error), ensure_ascii=False).encode()
        return
    json.dumps(made, ensure_ascii=False, allow_nan=False).encode()


# --- answers


def random_message(rng: random.Random) -> Object:
    tool = {"type": "tool_use", "id": "t", "name": "look_up"}
    kinds: list[Any] = [
        lambda: {"type": "text", "text": random_text(rng)},
        lambda: {"type": "thinking", "thinking": random_text(rng), "signature": rng.choice(["", "sig=="])},
        lambda: {"type": "redacted_thinking", "data": "data"},
        lambda: {**tool, "id": f"t{rng.random()}", "input": {random_text(rng): [random_text(rng), 1, None]}},
        lambda: {**tool, "id": f"t{rng.random()}", "input": {}},
        lambda: {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}},
    ]
    reasons = ["end_turn", "max_tokens", "stop_sequence", "tool_use", "pause_turn", "refusal"]
    reason = rng.choice([*reasons, "model_context_window_exceeded"])
    stop_details = {"type": "refusal", "category": None, "explanation": rng.choice([None, "No."])}
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "content": [rng.choice(kinds)() for _ in range(rng.randrange(5))],
        "stop_reason": reason,
        "stop_sequence": "END" if reason == "stop_sequence" else None,
        "stop_details": stop_details if reason == "refusal" else None,
        "usage": {
            "input_tokens": rng.randrange(100),
            "output_tokens": rng.randrange(100),
            "cache_read_input_tokens": rng.choice([None, 7]),
            "cache_creation_input_tokens": rng.choice([None, 5]),
            "output_tokens_details": rng.choice([None, {"thinking_tokens": 3}]),
        },
    }


DELTAS = {"text": ("text", "text_delta"), "thinking": ("thinking", "thinking_delta")}


def pieces(rng: random.Random, text: str) -> list[str]:
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(4)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def deltas(rng: random.Random, block: Object) -> list[Object]:
    if block["type"] in DELTAS:
        field, kind = DELTAS[block["type"]]
        found: list[Object] = [{"type": kind, field: piece} for piece in pieces(rng, block[field])]
        signature = [{"type": "signature_delta", "signature": block["signature"]}] if block.get("signature") else []
        return found + signature
    if "input" in block:
        text = json.dumps(block["input"], ensure_ascii=False) if block["input"] else ""
        return [{"type": "input_json_delta", "partial_json": piece} for piece in pieces(rng, text)]
    return []


def events_of(rng: random.Random, message: Object) -> list[Object]:
    usage = {**message["usage"], "output_tokens": 1, "output_tokens_details": None}
    empty = {"content": [], "stop_reason": None, "stop_sequence": None, "stop_details": None, "usage": usage}
    events: list[Object] = [{"type": "message_start", "message": {**message, **empty}}]
    for index, block in enumerate(message["content"]):
        blank = {"text": "", "thinking": "", "signature": "", "input": {}}
        start = {name: blank.get(name, value) for name, value in block.items()}
        events.append({"type": "content_block_start", "index": index, "content_block": start})
        events += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas(rng, block)]
        events.append({"type": "content_block_stop", "index": index})
    last = {name: message[name] for name in ("stop_reason", "stop_sequence", "stop_details")}
    told = {name: message["usage"][name] for name in ("output_tokens", "output_tokens_details")}
    events += [{"type": "message_delta", "delta": last, "usage": told}, {"type": "message_stop"}]
    for event in events:
        EVENT.validate_python(event)
    for _ in range(3):
        events.insert(rng.randrange(len(events)), {"type": rng.choice(["ping", "of_a_later_version"])})
    return events


def fold(chunks: list[Object]) -> Object:
    """What a client holds that concatenates."""
    message: Object = {"role": "assistant", "content": None, "refusal": None}
    choice: Object = {"index": 0, "message": message, "logprobs": None}
    for delta in (part["delta"] for chunk in chunks for part in chunk["choices"]):
        for name in ("content", "refusal", "reasoning_content"):
            if delta.get(name):
                message[name] = (message.get(name) or "") + delta[name]
        if "thinking_blocks" in delta:
            message.setdefault("thinking_blocks", []).extend(delta["thinking_blocks"])
        for part in delta.get("tool_calls", ()):
            add_call(message.setdefault("tool_calls", []), part)
    ends = [part for chunk in chunks for part in chunk["choices"] if part["finish_reason"]]
    assert len(ends) == 1 and ends[0]["delta"] == {}
    choice |= {name: value for name, value in ends[0].items() if name != "delta"}
    same = {name: chunks[0][name] for name in ("id", "created", "model")}
    return {**same, "object": "chat.completion", "choices": [choice], "usage": chunks[-1]["usage"]}


def add_call(calls: list[Object], part: Object) -> None:
    if part["index"] == len(calls):
        function = {**part["function"], "arguments": ""}
        calls.append({"id": part["id"], "type": part["type"], "function": function})
    calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]


def stream(events: list[Object], includes_usage: bool = True) -> list[Object]:
    mapper = StreamMapper("asked", 7, includes_usage)
    chunks = []
    for event in events:
        assert not mapper.is_complete
        chunks += mapper.events(event["type"], event)
    assert mapper.is_complete
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk)
    return chunks


@pytest.mark.parametrize("seed", range(200))
def test_a_stream_adds_up_to_the_whole_answer(seed: int) -> None:
    rng = random.Random(seed)
    message = random_message(rng)
    Message.model_validate(message)
    completion = to_completion(message, "asked", 7)
    ChatCompletion.model_validate(completion)
    chunks = stream(events_of(rng, message))
    assert fold(chunks) == completion
    assert {(chunk["id"], chunk["created"]) for chunk in chunks} == {("msg_1", 7)}
    assert chunks[-1]["choices"] == [] and all(chunk["usage"] is None for chunk in chunks[:-1])
    plain = stream(events_of(random.Random(seed), message), includes_usage=False)
    assert all("usage" not in chunk and chunk["choices"] for chunk in plain)


@pytest.mark.parametrize("seed", range(50))
def test_an_answer_comes_back_as_it_was_said(seed: int) -> None:
    message = random_message(random.Random(seed))
    said = to_completion(message, "asked", 7)["choices"][0]["message"]
    made = to_messages({"model": MIDDLE, "messages": [*HELLO, said, *HELLO]}, 4096).body["messages"]
    blocks = [block for turn in made if turn["role"] == "assistant" for block in turn["content"]]
    for kind, signed in (("thinking", "signature"), ("redacted_thinking", "data"), ("tool_use", "id")):
        given = [block for block in message["content"] if block["type"] == kind and block[signed]]
        assert [block for block in blocks if isinstance(block, dict) and block["type"] == kind] == [
            block | ({"id": block["id"].replace(".", "_")} if kind == "tool_use" else {}) for block in given
        ]


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("tool_use", "tool_calls"),
        ("refusal", "content_filter"),
        ("pause_turn", "stop"),
        ("of_a_later_version", "stop"),
        (None, "stop"),
    ],
)
def test_reasons_to_stop_have_counterparts(reason: str | None, expected: str) -> None:
    message = {**random_message(random.Random(1)), "stop_reason": reason}
    assert to_completion(message, "m", 1)["choices"][0]["finish_reason"] == expected
    events: list[Object] = [{"type": "message_delta", "delta": {"stop_reason": reason}}, {"type": "message_stop"}]
    assert [c["finish_reason"] for chunk in stream(events, False) for c in chunk["choices"]] == [expected]


def test_usage_counts_what_came_from_the_cache() -> None:
    usage = {"input_tokens": 3, "cache_read_input_tokens": 10, "cache_creation_input_tokens": 20, "output_tokens": 5}
    usage |= {"output_tokens_details": {"thinking_tokens": 2}}
    counts = to_completion({**random_message(random.Random(1)), "usage": usage}, "m", 1)["usage"]
    assert (counts["prompt_tokens"], counts["completion_tokens"], counts["total_tokens"]) == (33, 5, 38)
    assert counts["prompt_tokens_details"] == {"cached_tokens": 10}
    assert counts["completion_tokens_details"] == {"reasoning_tokens": 2}


def test_later_usage_overrides_what_it_names() -> None:
    first = {"input_tokens": 3, "cache_read_input_tokens": 4, "output_tokens": 1}
    events: list[Object] = [
        {"type": "message_start", "message": {"id": "m", "usage": first}},
        {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 5, "input_tokens": None}},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn"},
            "usage": {"output_tokens": 9, "input_tokens": 2, "cache_read_input_tokens": None},
        },
        {"type": "message_stop"},
    ]
    counts = stream(events)[-1]["usage"]
    assert (counts["prompt_tokens"], counts["completion_tokens"]) == (6, 9)


def test_calls_are_counted_apart_from_other_blocks_and_may_interleave() -> None:
    def block(index: int, **content: Any) -> Object:
        return {"type": "content_block_start", "index": index, "content_block": content}

    def more(index: int, text: str) -> Object:
        delta = {"type": "input_json_delta", "partial_json": text}
        return {"type": "content_block_delta", "index": index, "delta": delta}

    events = [
        block(0, type="text", text="Well. "),
        block(1, type="tool_use", id="a", name="f", input={}),
        block(2, type="tool_use", id="b", name="g", input={"x": 1}),
        more(1, '{"y"'),
        more(2, "{}"),
        more(1, ": 2}"),
        *({"type": "content_block_stop", "index": index} for index in range(3)),
        {"type": "message_stop"},
    ]
    message = fold(stream(events))["choices"][0]["message"]
    assert message["content"] == "Well. "
    assert [(c["id"], c["function"]["arguments"]) for c in message["tool_calls"]] == [
        ("a", '{"y": 2}'),
        ("b", '{"x": 1}'),
    ]


def test_a_stream_without_its_end_is_not_complete() -> None:
    mapper = StreamMapper("m", 1, True)
    for event in events_of(random.Random(3), random_message(random.Random(3)))[:-1]:
        mapper.events(None, event)
    assert not mapper.is_complete


def test_odd_answers_and_events_raise_nothing_but_errors_for_clients() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        message = random_message(rng)
        events = events_of(rng, message)
        for whole in (message, events):
            container, key = rng.choice(places(whole))
            container[key] = rng.choice(ODD)
        mapper = StreamMapper("m", 1, True)
        try:
            ChatCompletion.model_validate(to_completion(message, "m", 1))
        except APIError as error:
            assert error.status == 502
        for event in events:
            for chunk in mapper.events(None, event) if isinstance(event, dict) else ():
                ChatCompletionChunk.model_validate(chunk)


# --- errors


def body_of(kind: str, message: str = "m", **more: Any) -> Object:
    return {"type": "error", "error": {"type": kind, "message": message, **more}, "request_id": "req_1"}


@pytest.mark.parametrize(
    ("status", "expected", "kind", "code", "retryable"),
    [
        (400, 400, "invalid_request_error", None, False),
        (401, 401, "authentication_error", "provider_auth_error", False),
        (402, 402, "insufficient_quota", "insufficient_quota", False),
        (403, 403, "authentication_error", "provider_auth_error", False),
        (404, 404, "invalid_request_error", "model_not_found", False),
        (409, 409, "invalid_request_error", None, True),
        (413, 413, "invalid_request_error", None, False),
        (418, 418, "invalid_request_error", None, False),
        (422, 422, "invalid_request_error", None, False),
        (429, 429, "rate_limit_exceeded", "rate_limit_exceeded", True),
        (500, 502, "api_error", None, True),
        (504, 504, "timeout", "upstream_timeout", True),
        (529, 503, "api_error", "overloaded", True),
        (599, 502, "api_error", None, True),
    ],
)
@pytest.mark.parametrize("body", [body_of("x"), None, [], "<html>", {"error": "x"}, {"error": {"message": 5}}])
def test_errors_have_counterparts(
    status: int, expected: int, kind: str, code: str | None, retryable: bool, body: Any
) -> None:
    fault = error_of(status, body, "claude", "ANTHROPIC_API_KEY")
    assert (fault.status, fault.type, fault.code, fault.is_passing) == (expected, kind, code, retryable)
    assert "claude" in fault.message and "html" not in fault.message
    assert ("ANTHROPIC_API_KEY" in fault.message) == (status in (401, 403))
    assert OPENAI.body(fault)["error"]["type"] == kind


def test_a_prompt_that_is_too_long_is_told_apart() -> None:
    for text in ("prompt is too long: 210000 tokens > 200000 maximum", "input exceeds the context window"):
        assert error_of(400, body_of("invalid_request_error", text), "claude", "K").code == "context_length_exceeded"
    assert error_of(400, body_of("invalid_request_error", "context_management: no"), "claude", "K").code is None


def test_spending_limits_are_not_tried_again() -> None:
    body = body_of("rate_limit_error", details={"error_code": "enforced_spend_limit_reached"})
    fault = error_of(429, body, "claude", "K")
    assert (fault.status, fault.code, fault.is_passing) == (429, "insufficient_quota", False)


def test_keys_are_not_shown() -> None:
    for key in ("sk-ant-api03-aB_c-9", "sk-abc***xyz", "AIzaSyA-1234567", "Bearer abc.def/ghi+=", "hf_abcdefghijk"):
        text = f"wrong key: {key}, (task-force)"
        assert key not in redact(text) and redact(text).endswith(", (task-force)")
        assert key not in error_of(401, body_of("authentication_error", text), "claude", "K").message


@pytest.mark.parametrize(
    ("kind", "status"),
    [("overloaded_error", 503), ("api_error", 502), ("rate_limit_error", 429), ("timeout_error", 504), ("new", 502)],
)
def test_an_error_in_a_stream_is_raised(kind: str, status: int) -> None:
    mapper = StreamMapper("m", 1, True)
    with pytest.raises(APIError) as caught:
        mapper.events("error", body_of(kind, "Overloaded sk-ant-1"))
    assert caught.value.status == status and "sk-ant" not in caught.value.message
    assert not mapper.is_complete
