"""The tools of a request in Anthropic's form: those of the prompt's beginning, and those that are loaded later.

A tool with `defer_loading` is not described at the beginning. Once a search has found it, or a system message adds it,
it is described in that place and can be called. So a prompt's beginning stays the same, and with it all cached tokens.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from api.messages.schemas import Block, CountTokensRequest, Tool
from errors import InvalidRequest
from schemas import Object

CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, code="invalid_value")


@dataclass(frozen=True)
class Toolbox:
    """The tools of one request, by their names."""

    shown: dict[str, Object]  # those at the beginning of the prompt, as chat completions have them
    loaded: dict[str, Object]  # those that the conversation describes
    removed: frozenset[str]

    @classmethod
    def of(cls, request: CountTokensRequest) -> "Toolbox":
        """Raises InvalidRequest, which names the field."""
        tools = [(tool, f"tools[{n}]") for n, tool in enumerate(request.tools or ()) if tool.is_custom]
        made = {_name(tool, path): _function(tool, path) for tool, path in tools}
        deferred = {_name(tool, path) for tool, path in tools if tool.defer_loading}
        loaded, removed = dict[str, Object](), set[str]()
        for kind, block, path in _changes(request):
            name = changed_name(block, path)
            if kind == "tool_removal":
                removed.add(name)
                continue
            removed.discard(name)
            if (definition := _definition(block, path)) is not None:
                loaded[name] = _function(definition, f"{path}.tool.definition")
            elif name in deferred:
                loaded[name] = made[name]
        if len(made) < len(tools):
            raise invalid("tools: two of them have the same name: rename or remove one.")
        shown = {name: tool for name, tool in made.items() if name not in deferred}
        return cls(shown, {name: tool for name, tool in loaded.items() if name not in shown}, frozenset(removed))

    def description(self, name: str) -> str:
        """Returns the text that loads a tool; one that the beginning describes is only named."""
        if name not in self.loaded:
            return f"The tool {name} can be called."
        return f"The tool {name} can be called:\n{json.dumps(self.loaded[name]['function'], ensure_ascii=False)}"

    def fields(self, request: CountTokensRequest) -> Object:
        """Returns the fields of the chat completion request that are about tools."""
        tools = [*self.shown.values(), *self.loaded.values()]
        return {"tools": tools, "unshown_tools": [*self.loaded], **self._choice(request)}

    def _choice(self, request: CountTokensRequest) -> Object:
        choice = request.tool_choice
        parallel = {"parallel_tool_calls": False} if choice and choice.disable_parallel_tool_use else {}
        if choice is not None and choice.type == "tool":
            function = {"name": _chosen(choice.name, request)}
            return {"tool_choice": {"type": "function", "function": function}, **parallel}
        mode = CHOICES[choice.type] if choice else None
        left = [name for name in (*self.shown, *self.loaded) if name not in self.removed]
        if self.removed and left and mode != "none":
            named = [{"type": "function", "function": {"name": name}} for name in left]
            allowed = {"mode": mode or "auto", "tools": named}
            return {"tool_choice": {"type": "allowed_tools", "allowed_tools": allowed}, **parallel}
        return {"tool_choice": "none" if self.removed and not left else mode, **parallel}


def _chosen(name: str | None, request: CountTokensRequest) -> str:
    if name is None:
        raise invalid("tool_choice.name is required.")
    lacking = next((path for path, tool in request.dropped_tools.items() if tool.name == name), None)
    if lacking is not None:
        raise invalid(f"tool_choice names {lacking}, a kind of tool that this server lacks: choose another one.")
    return name


def _name(tool: Tool, path: str) -> str:
    if tool.name is None:
        raise invalid(f"{path}.name is required.")
    return tool.name


def _function(tool: Tool, path: str) -> Object:
    function: Object = {"name": _name(tool, path), "description": tool.description, "parameters": tool.input_schema}
    function |= {"strict": True} if tool.strict else {}
    return {"type": "function", "function": {key: value for key, value in function.items() if value is not None}}


# --- what a conversation changes


def _changes(request: CountTokensRequest) -> Iterator[tuple[str, Block, str]]:
    """Yields the blocks that load or remove tools, with their types and places."""
    for number, message in enumerate(request.messages):
        for block, path in _blocks(message.content, f"messages[{number}].content"):
            if block.type in ("tool_addition", "tool_removal", "tool_reference"):
                yield block.type, block, path


def _blocks(content: str | Sequence[Block] | None, path: str) -> Iterator[tuple[Block, str]]:
    """Yields blocks, and those inside the results of tools."""
    for number, block in enumerate(content if content and not isinstance(content, str) else ()):
        yield block, f"{path}[{number}]"
        if block.type == "tool_result":
            yield from _blocks(block.content, f"{path}[{number}].content")


def changed_name(block: Block, path: str) -> str:
    """Returns the name of the tool that a block loads or removes. Raises InvalidRequest."""
    tool = block.tool or {}
    name = block.tool_name if block.type == "tool_reference" else tool.get("name")
    if tool.get("type") == "tool_definition":
        definition = tool.get("definition")
        name = definition.get("name") if isinstance(definition, dict) else None
    if not isinstance(name, str):
        raise invalid(f"{path} names no tool: send a tool_reference or a tool_definition with a name.")
    return name


def _definition(block: Block, path: str) -> Tool | None:
    tool = block.tool or {}
    if tool.get("type") != "tool_definition":
        return None
    try:
        made = Tool.model_validate(tool["definition"])
    except ValueError as error:
        raise invalid(f"{path}.tool.definition must be a tool with a name and an input_schema.") from error
    if not made.is_custom:
        raise invalid(f"{path}.tool.definition.type must be custom: this server runs no tools itself.")
    return made
