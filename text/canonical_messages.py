"""OpenAI messages -> canonical messages, which chat templates expect, and forms for templates that take less."""

import json
from collections.abc import Sequence
from typing import Any

from errors import InvalidRequest
from schemas import Message
from text.tool_calls.tool_format import ToolFormat

CanonicalMessage = dict[str, Any]  # role: system, user, assistant or tool; content: text

ROLES = {"developer": "system", "function": "tool"}  # other names of the roles that templates know


def canonical(messages: Sequence[Message], image_mark: str | None = None) -> list[CanonicalMessage]:
    """Returns messages as templates expect them: text content, four roles, arguments of tool calls as objects.

    image_mark: what stands for an image in the text; None: images are refused.

    Raises InvalidRequest, which names the part, for content that the model cannot take.

    A participant's name leads the text, since templates have no place for it; a tool's name stays apart.
    """
    result: list[CanonicalMessage] = []
    for number, message in enumerate(messages):
        item: CanonicalMessage = {
            "role": ROLES.get(message.role, message.role),
            "content": _text(message, number, image_mark),
        }
        if item["role"] == "tool":
            item |= {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key))}
        elif message.name:
            item["content"] = f"{message.name}: {item['content']}"
        if thoughts := message.reasoning_content or message.reasoning:
            item["reasoning_content"] = thoughts
        calls = message.tool_calls or ([{"function": message.function_call}] if message.function_call else [])
        if calls:
            item["tool_calls"] = [_with_object_arguments(call) for call in calls]
        result.append(item)
    return result


def num_images(messages: Sequence[Message]) -> int:
    contents = [message.content for message in messages if isinstance(message.content, list)]
    return sum(part.type == "image_url" for content in contents for part in content)


def fold_tools(messages: Sequence[CanonicalMessage], style: ToolFormat, prompt: str = "") -> list[CanonicalMessage]:
    """Writes tool calls and their results as text, for templates that would leave them out.

    prompt: describes the tools; it is added to the system's message.
    """
    names = {str(call.get("id")): _called(call).get("name") for m in messages for call in m.get("tool_calls", ())}
    result: list[CanonicalMessage] = []
    for message in messages:
        text, role = message["content"], message["role"]
        if role == "tool":
            name = message.get("name") or names.get(str(message.get("tool_call_id")))
            text, role = f"Result of {name or 'the tool'}:\n{text}", "user"
        called = [_called(call) for call in message.get("tool_calls", ())]
        calls = [style.written(str(call.get("name")), call.get("arguments")) for call in called]
        result.append({"role": role, "content": "\n".join(filter(None, [text, *calls]))})
    if not prompt:
        return result
    first, *others = result
    if first["role"] != "system":
        return [{"role": "system", "content": prompt}, *result]
    return [{**first, "content": f"{first['content']}\n\n{prompt}"}, *others]


def prefix_tool_names(messages: Sequence[CanonicalMessage]) -> list[CanonicalMessage]:
    """Adds the tool's name to results that have no call, for templates that match results with calls."""
    return [
        {**m, "content": f"{m['name']}: {m['content']}"} if m.get("name") and not m.get("tool_call_id") else m
        for m in messages
    ]


def as_responses(messages: Sequence[CanonicalMessage]) -> list[CanonicalMessage]:
    """Puts results into the message of their calls, for templates whose turn goes on behind them. The images of
    results are before the message's text, which such templates write behind all results."""
    result: list[CanonicalMessage] = []
    for message, results in with_results(messages):
        names = {str(call.get("id")): _called(call).get("name") for call in message.get("tool_calls", ())}
        responses = [
            {"name": names.get(str(m.get("tool_call_id"))) or m.get("name") or "unknown", "response": _said(m)}
            for m in results
        ]
        shown = [m["content"] for m in results if not isinstance(m["content"], str)]
        images = [part for content in shown for part in content if part["type"] == "image"]
        if images:
            said = message["content"]
            said = [{"type": "text", "text": said}] if isinstance(said, str) and said else said or []
            message = {**message, "content": [*images, *said]}
        result.append({**message, "tool_responses": responses} if responses else message)
    return result


def _said(message: CanonicalMessage) -> str:
    """Returns a message's text without its images."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _called(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    return function if isinstance(function, dict) else {}


def _text(message: Message, number: int, image_mark: str | None) -> str:
    if message.content is None and not _may_be_silent(message):
        param = f"messages[{number}].content"
        raise InvalidRequest(f"{param} is required.", param=param, code="missing_required_parameter")
    if not isinstance(message.content, list):
        return message.content or message.refusal or ""
    for index, part in enumerate(message.content):
        param = f"messages[{number}].content[{index}]"
        if part.type == "image_url" and image_mark is not None:
            continue
        if part.type == "image_url":
            raise InvalidRequest("This model does not accept images.", param=param, code="unsupported_value")
        if part.type not in ("text", "refusal"):
            types = "'text'" if image_mark is None else "'text' and 'image_url'"
            raise InvalidRequest(
                f"This model accepts content parts of type {types}, not {part.type!r}.",
                param=param,
                code="unsupported_value",
            )
        if getattr(part, part.type) is None:
            param = f"{param}.{part.type}"
            raise InvalidRequest(f"{param} is required.", param=param, code="missing_required_parameter")
    return "".join(image_mark or "" if p.type == "image_url" else getattr(p, p.type) for p in message.content)


def _may_be_silent(message: Message) -> bool:
    """Returns whether a message needs no content, as in OpenAI's API: a function's, or the assistant's with something
    else."""
    if message.role != "assistant":
        return message.role == "function"
    said = (message.tool_calls, message.function_call, message.refusal, message.reasoning_content, message.reasoning)
    return any(said)


def _with_object_arguments(call: dict[str, Any]) -> dict[str, Any]:
    if isinstance(custom := call.get("custom"), dict):  # a tool that takes text
        return {**call, "function": {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}}
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    return {**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}}


def _arguments(arguments: Any) -> Any:
    """Returns arguments as an object: nothing, null and blanks are an empty one, and text that is no JSON stays."""
    if arguments is None or (isinstance(arguments, str) and arguments.strip() in ("", "null")):
        return {}
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments


def is_alternating(messages: Sequence[CanonicalMessage]) -> bool:
    """Returns whether user and assistant take turns, beginning with the user; a system message may come before."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    return bool(turns) and turns == [("user", "assistant")[number % 2] for number in range(len(turns))]


def alternate(messages: Sequence[CanonicalMessage], lead: str = "{}\n\n") -> list[CanonicalMessage]:
    """Returns the same text with user and assistant in turn, beginning with the user.

    What the system says at the beginning leads the first turn, in the form of `lead`; neighbours of one role become one
    message.
    """
    num_leading = _num_leading(messages)
    system = [message["content"] for message in messages[:num_leading]]
    turns: list[CanonicalMessage] = []
    for message in messages[num_leading:]:
        role = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + message["content"]
        else:
            turns.append({"role": role, "content": message["content"]})
    if not turns or turns[0]["role"] == "assistant":
        turns.insert(0, {"role": "user", "content": ""})
    led = lead.format("\n\n".join(system)) if system else ""
    turns[0]["content"] = (led + turns[0]["content"].lstrip()).strip()
    return turns


def join_leading_system(messages: Sequence[CanonicalMessage]) -> list[CanonicalMessage]:
    """Makes one message of those of the system that the conversation begins with. Later ones keep their places: were
    they moved, the conversation's beginning would change with each of them."""
    num_leading = _num_leading(messages)
    text = "\n\n".join(message["content"] for message in messages[:num_leading])
    return [{"role": "system", "content": text}, *messages[num_leading:]] if num_leading else [*messages]


def later_system_as_user(messages: Sequence[CanonicalMessage]) -> list[CanonicalMessage]:
    """Gives what the system says later to the user, for templates that take the system's word only at the beginning."""
    first, *others = join_leading_system(messages)
    return [first, *({**m, "role": "user"} if m["role"] == "system" else m for m in others)]


def system_into_user(messages: Sequence[CanonicalMessage]) -> list[CanonicalMessage]:
    """Puts what the system says at the head of the user's first message, for templates without a system role."""
    first, *others = later_system_as_user(messages)
    if first["role"] != "system":
        return [first, *others]
    if not others or others[0]["role"] != "user":
        return [{**first, "role": "user"}, *others]
    return [{**others[0], "content": f"{first['content']}\n\n{others[0]['content'].lstrip()}"}, *others[1:]]


def _num_leading(messages: Sequence[CanonicalMessage]) -> int:
    """Counts the messages of the system that the conversation begins with."""
    return next((index for index, m in enumerate(messages) if m["role"] != "system"), len(messages))


def apart(messages: Sequence[CanonicalMessage]) -> list[CanonicalMessage]:
    """Gives each call a message, with its result behind it, for templates that take one call in a message."""
    result: list[CanonicalMessage] = []
    for message, results in with_results(messages):
        calls = message.get("tool_calls", ())
        said = {key: value for key, value in message.items() if key != "tool_calls"}
        pieces = [said] if message["content"].strip() or not calls else []
        for call in calls:
            begin = {} if pieces else said  # with its reasoning
            pieces.append({**begin, "role": "assistant", "content": "", "tool_calls": [call]})
            answer = next((m for m in results if m.get("tool_call_id") == call.get("id")), None)
            if answer is not None:
                pieces.append(answer)
                results = [m for m in results if m is not answer]
        result += [*pieces, *results]
    return result


def with_results(messages: Sequence[CanonicalMessage]) -> list[tuple[CanonicalMessage, list[CanonicalMessage]]]:
    """Pairs each message with the results of its calls, which follow it."""
    pairs: list[tuple[CanonicalMessage, list[CanonicalMessage]]] = []
    for message in messages:
        if message["role"] == "tool" and pairs and pairs[-1][0].get("tool_calls"):
            pairs[-1][1].append(message)
        else:
            pairs.append((message, []))
    return pairs
