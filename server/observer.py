"""Observer: sees each request from its first byte to its last, and reports it to the log, metrics and trace."""

from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.connection import CLIENT_GONE
from telemetry import logs, request_record, tracing
from telemetry.metrics import Metrics, ModelMetrics
from telemetry.request_record import RequestRecord

UNKNOWN = "other"  # stands for every path without a route
QUIET = ("/health", "/metrics")  # not logged: they are requested every few seconds


class Observer:
    def __init__(self, app: ASGIApp, metrics: Metrics, span: Callable[[], Any] | None = None) -> None:
        """span: returns the current span of the trace; None if there are no traces."""
        self.app = app
        self._metrics = metrics
        self._span = span

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        seen = request_record.current()
        status = 500  # if the request ends without an answer
        span = None if self._span is None else self._span()
        tracing.hide_query(span)

        async def send_and_see(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif span is not None and not message.get("more_body"):  # the span ends with the answer
                _tell_span(span, seen)
            await send(message)

        try:
            await self.app(scope, receive, send_and_see)
        finally:
            self._report(seen, scope, status)

    def _report(self, seen: RequestRecord, scope: Scope, status: int) -> None:
        path = _path(scope)
        error = _error(seen, status)
        self._metrics.answered(scope["method"], path, status)
        if path not in QUIET and error is not None:
            self._metrics.failed(error)
        if seen.provider:
            self._metrics.relayed(seen.provider, status, seen.seconds)
        if seen.metrics is not None:
            count_for_model(seen, seen.metrics, error)
        if path not in QUIET:
            logs.write(seen, scope["method"], scope["path"], status)


def _error(seen: RequestRecord, status: int) -> str | None:
    """Returns the code of the error that the client was sent; None if there was none or the client disconnected."""
    if status == CLIENT_GONE:
        return None
    return seen.error or (str(status) if status >= 400 else None)


def _path(scope: Scope) -> str:
    """Returns the path of the route, with /v1 if the request had it."""
    path = getattr(scope.get("route"), "path", UNKNOWN)
    is_bare = path.startswith("/") and scope["path"].startswith("/v1/") and not path.startswith("/v1/")
    return f"/v1{path}" if is_bare else path


def count_for_model(seen: RequestRecord, metrics: ModelMetrics, error: str | None) -> None:
    """Adds a request to the metrics of its model. A failed one is left out of the histograms of durations and lengths;
    RequestUsage has observed its queue time and the times of its tokens already."""
    for reason in seen.finish_reasons:
        metrics.success(reason).inc()
    if error is not None:
        return
    if not seen.is_complete:
        metrics.aborts.inc()
    if seen.prompt_tokens:  # the request reached the model
        metrics.e2e_latency.observe(seen.seconds)
        metrics.prompt_length.observe(seen.prompt_tokens)
        metrics.answer_length.observe(seen.completion_tokens)


def _tell_span(span: Any, seen: RequestRecord) -> None:
    """Sets attributes with the names of OpenTelemetry's conventions for generative models."""
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
