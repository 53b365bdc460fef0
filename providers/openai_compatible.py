"""Providers that speak OpenAI's protocol, and the adapters that put right what some of them do differently.

What an adapter does not change keeps its bytes in answers and events; requests are always written anew.
Sources: the providers' documents on their compatible layers.
"""

import base64
import json
import math
import re
import struct
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

from config import ProviderValues
from errors import InvalidRequest, unsupported
from provider_table import AdapterName
from providers.base import ProviderResponse
from providers.json_values import Object, list_or_empty
from providers.upstream import NO_HEADERS, Upstream, UpstreamConfig, dropped_params_header, events_of
from providers.upstream_errors import error_in
from server.events import DONE, await_first, data_of, encode_event
from text.answer_parser import AnswerParser, ContentDelta, ParserOptions
from text.reasoning_format import THINK

Dropped = list[str]
MINIMAX_STATUSES = {1002: 429, 1004: 401, 1008: 402, 2049: 401}  # its codes -> those of HTTP; others are a 502
LARGEST_FLOAT = 3.4e38  # the largest of 32 bits, about
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"|"type"\s*:\s*"response\.(completed|incomplete|failed)"')


@dataclass(frozen=True)
class Urls:
    """The URLs of a provider's endpoints."""

    base: str
    chat: str | None = None  # of chat completions, if it is not below `base`
    chat_whole: str | None = None  # of chat completions that are not streamed, if it is another one

    def of(self, path: str, is_stream: bool) -> str:
        """Returns the URL of the endpoint `path`, which is written as below /v1."""
        if path == "chat/completions" and not is_stream and self.chat_whole:
            return self.chat_whole
        if path == "chat/completions" and self.chat:
            return self.chat
        return f"{self.base}/{path}"


class Adapter:
    """Puts right what a provider does differently. This one changes nothing; each request has a new one."""

    paths: tuple[str, ...] = ("chat/completions", "completions", "embeddings", "responses")

    @classmethod
    def urls(cls, base: str, whole: str | None) -> Urls:
        """Returns the endpoints of a provider. base: the URL that is set; whole: that of chats that are not
        streamed."""
        return Urls(base, chat_whole=whole)

    def request(self, path: str, body: Object) -> Dropped:
        """Changes a request in place and returns the parameters that it left out. Raises InvalidRequest."""
        return []

    def answer(self, body: Object) -> bool:
        """Changes a whole answer in place and returns whether anything changed."""
        return False

    def chunk(self, chunk: Object) -> bool:
        """Changes a chunk of a stream in place and returns whether anything changed."""
        return False


def _choices(body: Object) -> list[Object]:
    return [choice for choice in list_or_empty(body.get("choices")) if isinstance(choice, dict)]


def _index(choice: Object) -> int:
    index = choice.get("index")
    return index if isinstance(index, int) else 0


def _drop(body: Object, *names: str) -> Dropped:
    return [name for name in names if body.pop(name, None) is not None]


def _rename(body: Object, old: str, new: str) -> None:
    if (value := body.pop(old, None)) is not None:
        body.setdefault(new, value)


class GeminiAdapter(Adapter):
    """Gemini's streamed calls get their index, and an answer that ends in calls gets the finish reason for it.

    Its vectors come as floats, mostly without usage, and shortened ones are not of length 1: all are put right.
    """

    paths = ("chat/completions", "embeddings")

    def __init__(self) -> None:
        self._num_calls: dict[int, int] = {}
        self._ids: dict[tuple[int, str], int] = {}
        self._is_base64 = self._is_short = False

    def request(self, path: str, body: Object) -> Dropped:
        if path == "embeddings":
            self._is_base64 = body.get("encoding_format") == "base64"
            self._is_short = body.get("dimensions") is not None
            body["encoding_format"] = "float"
        return []

    def chunk(self, chunk: Object) -> bool:
        is_changed = False
        for choice in _choices(chunk):
            index, delta = _index(choice), choice.get("delta")
            for call in list_or_empty(delta.get("tool_calls")) if isinstance(delta, dict) else []:
                is_changed |= self._number(index, call)
            if choice.get("finish_reason") == "stop" and self._num_calls.get(index):
                choice["finish_reason"], is_changed = "tool_calls", True
        return is_changed

    def _number(self, index: int, call: Any) -> bool:
        """Gives a call of the choice `index` its number; True if it had none."""
        if not isinstance(call, dict) or isinstance(call.get("index"), int):
            if isinstance(call, dict):
                self._num_calls[index] = max(self._num_calls.get(index, 0), call["index"] + 1)
            return False
        count = self._num_calls.get(index, 0)
        key = (index, str(call.get("id") or count))
        call["index"] = self._ids.setdefault(key, count)
        self._num_calls[index] = max(count, call["index"] + 1)
        return True

    def answer(self, body: Object) -> bool:
        is_changed = False
        for choice in _choices(body):
            message = choice.get("message")
            if isinstance(message, dict) and message.get("tool_calls") and choice.get("finish_reason") == "stop":
                choice["finish_reason"], is_changed = "tool_calls", True
        for number, item in enumerate(list_or_empty(body.get("data"))):
            if isinstance(item, dict) and _is_vector(item.get("embedding")):
                item["embedding"], is_changed = self._vector(item["embedding"]), True
                item.setdefault("index", number)
        if is_changed and "data" in body and not isinstance(body.get("usage"), dict):
            body["usage"] = {"prompt_tokens": 0, "total_tokens": 0}
        return is_changed

    def _vector(self, values: list[Any]) -> list[Any] | str:
        length = math.hypot(*values) if self._is_short else 1.0
        values = [value / length for value in values] if length else values
        return base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode() if self._is_base64 else values


def _is_vector(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, int | float) and abs(x) <= LARGEST_FLOAT for x in value)


class DeepSeekAdapter(Adapter):
    """DeepSeek has other names for the limit, the user and the tokens that were cached."""

    paths = ("chat/completions",)

    @classmethod
    def urls(cls, base: str, whole: str | None) -> Urls:
        chat = base if urlsplit(base).path.endswith("/chat/completions") else None
        return Urls(base.removesuffix("/chat/completions"), chat, whole)

    def request(self, path: str, body: Object) -> Dropped:
        _rename(body, "max_completion_tokens", "max_tokens")
        _rename(body, "user", "user_id")
        for message in list_or_empty(body.get("messages")):
            if isinstance(message, dict) and message.get("role") == "developer":
                message["role"] = "system"
        return []

    def answer(self, body: Object) -> bool:
        return self.chunk(body)

    def chunk(self, chunk: Object) -> bool:
        usage = chunk.get("usage")
        if not isinstance(usage, dict) or "prompt_cache_hit_tokens" not in usage or usage.get("prompt_tokens_details"):
            return False
        usage["prompt_tokens_details"] = {"cached_tokens": usage["prompt_cache_hit_tokens"]}
        return True


class OllamaAdapter(Adapter):
    """Ollama's `reasoning` gets the name that clients read too; what it would ignore is refused or reported."""

    @classmethod
    def urls(cls, base: str, whole: str | None) -> Urls:
        return Urls(base if base.endswith("/v1") else f"{base}/v1")

    def request(self, path: str, body: Object) -> Dropped:
        if (body.get("n") or 1) != 1:
            raise unsupported("n")
        if path == "embeddings" and any(isinstance(part, int | list) for part in _listed(body.get("input"))):
            raise InvalidRequest("Ollama accepts text, not token ids.", param="input", code="unsupported_value")
        for number, message in enumerate(list_or_empty(body.get("messages"))):
            _check_images(message, f"messages[{number}]")
        if body.get("tool_choice") in ("auto", None):
            body.pop("tool_choice", None)
        return _drop(body, "tool_choice", "logit_bias", "user")

    def answer(self, body: Object) -> bool:
        return _show_reasoning(body, "message")

    def chunk(self, chunk: Object) -> bool:
        return _show_reasoning(chunk, "delta")


def _show_reasoning(body: Object, place: str) -> bool:
    is_changed = False
    for item in [choice.get(place) for choice in _choices(body)]:
        if isinstance(item, dict) and item.get("reasoning") and "reasoning_content" not in item:
            item["reasoning_content"], is_changed = item["reasoning"], True
    return is_changed


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _check_images(message: Any, path: str) -> None:
    for number, part in enumerate(_listed(message.get("content")) if isinstance(message, dict) else ()):
        image = part.get("image_url") if isinstance(part, dict) else None
        url = image.get("url") if isinstance(image, dict) else image
        if isinstance(url, str) and not url.startswith("data:"):
            param = f"{path}.content[{number}]"
            raise InvalidRequest("Ollama accepts images only as data: URLs.", param=param, code="unsupported_value")


class MiniMaxAdapter(Adapter):
    """MiniMax writes thoughts into the content, and sends empty roles and choices without a delta."""

    paths = ("chat/completions",)

    @classmethod
    def urls(cls, base: str, whole: str | None) -> Urls:
        return Urls(base) if urlsplit(base).path in ("", "/v1") else Urls(base.rpartition("/")[0], base)

    def __init__(self) -> None:
        self._parsers: dict[int, AnswerParser] = {}

    def request(self, path: str, body: Object) -> Dropped:
        _rename(body, "max_tokens", "max_completion_tokens")
        if (body.get("n") or 1) != 1:
            raise unsupported("n")
        dropped: Dropped = []
        temperature = body.get("temperature")
        if isinstance(temperature, int | float) and not 0 < temperature <= 1:
            body["temperature"] = 0.01 if temperature <= 0 else 1.0  # the least and the most that it takes
            dropped.append("temperature")
        return dropped

    def answer(self, body: Object) -> bool:
        is_changed = False
        for choice in _choices(body):
            message = choice.get("message")
            if isinstance(message, dict) and isinstance(message.get("content"), str):
                parser = self._parser()
                is_changed |= _put(message, parser.put(message["content"]) + parser.end())
        return is_changed

    def chunk(self, chunk: Object) -> bool:
        is_changed = False
        for choice in _choices(chunk):
            delta = choice.get("delta")
            if not isinstance(delta, dict):
                choice["delta"], is_changed = {}, True
                continue
            if delta.get("role") == "":
                del delta["role"]
                is_changed = True
            parser = self._parsers.setdefault(_index(choice), self._parser())
            parts = parser.put(delta["content"]) if isinstance(delta.get("content"), str) else []
            parts += parser.end() if choice.get("finish_reason") else []
            is_changed |= _put(delta, parts)
        return is_changed

    def _parser(self) -> AnswerParser:
        return AnswerParser(ParserOptions(think=THINK))


def _put(item: Object, parts: list[ContentDelta]) -> bool:
    """Writes content and reasoning into separate fields and returns whether anything changed."""
    content, reasoning = "".join(part.content for part in parts), "".join(part.reasoning for part in parts)
    if content == (item.get("content") or "") and not reasoning:
        return False
    if "content" in item or content:
        item["content"] = content
    if reasoning:
        item["reasoning_content"] = item.get("reasoning_content") or reasoning
    return True


ADAPTERS: dict[AdapterName, type[Adapter]] = {
    "none": Adapter,
    "gemini": GeminiAdapter,
    "deepseek": DeepSeekAdapter,
    "minimax": MiniMaxAdapter,
    "ollama": OllamaAdapter,
}


def failure_in(body: Object) -> Object | None:
    """Returns the error in an answer that came with the status of success, with a `status` beside its message."""
    minimax = body.get("base_resp")
    if isinstance(minimax, dict) and minimax.get("status_code"):
        code = minimax["status_code"]
        status = MINIMAX_STATUSES.get(code, 502) if isinstance(code, int) else 502
        return {"message": minimax.get("status_msg"), "status": status}
    if "choices" in body or body.get("object") == "response":
        return None
    error = error_in(body)
    return error and {**error, "status": _status(error.get("code"))}


def _status(code: Any) -> int:
    return code if isinstance(code, int) and 400 <= code < 600 else 502


@dataclass(frozen=True)
class OpenAICompatible:
    """A provider that speaks OpenAI's protocol."""

    upstream: Upstream
    urls: Urls
    adapter: type[Adapter] = Adapter

    @classmethod
    def of(cls, values: ProviderValues, transport: httpx2.AsyncBaseTransport | None) -> "OpenAICompatible":
        config = UpstreamConfig.of(values, lambda key: {"authorization": f"Bearer {key}"})
        adapter = ADAPTERS[values.row.adapter]
        return cls(Upstream(config, transport), adapter.urls(values.url, values.whole_url), adapter)

    def speaks(self, path: str) -> bool:
        return path in self.adapter.paths

    async def answer(self, path: str, body: Object, headers: Mapping[str, str] = NO_HEADERS) -> ProviderResponse:
        """Sends a request on, changed by the adapter, and returns the answer. Raises APIError."""
        adapter, is_stream = self.adapter(), body.get("stream") is True
        if not self.speaks(path):
            raise InvalidRequest(
                f"{self.upstream.config.name} does not support /{path}.", param="model", code="unsupported_value"
            )
        dropped = adapter.request(path, body)
        url, content = self.urls.of(path, is_stream), json.dumps(body).encode()
        told = dropped_params_header(dropped)
        if not is_stream:
            return ProviderResponse(await self._whole(url, content, adapter), told)
        return ProviderResponse(await self._stream(url, content, adapter, path), told)

    async def models(self) -> list[str]:
        response = await self.upstream.request("GET", f"{self.urls.base}/models", None)
        return model_ids(self._checked(response.content))

    async def _whole(self, url: str, content: bytes, adapter: Adapter) -> bytes:
        response = await self.upstream.request("POST", url, content)
        body = self._checked(response.content.strip())
        return json.dumps(body).encode() if adapter.answer(body) else response.content.strip()

    def _checked(self, text: bytes) -> Object:
        """Returns an answer's JSON. Raises APIError for text that is not an object, and for an object that is an
        error."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.upstream.fault("sent invalid JSON", 502, "upstream_invalid_response") from error
        body = {"error": error_in(body)} if isinstance(body, list) else body
        if not isinstance(body, dict):
            raise self.upstream.fault("sent JSON that is not an object", 502, "upstream_invalid_response")
        if failure := failure_in(body):
            raise self.upstream.error_from(failure["status"], {"error": failure})
        return body

    async def _stream(self, url: str, content: bytes, adapter: Adapter, path: str) -> AsyncGenerator[bytes]:
        """Returns the events of an answer when the first has come, or 15 seconds have passed without it.

        Raises APIError, also while they are read.
        """
        response = await self.upstream.stream(url, content)
        if "text/event-stream" not in response.headers.get("content-type", ""):
            self._checked((await self.upstream.read(response)).content.strip())
            raise self.upstream.fault("did not send a stream", 502, "upstream_invalid_response")
        return await await_first(self._events(events_of(response, self.upstream), adapter, path))

    async def _events(self, events: AsyncGenerator[bytes], adapter: Adapter, path: str) -> AsyncGenerator[bytes]:
        """Yields the provider's events, put right, until the answer ends; one that ends too early raises APIError."""
        is_finished = False
        is_plain = type(adapter) is Adapter  # then only an event with an error has to be parsed
        async with aclosing(events):
            async for event in events:
                data = data_of(event)
                if data is None:
                    if event.startswith(b":"):
                        yield event
                elif data == b"[DONE]":
                    yield event
                    return  # some providers leave the connection open behind it
                else:
                    is_finished = is_finished or bool(_FINISHED.search(data))
                    yield event if is_plain and b'"error"' not in data else self._adapted(event, data, adapter)
        if not is_finished:
            raise self.upstream.fault("ended its stream too early", 502, "upstream_stream_truncated")
        if path != "responses":
            yield DONE

    def _adapted(self, event: bytes, data: bytes, adapter: Adapter) -> bytes:
        """Returns the event as the adapter leaves it: byte for byte if nothing changed."""
        body = self._checked(data)
        return encode_event(json.dumps(body)) if adapter.chunk(body) else event


def model_ids(answer: Object) -> list[str]:
    """Returns the names in a list of models; Gemini's begin with `models/`, which its chat does not need."""
    ids = [model.get("id") for model in list_or_empty(answer.get("data")) if isinstance(model, dict)]
    return [name.removeprefix("models/") for name in ids if isinstance(name, str)]
