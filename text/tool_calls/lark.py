"""Pieces of grammars in Lark, as llguidance reads it."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

Schema = Mapping[str, Any]

WHITESPACE = r"[\x20\x0A\x0D\x09]{0,20}"  # between JSON's tokens: else it could go on for ever
_TOKEN = re.compile(r'<(/|\|)?([a-z_]+|")\|?>')  # what a grammar can name as a token of the model


class Literals:
    """Writes text into a grammar: a part that is one of the model's tokens, such as `<tool_call>`, as that token."""

    def __init__(self, tokens: Collection[str]) -> None:
        marks = sorted((token for token in tokens if _TOKEN.fullmatch(token)), key=len, reverse=True)
        self._tokens = set(marks)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, marks))})") if marks else None

    def of(self, text: str) -> str:
        pieces = self._pattern.split(text) if self._pattern else [text]
        return " ".join(piece if piece in self._tokens else lark_string(piece) for piece in pieces if piece)

    def __contains__(self, text: str) -> bool:
        return text in self._tokens


def json_of_schema(schema: Schema) -> str:
    """Returns the grammar of JSON that is valid by a schema."""
    options = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
    return f"%json {json.dumps({**schema, **options})}"


def definitions_of(schema: Schema) -> dict[str, Any]:
    """Returns the parts of a schema that its references lead to."""
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


def leads_to_definitions(schema: Schema) -> bool:
    """Returns whether these are all that its references lead to, so that each part of it can stand alone with them."""
    references = re.findall(r'"\$ref": "([^"]*)', json.dumps(schema))
    return all(path.startswith(("#/$defs/", "#/definitions/")) for path in references)


def lark_string(text: str) -> str:
    """Returns a text as a string of Lark, whose lexer takes no DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def in_regex(text: str) -> str:
    """Returns a text as a part of a regular expression between Lark's slashes."""
    return "\\n".join(re.escape(line).replace("/", "\\/") for line in text.split("\n"))
