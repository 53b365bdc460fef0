"""Engine: many callers' prompts in, their tokens out as they come. One thread steps the model; callers stay async."""

import asyncio
import gc
import logging
import time
import traceback
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from engine.admission_control import AdmissionControl
from engine.batch import Batch
from engine.quantization import STOCK
from engine.sampling_params import SampledToken, SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import OutputCallback, Sequence, Status, TokenOutput
from engine.vision import Image
from engine.worker import Worker
from errors import EngineFailure, Overloaded, Unavailable

log = logging.getLogger(__name__)

ENCODED_TOGETHER = 4  # images
STALLED = 300.0  # seconds of a step
ENDING = 5.0  # seconds of the step under way, once the engine closes


@dataclass(frozen=True)
class EngineOptions:
    """What can be set; names and meaning are those of the settings. None: chosen for the device and model."""

    dtype: str = "auto"
    device_map: str = "auto"
    quantization: str = STOCK
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_mixed_tokens: int | None = None
    max_queued_requests: int = 1024
    max_queued_tokens: int = 2**20
    num_clients: int = 1
    kv_cache_memory: int | None = None
    kv_block_size: int | None = None
    num_speculative_tokens: int = 8
    cache_dir: Path | None = None  # None: what the check at start found is not remembered


class Runner(Protocol):
    """What computes the batches: a ModelRunner, or something that stands in for it."""

    @property
    def num_embeddings(self) -> int: ...

    def run(self, batch: Batch) -> list[list[SampledToken | None]]: ...

    def encode(self, images: list[Image], most: int) -> None: ...


class OutputCollector:
    """A sequence's outputs on their way to the caller; it belongs to the event loop's thread."""

    def __init__(self) -> None:
        self._outputs: list[TokenOutput] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: TokenOutput | Exception) -> None:
        if isinstance(output, Exception):
            self._error = self._error or output
        else:
            self._outputs.append(output)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[TokenOutput]:
        """All that has come, as soon as there is something; raises the error that came after the outputs."""
        if not self._outputs and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs, self._outputs = self._outputs, []
        if not outputs and self._error is not None:
            raise self._error
        return outputs


class Engine:
    def __init__(self, runner: Runner, scheduler: Scheduler, options: EngineOptions = EngineOptions()) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.admission = AdmissionControl(
            options.max_queued_requests + scheduler.limits.max_num_seqs, options.num_clients
        )
        self.max_queued_tokens = options.max_queued_tokens
        self.on_failure: Callable[[], object] = lambda: None  # called on the event loop when the thread has ended so
        self.failure: BaseException | None = None  # set once, when the worker thread has ended by an error
        self._live: set[Sequence] = set()  # those of stream() calls that have not ended
        self._is_closing = False
        self._step_began: float | None = None  # of the one under way
        self.stalled_after = STALLED
        self.num_failed_steps = 0  # since the start
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker = Worker("engine", lambda: self.scheduler.has_work, self.step, self._end)

    @property
    def max_model_len(self) -> int:
        return self.scheduler.limits.max_model_len

    @property
    def num_embeddings(self) -> int:
        """Token ids are below it; a tokenizer may know more."""
        return self.runner.num_embeddings

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return max(0, len(self._live) - self.num_running)

    def is_quiet(self) -> bool:
        """Whether no prompt waits to run, and no command waits for the worker thread."""
        return not self.scheduler.waiting and not self._worker.has_commands

    @property
    def num_used_blocks(self) -> int:
        return self.scheduler.cache.num_used_blocks

    @property
    def num_blocks(self) -> int:
        return self.scheduler.cache.num_blocks

    @property
    def num_preemptions(self) -> int:
        return self.scheduler.num_preemptions

    @property
    def is_stalled(self) -> bool:
        """Whether a step takes longer than any should: a device that hangs does not raise."""
        begin = self._step_began
        return begin is not None and time.monotonic() - begin > self.stalled_after

    def start(self) -> None:
        """Starts the worker thread; outputs go to the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()

    async def stream(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        priority: int = 0,
        images: tuple[Image, ...] = (),
        client: str = "",
    ) -> AsyncGenerator[list[TokenOutput]]:
        """The answer as it comes: what is there whenever the caller is ready for more, mostly one token.

        Its last output has a finish_reason. Leaving the iterator aborts the sequence. The prompts of a smaller
        `priority` are computed first; among those of one priority, clients take turns.

        Raises Overloaded while too many wait, whose tokens are the caller's to check; Unavailable while closing,
        EngineFailure when a step failed.
        """
        assert 0 < len(prompt_ids) < self.max_model_len, "the caller checks the context"
        assert max(prompt_ids) < self.num_embeddings, "the caller checks the token ids"
        self.check_open(1, client)
        mailbox = OutputCollector()
        sequence = Sequence(prompt_ids, params, mailbox.put, priority, images, client)
        self._live.add(sequence)
        self.admission.take(client)
        self.post(partial(self.scheduler.add, sequence))
        try:
            while True:
                outputs = await mailbox.take()
                yield outputs
                if outputs[-1].finish_reason:
                    return
        finally:
            self._live.discard(sequence)
            self.admission.leave(client)
            self.post(partial(self.scheduler.remove, sequence))

    def post(self, command: Callable[[], object]) -> None:
        """Has the worker thread call `command` between two steps."""
        self._worker.post(command)

    def check_open(self, num_sequences: int, client: str = "") -> None:
        """Raises what `stream` would raise for `num_sequences` more of them, before the first begins."""
        if self.failure is not None:
            raise Unavailable("The engine stopped after an error; try again later.", retry_after=30)
        if self._is_closing:
            raise Unavailable("The server is shutting down.", retry_after=10)
        if not self.admission.has(num_sequences, client):
            raise Overloaded(
                f"{len(self._live)} sequences are running or queued already; try again later.", retry_after=5
            )

    def check_room(self, num_sequences: int, num_tokens: int, client: str = "") -> None:
        """As `check_open`; raises Overloaded also where prompts of so many tokens would wait behind too many others,
        and one of the client's own is among these."""
        self.check_open(num_sequences, client)
        waiting = [sequence for sequence in self._live if sequence.status is Status.WAITING]
        num_waiting = sum(len(sequence.prompt_ids) for sequence in waiting)
        is_first = not any(sequence.client == client for sequence in waiting)
        if num_waiting + num_tokens > self.max_queued_tokens and not is_first:
            raise Overloaded(f"Prompts with {num_waiting} tokens are queued already; try again later.", retry_after=5)

    async def close(self, timeout: float = 0.0, patience: float = ENDING) -> None:
        """Lets running sequences finish for `timeout` seconds, ends the thread, and gives the others an error. A step
        that takes longer than `patience` seconds more is left to itself: it may hang."""
        self._is_closing = True
        await self._worker.close(lambda: self._live, timeout, patience)
        self._fail_all(Unavailable("The server is shutting down.", retry_after=10))

    def _end(self, error: BaseException | None) -> None:
        """What escapes a step's own handling ends the engine: its callers get an error, and /health reports it."""
        if error is None:
            return
        log.error("the engine stopped after an error", exc_info=error)
        self.failure = error
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._fail)

    def _fail(self) -> None:
        self._fail_all(EngineFailure("The engine stopped after an error."))
        self.on_failure()

    def _fail_all(self, error: Exception) -> None:
        for sequence in self._live:
            sequence.on_output(error)

    def step(self) -> None:
        """Computes one batch. Its sequences are told if that fails; the others, and the engine, live on."""
        self._step_began = time.monotonic()
        try:
            if self._encode_images() and (batch := self.scheduler.schedule()).spans:
                self._compute(batch)
        finally:
            self._step_began = None

    def _compute(self, batch: Batch, is_last_try: bool = False) -> None:
        """A batch that fails is computed again in halves: one sequence of it may be why, or the memory that all of
        them take. Whoever fails alone, and again, is told."""
        start = time.perf_counter()
        try:
            sampled = self.runner.run(batch)
        except Exception as error:
            log.warning(
                "a step with %d sequences and %d tokens failed: %s: %s",
                *(len(batch.spans), batch.num_tokens, type(error).__name__, str(error).partition("\n")[0]),
            )
            if is_fatal(error):
                raise
            self.num_failed_steps += 1
            return self._recover(batch, error, is_last_try)
        seconds = time.perf_counter() - start
        self.scheduler.prefill_budget.note(batch.num_decodes, batch.num_prompt_tokens, seconds)
        bad = EngineFailure("The model computed a value that is not a number (NaN).")
        self._deliver(
            [(sequence.on_output, output or bad) for sequence, output in self.scheduler.update(batch, sampled)]
        )

    def _recover(self, batch: Batch, error: Exception, is_last_try: bool) -> None:
        release_memory(error)
        for span in batch.spans:
            self.scheduler.cache.rollback(span.sequence, span.start)
        half = len(batch.spans) // 2
        if half:
            self._compute(Batch(batch.spans[:half]))
            self._compute(Batch(batch.spans[half:]))
            return
        (span,) = batch.spans
        if not is_last_try:
            less = span.lesser()
            return self._compute(Batch((less,)), is_last_try=less == span)
        log.error("the model failed on a sequence", exc_info=error)
        failed = EngineFailure("The model failed on this request; the error is in the server's log.")
        self.scheduler.cache.erase(span.sequence)  # whatever of it was written
        self.scheduler.remove(span.sequence)
        self._deliver([(span.sequence.on_output, failed)])

    def _encode_images(self) -> bool:
        """Of those that prompts wait for some at a time, and one while sequences decode. False if one failed."""
        wanted = self.scheduler.wanted_images()
        if not wanted:
            return True
        bad = self._encode(wanted, 1 if self.scheduler.num_decoding else ENCODED_TOGETHER)
        failed = EngineFailure("The model failed on an image; the error is in the server's log.")
        owners = [s for s in [*self.scheduler.running, *self.scheduler.waiting] if bad & {*s.images}]
        for sequence in owners:
            self.scheduler.remove(sequence)
        self._deliver([(sequence.on_output, failed) for sequence in owners])
        return not bad

    def _encode(self, images: list[Image], most: int) -> set[Image]:
        """Those that the model fails on."""
        try:
            self.runner.encode(images, most)
        except Exception as error:
            if is_fatal(error):
                raise
            release_memory(error)
            missing = [image for image in images if image.features is None]
            if len(missing) > 1:
                return {bad for image in missing[:most] for bad in self._encode([image], 1)}
            log.exception("an image could not be encoded")
            return set(missing)
        return set()

    def _deliver(self, outputs: list[tuple[OutputCallback, TokenOutput | Exception]]) -> None:
        if outputs and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_call_sinks, outputs)


def is_fatal(error: Exception) -> bool:
    """Whether nothing can be computed any more: a GPU that reported an error reports it for ever."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def release_memory(error: BaseException) -> None:
    """What a step that ran out of memory left behind: the error's traceback holds all that it had computed."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _call_sinks(outputs: list[tuple[OutputCallback, TokenOutput | Exception]]) -> None:
    for on_output, output in outputs:
        on_output(output)
