"""Toolbox: the tools of a request, and which of them may or must be called. It knows no model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from errors import InvalidRequest
from schemas import ChatCompletionRequest, TokenizeRequest
from text.json_bounds import SCHEMA, check_json
from text.json_schemas import enforceable, patterns_of
from text.regex_size import MAX_REPEATED, is_too_large

NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
MAX_TOOLS = 512  # tools
OPENS = {  # say something of other properties than those that are listed, or of all together
    *("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"),
    *("anyOf", "allOf", "oneOf", "not", "if", "$ref", "dependentSchemas", "dependentRequired", "enum", "const"),
}

Object = dict[str, Any]


@dataclass(frozen=True)
class ToolSet:
    shown: tuple[Object, ...]  # as they were sent
    schemas: Mapping[str, Mapping[str, Any]]  # of the arguments of those that may be called, by name
    fields: Mapping[str, str]  # where each schema is in the request
    is_required: bool  # to call one at least
    is_parallel: bool  # several calls are welcome
    is_strict: bool  # a call that is not valid must not be made


def tool_set_of(request: ChatCompletionRequest | TokenizeRequest) -> ToolSet | None:
    """None if no tool may be called. Raises InvalidRequest, whose param names the field."""
    tools = request.tools or []
    if len(tools) > MAX_TOOLS:
        raise _invalid(f"There are more than {MAX_TOOLS} tools.", "tools")
    check_json(tools, "tools", SCHEMA)
    functions = [_function(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    check_patterns((own for function in functions for own in patterns_of(function.get("parameters"))), "tools")
    names = [function["name"] for function in functions]
    if twice := {name for name in names if names.count(name) > 1}:
        raise _invalid(f"Two tools are named {min(twice)!r}.", "tools")
    mode, callable_names = _choice(request.tool_choice, names)
    if mode == "none" or not tools:
        return None
    is_parallel = isinstance(request, TokenizeRequest) or request.parallel_tool_calls is not False
    return ToolSet(
        tuple(tools),
        {f["name"]: _closed(f.get("parameters")) for f in functions if f["name"] in callable_names},
        {name: f"tools[{number}].function.parameters" for number, name in enumerate(names)},
        mode != "auto",
        is_parallel and mode != "named",
        any(function.get("strict") is True for function in functions),
    )


def _closed(schema: Object | None) -> Object:
    """An object of the properties that are listed, if nothing is said of others: small models make up more, which no
    function expects. A tool without parameters, or without properties, takes no arguments."""
    own: Object = enforceable(schema or {})
    listed, required = own.get("properties", {}), own.get("required", [])
    is_listed = isinstance(listed, dict) and isinstance(required, list) and set(map(str, required)) <= set(listed)
    is_open = OPENS & own.keys() or not is_listed
    return {"type": "object", **({} if is_open else {"properties": {}, "additionalProperties": False}), **own}


def check_patterns(patterns: Iterable[str], field: str) -> None:
    """Raises InvalidRequest for one that would take too much memory; the field is what they are in."""
    if any(is_too_large(pattern) for pattern in patterns):
        raise _invalid(
            f"{field} has a regular expression whose repetition counts add more than "
            f"{MAX_REPEATED} characters: use smaller counts.",
            field,
        )


def _function(tool: Object, path: str) -> Object:
    if tool.get("type") != "function":
        raise _invalid(f"{path}.type must be 'function': this server runs no tools itself.", f"{path}.type")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise _invalid(f"{path}.function must be an object.", f"{path}.function")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _invalid(
            f"{path}.function.name must have 1 to 128 characters, each of A-Z a-z 0-9 _ - . : or /.",
            f"{path}.function.name",
        )
    parameters = function.get("parameters")
    if parameters is not None and (not isinstance(parameters, dict) or parameters.get("type", "object") != "object"):
        raise _invalid(
            f"{path}.function.parameters must be the JSON schema of an object.", f"{path}.function.parameters"
        )
    return function


def _choice(given: str | Object | None, names: list[str]) -> tuple[str, list[str]]:
    """Whether tools may, must or must not be called, or one of them once; and which."""
    if isinstance(given, str) or given is None:
        mode = "auto" if given is None else given
        if mode not in ("none", "auto", "required"):
            raise _invalid(
                "tool_choice must be none, auto, required or an object that names a function.", "tool_choice"
            )
        if mode == "required" and not names:
            raise _invalid("tool_choice needs tools.", "tool_choice")
        return mode, names
    if given.get("type") == "allowed_tools":
        return _allowed(given, names)
    return "named", [_known(given, names, "tool_choice")]


def _allowed(given: Object, names: list[str]) -> tuple[str, list[str]]:
    inner = given.get("allowed_tools", given)
    tools = inner.get("tools") if isinstance(inner, dict) else None
    mode = inner.get("mode", "auto") if isinstance(inner, dict) else None
    if not isinstance(tools, list) or not tools or mode not in ("auto", "required"):
        raise _invalid("allowed_tools must have a mode, auto or required, and a list of tools.", "tool_choice")
    return mode, [_known(tool, names, "tool_choice.allowed_tools") for tool in tools]


def _known(given: Any, names: list[str], path: str) -> str:
    function = (
        given.get("function") if isinstance(given, dict) and given.get("type", "function") == "function" else None
    )
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise _invalid(f"{path} must name a function: {{'type': 'function', 'function': {{'name': ...}}}}.", path)
    if name not in names:
        raise _invalid(f"{path}: there is no tool named {name!r}.", path)
    return name


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
