"""Embedder: texts in, vectors out; or pairs of texts in, scores out. One thread owns the model; callers are async.

It does not know which models there are, nor where their files come from.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from engine.embedding.argument_errors import ArgumentError, TextTooLong
from engine.embedding.text_models import TASKS, TaskPrompt, TextModel, Vectors
from engine.embedding.text_queue import Item, TextQueue
from engine.worker import Worker
from errors import EngineFailure, Overloaded, Unavailable

log = logging.getLogger(__name__)
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}  # in a batch, padding included
ENDING = 5.0  # seconds that the current batch has to return when the embedder closes
MAX_WAITING = 2**16  # texts; more are refused
CHARACTERS, CHARACTERS_PER_TOKEN = 2**16, 200  # of a text are tokenized, plus so many per token that the model reads


@dataclass(frozen=True)
class Embeddings:
    vectors: Vectors  # (texts, dims)
    num_tokens: int  # computed: after truncation, special tokens included
    num_truncated: int  # texts


@dataclass(frozen=True)
class Scores:
    values: list[float]  # one per document
    num_tokens: int
    num_truncated: int  # pairs


@dataclass(eq=False)
class Job:
    """The texts of one call. Once it is posted, only the worker thread changes it, except `is_dropped`."""

    texts: Sequence[Any]
    prompt: TaskPrompt
    may_truncate: bool
    argument: str  # the parameter that the texts were passed as
    deliver: Callable[["Job", Exception | None], None]  # called once, when it is complete or has failed
    rows: list[Vectors | None] = field(default_factory=list)  # of each text, None until it is computed
    num_left: int = 0  # texts
    is_dropped: bool = False  # the caller has left
    num_tokens: int = 0
    num_truncated: int = 0


@dataclass(frozen=True)
class EmbedderInfo:
    """A model's facts beside its weights."""

    kind: Literal["embeddings", "cross-encoder"] = "embeddings"
    dims: int = 0
    may_shorten: bool = False  # its vectors can be cut
    prompts: dict[str, str] = field(default_factory=dict)  # name -> text
    default_prompt: str = ""
    similarity: str = "cosine"  # a key of SIMILARITIES: how its vectors are compared
    num_bytes: int = 0


class Embedder:
    """Computes the texts of many callers in batches, on one thread."""

    def __init__(self, model: TextModel, about: EmbedderInfo, max_batch_tokens: int = BATCH_TOKENS["cpu"]) -> None:
        self.about = about
        self.model = model
        self.num_waiting = 0  # texts of calls under way
        self._queue: TextQueue[Job] = TextQueue(max_batch_tokens)
        self._is_closing = False
        self._worker = Worker("embedder", lambda: self._queue, self._step, self._end)
        self._worker.start()

    async def embed(
        self,
        texts: Sequence[str | list[int]],
        prompt_name: str | None = None,
        dimensions: int | None = None,
        may_truncate: bool = True,
    ) -> Embeddings:
        """Computes a vector for each text.

        texts: a list of token ids, of the model's own vocabulary, stands for the text that they decode to;
        prompt_name: a key of `about.prompts`, None for the default; dimensions: cuts the vectors; may_truncate: texts
        that are too long are cut.

        Raises ArgumentError, TextTooLong, Overloaded, Unavailable, EngineFailure. Where the caller is cancelled, the
        texts that are in no batch yet are dropped."""
        self._check_dimensions(dimensions)
        job = await self._compute(texts, self._prompt(prompt_name), may_truncate, "texts")
        vectors = np.stack([row for row in job.rows if row is not None])
        return Embeddings(shortened(vectors, dimensions), job.num_tokens, job.num_truncated)

    async def score(self, question: str, documents: Sequence[str], may_truncate: bool = True) -> Scores:
        """Scores how well each document answers the question: with a cross-encoder, else by the vectors' similarity.
        Raises what `embed` raises."""
        if self.about.kind == "cross-encoder":
            pairs = [(question, document) for document in documents]
            job = await self._compute(pairs, TaskPrompt(self.about.default_prompt), may_truncate, "documents")
            return Scores([float(row[-1]) for row in job.rows if row is not None], job.num_tokens, job.num_truncated)
        jobs = [
            await self._compute([question], self._prompt_of("query"), may_truncate, "question"),
            await self._compute(documents, self._prompt_of("document"), may_truncate, "documents"),
        ]
        query, rows = (np.stack([row for row in job.rows if row is not None]) for job in jobs)
        return Scores(
            values=SIMILARITIES[self.about.similarity](rows, query[0]).tolist(),
            num_tokens=sum(job.num_tokens for job in jobs),
            num_truncated=sum(job.num_truncated for job in jobs),
        )

    def _check_dimensions(self, dimensions: int | None) -> None:
        if dimensions is not None and dimensions > self.about.dims:
            raise ArgumentError(
                f"dimensions must be at most {self.about.dims}, the size of the model's vectors.", "dimensions"
            )
        if dimensions not in (None, self.about.dims) and not self.about.may_shorten:
            raise ArgumentError(
                f"dimensions must be {self.about.dims}, because the model was not trained for shorter "
                "vectors (ALLOW_TRUNCATED_DIMS=true shortens them anyway).",
                "dimensions",
            )

    def _prompt(self, name: str | None) -> TaskPrompt:
        if name is None:
            return TaskPrompt(self.about.default_prompt)
        if name not in self.about.prompts:
            names = ", ".join(sorted(self.about.prompts)) or "none"
            raise ArgumentError(f"prompt_name must be one of the model's prompts: {names}.", "prompt_name")
        task = next((task for task, usual in TASKS.items() if name in usual), None)
        return TaskPrompt(self.about.prompts[name], task)

    def _prompt_of(self, task: str) -> TaskPrompt:
        """Chooses the prompt for a task as sentence-transformers' encode_query and encode_document do."""
        name = next((name for name in TASKS[task] if name in self.about.prompts), None)
        return TaskPrompt(self.about.default_prompt if name is None else self.about.prompts[name], task)

    async def _compute(self, texts: Sequence[Any], prompt: TaskPrompt, may_truncate: bool, argument: str) -> Job:
        """Has the worker thread compute the texts, and waits for them."""
        if self._is_closing:
            raise Unavailable("The model was unloaded; try again later.", retry_after=5)
        if self.num_waiting + len(texts) > MAX_WAITING:
            raise Overloaded(f"{self.num_waiting} texts are queued already; try again later.", retry_after=5)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def deliver(job: Job, error: Exception | None) -> None:
            with suppress(RuntimeError):  # the loop is closed, so no caller waits
                loop.call_soon_threadsafe(_finish, done, error)

        job = Job(
            texts=texts,
            prompt=prompt,
            may_truncate=may_truncate,
            argument=argument,
            deliver=deliver,
            rows=[None] * len(texts),
            num_left=len(texts),
        )
        self.num_waiting += len(texts)
        self._worker.post(partial(self._begin, job))
        try:
            await done
        finally:
            self.num_waiting -= len(texts)
            if job.num_left:
                job.is_dropped = True
                self._worker.post(partial(self._queue.remove, [job]))
        return job

    async def close(self, timeout: float | None = None, patience: float = ENDING) -> None:
        """Lets calls finish for `timeout` seconds, or however long they take, and ends the thread, which is abandoned
        where its batch takes `patience` seconds more. Frees the model, unless it is still computing."""
        self._is_closing = True
        await self._worker.close(lambda: self.num_waiting, timeout, patience)
        if not self._worker.is_alive:
            self.model.release()

    # --- the worker thread

    def _end(self, error: BaseException | None) -> None:
        """Fails the calls whose texts are still queued."""
        reason: Exception = Unavailable("The server is shutting down.", retry_after=10)
        if error is not None:
            log.error("the embedder stopped after an error", exc_info=error)
            reason = EngineFailure("The model failed on this request; the error is in the server's log.")
        jobs: set[Job] = set()
        while batch := self._queue.take():
            jobs |= {item.job for item in batch}
        for job in jobs:
            job.deliver(job, reason)

    def _begin(self, job: Job) -> None:
        """Tokenizes a job's texts and queues them."""
        if job.is_dropped:
            return
        limit = self.model.max_length
        max_characters = CHARACTERS + limit * CHARACTERS_PER_TOKEN
        try:
            whole = [self._decode(text) if isinstance(text, list) else text for text in job.texts]
            texts = [_cut(text, max_characters) for text in whole]
            lengths = self.model.lengths(texts, job.prompt)
        except ArgumentError as error:
            return job.deliver(job, error)
        except Exception:
            log.exception("%d texts could not be tokenized", len(job.texts))
            return job.deliver(
                job, EngineFailure("The model failed on this request; the error is in the server's log.")
            )
        lengths = [
            max(length, limit + 1) if text != cut else length
            for text, cut, length in zip(whole, texts, lengths, strict=True)
        ]
        job.num_truncated = sum(length > limit for length in lengths)
        if job.num_truncated and not job.may_truncate:
            return job.deliver(job, self._too_long(job, lengths))
        self._queue.add(job, texts, [min(length, limit) for length in lengths], job.prompt)

    def _decode(self, token_ids: list[int]) -> str:
        tokenizer = self.model.tokenizer
        text = ""
        if max(token_ids) < len(tokenizer):
            text = str(tokenizer.decode(token_ids, skip_special_tokens=True))
        if not text:
            raise ArgumentError("The token ids do not decode to text.", "texts")
        return text

    def _too_long(self, job: Job, lengths: list[int]) -> Exception:
        number, length = next((i, length) for i, length in enumerate(lengths) if length > self.model.max_length)
        return TextTooLong(
            f"This model's maximum context length is {self.model.max_length} tokens, and text {number + 1} "
            f"has {length} tokens. "
            "Please reduce its length. (context_length_exceeded)",
            job.argument,
        )

    def _step(self) -> None:
        """Computes the next batch."""
        if batch := self._queue.take():
            self._compute_batch(batch)

    def _compute_batch(self, batch: Sequence[Item[Job]]) -> None:
        """Computes a batch and delivers the jobs that are complete. A batch that fails is computed again job by job,
        since a text of one of them may be the cause; a job that fails alone gets the error."""
        try:
            rows, counts = self.model.compute([item.text for item in batch], batch[0].job.prompt)
            if not np.isfinite(rows).all():
                raise ValueError("the model computed a value that is not a number")
        except Exception:
            jobs = list(dict.fromkeys(item.job for item in batch))
            if len(jobs) > 1:
                for job in jobs:
                    self._compute_batch([item for item in batch if item.job is job])
                return
            log.exception("a batch of %d texts failed", len(batch))
            self._queue.remove(jobs)
            jobs[0].deliver(
                jobs[0], EngineFailure("The model failed on this request; the error is in the server's log.")
            )
            return
        for item, row, count in zip(batch, rows, counts, strict=True):
            job = item.job
            job.rows[item.index] = row
            job.num_tokens += count
            job.num_left -= 1
            if not job.num_left:
                job.deliver(job, None)


def _cut(text: Any, max_characters: int) -> Any:
    """Shortens a text, or both texts of a pair, to what a model could read, so that no more is tokenized."""
    return tuple(part[:max_characters] for part in text) if isinstance(text, tuple) else text[:max_characters]


def _finish(done: "asyncio.Future[None]", error: Exception | None) -> None:
    if not done.done():
        done.set_result(None) if error is None else done.set_exception(error)


def normalised(vectors: Vectors) -> Vectors:
    """Scales vectors to length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


# name -> function of rows (n, dims) and one vector (dims,): (n,), the larger, the more alike
SIMILARITIES: dict[str, Callable[[Vectors, Vectors], Vectors]] = {
    "cosine": lambda rows, one: normalised(rows) @ normalised(one[None])[0],
    "dot": lambda rows, one: rows @ one,
    "euclidean": lambda rows, one: -np.linalg.norm(rows - one, axis=1),
    "manhattan": lambda rows, one: -np.abs(rows - one).sum(axis=1),
}


def shortened(vectors: Vectors, dimensions: int | None) -> Vectors:
    """Cuts vectors and scales them to length 1 again; None: leaves them as they are."""
    return vectors if dimensions in (None, vectors.shape[1]) else normalised(vectors[:, :dimensions])
