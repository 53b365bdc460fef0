"""RequestUsage: the tokens that a request took, and the time; for the client, the log and the metrics."""

import time

from schemas import CompletionTokensDetails, PromptTokensDetails, Timings, Usage
from serving.generation import OutputDelta
from telemetry import request_record
from telemetry.metrics import ModelMetrics


class RequestUsage:
    """Counts the tokens of all choices of a request, and notes them in its record and in the model's metrics."""

    def __init__(self, model: str = "", metrics: ModelMetrics | None = None) -> None:
        self._record = request_record.current()
        self._record.model, self._record.metrics = model, metrics
        self._begin = time.perf_counter()
        self._first_at: float | None = None  # when the first token came
        self._last_at: dict[int, float] = {}  # when each choice's last token came
        self._prompts: list[int] = []  # tokens of each
        self._counts: dict[int, int] = {}  # tokens of each choice
        self._reasoning: dict[int, int] = {}  # tokens of reasoning among them
        self._num_unfinished = 0
        self._answers_per_prompt = 1
        self._cached: dict[int, int] = {}  # tokens of each prompt that none of its answers had to compute

    def start(self, prompt_tokens: list[int], answers_per_prompt: int) -> None:
        self._prompts, self._answers_per_prompt = prompt_tokens, answers_per_prompt
        self._num_unfinished = len(prompt_tokens) * answers_per_prompt
        self._record.prompt_tokens = self._prompt_tokens

    def add(self, delta: OutputDelta) -> bool:
        """Counts a delta, and returns whether it is the first one of its choice."""
        now = time.perf_counter()
        is_first = delta.index not in self._counts
        if is_first:
            self._begin_choice(delta)
        self._note(delta, now, is_first)
        self._first_at = self._first_at or now
        self._counts[delta.index] = delta.num_tokens
        self._reasoning[delta.index] = delta.num_reasoning
        self._num_unfinished -= delta.finish_reason is not None
        self._record.is_complete = self.is_complete
        return is_first

    def _begin_choice(self, delta: OutputDelta) -> None:
        """Notes the prompt's tokens. Each answer looks for them in the cache, also if several have the same prompt."""
        prompt, metrics = delta.index // self._answers_per_prompt, self._record.metrics
        if metrics is not None:
            metrics.queue.observe(delta.queue_time)
            metrics.prefix_queries.inc(self._prompts[prompt])
            metrics.prefix_hits.inc(delta.num_cached_tokens)
            metrics.prompt_tokens.inc(0 if prompt in self._cached else self._prompts[prompt])
        self._cached[prompt] = min(delta.num_cached_tokens, self._cached.get(prompt, delta.num_cached_tokens))
        self._record.cached_tokens = sum(self._cached.values())

    def _note(self, delta: OutputDelta, now: float, is_first: bool) -> None:
        record, metrics = self._record, self._record.metrics
        num_new = delta.num_tokens - self._counts.get(delta.index, 0)
        record.completion_tokens += num_new
        if delta.finish_reason is not None:
            record.finish_reasons.append(delta.finish_reason)
        if self._first_at is None:
            record.queue_time = delta.queue_time
        if metrics is not None:
            metrics.generation_tokens.inc(num_new)
        if not delta.is_ranked:
            self._note_times(delta.index, num_new, now, is_first)

    def _note_times(self, index: int, num_new: int, now: float, is_first: bool) -> None:
        metrics = self._record.metrics
        if self._first_at is None:
            self._record.first_token = now - self._begin
        if metrics is not None:
            if self._first_at is None:
                metrics.first_token.observe(now - self._begin)
            for _ in range(num_new - is_first):  # tokens that came together share the time since the last one
                metrics.between_tokens.observe((now - self._last_at.get(index, now)) / num_new)
        self._last_at[index] = now

    @property
    def _prompt_tokens(self) -> int:
        return sum(self._prompts)

    @property
    def is_complete(self) -> bool:
        return not self._num_unfinished

    @property
    def usage(self) -> Usage:
        completion_tokens = sum(self._counts.values())
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self._prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._cached.values())),
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=sum(self._reasoning.values())),
        )

    @property
    def timings(self) -> Timings:
        now = time.perf_counter()
        first = self._first_at or now
        until_first, generated = max(first - self._begin, 1e-6), max(now - first, 1e-6)  # seconds
        num_tokens = sum(self._counts.values())
        return Timings(
            prompt_n=self._prompt_tokens,
            prompt_ms=until_first * 1000,
            prompt_per_second=self._prompt_tokens / until_first,
            predicted_n=num_tokens,
            predicted_ms=generated * 1000,
            predicted_per_second=max(num_tokens - len(self._counts), 0) / generated,
        )
