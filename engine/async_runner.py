"""AsyncRunner: on a GPU the next step begins before the CPU has read this one's tokens.

Mostly the next step has the same sequences, each one token longer. That step is started ahead of the scheduler, with
its tokens copied on the GPU. If the scheduler then decides otherwise, the step is dropped and another one computed.
"""

from collections.abc import Callable

from engine.batch import Batch, Span
from engine.model_runner import ModelRunner, RunnerOutput
from engine.sampling_params import SampledToken
from engine.vision import Image


class AsyncRunner:
    """Runs a ModelRunner one step ahead of the scheduler."""

    def __init__(self, runner: ModelRunner, is_quiet: Callable[[], bool]) -> None:
        """is_quiet: tells whether no prompt or command waits that would change the next step."""
        self.runner = runner
        self._is_quiet = is_quiet
        self._started_ahead: RunnerOutput | None = None
        self.num_steps_kept = 0  # since the start: those that the scheduler asked for

    @property
    def num_embeddings(self) -> int:
        return self.runner.num_embeddings

    def encode(self, images: list[Image], limit: int) -> None:
        self.runner.encode(images, limit)

    def run(self, batch: Batch) -> list[list[SampledToken | None]]:
        ahead, self._started_ahead = self._started_ahead, None
        rows = None if ahead is None else _rows(batch, ahead.batch)
        if ahead is not None and rows is not None:
            started = ahead
            self.num_steps_kept += 1
        else:
            self._drop(ahead)
            started = self.runner.start(batch)
            rows = list(range(len(batch.spans)))
        if self._is_quiet():
            self._started_ahead = self._start_next(batch, started, rows)
        tokens = started.tokens()
        return [tokens[row] for row in rows] if started is ahead else tokens

    def _drop(self, ahead: RunnerOutput | None) -> None:
        """Forgets what a dropped step has written to the cache."""
        for span in () if ahead is None else ahead.batch.spans:
            self.runner.cache.rollback(span.sequence, span.start)

    def _start_next(self, batch: Batch, started: RunnerOutput, rows: list[int]) -> RunnerOutput | None:
        """Starts the step of decodes that follows if no sequence ends. None where that cannot be known beforehand.

        rows: for each span of the batch, its row in `started`.
        """
        spans = []
        for span in batch.spans:
            sequence, params = span.sequence, span.sequence.params
            is_last = sequence.num_output_tokens + 1 >= params.max_tokens
            if not span.is_complete or span.draft or is_last or not params.is_independent:
                return None
            if not self.runner.cache.allocate(sequence, sequence.num_tokens + 1):
                return None
            spans.append(Span(sequence, sequence.num_tokens, 1))
        return self.runner.start(Batch(tuple(spans)), (started, rows))


def _rows(batch: Batch, ahead: Batch) -> list[int] | None:
    """Returns the row that each span of the batch has in `ahead`; None where the batch has other spans."""
    row_of = {(span.sequence.number, span.start): row for row, span in enumerate(ahead.spans)}
    rows = [row_of.get((span.sequence.number, span.start)) for span in batch.spans if span.num_tokens == 1]
    return [row for row in rows if row is not None] if len(rows) == len(batch.spans) and None not in rows else None
