"""GemmaFormat: calls in a notation of their own, whose texts stand between marks.

    <|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:3,near:[<|"|>Bergen<|"|>]}<tool_call|>

Source: the chat template of Gemma 4, which writes the keys of objects in alphabetical order. What the notation cannot
say is JSON in its place: a key that has a colon, a text that has the mark, the arguments of a tool with a schema that
`GemmaGrammar` has no rules for.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from text.answer_parts import AnswerParts
from text.answer_text import End, NoCall, Steps
from text.tool_calls.gemma_grammar import GemmaGrammar
from text.tool_calls.gemma_values import GemmaReader, Notation, written
from text.tool_calls.json_calls import TOOLS_PROMPT, JsonCallReader
from text.tool_calls.lark import Literals, Schema, in_regex
from text.tool_calls.tool_format import ToolFormat

PREFIX = "call:"
GEMMA_PROMPT = f"""{TOOLS_PROMPT}To call a function, write its name and its arguments in this form, texts between marks:
<|tool_call>{PREFIX}the function's name{{{{an argument's name:<|"|>text<|"|>,another one's name:5}}}}<tool_call|>"""
MAX_NAME_LENGTH = 200  # characters
_NAME = re.compile(r"[\w.:/-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class GemmaFormat(ToolFormat):
    quote: str

    MARKS = (*ToolFormat.MARKS, "quote")

    def written(self, name: str, arguments: Any) -> str:
        inner = written(arguments, self.quote)
        return f"{self.begin}{PREFIX}{name}{inner if isinstance(arguments, dict) else f'{{{inner}}}'}{self.end}"

    # --- the grammar

    def call_rules(self, rule: str, name: str, schema: Schema, literals: Literals, begin: str) -> list[str]:
        arguments = GemmaGrammar(rule, schema, self.quote, literals)
        head, end = literals.of(f"{begin}{PREFIX}{name}"), literals.of(self.end)
        return [f"{rule}: {head} {arguments.start} {end}", *arguments.rules]

    def calls_or_text_grammar(self, tools: Mapping[str, Schema], literals: Literals) -> str:
        """A bare call begins a line, or follows a mark that is no token of the model.

        So the text is read piece by piece: each ends with a line or such a mark, and none begins as a call.
        """
        mark, names = in_regex(self.begin), "|".join(map(in_regex, tools))
        is_token, end = self.begin in literals, f"{literals.of(self.end)}?" if self.end in literals else ""
        no_call = rf"~/[ \t\r]*{PREFIX}({names})\{{(.|\n)*/"
        rules = [
            rf"PIECE: /.*\n/ & {no_call}" if is_token else rf"PIECE: /.*(\n|{mark})/ & ~/.*{mark}(.|\n)+/ & {no_call}",
            rf"REST: /.*/ & {no_call}" if is_token else rf"REST: /.*/ & ~/.*{mark}.*/ & {no_call}",
        ]
        for number, (name, schema) in enumerate(tools.items()):
            arguments = GemmaGrammar(f"bare_{number}", schema, self.quote, literals)
            rules.append(rf"HEAD_{number}: /[ \t\r]*{PREFIX}{in_regex(name)}/")
            rules += [f"bare_{number}: HEAD_{number} {arguments.start} {end}", *arguments.rules]
        calls = [f"bare_{number}" for number in range(len(tools))]
        if is_token:
            marked, choice = self.rules(tools, literals, self.begin)
            rules += marked
            calls.append(f"REST? ({choice})")
        return "\n".join(["start: (PIECE | call)* REST?", f"call: {' | '.join(calls)}", *rules])

    # --- the parser

    def read_calls(self, answer: AnswerParts, at: int, is_marked: bool) -> Steps[None]:
        """A call may also be JSON, where no grammar keeps the calls valid, and the mark may lack its prefix."""
        is_strict = answer.options.is_strict
        if answer.text[at] in "{[" and not is_strict:
            yield from JsonCallReader(answer, end=self.end).read(at, is_marked)
            return
        name, end = yield from self._read_name(answer, at, may_lack_prefix=is_marked and not is_strict)
        if name not in answer.options.tools:
            raise NoCall
        end = end if is_strict else (yield from answer.after_blanks(end))
        has_braces = yield from answer.starts_with("{", end)
        if not has_braces and (not is_marked or is_strict or not (yield from answer.starts_with(self.end, end))):
            raise NoCall
        call = self._call(answer, name, end, is_marked) if has_braces else _empty_call(answer, name, end)
        yield from answer.deliver(call, is_marked, is_strict)

    def begins_call(self, answer: AnswerParts, at: int) -> Steps[bool]:
        if answer.text[at] in "{[":
            return True
        name, _ = yield from self._read_name(answer, at, may_lack_prefix=True)
        return name in answer.options.tools

    def begins_another(self, answer: AnswerParts, at: int) -> Steps[bool]:
        return (yield from answer.starts_with(PREFIX, at))

    def _read_name(self, answer: AnswerParts, at: int, may_lack_prefix: bool) -> Steps[tuple[str, int]]:
        """Returns the name of a call that begins here, and the name's end. Raises NoCall where no prefix is."""
        if (yield from answer.starts_with(PREFIX, at)):
            at += len(PREFIX)
        elif not may_lack_prefix:
            raise NoCall
        elif answer.text[at] == ":":
            at += 1
        while (end := _end_of_name(answer.text, at)) == len(answer.text) and end < at + MAX_NAME_LENGTH:
            yield from answer.more()
        return answer.text[at:end], end

    def _call(self, answer: AnswerParts, name: str, at: int, is_marked: bool) -> Steps[None]:
        notation = Notation(self.quote, self.end, self.begin, answer.shown(self.quote), is_marked)
        reader = GemmaReader(notation, answer.options.tools[name], is_loose=answer.is_held)
        answer.take(at)
        answer.begin_call(name)
        try:
            while not reader.is_done:
                length, arguments = reader.feed(answer.text)
                answer.take(length)
                answer.add_arguments(arguments)
                if reader.is_broken:
                    raise NoCall
                if not reader.is_done:
                    yield from answer.more()
        except End:
            answer.add_arguments(reader.end(answer.take(len(answer.text)), answer.is_whole))
            if reader.is_broken:
                raise NoCall from None
            if reader.is_done:
                answer.end_call()
            raise
        answer.end_call()


def _empty_call(answer: AnswerParts, name: str, at: int) -> Steps[None]:
    yield from ()
    answer.take(at)
    answer.begin_call(name)
    answer.end_call()


def _end_of_name(text: str, at: int) -> int:
    found = _NAME.match(text, at)
    return found.end() if found else at


GEMMA_CALLS = GemmaFormat(
    name="Gemma's notation",
    prompt=GEMMA_PROMPT,
    signs=("<|tool_call>call:",),
    begin="<|tool_call>",
    end="<tool_call|>",
    between="",
    quote='<|"|>',
)
