"""What a response repeats of its request: only what the official types allow, in their form.

Raises InvalidRequest for what is no value of its field at all. A tool that the model is not offered is left out.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from api.responses.requests import ReasoningConfig, ResponsesRequest, TextConfig
from api.responses.tools import CALLABLE, TOOL_FIELDS, check_fields, own_part
from errors import InvalidRequest

Object = dict[str, Any]
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
SUMMARIES = ("auto", "concise", "detailed")
CHOICES = ("none", "auto", "required")
FORMAT_FIELDS: Mapping[str, type] = {"description": str, "strict": bool}


def echo_of(request: ResponsesRequest) -> Object:
    """Returns the fields that have a form of their own."""
    _check_metadata(request.metadata or {})
    return {
        "text": _text(request.text or TextConfig()),
        "reasoning": None if request.reasoning is None else _reasoning(request.reasoning),
        "tools": _tools(request.tools or []),
        "tool_choice": _choice(request.tool_choice),
    }


def _check_metadata(metadata: Object) -> None:
    for name, value in metadata.items():
        if not isinstance(value, str):
            raise InvalidRequest(
                f"The value of {name[:64]!r} in metadata must be text.", param="metadata", code="invalid_value"
            )


def _text(text: TextConfig) -> Object:
    verbosity = {} if text.verbosity is None else {"verbosity": text.verbosity}
    return {"format": _format(text.format or {}), **verbosity}


def _format(format: Object) -> Object:
    kind = format.get("type")
    if kind != "json_schema":
        return {"type": kind if kind == "json_object" else "text"}
    nested = format.get("json_schema")
    own = nested if isinstance(nested, dict) and "schema" not in format else format
    check_fields(own, FORMAT_FIELDS, "text.format")
    name, schema = own.get("name"), own.get("schema")
    return {
        "type": kind,
        "name": name if isinstance(name, str) else "answer",
        "schema": schema if isinstance(schema, dict) else {},
        **_fields(own, FORMAT_FIELDS),
    }


def _reasoning(reasoning: ReasoningConfig) -> Object:
    allowed = {"effort": EFFORTS, "summary": SUMMARIES, "generate_summary": SUMMARIES}
    values = {name: getattr(reasoning, name) for name in allowed}
    return {name: value if value in allowed[name] else None for name, value in values.items()}


# --- tools


def _tools(tools: list[Any]) -> list[Object]:
    made = [_tool(tool) for tool in tools]
    return [tool for tool in made if tool is not None]


def _tool(tool: Any) -> Object | None:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind == "namespace":
        description = tool.get("description") or ""
        return {"type": kind, "name": tool["name"], "description": description, "tools": _tools(tool["tools"])}
    if kind not in CALLABLE:
        return None
    own = own_part(tool)
    if not isinstance(own.get("name"), str):
        return None  # which is refused by whoever answers
    form = _custom_form(own) if kind == "custom" else _parameters(own)
    return {"type": kind, "name": own["name"], **_fields(own, TOOL_FIELDS), **form}


def _parameters(own: Object) -> Object:
    parameters = own.get("parameters")
    return {"parameters": parameters} if "parameters" in own and isinstance(parameters, dict | None) else {}


def _custom_form(own: Object) -> Object:
    format = own.get("format")
    if not isinstance(format, dict):
        return {}
    if format.get("type") != "grammar":
        return {"format": {"type": "text"}}
    grammar = format.get("grammar", format)
    return {"format": {"type": "grammar", "syntax": grammar["syntax"], "definition": grammar["definition"]}}


def _choice(choice: str | Object | None) -> str | Object:
    if not isinstance(choice, dict):
        return choice if choice in CHOICES else "auto"
    if choice.get("type") == "allowed_tools":
        inner = choice.get("allowed_tools", choice)
        tools = inner.get("tools") if isinstance(inner, dict) else None
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            return "auto"  # which is refused by whoever answers
        mode = "required" if inner.get("mode") == "required" else "auto"
        return {"type": "allowed_tools", "mode": mode, "tools": [_named(tool) for tool in tools]}
    if choice.get("type") == "namespace":
        return {"type": "allowed_tools", "mode": "required", "tools": [_named(choice)]}
    return _named(choice)


def _named(choice: Object) -> Object:
    own = own_part(choice)
    namespace = {"namespace": own["namespace"]} if isinstance(own.get("namespace"), str) else {}
    name = {"name": own["name"]} if isinstance(own.get("name"), str) else {}
    return {"type": choice.get("type", "function"), **name, **namespace}


def _fields(sent: Object, names: Iterable[str]) -> Object:
    return {name: sent[name] for name in names if name in sent}
