"""ToolSet: the tools of a request, and which of them may or must be called. It knows no model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from errors import InvalidRequest
from schemas import ChatCompletionRequest, TokenizeRequest, TranslatedChatRequest
from text import custom_tools
from text.json_bounds import SCHEMA, check_json
from text.json_schemas import enforceable, patterns_of
from text.regex_size import MAX_ADDED, is_too_large

NAME = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
KINDS = ("function", "custom")
MAX_TOOLS = 512
OPENS = {  # keywords about properties that are not listed, or about all together
    *("additionalProperties", "patternProperties", "unevaluatedProperties", "propertyNames", "minProperties"),
    *("anyOf", "allOf", "oneOf", "not", "if", "$ref", "dependentSchemas", "dependentRequired", "enum", "const"),
}

Object = dict[str, Any]


@dataclass(frozen=True)
class ToolSet:
    shown: tuple[Object, ...]  # those that a prompt begins with; custom ones as functions
    schemas: Mapping[str, Mapping[str, Any]]  # name of a tool that may be called -> schema of its arguments
    fields: Mapping[str, str]  # name -> the field of the request that has the schema
    is_required: bool  # at least one must be called
    is_parallel: bool  # several may be called
    is_strict: bool  # calls must be valid
    custom: frozenset[str] = frozenset()  # the names of those that take text instead of arguments


def tool_set_of(request: ChatCompletionRequest | TokenizeRequest) -> ToolSet | None:
    """Returns the tools of a request; None if none may be called. Raises InvalidRequest, which names the field."""
    tools = request.tools or []
    if len(tools) > MAX_TOOLS:
        raise _invalid(f"There are more than {MAX_TOOLS} tools: send fewer.", "tools")
    check_json(tools, "tools", SCHEMA)
    functions = [_function(tool, f"tools[{number}]") for number, tool in enumerate(tools)]
    check_patterns((own for function in functions for own in patterns_of(function.get("parameters"))), "tools")
    names = [function["name"] for function in functions]
    if twice := {name for name in names if names.count(name) > 1}:
        raise _invalid(f"Two tools are named {min(twice)!r}: rename or remove one.", "tools")
    mode, callable_names = _choice(request.tool_choice, names)
    if mode == "none" or not tools:
        return None
    unshown = request.unshown_tools if isinstance(request, TranslatedChatRequest) else ()
    is_parallel = isinstance(request, TokenizeRequest) or request.parallel_tool_calls is not False
    return ToolSet(
        shown=tuple(
            {"type": "function", "function": function} if tool["type"] == "custom" else tool
            for tool, function in zip(tools, functions, strict=True)
            if function["name"] not in unshown
        ),
        schemas={f["name"]: _closed(f.get("parameters")) for f in functions if f["name"] in callable_names},
        fields={name: _field(tool, number) for number, (tool, name) in enumerate(zip(tools, names, strict=True))},
        is_required=mode != "auto",
        is_parallel=is_parallel and mode != "named",
        is_strict=any(function.get("strict") is True for function in functions),
        custom=frozenset(name for tool, name in zip(tools, names, strict=True) if tool["type"] == "custom"),
    )


def _field(tool: Object, number: int) -> str:
    """Returns the field of the request that says what the arguments of a tool are."""
    return f"tools[{number}].custom.format" if tool["type"] == "custom" else f"tools[{number}].function.parameters"


def _closed(schema: Object | None) -> Object:
    """Allows no properties but the listed ones, if the schema is silent about others: small models make some up.

    A tool without parameters, or without properties, takes no arguments.
    """
    open_schema: Object = enforceable(schema or {})
    listed, required = open_schema.get("properties", {}), open_schema.get("required", [])
    is_listed = isinstance(listed, dict) and isinstance(required, list) and set(map(str, required)) <= set(listed)
    is_open = OPENS & open_schema.keys() or not is_listed
    return {"type": "object", **({} if is_open else {"properties": {}, "additionalProperties": False}), **open_schema}


def check_patterns(patterns: Iterable[str], field: str) -> None:
    """Raises InvalidRequest, which names the field, for a regular expression that would take too much memory."""
    if any(is_too_large(pattern) for pattern in patterns):
        raise _invalid(
            f"{field} has a regular expression whose repetition counts add more than "
            f"{MAX_ADDED} characters: use smaller counts.",
            field,
        )


def _function(tool: Object, path: str) -> Object:
    kind = tool.get("type")
    if kind not in KINDS:
        raise _invalid(f"{path}.type must be 'function' or 'custom': this server runs no tools itself.", f"{path}.type")
    function = tool.get(kind)
    if not isinstance(function, dict):
        raise _invalid(f"{path}.{kind} must be an object.", f"{path}.{kind}")
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _invalid(
            f"{path}.{kind}.name must have 1 to 128 characters, each of A-Z a-z 0-9 _ - . : or /.",
            f"{path}.{kind}.name",
        )
    if kind == "custom":
        return custom_tools.as_function(function, f"{path}.custom.format")
    parameters = function.get("parameters")
    if parameters is not None and (not isinstance(parameters, dict) or parameters.get("type", "object") != "object"):
        raise _invalid(
            f"{path}.function.parameters must be the JSON schema of an object.", f"{path}.function.parameters"
        )
    return function


def _choice(choice: str | Object | None, names: list[str]) -> tuple[str, list[str]]:
    """Returns the mode (none, auto, required; named: one tool, once), and the names of tools that may be called."""
    if isinstance(choice, str) or choice is None:
        mode = "auto" if choice is None else choice
        if mode not in ("none", "auto", "required"):
            raise _invalid(
                "tool_choice must be none, auto, required or an object that names a function.", "tool_choice"
            )
        if mode == "required" and not names:
            raise _invalid(
                "tool_choice is required, but there are no tools: send tools, or leave tool_choice out.", "tool_choice"
            )
        return mode, names
    if choice.get("type") == "allowed_tools":
        return _allowed(choice, names)
    return "named", [_name_of(choice, names, "tool_choice")]


def _allowed(choice: Object, names: list[str]) -> tuple[str, list[str]]:
    inner = choice.get("allowed_tools", choice)
    tools = inner.get("tools") if isinstance(inner, dict) else None
    mode = inner.get("mode", "auto") if isinstance(inner, dict) else None
    if not isinstance(tools, list) or not tools or mode not in ("auto", "required"):
        raise _invalid("allowed_tools must have a mode, auto or required, and a list of tools.", "tool_choice")
    return mode, [_name_of(tool, names, "tool_choice.allowed_tools") for tool in tools]


def _name_of(choice: Any, names: list[str], path: str) -> str:
    """Returns the name of the tool that is chosen, which must be one of the names."""
    kind = choice.get("type", "function") if isinstance(choice, dict) else None
    function = choice.get(kind) if kind in KINDS else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise _invalid(f"{path} must name a function: {{'type': 'function', 'function': {{'name': ...}}}}.", path)
    if name not in names:
        raise _invalid(f"{path}: there is no tool named {name!r}.", path)
    return name


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
