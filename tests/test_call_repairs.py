"""Calls as models really write them: what can be read in one way alone is repaired, what cannot stays content.

docs/tool-calls.md has the rule. Every form is read whole and in any pieces, and as the tokens of genuine tokenizers.
"""

import json
import random
import re
import time
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import jsonschema
import pytest
from test_answer_parser import Answer, fold
from test_genuine_prompts import MODELS, fetch
from transformers import AutoTokenizer

from engine.constraint import Constraint
from engine.sample.grammar import Grammar, GrammarCompiler
from prompt_templates import PromptTemplate
from schemas import ChatCompletionRequest
from serving.chat import parser_options_of
from text.answer_parser import AnswerParser, ParserOptions
from text.argument_schemas import fits
from text.argument_values import argument_of
from text.detokenizer import TextDecoder
from text.lenient_json import JsonReader, is_json, read_json
from text.structured_output import Structure, structure_of
from text.tool_calls.element_calls import GLM_XML, QWEN_XML
from text.tool_calls.json_calls import LINES, MARKED, PARAMETERS
from text.tool_calls.named_calls import NAMED
from text.tool_calls.tool_format import ToolFormat
from text.tools import ToolSet, tool_set_of

TOOLS: dict[str, dict[str, Any]] = {
    "f": {
        "type": "object",
        "properties": {
            "x": {"type": "string"},
            "n": {"type": "integer"},
            "list": {"type": "array", "items": {"type": "string"}},
            "map": {"type": "object"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["x"],
        "additionalProperties": False,
    },
    "g": {"type": "object", "properties": {}, "additionalProperties": False},
}
THINK = ("<think>", "</think>")


def read(pieces: list[str], style: ToolFormat, is_whole: bool = True, **reading: Any) -> Answer:
    return fold(AnswerParser(ParserOptions(TOOLS, style, **reading)), pieces, is_whole)


def xml(*parameters: tuple[str, str], name: str = "f") -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<function={name}>\n{inner}</function>"


def marked(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


X = ("f", {"x": "123"})
ONE = xml(("x", "123"))
JSON_ONE = '{"name": "f", "arguments": {"x": "123"}}'
OPENAI = '{"type": "function", "function": {"name": "f", "arguments": {"x": "123"}}}'
ENDLESS = ONE.replace("\n</parameter>", "")
QUOTED = [  # elements and ends of calls in a value whose own end follows
    "So:\n<parameter=x>\n/x\n</parameter>",
    "So:\n<parameter=x>\n/x\n</parameter>\nbye",
    "So:\n<parameter=n>\n1\n</parameter> and\n<parameter=x>\n1\n</parameter>.",
    "a\n</function>\n</tool_call>\nb",
    "a\n</function>\n<function=g>\nb",
    "a\n</function>\n<tool_call>\n\n</tool_call>\n<tool_call>",
]
GLM_ONE = "f\n<arg_key>x</arg_key>\n<arg_value>123</arg_value>"

# What is written, content, calls
XML_FORMS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    (marked(ONE), "", [X]),
    (marked(xml(("x", "a > b\n<b>c</b>"))), "", [("f", {"x": "a > b\n<b>c</b>"})]),
    (marked(xml(("x", "if </parameter> or </tool_call> b"))), "", [("f", {"x": "if </parameter> or </tool_call> b"})]),
    (ONE, "", [X]),
    (f"{ONE}\n</tool_call>", "", [X]),
    (f"I will look.\n\n{ONE}\n</tool_call>", "I will look.", [X]),
    (marked(f"{ONE}\n{xml(name='g')}"), "", [X, ("g", {})]),
    (f"{marked(ONE)}\n{marked(ONE)}", "", [X, X]),
    (marked(xml(("x", "1"), ("n", "2")).replace("</parameter>\n<", "<", 1)), "", [("f", {"x": "1", "n": 2})]),
    (marked(xml(("x", "1"), ("n", "2")).replace("\n</parameter>\n</f", "\n</f")), "", [("f", {"x": "1", "n": 2})]),
    (marked(ONE.replace("\n</function>", "")), "", [X]),
    (f"<tool_call>\n{ONE}", "", [X]),
    (f"<tool_call>\n{ONE}\n<tool_call>\n{ONE}\n</tool_call>", "", [X, X]),
    (f"<tool_call>\n{ONE.replace('</function>', '')}", "", [X]),
    (f"<tool_call>\n{ONE.replace('</function>', '')}{xml(name='g')}\n</tool_call>", "", [X, ("g", {})]),
    (marked(ONE.replace("x>", "x")), "", [X]),
    (marked(ONE.replace("f>", "f")), "", [X]),
    (marked(xml(("x", "1"), ("list", "['a', 'b']"), ("map", "{'a': True}"))), "",
     [("f", {"x": "1", "list": ["a", "b"], "map": {"a": True}})]),
    (marked(xml(("x", "1"), ("list", "a"), ("n", "+1,000"))), "", [("f", {"x": "1", "list": ["a"], "n": 1000})]),
    (marked(xml(("x", "null"), ("maybe", "null"))), "", [("f", {"x": "null", "maybe": None})]),
    (marked(xml(("maybe", "123"), ("x", "1"))), "", [("f", {"maybe": "123", "x": "1"})]),
    (marked(JSON_ONE), "", [X]),
    *((begin + xml(("maybe", quoted), ("x", "1")) + "\n</tool_call>", "", [("f", {"maybe": quoted, "x": "1"})])
      for begin in ("<tool_call>\n", "") for quoted in QUOTED),
    (marked(xml(("maybe", "a"), ("x", "  b\n")).replace("</parameter>\n<", "<", 1)), "",
     [("f", {"maybe": "a", "x": "  b\n"})]),
    (f"{marked(ENDLESS)}\n{marked(ENDLESS)}", "", [X, X]),
    (f"{marked(ENDLESS)}\n{marked(ONE)}", "", [X, X]),
    (f"{marked(ENDLESS)}\n{marked(xml(name='g'))}", "", [X, ("g", {})]),
]  # fmt: skip
JSON_FORMS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    (marked(JSON_ONE), "", [X]),
    (marked(OPENAI), "", [X]),
    (marked(OPENAI.replace('{"x": "123"}', '"{\\"x\\": \\"123\\"}"')), "", [X]),
    (marked('{"function": "f", "arguments": {"x": "123"}}'), "", [X]),
    (marked('{"name": "f", "arguments": "{\'x\': \'123\'}"}'), "", [X]),
    (marked("{'name': 'f', 'arguments': {'x': '123'}}"), "", [X]),
    (marked("{'name': 'f', 'arguments': {'x': 'it\\'s \"so\"', 'list': ['a',], 'maybe': None,},}"), "",
     [("f", {"x": "it's \"so\"", "list": ["a"], "maybe": None})]),
    (marked('{"name": "f", "arguments": {"x": "a\nb\tc"}}'), "", [("f", {"x": "a\nb\tc"})]),
    (marked('{"name": "f", "arguments": {"x": "\\d+\\.py"}}'), "", [("f", {"x": "\\d+\\.py"})]),
    (marked('{"name": "f", "arguments": {"x": "1", "n": +5}}'), "", [("f", {"x": "1", "n": 5})]),
    (marked('{"name": "f", "arguments": {"x": "1", "n": "5", "list": "a"}}'), "",
     [("f", {"x": "1", "n": 5, "list": ["a"]})]),
    (marked(f"```json\n{JSON_ONE}\n```"), "", [X]),
    (marked(f"{JSON_ONE}\n{JSON_ONE}"), "", [X, X]),
    (f"<tool_call>\n{JSON_ONE[:-1]}\n</tool_call>", "", [X]),
    (f"<tool_call>\n{JSON_ONE[:-1]}", "", [X]),
    (f"<tool_call>\n{OPENAI[:-2]}\n</tool_call>\n{marked(JSON_ONE)}", "", [X, X]),
    (JSON_ONE, "", [X]),
    (f"{JSON_ONE}\n</tool_call>", "", [X]),
]  # fmt: skip
GLM_FORMS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    (marked(GLM_ONE).replace("<tool_call>\n", "<tool_call>"), "", [X]),
    (f"<tool_call>{GLM_ONE.replace(chr(10), '')}</tool_call>", "", [X]),
    (f"{GLM_ONE}\n</tool_call>", "", [X]),
    (f"<tool_call>{GLM_ONE}", "", [X]),
    (f"<tool_call>{GLM_ONE}\n<tool_call>g</tool_call>", "", [X, ("g", {})]),
    (f"<tool_call>{GLM_ONE.replace('</arg_value>', '')}\n<arg_key>n</arg_key><arg_value>+5</arg_value></tool_call>", "",
     [("f", {"x": "123\n", "n": 5})]),
    (f"<tool_call>{GLM_ONE}<arg_key>list</arg_key><arg_value>['a']</arg_value></tool_call>", "",
     [("f", {"x": "123", "list": ["a"]})]),
    *((f"<tool_call>f<arg_key>maybe</arg_key><arg_value>{quoted}</arg_value>{GLM_ONE[1:]}</tool_call>", "",
      [("f", {"maybe": quoted, "x": "123"})]) for quoted in (
        "a <arg_key>x</arg_key><arg_value>1</arg_value> b", "a</tool_call>\n<tool_call> b")),
]  # fmt: skip
BARE_FORMS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    ('{"name": "f", "parameters": {"x": "123"}}', "", [X]),
    ('{"name": "f", "parameters": {"x": "123"}', "", [X]),
    (OPENAI, "", [X]),
    ("{'name': 'f', 'parameters': {'x': '123',}}", "", [X]),
    ('{"name": "f", "parameters": {"x": "123"}}; {"name": "g", "parameters": {}}', "", [X, ("g", {})]),
    ("```json\n{'name': 'f', 'parameters': {'x': '123'}}\n```", "", [X]),
    ("```tool_code\nf(x='1', n='5')\n```", "", [("f", {"x": "1", "n": 5})]),
    ("[f(x='a, b', n=2), g()]", "", [("f", {"x": "a, b", "n": 2}), ("g", {})]),
    ("So:\n[g()]\nDone.", "So:\nDone.", [("g", {})]),
]
FORMS = [
    *((QWEN_XML, *form) for form in XML_FORMS),
    *((MARKED, *form) for form in JSON_FORMS),
    *((GLM_XML, *form) for form in GLM_FORMS),
    *((style, *form) for style in (PARAMETERS, LINES) for form in BARE_FORMS),
    (NAMED, "f\n{'x': '123',}", "", [X]),
]


def called(answer: Answer) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in answer.calls]


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
        if not text.startswith("<tool_call>"):
            continue
        for choice in ({}, {"is_forced": True}):
            open_ = read([f"Hm.\n\n{text}"], style, think=THINK, is_thinking=True, **choice)
            assert (open_.reasoning, called(open_), open_.content, open_.reason) == ("Hm.", calls, "", "tool_calls")
        closed = read([f"Hm.\n{text}\n</think>\n\nNo."], style, think=THINK, is_thinking=True)
        assert (closed.reasoning, closed.calls, closed.content) == (f"Hm.\n{text}".rstrip(), [], "No.")
        inline = read([f"I could write {text}"], style, think=THINK, is_thinking=True)
        assert (inline.reasoning.startswith("I could write <tool_call>"), inline.content) == (True, "")
    for style, text in NO_CALLS:
        if text.startswith("<tool_call>"):
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
    "</parameter>", ">", "é", "None", "+5", "NaN", '{"function": ',
]  # fmt: skip


def test_nothing_that_a_model_writes_is_lost_and_complete_calls_are_json() -> None:
    """Markup of calls aside: what is no markup shows up, whatever the order."""
    rng = random.Random(3)
    for style in (MARKED, QWEN_XML, GLM_XML, LINES, NAMED):
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


VALUES: list[tuple[Any, str, Any]] = [
    ({"type": ["string", "null"]}, "123", "123"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "123", "123"),
    ({"oneOf": [{"type": "null"}, {"$ref": "#/$defs/text"}]}, "123", "123"),
    ({"$ref": "#/$defs/text"}, "123", "123"),
    ({"$ref": "#/$defs/chain"}, "123", "123"),
    ({"allOf": [{"$ref": "#/$defs/text"}, {"maxLength": 9}]}, "123", "123"),
    ({"const": "123"}, "123", "123"),
    ({"enum": ["1", "2", None]}, "1", "1"),
    ({"enum": [1, "a"]}, "1", 1),
    ({"enum": ["1", 2]}, "2", 2),
    ({"type": "string", "nullable": True}, "5", "5"),
    ({"type": "string", "pattern": "^1"}, "123", "123"),
    ({"type": ["integer", "null"]}, "null", None),
    ({"type": ["integer", "null"]}, "None", None),
    ({"type": ["string", "null"]}, "null", None),
    ({"type": "string"}, "null", "null"),
    ({"type": "string"}, '["a"]', '["a"]'),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "12", 12),
    ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "12 km", "12 km"),
    ({"anyOf": [{"type": "string"}, {"type": "array"}]}, '["a"]', ["a"]),
    ({"type": "array", "items": {"type": "string"}}, "['it\\'s', \"b\"]", ["it's", "b"]),
    ({"type": "array", "items": {"type": "string"}}, "a.txt", ["a.txt"]),
    ({"type": "array", "items": {"type": "string"}}, '"a.txt"', ["a.txt"]),
    ({"type": "array", "items": {"type": "integer"}}, "7", [7]),
    ({"type": "array", "items": {"$ref": "#/$defs/point"}}, "{'x': 1}", [{"x": 1}]),
    ({"type": "array"}, '"[1, 2]"', [1, 2]),
    ({"type": "array", "items": {"type": "string"}}, "a, b", "a, b"),
    ({"type": "object"}, "{'a': True, 'b': None}", {"a": True, "b": None}),
    ({"$ref": "#/$defs/point"}, "{'x': 1,}", {"x": 1}),
    ({"type": "number"}, "1,000.5", 1000.5),
    ({"type": "number"}, "+5", 5),
    ({"type": "number"}, ".5", 0.5),
    ({"type": "integer"}, "1,00", "1,00"),
    ({"type": "integer"}, "about 3", "about 3"),
    ({"type": "integer"}, " 3 ", 3),
    ({"type": "boolean"}, "True", True),
    ({"type": "boolean"}, "yes", "yes"),
    ({}, "5", 5),
    ({}, "+5", "+5"),
    (None, "text", "text"),
    ({"$ref": "#/$defs/circle"}, "5", 5),
    ({"$ref": "#/nowhere"}, "5", 5),
]
ROOT: dict[str, Any] = {
    "$defs": {
        "text": {"type": "string"},
        "chain": {"$ref": "#/$defs/text"},
        "point": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
        "circle": {"anyOf": [{"$ref": "#/$defs/circle"}, {"$ref": "#/$defs/circle"}]},
    }
}


@pytest.mark.parametrize(("schema", "text", "value"), VALUES)
def test_a_text_is_read_as_the_first_type_that_it_fits_without_doubt(schema: Any, text: str, value: Any) -> None:
    read_as = json.loads(argument_of(text, schema, ROOT))
    assert (read_as, type(read_as)) == (value, type(value))


def test_what_fits_a_schema_is_what_its_validator_says() -> None:
    values = ["x", "1", 1, 1.0, 1.5, True, None, [], ["a"], [1], {}, {"x": 1}, {"x": "1"}, {"y": 1}]
    schemas = [
        schema for schema, *_ in VALUES if schema and "circle" not in str(schema) and "nowhere" not in str(schema)
    ]
    schemas += [
        {"type": "object", "properties": {"x": {"type": "string"}}, "additionalProperties": False},
        {"enum": [1, True]},
    ]
    for schema in [schema for schema in schemas if not schema.get("nullable")]:
        known = {key: own for key, own in schema.items() if key not in ("pattern", "maxLength")}
        validator = jsonschema.Draft202012Validator({**known, **ROOT})
        for value in values:
            assert fits(value, schema, ROOT) == validator.is_valid(value), (schema, value)


def test_long_calls_are_read_in_linear_time() -> None:
    long = "x" * 300_000
    texts = {
        QWEN_XML: marked(xml(("x", long))),
        GLM_XML: f"<tool_call>f<arg_key>x</arg_key><arg_value>{long}</arg_value></tool_call>",
        MARKED: marked(f"{{'name': 'f', 'arguments': {{'x': '{long}'}}}}"),
        LINES: OPENAI.replace("123", long),
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


# --- genuine tokenizers

XML_TEMPLATE = (
    "{% if tools %}<tools>{{ tools }}</tools> <tool_call>\n<function=name>\n<parameter=key>\n{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}<think></think>"
)
GLM_TEMPLATE = XML_TEMPLATE.replace("<function=name>\n<parameter=key>", "<arg_key>k</arg_key> <arg_value>v</arg_value>")
BOX = ToolSet(shown=(), schemas=TOOLS, fields={}, is_required=False, is_parallel=True, is_strict=False)


@cache
def template_of(model: str, style: ToolFormat) -> PromptTemplate:
    tokenizer = AutoTokenizer.from_pretrained(fetch(model))
    if style in (QWEN_XML, GLM_XML):
        tokenizer.chat_template = XML_TEMPLATE if style is QWEN_XML else GLM_TEMPLATE
    return PromptTemplate(tokenizer, MODELS[model])


@cache
def compiler_of(template: PromptTemplate) -> GrammarCompiler:
    tokenizer = template.tokenizer
    return GrammarCompiler(tokenizer.backend_tokenizer.to_str, len(tokenizer), {tokenizer.eos_token_id})


def through_tokens(
    template: PromptTemplate, text: str, state: Any = "closed", box: ToolSet = BOX, grammar: Constraint | None = None
) -> Answer:
    """As the server reads an answer."""
    reading = parser_options_of(template, box, state, False, grammar)
    decoder, token_ids = TextDecoder(template.marking_detokenizer), template.encode(text)
    return fold(AnswerParser(reading), [*(decoder.put(token_id) for token_id in token_ids), decoder.end()], True)


MODEL_FORMS = [
    *(("qwen3", QWEN_XML, *form) for form in XML_FORMS),
    *(("qwen3", MARKED, *form) for form in JSON_FORMS),
    *(("qwen3", GLM_XML, *form) for form in GLM_FORMS),
    *(("qwen2_5", MARKED, *form) for form in JSON_FORMS),
    *(("llama3_2", PARAMETERS, *form) for form in BARE_FORMS),
    *(("gemma3", LINES, *form) for form in BARE_FORMS),
]


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("model", "style", "text", "content", "calls"), MODEL_FORMS)
def test_calls_are_read_from_the_tokens_of_genuine_models(
    model: str, style: ToolFormat, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    template = template_of(model, style)
    assert template.tool_format is style
    answer = through_tokens(template, text)
    assert (called(answer), answer.content, answer.reason) == (calls, content, "tool_calls")
    if template.think is not None and text.startswith("<tool_call>"):
        answer = through_tokens(template, f"Hm.\n\n{text}", "open")
        assert (answer.reasoning, called(answer), answer.reason) == ("Hm.", calls, "tool_calls")
        answer = through_tokens(template, f"Hm. I call it: {text}", "open")
        assert (answer.reasoning, called(answer), answer.reason) == ("Hm. I call it:", calls, "tool_calls")


LONG = "a > b\nin a line </parameter> and </function> are text"


CHOICES = ["auto", "required", {"type": "function", "function": {"name": "f"}}]


def guard_of(template: PromptTemplate, schemas: dict[str, Any], choice: Any) -> tuple[ToolSet, Structure, Grammar]:
    """What the server makes of a request with these tools."""
    tools = [{"type": "function", "function": {"name": name, "parameters": own}} for name, own in schemas.items()]
    message = {"role": "user", "content": "x"}
    body = ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [message], "tools": tools, "tool_choice": choice}
    )
    box = tool_set_of(body)
    structure = structure_of(body, box, template.tool_format, template.literals)
    assert structure is not None and box is not None
    return box, structure, compiler_of(template).compile(structure.text)


def is_taken(template: PromptTemplate, structure: Structure, grammar: Grammar, text: str) -> bool:
    """Whether the grammar takes each of the text's tokens."""
    token_ids = template.encode(text)
    assert structure.trigger in (None, template.tokenizer.decode(token_ids[0]))
    matcher = grammar.matcher()
    for token_id in token_ids[structure.trigger is not None :]:
        mask = matcher.mask([])
        if mask is not None and not mask[token_id // 8] >> token_id % 8 & 1:
            return False
        matcher.accept(token_id)
    return True


@pytest.mark.thinned(3)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("style", "text"), [(QWEN_XML, marked(xml(("x", LONG), ("n", "2")))), (MARKED, marked(
    json.dumps({"name": "f", "arguments": {"x": LONG, "n": 2}})))], ids=["XML", "JSON"])  # fmt: skip
def test_grammars_take_what_genuine_models_write_and_it_is_read_as_it_comes(
    style: ToolFormat, text: str, choice: Any
) -> None:
    template = template_of("qwen3", style)
    box, structure, grammar = guard_of(template, TOOLS, choice)
    assert is_taken(template, structure, grammar, text)
    assert called(through_tokens(template, text, box=box, grammar=grammar)) == [("f", {"x": LONG, "n": 2})]
    parser, parts = AnswerParser(parser_options_of(template, box, "closed", False, grammar)), 0
    for token_id in template.encode(text):
        parts += len(parser.put(template.marking_detokenizer.decode([token_id])))
    assert parts > 2  # it is guarded, so it need not be held


OPTIONAL = {"anyOf": [{"type": "string"}, {"type": "null"}]}  # as pydantic writes `str | None`
WRITTEN: list[tuple[Any, str, Any]] = [  # a parameter's schema, what a model writes, what it is
    *((OPTIONAL, text, text) for text in ("123", "true", "a\\nb", '"a"', "a\n\nb", "{", "[1", "None of it")),
    (OPTIONAL, "null", None),
    *(({**own, "description": "x"}, "123", "123") for own in (
        {"type": ["string", "null"]}, {"type": "string", "nullable": True}, {"$ref": "#/$defs/text"},
        {"allOf": [{"$ref": "#/$defs/text"}]}, {"anyOf": [{"$ref": "#/$defs/text"}, {"type": "null"}]},
        {"oneOf": [{"type": "string"}, {"type": "null"}]}, {"type": "string"}, {"type": ["string", "integer"]})),
    ({"type": ["integer", "string"]}, "5", 5),
    ({"type": ["integer", "string"]}, "5 or 6", "5 or 6"),
    ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}, '["a"]', ["a"]),
    ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}, "a, b", "a, b"),
    ({}, "some text", "some text"),
    ({}, '{"a": 1}', {"a": 1}),
    *(({"anyOf": [{"enum": ["a", "b c"]}, {"type": "null"}]}, text, value) for text, value in (
        ("a", "a"), ("b c", "b c"), ("null", None))),
    ({"enum": ["a", None]}, "null", None),
    ({"const": "a"}, "a", "a"),
    ({"$ref": "#/$defs/choice"}, "b", "b"),
    ({"type": "string", "minLength": 2}, '"1\\n2"', "1\n2"),
    ({"type": ["string", "null"], "maxLength": 9}, '"null"', "null"),
    ({"type": "string", "pattern": "^[0-9]+$"}, '"123"', "123"),
    ({"type": "string", "format": "date"}, '"2026-11-27"', "2026-11-27"),
    ({"anyOf": [{"type": "string", "minLength": 1}, {"type": "null"}]}, "null", None),
    ({"anyOf": [{"type": "integer", "minimum": 3}, {"type": "string"}]}, '"1"', "1"),
    ({"type": "integer", "minimum": 1}, "5", 5),
    ({"type": "array", "items": {"type": "string"}}, '["a"]', ["a"]),
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES[:2])
@pytest.mark.parametrize("style", [QWEN_XML, GLM_XML])
def test_a_guarded_value_is_written_as_models_are_taught_and_read_as_it_was_meant(
    style: ToolFormat, choice: Any
) -> None:
    template = template_of("qwen3", style)
    definitions = {"text": {"type": "string"}, "choice": {"enum": ["a", "b"]}}
    for schema, text, value in WRITTEN:
        tools = {"f": {"type": "object", "properties": {"v": schema}, "required": ["v"], "$defs": definitions}}
        box, structure, grammar = guard_of(template, tools, choice)
        glm = f"f\n<arg_key>v</arg_key>\n<arg_value>{text}</arg_value>"
        call = marked(xml(("v", text))) if style is QWEN_XML else f"<tool_call>{glm}\n</tool_call>"
        assert is_taken(template, structure, grammar, call), (schema, text)
        assert called(through_tokens(template, call, box=box, grammar=grammar)) == [("f", {"v": value})], schema


def test_a_mark_that_a_guarded_call_forgets_ends_the_value_all_the_same() -> None:
    number, limited = {"type": "integer"}, {"type": "integer", "minimum": 1}
    for n, choice in ((number, "auto"), (number, "required"), (limited, "auto")):
        tools = {"f": {"type": "object", "properties": {"x": OPTIONAL, "n": n, "m": number}, "required": ["x"]}}
        for style in (QWEN_XML, GLM_XML):
            template = template_of("qwen3", style)
            box, structure, grammar = guard_of(template, tools, choice)
            for numbers, arguments in (
                ([("n", "5")], {"x": "a.py", "n": 5}),
                ([("n", "5"), ("m", "6")], {"x": "a.py", "n": 5, "m": 6}),
                ([("n", "many")], None),
            ):
                values = [("x", "a.py"), *numbers]
                if style is QWEN_XML:
                    text = xml(*values).replace("</parameter>\n<", "<", 1)
                    inside = text.partition("=x>\n")[2].partition("\n</parameter>")[0]
                else:
                    parts = [f"<arg_key>{key}</arg_key>\n<arg_value>{own}</arg_value>\n" for key, own in values]
                    text = "f\n" + "".join(parts).replace("</arg_value>\n", "", 1)
                    inside = text.partition("<arg_value>")[2].partition("</arg_value>")[0]
                call = marked(text) if style is QWEN_XML else f"<tool_call>{text}</tool_call>"
                assert is_taken(template, structure, grammar, call)
                answer = called(through_tokens(template, call, box=box, grammar=grammar))
                assert answer == [("f", arguments or {"x": inside})], call


def test_what_a_json_string_quotes_of_calls_is_its_text() -> None:
    """A grammar wants JSON where a string has limits, so nothing can be forgotten in it."""
    limited = {"type": "string", "maxLength": 99}
    tools = {"f": {"type": "object", "properties": {"x": limited, "n": {"type": "string"}}, "required": ["x"]}}
    template, text = template_of("qwen3", GLM_XML), "<arg_key>n</arg_key>\\n<arg_value>5"
    call = f'<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>"{text}"</arg_value>\n</tool_call>'
    box, structure, grammar = guard_of(template, tools, "auto")
    assert is_taken(template, structure, grammar, call)
    assert called(through_tokens(template, call, box=box, grammar=grammar)) == [("f", {"x": json.loads(f'"{text}"')})]


def test_what_a_grammar_asks_for_again_counts() -> None:
    """It has taken what is behind the forgotten mark for text, and wants the argument, which is required."""
    reading = ParserOptions({"f": {**TOOLS["f"], "required": ["x", "n"]}}, QWEN_XML, is_guarded=True)
    text = marked(xml(("x", "a"), ("n", "5"), ("n", "6")).replace("</parameter>\n<", "<", 1))
    for pieces in (list(text), [text]):
        assert called(fold(AnswerParser(reading), pieces, True)) == [("f", {"x": "a", "n": 6})]


def test_marks_that_other_tokens_spell_are_text() -> None:
    template = template_of("qwen3", QWEN_XML)
    assert set(template.marks) == {"<tool_call>", "</tool_call>", "<think>", "</think>"}
    assert ">" in template.tokenizer.get_vocab() and len(template.encode(">\n")) == 1
    assert "<arg_key>" not in template_of("qwen3", GLM_XML).marks
