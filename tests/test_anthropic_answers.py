"""Claude's answers become OpenAI's: whole ones, streams that add up to them, usage, and reasons to stop."""

import json
import random
from typing import Any

import pytest
from anthropic.types import Message, RawMessageStreamEvent
from claude_requests import HELLO, MIDDLE, ODD, Object, places, random_text, stream
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

from errors import APIError
from providers.anthropic_request import to_messages
from providers.anthropic_response import StreamMapper, to_completion

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


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
