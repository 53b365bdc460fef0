"""Tools, schemas and grammars that are malformed, or explode: rows 39 to 41 of rows.md."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hostile import (
    AGAIN,
    ANY_OR_REFUSED,
    CHAT,
    GROWTH,
    LISTENER,
    MODEL,
    RESPONSES,
    SEEING,
    SETTINGS,
    Case,
    Target,
    alive,
    cases,
    chat,
    check,
    function,
    schema_of,
    slug,
    user,
)
from process import MAIN, serve
from raw_http import Connection, memory
from test_hostile_fields import ROW_10

BAD_TOOLS: dict[str, Any] = {
    "string": "f", "number": 5, "object": function(), "of-null": [None], "of-string": ["f"], "of-nothing": [{}],
    "no-function": [{"type": "function"}],
    "unknown-type": [{"type": "shell", "command": "id"}], "null-type": [{"type": None}],
    "list-type": [{"type": ["function"]}],
    "string-function": [{"type": "function", "function": "f"}], "no-name": [{"type": "function", "function": {}}],
    "number-name": [function(name=5)], "empty-name": [function(name="")], "blank-name": [function(name="a b")],
    "long-name": [function(name="f" * 10**5)],
    "mark-name": [function(name="<|im_end|>")], "newline-name": [function(name="f\n")],
    "template-name": [function(name="{{ 7*7 }}")],
    "string-parameters": [function("x")], "number-parameters": [function(5)], "list-parameters": [function([1])],
    "array-parameters": [function({"type": "array"})],
    "twice": [function(), function()], "513": [function(name=f"f{i}") for i in range(513)],
    "deep": [json.loads('{"a":' * 900 + "1" + "}" * 900)],
    "long": [function(description="x" * 300_000)], "code": [{"type": "code_interpreter"}],
    "web": [{"type": "web_search_preview"}],
    "mcp": [{"type": "mcp", "server_label": "x", "server_url": LISTENER}],
}  # fmt: skip
BAD_CHOICES: dict[str, Any] = {
    "unknown": "f", "empty": "", "number": 5, "list": ["f"], "of-nothing": {}, "other-name": {"type": "function",
    "function": {"name": "g"}},
    "no-name": {"type": "function", "function": {}}, "number-name": {"type": "function", "function": {"name": 5}},
    "unknown-type": {"type": "shell"},
    "allowed-nothing": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
    "allowed-other": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function(name="g")]}},
    "allowed-mode": {"type": "allowed_tools", "allowed_tools": {"mode": "x", "tools": [function()]}},
}  # fmt: skip
BAD_FORMATS: dict[str, Any] = {
    "string": "json", "list": [], "number": 5, "nothing": {}, "null-type": {"type": None}, "number-type": {"type": 5},
    "unknown": {"type": "xml"},
    "list-type": {"type": ["json_object"]}, "no-schema": {"type": "json_schema"},
    "null-inner": {"type": "json_schema", "json_schema": None}, "string-inner": {"type": "json_schema",
    "json_schema": "x"},
    "string-schema": schema_of("x"), "number-schema": schema_of(5), "list-schema": schema_of([]),
    "false": schema_of(False), "nothing-fits": schema_of({"not": {}}),
    "unknown-type-inside": schema_of({"type": "nonsense"}), "number-type-inside": schema_of({"type": 5}),
    "number-properties": schema_of({"properties": 5}),
    "string-required": schema_of({"type": "object", "required": "x"}),
    "string-min": schema_of({"type": "string", "minLength": "x"}),
    "min-above-max": schema_of({"type": "integer", "minimum": 5, "maximum": 4}), "bad-enum": schema_of({"enum": "x"}),
    "empty-enum": schema_of({"enum": []}),
    "bad-pattern": schema_of({"type": "string", "pattern": "(["}),
    "number-pattern": schema_of({"type": "string", "pattern": 5}),
    "missing-ref": schema_of({"$ref": "#/$defs/nothing"}),
    "number-ref": schema_of({"$ref": 5}), "odd-ref": schema_of({"$ref": "#nothing"}),
    "empty-any-of": schema_of({"anyOf": []}), "string-items": schema_of({"type": "array", "items": "x"}),
    "look-behind": schema_of({"type": "string", "pattern": "(?<=a)b"}),
    "back-reference": schema_of({"type": "string", "pattern": "(a)\\1"}),
    "null-in-any-of": schema_of({"anyOf": [None]}), "negative-items": schema_of({"type": "array", "minItems": -1}),
}  # fmt: skip
BAD_STRUCTURES: dict[str, Any] = {
    "guided_regex": ("([", "*", "a{2,1}", "(?P<x", "(?<=a)b", "(a)\\1", "\\", "a\\", "[z-a]", "a" * 300_000, 5, ["a"],
        "[^\\s\\S]", "(?=a)b", "\\p{Nonsense}"),
    "guided_choice": ([], "x", [5], [None], [""], {"a": 1}, ["x" * 300_000], [["a"]]),
    "guided_json": ("{", "x", 5, [], "[]", False, "null", {"type": "nonsense"}, {"$ref": "#/x"},
        {"type": "string", "pattern": "a\\"}),
    "guided_grammar": ("", "x", "start: other", "root ::= other", 5, ["x"], "start: start", 'start: "a',
        "root ::= (" * 1000, "start: /([/"),
    "structured_outputs": ("x", 5, [], {"xml": "x"}, {"regex": "(["}, {"json": 5}, {"choice": []},
        {"json": {}, "regex": "a"}),
}  # fmt: skip
ROW_39 = [
    *(chat(39, f"tools-{name}", param="tools", tools=value, seconds=5) for name, value in BAD_TOOLS.items()),
    *(chat(39, f"choice-{name}", param="tool_choice", tools=[function()], tool_choice=value) for name,
        value in BAD_CHOICES.items()),
    chat(39, "choice-without-tools", param="tool_choice", tool_choice="required"),
    *(chat(39, f"format-{name}", param="response_format", response_format=value, seconds=5) for name,
        value in BAD_FORMATS.items()),
    *(
        chat(39, f"{kind}-{number}-{slug(value)}", param=kind, seconds=5, **{kind: value})
        for kind, values in BAD_STRUCTURES.items()
        for number, value in enumerate(values)
    ),
    *(
        chat(39, f"strict-{name}", param="tools",
            tools=[function({"type": "object", "properties": {"a": schema["json_schema"]["schema"]},
                "required": ["a"]})], tool_choice="required", seconds=5)
        for name, schema in BAD_FORMATS.items()
        if name in ("unknown-type-inside", "bad-pattern", "missing-ref", "bad-enum", "min-above-max", "number-ref",
            "look-behind")
    ),
    *(chat(39, f"response-{name}", path=RESPONSES, text={"format": value}, seconds=5) for name,
        value in BAD_FORMATS.items() if name in ("nothing", "unknown", "string")),
    chat(39, "two-structures", guided_regex="a", guided_json={}),
    chat(39, "parallel-number", param="parallel_tool_calls", tools=[function()], parallel_tool_calls=5),
]  # fmt: skip


def nested_objects(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def doubling(depth: int) -> dict[str, Any]:
    """Each definition is used twice by the next: 2**depth paths."""
    defs: dict[str, Any] = {"d0": {"type": "string"}}
    for number in range(1, depth + 1):
        inner = {"$ref": f"#/$defs/d{number - 1}"}
        defs[f"d{number}"] = {"type": "object", "properties": {"a": inner, "b": inner}, "required": ["a", "b"]}
    return {"$defs": defs, "$ref": f"#/$defs/d{depth}"}


def ring(keyword: str) -> dict[str, Any]:
    first, second = {"$ref": "#/$defs/b"}, {"$ref": "#/$defs/a"}
    return {"$defs": {"a": {keyword: [first]}, "b": {keyword: [second]}}, "$ref": "#/$defs/a"}


HEAVY: dict[str, Any] = {
    "self": {"$ref": "#"}, "self-required": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    "self-optional": {"type": "object", "properties": {"a": {"$ref": "#"}}},
    "ring-all": ring("allOf"), "ring-any": ring("anyOf"), "ring-one": ring("oneOf"),
    "ring-refs": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "deep-30": nested_objects(30), "deep-45": nested_objects(45), "deep-200": nested_objects(200),
    "doubling": doubling(30), "array-ring": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "any-of-arrays": {"anyOf": [{"type": "array", "minItems": n, "items": {"type": "integer"}} for n in range(200)]},
    "properties-1000": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}},
    "required-1000": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1000)},
        "required": [f"p{i}" for i in range(1000)]}, "required-10k": {"type": "object",
        "required": [f"p{i}" for i in range(10_000)]},
    "enum-10k": {"enum": [f"value {i}" for i in range(10_000)]}, "enum-long": {"enum": ["x" * 100_000]},
    "min-items": {"type": "array", "minItems": 10**9, "items": {}}, "max-items": {"type": "array", "maxItems": 10**9},
    "min-items-nested": {"type": "array", "minItems": 1000, "items": {"type": "array", "minItems": 1000,
        "items": {"type": "array", "minItems": 1000}}}, "max-length": {"type": "string", "maxLength": 10**9},
        "min-length": {"type": "string", "minLength": 10**9},
    "min-length-10k": {"type": "string", "minLength": 10_000, "maxLength": 20_000},
    "range": {"type": "integer", "minimum": -(10**300), "maximum": 10**300}, "small-range": {"type": "number",
    "minimum": 1e-300, "maximum": 2e-300},
    "multiple": {"type": "number", "multipleOf": 1e-300},
    "multiples": {"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949, 9941, 9931)]},
    "one-of": {"oneOf": [{"type": "string", "pattern": f"^a{{{n},}}$"} for n in range(50)]},
    "all-of": {"allOf": [{"type": "string", "pattern": f"(.*{c}){{3}}"} for c in "abcdefghij"]},
    "unique": {"type": "array", "uniqueItems": True, "items": {"enum": list(range(1000))}},
    "not": {"not": {"not": {"not": {"type": "string"}}}},
    "dependent": {"dependentRequired": {f"p{i}": [f"p{j}" for j in range(100)] for i in range(100)}},
    "pattern-properties": {"patternProperties": {f"(.*{i}.*){{5}}": {} for i in range(30)}},
    "if": {"if": {"$ref": "#"}, "then": {"$ref": "#"}, "else": {"$ref": "#"}},
}  # fmt: skip
HEAVY_PATTERNS = {
    "counted": "(a{1000}){1000}", "counted-thrice": "((a{1000}){1000}){1000}", "counted-range": "(a|b){1,10000}",
    "counted-open": "(.{0,1000}){0,1000}", "counted-unicode": "\\p{L}{10000}",
    "catastrophic": "(a+)+$", "catastrophic-or": "(a|aa)+$", "catastrophic-star": "(.*)*(.*)*(.*)*x",
    "stars": "(.*){50}x", "overlap": "(x+x+)+y", "parentheses": "(" * 5000 + "a" + ")" * 5000,
    "parentheses-900": "(" * 900 + "a" + ")" * 900,
    "alternatives": "|".join(f"w{i}" for i in range(20_000)), "exponential": "(a|b)*a(a|b){30}",
    "exponential-60": "(.*)a.{60}", "classes": "[^a]{1000}[^b]{1000}[^c]{1000}", "dots": ".{100000}",
    "huge-count": "a{4294967296}", "huger-count": "a{99999999999999999999}",
    "nested-optional": "(a?){500}a{500}", "emoji": "[😀-🙏]{500}", "case": "(?i)" + "ß" * 1000, "flags": "(?mixsuU)a",
    "empty": "", "anchors": "^$^$^$", "any": "(?s:.)*",
}  # fmt: skip
HEAVY_GRAMMARS = {
    "left-recursion": 'start: start "a" | "a"', "deep-groups": "start: " + "(" * 2000 + '"a"' + ")" * 2000,
    "ambiguous": 'start: e\ne: e e | "a" | ""', "gbnf-groups": "root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000,
    "repeats": 'start: ("a"~1000)~1000', "gbnf-repeats": 'root ::= (("a"{1000}){1000}){1000}',
    "gbnf-left": "root ::= root root | [a-z]",
    "many-rules": "start: r0\n" + "\n".join(f'r{i}: r{i + 1} r{i + 1} | "a"' for i in range(300)) + '\nr300: "b"',
    "empty-ring": "start: a\na: b\nb: a", "doubling": "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}"
    for i in range(40)) + '\nr40: "b"', "import": "%import common.WORD\nstart: WORD",
    "file-import": "%import ..x (Y)\nstart: Y",
    "regex": "start: /(a{1000}){1000}/", "json": 'start: %json {"$ref": "#"}',
    "json-remote": f'start: %json {{"$ref": "{LISTENER}/s.json"}}',
}  # fmt: skip
ROW_40 = [
    *(chat(40, f"schema-{name}", ANY_OR_REFUSED, response_format=schema_of(schema), seconds=5) for name,
        schema in HEAVY.items()),
    *(chat(40, f"tool-{name}", ANY_OR_REFUSED, tools=[function({"type": "object", "properties": {"a": schema}})],
        tool_choice="required", seconds=5)
      for name, schema in HEAVY.items() if name in ("deep-30", "doubling", "enum-10k", "min-items", "min-items-nested",
          "required-1000", "all-of")),
    *(chat(40, f"strict-root-{name}", ANY_OR_REFUSED, tools=[function(HEAVY[name])], tool_choice="required", seconds=5)
      for name in ("self", "self-required", "ring-all", "ring-refs")),
    *(chat(40, f"auto-{name}", ANY_OR_REFUSED, tools=[function({"type": "object", "properties": {"a": HEAVY[name]}})],
        seconds=5)
      for name in ("self", "ring-all", "doubling", "min-items-nested")),
    *(chat(40, f"pattern-{name}", ANY_OR_REFUSED, response_format=schema_of({"type": "string", "pattern": pattern}),
        seconds=5) for name, pattern in HEAVY_PATTERNS.items()),
    *(chat(40, f"regex-{name}", ANY_OR_REFUSED, guided_regex=pattern, seconds=5) for name,
        pattern in HEAVY_PATTERNS.items()),
    *(chat(40, f"grammar-{name}", ANY_OR_REFUSED, guided_grammar=grammar, seconds=5) for name,
        grammar in HEAVY_GRAMMARS.items()),
    chat(40, "choices-10k", ANY_OR_REFUSED, guided_choice=[f"choice {i}" for i in range(10_000)], seconds=5),
    chat(40, "tools-512", ANY_OR_REFUSED, tools=[function(name=f"f{i}") for i in range(512)], tool_choice="required",
        messages=[user("x")], seconds=5),
]  # fmt: skip

REFS = (
    "{}/s.json",
    "{}/s.json#/a",
    "file:///etc/passwd",
    "/etc/passwd",
    "../schema.json",
    "urn:x:y",
    "//127.0.0.1/x",
    "s.json",
    "data:,{{}}",
)
ROW_41 = [
    *(chat(41, f"format-{slug(ref)}", param="response_format",
        response_format=schema_of({"$ref": ref.format(LISTENER)})) for ref in REFS),
    *(chat(41, f"inside-{slug(ref)}", param="response_format",
        response_format=schema_of({"type": "object", "properties": {"a": {"$ref": ref.format(LISTENER)}},
            "required": ["a"]})) for ref in REFS),
    *(chat(41, f"based-{slug(ref)}", param="response_format",
        response_format=schema_of({"$id": ref.format(LISTENER), "$ref": "other.json"})) for ref in REFS[:4]),
    *(chat(41, f"guided-{slug(ref)}", param="guided_json", guided_json={"$ref": ref.format(LISTENER)}) for ref in REFS),
    *(chat(41, f"tool-{slug(ref)}", param="tools",
        tools=[function({"type": "object", "properties": {"a": {"$ref": ref.format(LISTENER)}}, "required": ["a"]})],
        tool_choice="required") for ref in REFS),
    *(chat(41, f"meta-{slug(ref)}", ANY_OR_REFUSED,
        response_format=schema_of({"$schema": ref.format(LISTENER), "type": "object"})) for ref in REFS[:4]),
    *(chat(41, f"dynamic-{slug(ref)}", ANY_OR_REFUSED,
        response_format=schema_of({"$dynamicRef": ref.format(LISTENER)})) for ref in REFS[:4]),
]  # fmt: skip


HEAVIEST = [  # by the time that they were measured to take: 0.15 to 1.2 s each
    case
    for case in ROW_40
    if case.name.endswith(
        ("required-10k", "enum-long", "multiples", "choices-10k", "-alternatives", "enum-10k", "properties-1000")
    )
]


@pytest.mark.parametrize("heavy", [HEAVIEST, pytest.param(ROW_40, marks=pytest.mark.slow)], ids=["heaviest", "all"])
def test_heavy_structures_delay_nobody_row40(targets: dict[bool, Target], heavy: list[Case]) -> None:
    """Others are answered while they are compiled; it comes first, since what was compiled is kept."""
    target, is_over = targets[True], threading.Event()

    def be_heavy(case: Case) -> None:
        with Connection(target.server.url, timeout=60) as connection:
            connection.ask("POST", CHAT, case.body.replace(MODEL.encode(), SEEING.encode()))

    def be_served() -> float:
        slowest = 0.0
        with Connection(target.server.url) as connection:
            while not is_over.is_set():
                begin = time.monotonic()
                assert connection.ask("GET", "/health", b"", ()).status == 200
                assert connection.ask("POST", CHAT, alive(0, True).body).status == 200
                slowest = max(slowest, time.monotonic() - begin)
        return slowest

    with ThreadPoolExecutor(5) as pool:
        served = pool.submit(be_served)
        list(pool.map(be_heavy, heavy))
        is_over.set()
        slowest = served.result()
    assert slowest < 2, f"one waited for {slowest:.2f} s"


@pytest.mark.parametrize("case", cases(ROW_39, ROW_40, ROW_41))
def test_a_hostile_request_gets_the_answer_that_it_must(targets: dict[bool, Target], case: Case) -> None:
    check(targets, case)


def test_compiled_structures_take_bounded_memory_row40(targets: dict[bool, Target]) -> None:
    """What is kept of them is bounded by its size, not by its number alone."""
    target = targets[True]
    before = memory(target.server)
    for number in range(4):
        target.ask(chat(40, "kept", model=SEEING, guided_regex=f"(a{{{990 + number}}}){{1000}}"))
    grown = memory(target.server) - before
    assert grown < GROWTH, f"{grown / 2**20:.0f} MiB are kept of four"


@pytest.mark.slow
def test_the_heaviest_requests_once_more_take_no_more_memory(
    tiny_checkpoint: Path, targets: dict[bool, Target]
) -> None:
    """All threads have one heap here: with several, of 64 MiB each, it is chance which of them end in free memory."""
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), MALLOC_ARENA_MAX="1", **SETTINGS) as server:
        server.wait_until_healthy()

        def ask_all() -> int:
            with closing(Target(server, targets[False].listener)) as target:
                for case in (*ROW_10, *ROW_40):
                    target.ask(case)
            time.sleep(3)  # freed memory is given back a little later
            return memory(server)

        first, second = ask_all(), ask_all()
    assert second - first < AGAIN, f"{(second - first) / 2**20:.0f} MiB more than after the first time"
