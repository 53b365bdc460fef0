"""Custom tools, which take text: the function that the model calls instead, and its argument as text again."""

import json
import re
from typing import Any

from errors import InvalidRequest

Object = dict[str, Any]
ARGUMENT = "input"  # the name of the function's one argument, which text/canonical_messages.py writes, too
_BEGIN = re.compile(rf'\s*\{{\s*"{ARGUMENT}"\s*:\s*"')
_TEXT = re.compile(r'(?:[^"\\]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*')
_HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\Z")  # of a character that JSON writes in two escapes


def as_function(tool: Object, path: str) -> Object:
    """Returns the function that stands for a custom tool: its text is the one argument.

    A regular expression holds for the text; a grammar in Lark is told to the model and not enforced, since no grammar
    of calls can hold another one inside of a JSON string. `path` is the format's; raises InvalidRequest for a bad one.
    """
    syntax, definition = _grammar(tool.get("format"), path)
    description = tool.get("description") or ""
    text: Object = {"type": "string"}
    if syntax == "regex":
        text["pattern"] = f"^(?:{_without_anchors(definition)})$"
    elif syntax == "lark":
        description = f"{description}\n\nThe {ARGUMENT} follows this Lark grammar:\n{definition}".strip()
    parameters = {"type": "object", "properties": {ARGUMENT: text}, "required": [ARGUMENT]}
    function = {"name": tool.get("name"), "description": description}
    strict = {"strict": True} if syntax == "regex" else {}
    return {**function, "parameters": {**parameters, "additionalProperties": False}, **strict}


def _grammar(format: Any, path: str) -> tuple[str | None, str]:
    """Returns the syntax and the definition of a grammar; None if any text may be the input."""
    if format is None or (isinstance(format, dict) and format.get("type", "text") == "text"):
        return None, ""
    if not isinstance(format, dict) or format["type"] != "grammar":
        raise _invalid(f"{path}.type must be 'text' or 'grammar'.", f"{path}.type")
    grammar = format.get("grammar", format)  # chat nests what Responses has beside the type
    syntax, definition = (
        (grammar.get(key) for key in ("syntax", "definition")) if isinstance(grammar, dict) else ("", "")
    )
    if syntax not in ("lark", "regex"):
        raise _invalid(f"{path}.syntax must be 'lark' or 'regex'.", f"{path}.syntax")
    if not isinstance(definition, str) or not definition:
        raise _invalid(f"{path}.definition must be the text of the grammar.", f"{path}.definition")
    return syntax, definition


def _without_anchors(pattern: str) -> str:
    """Leaves out the anchors around a pattern, as the whole text has to fit it anyway."""
    return pattern.removeprefix("^").removesuffix("$") if not pattern.endswith("\\$") else pattern.removeprefix("^")


class TextArgument:
    """Reads the text out of a function's arguments, which come in pieces: `{"input": "a` gives `a`."""

    def __init__(self) -> None:
        self._unread = ""
        self._has_begun = self._has_ended = False

    def add(self, arguments: str) -> str:
        """Returns the text that this piece makes certain."""
        self._unread += arguments
        if not self._has_begun:
            begin = _BEGIN.match(self._unread)
            if begin is None:
                return ""
            self._has_begun, self._unread = True, self._unread[begin.end() :]
        if self._has_ended:
            return ""
        return self._certain()

    def _certain(self) -> str:
        match = _TEXT.match(self._unread)
        assert match is not None
        escaped = match[0]
        self._has_ended = self._unread[len(escaped) : len(escaped) + 1] == '"'
        if not self._has_ended and (half := _HALF.search(escaped)):
            escaped = escaped[: half.start()]
        self._unread = self._unread[len(escaped) :]
        return _unescaped(escaped)

    def end(self) -> str:
        """Returns the text of arguments that are no such object, as other servers' models may write them."""
        if self._has_begun:
            return ""
        try:
            value = json.loads(self._unread)
        except (ValueError, RecursionError):
            return self._unread
        text = value.get(ARGUMENT, "" if not value else None) if isinstance(value, dict) else value
        return text if isinstance(text, str) else self._unread


def _unescaped(text: str) -> str:
    """Reads the escapes of a JSON string; half a character becomes U+FFFD."""
    read: str = json.loads(f'"{text}"', strict=False)
    return read if read.isascii() else read.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
