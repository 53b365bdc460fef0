"""Answers of Anthropic's Messages API become chat completions: whole answers, streams and errors.

It maps JSON objects and status codes. The sources are those of `anthropic_request.py`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from errors import UpstreamError
from providers.json_values import Object, count_or_zero, object_or_empty, string_or_empty
from providers.upstream_errors import error_of

REASONS = {
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}  # any other reason, or none, is `stop`

# type of an error -> status: an error in a stream has no status
STATUSES = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


# --- a whole answer


def to_completion(message: Object, model: str, created: int) -> Object:
    """Returns a message as a `chat.completion`; `model` is for one that does not name it. Raises APIError."""
    blocks = message.get("content")
    if not isinstance(blocks, list):
        raise UpstreamError("claude: the answer is not a message.", type="api_error", code="upstream_invalid_response")
    blocks = [block for block in blocks if isinstance(block, dict)]
    answer = {
        "role": "assistant",
        "content": _joined(blocks, "text") or None,
        "refusal": _refusal(message),
        "reasoning_content": _joined(blocks, "thinking"),
        "thinking_blocks": [kept for block in blocks if (kept := _thinking_block(block))],
        "tool_calls": [_call(block) for block in blocks if block.get("type") == "tool_use"],
    }
    always = ("role", "content", "refusal")
    choice = {
        "index": 0,
        "message": {name: value for name, value in answer.items() if value or name in always},
        "logprobs": None,
        **_ending(message),
    }
    return {
        "id": string_or_empty(message.get("id")) or _new_id(),
        "object": "chat.completion",
        "created": created,
        "model": string_or_empty(message.get("model")) or model,
        "choices": [choice],
        "usage": _usage(object_or_empty(message.get("usage"))),
    }


def _joined(blocks: list[Object], kind: str) -> str:
    return "".join(string_or_empty(block.get(kind)) for block in blocks if block.get("type") == kind)


def _thinking_block(block: Object) -> Object | None:
    """Returns a block of thinking as the next request must send it back; None without a signature: it would be
    refused."""
    if block.get("type") == "redacted_thinking" and (data := string_or_empty(block.get("data"))):
        return {"type": "redacted_thinking", "data": data}
    if block.get("type") == "thinking" and (signature := string_or_empty(block.get("signature"))):
        return {"type": "thinking", "thinking": string_or_empty(block.get("thinking")), "signature": signature}
    return None


def _call(block: Object) -> Object:
    try:
        arguments = json.dumps(object_or_empty(block.get("input")), ensure_ascii=False)
    except RecursionError as error:
        raise UpstreamError("claude: a tool call is nested too deeply.", code="upstream_invalid_response") from error
    function = {"name": string_or_empty(block.get("name")), "arguments": arguments}
    return {"id": string_or_empty(block.get("id")), "type": "function", "function": function}


def _ending(message: Object) -> Object:
    """Returns the finish reason, and the stop string that was found as `stop_reason`, which is vLLM's extension."""
    stop = string_or_empty(message.get("stop_sequence"))
    reason = REASONS.get(string_or_empty(message.get("stop_reason")), "stop")
    return {"finish_reason": reason, **({"stop_reason": stop} if stop else {})}


def _refusal(message: Object) -> str | None:
    if message.get("stop_reason") != "refusal":
        return None
    return string_or_empty(object_or_empty(message.get("stop_details")).get("explanation")) or None


def _usage(usage: Object) -> Object:
    """Returns the usage in OpenAI's terms: Anthropic's `input_tokens` leave out those read from or written to its
    cache."""
    cached = count_or_zero(usage.get("cache_read_input_tokens"))
    written = count_or_zero(usage.get("cache_creation_input_tokens"))
    prompt_tokens = count_or_zero(usage.get("input_tokens")) + cached + written
    completion_tokens = count_or_zero(usage.get("output_tokens"))
    counts: Object = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "cache_creation_input_tokens": written,
    }
    details = object_or_empty(usage.get("output_tokens_details"))
    if details.get("thinking_tokens") is not None:
        counts["completion_tokens_details"] = {"reasoning_tokens": count_or_zero(details["thinking_tokens"])}
    return counts


# --- a stream


@dataclass
class _Block:
    """A block of the answer that is under way."""

    content: Object  # that of `content_block_start`, and for thinking also what came since
    call: int | None = None  # the number of a call among the calls
    has_arguments: bool = False
    is_whole: bool = False  # all of its arguments came with its start


class StreamMapper:
    """Turns the events of one answer into `chat.completion.chunk`s with one id and time.

    `includes_usage`: a last chunk without choices has the usage, and the others have null.
    """

    def __init__(self, model: str, created: int, includes_usage: bool) -> None:
        self._id, self._model, self._created = _new_id(), model, created
        self._includes_usage = includes_usage
        self._usage: Object = {}
        self._blocks: dict[Any, _Block] = {}
        self._num_calls = 0
        self._is_started = self._is_finished = False
        self.is_complete = False
        self._steps: dict[str, Callable[[Object], list[Object]]] = {
            "message_start": self._start,
            "content_block_start": self._start_block,
            "content_block_delta": self._extend_block,
            "content_block_stop": self._stop_block,
            "message_delta": self._change,
            "message_stop": self._stop,
            "error": self._fail,
        }

    def events(self, name: str | None, data: Object) -> list[Object]:
        """Returns the chunks of one event; none for an unknown one. Raises APIError for an error."""
        step = self._steps.get(string_or_empty(data.get("type")) or name or "")
        return step(data) if step and not self.is_complete else []

    def _start(self, data: Object) -> list[Object]:
        message = object_or_empty(data.get("message"))
        self._note_usage(message)
        if self._is_started:
            return []
        self._is_started = True
        self._id = string_or_empty(message.get("id")) or self._id
        self._model = string_or_empty(message.get("model")) or self._model
        return [self._chunk({"role": "assistant", "content": ""})]

    def _start_block(self, data: Object) -> list[Object]:
        block = self._blocks[_key(data)] = _Block(dict(object_or_empty(data.get("content_block"))))
        content, kind = block.content, block.content.get("type")
        if kind == "tool_use":
            return self._start_call(block)
        if kind == "text" and string_or_empty(content.get("text")):
            return [self._chunk({"content": content["text"]})]
        if kind == "thinking" and string_or_empty(content.get("thinking")):
            return [self._chunk({"reasoning_content": content["thinking"]})]
        return []

    def _start_call(self, block: _Block) -> list[Object]:
        block.call, self._num_calls = self._num_calls, self._num_calls + 1
        call = _call(block.content)
        call["function"]["arguments"] = ""
        chunks = [self._chunk({"tool_calls": [{"index": block.call, **call}]})]
        if block.content.get("input"):
            block.is_whole = True
            chunks += self._add_arguments(block, _call(block.content)["function"]["arguments"])
        return chunks

    def _add_arguments(self, block: _Block, text: str) -> list[Object]:
        block.has_arguments = block.has_arguments or bool(text)
        function = {"arguments": text}
        return [self._chunk({"tool_calls": [{"index": block.call, "function": function}]})] if text else []

    def _extend_block(self, data: Object) -> list[Object]:
        block, delta = self._blocks.get(_key(data)), object_or_empty(data.get("delta"))
        if block is None:
            return []
        kinds = delta.get("type"), block.content.get("type")
        if kinds == ("text_delta", "text") and (text := string_or_empty(delta.get("text"))):
            return [self._chunk({"content": text})]
        if kinds == ("input_json_delta", "tool_use") and not block.is_whole:
            return self._add_arguments(block, string_or_empty(delta.get("partial_json")))
        if kinds == ("thinking_delta", "thinking") and (text := string_or_empty(delta.get("thinking"))):
            block.content["thinking"] = string_or_empty(block.content.get("thinking")) + text
            return [self._chunk({"reasoning_content": text})]
        if kinds == ("signature_delta", "thinking"):
            signature = string_or_empty(block.content.get("signature")) + string_or_empty(delta.get("signature"))
            block.content["signature"] = signature
        return []

    def _stop_block(self, data: Object) -> list[Object]:
        block = self._blocks.pop(_key(data), None)
        if block is None:
            return []
        if block.call is not None and not block.has_arguments:
            return self._add_arguments(block, "{}")
        kept = _thinking_block(block.content)
        return [self._chunk({"thinking_blocks": [kept]})] if kept else []

    def _change(self, data: Object) -> list[Object]:
        self._note_usage(data)
        delta = object_or_empty(data.get("delta"))
        return self._finish(delta) if delta.get("stop_reason") else []

    def _finish(self, delta: Object) -> list[Object]:
        if self._is_finished:
            return []
        self._is_finished = True
        chunks = [self._chunk({}, _ending(delta))]
        if refusal := _refusal(delta):
            chunks.insert(0, self._chunk({"refusal": refusal}))
        return chunks

    def _stop(self, data: Object) -> list[Object]:
        chunks = self._finish({})
        self.is_complete = True
        if self._includes_usage:
            chunks.append(self._envelope([]) | {"usage": _usage(self._usage)})
        return chunks

    def _fail(self, data: Object) -> list[Object]:
        kind = string_or_empty(object_or_empty(data.get("error")).get("type"))
        raise error_of(STATUSES.get(kind, 500), data, "claude", "ANTHROPIC_API_KEY")

    def _note_usage(self, source: Object) -> None:
        """Keeps the latest counts, which are cumulative; one that is absent or null stays as it was."""
        usage = object_or_empty(source.get("usage"))
        self._usage |= {name: value for name, value in usage.items() if value is not None}

    def _chunk(self, delta: Object, ending: Object | None = None) -> Object:
        choice = {"index": 0, "delta": delta, "logprobs": None, **(ending or {"finish_reason": None})}
        return self._envelope([choice]) | ({"usage": None} if self._includes_usage else {})

    def _envelope(self, choices: list[Object]) -> Object:
        kind = "chat.completion.chunk"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def _key(data: Object) -> int:
    return count_or_zero(data.get("index"))


def _new_id() -> str:
    return f"chatcmpl-{uuid4().hex}"
