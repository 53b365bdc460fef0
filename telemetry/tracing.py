"""Traces by OpenTelemetry, if its standard environment variables are set and its SDK is installed."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

from fastapi.telemetry import TelemetryConfig

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
DISABLED = "OTEL_SDK_DISABLED"
ADDRESSES = ("url.full", "http.url", "http.target")  # attributes; the last two are of older conventions
QUERY = "url.query"
HIDDEN = "REDACTED"


def is_enabled() -> bool:
    is_off = os.environ.get(DISABLED, "").lower() == "true"
    return not is_off and any(os.environ.get(name) for name in VARIABLES) and all(map(_is_installed, PACKAGES))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def configuration() -> TelemetryConfig:
    """Turns on FastAPI's spans alone: its logs hold text from clients, and /metrics has the metrics."""
    is_on = is_enabled()
    return {"tracing": is_on, "auto_configure": is_on, "metrics": False, "logs": False, "operation_spans": False}


def span() -> Callable[[], Any] | None:
    """Returns the function that returns the span of the current request; None if there are no traces."""
    if not is_enabled():
        return None
    from opentelemetry.trace import get_current_span

    return get_current_span


def hide_query(span: Any) -> None:
    """Removes the query string from a span, because it may hold a key. The log leaves it out too."""
    attributes = getattr(span, "attributes", None) or {}
    for name in ADDRESSES:
        if name in attributes:
            span.set_attribute(name, str(attributes[name]).partition("?")[0])
    if QUERY in attributes:
        span.set_attribute(QUERY, HIDDEN)
