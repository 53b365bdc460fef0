"""ToolFormat: how tools are described to models, how models write calls, the grammar of calls, and their parser.

Each form of calls is a class in its file, and each way to write that form is an object of the class (MARKED,
QWEN_XML). A chat template that shows tools teaches the first format of which it has all signs (prompt_templates has
the order); one that does not is given the format's prompt.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from text.answer_parts import AnswerParts
from text.answer_text import Steps
from text.tool_calls.lark import Literals, Schema, in_regex, json_of_schema


@dataclass(frozen=True)
class BareCall:
    """A call without its mark, as a grammar has it among text: what stands around the name and the arguments."""

    before_name: str  # a regular expression, from the answer's beginning on
    behind_name: str  # another
    before_arguments: str = ""  # in Lark
    behind_arguments: str = ""


@dataclass(frozen=True, kw_only=True)
class ToolFormat(ABC):
    name: str
    prompt: str  # for templates that show no tools; {tools} are their JSON, one per line
    signs: tuple[str, ...] = ()  # a template with all of them teaches this format; none: no template does
    begin: str = ""  # the mark before a call; "": calls are recognised by their form
    end: str = ""  # the mark behind it
    between: str = "\n"  # two calls

    MARKS: ClassVar[tuple[str, ...]] = ("begin", "end")  # the fields that may be tokens of the model
    is_whole_answer: ClassVar[bool] = False  # a call has no text and no other call beside it

    @property
    def marks(self) -> set[str]:
        return {mark for field in self.MARKS if (mark := getattr(self, field).strip())}

    def marked(self, marks: Mapping[str, str]) -> "ToolFormat":
        """Returns the same format with other text for some marks."""
        texts = {field: getattr(self, field) for field in self.MARKS}
        changes: dict[str, Any] = {field: marks.get(text.strip(), text) for field, text in texts.items()}
        return replace(self, **changes)

    @abstractmethod
    def written(self, name: str, arguments: Any) -> str:
        """Returns a call as the model wrote it, for templates that show no calls."""

    # --- the grammar

    @abstractmethod
    def call_rules(self, rule: str, name: str, schema: Schema, literals: Literals, begin: str) -> list[str]:
        """Returns the rule of one tool's call, and those that it needs. begin: the mark, or "" behind the mark."""

    def calls_grammar(self, tools: Mapping[str, Schema], literals: Literals, is_parallel: bool) -> str:
        """Returns the grammar of one call or, if they may be parallel, several, and nothing else."""
        rules, calls = self.rules(tools, literals, self.begin)
        return "\n".join([self._start(literals, is_parallel), f"call: {calls}", *rules])

    def calls_beside_json_grammar(self, tools: Mapping[str, Schema], literals: Literals, is_parallel: bool) -> str:
        """Calls alone, in an answer that may be other JSON instead."""
        return self.calls_grammar(tools, literals, is_parallel)

    def rest_of_call_grammar(self, tools: Mapping[str, Schema], literals: Literals) -> str:
        """Returns the grammar of what follows the mark before a call."""
        rules, calls = self.rules(tools, literals, begin="")
        return "\n".join([f"start: {calls}", *rules])

    @abstractmethod
    def calls_or_text_grammar(self, tools: Mapping[str, Schema], literals: Literals) -> str:
        """Returns the grammar of text, and of valid calls wherever the parser would see one."""

    def _bare_calls_or_text(self, bare: BareCall, tools: Mapping[str, Schema], literals: Literals) -> str:
        """Returns the grammar for a form of which the parser sees calls without their mark, too."""
        names = "|".join(in_regex(name) for name in tools)
        rules = [f"TEXT: /(.|\\n)*/ & ~/{bare.before_name}({names}){bare.behind_name}(.|\\n)*/"]
        for number, (name, schema) in enumerate(tools.items()):
            rules.append(f"head_{number}[lazy]: /{bare.before_name}{in_regex(name)}{bare.behind_name}/")
            arguments = f"{bare.before_arguments} {json_of_schema(schema)} {bare.behind_arguments}"
            rules.append(f"bare_{number}: head_{number} {arguments}")
        calls = [" | ".join(f"bare_{number}" for number in range(len(tools)))]
        if self.begin in literals:
            marked, choice = self.rules(tools, literals, self.begin)
            rules += marked
            calls.append(f"TEXT? ({choice})")
        more = "?" if self.is_whole_answer else "*"
        return "\n".join([f"start: call{more} TEXT?", f"call: {' | '.join(calls)}", *rules])

    def rules(self, tools: Mapping[str, Schema], literals: Literals, begin: str) -> tuple[list[str], str]:
        """Returns a rule for each tool, and the choice between them."""
        rules = [
            line
            for number, (name, schema) in enumerate(tools.items())
            for line in self.call_rules(f"call_{number}", name, schema, literals, begin)
        ]
        return rules, " | ".join(f"call_{number}" for number in range(len(tools)))

    def _start(self, literals: Literals, is_parallel: bool) -> str:
        """Returns the rule `start`. It allows a line break behind the last call, since models may write one."""
        is_one = self.is_whole_answer or not is_parallel
        return "start: call" if is_one else f'start: call ({literals.of(self.between)} call)* "\\n"?'

    # --- the parser

    @abstractmethod
    def read_calls(self, answer: AnswerParts, at: int, is_marked: bool) -> Steps[None]:
        """Reads the call that begins in the answer's text at this place, or several that belong together.

        The calls go through `answer.deliver`. is_marked: the mark stands before it. Raises NoCall, with nothing taken
        from the text, for what is no call, and End where the text ends in it.
        """

    def begins_call(self, answer: AnswerParts, at: int) -> Steps[bool]:
        """Returns whether a call of one of the tools may follow the mark, which has been found inside of the
        reasoning."""
        yield from ()
        return True

    def begins_another(self, answer: AnswerParts, at: int) -> Steps[bool]:
        """Returns whether another call follows the last one behind the same mark."""
        yield from ()
        return False


def taught_by(template: str, formats: Iterable[ToolFormat]) -> ToolFormat | None:
    """Returns the format of a chat template that shows tools to the model; None if it does not."""
    if not re.search(r"{[%{].*\btools\b", template):
        return None
    spelled = template.replace('\\"', '"')
    return next((each for each in formats if each.signs and all(sign in spelled for sign in each.signs)), None)
