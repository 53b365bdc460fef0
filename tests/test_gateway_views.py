"""Protocols that providers do not speak, answered by their chat completions; and Claude's own, relayed."""

import json
from typing import Any

import httpx2
import pytest
from anthropic.types import Message
from anthropic_requests import HELLO, PNG, WEATHER, events, folded, text_of
from openai import OpenAI
from process import until
from running_gateway import KEYS, Gateway
from upstreams import Asked, Reply, chunk, completion, event, message, message_events, told


def ask(gateway: Gateway, model: str, path: str = "messages", **body: Any) -> Any:
    limit = {} if path.endswith("count_tokens") else {"max_tokens": 50}
    headers = body.pop("headers", None)
    return gateway.post(path, headers=headers, **{"model": model, "messages": HELLO, **limit, **body})


MODELS = [
    ("openai/gpt-5", "openai"),
    ("gemini/gemini-3", "gemini"),
    ("deepseek/deepseek-chat", "deepseek"),
    ("minmax/MiniMax-M3", "minmax"),
    ("ollama/llama3", "ollama"),
    ("my-groq/llama", "my-groq"),
    ("old-gpt", "openai"),
]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("model", "provider"), MODELS)
def test_every_provider_answers_messages(gateway: Gateway, model: str, provider: str, is_stream: bool) -> None:
    reply = ask(gateway, model, system="S", temperature=0.5, stop_sequences=["x"], stream=is_stream)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-gateway-provider"] == provider
    answer = folded(events(reply.text)) if is_stream else reply.json()
    assert Message.model_validate(answer) and text_of(answer) == "Hi!" and answer["stop_reason"] == "end_turn"
    [asked] = gateway.providers[provider].asked
    assert asked.path.endswith(("/chat/completions", "/chatcompletion_v2"))
    sent = asked.body
    assert sent["messages"] == [{"role": "system", "content": "S"}, *HELLO] and sent["stop"] == ["x"]
    assert sent["stream"] is True and sent["stream_options"] == {"include_usage": True}
    allowed = "model messages max_tokens max_completion_tokens stop temperature stream stream_options tools".split()
    assert sent.keys() <= set(allowed), "no field of this server's own goes to others"


def test_tools_results_and_thoughts_go_to_a_provider_and_its_calls_come_back(gateway: Gateway) -> None:
    def call(index: int, **function: str) -> dict[str, Any]:
        return {"index": index, **({"id": f"c{index}", "type": "function"} if "name" in function else {}),
                "function": function}  # fmt: skip

    deltas = [
        {"reasoning_content": "Hm"},
        {"content": "Well"},
        {"tool_calls": [call(0, name="weather", arguments="")]},
        {"tool_calls": [call(0, arguments='{"city": ')]},
        {"tool_calls": [call(0, arguments='"Rome"}'), call(1, name="weather", arguments="{}")]},
    ]
    usage = {"prompt_tokens": 30, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 10}}
    last = {**json.loads(event(chunk({}, "tool_calls")).decode().removeprefix("data: ")), "usage": usage}
    pieces = [*(event(chunk(delta)) for delta in deltas), event(last), event("[DONE]")]
    gateway.providers["my-groq"].script = lambda asked: Reply.stream(*pieces)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    result = [{"type": "text", "text": "12"}, image]
    conversation = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "x"}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": result}]},
    ]
    body: dict[str, Any] = {"messages": conversation, "tools": [WEATHER], "tool_choice": {"type": "any"}}
    answer = folded(events(ask(gateway, "my-groq/m", stream=True, thinking={"type": "adaptive"}, **body).text))
    kinds = [block["type"] for block in answer["content"]]
    assert kinds == ["thinking", "text", "tool_use", "tool_use"]
    assert answer["content"][2]["input"] == {"city": "Rome"} and answer["content"][2]["id"] == "c0"
    assert answer["stop_reason"] == "tool_use"
    assert answer["usage"] == {"input_tokens": 20, "cache_read_input_tokens": 10, "cache_creation_input_tokens": 0,
                               "output_tokens": 9}  # fmt: skip
    assert ask(gateway, "my-groq/m", **body).json()["content"][1:] == answer["content"][1:]
    sent = gateway.providers["my-groq"].asked[0].body
    assert sent["tool_choice"] == "required" and sent["tools"][0]["function"]["parameters"] == WEATHER["input_schema"]
    tool, user = sent["messages"][-2:]
    assert tool == {"role": "tool", "tool_call_id": "t1", "content": "12"}
    assert user["role"] == "user" and user["content"][0]["image_url"]["url"].endswith(PNG)


def test_claude_is_relayed_to_the_byte_with_its_version_and_betas(gateway: Gateway) -> None:
    pieces = message_events("你", "好")
    raw = b"".join(piece for piece in pieces if isinstance(piece, bytes))
    sent: dict[str, Any] = {"thinking": {"type": "adaptive"}, "unknown": {"kept": 1}, "metadata": {"user_id": "u"}}
    headers = {"anthropic-version": "2026-10-21", "anthropic-beta": "a-1,b-2", "x-api-key": "the client's"}
    gateway.providers["claude"].script = lambda asked: Reply.stream(*pieces)
    reply = ask(gateway, "claude/claude-x", stream=True, headers=headers, **sent)
    assert reply.content == raw and reply.headers["x-gateway-provider"] == "claude"
    [asked] = gateway.providers["claude"].asked
    assert asked.path == "/v1/messages" and asked.headers["x-api-key"] == KEYS["ANTHROPIC"]
    assert (asked.headers["anthropic-version"], asked.headers["anthropic-beta"]) == ("2026-10-21", "a-1,b-2")
    assert asked.body == {"model": "claude-x", "messages": HELLO, "max_tokens": 50, "stream": True, **sent}
    whole = json.dumps(message("Hi!"), indent=2).encode()
    gateway.providers["claude"].script = lambda asked: Reply.of(whole)
    assert ask(gateway, "claude/claude-x").content == whole
    assert gateway.providers["claude"].asked[-1].headers["anthropic-version"] == "2023-06-01"
    gateway.providers["claude"].script = lambda asked: Reply.of({"input_tokens": 77})
    assert ask(gateway, "claude/claude-x", "messages/count_tokens").json() == {"input_tokens": 77}
    assert gateway.providers["claude"].asked[-1].path == "/v1/messages/count_tokens"


def test_claudes_errors_keep_their_shape(gateway: Gateway) -> None:
    def failing(kind: str, status: int) -> Reply:
        return Reply.of({"type": "error", "error": {"type": kind, "message": f"No: {KEYS['ANTHROPIC']}"}}, status)

    for kind, status, expected in (
        ("rate_limit_error", 429, "rate_limit_error"),
        ("invalid_request_error", 400, "invalid_request_error"),
        ("overloaded_error", 529, "overloaded_error"),
    ):
        gateway.providers["claude"].script = lambda asked, kind=kind, status=status: failing(kind, status)
        reply = ask(gateway, "claude/claude-x")
        assert reply.json()["error"]["type"] == expected and KEYS["ANTHROPIC"] not in reply.text
    start, *rest = message_events("Hi")
    error = event({"type": "error", "error": {"type": "overloaded_error", "message": "Busy"}}, "error")
    for pieces, kind in (([start, error], "overloaded_error"), ([start, *rest[:2]], "api_error")):
        gateway.providers["claude"].script = lambda asked, pieces=pieces: Reply.stream(*pieces)
        *_, last = events(ask(gateway, "claude/claude-x", stream=True).text)
        assert last["type"] == "error" and last["error"]["type"] == kind


def test_a_providers_error_has_anthropics_shape(gateway: Gateway) -> None:
    gateway.providers["openai"].script = lambda asked: Reply.of({"error": {"message": "Too many"}}, 429)
    reply = ask(gateway, "openai/gpt-5")
    assert reply.status_code == 429 and reply.json()["error"] == {
        "type": "rate_limit_error",
        "message": "openai: Too many",
    }


def test_parameters_that_a_model_refuses_are_sent_no_more(gateway: Gateway) -> None:
    def picky(asked: Asked) -> Reply:
        for name, other in (("max_tokens", "max_completion_tokens"), ("temperature", "1"), ("reasoning_effort", "")):
            if name in asked.body:
                said = f"Unsupported parameter: '{name}' is not supported with this model. Use '{other}' instead."
                return Reply.of({"error": {"message": said, "type": "invalid_request_error", "param": name}}, 400)
        return Reply.stream(*told("Hi"))

    gateway.providers["openai"].script = picky
    body: dict[str, Any] = {"temperature": 0.5, "output_config": {"effort": "max"}, "thinking": {"type": "adaptive"}}
    assert text_of(ask(gateway, "openai/o9", **body).json()) == "Hi"
    first, *others = (asked.body for asked in gateway.providers["openai"].asked)
    assert first["reasoning_effort"] == "xhigh" and first["max_tokens"] == 50 and len(others) == 3
    assert others[-1]["max_completion_tokens"] == 50
    assert not {"temperature", "reasoning_effort", "max_tokens"} & others[-1].keys()
    assert text_of(ask(gateway, "openai/o9", **body).json()) == "Hi"
    assert len(gateway.providers["openai"].asked) == 5 and gateway.providers["openai"].asked[-1].body == others[-1]


def test_other_mistakes_are_not_tried_again(gateway: Gateway) -> None:
    refusal = {"error": {"message": "Unsupported value of messages", "param": "messages"}}
    gateway.providers["openai"].script = lambda asked: Reply.of(refusal, 400)
    assert ask(gateway, "openai/o8", temperature=1.0).status_code == 400
    assert len(gateway.providers["openai"].asked) == 1


def test_the_next_model_answers_if_a_provider_fails(gateway: Gateway) -> None:
    """The next one speaks the protocol itself, or is this server's own."""
    gateway.providers["openai"].script = lambda asked: Reply.of({"error": {"message": "down"}}, 503)
    relayed = ask(gateway, "openai/falls")
    assert text_of(relayed.json()) == "Hi!" and relayed.headers["x-gateway-fallback-from"] == "openai/falls"
    assert gateway.providers["claude"].asked[-1].body["model"] == "second"
    local = ask(gateway, "openai/lands", max_tokens=3)
    assert local.status_code == 200 and local.json()["model"] == "Tiny-Qwen3"
    assert local.headers["x-gateway-model"] == "Tiny-Qwen3" and "x-gateway-provider" not in local.headers


def test_tokens_at_a_provider_that_does_not_count_are_estimated_and_that_is_said(gateway: Gateway) -> None:
    reply = ask(gateway, "openai/gpt-5", "messages/count_tokens", system="x" * 400)
    assert reply.headers["x-estimated"] == "input_tokens" and 100 < reply.json()["input_tokens"] < 150
    assert "x-estimated" not in ask(gateway, "Tiny-Qwen3", "messages/count_tokens").headers
    counted = gateway.post("responses/input_tokens", model="old-gpt", input="x" * 400)
    assert counted.headers["x-estimated"] == "input_tokens" and 100 <= counted.json()["input_tokens"] < 150
    own = gateway.post("responses/input_tokens", model="mine", input="x" * 40)
    assert "x-estimated" not in own.headers and own.json()["input_tokens"] > 40
    assert gateway.providers["openai"].asked == []


def test_responses_of_claude_are_made_from_its_chat(gateway: Gateway) -> None:
    with OpenAI(base_url=gateway.server.url + "/v1", api_key="none", max_retries=0) as client:
        whole = client.responses.create(model="claude/claude-x", input="Hello", max_output_tokens=50)
        assert whole.output_text == "Hi!" and whole.status == "completed"
        *_, last = client.responses.create(model="claude/claude-x", input="Hello", instructions="S", stream=True)
        assert last.type == "response.completed" and last.response.output_text == "Hi!"
        later = client.responses.create(model="claude/claude-x", input="Hello", background=True)
        until(lambda: client.responses.retrieve(later.id).status == "completed")
        assert client.responses.retrieve(later.id).output_text == "Hi!"
        after = {"previous_response_id": whole.id, "truncation": "auto", "instructions": "S"}
        assert client.responses.create(model="claude/claude-x", input="And?", **after).output_text == "Hi!"
    sent = gateway.providers["claude"].asked[-1].body
    assert [turn["content"] for turn in sent["messages"]] == ["Hello", "Hi!", "And?"]
    assert sent["system"] == [{"type": "text", "text": "S"}] and sent["messages"][0]["role"] == "user"


def told_calls(gateway: Gateway, *deltas: Any, reason: str | None = "tool_calls") -> list[list[Any]]:
    """What a provider's deltas are in each protocol, whole and streamed: texts, and calls with their arguments."""
    end = [event(chunk({}, reason))] if reason else []
    pieces = [*(event(chunk(delta)) for delta in deltas), *end, event("[DONE]")]
    gateway.providers["deepseek"].script = lambda asked: Reply.stream(*pieces)
    answers = [ask(gateway, "deepseek/m").json(), folded(events(ask(gateway, "deepseek/m", stream=True).text))]
    assert answers[0]["stop_reason"] == answers[1]["stop_reason"]
    found = [[block.get("text") or block["input"] for block in answer["content"]] for answer in answers]
    for is_stream in (False, True):
        body = {"model": "deepseek/m", "messages": HELLO, "stream": is_stream}
        lines = httpx2.post(f"{gateway.server.url}/api/chat", json=body, timeout=30).text.splitlines()
        messages = [json.loads(line)["message"] for line in lines]
        said = "".join(message["content"] for message in messages)
        calls = [c["function"]["arguments"] for m in messages for c in m.get("tool_calls") or ()]
        found.append([*([said] if said else []), *calls])
    whole = gateway.post("responses", model="deepseek/m", input="Hi").json()
    *_, last = gateway.post("responses", model="deepseek/m", input="Hi", stream=True).text.strip().split("\ndata: ")
    streamed = json.loads(last)
    return [*found, *(told_items(output) for output in (whole["output"], streamed["response"]["output"]))]


def told_items(output: list[Any]) -> list[Any]:
    assert all(item["status"] == "completed" for item in output)
    return [
        json.loads(item["arguments"]) if item["type"] == "function_call" else item["content"][0]["text"]
        for item in output
    ]


def call_delta(index: int, arguments: str, name: str = "") -> dict[str, Any]:
    begun = {"id": f"c{index}", "type": "function"} if name else {}
    function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
    return {"tool_calls": [{"index": index, **begun, "function": function}]}


def test_calls_that_a_provider_writes_at_the_same_time_are_taken_apart(gateway: Gateway) -> None:
    f, g = call_delta(0, '{"x":', "f"), call_delta(1, '{"y":', "g")
    for found in told_calls(gateway, f, g, call_delta(0, "1}"), call_delta(1, "2}")):
        assert found == [{"x": 1}, {"y": 2}]
    for found in told_calls(gateway, {"content": "A"}, f, {"content": "B"}, call_delta(0, "1}")):
        assert found in (["A", {"x": 1}, "B"], ["AB", {"x": 1}]), "Ollama's form has one text"
    other = {"content": "C"}
    for found in told_calls(gateway, {"content": "A"}, f, other, g, call_delta(0, "1}"), other, call_delta(1, "2}")):
        assert found in (["A", {"x": 1}, "CC", {"y": 2}], ["ACC", {"x": 1}, {"y": 2}])
    for found in told_calls(gateway, f, call_delta(0, "1}"), reason=None):
        assert found == [{"x": 1}]


def named(delta: dict[str, Any], identity: str) -> dict[str, Any]:
    delta["tool_calls"][0]["id"] = identity
    return delta


def test_another_id_is_another_call_and_the_same_one_is_not(gateway: Gateway) -> None:
    f, g = call_delta(0, '{"x":', "f"), call_delta(0, '{"y":', "g")
    same_index = [f, call_delta(0, "1}"), named(g, "other"), call_delta(0, "2}")]
    repeated_id = [f, named(call_delta(0, "1"), "c0"), named(call_delta(0, "}"), "c0")]
    last_first = [call_delta(1, '{"y":', "g"), f, call_delta(1, "2}"), call_delta(0, "1}")]
    late_id = [named(call_delta(0, '{"x":', "f"), ""), named(call_delta(0, "1}"), "late")]
    for deltas, expected in (
        (same_index, [{"x": 1}, {"y": 2}]),
        (repeated_id, [{"x": 1}]),
        (last_first, [{"y": 2}, {"x": 1}]),
        (late_id, [{"x": 1}]),
    ):
        for found in told_calls(gateway, *deltas):
            assert found == expected


def test_a_call_ends_an_answer_in_a_call_though_the_provider_says_stop(gateway: Gateway) -> None:
    pieces = [event(chunk(call_delta(0, "{}", "f"))), event(chunk({}, "stop")), event("[DONE]")]
    gateway.providers["deepseek"].script = lambda asked: Reply.stream(*pieces)
    assert ask(gateway, "deepseek/m").json()["stop_reason"] == "tool_use"


def test_an_answer_that_ends_without_a_reason_ends_its_turn(gateway: Gateway) -> None:
    gateway.providers["deepseek"].script = lambda asked: Reply.stream(event(chunk({"content": "x"})), event("[DONE]"))
    assert ask(gateway, "deepseek/m").json()["stop_reason"] == "end_turn"


def test_halves_of_characters_are_joined_or_replaced(gateway: Gateway) -> None:
    first, second = {"content": "\ud83d"}, {"content": "\ude00!"}
    for found in told_calls(gateway, first, second, first, reason="stop"):
        assert found == ["😀!"], "a half at the end is nothing"
    for found in told_calls(gateway, second, call_delta(0, '{"x": "\ud83d', "f"), call_delta(0, '"}')):
        assert found == ["\ufffd!", {"x": "\ufffd"}]
    for found in told_calls(gateway, call_delta(0, '{"x": "\\ud800"}', "f"))[:1]:
        assert found == [{"x": "\ufffd"}], "an escaped one, of a whole answer"


def test_a_provider_that_sends_no_usage_or_stops_for_its_filter_is_read(gateway: Gateway) -> None:
    filtered = [event(chunk({"content": "A"})), event(chunk({}, "content_filter")), event("[DONE]")]
    gateway.providers["my-groq"].script = lambda asked: Reply.stream(*filtered)
    answer = ask(gateway, "my-groq/m").json()
    assert answer["stop_reason"] == "refusal" and answer["usage"]["output_tokens"] == 0
    gateway.providers["my-groq"].script = lambda asked: Reply.of(completion("whole"))
    assert ask(gateway, "my-groq/m").status_code == 502, "an answer that is no stream, though one was asked for"


def test_a_value_that_a_model_refuses_is_left_out_once_and_that_is_told(gateway: Gateway) -> None:
    def picky(asked: Asked) -> Reply:
        if asked.body.get("reasoning_effort") == "xhigh":
            said = "Unsupported value: 'xhigh' is not supported. Supported values are: 'low' and 'high'."
            return Reply.of({"error": {"message": said, "param": "reasoning_effort"}}, 400)
        return Reply.stream(*told("Hi"))

    gateway.providers["openai"].script = picky
    for effort, sent in (("max", ["xhigh", None]), ("low", ["low"])):
        gateway.providers["openai"].asked.clear()
        reply = ask(gateway, "openai/o7", output_config={"effort": effort}, top_k=5)
        assert text_of(reply.json()) == "Hi"
        assert [asked.body.get("reasoning_effort") for asked in gateway.providers["openai"].asked] == sent
        expected = "top_k, reasoning_effort" if effort == "max" else "top_k"
        assert reply.headers["x-gateway-dropped-params"] == expected


@pytest.mark.parametrize(
    "said",
    [
        "image_url is not supported by this model. Got temperature=0.2, max_tokens=100",
        "unknown tool 'x'; the temperature sensor tool is not supported",
    ],
)
def test_an_error_about_something_else_takes_no_parameter_away(gateway: Gateway, said: str) -> None:
    gateway.providers["openai"].script = lambda asked: Reply.of({"error": {"message": said}}, 400)
    assert ask(gateway, "openai/o6", temperature=0.2).status_code == 400
    assert len(gateway.providers["openai"].asked) == 1


def test_a_limit_that_a_model_names_is_kept(gateway: Gateway) -> None:
    def small(asked: Asked) -> Reply:
        if asked.body["max_tokens"] > 16384:
            said = "max_tokens is too large: 32000. This model supports at most 16384 completion tokens."
            return Reply.of({"error": {"message": said, "param": "max_tokens"}}, 400)
        return Reply.stream(*told("Hi"))

    gateway.providers["openai"].script = small
    assert text_of(ask(gateway, "openai/o5", max_tokens=32000).json()) == "Hi"
    assert [asked.body["max_tokens"] for asked in gateway.providers["openai"].asked] == [32000, 16384]


def test_results_follow_their_calls_and_images_come_behind_all_of_them(gateway: Gateway) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
    uses = [{"type": "tool_use", "id": name, "name": "weather", "input": {}} for name in ("a", "b")]
    results = [{"type": "tool_result", "tool_use_id": name, "content": [image]} for name in ("a", "b")]
    conversation = [*HELLO, {"role": "assistant", "content": uses}, {"role": "user", "content": results}]
    ask(gateway, "my-groq/m", messages=conversation, tools=[WEATHER])
    sent = gateway.providers["my-groq"].asked[-1].body["messages"]
    assert [message["role"] for message in sent] == ["user", "assistant", "tool", "tool", "user"]
    assert len(sent[-1]["content"]) == 2


def test_calls_without_numbers_are_told_apart_by_their_ids(gateway: Gateway) -> None:
    deltas = []
    for delta in (call_delta(0, '{"x": 1', "f"), call_delta(0, "}"), call_delta(1, '{"y": 2}', "g")):
        del delta["tool_calls"][0]["index"]
        deltas.append(delta)
    for found in told_calls(gateway, *deltas):
        assert found == [{"x": 1}, {"y": 2}]


def test_a_stop_string_a_filter_and_an_empty_answer_of_a_provider_are_told(gateway: Gateway) -> None:
    last = chunk({}, "stop")
    last["choices"][0]["stop_reason"] = "END"
    gateway.providers["deepseek"].script = lambda asked: Reply.stream(event(chunk({"content": "x"})), event(last))
    answer = ask(gateway, "deepseek/m", stop_sequences=["END"]).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "END")
    pieces = [event(chunk({"content": "x"})), event(chunk({}, "content_filter")), event("[DONE]")]
    gateway.providers["deepseek"].script = lambda asked: Reply.stream(*pieces)
    response = gateway.post("responses", model="deepseek/m", input="Hi").json()
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "content_filter"})
    gateway.providers["deepseek"].script = lambda asked: Reply.stream(event("[DONE]"))
    for is_stream in (False, True):
        empty = ask(gateway, "deepseek/m", stream=is_stream)
        assert empty.status_code == 502 and empty.json()["error"]["type"] == "api_error"


def test_a_developers_message_is_the_systems_for_other_providers(gateway: Gateway) -> None:
    gateway.post("responses", model="gemini/m", input=[{"role": "developer", "content": "D"}, *HELLO])
    sent = gateway.providers["gemini"].asked[-1].body["messages"]
    assert [message["role"] for message in sent] == ["system", "user"]


def test_every_line_of_a_header_is_relayed(gateway: Gateway) -> None:
    url = f"{gateway.server.url}/v1/messages"
    headers = [("anthropic-beta", "a-1"), ("anthropic-beta", "b-2")]
    httpx2.post(url, json={"model": "claude/x", "messages": HELLO, "max_tokens": 5}, headers=headers)
    assert gateway.providers["claude"].asked[-1].headers["anthropic-beta"] == "a-1, b-2"


def test_an_estimate_counts_texts_and_not_the_bytes_of_images(gateway: Gateway) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 100_000}}
    content = [{"type": "text", "text": "x" * 400 + "\ud800"}, image]
    body = json.dumps({"model": "openai/gpt-5", "messages": [{"role": "user", "content": content}]})
    url, kind = f"{gateway.server.url}/v1/messages/count_tokens", {"content-type": "application/json"}
    reply = httpx2.post(url, content=body, headers=kind)
    assert reply.status_code == 200 and 1100 <= reply.json()["input_tokens"] < 1150
