"""Grammars of tool calls: what a model may write when it calls a function. Lark, as llguidance reads it."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from text.argument_schemas import choices_of, takes_any_text
from text.json_schemas import ANNOTATIONS
from text.tool_formats import Elements, Schema, ToolFormat

WHITESPACE = r"[\x20\x0A\x0D\x09]{0,20}"  # between JSON's tokens: else it could go on for ever
SIMPLE = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", *ANNOTATIONS}


class Literals:
    """Text in a grammar: where it has one of the model's tokens such as `<tool_call>`, that token."""

    def __init__(self, tokens: Collection[str]) -> None:
        marks = sorted((t for t in tokens if re.fullmatch(r"</?[a-z_]+>", t)), key=len, reverse=True)
        self._tokens = set(marks)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, marks))})") if marks else None

    def of(self, text: str) -> str:
        pieces = self._pattern.split(text) if self._pattern else [text]
        return " ".join(piece if piece in self._tokens else lark_string(piece) for piece in pieces if piece)

    def __contains__(self, text: str) -> bool:
        return text in self._tokens


def calls_grammar(style: ToolFormat, tools: Mapping[str, Schema], literals: Literals, is_parallel: bool) -> str:
    """One call or, if they may be parallel, several, and nothing else."""
    rules, first = _call_rules(style, tools, literals, after_mark=False)
    return "\n".join([_start(style, literals, is_parallel), f"call: {first}", *rules])


def _start(style: ToolFormat, literals: Literals, is_parallel: bool) -> str:
    """Models may end the last line, too, before they end the answer."""
    is_one = style.is_named or not is_parallel
    return "start: call" if is_one else f'start: call ({literals.of(style.between)} call)* "\\n"?'


def calls_beside_json_grammar(
    style: ToolFormat, tools: Mapping[str, Schema], literals: Literals, is_parallel: bool
) -> str:
    """The same where the answer may be other JSON: that begins alike, so calls are read as JSON from their start."""
    if style.begin or style.is_named:
        return calls_grammar(style, tools, literals, is_parallel)
    rules = [f"call_{number}: {_json(_call_schema(style, *tool))}" for number, tool in enumerate(tools.items())]
    calls = " | ".join(f"call_{number}" for number in range(len(rules)))
    return "\n".join([_start(style, literals, is_parallel), f"call: {calls}", *rules])


def _call_schema(style: ToolFormat, name: str, schema: Schema) -> Schema:
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    arguments = {key: value for key, value in schema.items() if key not in definitions}
    properties = {"name": {"const": name}, style.key: arguments}
    call = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {**call, **definitions}


def rest_of_call_grammar(style: ToolFormat, tools: Mapping[str, Schema], literals: Literals) -> str:
    """What follows the mark before a call."""
    rules, first = _call_rules(style, tools, literals, after_mark=True)
    return "\n".join([f"start: {first}", *rules])


def calls_or_text_grammar(style: ToolFormat, tools: Mapping[str, Schema], literals: Literals) -> str:
    """Text, and valid calls wherever the parser would see one."""
    mark = rf"|{_in_regex(style.begin)}" if style.begin else ""
    _ = "[ \\t\\r\\n]*"  # blanks
    before, behind = rf"((.|\n)*(\n{mark}))?{_}(```[a-z_]*{_})?\{{{_}\"name\"{_}:{_}\"", '"'
    blanks = r"[ \n\t]{0,20}"  # models like to indent what they fence
    tail, close = rf'/{blanks},{blanks}"{style.key}"{blanks}:{blanks}/', rf"/{blanks}\}}/"
    if style.is_named:
        before, behind, tail, close = _, rf"{_}\n", "", ""
    names = "|".join(_in_regex(name) for name in tools)
    rules = [f"TEXT: /(.|\\n)*/ & ~/{before}({names}){behind}(.|\\n)*/"]
    for number, (name, schema) in enumerate(tools.items()):
        rules.append(f"head_{number}[lazy]: /{before}{_in_regex(name)}{behind}/")
        rules.append(f"bare_{number}: head_{number} {tail} {_json(schema)} {close}")
    kinds = [" | ".join(f"bare_{number}" for number in range(len(tools)))]
    if style.begin in literals:
        marked, first = _call_rules(style, tools, literals, after_mark=False)
        rules += marked
        kinds.append(f"TEXT? ({first})")
    more = "?" if style.is_named else "*"
    return "\n".join([f"start: call{more} TEXT?", f"call: {' | '.join(kinds)}", *rules])


def _call_rules(
    style: ToolFormat, tools: Mapping[str, Schema], literals: Literals, after_mark: bool
) -> tuple[list[str], str]:
    """A rule for each tool, and the choice between them."""
    begin = "" if after_mark else style.begin
    rules = [
        line
        for number, (name, schema) in enumerate(tools.items())
        for line in _call(style, f"call_{number}", name, schema, literals, begin)
    ]
    return rules, " | ".join(f"call_{number}" for number in range(len(tools)))


def _call(style: ToolFormat, rule: str, name: str, schema: Schema, literals: Literals, begin: str) -> list[str]:
    if style.elements and is_simple(schema):
        return _element_call(style, style.elements, rule, name, schema, literals, begin)
    if style.is_named:
        return [f"{rule}: {literals.of(name + chr(10))} {_json(schema)}"]
    head = f'{{"name": {json.dumps(name)}, "{style.key}": '
    if not style.begin:
        return [f"{rule}: {literals.of(head)} {_json(schema)} {literals.of('}')}"]
    return [
        f"{rule}: {literals.of(f'{begin}{chr(10)}{head}')} {_json(schema)} {literals.of('}' + chr(10) + style.end)}"
    ]


def _element_call(
    style: ToolFormat, elements: Elements, rule: str, name: str, schema: Schema, literals: Literals, begin: str
) -> list[str]:
    """Arguments in the order of the schema, those that are not required perhaps."""
    line = "\n" if elements.name_begin else ""
    parts = [literals.of(f"{begin}{line}{elements.name_begin}{name}{elements.name_end}")]
    rules: list[str] = []
    properties: Mapping[str, Any] = schema.get("properties") or {}
    for number, (key, own) in enumerate(properties.items()):
        has_lines = _has_lines(own, schema, literals, elements)
        head = literals.of(f"{elements.begin}{key}{elements.key_end}{'' if has_lines else elements.value_begin}")
        value, lines = _element_value(f"{rule}_{number}", own, schema, literals, elements)
        rules += lines
        is_required = key in (schema.get("required") or ())
        parts.append(f"({head} {value})" + ("" if is_required else "?"))
    close = elements.close + "\n" if elements.close else ""
    return [f"{rule}: {' '.join(parts)} {literals.of(close + style.end)}", *rules]


def _has_lines(own: Any, schema: Schema, literals: Literals, elements: Elements) -> bool:
    """Whether a text begins and ends with lines of its own, so that the mark of its end may stand inside of a line."""
    return elements.has_lines and takes_any_text(own, schema) and elements.end.strip() not in literals


def _element_value(
    rule: str, own: Any, schema: Schema, literals: Literals, elements: Elements
) -> tuple[str, list[str]]:
    """The rest of an element, and the rules it needs."""
    end = elements.end
    if choices := choices_of(own, schema):
        return f"({' | '.join(map(literals.of, choices))}) {literals.of(end)}", []
    if not takes_any_text(own, schema):
        definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        return f"{_json({**definitions, **own} if isinstance(own, dict) else {})} {literals.of(end)}", []
    name, mark = f"{rule}_text", end.strip()
    if mark in literals:
        return f"{name} {literals.of(end.lstrip())}", [f"{name}: /(.|\\n)*/"]
    if _has_lines(own, schema, literals, elements):
        return name, [f"{name}[lazy]: /{_in_regex(elements.value_begin)}((.|\\n)*\\n)?{_in_regex(end.lstrip())}/"]
    after = end[end.index(mark) + len(mark) :]  # the value ends with the first mark, as for the parser
    tail = f" {literals.of(after)}" if after else ""
    return f"{name}{tail}", [f"{name}[lazy]: /(.|\\n)*{_in_regex(mark)}/"]


def is_simple(schema: Schema) -> bool:
    """Whether an object that has the right properties is valid, and these can be written as elements."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not set(schema) <= SIMPLE or schema.get("type", "object") != "object" or not isinstance(properties, dict):
        return False
    if not isinstance(required, list) or not all(isinstance(key, str) and key in properties for key in required):
        return False
    references = re.findall(r'"\$ref": "([^"]*)', json.dumps(schema))
    is_local = all(path.startswith(("#/$defs/", "#/definitions/")) for path in references)
    can_be_written = all(re.fullmatch(r"[^\s<>]+", key) for key in properties)
    return is_local and can_be_written and all(isinstance(own, dict) or own is True for own in properties.values())


def _json(schema: Schema) -> str:
    options = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
    return f"%json {json.dumps({**schema, **options})}"


def lark_string(text: str) -> str:
    """For Lark; its lexer takes no DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _in_regex(text: str) -> str:
    """For Lark, between slashes."""
    return "\\n".join(re.escape(line).replace("/", "\\/") for line in text.split("\n"))
