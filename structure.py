"""Structure: what an answer must look like, as the text of a grammar that llguidance compiles.

`response_format` is OpenAI's; `structured_outputs` and `guided_json`, `guided_regex`, `guided_choice` and
`guided_grammar` are vLLM's. Schemas are read here and nowhere fetched: a `$ref` leads to its own document.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from errors import InvalidRequest
from schemas import ChatCompletionRequest, CompletionRequest

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_LENGTH = 200_000  # characters of a schema or grammar
MAX_DEPTH = 100  # of a schema's objects and lists
JSON_OPTIONS: "JsonCompileOptions" = {
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,20}"
}  # else spaces could go on for ever

Structured = ChatCompletionRequest | CompletionRequest
KINDS: dict[str, Callable[[Any], str]] = {}  # what a structure can be given as -> the grammar of its value


def grammar_of(request: Structured) -> tuple[str, str] | None:
    """The grammar, and the field that asks for it. Raises InvalidRequest, also for two structures at once."""
    found = [(field, kind, value) for field, kind, value in _asked(request) if value is not None]
    if not found:
        return None
    if len(found) > 1:
        raise _invalid(f"{found[0][0]} and {found[1][0]} cannot go together.", found[1][0])
    field, kind, value = found[0]
    if _depth(value) > MAX_DEPTH or len(json.dumps(value, ensure_ascii=False)) > MAX_LENGTH:
        raise _invalid(f"{field} is longer than {MAX_LENGTH} characters, or deeper than {MAX_DEPTH} levels.", field)
    try:
        return KINDS[kind](value), field
    except (ValueError, TypeError) as error:
        raise _invalid(f"{field}: {str(error).splitlines()[0]}", field) from error


def _asked(request: Structured) -> list[tuple[str, str, Any]]:
    """(field, kind, value) of everything that the request asks for."""
    asked = [(f"guided_{kind}", kind, getattr(request, f"guided_{kind}")) for kind in KINDS]
    for kind, value in (request.structured_outputs or {}).items():
        field = f"structured_outputs.{kind}"
        if kind not in KINDS and value is not None:
            raise _invalid(f"{field} is not known; there are {', '.join(KINDS)}.", field)
        asked.append((field, kind, value))
    if isinstance(request, ChatCompletionRequest) and request.response_format is not None:
        asked.append(("response_format", "json", _schema_of(request.response_format)))
    return asked


def _schema_of(response_format: dict[str, Any]) -> Any:
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        raise _invalid("response_format.type is text, json_object or json_schema.", "response_format.type")
    given = response_format.get("json_schema")
    schema = given.get("schema", {}) if isinstance(given, dict) else None
    if not isinstance(schema, dict | bool):
        raise _invalid("response_format.json_schema.schema is no JSON schema.", "response_format.json_schema")
    return schema


def _of_json(schema: Any) -> str:
    from llguidance import LLMatcher

    if isinstance(schema, str):
        schema = json.loads(schema)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema is an object, and allows something")
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_OPTIONS)


def _of_regex(pattern: Any) -> str:
    from llguidance import LLMatcher

    if not isinstance(pattern, str):
        raise ValueError("a regular expression is a string")
    return LLMatcher.grammar_from_regex(pattern)


def _of_choice(choices: Any) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("choices are a list of strings")
    return _of_lark("start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))


def _of_lark(text: Any) -> str:
    """Lark's syntax, or EBNF as llama.cpp writes it (`root ::= ...`)."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    if not isinstance(text, str):
        raise ValueError("a grammar is a string")
    return LLMatcher.grammar_from_lark(any_to_lark(text))


KINDS |= {"json": _of_json, "regex": _of_regex, "choice": _of_choice, "grammar": _of_lark}


def _depth(value: Any) -> int:
    """Level by level, since recursion has a limit of its own."""
    level, depth = [value], 0
    while level := [item for value in level for item in _items(value)]:
        depth += 1
        if depth > MAX_DEPTH:
            break
    return depth


def _items(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
