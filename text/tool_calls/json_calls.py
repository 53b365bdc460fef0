"""JsonFormat: calls written as JSON, with a tool's name and its arguments: `{"name": "f", "arguments": {"x": 1}}`.

Sources: the chat templates of Qwen 2.5 and 3 and Llama 3.x; for Gemma 3, whose template has no tools,
https://ai.google.dev/gemma/docs/capabilities/function-calling.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from text.answer_parts import AnswerParts
from text.answer_text import End, NoCall, Steps
from text.lenient_json import BLANKS, JsonReader, json_of, read_json
from text.tool_calls.lark import Literals, Schema, definitions_of, in_regex, json_of_schema
from text.tool_calls.tool_format import BareCall, ToolFormat

ARGUMENT_KEYS = ("arguments", "parameters")
CALL_KEYS = (*ARGUMENT_KEYS, "name", "id", "type")
NAME_KEYS = ("name", "function")

JSON_PROMPT = """You can call functions. To call one, answer with nothing but a JSON object in this form:
{{"name": "the function's name", "parameters": {{"a parameter's name": its value}}}}
To call several, write one such object per line. If no function is needed, answer in plain text.
These are the functions:
{tools}"""
TOOLS_PROMPT = """You can call functions. These are they, as JSON, one per line:
<tools>
{tools}
</tools>
"""
MARKED_PROMPT = f"""{TOOLS_PROMPT}To call a function, write its name and its arguments as JSON, in this form:
<tool_call>
{{{{"name": "the function's name", "arguments": {{{{"an argument's name": its value}}}}}}}}
</tool_call>"""


@dataclass(frozen=True, kw_only=True)
class JsonFormat(ToolFormat):
    key: str = "arguments"  # of the arguments

    def written(self, name: str, arguments: Any) -> str:
        call = json.dumps({"name": name, self.key: arguments}, ensure_ascii=False)
        return f"{self.begin}\n{call}\n{self.end}" if self.begin else call

    # --- the grammar

    def calls_or_text_grammar(self, tools: Mapping[str, Schema], literals: Literals) -> str:
        """A bare call begins a line, perhaps in a fence, or follows a mark that is no token of the model."""
        mark = rf"|{in_regex(self.begin)}" if self.begin else ""
        blanks = "[ \\t\\r\\n]*"
        few_blanks = r"[ \n\t]{0,20}"  # models like to indent what they fence
        line = rf"((.|\n)*(\n{mark}))?{blanks}"
        fence = rf"(```[a-z_]*{blanks})?"
        bare = BareCall(
            before_name=rf"{line}{fence}\{{{blanks}\"name\"{blanks}:{blanks}\"",
            behind_name='"',
            before_arguments=rf'/{few_blanks},{few_blanks}"{self.key}"{few_blanks}:{few_blanks}/',
            behind_arguments=rf"/{few_blanks}\}}/",
        )
        return self._bare_calls_or_text(bare, tools, literals)

    def call_rules(self, rule: str, name: str, schema: Schema, literals: Literals, begin: str) -> list[str]:
        head = f'{{"name": {json.dumps(name)}, "{self.key}": '
        if self.begin:
            before, behind = literals.of(f"{begin}\n{head}"), literals.of(f"}}\n{self.end}")
        else:
            before, behind = literals.of(head), literals.of("}")
        return [f"{rule}: {before} {json_of_schema(schema)} {behind}"]

    def calls_beside_json_grammar(self, tools: Mapping[str, Schema], literals: Literals, is_parallel: bool) -> str:
        """Without a mark, calls begin as other JSON does: they are read as JSON from their start."""
        if self.begin:
            return self.calls_grammar(tools, literals, is_parallel)
        calls = [json_of_schema(self._call_schema(name, schema)) for name, schema in tools.items()]
        rules = [f"call_{number}: {call}" for number, call in enumerate(calls)]
        choice = " | ".join(f"call_{number}" for number in range(len(rules)))
        return "\n".join([self._start(literals, is_parallel), f"call: {choice}", *rules])

    def _call_schema(self, name: str, schema: Schema) -> Schema:
        definitions = definitions_of(schema)
        arguments = {key: value for key, value in schema.items() if key not in definitions}
        properties = {"name": {"const": name}, self.key: arguments}
        call = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        return {**call, **definitions}

    # --- the parser

    def read_calls(self, answer: AnswerParts, at: int, is_marked: bool) -> Steps[None]:
        if answer.text[at] not in "{[":
            raise NoCall
        yield from JsonCallReader(answer, self.key, self.end).read(at, is_marked)

    def begins_call(self, answer: AnswerParts, at: int) -> Steps[bool]:
        yield from ()
        return answer.text[at] in "{["

    def begins_another(self, answer: AnswerParts, at: int) -> Steps[bool]:
        yield from ()
        return answer.text[at] in "{["


MARKED = JsonFormat(
    name="marked JSON",
    prompt=MARKED_PROMPT,
    signs=('"arguments"', "<tool_call>"),
    begin="<tool_call>",
    end="</tool_call>",
)
PARAMETERS = JsonFormat(name="JSON", prompt=JSON_PROMPT, signs=('"parameters"',), key="parameters", between="; ")
LINES = JsonFormat(name="JSON lines", prompt=JSON_PROMPT, key="parameters")


@dataclass
class _Head:
    """What has been read of a call in JSON."""

    name: str | None = None
    arguments: str | None = None  # JSON, if they came before the name
    has_begun: bool = False  # its arguments have been read behind its name
    is_nested: bool = False  # it is inside of another object, as on the wire


class JsonCallReader:
    """Reads calls that models write as JSON, or nearly."""

    def __init__(self, answer: AnswerParts, key: str = "arguments", end: str = "") -> None:
        """key: that of the arguments, where a grammar asks for it; end: the mark behind the call."""
        self._answer = answer
        self._key = key
        self._end = end

    def read(self, at: int, is_marked: bool) -> Steps[None]:
        """Reads one call, or a list of them. Raises NoCall while nothing is taken."""
        if not is_marked and self._answer.place(at) in self._answer.places_in_json:
            raise NoCall
        if self._answer.text[at] == "{" or self._answer.options.is_strict:
            yield from self._call(at, is_marked)
            return
        at = yield from self._answer.after_blanks(at + 1)
        yield from self._call(at, is_marked)
        while not self._answer.is_done:
            at = yield from self._answer.after_blanks(0)
            separator = self._answer.text[at]
            if separator == "]":
                self._answer.take(at + 1)
            if separator != ",":
                return
            at = yield from self._answer.after_blanks(at + 1)
            with suppress(NoCall):
                yield from self._call(at, is_marked)
                continue
            return

    def _call(self, at: int, is_marked: bool) -> Steps[None]:
        """Reads an object with a tool's name and its arguments, in any order."""
        yield from self._answer.deliver(self._object_call(at), is_marked, self._answer.options.is_strict)

    def _object_call(self, at: int) -> Steps[None]:
        head = _Head()
        try:
            at = yield from self._members(head, (yield from self._behind("{", at)))
        except End:
            if head.has_begun and self._answer.is_whole and not self._answer.text.strip(BLANKS):
                self._answer.end_call()  # small models forget the brace
            elif head.has_begun and self._answer.text.lstrip(BLANKS).startswith(","):
                raise NoCall from None  # the beginning of something else
            raise
        if head.name is None:
            raise NoCall
        self._answer.take(at)
        if not head.has_begun:
            self._answer.begin_call(head.name)
            self._answer.add_arguments(_object_of(head.arguments or "null"))
        self._answer.end_call()

    def _members(self, head: _Head, at: int) -> Steps[int]:
        """Reads an object's members up to its brace, or up to the mark behind the call where the brace is missing."""
        while self._answer.text[at] != "}":
            key, at = yield from self._string(at)
            if self._answer.options.is_strict and key != (self._key if head.name else "name"):
                raise NoCall
            at = yield from self._behind(":", (yield from self._answer.after_blanks(at)))
            at = yield from self._answer.after_blanks((yield from self._member(head, key, at)))
            if head.has_begun and self._end and (yield from self._answer.starts_with(self._end, at)):
                return at
            if self._answer.text[at] != "}":
                at = yield from self._behind(",", at)
        return at + 1

    def _member(self, head: _Head, key: str, at: int) -> Steps[int]:
        """Reads a member's value and returns its end; 0 where it was taken."""
        if key == "function" and self._answer.text[at] == "{" and not head.is_nested:
            head.is_nested = True
            return (yield from self._members(head, (yield from self._behind("{", at))))
        if key in NAME_KEYS:
            if head.name is not None:
                raise NoCall
            head.name, at = yield from self._string(at)
            if head.name not in self._answer.options.tools:
                raise NoCall
            return at
        if key in ARGUMENT_KEYS and (head.has_begun or head.arguments is not None):
            raise NoCall
        if key in ARGUMENT_KEYS and head.name is not None:
            self._answer.take(at)
            self._answer.begin_call(head.name)
            yield from self.stream_arguments()
            head.has_begun = True
            return 0
        if key not in CALL_KEYS:
            raise NoCall
        text, at = yield from self._value(at)
        head.arguments = text if key in ARGUMENT_KEYS else head.arguments
        return at

    def _behind(self, character: str, at: int) -> Steps[int]:
        """Returns the place behind a character and blanks. Raises NoCall if another character is there."""
        if self._answer.text[at] != character:
            raise NoCall
        return (yield from self._answer.after_blanks(at + 1))

    def _string(self, at: int) -> Steps[tuple[str, int]]:
        """Returns a string's text and its end; nothing is taken. Raises NoCall for another value."""
        is_strict = self._answer.options.is_strict
        if self._answer.text[at] not in ('"' if is_strict else "\"'"):
            raise NoCall
        text, end = yield from self._value(at)
        if is_strict and "\\" in self._answer.text[at:end]:
            raise NoCall
        return str(json.loads(text)), end

    def stream_arguments(self) -> Steps[None]:
        """Takes the object that begins here and gives it as it comes. Raises NoCall for what is no object."""
        reader = JsonReader()
        try:
            if self._answer.text[0] != "{":
                text, end = yield from self._value(0)
                arguments = _object_of(text)
                self._answer.take(end)
                self._answer.add_arguments(arguments)
                return
            while not reader.is_done:
                if not self._answer.text:
                    yield from self._answer.more()
                length, text = reader.feed(self._answer.text)
                self._answer.take(length)
                self._answer.add_arguments(text)
                if reader.is_broken:
                    raise NoCall
        except End:
            self._answer.add_arguments(reader.held + self._answer.take(len(self._answer.text)))
            raise

    def _value(self, at: int) -> Steps[tuple[str, int]]:
        """Returns the JSON of a value and its end; nothing is taken. Raises NoCall for what is no value."""
        reader, given, place = JsonReader(), [], self._answer.place(at)
        while True:
            length, text = reader.feed(self._answer.text[at:])
            at += length
            given.append(text)
            self._answer.places_in_json.update(place + opened for opened in reader.opened)
            reader.opened.clear()
            if reader.is_broken:
                raise NoCall
            if reader.is_done:
                return "".join(given), at
            yield from self._answer.more()


def _object_of(text: str) -> str:
    """Returns the object that arguments are: JSON, a string with JSON in it, or null. Raises NoCall for any other
    value."""
    if text == "null":
        return "{}"
    if text.startswith('"'):
        inner = str(json.loads(text)).strip() or "{}"
        is_text = json_of(inner) == json.dumps(inner, ensure_ascii=False)  # no half of a character is in it
        text = (read_json(inner) if is_text else None) or ""
    if not text.startswith("{"):
        raise NoCall
    return text
