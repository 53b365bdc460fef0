"""Template probe: tries a chat template with texts that must be in the prompt.

It does so when the template is loaded, and again for each conversation in an unusual order; see `is_usual`.

Templates differ in what they want: content as text or as a list of parts, arguments as an object or as JSON's text,
short ids of calls. A template that gets another form silently drops it. The twin of a conversation is the same with a
unique text (a probe) for everything that is said: a probe that is not in the prompt shows what would be lost.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import product
from typing import Any

from text.canonical_messages import CanonicalMessage, as_responses

Render = Callable[[list[CanonicalMessage], list[dict[str, Any]] | None], str]
ROLES = ("user", "assistant", "system", "tool")
MESSAGES = "messages"  # stands for all messages: the template raises
ID_LENGTH = 9  # of the ids that Mistral's templates take
USUAL = {  # what may come after what in the conversations that every template is tried with
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant", "calls"),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("assistant",),
}


@dataclass(frozen=True)
class TemplateForm:
    """The form of messages in which a template shows what is said."""

    as_parts: frozenset[str] = frozenset()  # roles whose content is a list of parts
    is_text: bool = False  # the arguments of a call are JSON's text, not an object
    is_flat: bool = False  # a call has its name and arguments outside of `function`, too
    has_short_ids: bool = False
    has_responses: bool = False  # results are in the message of their calls
    hidden: tuple[str, ...] = ()  # what the template shows in no form
    ends: frozenset[str] = frozenset({"user"})  # kinds of messages that a conversation was tried to end with

    def hides(self, messages: Sequence[CanonicalMessage]) -> bool:
        """Returns whether a part of these messages may be hidden."""
        if not self.hidden or self.hidden == ("tools",):
            return False
        kinds = {message["role"] for message in messages} | {"calls" for message in messages if "tool_calls" in message}
        return not kinds.isdisjoint(self.hidden) or MESSAGES in self.hidden

    def of(self, messages: Sequence[CanonicalMessage]) -> list[CanonicalMessage]:
        """Returns the messages in this form."""
        return [self._message(message) for message in (as_responses(messages) if self.has_responses else messages)]

    def _message(self, message: CanonicalMessage) -> CanonicalMessage:
        result = dict(message)
        if message["role"] in self.as_parts and isinstance(message["content"], str):
            result["content"] = [{"type": "text", "text": message["content"]}]
        if "tool_calls" in message:
            result["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        if self.has_short_ids and "tool_call_id" in message:
            result["tool_call_id"] = _short(message["tool_call_id"])
        return result

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        result, function = dict(call), call.get("function")
        if self.is_text and isinstance(function, dict) and not isinstance(function.get("arguments"), str):
            function = {**function, "arguments": json.dumps(function.get("arguments"), ensure_ascii=False)}
            result["function"] = function
        if self.is_flat and isinstance(function, dict):
            result |= function
        if self.has_short_ids and "id" in call:
            result["id"] = _short(str(call["id"]))
        return result


def _short(call_id: str) -> str:
    return call_id if len(call_id) == ID_LENGTH and call_id.isalnum() else sha256(call_id.encode()).hexdigest()[:9]


# --- twins


@dataclass(frozen=True)
class Probe:
    """A text that the prompt must hold, and the role (or calls, tools) that it stands for."""

    of: str
    text: str
    is_key: bool = False  # of the arguments of a call


# A probe, and what is before it where a key is in Python's notation of a dict or in JSON inside of JSON's text:
# models are taught neither
FOUND = re.compile(r"""(\\"|')?(probe(?:_tool_)?\d+z)""")


def missing(probes: Sequence[Probe], prompt: str) -> tuple[str, ...]:
    """Returns the roles (or calls, tools) whose probes the prompt does not show."""
    found = {(match[2], match[1] is not None) for match in FOUND.finditer(prompt)}
    shown = {text for text, _ in found}
    marred = {text for text, is_marred in found if is_marred}
    lost = (probe.of for probe in probes if probe.text not in shown or (probe.is_key and probe.text in marred))
    return tuple(dict.fromkeys(lost))


def twin_of(messages: Sequence[CanonicalMessage]) -> tuple[list[CanonicalMessage], list[Probe]]:
    """Returns the conversation with probes for texts, and the probes; blank text stays, reasoning may be hidden."""
    twins: list[CanonicalMessage] = []
    probes: list[Probe] = []

    def new(of: str, is_key: bool = False) -> str:
        probes.append(Probe(of, f"probe{len(probes)}z", is_key))
        return probes[-1].text

    for message in messages:
        twin = dict(message)
        if message["content"].strip():
            twin["content"] = new(message["role"])
        if "tool_calls" in message:
            twin["tool_calls"] = [
                {**call, "function": {"name": new("calls"), "arguments": {new("calls", True): new("calls")}}}
                for call in message["tool_calls"]
            ]
        twins.append(twin)
    return twins, probes


TOOL_PROBES = [Probe("tools", f"probe_tool_{number}z") for number in range(3)]
TWIN_TOOL = {
    "type": "function",
    "function": {
        "name": TOOL_PROBES[0].text,
        "description": TOOL_PROBES[1].text,
        "parameters": {
            "type": "object",
            "properties": {TOOL_PROBES[2].text: {"type": "string", "description": "Text."}},
            "required": [TOOL_PROBES[2].text],
        },
    },
}


def hidden_by(
    render: Render, form: TemplateForm, messages: Sequence[CanonicalMessage], has_tools: bool = False
) -> tuple[str, ...]:
    """Returns the roles (or calls, tools) whose texts the prompt would lack. Raises what the template raises."""
    twins, probes = twin_of(messages)
    prompt = render(form.of(twins), [TWIN_TOOL] if has_tools else None)
    if "{'type': 'text'" in prompt:  # the parts themselves, in Python's notation
        return tuple(sorted(form.as_parts))
    return missing([*probes, *(TOOL_PROBES if has_tools else ())], prompt)


def is_usual(messages: Sequence[CanonicalMessage], ends: Collection[str]) -> bool:
    """Returns whether a conversation goes on and ends as those that the template was tried with; others are tried each
    time."""
    before = ""
    for message in messages:
        calls, role = message.get("tool_calls", ()), message["role"]
        kind = "calls" if calls else role
        if kind not in USUAL[before] or len(calls) > 1 or (calls and message["content"].strip()):
            return False
        before = kind
    return before in ends


# --- the trial

_CALL = {"id": "call_0123456789", "type": "function", "function": {"name": "f", "arguments": {}}}
_USER, _ASSISTANT, _SYSTEM = ({"role": role, "content": "text"} for role in ROLES[:3])
_CALLS: CanonicalMessage = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT = {"role": "tool", "content": "text", "tool_call_id": _CALL["id"], "name": "f"}
_WHOLE = [_USER, _ASSISTANT, _USER, _CALLS, _RESULT, _ASSISTANT, _USER]
_ARGUMENTS = ((False, False), (True, False), (False, True))  # as text, flat
_TRIALS: tuple[tuple[str, list[CanonicalMessage]], ...] = (
    ("user", [_USER]),
    ("assistant", [_USER, _ASSISTANT, _USER]),
    ("system", [_SYSTEM, _USER]),
)


def try_out(render: Render, has_tools: bool) -> TemplateForm:
    """Returns the form in which the template shows most. It takes milliseconds.

    has_tools: whether the prompt has tools, which changes what some templates show.
    """
    trial = partial(_lacks, render, has_tools=has_tools)
    form, hidden = TemplateForm(), ["tools"] if has_tools else []
    for role, messages in _TRIALS:
        forms = (form, replace(form, as_parts=form.as_parts | {role}))
        found = next((each for each in forms if trial(each, messages) <= {"tools"}), None)
        form = found or form
        hidden += [] if found else [role]
    found = next((each for each in _forms_of_calls(form) if trial(each, [_USER, _CALLS, _RESULT]) <= {"tools"}), None)
    form = found or form
    hidden += [] if found else ["calls"]
    system = [] if "system" in hidden else [_SYSTEM]
    lost = trial(form, [*system, *(_WHOLE if found else _WHOLE[:3])])
    if found and trial(form, [*system, *_WHOLE[2:5]]) <= lost >= trial(form, [*system, *_WHOLE[:5]]):
        form = replace(form, ends=form.ends | {"tool"})
    if "tools" not in lost and MESSAGES not in lost:
        hidden = [what for what in hidden if what != "tools"]
    return replace(form, hidden=tuple(dict.fromkeys([*hidden, *lost])))


def _forms_of_calls(form: TemplateForm) -> Iterator[TemplateForm]:
    """Yields the forms that calls may take, the most telling first, then the usual ones."""
    yield replace(form, has_responses=True)
    for has_short_ids, is_parts, (is_text, is_flat) in product((False, True), (False, True), _ARGUMENTS):
        parts = form.as_parts | ({"tool"} if is_parts else set())
        yield TemplateForm(as_parts=parts, is_text=is_text, is_flat=is_flat, has_short_ids=has_short_ids)


def _lacks(render: Render, form: TemplateForm, messages: list[CanonicalMessage], has_tools: bool = False) -> set[str]:
    """Returns what is hidden: all of it where the template raises."""
    try:
        return set(hidden_by(render, form, messages, has_tools))
    except Exception:  # templates are programs, and raise anything
        return {MESSAGES}


def behind_answer(render: Callable[..., str], form: TemplateForm) -> str:
    """Returns what the prompt has behind an answer that another turn follows; "" if the template hides the answer."""
    twins, probes = twin_of([_USER, _ASSISTANT, _USER])
    try:
        prompt = render(form.of(twins), None, add_generation_prompt=True)
    except Exception:  # templates are programs, and raise anything
        return ""
    return prompt.partition(probes[1].text)[2]


def shows_images(render: Render, mark: str) -> bool:
    """Returns whether an image among the user's text is shown as its mark, and the text with it."""
    first, second = ({"type": "text", "text": f"probe{number}z"} for number in range(2))
    parts = [first, {"type": "image"}, second]
    try:
        prompt = render([{"role": "user", "content": parts}], None)
    except Exception:  # templates are programs, and raise anything
        return False
    return prompt.count(mark) == 1 and all(part["text"] in prompt for part in (first, second))
