"""The tools of a /v1/responses request: those that the client runs become functions, and calls get their names back.

A namespace groups functions. The model sees `namespace__name`, and a call's item has both again. A custom tool takes
text: the model sees a function with one argument. Tools that this server would have to run are left out, and named in
the X-Ignored-Fields header.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from errors import APIError, InvalidRequest
from text import custom_tools

Object = dict[str, Any]
SEPARATOR = "__"  # between a namespace and a name
CALLABLE = ("function", "custom")
TOOL_FIELDS: Mapping[str, type] = {"description": str, "strict": bool, "defer_loading": bool}
_PATH = re.compile(r"tools\[(\d+)\](?:\.function)?(\.parameters)?")  # of a tool, in an error of chat


@dataclass(frozen=True, kw_only=True)
class OfferedTool:
    """A tool that the client runs."""

    path: str  # in the request, such as tools[4].tools[0]
    name: str  # without its namespace
    namespace: str | None = None
    is_custom: bool = False
    chat: Object  # as chat completions have it

    @property
    def flat_name(self) -> str:
        """The name that the model sees."""
        return flat_name(self.name, self.namespace)


def flat_name(name: str, namespace: str | None) -> str:
    return f"{namespace}{SEPARATOR}{name}" if namespace else name


def offered_tools(tools: Iterable[Any] | None) -> list[OfferedTool]:
    """Returns the tools that the model may call. Raises InvalidRequest for one that is malformed."""
    return [offered for number, tool in enumerate(tools or ()) for offered in _offered(tool, f"tools[{number}]")]


def _offered(tool: Object, path: str) -> Iterator[OfferedTool]:
    kind = tool.get("type")
    if kind == "namespace":
        yield from _in_namespace(tool, path)
    elif kind in CALLABLE or not isinstance(kind, str):  # what has no type is refused where chat's tools are read
        yield _callable(tool, path)


def _in_namespace(tool: Object, path: str) -> Iterator[OfferedTool]:
    """Yields the tools of a namespace; its description leads that of the first one."""
    namespace, members = tool.get("name"), tool.get("tools")
    if not isinstance(namespace, str) or not namespace:
        raise _invalid(f"{path}.name must be the name of the namespace.", f"{path}.name")
    if not isinstance(members, list):
        raise _invalid(f"{path}.tools must be the list of the namespace's tools.", f"{path}.tools")
    check_fields(tool, {"description": str}, path)
    lead = f"{namespace}{SEPARATOR}*: {description}\n\n" if (description := tool.get("description")) else ""
    for number, member in enumerate(members):
        place = f"{path}.tools[{number}]"
        kind = member.get("type") if isinstance(member, dict) else None
        if kind not in CALLABLE and (kind == "namespace" or not isinstance(kind, str)):
            raise _invalid(f"{place}.type must be 'function' or 'custom'.", f"{place}.type")
        if kind in CALLABLE:
            yield _callable(member, place, namespace, lead)
            lead = ""


def own_part(tool: Object) -> Object:
    """Returns what says what a tool or a choice is; it is nested where it has the form of chat completions."""
    kind = tool.get("type", "function")
    own = tool.get(kind) if kind in CALLABLE else None
    return own if isinstance(own, dict) else tool


def check_fields(sent: Object, types: Mapping[str, type], path: str) -> None:
    """Raises InvalidRequest for a field of `types` whose value has another type."""
    for name, kind in types.items():
        if sent.get(name) is not None and not isinstance(sent[name], kind):
            raise _invalid(f"{path}.{name} must be {'text' if kind is str else 'true or false'}.", f"{path}.{name}")


def _callable(tool: Object, path: str, namespace: str | None = None, lead: str = "") -> OfferedTool:
    """lead: what comes before the description."""
    kind = tool.get("type")
    own = own_part(tool)
    check_fields(own, TOOL_FIELDS, path)
    own = {**own, "description": lead + (own.get("description") or "")} if lead else own
    name = own.get("name")
    flat = flat_name(name, namespace) if isinstance(name, str) else name
    if kind == "custom":
        function = custom_tools.as_function({**own, "name": flat}, f"{path}.format")
    else:
        known = ("name", "description", "parameters", "strict")
        function = {key: own[key] for key in known if key in own and (key, own[key]) != ("strict", False)}
        function |= {} if name is None else {"name": flat}
    chat = {"type": "function", "function": function} if kind in CALLABLE else tool
    return OfferedTool(
        path=path,
        name=name if isinstance(name, str) else "",
        namespace=namespace,
        is_custom=kind == "custom",
        chat=chat,
    )


def chat_choice(choice: str | Object | None, tools: list[OfferedTool], num_sent: int) -> str | Object | None:
    """Returns the choice as chat completions have it. Raises InvalidRequest if it forces a tool that is left out.

    num_sent: the number of tools in the request.
    """
    if choice == "required" and num_sent and not tools:
        raise _invalid("tool_choice is required, but this server runs none of these tools itself.", "tool_choice")
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools":
        return _allowed(choice, tools)
    if not choice:
        return choice
    names = _names(choice, tools)
    if not names:
        raise _not_here(choice)
    if choice.get("type") == "namespace":
        return _one_of(names, {"mode": "required"})
    return _function(names[0])


def _allowed(choice: Object, tools: list[OfferedTool]) -> Object:
    inner = choice.get("allowed_tools", choice)
    allowed = inner.get("tools") if isinstance(inner, dict) else None
    if not isinstance(allowed, list) or not all(isinstance(tool, dict) for tool in allowed):
        return choice  # chat says what is wrong
    names = [name for tool in allowed for name in _names(tool, tools)]
    if allowed and not names:
        raise _not_here(allowed[0])
    return _one_of(names, inner)


def _one_of(names: list[str], inner: Object) -> Object:
    return {"type": "allowed_tools", "allowed_tools": {**inner, "tools": [_function(name) for name in names]}}


def _names(choice: Object, tools: list[OfferedTool]) -> list[str]:
    """Returns the flat names that one choice means; none if it is a tool that this server would have to run."""
    kind = choice.get("type", "function")
    if kind == "namespace":
        return [tool.flat_name for tool in tools if tool.namespace == choice.get("name")]
    if kind not in CALLABLE:
        return []
    own = own_part(choice)
    name = own.get("name")
    if not isinstance(name, str):
        raise _invalid("tool_choice must name a tool: {'type': 'function', 'name': ...}.", "tool_choice")
    flat = flat_name(name, own.get("namespace"))
    if all(tool.flat_name != flat for tool in tools):  # a name alone will do where only one namespace has it
        found = [tool.flat_name for tool in tools if tool.name == name]
        flat = found[0] if len(found) == 1 else flat
    return [flat]


def _function(name: str) -> Object:
    return {"type": "function", "function": {"name": name}}


def _not_here(choice: Object) -> InvalidRequest:
    if choice.get("type") == "namespace":
        return _invalid(f"There is no namespace {choice.get('name')!r} with tools: name another one.", "tool_choice")
    return _invalid(
        f"tool_choice asks for {choice.get('type')!r}, a tool that this server does not have: let it name a function.",
        "tool_choice",
    )


def name_tool_as_sent(error: APIError, tools: list[OfferedTool]) -> APIError:
    """Renames a tool in an error of chat to the place where the request has it."""
    found = _PATH.match(error.param or "")
    if found is None or error.param is None or int(found[1]) >= len(tools):
        return error
    tool = tools[int(found[1])]
    part = ".format" if tool.is_custom and found[2] else found[2] or ""
    sent = tool.path + part + error.param[found.end() :]
    error.message, error.param = error.message.replace(error.param, sent), sent
    return error


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_value")
