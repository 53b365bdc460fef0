"""NamedFormat: a call is the whole answer: the tool's name on a line, and its arguments as JSON below.

Source: the chat template of GLM-4.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from text.answer_parts import AnswerParts
from text.answer_text import NoCall, Steps
from text.tool_calls.json_calls import JSON_PROMPT, JsonCallReader
from text.tool_calls.lark import Literals, Schema, json_of_schema
from text.tool_calls.tool_format import BareCall, ToolFormat


@dataclass(frozen=True, kw_only=True)
class NamedFormat(ToolFormat):
    is_whole_answer = True

    def written(self, name: str, arguments: Any) -> str:
        return f"{name}\n{json.dumps(arguments, ensure_ascii=False)}"

    # --- the grammar

    def calls_or_text_grammar(self, tools: Mapping[str, Schema], literals: Literals) -> str:
        blanks = "[ \\t\\r\\n]*"
        bare = BareCall(before_name=blanks, behind_name=rf"{blanks}\n")
        return self._bare_calls_or_text(bare, tools, literals)

    def call_rules(self, rule: str, name: str, schema: Schema, literals: Literals, begin: str) -> list[str]:
        return [f"{rule}: {literals.of(name + chr(10))} {json_of_schema(schema)}"]

    # --- the parser

    def read_calls(self, answer: AnswerParts, at: int, is_marked: bool) -> Steps[None]:
        while "\n" not in answer.text[at:] and answer.may_be_name(answer.text[at:]):
            yield from answer.more()
        name, line_break, _ = answer.text[at:].partition("\n")
        if name.strip() not in answer.options.tools or not line_break:
            raise NoCall
        at = yield from answer.after_blanks(answer.text.index("\n", at))
        if answer.text[at] != "{":
            raise NoCall
        yield from answer.deliver(_read_call(answer, name.strip(), at), is_marked, answer.options.is_strict)


def _read_call(answer: AnswerParts, name: str, at: int) -> Steps[None]:
    answer.take(at)
    answer.begin_call(name)
    yield from JsonCallReader(answer).stream_arguments()
    answer.end_call()


NAMED = NamedFormat(name="name and JSON", prompt=JSON_PROMPT, signs=("<|observation|>",))
