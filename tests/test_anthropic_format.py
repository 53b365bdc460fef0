"""Requests are valid by Anthropic's own types, answers by OpenAI's, and streams add up to whole answers."""

from typing import Any

import pytest
from claude_requests import (
    HELLO,
    MIDDLE,
    NEW,
    OLD,
    PDF,
    PNG,
    REQUESTS,
    TOOL,
    Object,
    assert_same,
    call,
    calling,
    mapped,
    result,
)

from errors import InvalidRequest
from providers.anthropic_request import samples, to_messages, version_of


def refusal_of(messages: Any = HELLO, **body: Any) -> tuple[str | None, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        to_messages({"model": MIDDLE, "messages": messages, **body}, 4096)
    assert caught.value.param is None or caught.value.param in caught.value.message
    return caught.value.param, caught.value.code


def test_the_validation_finds_what_is_wrong_and_what_is_unknown() -> None:
    good = mapped([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]).body
    for path in ({"temperatur": 1}, {"messages": [{"role": "user", "content": [{"type": "text", "txt": "a"}]}]}):
        wrong = {**good, **path}
        with pytest.raises((AssertionError, ValueError)):
            assert_same(REQUESTS[False].validate_python(wrong), wrong)


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
