"""Engine: prompts of many callers in, their tokens out as they come. One thread steps the model; callers are async."""

import asyncio
import gc
import logging
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from engine.admission_control import AdmissionControl
from engine.batch import Batch
from engine.disk_prefix_cache import DiskPrefixCache
from engine.quantization import STOCK
from engine.sampling_params import SampledToken, SamplingParams
from engine.scheduler import Scheduler
from engine.sequence import OutputCallback, Sequence, Status, TokenOutput
from engine.vision import Image
from engine.worker import Worker
from errors import EngineFailure, Overloaded, Unavailable

log = logging.getLogger(__name__)

ENCODED_TOGETHER = 4  # images in a step, while nothing decodes
STALLED = 300.0  # seconds; a step that takes longer hangs
ENDING = 5.0  # seconds that the current step has to return when the engine closes


@dataclass(frozen=True)
class EngineOptions:
    """The engine's settings, named as in config.py. None: chosen for the device and the model."""

    dtype: str = "auto"
    device_map: str = "auto"
    quantization: str = STOCK
    kv_cache_dtype: str = "auto"  # or "int8"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_mixed_tokens: int | None = None
    max_queued_requests: int = 1024
    max_queued_tokens: int = 2**20
    num_clients: int = 1
    kv_cache_memory: int | None = None
    snapshot_memory: int | None = None
    kv_block_size: int | None = None
    num_speculative_tokens: int = 8
    cache_dir: Path | None = None  # where the result of the check at start is kept; None: nowhere
    prefix_cache_dir: Path | None = None  # where what is in the KV cache is kept; None: nowhere
    prefix_cache_size: int = 8 * 2**30  # bytes of it


class Runner(Protocol):
    """What computes the batches: a ModelRunner, an AsyncRunner around one, or a stand-in for tests."""

    @property
    def num_embeddings(self) -> int: ...

    def run(self, batch: Batch) -> list[list[SampledToken | None]]: ...

    def encode(self, images: list[Image], limit: int) -> None: ...


class OutputCollector:
    """Holds a sequence's outputs until its caller takes them. Only the event loop's thread uses it."""

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
        """Waits for outputs and returns all that are there; once they are taken, raises the error that ended them."""
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
        self.on_failure: Callable[[], object] = lambda: None  # called on the event loop after a fatal error
        self.failure: BaseException | None = None  # the fatal error that ended the worker thread
        self._live: set[Sequence] = set()  # one for each stream() call that has not ended
        self._is_closing = False
        self._has_encoded = False  # the last step, an image beside decodes
        self._step_began: float | None = None  # time.monotonic() at the start of the current step
        self.stalled_after = STALLED
        self.num_failed_steps = 0  # since the start
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker = Worker("engine", lambda: self.scheduler.has_work, self.step, self._end)

    @property
    def max_model_len(self) -> int:
        return self.scheduler.limits.max_model_len

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding table: every token id must be below it, though a tokenizer may know more ids."""
        return self.runner.num_embeddings

    @property
    def needs_boundaries(self) -> bool:
        """Whether a prompt's beginning can be reused only where its recurrent state was kept."""
        return self.scheduler.cache.states is not None

    @property
    def num_running(self) -> int:
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        return max(0, len(self._live) - self.num_running)

    def is_quiet(self) -> bool:
        """Returns whether no prompt waits to run, and no command waits for the worker thread."""
        return not self.scheduler.waiting and not self._worker.has_commands

    @property
    def num_used_blocks(self) -> int:
        return self.scheduler.cache.num_used_blocks

    @property
    def num_blocks(self) -> int:
        return self.scheduler.cache.num_blocks

    @property
    def cache_bytes(self) -> int:
        """The memory of the KV cache and the recurrent states."""
        return self.scheduler.cache.num_bytes

    @property
    def num_preemptions(self) -> int:
        return self.scheduler.num_preemptions

    @property
    def num_disk_tokens(self) -> int:
        """Tokens of prompts that were read from disk since the start."""
        return 0 if self.scheduler.disk is None else self.scheduler.disk.num_tokens_read

    @property
    def num_disk_bytes(self) -> int:
        """Bytes of the prefix cache on disk, as far as known."""
        return 0 if self.scheduler.disk is None else self.scheduler.disk.folder.num_bytes

    @property
    def is_stalled(self) -> bool:
        """Whether the current step has taken longer than any should: a device that hangs does not raise."""
        begin = self._step_began
        return begin is not None and time.monotonic() - begin > self.stalled_after

    def start(self) -> None:
        """Starts the worker thread, whose outputs go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._worker.start()
        if self.scheduler.disk is not None:
            self.scheduler.disk.start(self.post)

    async def stream(
        self,
        prompt_ids: list[int],
        params: SamplingParams,
        priority: int = 0,
        images: tuple[Image, ...] = (),
        client: str = "",
        boundaries: Collection[int] = (),
    ) -> AsyncGenerator[list[TokenOutput]]:
        """Yields the answer as it is computed: each time all outputs that are new, mostly one token.

        The last output has a finish_reason. Leaving the iterator aborts the sequence. Prompts with a smaller `priority`
        are computed first; within one priority, clients take turns. `boundaries`: numbers of tokens after which other
        prompts may go on differently, where a recurrent state is worth keeping.

        Raises Overloaded where too many sequences wait (`check_room` also bounds their tokens), Unavailable where the
        engine is closing or has stopped, EngineFailure where a step failed.
        """
        assert 0 < len(prompt_ids) < self.max_model_len, "the caller checks the context"
        assert max(prompt_ids) < self.num_embeddings, "the caller checks the token ids"
        self.check_open(1, client)
        collector = OutputCollector()
        sequence = Sequence(
            prompt_ids, params, on_output=collector.put, priority=priority, images=images, client=client
        )
        for place in boundaries:
            sequence.add_boundary(place)
        self._live.add(sequence)
        self.admission.take(client)
        self.post(partial(self.scheduler.add, sequence))
        try:
            while True:
                outputs = await collector.take()
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
        """Raises what `check_open` raises, and Overloaded where `num_tokens` more tokens of prompts would exceed
        `max_queued_tokens`, unless none of the client's own prompts waits yet."""
        self.check_open(num_sequences, client)
        waiting = [sequence for sequence in self._live if sequence.status is Status.WAITING]
        num_waiting = sum(len(sequence.prompt_ids) for sequence in waiting)
        is_first = not any(sequence.client == client for sequence in waiting)
        if num_waiting + num_tokens > self.max_queued_tokens and not is_first:
            raise Overloaded(f"Prompts with {num_waiting} tokens are queued already; try again later.", retry_after=5)

    async def close(self, timeout: float = 0.0, patience: float = ENDING) -> None:
        """Lets sequences finish for `timeout` seconds, ends the thread, and gives the remaining ones an error. The
        thread is abandoned where its step takes `patience` seconds more, since the device may hang."""
        self._is_closing, deadline = True, time.monotonic() + timeout
        await self._worker.close(lambda: self._live, timeout, patience)
        self._fail_all(Unavailable("The server is shutting down.", retry_after=10))
        if self.scheduler.disk is not None:
            await self._close_disk(self.scheduler.disk, max(patience, deadline - time.monotonic()))

    async def _close_disk(self, disk: DiskPrefixCache, timeout: float) -> None:
        """Writes what is in the cache, also of sequences that did not finish."""
        for sequence in [] if self._worker.is_alive else self.scheduler.running:
            disk.save(sequence)
        await disk.close(timeout)

    def _end(self, error: BaseException | None) -> None:
        """Handles an error that no step could handle: it ends the engine, and /health reports it."""
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
        """Computes one batch. If that fails, its sequences get an error; the others, and the engine, go on.

        Beside decodes, at most every second step encodes an image, and such a step computes no prompts: answers wait
        for one of them at a time.
        """
        self._step_began = time.monotonic()
        is_beside = self.scheduler.num_decoding > 0
        try:
            images = [] if is_beside and self._has_encoded else self.scheduler.images_to_encode()
            self._has_encoded = is_beside and bool(images)
            is_well = self._encode_images(images)
            if is_well and (batch := self.scheduler.schedule(has_prompts=not self._has_encoded)).spans:
                self._compute(batch)
        finally:
            self._step_began = None

    def _compute(self, batch: Batch, is_last_try: bool = False) -> None:
        """Computes a batch, and computes it again in halves where it fails: one of its sequences may be the cause, or
        the memory that all of them take. A sequence that fails alone is computed again with fewer and fewer tokens; it
        gets the error when the smallest number of them has failed twice."""
        start = time.perf_counter()
        try:
            sampled = self.runner.run(batch)
        except Exception as error:
            log.warning(
                "a step with %d sequences and %d tokens failed: %s: %s",
                len(batch.spans),
                batch.num_tokens,
                type(error).__name__,
                str(error).partition("\n")[0],
            )
            if is_fatal(error):
                raise
            self.num_failed_steps += 1
            return self._recover(batch, error, is_last_try)
        seconds = time.perf_counter() - start
        self.scheduler.prefill_budget.note(batch.num_decodes, batch.num_prompt_tokens, seconds)
        not_a_number = EngineFailure("The model computed a value that is not a number (NaN).")
        outputs = self.scheduler.update(batch, sampled)
        self._deliver([(sequence.on_output, output or not_a_number) for sequence, output in outputs])

    def _recover(self, batch: Batch, error: Exception, is_last_try: bool) -> None:
        release_memory(error)
        if self.scheduler.cache.states is not None:
            return self._isolate(batch, error)
        for span in batch.spans:
            self.scheduler.cache.rollback(span.sequence, span.start)
        half = len(batch.spans) // 2
        if half:
            self._compute(Batch(batch.spans[:half]))
            self._compute(Batch(batch.spans[half:]))
            return
        (span,) = batch.spans
        if not is_last_try:
            smaller = span.smaller()
            return self._compute(Batch((smaller,)), is_last_try=smaller == span)
        self._give_up(span.sequence, error)

    def _isolate(self, batch: Batch, error: Exception) -> None:
        """Has the sequences of a failed batch computed again, since recurrent states cannot go back; gives one up that
        has failed before and now fails alone with a single token."""
        first = batch.spans[0]
        if len(batch.spans) == 1 and first.smaller() == first and self.scheduler.is_suspect(first.sequence):
            return self._give_up(first.sequence, error)
        self.scheduler.isolate(batch)

    def _give_up(self, sequence: Sequence, error: Exception) -> None:
        log.error("the model failed on a sequence", exc_info=error)
        failed = EngineFailure("The model failed on this request; the error is in the server's log.")
        self.scheduler.cache.erase(sequence)  # the step may have written NaN
        self.scheduler.remove(sequence)
        self._deliver([(sequence.on_output, failed)])

    def _encode_images(self, images: list[Image]) -> bool:
        """Encodes the first of the images; only one while sequences decode. False where one failed."""
        if not images:
            return True
        bad = self._encode(images, 1 if self.scheduler.num_decoding else ENCODED_TOGETHER)
        failed = EngineFailure("The model failed on an image; the error is in the server's log.")
        owners = [s for s in [*self.scheduler.running, *self.scheduler.waiting] if bad & {*s.images}]
        for sequence in owners:
            self.scheduler.remove(sequence)
        self._deliver([(sequence.on_output, failed) for sequence in owners])
        return not bad

    def _encode(self, images: list[Image], limit: int) -> set[Image]:
        """Encodes at most `limit` of the images, and returns those that the model fails on."""
        try:
            self.runner.encode(images, limit)
        except Exception as error:
            if is_fatal(error):
                raise
            release_memory(error)
            missing = [image for image in images if image.features is None]
            if len(missing) > 1:
                return {bad for image in missing[:limit] for bad in self._encode([image], 1)}
            log.exception("an image could not be encoded")
            return set(missing)
        return set()

    def _deliver(self, outputs: list[tuple[OutputCallback, TokenOutput | Exception]]) -> None:
        if outputs and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_call_back, outputs)


def is_fatal(error: Exception) -> bool:
    """Returns whether nothing can be computed any more: a GPU that has reported an error reports it in every later
    call."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def release_memory(error: BaseException) -> None:
    """Frees what a failed step had computed, which the error's traceback still holds."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _call_back(outputs: list[tuple[OutputCallback, TokenOutput | Exception]]) -> None:
    for on_output, output in outputs:
        on_output(output)
