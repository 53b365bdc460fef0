"""Tool formats: how models are told of tools, how they write their calls, and the grammar of such calls.

Sources: the chat templates of Qwen 2.5, 3 and 3.5, Llama 3.x, GLM-4 and GLM-4.5; for Gemma 3, whose template has no
tools, https://ai.google.dev/gemma/docs/capabilities/function-calling. The grammar is Lark as llguidance reads it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

Schema = Mapping[str, Any]


@dataclass(frozen=True)
class Elements:
    """Arguments one by one, as text between marks."""

    name_begin: str
    name_end: str
    begin: str
    key_end: str
    value_begin: str
    end: str
    close: str
    has_lines: bool  # a value has lines of its own

    @property
    def tokens(self) -> tuple[str, ...]:
        """What may be tokens of the model's."""
        parts = (self.begin, self.key_end, self.value_begin, self.end, self.close)
        return tuple(part.strip() for part in parts if part.strip())


@dataclass(frozen=True)
class ToolFormat:
    name: str
    signs: tuple[str, ...] = ()  # a template with all of them teaches this format
    begin: str = ""  # the mark before a call; none: calls are recognised by what they are
    end: str = ""
    key: str = "arguments"
    between: str = "\n"  # calls
    elements: Elements | None = None
    is_named: bool = False  # the tool's name on a line, the arguments below
    prompt: str = ""  # for templates that know no tools; {tools} are they, one per line

    def marked(self, marks: Mapping[str, str]) -> "ToolFormat":
        """The same with other text for some marks."""
        shown = partial(_with_mark, marks)
        own = self.elements and replace(
            self.elements,
            begin=shown(self.elements.begin),
            key_end=shown(self.elements.key_end),
            value_begin=shown(self.elements.value_begin),
            end=shown(self.elements.end),
            close=shown(self.elements.close),
        )
        return replace(self, begin=shown(self.begin), end=shown(self.end), elements=own)

    def written(self, name: str, arguments: Any) -> str:
        """A call as the model wrote it, for templates that know no calls."""
        if self.is_named:
            return f"{name}\n{json.dumps(arguments, ensure_ascii=False)}"
        line = json.dumps({"name": name, self.key: arguments}, ensure_ascii=False)
        return f"{self.begin}\n{line}\n{self.end}" if self.begin else line


def _with_mark(marks: Mapping[str, str], text: str) -> str:
    return marks.get(text.strip(), text)


JSON_PROMPT = """You can call functions. To call one, answer with nothing but a JSON object in this form:
{{"name": "the function's name", "parameters": {{"a parameter's name": its value}}}}
To call several, write one such object per line. If no function is needed, answer in plain text.
These are the functions:
{tools}"""
MARKED_PROMPT = """You can call functions. These are they, as JSON, one per line:
<tools>
{tools}
</tools>
To call a function, write its name and its arguments as JSON, in this form:
<tool_call>
{{"name": "the function's name", "arguments": {{"an argument's name": its value}}}}
</tool_call>"""

_QWEN_ELEMENTS = Elements("<function=", ">\n", "<parameter=", ">", "\n", "\n</parameter>\n", "</function>", True)
_GLM_ELEMENTS = Elements("", "\n", "<arg_key>", "</arg_key>", "\n<arg_value>", "</arg_value>\n", "", False)

MARKED = ToolFormat("marked JSON", ('"arguments"', "<tool_call>"), "<tool_call>", "</tool_call>", prompt=MARKED_PROMPT)
PARAMETERS = ToolFormat("JSON", ('"parameters"',), key="parameters", between="; ", prompt=JSON_PROMPT)
LINES = ToolFormat("JSON lines", key="parameters", prompt=JSON_PROMPT)
QWEN_XML = ToolFormat("XML", ("<function=", "<parameter="), "<tool_call>", "</tool_call>", elements=_QWEN_ELEMENTS)
GLM_XML = ToolFormat("arg_key", ("<arg_key>", "<arg_value>"), "<tool_call>", "</tool_call>", elements=_GLM_ELEMENTS)
NAMED = ToolFormat("name and JSON", ("<|observation|>",), is_named=True, prompt=JSON_PROMPT)

# The first one whose signs a template has is the one that it teaches
TOOL_FORMATS = (QWEN_XML, GLM_XML, MARKED, NAMED, PARAMETERS)


def taught_by(template: str) -> ToolFormat | None:
    """The format of a chat template that shows tools to the model; None if it does not."""
    if not re.search(r"{[%{].*\btools\b", template):
        return None
    spelled = template.replace('\\"', '"')
    return next((style for style in TOOL_FORMATS if all(sign in spelled for sign in style.signs)), None)


# --- grammars
