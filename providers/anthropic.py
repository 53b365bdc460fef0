"""Claude by Anthropic's Messages API. The formats are mapped in anthropic_request.py and anthropic_response.py."""

import json
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

import httpx2

from config import ProviderValues
from errors import InvalidRequest, UpstreamError
from providers.anthropic_request import SAMPLING, Mapped, to_messages
from providers.anthropic_response import STATUSES, StreamMapper, to_completion
from providers.base import ProviderResponse
from providers.json_values import Object, list_or_empty
from providers.refused_parameters import RefusedParameters
from providers.upstream import NO_HEADERS, Upstream, UpstreamConfig, dropped_params_header, events_of
from providers.upstream_errors import error_in
from server.events import DONE, await_first, data_of, encode_event, name_of

VERSION = "2023-06-01"  # later versions refuse what clients of chat completions send
RELAYED = ("messages", "messages/count_tokens")
PATHS = ("chat/completions", *RELAYED)
PING = b": ping\n\n"  # a comment: chat completions have no such event


class Claude:
    """Anthropic as a provider: chat completions become requests of its Messages API, and its answers completions."""

    def __init__(self, upstream: Upstream, base: str, default_max_tokens: int) -> None:
        """base: the URL above /messages; default_max_tokens: for requests without a limit, which the API refuses."""
        self.upstream = upstream
        self._base, self._default_max_tokens = base, default_max_tokens
        self._refused = RefusedParameters()

    @classmethod
    def of(cls, values: ProviderValues, transport: httpx2.AsyncBaseTransport | None) -> "Claude":
        config = UpstreamConfig.of(values, lambda key: {"x-api-key": key, "anthropic-version": VERSION})
        base = values.url.removesuffix("/v1")
        return cls(Upstream(config, transport), f"{base}/v1", values.max_tokens)

    async def models(self) -> list[str]:
        response = await self.upstream.request("GET", f"{self._base}/models?limit=1000", None)
        models = list_or_empty(self._object(response.content).get("data"))
        ids = [model.get("id") for model in models if isinstance(model, dict)]
        return [name for name in ids if isinstance(name, str)]

    def speaks(self, path: str) -> bool:
        return path in PATHS

    async def answer(self, path: str, body: Object, headers: Mapping[str, str] = NO_HEADERS) -> ProviderResponse:
        """Sends a request on and returns the answer: that of Messages as it came. Raises APIError.

        In a chat completion, a model that refuses sampling parameters is asked again without them, and from then on
        never sent them.
        """
        if path not in PATHS:
            raise InvalidRequest(f"claude does not support /{path}.", param="model", code="unsupported_value")
        if path in RELAYED:
            return await self._relay(path, body, headers)
        model = str(body["model"])
        refused = self._refused.of(model)
        mapped = to_messages(body, self._default_max_tokens, refused)
        try:
            return await self._ask(mapped, body)
        except UpstreamError as error:
            named = self._refused.named_in(error, [name for name in SAMPLING if name in mapped.body])
            if not named:
                raise
        answer = await self._ask(to_messages(body, self._default_max_tokens, refused | named), body)
        self._refused.remember(model, named)
        return answer

    async def _relay(self, path: str, body: Object, headers: Mapping[str, str]) -> ProviderResponse:
        """Relays a request of the Messages API, and its answer byte for byte."""
        url, content = f"{self._base}/{path}", json.dumps(body).encode()
        if body.get("stream") is not True:
            response = await self.upstream.request("POST", url, content, headers)
            self._object(response.content)
            return ProviderResponse(response.content)
        return ProviderResponse(await await_first(self._relayed_events(await self._stream(url, content, headers))))

    async def _relayed_events(self, response: httpx2.Response) -> AsyncGenerator[bytes]:
        """Yields the events as they came; an error among them, or an end that is too early, raises APIError."""
        async with aclosing(events_of(response, self.upstream)) as events:
            async for event in events:
                name = name_of(event)
                if name == "error":
                    data = self._object(data_of(event) or b"")
                    raise self.upstream.error_from(STATUSES.get(str((error_in(data) or {}).get("type")), 500), data)
                yield event
                if name == "message_stop":
                    return
        raise self.upstream.fault("ended its stream too early", 502, "upstream_stream_truncated")

    async def _stream(self, url: str, content: bytes, headers: Mapping[str, str] = NO_HEADERS) -> httpx2.Response:
        """Returns the answer to a request for a stream. Raises APIError, also if it is no stream."""
        response = await self.upstream.stream(url, content, headers)
        if "text/event-stream" in response.headers.get("content-type", ""):
            return response
        refusal = self._object((await self.upstream.read(response)).content)
        raise self.upstream.error_from(STATUSES.get(str((error_in(refusal) or {}).get("type")), 502), refusal)

    async def _ask(self, mapped: Mapped, body: Object) -> ProviderResponse:
        url, content = f"{self._base}/messages", json.dumps(mapped.body).encode()
        headers = dropped_params_header(mapped.dropped)
        model, created = str(body["model"]), int(time.time())
        if mapped.body.get("stream") is not True:
            response = await self.upstream.request("POST", url, content)
            completion = to_completion(self._object(response.content), model, created)
            return ProviderResponse(json.dumps(completion).encode(), headers)
        options = body.get("stream_options")
        includes_usage = isinstance(options, dict) and options.get("include_usage") is True
        mapper = StreamMapper(model, created, includes_usage)
        response = await self._stream(url, content)
        return ProviderResponse(await await_first(self._events(response, mapper)), headers)

    async def _events(self, response: httpx2.Response, mapper: StreamMapper) -> AsyncGenerator[bytes]:
        """Yields the answer as the events of a chat completion; one that ends too early raises APIError."""
        async with aclosing(events_of(response, self.upstream)) as events:
            async for event in events:
                data, name = data_of(event), name_of(event)
                if data is None:
                    if event.startswith(b":"):
                        yield event
                    continue
                if name == "ping":
                    yield PING
                    continue
                for chunk in mapper.events(name, self._object(data)):
                    yield encode_event(json.dumps(chunk))
                if mapper.is_complete:
                    break
        if not mapper.is_complete:
            raise self.upstream.fault("ended its stream too early", 502, "upstream_stream_truncated")
        yield DONE

    def _object(self, text: bytes) -> Object:
        """Returns the JSON object that the provider sent. Raises APIError for any other text."""
        try:
            body = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.upstream.fault("sent invalid JSON", 502, "upstream_invalid_response") from error
        if not isinstance(body, dict):
            raise self.upstream.fault("sent JSON that is not an object", 502, "upstream_invalid_response")
        return body
