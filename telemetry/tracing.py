"""Traces by OpenTelemetry: if its standard variables are set and its SDK is installed, and else none."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

from fastapi.telemetry import TelemetryConfig

VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
DISABLED = "OTEL_SDK_DISABLED"
ADDRESSES = ("url.full", "http.url", "http.target")  # of the request; the last two in older conventions
QUERY = "url.query"
HIDDEN = "REDACTED"


def is_wanted() -> bool:
    is_off = os.environ.get(DISABLED, "").lower() == "true"
    return not is_off and any(os.environ.get(name) for name in VARIABLES) and all(map(_is_installed, PACKAGES))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def configuration() -> TelemetryConfig:
    """FastAPI's own spans; not its logs, which have what clients sent in them, nor its metrics, beside /metrics."""
    wanted = is_wanted()
    return {"tracing": wanted, "auto_configure": wanted, "metrics": False, "logs": False, "operation_spans": False}


def span() -> Callable[[], Any] | None:
    """What gives the request's span."""
    if not is_wanted():
        return None
    from opentelemetry.trace import get_current_span

    return get_current_span


def hide_query(span: Any) -> None:
    """What a client wrote behind the path may be a key; the log leaves it out, too."""
    known = getattr(span, "attributes", None) or {}
    for name in ADDRESSES:
        if name in known:
            span.set_attribute(name, str(known[name]).partition("?")[0])
    if QUERY in known:
        span.set_attribute(QUERY, HIDDEN)
