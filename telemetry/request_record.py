"""RequestRecord: the facts of one request, which its log line, the metrics and the trace are made of."""

import time
from contextvars import ContextVar
from dataclasses import dataclass, field

from telemetry.metrics import ModelMetrics


@dataclass
class RequestRecord:
    """It never holds prompts, answers or API keys."""

    request_id: str = ""
    client: str = ""  # name of its API key
    model: str = ""
    provider: str = ""  # that answered; empty for a model of this process
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens found in the prefix cache
    completion_tokens: int = 0
    queue_time: float | None = None  # seconds in the queue
    first_token: float | None = None  # seconds from the begin until the first token
    finish_reasons: list[str] = field(default_factory=list)
    is_complete: bool = False  # whether all choices have finished
    error: str | None = None  # code of the error that was sent
    begin: float = field(default_factory=time.perf_counter)
    metrics: ModelMetrics | None = None  # of the model of this process that answers

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begin


_current: ContextVar[RequestRecord] = ContextVar("record")


def begin(record: RequestRecord) -> None:
    """Makes `record` the current one of this task and of the tasks that it starts."""
    _current.set(record)


def current() -> RequestRecord:
    """Returns the record of the current request; outside of a request a new one, which is discarded."""
    return _current.get(None) or RequestRecord()
