"""Record: what is known of a request while it is answered; its log line, the metrics and the trace are made of it."""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from telemetry.metrics import ModelMetrics


@dataclass
class RequestRecord:
    """Texts and keys are never in it."""

    request_id: str = ""
    client: str = ""  # the name of the key that it came with
    model: str = ""
    provider: str = ""  # who else answered
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, not computed
    completion_tokens: int = 0
    queue_time: float | None = None  # seconds in the queue
    first_token: float | None = None  # seconds until it came
    finish_reasons: list[str] = field(default_factory=list)
    is_complete: bool = False  # every answer has ended
    error: str | None = None  # its code
    begin: float = field(default_factory=time.perf_counter)
    metrics: ModelMetrics | None = None  # of the local model that answers

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin


_current: ContextVar[RequestRecord] = ContextVar("record")


def begin(record: RequestRecord) -> None:
    """What runs in this task, and in those that it starts, belongs to the record."""
    _current.set(record)


def current() -> RequestRecord:
    """Outside of a request, one that nobody reads."""
    return _current.get(None) or RequestRecord()
