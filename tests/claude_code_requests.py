"""Requests in the form of Claude Code 2.1.332, with texts of our own, of about the same lengths.

What was seen of the real client (`claude -p`, and several turns through `--input-format stream-json`):

* It asks `POST /v1/messages?beta=true`, always streamed, with `max_tokens` 32000. Before that, unless
  CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC is set, it asks `HEAD /api/hello` once, and any answer will do. It asked for
  no list of models. `/context` counts tokens by some 20 requests to `/v1/messages/count_tokens?beta=true`, and
  `/compact` sends the conversation twice, with its tools. A failed request is asked again once at least.
* `system` has three text blocks. The first is a billing header of 74 characters without cache_control. It ends in a
  short hash, which depends on the first user message; older clients had one that changed with each request. The
  second is one line, the third has about 7,000 characters; both have cache_control.
* `messages[0]` is the user's: two or three blocks that are reminders (the first of them only where there is a
  CLAUDE.md), then what the user typed. It stays the same in all later requests.
* `messages[1]` has the role `system`, with about 9,000 characters on the environment (6,000 in 2.1.197), and stays at
  this place for ever: it is the last message of the first request only. More of them come later, for instance when work
  in the background is done: after a user message, or after one of results, and they keep their places, too.
* Only the last block of the last message has cache_control. A message that is one text is a list with one block while
  it is the last, and a string in every later request: the prompt must not differ. So it is with `role: system`. Results
  of tools stay lists.
* A call's result is a text, or blocks; `is_error` is there for some tools only. ToolSearch is answered by blocks
  `tool_reference`, and the tools that it found then stand in `tools`, at their place in the alphabet, with
  `defer_loading`. (So the list of tools grows, and a prompt that begins with it loses its cached tokens once.) A tool
  `DeferredToolPlaceholder`, never to be called, has `defer_loading` from the start.
* 12 tools in `claude -p` (24 in 2.1.197), some 32,000 characters: `name`, `description`, `input_schema` with `$schema`
  and `additionalProperties`, and no `type`.
* `thinking` is `{"type": "adaptive", "display": "updates"}` with the beta `thinking-display-updates-2026-08-18`; where
  that is a 400, it is asked without both. `output_config` is `{"effort": "high"}`. `context_management` says that all
  thoughts are kept. `metadata.user_id` is JSON as text.
* The beta `thinking-token-count-2026-05-13` comes with requests of some turns and not of others.
* Agents that it starts itself have other system prompts and fewer tools, and say so in the billing header.
* A 404 for the model ends it with exit status 1 and "There's an issue with the selected model".
"""

import itertools
import json
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]

BETAS = (
    "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27,"
    "mid-conversation-tool-changes-2026-07-01,thinking-token-count-2026-05-13,advanced-tool-use-2025-11-20,"
    "effort-2025-11-24,thinking-display-updates-2026-08-18"
)
SESSION = "3fe152ef-cb34-4d8e-950c-78d926499901"
HEADERS = {
    "accept": "application/json",
    "authorization": "Bearer sk-unused",
    "content-type": "application/json",
    "user-agent": "claude-cli/2.1.332 (external, sdk-cli)",
    "x-claude-code-session-id": SESSION,
    "x-stainless-arch": "x64",
    "x-stainless-lang": "js",
    "x-stainless-os": "Linux",
    "x-stainless-package-version": "0.128.0",
    "x-stainless-retry-count": "0",
    "x-stainless-runtime": "node",
    "x-stainless-runtime-version": "v26.12.1",
    "x-stainless-timeout": "600",
    "anthropic-beta": BETAS,
    "anthropic-dangerous-direct-browser-access": "true",
    "anthropic-version": "2023-06-01",
    "x-app": "cli",
}
CACHED = {"cache_control": {"type": "ephemeral"}}
TOOLS = (  # name, characters of its description, its parameters; the first are those that `claude -p` has, too
    ("Agent", 3200, ("description", "prompt", "agent_type", "model", "run_in_background", "isolation")),
    ("Bash", 2100, ("command", "timeout", "description", "run_in_background")),
    ("Edit", 360, ("file_path", "old_string", "new_string", "replace_all")),
    ("ListAgents", 1400, ("q", "limit", "cursor")),
    ("Read", 800, ("file_path", "offset", "limit", "pages")),
    ("ReportFindings", 570, ("level", "findings")),
    ("ScheduleWakeup", 3400, ("delaySeconds", "reason", "prompt", "stop")),
    ("Skill", 1400, ("skill", "args")),
    ("ToolSearch", 950, ("query", "max_results")),
    ("Workflow", 3500, ("script", "name", "args", "scriptPath")),
    ("DeferredToolPlaceholder", 80, ()),
    ("Write", 240, ("file_path", "content")),
    ("AskUserQuestion", 1500, ("questions", "answers")),
    ("CronCreate", 2000, ("cron", "prompt", "recurring")),
    ("CronDelete", 100, ("id",)),
    ("CronList", 60, ()),
    ("EnterPlanMode", 3000, ()),
    ("ExitPlanMode", 1800, ("allowedPrompts",)),
    ("Glob", 500, ("pattern", "path")),
    ("Grep", 900, ("pattern", "path", "glob", "output_mode", "multiline")),
    ("NotebookEdit", 500, ("notebook_path", "cell_id", "new_source")),
    ("TaskCreate", 2200, ("subject", "description")),
    ("WebFetch", 1300, ("url", "prompt")),
    ("WebSearch", 1100, ("query", "allowed_domains")),
)
KINDS = {"limit": "number", "timeout": "number", "max_results": "number", "findings": "array", "questions": "array"}
WORDS = """each step of the work says first which file it concerns and then what is to be done there ; read before you
change anything , keep the style of the code around it , run the tests that belong to it , and say plainly what did not
work . when two ways lead to the same end take the shorter one unless the longer one is safer""".split()


def filler(length: int, start: int = 0) -> str:
    """Returns sentences of about so many characters: other ones for another start."""
    words, size = [], 0
    for number in itertools.count(start * 7):
        if size >= length:
            return " ".join(words)[:length]
        words.append(f"{number % 97}" if number % 13 == 0 else WORDS[number * (start % 5 + 1) % len(WORDS)])
        size += len(words[-1]) + 1


@dataclass
class ClaudeCodeSession:
    """A conversation, and the request that the client would send at each point of it."""

    model: str
    num_tools: int = 24
    scale: float = 1.0  # lengths of the client's own texts: 1.0 makes some 50,000 characters of JSON with 12 tools
    messages: list[Object] = field(default_factory=list)  # with lists as content, as the client keeps them
    num_requests: int = 0

    def ask(self, text: str) -> Object:
        """Returns the request for what the user types next."""
        self._say("user", *([] if self.messages else self._reminders()), _text(text))
        if len(self.messages) == 1:
            self._say("system", _text("# Environment\n" + self._filler(9100, 3)))
        return self.request()

    def answered(self, *blocks: Object) -> None:
        """Adds the model's answer, as its content came."""
        self._say("assistant", *blocks)

    def return_results(self, *results: Object, notification: str | None = None) -> Object:
        """Returns the request that brings back results of tools, and with them the news of what ran beside."""
        self._say("user", *results)
        if notification is not None:
            self._say("system", _text(notification))
        return self.request()

    def request(self) -> Object:
        """Returns the request for the conversation as it stands. Its billing header is another one each time."""
        self.num_requests += 1
        user = {"device_id": "e3" * 32, "account_uuid": "", "session_id": SESSION}
        return {
            "model": self.model,
            "messages": [*map(_as_text, self.messages[:-1]), _marked(self.messages[-1])],
            "system": self._system(),
            "tools": [self._tool(number) for number in range(self.num_tools)],
            "metadata": {"user_id": json.dumps(user, separators=(",", ":"))},
            "max_tokens": 32000,
            "thinking": {"type": "adaptive", "display": "updates"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "high"},
            "stream": True,
        }

    def _say(self, role: str, *blocks: Object) -> None:
        self.messages.append({"role": role, "content": list(blocks)})

    def _filler(self, length: int, start: int) -> str:
        return filler(int(length * self.scale), start)

    def _reminders(self) -> list[Object]:
        texts = [self._filler(540, 1), self._filler(550, 2)]
        return [_text(f"<system-reminder>\n{text}\n</system-reminder>\n") for text in texts]

    def _system(self) -> list[Object]:
        header = f"x-anthropic-billing-header: cc_version=2.1.332.{self.num_requests:03x}; cc_entrypoint=sdk-cli;"
        line = "You are an assistant that works on the files of a repository."
        return [_text(header), _text(line) | CACHED, _text("\n" + self._filler(6800, 4)) | CACHED]

    def _tool(self, number: int) -> Object:
        name, length, parameters = TOOLS[number]
        tool: Object = {"name": name, "description": self._filler(length, number)}
        if name == "DeferredToolPlaceholder":
            return tool | {"input_schema": {"type": "object", "properties": {}}, "defer_loading": True}
        properties = {
            parameter: {"description": self._filler(120, number + index), "type": KINDS.get(parameter, "string")}
            for index, parameter in enumerate(parameters)
        }
        properties |= {name: kind | {"items": {}} for name, kind in properties.items() if kind["type"] == "array"}
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "properties": properties}
        return tool | {"input_schema": {**schema, "required": list(parameters[:1]), "additionalProperties": False}}


def tool_result(call: Object, text: str, **more: Any) -> Object:
    """Returns the block that answers a `tool_use` block."""
    return {"tool_use_id": call["id"], "type": "tool_result", "content": text, **more}


def _text(text: str) -> Object:
    return {"type": "text", "text": text}


def _as_text(message: Object) -> Object:
    """A message that is no longer the last one: what is a single text becomes a string, but for the model's own."""
    content = message["content"]
    if message["role"] == "assistant" or len(content) != 1 or content[0]["type"] != "text":
        return deepcopy(message)
    return message | {"content": content[0]["text"]}


def _marked(message: Object) -> Object:
    """The last message: its last block is where the client asks for a cache's end."""
    *others, last = deepcopy(message["content"])
    return message | {"content": [*others, last | CACHED]}
