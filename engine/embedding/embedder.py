"""Embedder: texts in, vectors out; or pairs of texts in, scores out. One thread owns the model; callers stay async.

It does not know which models there are, nor where their files come from.
"""

import asyncio
import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from engine.embedding.text_queue import Item, TextQueue
from engine.threads import set_threads
from engine.worker import Worker
from errors import (
    ContextLengthExceeded,
    EngineFailure,
    InvalidRequest,
    ModelLoadError,
    Overloaded,
    Unavailable,
    first_line,
)

log = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}  # with padding
ENDING = 5.0  # seconds of the batch under way, once the embedder closes
MAX_WAITING = 2**16  # texts; more are refused
CHARACTERS, CHARACTERS_PER_TOKEN = 2**16, 200  # of a text are tokenized; what is behind them is cut unseen
TASKS = {"query": ("query",), "document": ("document", "passage", "corpus")}  # with the names of their prompts
TEXT_ALONE = {"text", "message"}  # kinds of input
OWN_MODULES = "sentence_transformers."  # what a modules.json may name: other classes would be a stranger's code
CROSS_ENCODER = "ForSequenceClassification"
CAUSAL = ("ForCausalLM", "LMHeadModel")
OTHER_KINDS = {"SparseEncoder": "sparse vectors", "MultiVectorEncoder": "a vector for each token"}
OTHER_MODULES = re.compile(r"sentence_transformers\.(sparse|multi_vector)_encoder\.")
LATE = re.compile("colbert", re.IGNORECASE)  # architectures that compare token by token
POSITIVE = re.compile(
    r"(is[_ ])?(relevant|positive|yes|true|match|matches|entailment|duplicate|related)", re.IGNORECASE
)
MATRYOSHKA = re.compile(  # models that were trained so that a vector's beginning is a vector too
    r"embeddinggemma|qwen3-embedding|nomic-embed-text-v(1\.5|2)|text-embedding|mxbai-embed-(large|2d)|matryoshka"
    r"|arctic-embed-(m-v1\.5|[ml]-v2)|jina-embeddings-v[345]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Prompt:
    """What a model is told of a text."""

    text: str = ""  # stands before it
    task: str | None = None  # query or document: the way that it takes through a model that has several


@dataclass(frozen=True)
class Embeddings:
    vectors: Vectors  # (texts, dims)
    num_tokens: int  # computed: after truncation, with the special ones
    num_truncated: int  # texts


@dataclass(frozen=True)
class Scores:
    values: list[float]  # one per document
    num_tokens: int
    num_truncated: int  # pairs


@dataclass(eq=False)
class Job:
    """What one caller waits for; after its making it belongs to the worker thread."""

    texts: Sequence[Any]
    prompt: Prompt
    may_truncate: bool
    param: str  # the request's field that the texts are from
    deliver: Callable[["Job", Exception | None], None]
    rows: list[Vectors | None] = field(default_factory=list)
    num_left: int = 0
    is_dropped: bool = False  # its caller has left
    num_tokens: int = 0
    num_truncated: int = 0


class TextModel(Protocol):
    """What computes: an Encoder, a PairScorer, or something that stands in for them."""

    max_length: int  # tokens of a text
    tokenizer: Any  # transformers'

    def lengths(self, texts: Sequence[Any], prompt: Prompt) -> list[int]:
        """Tokens of each, uncut, the special ones included."""
        ...

    def compute(self, texts: Sequence[Any], prompt: Prompt) -> tuple[Vectors, list[int]]:
        """A row for each, and the tokens that it took."""
        ...

    def release(self) -> None:
        """Gives its memory back."""
        ...


class _Modules:
    """What both kinds of sentence-transformers' models share."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.tokenizer = model.tokenizer
        limit = model.max_seq_length
        self.max_length = int(limit) if limit and math.isfinite(limit) else 2**31

    def release(self) -> None:
        """At once: what refers to itself, as these models do, stays until a collection of garbage, or longer."""
        self.model.to("meta")

    def lengths(self, texts: Sequence[Any], prompt: Prompt) -> list[int]:
        """Of a model with a chat template it is a guess, and what the template adds is missing."""
        lead = prompt.text
        whole = [(lead + text[0], text[1]) if isinstance(text, tuple) else lead + text for text in texts]
        encoded = self.tokenizer(whole, truncation=False, padding=False, return_attention_mask=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def _forward(self, texts: Sequence[Any], prompt: Prompt, name: str) -> tuple[torch.Tensor, list[int]]:
        """The steps of sentence-transformers' own `encode` and `predict` for one batch."""
        task = {} if prompt.task is None else {"task": prompt.task}
        features = self.model.preprocess(list(texts), prompt=prompt.text or None, **task)
        features = {
            key: getattr(value, "to", lambda _, same=value: same)(self.model.device) for key, value in features.items()
        }
        num_tokens = features["attention_mask"].sum(1).tolist()
        with torch.inference_mode():
            return self.model(features, **task)[name], num_tokens


class Encoder(_Modules):
    """A bi-encoder: a vector for each text."""

    def compute(self, texts: Sequence[Any], prompt: Prompt) -> tuple[Vectors, list[int]]:
        vectors, num_tokens = self._forward(texts, prompt, "sentence_embedding")
        return vectors.float().cpu().numpy()[:, : self.model.truncate_dim], num_tokens


class PairScorer(_Modules):
    """A cross-encoder: a score for each pair of texts; of two labels, the probability of the one that says yes."""

    def __init__(self, model: Any, name: str) -> None:
        """Raises ModelLoadError for a model of more than two labels."""
        super().__init__(model)
        self._positive = _positive_label(model, name)

    def compute(self, texts: Sequence[Any], prompt: Prompt) -> tuple[Vectors, list[int]]:
        scores, num_tokens = self._forward(texts, prompt, "scores")
        scores = self.model.activation_fn(scores.double()).reshape(len(texts), -1)  # in less, sure ones are all 1.0
        if scores.shape[1] > 1 and isinstance(self.model.activation_fn, torch.nn.Identity):
            scores = scores.softmax(1)
        return scores[:, self._positive, None].cpu().numpy(), num_tokens


def _positive_label(model: Any, name: str) -> int:
    """Which of the labels says that a document answers: by its name, else the second one of two, as is usual."""
    count = int(model.num_labels)
    if count > 2:
        raise ModelLoadError(f"{name} is a classifier with {count} classes, not a reranker.")
    names = getattr(model.config, "id2label", None) or {}
    found = [number for number in range(count) if POSITIVE.fullmatch(str(names.get(number, "")))]
    return found[0] if len(found) == 1 else count - 1


@dataclass(frozen=True)
class About:
    """What is known of a model beside its weights."""

    kind: Literal["embeddings", "cross-encoder"] = "embeddings"
    dims: int = 0
    may_shorten: bool = False  # a vector's beginning is a vector too
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    similarity: str = "cosine"  # by which its vectors were trained to be compared
    num_bytes: int = 0


class Embedder:
    def __init__(self, model: TextModel, about: About, max_batch_tokens: int = BATCH_TOKENS["cpu"]) -> None:
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
        """texts: or ids of the model's own tokens, which are read as the text that they stand for.

        Raises InvalidRequest, ContextLengthExceeded, Overloaded, Unavailable, EngineFailure; ValueError for
        dimensions that the model does not have. Leaving it drops the texts that no batch has begun with."""
        self._check_dimensions(dimensions)
        job = await self._compute(texts, self._prompt(prompt_name), may_truncate, "input")
        vectors = np.stack([row for row in job.rows if row is not None])
        return Embeddings(shortened(vectors, dimensions), job.num_tokens, job.num_truncated)

    async def score(self, question: str, documents: Sequence[str], may_truncate: bool = True) -> Scores:
        """How well each document answers; by the likeness of the vectors where the model is no cross-encoder."""
        if self.about.kind == "cross-encoder":
            pairs = [(question, document) for document in documents]
            job = await self._compute(pairs, Prompt(self.about.default_prompt), may_truncate, "documents")
            return Scores([float(row[-1]) for row in job.rows if row is not None], job.num_tokens, job.num_truncated)
        own = [
            await self._compute([question], self._prompt_of("query"), may_truncate, "query"),
            await self._compute(documents, self._prompt_of("document"), may_truncate, "documents"),
        ]
        query, rows = (np.stack([row for row in job.rows if row is not None]) for job in own)
        likeness = SIMILARITIES[self.about.similarity](rows, query[0])
        return Scores(
            likeness.tolist(), own[0].num_tokens + own[1].num_tokens, own[0].num_truncated + own[1].num_truncated
        )

    def _check_dimensions(self, dimensions: int | None) -> None:
        if dimensions is not None and dimensions > self.about.dims:
            raise ValueError(f"dimensions must be at most {self.about.dims}, the size of the model's vectors.")
        if dimensions not in (None, self.about.dims) and not self.about.may_shorten:
            raise ValueError(
                f"dimensions must be {self.about.dims}, because the model was not trained for shorter "
                "vectors (ALLOW_TRUNCATED_DIMS=true shortens them anyway)."
            )

    def _prompt(self, name: str | None) -> Prompt:
        if name is None:
            return Prompt(self.about.default_prompt)
        if name not in self.about.prompts:
            known = ", ".join(sorted(self.about.prompts)) or "none"
            raise InvalidRequest(
                f"prompt_name must be one of the model's prompts: {known}.", param="prompt_name", code="invalid_value"
            )
        task = next((task for task, names in TASKS.items() if name in names), None)
        return Prompt(self.about.prompts[name], task)

    def _prompt_of(self, task: str) -> Prompt:
        """As sentence-transformers' encode_query and encode_document choose it."""
        name = next((name for name in TASKS[task] if name in self.about.prompts), None)
        return Prompt(self.about.default_prompt if name is None else self.about.prompts[name], task)

    async def _compute(self, texts: Sequence[Any], prompt: Prompt, may_truncate: bool, param: str) -> Job:
        if self._is_closing:
            raise Unavailable("The model was unloaded; try again later.", retry_after=5)
        if self.num_waiting + len(texts) > MAX_WAITING:
            raise Overloaded(f"{self.num_waiting} texts are queued already; try again later.", retry_after=5)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def deliver(job: Job, error: Exception | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_finish, done, error)

        job = Job(texts, prompt, may_truncate, param, deliver, [None] * len(texts), len(texts))
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
        """Lets the calls under way finish, for `timeout` seconds at most, and ends the thread. A batch that takes
        longer than `patience` seconds more is left to itself: it may hang."""
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
        if job.is_dropped:
            return
        limit = self.model.max_length
        most = CHARACTERS + limit * CHARACTERS_PER_TOKEN
        try:
            whole = [self._text_of(text) if isinstance(text, list) else text for text in job.texts]
            texts = [_cut(text, most) for text in whole]
            lengths = self.model.lengths(texts, job.prompt)
        except InvalidRequest as error:
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

    def _text_of(self, token_ids: list[int]) -> str:
        tokenizer = self.model.tokenizer
        text = ""
        if max(token_ids) < len(tokenizer):
            text = str(tokenizer.decode(token_ids, skip_special_tokens=True))
        if not text:
            raise InvalidRequest("The token ids do not decode to text.", param="input", code="invalid_value")
        return text

    def _too_long(self, job: Job, lengths: list[int]) -> Exception:
        number, length = next((i, length) for i, length in enumerate(lengths) if length > self.model.max_length)
        return ContextLengthExceeded(
            f"This model's maximum context length is {self.model.max_length} tokens, and text {number + 1} "
            f"has {length} tokens. "
            "Please reduce its length. (context_length_exceeded)",
            param=job.param,
        )

    def _step(self) -> None:
        """Computes one batch; the jobs that are complete, or that it fails, are told."""
        if batch := self._queue.take():
            self._settle(batch)

    def _settle(self, batch: Sequence[Item[Job]]) -> None:
        """A batch that fails is computed again job by job, since one text of one of them may be why."""
        try:
            rows, counts = self.model.compute([item.text for item in batch], batch[0].job.prompt)
            if not np.isfinite(rows).all():
                raise ValueError("the model computed a value that is not a number")
        except Exception:
            jobs = list(dict.fromkeys(item.job for item in batch))
            if len(jobs) > 1:
                for job in jobs:
                    self._settle([item for item in batch if item.job is job])
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


def _cut(text: Any, most: int) -> Any:
    """A text, or a pair of texts, of which no more is tokenized than a model could read."""
    return tuple(part[:most] for part in text) if isinstance(text, tuple) else text[:most]


def _finish(done: "asyncio.Future[None]", error: Exception | None) -> None:
    if not done.done():
        done.set_result(None) if error is None else done.set_exception(error)


def normalised(vectors: Vectors) -> Vectors:
    """To length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, 1e-12), dtype=np.float32)


SIMILARITIES: dict[
    str, Callable[[Vectors, Vectors], Vectors]
] = {  # rows (n, dims) and one vector: (n,); more is nearer
    "cosine": lambda rows, one: normalised(rows) @ normalised(one[None])[0],
    "dot": lambda rows, one: rows @ one,
    "euclidean": lambda rows, one: -np.linalg.norm(rows - one, axis=1),
    "manhattan": lambda rows, one: -np.abs(rows - one).sum(axis=1),
}


def shortened(vectors: Vectors, dimensions: int | None) -> Vectors:
    return vectors if dimensions in (None, vectors.shape[1]) else normalised(vectors[:, :dimensions])


# --- loading


def load_embedder(directory: Path, name: str, device: str = "auto", may_shorten: bool = False) -> Embedder:
    """Blocks for seconds. Raises ModelLoadError.

    device: auto (a GPU where there is one), cpu, cuda, cuda:0. may_shorten: also where nothing says that the model's
    vectors can be cut.
    """
    set_threads()
    device = _device(device)
    try:
        text_model, about = _open(directory, name, device, may_shorten)
        sample: Any = ("a", "a") if about.kind == "cross-encoder" else "a"
        text_model.lengths([sample], Prompt())
        text_model.compute([sample], Prompt())
    except ModelLoadError:
        raise
    except Exception as error:  # of many kinds, for files that are not as they should be
        raise ModelLoadError(f"{name} cannot be loaded as an embedding model: {first_line(error)}") from error
    return Embedder(text_model, about, BATCH_TOKENS["cpu" if device == "cpu" else "cuda"])


def loaded_size(directory: Path, device: str) -> int:
    """Bytes of the weights in memory: on a CPU all of them are float32, whatever the files have."""
    width = 4 if _device(device) == "cpu" or _gpu_dtype(directory) == "float32" else 2
    total = 0
    for path in directory.rglob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # it is no mapping
    return total * width


def _device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _open(directory: Path, name: str, device: str, may_shorten: bool) -> tuple[TextModel, About]:
    import sentence_transformers  # takes seconds
    import transformers

    _check_modules(directory)
    _check_kind(directory)
    is_pair_scorer = _is_cross_encoder(directory)
    kind = sentence_transformers.CrossEncoder if is_pair_scorer else sentence_transformers.SentenceTransformer
    model = kind(
        str(directory),
        device=device,
        local_files_only=True,
        trust_remote_code=False,
        model_kwargs={"use_safetensors": True, "dtype": "float32" if device == "cpu" else _gpu_dtype(directory)},
    )
    if not isinstance(model.tokenizer, transformers.PreTrainedTokenizerBase):
        raise ModelLoadError(
            f"{name} is not supported: its first module is {type(model[0]).__name__}, and it must be a Transformer."
        )
    if not set(model.modalities) <= TEXT_ALONE:  # the library would read texts that are paths and addresses as images
        raise ModelLoadError(
            f"{name} is not supported: it takes {', '.join(map(str, model.modalities))}, and only text "
            "models are served."
        )
    text_model = PairScorer(model, name) if is_pair_scorer else Encoder(model)
    about = About(
        "cross-encoder" if is_pair_scorer else "embeddings",
        0 if is_pair_scorer else int(model.truncate_dim or model.get_embedding_dimension() or 0),
        may_shorten or _is_matryoshka(directory, name),
        {key: text or "" for key, text in model.prompts.items()},
        model.prompts.get(model.default_prompt_name or "") or "",
        "cosine" if is_pair_scorer else str(model.similarity_fn_name),
        sum(tensor.nbytes for tensor in model.parameters()),
    )
    return text_model, about


def _read(path: Path) -> Any:
    """A JSON file's object or list; empty where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error


def _check_modules(directory: Path) -> None:
    for module in _read(directory / "modules.json") or ():
        if not str(module.get("type", "")).startswith(OWN_MODULES):
            raise ModelLoadError(
                f"{directory.name} needs its own code ({module.get('type')}), which this server never runs."
            )


def _check_kind(directory: Path) -> None:
    """Raises ModelLoadError for what sentence-transformers would load and compute as something that it is not."""
    own, config = _read(directory / "config_sentence_transformers.json"), _read(directory / "config.json")
    name, architecture = directory.name, str((config.get("architectures") or [""])[0])
    kind, modules = own.get("model_type"), _read(directory / "modules.json") or ()
    other = OTHER_KINDS.get(str(kind)) or next(
        (str(module["type"]) for module in modules if OTHER_MODULES.match(str(module.get("type")))), None
    )
    if other or LATE.search(architecture):
        raise ModelLoadError(
            f"{name} is not supported: it gives {other or 'a vector for each token'}, and only models that give one "
            "dense vector for a text are served."
        )
    if architecture.endswith(CAUSAL) and not modules and kind != "CrossEncoder":
        raise ModelLoadError(
            f"{name} is a language model without modules.json, which would say how to make vectors or scores of texts."
        )
    old = config.get("sbert_ce_default_activation_function")
    activation = (config.get("sentence_transformers") or {}).get("activation_fn") or old or own.get("activation_fn")
    if activation and not str(activation).startswith("torch."):
        raise ModelLoadError(f"{name} needs its own code ({activation}) for its scores, which this server never runs.")


def _is_cross_encoder(directory: Path) -> bool:
    kind = _read(directory / "config_sentence_transformers.json").get("model_type")
    architectures = _read(directory / "config.json").get("architectures") or [""]
    is_classifier = architectures[0].endswith(CROSS_ENCODER) and not (directory / "modules.json").exists()
    return kind == "CrossEncoder" or (kind is None and is_classifier)


def _is_matryoshka(directory: Path, name: str) -> bool:
    own, config = _read(directory / "config_sentence_transformers.json"), _read(directory / "config.json")
    told = own.get("truncate_dim") or config.get("is_matryoshka") or config.get("matryoshka_dimensions")
    return bool(told) or MATRYOSHKA.search(f"{name} {config.get('_name_or_path', '')}") is not None


def _gpu_dtype(directory: Path) -> str:
    """bfloat16 where the weights are stored in it; never float16, which some models overflow."""
    config = _read(directory / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if stored == "bfloat16" else "float32"
