"""Fields with wrong values: rows 5 to 14 of rows.md."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hostile import (
    ANY_OR_REFUSED,
    CHAT,
    EMBED,
    GROWTH,
    LISTENER,
    MODEL,
    REFUSED,
    RERANK,
    RESPONSES,
    TEXT,
    TEXTS,
    TOKENS,
    Case,
    Target,
    as_bytes,
    cases,
    chat,
    check,
    slug,
    user,
)
from models import byte_tokenizer
from raw_http import Connection, bounded_peak

ROBOT = {"role": "robot", "content": "x"}
BAD_MESSAGES: dict[str, tuple[Any, str | None]] = {
    "null": (None, "messages"),
    "string": ("Hello", "messages"),
    "number": (5, "messages"),
    "object": (user("x"), "messages"),
    "true": (True, "messages"),
    "empty": ([], "messages"),
    "10001": ([user("")] * 10_001, "messages"),
    "of-null": ([None], "messages[0]"),
    "of-string": (["Hello"], "messages[0]"),
    "of-number": ([user("x"), 5], "messages[1]"),
    "of-list": ([[user("x")]], "messages[0]"),
    "of-nothing": ([{}], "messages[0].role"),
    "no-role": ([{"content": "x"}], "messages[0].role"),
    "null-role": ([{"role": None, "content": "x"}], "messages[0].role"),
    "number-role": ([{"role": 1, "content": "x"}], "messages[0].role"),
    "list-role": ([{"role": ["user"], "content": "x"}], "messages[0].role"),
    "object-role": ([{"role": {"user": 1}, "content": "x"}], "messages[0].role"),
    "robot": ([ROBOT], "messages[0].role"),
    "second-robot": ([user("x"), ROBOT], "messages[1].role"),
    "hundredth-robot": ([user("x")] * 99 + [ROBOT], "messages[99].role"),
    "number-content": ([user(5)], "messages[0].content"),
    "object-content": ([user({"type": "text", "text": "x"})], "messages[0].content"),
    "true-content": ([user(True)], "messages[0].content"),
    "part-of-string": ([user(["x"])], "messages[0].content[0]"),
    "part-of-null": ([user([None])], "messages[0].content[0]"),
    "part-of-list": ([user([[]])], "messages[0].content[0]"),
    "part-without-type": ([user([{"text": "x"}])], "messages[0].content[0]"),
    "part-of-number-type": ([user([{"type": 1}])], "messages[0].content[0]"),
    "part-of-unknown-type": ([user([{"type": "hologram"}])], "messages[0].content[0]"),
    "part-without-text": ([user([{"type": "text"}])], "messages[0].content[0]"),
    "part-of-number": ([user([{"type": "text", "text": 5}])], "messages[0].content[0]"),
    "second-part": ([user([{"type": "text", "text": "x"}, {"type": "text", "text": []}])], "messages[0].content[1]"),
    "audio-part": ([user([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}])],
        "messages[0].content[0]"),
    "video-part": ([user([{"type": "video_url", "video_url": {"url": LISTENER}}])], "messages[0].content[0]"),
    "file-part": ([user([{"type": "file", "file": {"file_id": "../../etc/passwd"}}])], "messages[0].content[0]"),
    "number-name": ([user("x", name=5)], "messages[0].name"),
    "list-name": ([user("x", name=["a"])], "messages[0].name"),
    "string-calls": ([{"role": "assistant", "tool_calls": "f"}], "messages[0].tool_calls"),
    "calls-of-string": ([{"role": "assistant", "tool_calls": ["f"]}], "messages[0].tool_calls[0]"),
    "number-call-id": ([{"role": "tool", "content": "x", "tool_call_id": 5}], "messages[0].tool_call_id"),
    "string-function-call": ([{"role": "assistant", "function_call": "f"}], "messages[0].function_call"),
    "audio": ([{"role": "assistant", "content": "x", "audio": {"id": "1"}}], "messages[0].audio"),
    "number-refusal": ([{"role": "assistant", "refusal": 1}], "messages[0].refusal"),
    "list-reasoning": ([{"role": "assistant", "content": "x", "reasoning_content": ["y"]}],
        "messages[0].reasoning_content"),
}  # fmt: skip
NOT_FOUND = frozenset({404})
ROW_5 = [chat(5, name, param=param, messages=value) for name, (value, param) in BAD_MESSAGES.items()]
ROW_5 += [
    Case(5, "missing", as_bytes({"model": MODEL}), param="messages"),
    *(
        chat(5, f"input-{name}", param="input", path=RESPONSES, input=value)
        for name, value in {
            "null": None, "number": 5, "object": {"role": "user"}, "empty": [], "of-string": ["x"],
            "robot": [ROBOT], "no-role": [{"content": "x"}], "unknown-type": [{"type": "../x"}],
            "file": [user([{"type": "input_file", "file_id": "x"}])],
        }.items()
    ),
    *(
        chat(5, f"{name}-{slug(value)}", param=name, path=RESPONSES, statuses=NOT_FOUND, **{"input": "x", name: value})
        for name, value in (
            ("input", [{"type": "item_reference", "id": "x"}]), ("input", [{"type": "item_reference"}]),
            ("previous_response_id", "x"), ("previous_response_id", ""), ("previous_response_id", "r" * 10**5),
        )
    ),
    *(
        chat(5, f"{name}-{slug(value)}", param=name, path=RESPONSES, **{"input": "x", name: value})
        for name, values in (
            ("previous_response_id", (5, {}, [])), ("store", ("yes", 1)), ("background", ("yes", 1)),
            ("truncation", ("some", 5)), ("tools", ([{"type": "namespace", "name": "x", "tools": 5}],)),
        )
        for value in values
    ),
    *(
        chat(5, f"prompt-{name}", param="prompt", path=TEXT, prompt=value)
        for name, value in {
            "null": None, "number": 5, "object": {}, "empty-text": "", "empty": [], "of-nothing": [[]],
            "of-null": [None],
            "mixed": ["x", 5], "mixed-tokens": [5, "x"], "of-true": [True], "of-fractions": [1.5], "of-objects": [{}],
            "deep": [[[5]]], "2049": ["x"] * 2049, "empty-texts": ["", ""],
        }.items()
    ),
    *(
        chat(5, f"{slug(path)}-{name}-{slug(value)}", param=name, path=path, **{name: value})
        for path, name, values in (
            (EMBED, "input", (None, "", [], [""], {}, 5, [[]], [None], ["x", 1], [[5], "x"])),
            (RERANK, "query", (None, "", [], 5)),
            (RERANK, "documents", (None, "", [], [""], [5], [{}], [{"text": ""}], ["x"] * 2049)),
            (TOKENS, "prompt", (5, ["x"], {})),
            (TEXTS, "tokens", (None, "x", ["x"], [1.5], [True], [-1], [2**31], [10**30], [[5]])),
        )
        for value in values
    ),
    *(chat(5, f"tokenize-{name}", param=param, path=TOKENS, prompt=None, messages=value)
      for name, (value, param) in BAD_MESSAGES.items() if name in ("empty", "robot", "of-null", "part-of-null")),
]  # fmt: skip

MANY: Any = [0] * 500_000
ROW_5_MANY = [
    *(
        chat(5, f"many-{slug(path)}-{name}", param=name, path=path, seconds=2, **{name: MANY})
        for path, names in (
            (CHAT, ("messages", "tools", "functions", "modalities", "guided_choice", "stop")),
            (TEXT, ("guided_choice", "stop")),
            (RESPONSES, ("input", "include", "tools", "context_management")),
            (RERANK, ("documents",)),
            (TOKENS, ("messages", "tools")),
        )
        for name in names
    ),
    chat(5, "many-stop_token_ids", param="stop_token_ids", stop_token_ids=[None] * 200_000, seconds=2),
    chat(5, "many-parts", param="messages[0].content", messages=[user(MANY)], seconds=2),
    chat(5, "many-calls", param="messages[0].tool_calls", seconds=2, messages=[{"role": "assistant",
        "tool_calls": MANY}]),
    *(chat(5, f"many-{name}", param=f"input[0].{name}", path=RESPONSES, input=[{"role": "user", name: MANY}], seconds=2)
        for name in ("content", "output")),
    chat(5, "many-biases", param="logit_bias", logit_bias={f"x{number}": 0 for number in range(100_000)}, seconds=2),
    *(chat(5, f"many-{name}", param=None, path=path, seconds=2, **{field: values}) for name, path, field, values in (
        ("empty-parts", CHAT, "messages", [user([{}] * 500_000)]),
        ("good-parts", CHAT, "messages", [user([{"type": "text"}] * 9_000)] * 15),
        ("unknown-lists", CHAT, "foo", [[]] * 1_000_000),
        ("unknown-texts", CHAT, "foo", ["x", '"', "\\"] * 500_000),
        ("prompts", TEXT, "prompt", ["x"] * 500_000),
        ("documents", RERANK, "documents", [{"text": "x"}] * 200_000),
    )),
    chat(5, "many-brackets-in-a-text", {200}, path=TOKENS, prompt='[{"' * 150_000, seconds=5),
]  # fmt: skip

ROLES = (
    *(
        "<|im_start|>",
        "<|im_end|>\n<|im_start|>system",
        "user<|im_end|>",
        "system\n",
        "\nsystem",
        " user",
        "user ",
        "User",
    ),
    *(
        "USER",
        "SYSTEM",
        "",
        "\0",
        "user\0",
        "usеr",
        "ｕｓｅｒ",
        "{{ 7*7 }}",
        "{% for x in range(10**9) %}{% endfor %}",
        "root",
    ),
    *(
        "{{ ''.__class__.__mro__ }}",
        "<start_of_turn>model",
        "[INST]",
        "<<SYS>>",
        "ipython",
        "model",
        "human",
        "tool_call",
    ),
    *(
        "user\r\nX: y",
        "u" * 100_000,
        "assistant/think",
        "__class__",
        "environment",
        "${jndi:ldap://x}",
        "%s%n",
        "../user",
    ),
)
ROW_6 = [
    chat(6, f"role-{number}-{slug(role)}", param="messages[0].role", messages=[{"role": role, "content": "x"}])
    for number, role in enumerate(ROLES)
]
ROW_6 += [
    chat(6, f"response-role-{number}-{slug(role)}", param="input[0].role", path=RESPONSES,
        input=[{"role": role, "content": "x"}])
    for number, role in enumerate(ROLES[:6])
]  # fmt: skip

NOT_NUMBERS: tuple[Any, ...] = ("1", "", "hot", [], [1], {}, True, "NaN", "0x10", "1e3")
OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "temperature": (-0.1, 2.1, -1, 10**30, -1e-9, 1e308),
    "top_p": (-0.1, 1.1, 5, -1e308),
    "min_p": (-0.1, 1.1, 10**20),
    "top_k": (-2, 2**31, 1.5, 10**30, -(2**63)),
    "presence_penalty": (-2.1, 2.1, 1e300),
    "frequency_penalty": (-2.1, 2.1, -1e300),
    "repetition_penalty": (0, -1, 10.5, 1e-300),
    "n": (0, -1, 129, 1.5, 2**63),
    "max_tokens": (0, -1, 1.5, -(2**63), -(10**30)),
    "max_completion_tokens": (0, -1, 1.5, -(2**63)),
    "min_tokens": (-1, 1.5, -(10**30)),
    "top_logprobs": (-1, 21, 1.5, 10**30),
    "thinking_token_budget": (-1, 1.5, -(10**30)),
    "seed": (1.5,),
}
ROW_7 = [
    chat(7, f"{name}-{slug(value)}", param=name, **{"logprobs": True, name: value})
    for name, values in OUT_OF_RANGE.items()
    for value in (*values, *NOT_NUMBERS)
]
ROW_7 += [
    chat(7, f"{slug(path)}-{name}-{slug(value)}", param=name, path=path, **{name: value})
    for path, name, values in (
        (TEXT, "logprobs", (-1, 6, 1.5, True, "1", 10**30)),
        (TEXT, "max_tokens", (-1, 1.5, "1", True)),
        (TEXT, "n", (0, 129, "1")),
        (TEXT, "temperature", (-1, 3, "1")),
        (TEXT, "echo", (1, "true", [])),
        (RESPONSES, "max_output_tokens", (0, -1, 1.5, "1", True)),
        (RESPONSES, "top_logprobs", (-1, 21, "1")),
        (RESPONSES, "temperature", (-1, 3, "1")),
        (EMBED, "dimensions", (0, -1, 1.5, "1", True)),
        (RERANK, "top_n", (0, -1, 1.5, "1", True)),
        (CHAT, "logprobs", (1, "true", [], 0)),
        (CHAT, "stream", (1, "true", [], {}, 0)),
        (CHAT, "stream_options", (True, "x", [], {"include_usage": 1})),
        (CHAT, "ignore_eos", (1, "true")),
        (CHAT, "user", (5, [], {})),
        (CHAT, "metadata", (5, "x", [])),
    )
    for value in values
]

HUGE = (129, 1000, 10**6, 2**31, 2**32, 2**63, 2**64, 10**100)
ROW_8 = [
    *(chat(8, f"n-{slug(value)[:12]}", param="n", n=value, seconds=0.5) for value in HUGE),
    *(chat(8, f"text-n-{slug(value)[:12]}", param="n", n=value, path=TEXT, seconds=0.5) for value in HUGE),
    *(chat(8, f"best_of-{slug(value)[:12]}", param="best_of", best_of=value, path=TEXT, seconds=0.5) for value in HUGE),
    chat(8, "n-of-many-prompts", param="prompt", path=TEXT, n=128, prompt=["x"] * 2048, seconds=2),
    chat(8, "best_of-of-many-prompts", path=TEXT, best_of=128, n=1, prompt=["x"] * 2048, seconds=2),
    chat(8, "best_of-below-n", param="best_of", path=TEXT, best_of=1, n=2),
]

LONG = (481, 10**4, 10**9, 2**31, 2**63, 2**64, 10**30)
ROW_9 = [
    *(chat(9, f"chat-{slug(value)[:12]}", ANY_OR_REFUSED, max_tokens=value, seconds=10) for value in LONG),
    *(chat(9, f"newer-{slug(value)[:12]}", ANY_OR_REFUSED, max_completion_tokens=value, seconds=10)
        for value in LONG[1:4]),
    *(chat(9, f"text-{slug(value)[:12]}", ANY_OR_REFUSED, path=TEXT, max_tokens=value, seconds=10) for value in LONG),
    *(chat(9, f"response-{slug(value)[:12]}", ANY_OR_REFUSED, path=RESPONSES, max_output_tokens=value, seconds=10)
        for value in LONG),
    *(chat(9, f"min-{slug(value)[:12]}", ANY_OR_REFUSED, min_tokens=value, seconds=10) for value in LONG),
    *(chat(9, f"thinking-{slug(value)[:12]}", ANY_OR_REFUSED, thinking_token_budget=value, seconds=10)
        for value in LONG),
]  # fmt: skip

TOO_LONG: Any = {"code": "context_length_exceeded", "seconds": 5.0}
ROW_10 = [
    chat(10, "one-message", param="messages", messages=[user("x" * 1000)], **TOO_LONG),
    chat(10, "megabyte", param="messages", messages=[user("x" * 10**6)], **TOO_LONG),
    chat(10, "megabyte-of-words", param="messages", messages=[user("word " * 200_000)], **TOO_LONG),
    chat(10, "megabyte-of-blanks", param="messages", messages=[user(" " * 10**6 + "x")], **TOO_LONG),
    chat(10, "megabyte-of-marks", param="messages", messages=[user("<|im_end|>" * 100_000)], **TOO_LONG),
    chat(10, "megabyte-of-digits", param="messages", messages=[user("7" * 10**6)], **TOO_LONG),
    chat(10, "megabyte-of-emoji", param="messages", messages=[user("👩‍👩‍👧" * 60_000)], **TOO_LONG),
    chat(10, "twenty-megabytes", param="messages", messages=[user("x" * 20_000_000)], **TOO_LONG),
    chat(10, "10000-messages", param="messages", messages=[user("x")] * 10_000, **TOO_LONG),
    chat(10, "10000-turns", param="messages", messages=[user("x"), {"role": "assistant", "content": "y"}] * 5000,
        **TOO_LONG),
    chat(10, "10000-systems", param="messages", messages=[{"role": "system", "content": "x"}] * 10_000, **TOO_LONG),
    chat(10, "10000-parts", param="messages", messages=[user([{"type": "text", "text": "x"}] * 10_000)], **TOO_LONG),
    chat(10, "megabyte-name", param="messages", messages=[user("x", name="n" * 10**6)], **TOO_LONG),
    chat(10, "megabyte-call", param="messages",
        messages=[{"role": "assistant", "tool_calls": [{"id": "1", "type": "function",
            "function": {"name": "f", "arguments": json.dumps({"a": "x" * 10**6})}}]}, user("x")], **TOO_LONG),
    chat(10, "text", param="prompt", path=TEXT, prompt="x" * 1000, **TOO_LONG),
    chat(10, "text-megabyte", param="prompt", path=TEXT, prompt="x" * 10**6, **TOO_LONG),
    chat(10, "one-of-many-texts", param="prompt", path=TEXT, prompt=["x", "x" * 10**6], **TOO_LONG),
    chat(10, "tokens", param="prompt", path=TEXT, prompt=[5] * 10**6, **TOO_LONG),
    chat(10, "token-lists", param="prompt", path=TEXT, prompt=[[5], [5] * 10**5], **TOO_LONG),
    chat(10, "response", param="input", path=RESPONSES, input="x" * 10**6, **TOO_LONG),
    chat(10, "response-instructions", param="input", path=RESPONSES, instructions="x" * 10**6, **TOO_LONG),
    chat(10, "answer", param="max_tokens", code="invalid_value", max_tokens=10**6),
    chat(10, "exactly-full", code="context_length_exceeded", path=TEXT, prompt="x" * 480),
]  # fmt: skip

SECONDS = {  # they take about one each, for what others of the row show too
    *("megabyte", "megabyte-of-blanks", "megabyte-of-digits", "megabyte-of-emoji", "megabyte-name", "megabyte-call"),
    *("10000-turns", "10000-systems", "one-of-many-texts", "response-instructions"),
}
ROW_10 = [replace(case, is_slow=case.name in SECONDS) for case in ROW_10]

VOCABULARY = len(byte_tokenizer())
BAD_IDS = (VOCABULARY, VOCABULARY + 1, 32_000, 10**6, 2**31 - 1, 2**31, 2**32, 2**63, 10**30, -1, -VOCABULARY, -(2**31))
ROW_11 = [
    *(chat(11, f"bias-{value}", param="logit_bias", logit_bias={str(value): 1}) for value in BAD_IDS),
    *(
        chat(11, f"bias-key-{number}-{slug(key)}", param="logit_bias", logit_bias={key: 1})
        for number, key in enumerate(("", "a", " 5x", "5.5", "1e1", "NaN", "0x5", "٥x", "²", "1" * 5000, "5,6", "[5]",
            "--5"))
    ),
    *(chat(11, f"bias-value-{slug(value)}", param="logit_bias", logit_bias={"5": value})
        for value in (101, -101, "1", None, [], True, 1e300)),
    *(chat(11, f"bias-{slug(value)}", param="logit_bias", logit_bias=value) for value in ([], "x", 5, [[5, 1]])),
    chat(11, "bias-1025", param="logit_bias", logit_bias={str(i): 1 for i in range(1025)}),
    *(chat(11, f"prompt-{value}", param="prompt", path=TEXT, prompt=[5, value]) for value in BAD_IDS),
    *(chat(11, f"prompts-{value}", param="prompt", path=TEXT, prompt=[[5], [value]]) for value in BAD_IDS[:4]),
    *(chat(11, f"stop-{value}", param="stop_token_ids", stop_token_ids=[value])
        for value in (2**31, 2**63, 10**30, -1, -(2**31))),
    *(chat(11, f"stop-{value}", ANY_OR_REFUSED, stop_token_ids=[value]) for value in (VOCABULARY, 2**31 - 1)),
    *(chat(11, f"stop-{slug(value)}", param="stop_token_ids", stop_token_ids=value)
        for value in (5, "5", ["5"], [1.5], [True], [[5]], [5] * 129)),
    *(chat(11, f"text-{value}", param="tokens", path=TEXTS, tokens=[5, value]) for value in BAD_IDS),
]  # fmt: skip

ROW_12 = [
    *(chat(12, f"seed-{value}", {200}, seed=value, temperature=1) for value in (0, 1, -1, 2**31, 2**32, 2**63 - 1,
        -(2**63))),
    *(chat(12, f"seed-{value}", param="seed", seed=value) for value in (2**63, -(2**63) - 1, 2**64, 10**30, -(10**30))),
    *(chat(12, f"seed-{slug(value)}", param="seed", seed=value) for value in ("1", "", 0.5, [], {}, True)),
    *(chat(12, f"text-seed-{value}", {200}, path=TEXT, seed=value, temperature=1) for value in (2**63 - 1, -(2**63))),
    *(chat(12, f"text-seed-{value}", param="seed", path=TEXT, seed=value) for value in (2**63, -(2**63) - 1)),
    *(chat(12, f"choices-of-seed-{value}", {200}, seed=value, n=3, temperature=1) for value in (2**63 - 1, -(2**63))),
]  # fmt: skip

ROW_13 = [
    *(
        chat(13, f"stop-{name}", param="stop", path=path, stop=value)
        for path in (CHAT, TEXT)
        for name, value in {
            "17": ["s"] * 17, "1000": ["s"] * 1000, "100k": ["s"] * 100_000, "long": "s" * 1025,
            "megabyte": "s" * 10**6,
            "one-long": ["a", "s" * 1025], "number": 5, "of-numbers": [5], "of-null": [None], "of-lists": [["a"]],
            "object": {"a": 1}, "true": True,
        }.items()
    ),
    *(
        chat(13, f"stop-{name}", ANY_OR_REFUSED, stop=value)
        for name, value in {
            "empty": "", "of-empty": [""], "empties": ["", "", "", ""], "none": [], "blank": " ", "nul": "\0",
            "16": ["s" * 1024] * 16,
            "mark": "<|im_end|>", "half-emoji": "👩‍", "new-lines": "\r\n", "five": list("abcde"),
            "replacement": "\ufffd",
        }.items()
    ),
]  # fmt: skip
ROW_13 += [chat(13, "stop-empty-is-ignored", ANY_OR_REFUSED, stop=["", ""], is_same=True)]


def streamed(case: Case) -> Case:
    return replace(case, row=14, name=f"{case.row:02}-{case.name}", body=case.body[:-1] + b', "stream": true}')


IN_STREAMS = {CHAT, TEXT, RESPONSES}
ROW_14 = [
    streamed(case)
    for number, case in enumerate([*ROW_5, *ROW_6, *ROW_7, *ROW_8, *ROW_10, *ROW_11, *ROW_13])
    if case.statuses == REFUSED and case.path in IN_STREAMS and len(case.body) < 10**5 and number % 3 == 0
    and "stream" not in case.name
]  # fmt: skip


@pytest.mark.parametrize(
    "case", cases([*ROW_5, *ROW_5_MANY], ROW_6, ROW_7, ROW_8, ROW_9, ROW_10, ROW_11, ROW_12, ROW_13, ROW_14)
)
def test_a_hostile_request_gets_the_answer_that_it_must(targets: dict[bool, Target], case: Case) -> None:
    check(targets, case)


def test_many_wrong_values_delay_nobody_and_take_no_memory_row5(targets: dict[bool, Target]) -> None:
    def slowest_health() -> float:
        slowest = 0.0
        with Connection(targets[False].server.url) as connection:
            while not asked.done():
                begin = time.monotonic()
                assert connection.ask("GET", "/health", b"", ()).status == 200
                slowest = max(slowest, time.monotonic() - begin)
        return slowest

    with ThreadPoolExecutor(1) as pool, bounded_peak(targets[False].server, GROWTH):
        asked = pool.submit(lambda: [targets[False].ask(case) for case in ROW_5_MANY])
        slowest = slowest_health()
    assert len(asked.result()) == len(ROW_5_MANY) and slowest < 2, f"one waited for {slowest:.2f} s"
