"""Calls as models really write them: what can be read in one way alone is repaired, what cannot stays content.

docs/tool-calls.md has the rule. Every form is read whole and in any pieces.
"""

import json
import random
import re
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from call_forms import ENDLESS, FORMS, GEMMA_ONE, GLM_ONE, JSON_ONE, OPENAI, X, called, gemma, marked, read, xml
from test_answer_parser import Answer

from text.lenient_json import JsonReader, is_json, read_json
from text.reasoning_format import THINK
from text.tool_calls.element_calls import GLM_XML, QWEN_XML
from text.tool_calls.gemma_calls import GEMMA_CALLS
from text.tool_calls.json_calls import LINES, MARKED
from text.tool_calls.named_calls import NAMED
from text.tool_calls.tool_format import ToolFormat


@pytest.mark.parametrize(("style", "text", "content", "calls"), FORMS)
def test_what_can_be_read_without_doubt_is_a_call(
    style: ToolFormat, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    answer = read([text], style)
    assert (called(answer), answer.content, answer.reason) == (calls, content, "tool_calls")


NO_CALLS = [
    *((MARKED, marked(f'{{"name": "f", "arguments": {arguments}}}')) for arguments in (
        '{"x": NaN}', '{x: "1"}', '{"x": "1" "n": 2}', '{"x": }', '{"x": "1"]', "[1]", "3", '"text"', '{"n": 1,000}',
        '{"x": "1", "n": -Infinity}', "{'x': 'it's'}")),
    (MARKED, marked('{"name": "F", "arguments": {"x": "1"}}')),
    (MARKED, marked('{"name": "f ", "arguments": {"x": "1"}}')),
    (MARKED, marked('{"name": "f", "arguments": {"x": "1"}, "parameters": {"x": "2"}}')),
    (MARKED, '{"name": "f", "arguments": {"value": ["1"]}}'),
    (MARKED, '{"name": "f", "arguments": {"x": 5}}'),
    (MARKED, 'So:\n```json\n{"name": "f", "arguments": {}}\n```'),
    (QWEN_XML, "<function=f>\n<parameter=y>\n1\n</parameter>\n</function>"),
    (QWEN_XML, "<function=f>\n</function> is how one calls f."),
    (QWEN_XML, "It is <function=g>\n</function>"),
    (QWEN_XML, "<tool_call>\n<function=F>\n</function>\n</tool_call>"),
    (QWEN_XML, "<tool_call>\n<function=g>\nHello\n</function>\n</tool_call>"),
    (GLM_XML, "f is a function"),
    (GLM_XML, "f\nis a function"),
    (LINES, "```tool_code\ng(1, 2)\n```"),
    (LINES, "```tool_code\nf(**{'x': '1'})\n```"),
    (MARKED, "```python\nf(n=1)\n```"),
    (LINES, "[f(n=1)]"),
    (LINES, "[f(x=y)] and [g()] are calls"),
    (NAMED, "f\n{x: 1}"),
    *((QWEN_XML, text) for text in (
        "<function=f>", "So:\n<function=f>\n<parameter=n>\n1\n</parameter>", "<function=f>\n</function>",
        "<function=f>\n<parameter=x>\n1\n</parameter>\n<parameter=y>\n1\n</parameter>")),
    *((style, '{"name": "f", "arguments": {}') for style in (MARKED, QWEN_XML, GLM_XML)),
    (GLM_XML, "f\n<arg_key>n</arg_key>\n<arg_value>1</arg_value>"),
    (LINES, "```python\nf('a', x='b')\n```"),
    (MARKED, "```python\nf(x='a', x='b')\n```"),
    (LINES, "[f(x='a', x='b')]"),
    (QWEN_XML, marked(xml(("x", "1"), ("x", "2")))),
    (QWEN_XML, marked(xml(("x", "1"), ("n", "2"), ("x", "2")))),
    (GLM_XML, f"<tool_call>{GLM_ONE}{GLM_ONE[1:]}</tool_call>"),
    *((style, marked(f'{{{names}, "arguments": {{"x": "1"}}}}')) for style in (MARKED, QWEN_XML) for names in (
        '"name": "f", "name": "g"', '"name": "g", "name": "f"', '"name": "f", "function": "h"')),
    (MARKED, marked('{"name": "f", "arguments": {"x": "1"}, "name": "g"}')),
    *((GEMMA_CALLS, gemma(arguments)) for arguments in (
        "x:", "x:,n:1", "x", "x:~1~ n:2", "x:10:30", "x:[~1~}", "x:1,x:2", "x:~1~,,n:2", ",x:~1~", ":~1~", "x:'it's'",
        "x:~abc", "x:~a~~b", "map:{k:{a:1", "[1]", "x:{1}", "x:~1~]", "x:a{b}", "x:a\nb", f"x:{'y' * 500}")),
    *((GEMMA_CALLS, text) for text in (
        gemma("x:~1~", "F"), gemma("x:~1~", "f x"), "It is call:g{}", "call:f{n:1}", "call:f{x:5}".replace("5", "[]"),
        "call:f", "<|tool_call>call:f", "<|tool_call>call:f is", "<|tool_call> is a mark", "call:f(x=1)",
        gemma("x:~1~").replace("call:", "call "))),
]  # fmt: skip


@pytest.mark.parametrize(("style", "text"), NO_CALLS)
def test_what_cannot_be_read_stays_content_to_the_letter(style: ToolFormat, text: str) -> None:
    assert read([text], style) == Answer(content=text, reason="stop")


def cuts(text: str, rng: random.Random) -> Iterator[list[str]]:
    yield list(text)
    for _ in range(12):
        places = sorted(rng.choices(range(len(text) + 1), k=3))
        yield [text[a:b] for a, b in pairwise([0, *places, len(text)])]


def test_every_cut_of_a_repaired_call_gives_the_same() -> None:
    rng = random.Random(2)
    for style, text in [*((style, text) for style, text, *_ in FORMS), *NO_CALLS]:
        for end in (len(text), len(text) * 2 // 3, len(text) // 2):
            for before, reading in (("", {}), ("Hm.\n", {"think": THINK, "is_thinking": True})):
                for is_whole in (True, False):
                    own = before + text[:end]
                    one = read([own], style, is_whole, **reading)
                    for pieces in cuts(own, rng):
                        assert read(pieces, style, is_whole, **reading) == one, (own, pieces)


def test_a_call_in_thoughts_that_are_not_closed_ends_them() -> None:
    for style, text, _, calls in FORMS:
        if not style.begin or not text.startswith(style.begin):
            continue
        for choice in ({}, {"is_forced": True}):
            open_ = read([f"Hm.\n\n{text}"], style, think=THINK, is_thinking=True, **choice)
            assert (open_.reasoning, called(open_), open_.content, open_.reason) == ("Hm.", calls, "", "tool_calls")
        closed = read([f"Hm.\n{text}\n</think>\n\nNo."], style, think=THINK, is_thinking=True)
        assert (closed.reasoning, closed.calls, closed.content) == (f"Hm.\n{text}".rstrip(), [], "No.")
        inline = read([f"I could write {text}"], style, think=THINK, is_thinking=True)
        assert (inline.reasoning.startswith(f"I could write {style.begin}"), inline.content) == (True, "")
    for style, text in NO_CALLS:
        if style.begin and text.startswith(style.begin):
            answer = read([f"Hm.\n{text}"], style, think=THINK, is_thinking=True)
            assert answer == Answer(reasoning=f"Hm.\n{text}", reason="stop")


def test_text_behind_a_call_without_its_marks_is_content() -> None:
    for behind in ("It ends with </parameter>, always.", "x " * 5000):
        answer = read([f"{marked(ENDLESS)}\n{behind}"], QWEN_XML)
        assert (called(answer), answer.content.strip()) == ([X], behind.strip())


def test_what_the_strict_reading_reads_whole_is_read_so_where_calls_are_held() -> None:
    """The strict reading is that of calls which a grammar keeps valid: every value ends with its own mark."""
    rng, num_read = random.Random(5), 0
    ends = [
        "\n</function>",
        "\n</tool_call>",
        "</parameter>",
        "\n<tool_call>",
        "\n<function=g>",
        "<function=f>",
        "a",
        "\n",
    ]
    elements = ["\n<parameter=x>\n1\n</parameter>\nb", "\n<parameter=n>2</parameter>", "</parameter>", "a", "\n", "<b>"]
    for number in range(1200):
        values = ["".join(rng.choices((ends, elements)[number % 2], k=rng.randrange(6))) for _ in range(2)]
        text = xml(("maybe", f"a{values[0]}"), ("x", f"a{values[1]}")) + "\n</tool_call>"
        call = ("f", {"maybe": f"a{values[0]}", "x": f"a{values[1]}"})
        strict = read([f"<tool_call>\n{text}"], QWEN_XML, is_guarded=True)
        if (strict.reason, strict.content) == ("tool_calls", "") and called(strict) == [call]:
            num_read += 1
            for begin in ("<tool_call>\n", ""):
                assert (called(read([begin + text], QWEN_XML)), begin) == ([call], begin), text
            thoughts = read([f"Hm.\n<tool_call>\n{text}"], QWEN_XML, think=THINK, is_thinking=True)
            assert called(thoughts) == [call], text
    assert num_read > 400


# --- nothing is lost


PIECES = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "```", "```json\n", "\n", " ", "{", "}", "'", '"',
    '"name"', ": ", '"f"', "'f'", '"arguments"', '{"x": "1"}', '{"name": "f", "arguments": ', '{"x": "1",', ",",
    "[", "]", "text", "<function=f>", "<function=g>\n", "</function>", "f\n", "\\", "<arg_key>x</arg_key>",
    "<arg_value>", "</arg_value>", "f(x='1')", "[g()]", "[f(", ";", "<parameter=x>\n", "\n<parameter=n>",
    "</parameter>", ">", "é", "None", "+5", "NaN", '{"function": ', "<|tool_call>", "<tool_call|>", '<|"|>', "call:f{",
    'x:<|"|>', "n:", "call:g{}",
]  # fmt: skip


def test_nothing_that_a_model_writes_is_lost_and_complete_calls_are_json() -> None:
    """Markup of calls aside: what is no markup shows up, whatever the order."""
    rng = random.Random(3)
    for style in (MARKED, QWEN_XML, GLM_XML, GEMMA_CALLS, LINES, NAMED):
        for number in range(1500):
            words = [rng.choice([*PIECES, f"word{i}"]) for i in range(rng.randrange(1, 16))]
            reading: dict[str, Any] = {"think": rng.choice([None, THINK]), "is_thinking": False}
            reading["is_thinking"] = reading["think"] is not None and number % 2 == 0
            text, is_whole = "".join(words), bool(rng.randrange(2))
            one = read([text], style, is_whole, **reading)
            assert read(words, style, is_whole, **reading) == one == read(list(text), style, is_whole, **reading)
            shown = one.content + one.reasoning + "".join(arguments for _, arguments in one.calls)
            for word in re.findall(r"word\d+|text|é", text):
                assert shown.count(word) >= text.count(word), (style.name, text, one)
            if one.reason == "tool_calls":
                assert all(isinstance(json.loads(arguments), dict) for _, arguments in one.calls)
            if not one.calls:
                both = one.reasoning + one.content
                unmarked = text.replace("<think>", "").replace("</think>", "")
                assert sorted(re.sub(r"\s", "", both.replace("<think>", "").replace("</think>", ""))) == sorted(
                    re.sub(r"\s", "", unmarked)
                ), (style.name, text, one)


def test_what_has_been_given_of_json_is_always_its_beginning() -> None:
    rng = random.Random(4)
    pieces = [*"\"'{}[],: \n\\1+a", "u00", "e9", "True", "null", ".5", "x y"]
    for _ in range(4000):
        text = "{" + "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 14)))
        one, given = JsonReader(), ""
        length, whole = one.feed(text)
        two = JsonReader()
        for character in text[: length + one.is_broken]:
            given += two.feed(character)[1]
        assert given == whole and (one.is_done, one.is_broken) == (two.is_done, two.is_broken)
        if one.is_done:
            assert is_json(whole), (text, whole)
        if is_json(text):
            assert read_json(text) == text.rstrip()


# --- time


def test_long_calls_are_read_in_linear_time() -> None:
    long = "x" * 300_000
    texts = {
        QWEN_XML: marked(xml(("x", long))),
        GLM_XML: f"<tool_call>f<arg_key>x</arg_key><arg_value>{long}</arg_value></tool_call>",
        MARKED: marked(f"{{'name': 'f', 'arguments': {{'x': '{long}'}}}}"),
        LINES: OPENAI.replace("123", long),
        GEMMA_CALLS: GEMMA_ONE.replace("123", long),
    }
    for style, text in texts.items():
        pieces = [text[start : start + 3] for start in range(0, len(text), 3)]
        assert called(read(pieces, style)) == [("f", {"x": long})]


HOSTILE: list[tuple[ToolFormat, str, int]] = [
    (LINES, '{"id":[\n', 3000),
    (MARKED, '{"id":[\n', 3000),
    (MARKED, '{"arguments":{"x":[\n', 3000),
    (LINES, '[\n{"id":[\n', 3000),
    (LINES, '{"id":["\n",\n', 3000),
    (MARKED, "<tool_call>{'id':[\n\"", 3000),
    (QWEN_XML, "<tool_call>\n<function=f>\n<parameter=n>\n", 20_000),
    (QWEN_XML, "<tool_call>\n<function=f>\nx\n", 20_000),
    (QWEN_XML, "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</parameter>\n", 8000),
    (QWEN_XML, "<tool_call>\n<function=f>\n<parameter=x>\n1\n</function>\n</tool_call>\n", 8000),
    (GLM_XML, "<tool_call>f<arg_key>x</arg_key><arg_value>1</tool_call>", 8000),
    *(
        (GEMMA_CALLS, text, 8000)
        for text in (
            "<|tool_call>call:f{x:",
            '<|tool_call>call:f{x:<|"|>',
            '<|"|>',
            "call:f{x:[",
            "<|tool_call>call:f{map:{a:",
            "call:f",
            '<|tool_call>call:f{x:<|"|>a<|"|>b',
            'x:<|"|>a,n:<|"|>',
        )
    ),
]


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("style", "text", "count"), HOSTILE)
@pytest.mark.parametrize("is_thinking", [False, True])
def test_what_looks_like_calls_again_and_again_is_read_in_linear_time(
    style: ToolFormat, text: str, count: int, is_thinking: bool
) -> None:
    start = time.process_time()
    read([text * count + "x"], style, think=THINK, is_thinking=is_thinking)
    assert time.process_time() - start < 8  # seconds; one, or minutes


def test_nested_values_that_are_closed_are_read_once() -> None:
    start, text = time.process_time(), '{"id":[\n' * 3000 + "]}\n" * 3000
    assert read([text + "x"], LINES).content == text + "x"
    assert time.process_time() - start < 8
    text = '{"id": "oops\n' + JSON_ONE
    assert called(read([text], MARKED)) == [X]
