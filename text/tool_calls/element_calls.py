"""ElementFormat: calls whose arguments are written one by one, as text between marks.

    <tool_call>                         <tool_call>weather
    <function=weather>                  <arg_key>city</arg_key>
    <parameter=city>                    <arg_value>Oslo</arg_value>
    Oslo                                </tool_call>
    </parameter>
    </function>
    </tool_call>

Sources: the chat templates of Qwen3-Coder and Qwen 3.5 (left), and of GLM-4.5 (right). A call whose arguments cannot be
written so is JSON, as in JsonFormat.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from text.answer_parts import AnswerParts
from text.answer_text import End, NoCall, Steps
from text.argument_schemas import choices_of, fits, is_judged, takes_any_text
from text.argument_values import argument_of, value_of
from text.json_schemas import ANNOTATIONS
from text.lenient_json import BLANKS, json_of
from text.tool_calls.json_calls import TOOLS_PROMPT, JsonFormat
from text.tool_calls.lark import Literals, Schema, definitions_of, in_regex, json_of_schema, leads_to_definitions

HOW = """To call a function, write its name and its arguments between marks, and values that are not text as JSON:
"""
XML_PROMPT = f"""{TOOLS_PROMPT}{HOW}<tool_call>
<function=the function's name>
<parameter=an argument's name>
its value
</parameter>
</function>
</tool_call>"""
ARG_KEY_PROMPT = f"""{TOOLS_PROMPT}{HOW}<tool_call>the function's name
<arg_key>an argument's name</arg_key>
<arg_value>its value</arg_value>
</tool_call>"""
MAX_NAME_LENGTH = 200  # characters
SIMPLE = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", *ANNOTATIONS}
WRITABLE_KEY = re.compile(r"[^\s<>]+")  # a parameter's name that can stand in a mark
_NAME_END = re.compile(r"[^\w.:/-]", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class ElementFormat(JsonFormat):
    name_begin: str = ""
    name_end: str
    key_begin: str
    key_end: str
    value_begin: str
    value_end: str
    call_end: str = ""  # before the mark behind the call
    has_lines: bool  # a value has lines of its own

    MARKS = (*JsonFormat.MARKS, "key_begin", "key_end", "value_begin", "value_end", "call_end")

    def written(self, name: str, arguments: Any) -> str:
        """Returns a call as elements; one whose arguments cannot be written so is JSON."""
        texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in _items(arguments)}
        has_marks = any(self.value_end.strip() in text for text in texts.values())
        if not isinstance(arguments, dict) or has_marks or not all(map(WRITABLE_KEY.fullmatch, texts)):
            return super().written(name, arguments)
        elements = (f"{self.key_begin}{k}{self.key_end}{self.value_begin}{v}{self.value_end}" for k, v in texts.items())
        head = f"{self.begin}\n{self.name_begin}" if self.name_begin else self.begin
        close = f"{self.call_end}\n" if self.call_end else ""
        return f"{head}{name}{self.name_end}{''.join(elements)}{close}{self.end}"

    # --- the grammar

    def call_rules(self, rule: str, name: str, schema: Schema, literals: Literals, begin: str) -> list[str]:
        """Arguments come in the order of the schema; those that are not required may be left out."""
        if not is_simple(schema):
            return super().call_rules(rule, name, schema, literals, begin)
        line = "\n" if self.name_begin else ""
        parts = [literals.of(f"{begin}{line}{self.name_begin}{name}{self.name_end}")]
        rules: list[str] = []
        properties: Mapping[str, Any] = schema.get("properties") or {}
        for number, (key, parameter) in enumerate(properties.items()):
            has_lines = self._has_lines_for(parameter, schema, literals)
            head = literals.of(f"{self.key_begin}{key}{self.key_end}{'' if has_lines else self.value_begin}")
            value, value_rules = self._value(f"{rule}_{number}", parameter, schema, literals)
            rules += value_rules
            is_required = key in (schema.get("required") or ())
            parts.append(f"({head} {value})" + ("" if is_required else "?"))
        close = self.call_end + "\n" if self.call_end else ""
        return [f"{rule}: {' '.join(parts)} {literals.of(close + self.end)}", *rules]

    def _has_lines_for(self, parameter: Any, schema: Schema, literals: Literals) -> bool:
        """Returns whether a text has lines of its own, so that the mark of its end may stand inside of a line."""
        return self.has_lines and takes_any_text(parameter, schema) and self.value_end.strip() not in literals

    def _value(self, rule: str, parameter: Any, schema: Schema, literals: Literals) -> tuple[str, list[str]]:
        """Returns the grammar of a value with the mark behind it, and the rules that it needs."""
        end = self.value_end
        if choices := choices_of(parameter, schema):
            return f"({' | '.join(map(literals.of, choices))}) {literals.of(end)}", []
        if not takes_any_text(parameter, schema):
            whole = {**definitions_of(schema), **parameter} if isinstance(parameter, dict) else {}
            return f"{json_of_schema(whole)} {literals.of(end)}", []
        name, mark = f"{rule}_text", end.strip()
        if mark in literals:
            return f"{name} {literals.of(end.lstrip())}", [f"{name}: /(.|\\n)*/"]
        if self._has_lines_for(parameter, schema, literals):
            lines = f"{in_regex(self.value_begin)}((.|\\n)*\\n)?{in_regex(end.lstrip())}"
            return name, [f"{name}[lazy]: /{lines}/"]
        after = end[end.index(mark) + len(mark) :]  # the value ends with the first mark, as for the parser
        tail = f" {literals.of(after)}" if after else ""
        return f"{name}{tail}", [f"{name}[lazy]: /(.|\\n)*{in_regex(mark)}/"]

    # --- the parser

    def read_calls(self, answer: AnswerParts, at: int, is_marked: bool) -> Steps[None]:
        if answer.text[at] in "{[":
            yield from super().read_calls(answer, at, is_marked)
        elif is_marked or not answer.options.is_strict:
            yield from self._read_elements(answer, at, is_marked)
        else:
            raise NoCall

    def _read_elements(self, answer: AnswerParts, at: int, is_marked: bool) -> Steps[None]:
        if not (yield from answer.starts_with(self.name_begin, at)):
            raise NoCall
        name, end = yield from self._read_name(answer, at)
        if name not in answer.options.tools:
            raise NoCall
        if not is_marked and not self.name_begin:  # a name alone is no sign of a call
            after = yield from answer.after_blanks(end)
            if not (yield from answer.starts_with(self.key_begin, after)):
                raise NoCall
        reader = _ElementReader(answer, _ElementCall(self, answer.options.tools[name]))
        is_strict = answer.options.is_strict and answer.options.is_guarded
        yield from answer.deliver(reader.read(name, end), is_marked, is_strict)

    def begins_call(self, answer: AnswerParts, at: int) -> Steps[bool]:
        if answer.text[at] in "{[":
            return True
        if not (yield from answer.starts_with(self.name_begin, at)):
            return False
        name, _ = yield from self._read_name(answer, at)
        return name in answer.options.tools

    def begins_another(self, answer: AnswerParts, at: int) -> Steps[bool]:
        if answer.text[at] in "{[":
            return True
        return bool(self.name_begin) and (yield from answer.starts_with(self.name_begin, at))

    def _read_name(self, answer: AnswerParts, at: int) -> Steps[tuple[str, int]]:
        """Returns the name of a call that begins here, and the name's end."""
        at += len(self.name_begin)
        while not (found := _NAME_END.search(answer.text, at)) and len(answer.text) < at + MAX_NAME_LENGTH:
            if not self.name_begin and not answer.may_be_name(answer.text[at:]):
                break
            yield from answer.more()
        end = found.start() if found else len(answer.text)
        return answer.text[at:end], end


QWEN_XML = ElementFormat(
    name="XML",
    prompt=XML_PROMPT,
    signs=("<function=", "<parameter="),
    begin="<tool_call>",
    end="</tool_call>",
    name_begin="<function=",
    name_end=">\n",
    key_begin="<parameter=",
    key_end=">",
    value_begin="\n",
    value_end="\n</parameter>\n",
    call_end="</function>",
    has_lines=True,
)
GLM_XML = ElementFormat(
    name="arg_key",
    prompt=ARG_KEY_PROMPT,
    signs=("<arg_key>", "<arg_value>"),
    begin="<tool_call>",
    end="</tool_call>",
    name_end="\n",
    key_begin="<arg_key>",
    key_end="</arg_key>",
    value_begin="\n<arg_value>",
    value_end="</arg_value>\n",
    has_lines=False,
)


def _items(arguments: Any) -> Iterable[tuple[str, Any]]:
    return arguments.items() if isinstance(arguments, dict) else ()


def is_simple(schema: Schema) -> bool:
    """Returns whether an object that has the right properties is valid, and these can be written as elements."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not set(schema) <= SIMPLE or schema.get("type", "object") != "object" or not isinstance(properties, dict):
        return False
    if not isinstance(required, list) or not all(isinstance(key, str) and key in properties for key in required):
        return False
    can_be_written = leads_to_definitions(schema) and all(map(WRITABLE_KEY.fullmatch, properties))
    return can_be_written and all(isinstance(own, dict) or own is True for own in properties.values())


@dataclass
class _ElementCall:
    """What is known of a call so far."""

    format: ElementFormat
    schema: Mapping[str, Any]
    keys: list[str] = field(default_factory=list)  # of the arguments that were given
    spares: dict[str, str] = field(default_factory=dict)  # arguments seen in other values: given if they do not come
    is_inside: bool = False  # the text ends inside of an element

    @property
    def opener(self) -> str:
        """What begins the next element where the end of this one is missing."""
        return f"\n{self.format.key_begin}" if self.format.has_lines else self.format.key_begin

    @property
    def closer(self) -> str:
        """What ends the call there."""
        return f"\n{self.format.call_end}" if self.format.call_end else ""

    @cached_property
    def next_element(self) -> re.Pattern[str] | None:
        """Finds the beginning of an element whose argument has not come yet; None if all have come."""
        form, names = self.format, "|".join(map(re.escape, self.missing))
        line, value_begin = "(?<=\n)" if form.has_lines else "", re.escape(form.value_begin.strip())
        before_value = f"(?:[{BLANKS}]*{value_begin})?" if value_begin else ""
        pattern = f"{line}{re.escape(form.key_begin)}({names}){re.escape(form.key_end)}{before_value}"
        return re.compile(pattern) if names else None

    @property
    def opening(self) -> str:
        return ", " if self.keys else "{"

    @property
    def ends(self) -> tuple[str, ...]:
        """The marks that may end a value: its own, and those that come where its own is missing."""
        own = self.format.value_end.strip()
        return tuple(filter(None, (own, self.opener, self.closer, self.format.end)))

    @property
    def followers(self) -> tuple[str, ...]:
        """The marks that may follow a value's own mark."""
        return self.format.key_begin, self.format.call_end, self.format.end

    @property
    def late_followers(self) -> dict[str, tuple[str, ...]]:
        """By mark that may end a value, the marks that follow it where something is missing."""
        name_begin, begin, end = self.format.name_begin, self.format.begin, self.format.end
        others = {self.closer: (end, begin, name_begin), end: (begin,)}
        return {**others, self.ends[0]: (name_begin, begin), self.opener: ()}

    @property
    def missing(self) -> list[str]:
        """Names of parameters that have not come yet."""
        properties = self.schema.get("properties")
        return [key for key in properties if key not in self.keys] if isinstance(properties, dict) else []

    def schema_of(self, key: str) -> Any:
        properties = self.schema.get("properties")
        return properties.get(key) if isinstance(properties, dict) else None

    def argument(self, key: str, text: str, is_guarded: bool) -> str:
        return argument_of(text, self.schema_of(key), self.schema, is_guarded)

    def fits(self, key: str, argument: str, is_strict: bool) -> bool:
        """Returns whether an argument fits. is_strict: limits and patterns, which are not judged, count as misfits."""
        own = self.schema_of(key)
        return fits(value_of(argument), own, self.schema) and (not is_strict or is_judged(own, self.schema))

    def value(self, text: str) -> str:
        """Returns the text without the line breaks that belong to the marks."""
        return text.removeprefix("\n").removesuffix("\n") if self.format.has_lines else text


class _ElementReader:
    """Reads a call from its name's end on. Where no grammar keeps it valid, marks may be missing."""

    def __init__(self, answer: AnswerParts, call: _ElementCall) -> None:
        self._answer = answer
        self._call = call
        self._format = self._call.format

    def read(self, name: str, end: int) -> Steps[None]:
        self._answer.take(end)
        self._answer.begin_call(name)
        try:
            yield from self._answer.skip(self._format.name_end.strip())
            while (yield from self._answer.skip(self._format.key_begin)):
                yield from self._element()
            yield from self._closed()
        except End:
            if self._answer.is_whole and not self._answer.text.strip(BLANKS) and not self._call.is_inside:
                self._end_elements()
            raise
        self._end_elements()
        yield from self._answer.skip(self._format.call_end)

    def _end_elements(self) -> None:
        for key, argument in self._call.spares.items():
            if key not in self._call.keys:
                self._add_element(key, argument)
        self._answer.add_arguments("}" if self._call.keys else "{}")
        self._answer.end_call()

    def _element(self) -> Steps[None]:
        self._call.is_inside = True
        key = yield from self._element_key()
        if self._answer.is_held and key in self._call.keys:
            raise NoCall
        yield from self._answer.skip(self._format.value_begin.strip())
        value: list[str] = []
        try:
            yield from self._element_value(value)
        except End:
            text = "".join(value)
            if self._answer.is_held:
                *others, (key, text) = self._split(key, text)
                self._add_elements(others)
            # the beginning of a text, which is all that there is of the call's last argument
            self._answer.add_arguments(f"{self._call.opening}{json_of(key)}: {json_of(self._answer.shown(text))[:-1]}")
            self._call.keys.append(key)
            raise
        text = "".join(value)
        if self._answer.is_held:
            self._add_elements(self._split(key, text))
        else:
            self._add_guarded(key, text)
        self._call.is_inside = False

    def _split(self, key: str, value: str) -> list[tuple[str, str]]:
        """Returns the keys and texts of the elements in a value: where the end of one is missing, the next one begins.

        An element that has its end in the value, too, is quoted there: it belongs to the text.
        """
        if self._call.next_element is None:
            return [(key, value)]
        start, elements, seen = 0, list[tuple[str, str]](), {*self._call.keys, *self._call.spares, key}
        for found in self._call.next_element.finditer(value, value.rfind(self._call.ends[0]) + 1):
            if found[1] not in seen:
                elements.append((key, value[start : found.start()]))
                key, start = found[1], found.end()
                seen.add(key)
        return [*elements, (key, value[start:])]

    def _add_elements(self, elements: list[tuple[str, str]]) -> None:
        for key, value in elements:
            self._add_element(
                key, self._call.argument(key, self._answer.shown(self._call.value(value)), is_guarded=False)
            )

    def _add_guarded(self, key: str, value: str) -> None:
        """Adds an argument that a grammar kept valid, and keeps elements in it as spares, where they are valid.

        Where a value may be any text, the grammar took what stands behind a missing end for more of that text, and may
        ask for those arguments again; if they come again, these count.
        """
        is_strict = self._answer.options.is_strict or self._answer.options.is_forced
        may_lack_end = takes_any_text(self._call.schema_of(key), self._call.schema)
        own, *others = [
            (name, self._call.argument(name, self._answer.shown(self._call.value(text)), is_guarded=True))
            for name, text in (self._split(key, value) if may_lack_end else [(key, value)])
        ]
        if all(self._call.fits(*each, is_strict) for each in others):
            self._call.spares |= dict(others)
        else:
            own = key, self._call.argument(key, self._answer.shown(self._call.value(value)), is_guarded=True)
        self._add_element(*own)

    def _add_element(self, key: str, argument: str) -> None:
        self._answer.add_arguments(f"{self._call.opening}{json_of(key)}: {argument}")
        self._call.keys.append(key)

    def _element_key(self) -> Steps[str]:
        """Takes a key and the mark behind it, which may be missing at the end of a line."""
        mark, pieces = self._format.key_end, list[str]()
        marks = (mark, "\n") if self._answer.is_held and self._format.has_lines else (mark,)
        found = yield from self._answer.until(marks, pieces.append)
        key = "".join(pieces)
        if found == mark:
            return key
        if key.strip() not in self._call.missing:
            raise NoCall
        return key.strip()

    def _element_value(self, value: list[str]) -> Steps[None]:
        """Takes a value up to its own mark, if another element or the call's end follows that.

        Where other marks show that one of these is missing, the value ends with those marks, unless an end of its own
        comes before the next element.
        """
        own, marks = self._call.ends[0], self._call.ends if self._answer.is_held else self._call.ends[:1]
        num_pieces, mark = None, ""  # of the value, if something is missing
        try:
            while True:
                mark = yield from self._answer.until(marks, value.append)
                if mark == own and (yield from self._is_followed(self._call.followers)):
                    return
                value.append(mark)
                if mark == self._call.opener and num_pieces is not None:
                    break
                if not self._answer.is_held or num_pieces is not None:
                    continue
                if (yield from self._is_followed(self._call.late_followers[mark])):
                    num_pieces = len(value) - 1
        except End:
            if num_pieces is None:
                if mark != own:
                    value.append(self._answer.take(len(self._answer.text)))
                elif value[-1] == own:
                    value.pop()
                raise
        rest = "".join(value[num_pieces:])
        line = len(rest) - len(rest.lstrip("\n"))
        value[num_pieces:] = rest[:line]
        self._answer.put_back(rest[line:].removeprefix(own))

    def _is_followed(self, marks: tuple[str, ...]) -> Steps[bool]:
        """Returns whether one of these marks comes next, or the model has ended the answer."""
        try:
            after = yield from self._answer.after_blanks(0)
        except End:
            if self._answer.is_whole and self._answer.is_held:
                return True
            raise
        for mark in filter(None, marks):
            if (yield from self._answer.starts_with(mark, after)):
                return True
        return False

    def _closed(self) -> Steps[None]:
        """Raises NoCall if neither the call's end follows nor, where that is missing, what comes after it."""
        form = self._format
        after = yield from self._answer.after_blanks(0)
        others = (form.end, form.name_begin, form.begin) if self._answer.is_held else ()
        for mark in filter(None, (form.call_end or form.end, *others)):
            if (yield from self._answer.starts_with(mark, after)):
                return
        raise NoCall
