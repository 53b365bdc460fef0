"""Structured output: what an answer must look like, as the text of a grammar that llguidance compiles.

`response_format` is OpenAI's; `structured_outputs` and `guided_json`, `guided_regex`, `guided_choice` and
`guided_grammar` are vLLM's. Nothing is fetched: a `$ref` must lead to its own document.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errors import InvalidRequest, first_line
from schemas import ChatCompletionRequest, CompletionRequest
from text.endless_schemas import is_endless
from text.json_bounds import SCHEMA, check_json
from text.json_schemas import enforceable, patterns_of
from text.tool_calls.lark import WHITESPACE, Literals, lark_string
from text.tool_calls.tool_format import ToolFormat
from text.tools import ToolSet, check_patterns

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

JSON_OPTIONS: "JsonCompileOptions" = {"whitespace_pattern": WHITESPACE}

Structured = ChatCompletionRequest | CompletionRequest


@dataclass(frozen=True)
class Kind:
    grammar: Callable[[Any], str]  # value -> the text of its grammar; raises ValueError
    patterns: Callable[[Any], Iterable[str]]  # value -> its regular expressions


@dataclass(frozen=True)
class Structure:
    """What an answer must look like, and from where on."""

    text: str  # of a grammar
    fields: Mapping[str, str]  # of the request -> the part of the grammar that it asks for
    trigger: str | None = None  # the token that the grammar follows, each time it comes; None: it holds from the start
    is_needed: bool = True  # else an answer can do without, if the grammar cannot be compiled


def structure_of(request: Structured, box: ToolSet | None, style: ToolFormat, literals: Literals) -> Structure | None:
    """Returns what a request asks for; None if an answer may be anything. style and literals are the model's.

    Raises InvalidRequest, also for two structures at once.
    """
    asked = _grammar_of(request)
    if box is None:
        return None if asked is None else Structure(asked[0], {asked[1]: asked[0]})
    is_needed = box.is_required or box.is_strict
    if not is_needed and asked is None and any(map(is_endless, box.schemas.values())):
        return None
    parts = {box.fields[name]: _part(schema, box.fields[name], is_needed) for name, schema in box.schemas.items()}
    if box.is_required:
        text = style.calls_grammar(box.schemas, literals, box.is_parallel)
        return Structure(_of_lark(text), parts)
    if asked is not None:
        text = style.calls_beside_json_grammar(box.schemas, literals, box.is_parallel)
        return Structure(_either(text, asked[0]), {**parts, asked[1]: asked[0]})
    if box.is_strict:
        return Structure(_of_lark(style.calls_or_text_grammar(box.schemas, literals)), parts)
    if style.begin in literals:
        return Structure(
            text=_of_lark(style.rest_of_call_grammar(box.schemas, literals)),
            fields=parts,
            trigger=style.begin,
            is_needed=False,
        )
    return None


def is_structured(request: Structured) -> bool:
    """Returns whether the request itself asks for a structure, be it with tools or without."""
    return any(value is not None for _, _, value in _asked(request))


def _either(calls: str, answer: str) -> str:
    """Returns a grammar of one or the other; `calls` is Lark, `answer` is what a kind's `grammar` returned."""
    given = json.loads(answer) if answer.startswith("{") else {"grammars": [{"lark_grammar": answer}]}
    whole = calls.replace("start: ", "start: @answer | calls\ncalls: ", 1)
    return json.dumps({"grammars": [{"lark_grammar": whole}, {**given["grammars"][0], "name": "answer"}]})


def _grammar_of(request: Structured) -> tuple[str, str] | None:
    """Returns the grammar and the field that asks for it. Raises InvalidRequest, also for two structures at once."""
    asked = [(field, kind, value) for field, kind, value in _asked(request) if value is not None]
    if not asked:
        return None
    if len(asked) > 1:
        raise _invalid(f"{asked[0][0]} and {asked[1][0]} cannot be used together.", asked[1][0])
    field, kind, value = asked[0]
    with _refusing(field):
        if kind == "json" and isinstance(value, str):
            value = json.loads(value)
        check_json(value, field, SCHEMA)
        if kind == "json":
            _check_endless(value)
        patterns = [*KINDS[kind].patterns(value)]
        check_patterns(patterns, field)
        _check_ends(patterns)
        return KINDS[kind].grammar(value), field


def _check_ends(patterns: Iterable[str]) -> None:
    """Raises ValueError for a pattern that llguidance would read without its last character."""
    for pattern in patterns:
        if (len(pattern) - len(pattern.rstrip("\\"))) % 2:
            raise ValueError("a pattern must not end in a single backslash")


def _check_endless(schema: Any) -> None:
    """Raises ValueError for a schema that no answer can come to the end of."""
    if is_endless(schema):
        raise ValueError("it asks for values without an end: a required part of it needs another such part")


@contextmanager
def _refusing(field: str) -> Iterator[None]:
    """Turns errors about a structure into InvalidRequest, which names its field."""
    try:
        yield
    except RecursionError as error:
        raise _invalid(f"{field} is nested too deeply.", field) from error
    except (ValueError, TypeError) as error:
        raise _invalid(f"{field}: {first_line(error)}", field) from error


def _part(schema: Any, field: str, is_needed: bool) -> str:
    with _refusing(field):
        _check_ends(patterns_of(schema) if is_needed else ())
        _check_endless(schema)
        return _of_json(schema)


def _asked(request: Structured) -> list[tuple[str, str, Any]]:
    """Returns (field, kind, value) of each field that can ask for a structure; the value of most is None."""
    asked = [(f"guided_{kind}", kind, getattr(request, f"guided_{kind}")) for kind in KINDS]
    for kind, value in (request.structured_outputs or {}).items():
        field = f"structured_outputs.{kind}"
        if kind not in KINDS and value is not None:
            raise _invalid(f"{field} is unknown: use one of {', '.join(KINDS)}.", field)
        asked.append((field, kind, value))
    if isinstance(request, ChatCompletionRequest) and request.response_format is not None:
        asked.append(("response_format", "json", _schema_of(request.response_format)))
    return asked


def _schema_of(response_format: dict[str, Any]) -> Any:
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise _invalid("response_format.type must be text, json_object or json_schema.", "response_format.type")
    given, field = response_format.get("json_schema"), "response_format.json_schema"
    schema = given.get("schema", {}) if isinstance(given, dict) else None
    if response_format.get("schema") is not None and (kind == "json_object" or given is None):  # as llama.cpp takes it
        schema, field = response_format["schema"], "response_format"
    elif kind == "json_object":
        return {"type": "object"}
    if not isinstance(schema, dict | bool):
        raise _invalid(f"{field}.schema must be a JSON schema.", field)
    return schema


def _of_json(schema: Any) -> str:
    from llguidance import LLMatcher

    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object or true")
    return LLMatcher.grammar_from_json_schema(json.dumps(enforceable(schema)), overrides=JSON_OPTIONS)


def _of_regex(pattern: Any) -> str:
    from llguidance import LLMatcher

    if not isinstance(pattern, str):
        raise ValueError("a regular expression must be a string")
    return LLMatcher.grammar_from_regex(pattern)


def _of_choice(choices: Any) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("choices must be a list of one or more strings, none of them empty")
    return _of_lark("start: " + " | ".join(map(lark_string, choices)))


def _of_lark(text: Any) -> str:
    """Takes Lark's syntax, or EBNF as llama.cpp writes it (`root ::= ...`)."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if not isinstance(text, str):
        raise ValueError("a grammar must be a string")
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:  # the library raises several classes
        raise ValueError(str(error)) from error


def _texts(value: Any) -> list[str]:
    """Returns the text itself: a grammar repeats its parts as regular expressions do."""
    return [value] if isinstance(value, str) else []


KINDS = {  # how a structure can be given
    "json": Kind(_of_json, patterns_of),
    "regex": Kind(_of_regex, _texts),
    "choice": Kind(_of_choice, lambda choices: ()),
    "grammar": Kind(_of_lark, _texts),
}


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
