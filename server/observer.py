"""Observer: sees each request from its first byte to its last, and tells the log, the metrics and the trace."""

from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.connection import CLIENT_GONE
from telemetry import logs, request_record, tracing
from telemetry.metrics import Metrics, ModelMetrics
from telemetry.request_record import RequestRecord

UNKNOWN = "other"  # a path that is no route
QUIET = ("/health", "/metrics")  # asked every few seconds


class Observer:
    def __init__(self, app: ASGIApp, metrics: Metrics, span: Callable[[], Any] | None = None) -> None:
        """span: the trace's current one, if there are traces."""
        self.app = app
        self._metrics = metrics
        self._span = span

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        seen = request_record.current()
        status = 500  # of what ends without an answer
        span = None if self._span is None else self._span()
        tracing.hide_query(span)

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif span is not None and not message.get("more_body"):  # it ends with the answer
                _tell_span(span, seen)
            await send(message)

        try:
            await self.app(scope, receive, send_and_see)
        finally:
            self._tell(seen, scope, status)

    def _tell(self, seen: RequestRecord, scope: Scope, status: int) -> None:
        path = _path(scope)
        error = _error(seen, status)
        self._metrics.answered(scope["method"], path, status)
        if path not in QUIET and error is not None:
            self._metrics.failed(error)
        if seen.provider:
            self._metrics.relayed(seen.provider, status, seen.seconds)
        if seen.metrics is not None:
            _tell_model(seen, seen.metrics, error)
        if path not in QUIET:
            logs.write(seen, scope["method"], scope["path"], status)


def _error(seen: RequestRecord, status: int) -> str | None:
    """The code of the one that the client was told of; who left was told of none."""
    if status == CLIENT_GONE:
        return None
    return seen.error or (str(status) if status >= 400 else None)


def _path(scope: Scope) -> str:
    """Of the route, with the prefix that it was reached by."""
    path = getattr(scope.get("route"), "path", UNKNOWN)
    is_bare = path.startswith("/") and scope["path"].startswith("/v1/") and not path.startswith("/v1/")
    return f"/v1{path}" if is_bare else path


def _tell_model(seen: RequestRecord, own: ModelMetrics, error: str | None) -> None:
    """What was refused, or failed, says nothing of how long answers and their prompts are."""
    for reason in seen.finish_reasons:
        own.success(reason).inc()
    if error is not None:
        return
    if not seen.is_complete:
        own.aborts.inc()
    if seen.prompt_tokens:  # it came as far as the model
        own.whole.observe(seen.seconds)
        own.prompt_length.observe(seen.prompt_tokens)
        own.answer_length.observe(seen.completion_tokens)


def _tell_span(span: Any, seen: RequestRecord) -> None:
    """By the names of OpenTelemetry's conventions for generative models."""
    fields = {
        "gen_ai.request.model": seen.model,
        "gen_ai.usage.input_tokens": seen.prompt_tokens,
        "gen_ai.usage.output_tokens": seen.completion_tokens,
        "gen_ai.response.finish_reasons": sorted(set(seen.finish_reasons)),
        "gen_ai.server.time_to_first_token": seen.first_token,
        "request.id": seen.request_id,
        "error.type": seen.error,
    }
    for name, value in fields.items():
        if value:
            span.set_attribute(name, value)
