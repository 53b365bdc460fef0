"""Calls as models really write them, in every format: what is written, and the content and calls that it is."""

import json
from typing import Any

from test_answer_parser import Answer, fold

from text.answer_parser import AnswerParser, ParserOptions
from text.tool_calls.element_calls import GLM_XML, QWEN_XML
from text.tool_calls.gemma_calls import GEMMA_CALLS
from text.tool_calls.json_calls import LINES, MARKED, PARAMETERS
from text.tool_calls.named_calls import NAMED
from text.tool_calls.tool_format import ToolFormat

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


def read(pieces: list[str], style: ToolFormat, is_whole: bool = True, **reading: Any) -> Answer:
    return fold(AnswerParser(ParserOptions(TOOLS, style, **reading)), pieces, is_whole)


def xml(*parameters: tuple[str, str], name: str = "f") -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<function={name}>\n{inner}</function>"


def marked(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


def gemma(arguments: str, name: str = "f") -> str:
    """A call in Gemma's notation; ~ stands for the mark around texts."""
    return f"<|tool_call>call:{name}{{{arguments}}}<tool_call|>".replace("~", '<|"|>')


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
GEMMA_ONE = gemma("x:~123~")
GEMMA_QUOTED = "a}],{[: \"'\\ \n<tool_call|><|tool_call>call:g{}"  # what is of no meaning in a text
GEMMA_FORMS: list[tuple[str, str, list[tuple[str, Any]]]] = [
    (GEMMA_ONE, "", [X]),
    (GEMMA_ONE + gemma("", "g") + GEMMA_ONE, "", [X, ("g", {}), X]),
    (f"I will look.\n\n{GEMMA_ONE} Done.", "I will look. Done.", [X]),
    (gemma(f"list:[~a~,~{GEMMA_QUOTED}~],map:{{k:{{a:[1,true,null],b:-1.5e+16}}}},n:5,x:~{GEMMA_QUOTED}~"), "",
     [("f", {"list": ["a", GEMMA_QUOTED], "map": {"k": {"a": [1, True, None], "b": -1.5e16}}, "n": 5,
             "x": GEMMA_QUOTED})]),
    (gemma("x:~~,list:[],map:{}"), "", [("f", {"x": "", "list": [], "map": {}})]),
    (gemma('"x":"1","list":["a", "b\\n"],map:{"k": "it\'s"}'), "",
     [("f", {"x": "1", "list": ["a", "b\n"], "map": {"k": "it's"}})]),
    (gemma("x:'1',list:['a',],map:{'k': True, k2:None},"), "",
     [("f", {"x": "1", "list": ["a"], "map": {"k": True, "k2": None}})]),
    (gemma(" x : ~1~ ,\n n : 5 \n"), "", [("f", {"x": "1", "n": 5})]),
    (gemma("~x~:~1~"), "", [("f", {"x": "1"})]),
    (gemma("x:New York,n:+5,list:a,map:{k:some words}"), "",
     [("f", {"x": "New York", "n": 5, "list": ["a"], "map": {"k": "some words"}})]),
    (gemma("x:123"), "", [X]),
    (gemma("n:~5~,x:~1~,maybe:null"), "", [("f", {"n": 5, "x": "1", "maybe": None})]),
    (gemma("x:~123~").replace("}", ""), "", [X]),
    (gemma("x:~1~,map:{k:1"), "", [("f", {"x": "1", "map": {"k": 1}})]),
    (gemma("x:~123~").replace("}<tool_call|>", ""), "", [X]),
    (gemma("x:~123~").replace("<tool_call|>", ""), "", [X]),
    (GEMMA_ONE.replace("<tool_call|>", "") + GEMMA_ONE, "", [X, X]),
    (GEMMA_ONE.replace("<|tool_call>", ""), "", [X]),
    (GEMMA_ONE.replace("<|tool_call>", "So:\n"), "So:", [X]),
    (GEMMA_ONE.replace("call:", ":"), "", [X]),
    (GEMMA_ONE.replace("call:", ""), "", [X]),
    (GEMMA_ONE.replace("}<", "}call:g{}<"), "", [X, ("g", {})]),
    (gemma("", "g").replace("{}", ""), "", [("g", {})]),
    (gemma("x:~f(~a~) or ~~~b~~~ {~k~: 1}~,n:1"), "", [("f", {"x": 'f("a") or """b""" {"k": 1}', "n": 1})]),
    (gemma("x:~code }],maybe:~file~"), "", [("f", {"x": "code }]", "maybe": "file"})]),
    (f"<|tool_call>\n{JSON_ONE}\n<tool_call|>", "", [X]),
    (JSON_ONE, "", [X]),
]  # fmt: skip
FORMS = [
    *((QWEN_XML, *form) for form in XML_FORMS),
    *((MARKED, *form) for form in JSON_FORMS),
    *((GLM_XML, *form) for form in GLM_FORMS),
    *((GEMMA_CALLS, *form) for form in GEMMA_FORMS),
    *((style, *form) for style in (PARAMETERS, LINES) for form in BARE_FORMS),
    (NAMED, "f\n{'x': '123',}", "", [X]),
]


def called(answer: Answer) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in answer.calls]
