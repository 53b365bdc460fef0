"""Metrics: what Prometheus reads at /metrics. Most names and labels are vLLM's, with llm_ in place of vllm:.

Sources: vLLM's metrics and https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-metrics/ for the buckets.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)  # seconds
BETWEEN_TOKENS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
MAX_CODES = 100  # different ones; a provider may send any code
_CODE = re.compile(r"[a-z0-9_.-]{1,64}")
_METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE")


class EngineState(Protocol):
    """The counters of an engine that /metrics reads."""

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_used_blocks(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def num_preemptions(self) -> int: ...

    @property
    def num_failed_steps(self) -> int: ...

    @property
    def num_disk_tokens(self) -> int: ...

    @property
    def num_disk_bytes(self) -> int: ...


@dataclass(frozen=True)
class ModelMetrics:
    """The metrics of one model."""

    prompt_tokens: Counter
    generation_tokens: Counter
    prefix_queries: Counter
    prefix_hits: Counter
    aborts: Counter
    first_token: Histogram
    between_tokens: Histogram
    e2e_latency: Histogram
    queue: Histogram
    prompt_length: Histogram
    answer_length: Histogram
    success: Callable[[str], Counter]  # by finish reason


@dataclass
class Metrics:
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        disable_created_metrics()  # they would double the number of series
        ProcessCollector(registry=self.registry)
        self._models: dict[str, ModelMetrics] = {}
        self._codes: set[str] = set()
        self._requests = self._counter("http_requests", "Requests answered", "method", "path", "code")
        self._errors = self._counter("errors", "Errors sent to clients", "code")
        self._providers = self._counter("provider_requests", "Requests answered by a provider", "provider", "code")
        self._provider_seconds = self._histogram(
            "provider_request_seconds", "Duration of a provider's answers", WHOLE, "provider"
        )
        label = "model_name"
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens", label)
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated", label)
        self._prefix_queries = self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache", label
        )
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache", label)
        self._aborts = self._counter("request_aborts", "Requests whose client disconnected", label)
        self._success = self._counter("request_success", "Finished answers", label, "finished_reason")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "Time to the first token", FIRST_TOKEN, label
        )
        self._between_tokens = self._histogram(
            "inter_token_latency_seconds", "Time between tokens", BETWEEN_TOKENS, label
        )
        self._e2e_latency = self._histogram("e2e_request_latency_seconds", "Duration of whole requests", WHOLE, label)
        self._queue = self._histogram("request_queue_time_seconds", "Time in the queue", FIRST_TOKEN, label)
        self._prompt_length = self._histogram("request_prompt_tokens", "Prompt tokens of a request", TOKENS, label)
        self._answer_length = self._histogram(
            "request_generation_tokens", "Generated tokens of a request", TOKENS, label
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"llm_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"llm_{name}", text, labels, buckets=buckets, registry=self.registry)

    def of(self, model: str) -> ModelMetrics:
        """Returns the metrics of a model. Its name must be that of a served model, never text from a client."""
        if model not in self._models:
            self._models[model] = ModelMetrics(
                prompt_tokens=self._prompt_tokens.labels(model),
                generation_tokens=self._generation_tokens.labels(model),
                prefix_queries=self._prefix_queries.labels(model),
                prefix_hits=self._prefix_hits.labels(model),
                aborts=self._aborts.labels(model),
                first_token=self._first_token.labels(model),
                between_tokens=self._between_tokens.labels(model),
                e2e_latency=self._e2e_latency.labels(model),
                queue=self._queue.labels(model),
                prompt_length=self._prompt_length.labels(model),
                answer_length=self._answer_length.labels(model),
                success=lambda reason: self._success.labels(model, reason),
            )
        return self._models[model]

    def answered(self, method: str, path: str, status: int) -> None:
        """Counts a request. path: the path of the route; those of requests would be endlessly many series."""
        self._requests.labels(method if method in _METHODS else "other", path, str(status)).inc()

    def failed(self, code: str) -> None:
        self._errors.labels(self._bounded(code)).inc()

    def relayed(self, provider: str, status: int, seconds: float) -> None:
        self._providers.labels(provider, str(status)).inc()
        self._provider_seconds.labels(provider).observe(seconds)

    def _bounded(self, code: str) -> str:
        if code not in self._codes and (len(self._codes) >= MAX_CODES or not _CODE.fullmatch(code)):
            return "other"
        self._codes.add(code)
        return code

    def watch(self, engines: Callable[[], Iterable[tuple[str, EngineState]]]) -> None:
        """Reports the state of engines. `engines` returns (model, engine) pairs whenever the metrics are read."""
        self.registry.register(_Engines(engines))

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        Gauge(f"llm_{name}", text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engines:
    """A collector that asks for the engines each time, because models are loaded and unloaded."""

    def __init__(self, engines: Callable[[], Iterable[tuple[str, EngineState]]]) -> None:
        self._engines = engines

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        label = ["model_name"]
        gauges = [GaugeMetricFamily(f"llm_{name}", text, labels=label) for name, text, _ in GAUGES]
        counters = [CounterMetricFamily(f"llm_{name}", text, labels=label) for name, text, _ in COUNTERS]
        families: list[GaugeMetricFamily | CounterMetricFamily] = [*gauges, *counters]
        for model, engine in self._engines():
            for family, (_, _, value) in zip(families, (*GAUGES, *COUNTERS), strict=True):
                family.add_metric([model], value(engine))
        yield from families


GAUGES: tuple[tuple[str, str, Callable[[EngineState], float]], ...] = (
    ("num_requests_running", "Running sequences", lambda engine: engine.num_running),
    ("num_requests_waiting", "Waiting sequences", lambda engine: engine.num_waiting),
    ("kv_cache_blocks_used", "KV cache blocks in use", lambda engine: engine.num_used_blocks),
    ("kv_cache_blocks_total", "KV cache blocks", lambda engine: engine.num_blocks),
    (
        "kv_cache_usage_ratio",
        "Used part of the KV cache, from 0 to 1",
        lambda engine: engine.num_used_blocks / max(1, engine.num_blocks),
    ),
    ("prefix_cache_disk_bytes", "Bytes of the prefix cache on disk", lambda engine: engine.num_disk_bytes),
)
COUNTERS: tuple[tuple[str, str, Callable[[EngineState], float]], ...] = (
    (
        "num_preemptions",
        "Preemptions, in which a sequence gives its KV cache blocks back",
        lambda engine: engine.num_preemptions,
    ),
    ("failed_steps", "Failed steps", lambda engine: engine.num_failed_steps),
    (
        "prefix_cache_disk_hits",
        "Prompt tokens read from the prefix cache on disk",
        lambda engine: engine.num_disk_tokens,
    ),
)
