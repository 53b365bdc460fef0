"""A chat completion request becomes a request of Anthropic's Messages API: JSON objects in, JSON objects out.

Sources: https://platform.claude.com/docs/en/api/messages of version 2023-06-01, and the type definitions of Anthropic's
Python SDK 0.125. `anthropic_response.py` maps the answers.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from errors import unsupported
from providers.json_values import (
    Object,
    is_same,
    optional,
    refuse,
    require_boolean,
    require_count,
    require_integer,
    require_list,
    require_number,
    require_object,
    require_one_of,
    require_string,
    require_text,
)
from text.json_bounds import RELAYED, check_json

SAMPLING = ("temperature", "top_p", "top_k")
IMAGE_TYPES = {f"image/{kind}": f"image/{kind}" for kind in ("jpeg", "png", "gif", "webp")}
IMAGE_TYPES["image/jpg"] = "image/jpeg"
EFFORTS = {name: name for name in ("none", "low", "medium", "high", "xhigh", "max")} | {"minimal": "low"}
BUDGETS = {
    "low": 2048,
    "medium": 8192,
    "high": 16384,
    "xhigh": 24576,
    "max": 24576,
}  # tokens, for models without efforts
MIN_BUDGET = 1024
TIERS = {"auto": "auto", "default": "standard_only"}
CHOICES = {"none": {"type": "none"}, "auto": {"type": "auto"}, "required": {"type": "any"}}
JSON_ONLY = {"type": "text", "text": "Reply with one JSON object only."}

HAS_THINKING = (3, 7)
HAS_EFFORT = (4, 6)  # and adaptive thinking; later models have no other kind
ENDS_SAMPLING = (4, 7)

# Fields without a counterpart that would change the answer, each with the values that ask for nothing
REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "functions": ([],),
    "function_call": (),
}
UNTOUCHED = ("thinking", "output_config", "cache_control")
FORWARDED = frozenset(
    "model messages max_tokens max_completion_tokens temperature top_p top_k stop stream tools tool_choice"
    " parallel_tool_calls response_format reasoning_effort user safety_identifier service_tier".split()
) | frozenset(UNTOUCHED)
KNOWN = FORWARDED | {"stream_options", "n", "logprobs", "functions"}


@dataclass(frozen=True)
class Mapped:
    """A request as Anthropic takes it."""

    body: Object  # of POST /v1/messages
    dropped: tuple[str, ...]  # the client's parameters that are left out of it, or are in it only in part


def to_messages(body: Object, default_max_tokens: int, stripped: Collection[str] = ()) -> Mapped:
    """Returns the request for a chat completion with this body, which names the model as Anthropic does.

    `stripped` has the sampling parameters that the model is known to refuse. Raises InvalidRequest, which names the
    field.
    """
    for name in FORWARDED & body.keys():
        check_json(body[name], name, RELAYED)
    for name, neutral in REFUSED.items():
        if body.get(name) is not None and not any(is_same(body[name], value) for value in neutral):
            raise unsupported(name)
    model = require_text(body.get("model"), "model")
    conversation = _Conversation(body.get("messages"))
    dropped = [name for name, value in body.items() if name not in KNOWN and value is not None]
    tools = _tools(body)
    reasoning = _reasoning(body, version_of(model), tools, conversation.lacks_thinking_blocks)
    is_thinking = reasoning.thinking.get("type") in ("enabled", "adaptive")
    sampling = _sampling(body, stripped if not is_thinking and samples(model) else SAMPLING)
    request = {
        "model": model,
        "max_tokens": _max_tokens(body, default_max_tokens, reasoning.thinking),
        "messages": conversation.messages,
        "system": conversation.system + _format_line(body),
        "thinking": reasoning.thinking,
        "output_config": reasoning.output_config | _format(body) | optional(body, "output_config", require_object, {}),
        **tools,
        **sampling,
        **_rest(body),
    }
    dropped += [name for name in SAMPLING if name not in sampling and body.get(name) is not None]
    dropped += _dropped_in_part(body, request, reasoning)
    return Mapped({name: value for name, value in request.items() if value not in ({}, [])}, tuple(dropped))


def version_of(model: str) -> tuple[int, int] | None:
    """Returns the version in a model's name: (4, 8) for `claude-opus-4-8-20260301`; None for a name without one."""
    numbers = re.search(r"claude-(?:[a-z]+-)*(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)", model.lower())
    return (int(numbers[1]), int(numbers[2] or 0)) if numbers else None


def samples(model: str) -> bool:
    """Returns whether a model takes `temperature`, `top_p` and `top_k`; one whose name has no version is sent them."""
    version = version_of(model)
    return version is None or version < ENDS_SAMPLING


# --- the conversation


class _Conversation:
    """A chat's messages as Anthropic wants them: system blocks apart, and user and assistant turns.

    Messages of the user and of tools that follow each other are one turn, with the results of calls first.
    """

    def __init__(self, messages: Any) -> None:
        self.system: list[Object] = []
        self._turns: list[tuple[str, list[Object]]] = []
        self._ids = _ToolIds()
        roles: Mapping[str, Callable[[Object, str], None]] = {
            "system": self._add_system,
            "developer": self._add_system,
            "user": self._add_user,
            "assistant": self._add_assistant,
            "tool": self._add_result,
        }
        for index, message in enumerate(require_list(messages, "messages")):
            param = f"messages[{index}]"
            role = require_text(require_object(message, param).get("role"), f"{param}.role")
            if role not in roles:
                raise unsupported(f"{param}.role")
            roles[role](message, param)
        if not self._turns:
            refuse("messages", "needs a user message that is not empty")
        self._end()

    @property
    def messages(self) -> list[Object]:
        return [{"role": role, "content": _plain(blocks)} for role, blocks in self._turns]

    @property
    def lacks_thinking_blocks(self) -> bool:
        """Whether the last turn has results of calls that came without their thinking blocks."""
        if len(self._turns) < 2 or self._turns[-1][1][0]["type"] != "tool_result":
            return False
        return "thinking" not in self._turns[-2][1][0]["type"]

    def _add_system(self, message: Object, param: str) -> None:
        self.system += _blocks(message.get("content"), f"{param}.content", ("text",))

    def _add_user(self, message: Object, param: str) -> None:
        if blocks := _blocks(message.get("content"), f"{param}.content", ("text", "image_url", "file")):
            self._user_turn().extend(blocks)

    def _add_result(self, message: Object, param: str) -> None:
        tool_call_id = require_text(message.get("tool_call_id"), f"{param}.tool_call_id")
        block: Object = {"type": "tool_result", "tool_use_id": self._ids.of_result(tool_call_id)}
        if content := _blocks(message.get("content"), f"{param}.content", ("text", "image_url")):
            block["content"] = _plain(content)
        turn = self._user_turn()
        turn.insert(sum(other["type"] == "tool_result" for other in turn), block)

    def _user_turn(self) -> list[Object]:
        if not self._turns or self._turns[-1][0] != "user":
            self._turns.append(("user", []))
        return self._turns[-1][1]

    def _add_assistant(self, message: Object, param: str) -> None:
        for name in ("function_call", "audio"):
            if message.get(name) is not None:
                raise unsupported(f"{param}.{name}")
        blocks = [
            *_thinking_blocks(message.get("thinking_blocks"), f"{param}.thinking_blocks"),
            *_blocks(message.get("content"), f"{param}.content", ("text", "refusal")),
            *_text_blocks(optional(message, "refusal", require_string, "", param)),
            *self._calls(message.get("tool_calls"), f"{param}.tool_calls"),
        ]
        if blocks:
            self._turns.append(("assistant", blocks))

    def _calls(self, calls: Any, param: str) -> list[Object]:
        blocks = [_call(call, f"{param}[{i}]") for i, call in enumerate(require_list(calls, param) if calls else ())]
        ids = [block["id"] for block in blocks]
        for index, block in enumerate(blocks):
            if block["id"] in ids[:index]:
                refuse(f"{param}[{index}].id", "is also the id of another call")
            block["id"] = self._ids.of_call(block["id"])
        return blocks

    def _end(self) -> None:
        """Strips blanks from the end of an answer that is to be continued: Anthropic refuses them."""
        role, blocks = self._turns[-1]
        if role == "assistant" and blocks[-1]["type"] == "text":
            blocks[-1]["text"] = blocks[-1]["text"].rstrip()


class _ToolIds:
    """Turns ids that other providers gave into Anthropic's: letters, digits, _ and -, each for one call only."""

    def __init__(self) -> None:
        self._latest: dict[str, str] = {}
        self._taken: set[str] = set()

    def of_call(self, tool_call_id: str) -> str:
        name = re.sub(r"[^a-zA-Z0-9_-]", "_", tool_call_id)
        number, unique = 1, name
        while unique in self._taken:
            number += 1
            unique = f"{name}_{number}"
        self._taken.add(unique)
        self._latest[tool_call_id] = unique
        return unique

    def of_result(self, tool_call_id: str) -> str:
        return self._latest.get(tool_call_id) or self.of_call(tool_call_id)


def _plain(blocks: list[Object]) -> str | list[Object]:
    """A single text block becomes its text; other blocks stay as they are."""
    return str(blocks[0]["text"]) if len(blocks) == 1 and blocks[0].keys() == {"type", "text"} else blocks


def _text_blocks(text: str) -> list[Object]:
    return [{"type": "text", "text": text}] if text.strip() else []


def _blocks(content: Any, param: str, kinds: Collection[str]) -> list[Object]:
    """Returns the blocks of a content, which is a string or parts of these kinds.

    Texts of blanks alone are dropped: Anthropic refuses them.
    """
    if content is None or isinstance(content, str):
        return _text_blocks(content or "")
    blocks: list[Object] = []
    for index, part in enumerate(require_list(content, param)):
        path = f"{param}[{index}]"
        kind = require_text(require_object(part, path).get("type"), f"{path}.type")
        if kind not in kinds:
            raise unsupported(f"{path}.type")
        inner = PARTS[kind](part.get(kind), f"{path}.{kind}")
        kept = {"cache_control": part["cache_control"]} if part.get("cache_control") is not None else {}
        blocks += [block | kept for block in inner]
    return blocks


def _text_part(text: Any, param: str) -> list[Object]:
    return _text_blocks(require_string(text, param))


def _image_part(image: Any, param: str) -> list[Object]:
    if isinstance(image, dict):
        image, param = image.get("url"), f"{param}.url"
    url = require_text(image, param).strip()
    if re.match(r"https?://", url, re.IGNORECASE):  # fetched by Anthropic, never by this server
        return [{"type": "image", "source": {"type": "url", "url": url}}]
    return [{"type": "image", "source": _base64(url, param, IMAGE_TYPES)}]


def _file_part(file: Any, param: str) -> list[Object]:
    if require_object(file, param).get("file_id") is not None:
        raise unsupported(f"{param}.file_id")
    url = require_text(file.get("file_data"), f"{param}.file_data")
    source = _base64(url, f"{param}.file_data", {"application/pdf": "application/pdf"})
    return [{"type": "document", "source": source}]


def _base64(url: str, param: str, types: Mapping[str, str]) -> Object:
    head, comma, data = url.partition(",")
    scheme, _, description = head.partition(":")
    media_type, *_, encoding = description.lower().split(";") if ";" in description else (description, "")
    if scheme.lower() != "data" or not comma or encoding.strip() != "base64" or media_type.strip() not in types:
        refuse(param, f"must be a base64 data: URL of one of the types {', '.join(types)}", "unsupported_value")
    data = "".join(data.split())
    if not re.fullmatch(r"[A-Za-z0-9+/]+={0,2}", data):
        refuse(param, "does not hold valid base64")
    return {"type": "base64", "media_type": types[media_type.strip()], "data": data}


PARTS: Mapping[str, Callable[[Any, str], list[Object]]] = {
    "text": _text_part,
    "refusal": _text_part,
    "image_url": _image_part,
    "file": _file_part,
}
THINKING = {"thinking": ("thinking", "signature"), "redacted_thinking": ("data",)}


def _thinking_blocks(blocks: Any, param: str) -> list[Object]:
    """Returns the thinking blocks of an earlier answer; one without Anthropic's signature would be refused and is
    dropped."""
    kept = []
    for index, block in enumerate(require_list(blocks, param) if blocks else ()):
        path = f"{param}[{index}]"
        kind = require_text(require_object(block, path).get("type"), f"{path}.type")
        if kind not in THINKING:
            raise unsupported(f"{path}.type")
        values = {name: optional(block, name, require_string, "", path) for name in THINKING[kind]}
        if values[THINKING[kind][-1]]:
            kept.append({"type": kind, **values})
    return kept


def _call(call: Any, param: str) -> Object:
    if require_object(call, param).get("type", "function") != "function":
        raise unsupported(f"{param}.type")
    function = require_object(call.get("function"), f"{param}.function")
    return {
        "type": "tool_use",
        "id": require_text(call.get("id"), f"{param}.id"),
        "name": require_text(function.get("name"), f"{param}.function.name"),
        "input": _arguments(optional(function, "arguments", require_string, "", f"{param}.function"), param),
    }


def _arguments(text: str, param: str) -> Object:
    param = f"{param}.function.arguments"
    try:
        value = json.loads(text.strip() or "{}")
    except (ValueError, RecursionError):
        refuse(param, "is not valid JSON")
    check_json(value, param, RELAYED)
    return require_object(value, param)


# --- everything else


def _tools(body: Object) -> Object:
    """Returns the fields `tools` and `tool_choice`; empty if there are no tools."""
    tools = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(optional(body, "tools", require_list, []))]
    choice = _choice(body.get("tool_choice"))
    is_parallel = optional(body, "parallel_tool_calls", require_boolean, True)
    if not tools:
        if choice.get("type") in ("any", "tool"):
            refuse("tool_choice", "requires a tool call, but there are no tools")
        return {}
    if not is_parallel and choice.get("type") != "none":
        choice = {"type": "auto", **choice, "disable_parallel_tool_use": True}
    return {"tools": tools, "tool_choice": choice}


def _tool(tool: Any, param: str) -> Object:
    if require_text(require_object(tool, param).get("type"), f"{param}.type") != "function":
        raise unsupported(f"{param}.type")
    function = require_object(tool.get("function"), f"{param}.function")
    schema = optional(function, "parameters", require_object, {}, f"{param}.function")
    values = {
        "name": require_text(function.get("name"), f"{param}.function.name"),
        "description": optional(function, "description", require_string, None, f"{param}.function"),
        "input_schema": {"type": "object", **(schema or {"properties": {}})},
        "strict": optional(function, "strict", require_boolean, None, f"{param}.function"),
        "cache_control": tool.get("cache_control"),
    }
    return {name: value for name, value in values.items() if value is not None}


def _choice(choice: Any) -> Object:
    if choice is None:
        return {}
    if isinstance(choice, str):
        return CHOICES[require_one_of(choice, CHOICES, "tool_choice")]
    if require_object(choice, "tool_choice").get("type") != "function":
        raise unsupported("tool_choice.type")
    function = require_object(choice.get("function"), "tool_choice.function")
    return {"type": "tool", "name": require_text(function.get("name"), "tool_choice.function.name")}


@dataclass(frozen=True)
class _Reasoning:
    thinking: Object
    output_config: Object
    is_honoured: bool = True


def _reasoning(body: Object, version: tuple[int, int] | None, tools: Object, lacks_thinking_blocks: bool) -> _Reasoning:
    """Returns the fields for a `reasoning_effort`: an effort for newer models, a budget of tokens for older ones.

    Thinking is left out where Anthropic refuses it: with a forced call, and after calls without thinking blocks.
    """
    asked = body.get("reasoning_effort")
    effort = None if asked is None else EFFORTS[require_one_of(asked, EFFORTS, "reasoning_effort")]
    thinking = optional(body, "thinking", require_object, {})
    is_forced = tools.get("tool_choice", {}).get("type") in ("any", "tool")
    if effort is None:
        return _Reasoning(thinking, {})
    if version is not None and version < HAS_THINKING:
        return _Reasoning(thinking, {}, is_honoured=effort == "none")
    if effort == "none":
        return _Reasoning(thinking or {"type": "disabled"}, {})
    if version is None or version >= HAS_EFFORT:
        thinking = thinking or ({} if is_forced else {"type": "adaptive"})
        return _Reasoning(thinking, {"effort": effort}, is_honoured=bool(thinking))
    budget = _budget(effort, _asked_tokens(body))
    if thinking or is_forced or lacks_thinking_blocks or budget is None:
        return _Reasoning(thinking, {}, is_honoured=False)
    return _Reasoning({"type": "enabled", "budget_tokens": budget}, {})


def _budget(effort: str, max_tokens: int | None) -> int | None:
    """Returns the tokens of thinking for an effort; None if the client's limit leaves no room for any.

    At least half of the client's limit is kept for the answer, unless that is less than the smallest budget.
    """
    if max_tokens is None:
        return BUDGETS[effort]
    return min(BUDGETS[effort], max(MIN_BUDGET, max_tokens // 2)) if max_tokens > MIN_BUDGET else None


def _asked_tokens(body: Object) -> int | None:
    latest = optional(body, "max_completion_tokens", require_count, None)
    older = optional(body, "max_tokens", require_count, None)
    return older if latest is None else latest


def _max_tokens(body: Object, default: int, thinking: Object) -> int:
    """Returns the limit of tokens: the client's, or the default plus the budget of thinking, which counts towards
    it."""
    asked = _asked_tokens(body)
    budget = thinking.get("budget_tokens")
    return asked or default + (budget if isinstance(budget, int) else 0)


def _sampling(body: Object, stripped: Collection[str]) -> Object:
    """Returns the sampling parameters without `stripped`, in the range that Anthropic takes.

    A temperature is at most 1, and `top_p` is left out beside it, because newer models refuse the two together.
    """
    values = {
        "temperature": optional(body, "temperature", require_number, None),
        "top_p": optional(body, "top_p", require_number, None),
        "top_k": optional(body, "top_k", require_integer, None),
    }
    kept = {name: value for name, value in values.items() if value is not None and name not in stripped}
    if "temperature" in kept:
        kept["temperature"] = min(kept["temperature"], 1)
        kept.pop("top_p", None)
    if kept.get("top_k", 1) <= 0:  # other servers take that as "no limit"
        del kept["top_k"]
    return kept


def _format(body: Object) -> Object:
    response_format = optional(body, "response_format", require_object, {"type": "text"})
    kind = require_text(response_format.get("type"), "response_format.type")
    if kind not in ("text", "json_object", "json_schema"):
        raise unsupported("response_format.type")
    if kind != "json_schema":
        return {}
    json_schema = require_object(response_format.get("json_schema"), "response_format.json_schema")
    schema = require_object(json_schema.get("schema"), "response_format.json_schema.schema")
    return {"format": {"type": "json_schema", "schema": schema}}


def _format_line(body: Object) -> list[Object]:
    response_format = body.get("response_format")
    return [JSON_ONLY] if isinstance(response_format, dict) and response_format.get("type") == "json_object" else []


def _rest(body: Object) -> Object:
    user = optional(body, "safety_identifier", require_string, "") or optional(body, "user", require_string, "")
    tier = optional(body, "service_tier", require_string, "")
    values = {
        "stop_sequences": [stop for stop in _stops(body) if stop.strip()],
        "metadata": {"user_id": user} if user else {},
        "service_tier": TIERS.get(tier, []),
        "cache_control": optional(body, "cache_control", require_object, {}),
        "stream": optional(body, "stream", require_boolean, False) or [],
    }
    return {name: value for name, value in values.items() if value not in ({}, [])}


def _stops(body: Object) -> list[str]:
    stop = body.get("stop")
    if stop is None or isinstance(stop, str):
        return [stop] if stop else []
    return [require_string(item, f"stop[{index}]") for index, item in enumerate(require_list(stop, "stop"))]


def _dropped_in_part(body: Object, request: Object, reasoning: _Reasoning) -> list[str]:
    conditions = {
        "stop": any(stop and not stop.strip() for stop in _stops(body)),
        "service_tier": body.get("service_tier") is not None and "service_tier" not in request,
        "response_format": bool(_format_line(body)),
        "reasoning_effort": not reasoning.is_honoured,
    }
    return [name for name, is_dropped in conditions.items() if is_dropped]
