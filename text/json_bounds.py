"""JSON bounds: how much JSON a request may hold, and what no JSON can say; all that read JSON ask here."""

import json
import math
import re
from dataclasses import dataclass
from itertools import islice
from typing import Any

from errors import InvalidRequest

MAX_VALUES = 250_000  # strings, lists and objects of a body: each takes many times its bytes. Numbers may be token ids
_VALUE = re.compile(rb'[\[{]|"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class JsonBounds:
    max_depth: int  # levels of objects and lists
    max_length: int | None = None  # characters of its text
    is_finite: bool = True  # no number may be beyond what JSON can say


SCHEMA = JsonBounds(max_depth=100, max_length=200_000, is_finite=False)  # a schema, a grammar, or all tools
RELAYED = JsonBounds(max_depth=199)  # a field for another provider; serializers give up at a thousand levels or so


def check_json(value: Any, param: str, bounds: JsonBounds) -> None:
    """Raises InvalidRequest, whose param is the one given, for a value beyond the bounds or with half a character."""
    level, depth = [value], 0
    while level:
        if depth > bounds.max_depth:
            raise _invalid(f"{param} is nested deeper than {bounds.max_depth} levels: use fewer levels.", param)
        for item in level:
            if bounds.is_finite and isinstance(item, float) and not math.isfinite(item):
                raise _invalid(f"{param} has a number that JSON cannot represent.", param)
            if isinstance(item, str):
                check_characters(item, param)
        level, depth = [inner for item in level for inner in _inside(item)], depth + 1
    if bounds.max_length is not None and len(json.dumps(value, ensure_ascii=False)) > bounds.max_length:
        raise _invalid(f"{param} is longer than {bounds.max_length} characters: make it shorter.", param)


def check_characters(text: str, param: str) -> None:
    """Raises InvalidRequest for half a character: JSON can hold one as an escape, UTF-8 and tokenizers cannot."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        raise _invalid(f"{param} has an unpaired surrogate, which is no character.", param) from error


def check_num_values(body: bytes) -> None:
    """Raises InvalidRequest for a body with too many values, before they are made of it."""
    if body.count(b'"') // 2 + body.count(b"[") + body.count(b"{") <= MAX_VALUES:
        return  # with those that are inside of strings
    if any(True for _ in islice(_VALUE.finditer(body), MAX_VALUES, None)):
        raise InvalidRequest(
            f"The body has more than {MAX_VALUES} strings, lists and objects: send less in one request.",
            code="invalid_value",
        )


def _inside(value: Any) -> list[Any]:
    """Returns the values one level below; an object's keys are among them."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
