"""Embedder: texts in, vectors out; or pairs of texts in, scores out. One thread owns the model; callers are async.

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

from engine.embedding.argument_errors import ArgumentError, TextTooLong
from engine.embedding.text_queue import Item, TextQueue
from engine.threads import set_threads
from engine.worker import Worker
from errors import EngineFailure, ModelLoadError, Overloaded, Unavailable, first_line

log = logging.getLogger(__name__)

Vectors = npt.NDArray[np.float32]
BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}  # in a batch, padding included
ENDING = 5.0  # seconds that the current batch has to return when the embedder closes
MAX_WAITING = 2**16  # texts; more are refused
CHARACTERS, CHARACTERS_PER_TOKEN = 2**16, 200  # of a text are tokenized, plus so many per token that the model reads
TASKS = {"query": ("query",), "document": ("document", "passage", "corpus")}  # task -> usual names of its prompt
TEXT_ALONE = {"text", "message"}  # kinds of input that only hold text
LIBRARY_MODULES = "sentence_transformers."  # modules.json may name only these: any other class is third-party code
CROSS_ENCODER = "ForSequenceClassification"
CAUSAL = ("ForCausalLM", "LMHeadModel")
OTHER_KINDS = {"SparseEncoder": "sparse vectors", "MultiVectorEncoder": "a vector for each token"}
OTHER_MODULES = re.compile(r"sentence_transformers\.(sparse|multi_vector)_encoder\.")
LATE_INTERACTION = re.compile("colbert", re.IGNORECASE)  # architectures that compare texts token by token
POSITIVE = re.compile(
    r"(is[_ ])?(relevant|positive|yes|true|match|matches|entailment|duplicate|related)", re.IGNORECASE
)
MATRYOSHKA = re.compile(  # models that were trained for shortened vectors too
    r"embeddinggemma|qwen3-embedding|nomic-embed-text-v(1\.5|2)|text-embedding|mxbai-embed-(large|2d)|matryoshka"
    r"|arctic-embed-(m-v1\.5|[ml]-v2)|jina-embeddings-v[345]",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Prompt:
    """What a text is for, as models that distinguish queries and documents need to know."""

    text: str = ""  # is put before each text
    task: str | None = None  # query or document; some models have a module for each


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
    prompt: Prompt
    may_truncate: bool
    argument: str  # the parameter that the texts were passed as
    deliver: Callable[["Job", Exception | None], None]  # called once, when it is complete or has failed
    rows: list[Vectors | None] = field(default_factory=list)  # of each text, None until it is computed
    num_left: int = 0  # texts
    is_dropped: bool = False  # the caller has left
    num_tokens: int = 0
    num_truncated: int = 0


class TextModel(Protocol):
    """What computes: an Encoder, a PairScorer, or a stand-in for tests."""

    max_length: int  # tokens of a text
    tokenizer: Any  # transformers'

    def lengths(self, texts: Sequence[Any], prompt: Prompt) -> list[int]:
        """Counts the tokens of each text, uncut, special tokens included."""
        ...

    def compute(self, texts: Sequence[Any], prompt: Prompt) -> tuple[Vectors, list[int]]:
        """Computes a row for each text. Also returns the tokens that each took."""
        ...

    def release(self) -> None:
        """Frees its memory."""
        ...


class _Modules:
    """The base of both kinds of sentence-transformers' models."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.tokenizer = model.tokenizer
        limit = model.max_seq_length
        self.max_length = int(limit) if limit and math.isfinite(limit) else 2**31

    def release(self) -> None:
        """Frees the weights at once: these models refer to themselves, so that only a garbage collection frees them."""
        self.model.to("meta")

    def lengths(self, texts: Sequence[Any], prompt: Prompt) -> list[int]:
        """Counts tokens. For a model with a chat template, those that the template adds are missing."""
        lead = prompt.text
        prompted = [(lead + text[0], text[1]) if isinstance(text, tuple) else lead + text for text in texts]
        encoded = self.tokenizer(prompted, truncation=False, padding=False, return_attention_mask=False, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]

    def _forward(self, texts: Sequence[Any], prompt: Prompt, name: str) -> tuple[torch.Tensor, list[int]]:
        """Computes one batch in the steps of sentence-transformers' own `encode` and `predict`."""
        task = {} if prompt.task is None else {"task": prompt.task}
        features = self.model.preprocess(list(texts), prompt=prompt.text or None, **task)
        features = {
            key: getattr(value, "to", lambda _, same=value: same)(self.model.device) for key, value in features.items()
        }
        num_tokens = features["attention_mask"].sum(1).tolist()
        with torch.inference_mode():
            return self.model(features, **task)[name], num_tokens


class Encoder(_Modules):
    """A bi-encoder: computes a vector for each text."""

    def compute(self, texts: Sequence[Any], prompt: Prompt) -> tuple[Vectors, list[int]]:
        vectors, num_tokens = self._forward(texts, prompt, "sentence_embedding")
        return vectors.float().cpu().numpy()[:, : self.model.truncate_dim], num_tokens


class PairScorer(_Modules):
    """A cross-encoder: computes a score for each pair of texts; of two labels, the probability of the positive one."""

    def __init__(self, model: Any, name: str) -> None:
        """Raises ModelLoadError for a model with more than two labels."""
        super().__init__(model)
        self._positive = _positive_label(model, name)

    def compute(self, texts: Sequence[Any], prompt: Prompt) -> tuple[Vectors, list[int]]:
        scores, num_tokens = self._forward(texts, prompt, "scores")
        scores = self.model.activation_fn(scores.double()).reshape(len(texts), -1)  # float32 rounds high scores to 1.0
        if scores.shape[1] > 1 and isinstance(self.model.activation_fn, torch.nn.Identity):
            scores = scores.softmax(1)
        return scores[:, self._positive, None].cpu().numpy(), num_tokens


def _positive_label(model: Any, name: str) -> int:
    """Finds the label that stands for a good document: by its name, else the last one, as is usual."""
    count = int(model.num_labels)
    if count > 2:
        raise ModelLoadError(f"{name} is a classifier with {count} classes, not a reranker.")
    names = getattr(model.config, "id2label", None) or {}
    positive = [number for number in range(count) if POSITIVE.fullmatch(str(names.get(number, "")))]
    return positive[0] if len(positive) == 1 else count - 1


@dataclass(frozen=True)
class About:
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
            job = await self._compute(pairs, Prompt(self.about.default_prompt), may_truncate, "documents")
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

    def _prompt(self, name: str | None) -> Prompt:
        if name is None:
            return Prompt(self.about.default_prompt)
        if name not in self.about.prompts:
            names = ", ".join(sorted(self.about.prompts)) or "none"
            raise ArgumentError(f"prompt_name must be one of the model's prompts: {names}.", "prompt_name")
        task = next((task for task, usual in TASKS.items() if name in usual), None)
        return Prompt(self.about.prompts[name], task)

    def _prompt_of(self, task: str) -> Prompt:
        """Chooses the prompt for a task as sentence-transformers' encode_query and encode_document do."""
        name = next((name for name in TASKS[task] if name in self.about.prompts), None)
        return Prompt(self.about.default_prompt if name is None else self.about.prompts[name], task)

    async def _compute(self, texts: Sequence[Any], prompt: Prompt, may_truncate: bool, argument: str) -> Job:
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


# --- loading


def load_embedder(directory: Path, name: str, device: str = "auto", may_shorten: bool = False) -> Embedder:
    """Loads the model in a directory and tries it. Blocks for seconds. Raises ModelLoadError.

    device: auto (a GPU where there is one), cpu, cuda, cuda:0; may_shorten: lets vectors be cut even where nothing
    says that the model was trained for it.
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
    except Exception as error:  # malformed files can raise anything
        raise ModelLoadError(f"{name} cannot be loaded as an embedding model: {first_line(error)}") from error
    return Embedder(text_model, about, BATCH_TOKENS["cpu" if device == "cpu" else "cuda"])


def loaded_size(directory: Path, device: str) -> int:
    """Bytes that the weights will take in memory: on a CPU all of them are float32, whatever the files have."""
    width = 4 if _device(device) == "cpu" or _gpu_dtype(directory) == "float32" else 2
    total = 0
    for path in directory.rglob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            # safe_open gives no mapping that could be iterated
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return total * width


def _device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _open(directory: Path, name: str, device: str, may_shorten: bool) -> tuple[TextModel, About]:
    """Loads the files. Raises ModelLoadError for a kind of model that is not served."""
    import sentence_transformers  # takes seconds
    import transformers

    _check_modules(directory)
    _check_kind(directory)
    is_pair_scorer = _is_cross_encoder(directory)
    model_class = sentence_transformers.CrossEncoder if is_pair_scorer else sentence_transformers.SentenceTransformer
    model = model_class(
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
    if not set(model.modalities) <= TEXT_ALONE:  # the library would load texts that are paths or URLs as images
        raise ModelLoadError(
            f"{name} is not supported: it takes {', '.join(map(str, model.modalities))}, and only text "
            "models are served."
        )
    text_model = PairScorer(model, name) if is_pair_scorer else Encoder(model)
    about = About(
        kind="cross-encoder" if is_pair_scorer else "embeddings",
        dims=0 if is_pair_scorer else int(model.truncate_dim or model.get_embedding_dimension() or 0),
        may_shorten=may_shorten or _is_matryoshka(directory, name),
        prompts={key: text or "" for key, text in model.prompts.items()},
        default_prompt=model.prompts.get(model.default_prompt_name or "") or "",
        similarity="cosine" if is_pair_scorer else str(model.similarity_fn_name),
        num_bytes=sum(tensor.nbytes for tensor in model.parameters()),
    )
    return text_model, about


def _read(path: Path) -> Any:
    """Reads a JSON file; an empty object where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error


def _check_modules(directory: Path) -> None:
    """Raises ModelLoadError for a model with third-party code."""
    for module in _read(directory / "modules.json") or ():
        if not str(module.get("type", "")).startswith(LIBRARY_MODULES):
            raise ModelLoadError(
                f"{directory.name} needs its own code ({module.get('type')}), which this server never runs."
            )


def _check_kind(directory: Path) -> None:
    """Raises ModelLoadError for models that sentence-transformers would load, but compute wrongly."""
    library, config = _read(directory / "config_sentence_transformers.json"), _read(directory / "config.json")
    name, architecture = directory.name, str((config.get("architectures") or [""])[0])
    kind, modules = library.get("model_type"), _read(directory / "modules.json") or ()
    other = OTHER_KINDS.get(str(kind)) or next(
        (str(module["type"]) for module in modules if OTHER_MODULES.match(str(module.get("type")))), None
    )
    if other or LATE_INTERACTION.search(architecture):
        raise ModelLoadError(
            f"{name} is not supported: it gives {other or 'a vector for each token'}, and only models that give one "
            "dense vector for a text are served."
        )
    if architecture.endswith(CAUSAL) and not modules and kind != "CrossEncoder":
        raise ModelLoadError(
            f"{name} is a language model without modules.json, which would say how to make vectors or scores of texts."
        )
    old = config.get("sbert_ce_default_activation_function")
    activation = (config.get("sentence_transformers") or {}).get("activation_fn") or old or library.get("activation_fn")
    if activation and not str(activation).startswith("torch."):
        raise ModelLoadError(f"{name} needs its own code ({activation}) for its scores, which this server never runs.")


def _is_cross_encoder(directory: Path) -> bool:
    kind = _read(directory / "config_sentence_transformers.json").get("model_type")
    architectures = _read(directory / "config.json").get("architectures") or [""]
    is_classifier = architectures[0].endswith(CROSS_ENCODER) and not (directory / "modules.json").exists()
    return kind == "CrossEncoder" or (kind is None and is_classifier)


def _is_matryoshka(directory: Path, name: str) -> bool:
    library, config = _read(directory / "config_sentence_transformers.json"), _read(directory / "config.json")
    says_so = library.get("truncate_dim") or config.get("is_matryoshka") or config.get("matryoshka_dimensions")
    return bool(says_so) or MATRYOSHKA.search(f"{name} {config.get('_name_or_path', '')}") is not None


def _gpu_dtype(directory: Path) -> str:
    """Names bfloat16 for weights that are stored in it, else float32; never float16, in which some models overflow."""
    config = _read(directory / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")
    return "bfloat16" if stored == "bfloat16" else "float32"
