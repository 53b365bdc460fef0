"""LocalModel: a model of this process. Requests become plans, which the engine computes as a stream of chunks."""

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from checkpoints import checkpoint
from checkpoints.progress import Progress
from errors import InvalidRequest, ModelLoadError, ModelLoading, ModelNotFound, first_line, unsupported
from schemas import (
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    LoadAdapterRequest,
    Model,
    ModelStatus,
    TokenizeRequest,
    TokenizeResponse,
    TokenizerInfo,
)
from serving.adapters import ModelAdapters
from serving.admission import check_characters
from serving.chat import plan_chat
from serving.chat_renderer import ChatRenderer
from serving.completion import plan_completion
from serving.generation import Plan, merge
from serving.image_fetcher import ImageFetcher
from serving.keep_alive import seconds_of
from serving.loading import LoadedModel, to_api_error
from serving.model_loader import ModelLoader, Pool
from serving.model_slot import RETRY_AFTER, ModelSlot
from serving.release import close, reclaim, without_frames
from serving.tokenizer_info import tokenizer_info
from serving.usage import RequestUsage
from telemetry import request_record
from telemetry.metrics import Metrics
from text.tools import tool_set_of

if TYPE_CHECKING:
    from engine.engine import Engine

log = logging.getLogger(__name__)
RETRY = 10.0  # seconds for which the reason of a failed load is told again before another attempt
R = TypeVar("R", ChatCompletionRequest, CompletionRequest)
C = TypeVar("C", ChatCompletionChunk, Completion)
MakePlan = Callable[[R, LoadedModel], Awaitable[Plan[Any]]]


class LocalModel:
    """One model of this process, loaded or not: a request loads it, and it stays while it answers."""

    def __init__(
        self,
        loader: ModelLoader,
        pool: Pool,
        *,
        on_failure: Callable[[str], None] = lambda sentence: None,
        metrics: Metrics | None = None,
        num_bytes: int | None = None,
        idle_limit: float | None = None,
    ) -> None:
        """pool: where it has its slot, beside those of other models. num_bytes: of its files. idle_limit: seconds
        without requests after which it is unloaded; None: the pool's.

        `on_failure` gets one sentence if the model cannot be loaded, or if its engine stops.
        """
        self.settings = settings = loader.settings
        self._loader, self._pool, self._idle_limit = loader, pool, idle_limit
        self._metrics = metrics or Metrics()
        self.progress = Progress()
        self.path = settings.model_path or checkpoint.default_model_path()
        self.name = settings.served_model_name or checkpoint.served_name(self.path)
        self._names = {name.casefold() for name in loader.names(self.name, self.path)}
        self.adapters = ModelAdapters(settings, self.name, self._names)
        self.created = int(time.time())
        self._on_failure = on_failure
        self.num_bytes = num_bytes
        self.failure: str | None = None  # why it could not be loaded, or why its engine stopped
        self._error: Exception | None = None  # of the last load
        self._was_loaded = False
        self._failed_at = -math.inf
        fetcher = ImageFetcher(settings.allow_private_image_urls, settings.image_url_hosts)
        self._renderer = ChatRenderer(fetcher, settings.max_images)

    def __str__(self) -> str:
        return self.name

    # --- life

    def start(self) -> ModelSlot[LoadedModel]:
        """Begins to load the model, if it is not loaded; returns its slot, now the most recently used one.

        Raises the reason why it could not be loaded, if that was a moment ago, and what `ModelPool.slot` raises.
        """
        is_new = self not in self._pool.slots
        if is_new and self._error is not None and time.monotonic() - self._failed_at < RETRY:
            raise to_api_error(self._error, self.name)
        slot = self._pool.slot(self, self._load, lambda: f" ({self.progress})")
        if is_new:  # its load begins with the next turn of the event loop
            self.failure, self._error, self.progress = None, None, Progress()
            slot.idle_limit = self._idle_limit
        return slot

    async def _load(self) -> LoadedModel:
        loaded = None
        try:
            loaded = await self._loader.loaded(self.path, self.progress, self._pool)
            await self.adapters.read(loaded.engine)
        except Exception as error:
            log.debug("loading failed", exc_info=True)
            without_frames(error)
            if loaded is not None:
                await close(loaded, 0.0)
                loaded = None  # which would keep it in memory
            await reclaim()
            self._error = error
            reason = f"The model {self.path} cannot be loaded: {type(error).__name__}: {first_line(error)}"
            self._fail(str(error) if isinstance(error, ModelLoadError) else reason, is_final=not self._was_loaded)
            raise to_api_error(error, self.name) from error
        loaded.engine.on_failure = partial(self._stopped, loaded)
        loaded.engine.start()
        self._was_loaded = True
        return loaded

    def _stopped(self, loaded: LoadedModel) -> None:
        """Forgets a model whose engine has failed, so that the next request loads it again."""
        if self.loaded is loaded:
            self._pool.drop(self, loaded)
            self._fail(f"The engine of {self.name} stopped after an error.", is_final=True)

    def _fail(self, sentence: str, is_final: bool) -> None:
        """is_final: False for a model that was served before, and may be loaded another time."""
        self.failure, self._failed_at = sentence, time.monotonic()
        if is_final:
            self._on_failure(sentence)

    async def unload(self) -> None:
        """Unloads the model when its requests have finished."""
        await self._pool.unload(self)

    @property
    def loaded(self) -> LoadedModel | None:
        """The model, or None while it is not loaded."""
        slot = self._pool.slots.get(self)
        return None if slot is None else slot.model

    @property
    def status(self) -> ModelStatus:
        if self in self._pool.slots:
            return "loading" if self.loaded is None else "loaded"
        return "unloaded" if self.failure is None else "failed"

    @property
    def is_forgotten(self) -> bool:
        """Whether there is nothing to know of it: it is not in memory, and did not fail a moment ago."""
        return self not in self._pool.slots and time.monotonic() - self._failed_at > RETRY

    @property
    def expires_in(self) -> float:
        """Seconds until it is unloaded if nobody asks for it; infinity if it stays."""
        return self._pool.expires_in(self)

    @asynccontextmanager
    async def _using(
        self, name: str | None = None, is_stream: bool | None = False, keep_alive: float | str | None = None
    ) -> AsyncIterator[LoadedModel]:
        """Waits for the model, which stays loaded inside the block. Raises ModelLoading if that takes too long.

        name: its own, or that of an adapter with which it answers. is_stream: a stream waits as long as it takes, since
        its client gets comments. keep_alive: as Ollama means it.
        """
        limit = seconds_of(keep_alive)
        slot, patience = self.start(), self.settings.model_load_wait
        slot.idle_limit = slot.idle_limit if limit is None else limit
        async with slot.using(None if is_stream and patience else patience) as loaded:
            adapter = self.adapters.get(name or self.name)
            if adapter is None:
                self._check_name(name)  # it may have been an adapter's, which is gone
                if name is not None and self.adapters.serves(name):  # never the model without it
                    raise ModelLoading(f"The adapter {name} is loading; try again later.", retry_after=RETRY_AFTER)
            yield loaded if adapter is None else replace(loaded, adapter=adapter)

    @property
    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether the model can answer, and what /health says of it."""
        loaded = self.loaded
        if loaded is None:
            is_coming = self.status == "unloaded" or (self.status == "loading" and self._was_loaded)
            return is_coming, {"status": self.status, "model": self.name, **self._why_not_loaded}
        engine = loaded.engine
        counts = {
            "running": engine.num_running,
            "waiting": engine.num_waiting,
            "kv_blocks": engine.num_used_blocks,
            "kv_blocks_total": engine.num_blocks,
        }
        if engine.failure is not None or engine.is_stalled:
            return False, {"status": "failed" if engine.failure else "stalled", "model": self.name, **counts}
        return True, {"status": "ok", "model": self.name, **counts}

    @property
    def _why_not_loaded(self) -> dict[str, Any]:
        if self.status == "loading":
            return {"progress": {"phase": self.progress.phase, "fraction": round(self.progress.fraction, 3)}}
        return {} if self.failure is None else {"message": self.failure}

    @property
    def engines(self) -> "list[tuple[str, Engine]]":
        """The engine with the name of its model; empty until it is loaded."""
        return [] if self.loaded is None else [(self.name, self.loaded.engine)]

    # --- models

    def serves(self, model: str) -> bool:
        return model.casefold() in self._names or self.adapters.serves(model)

    @property
    def entry(self) -> Model:
        """The entry of /v1/models."""
        return Model.of_server(self.name, self.created, **self._known)

    @property
    def entries(self) -> list[Model]:
        """Its own entry, and those of its adapters."""
        return [self.entry, *self.adapters.models(**self._known)]

    def entry_of(self, name: str) -> Model:
        """Returns the entry of the model or the adapter with that name."""
        adapters = self.entries[1:]
        return next((entry for entry in adapters if entry.id.casefold() == name.casefold()), self.entry)

    @property
    def _known(self) -> dict[str, Any]:
        known = {"kind": "chat", "status": self.status, "size": self.num_bytes, "error": self.failure}
        return {**known, **self._about_model()}

    async def load_adapter(self, request: LoadAdapterRequest) -> None:
        """Loads an adapter of this model, which becomes a model of its own. Raises APIError."""
        async with self._using() as loaded:
            await self.adapters.load(loaded.engine, request)

    def _about_model(self) -> dict[str, Any]:
        loaded = self.loaded
        if loaded is None:
            return {}
        template = loaded.template
        return {
            "max_model_len": loaded.engine.max_model_len,
            "family": template.family.name,
            "chat_template": "own" if template.is_own else "family",
            "recommended_quantization": template.family.quantization,
            "size": loaded.facts.num_bytes if loaded.facts else self.num_bytes,
        }

    def _check(self, request: ChatCompletionRequest | CompletionRequest) -> None:
        """Raises ModelNotFound for another model's name, and InvalidRequest for a field that asks for something
        unsupported: the model is not loaded for these."""
        self._check_name(request.model)
        seconds_of(request.keep_alive)
        for name in request.refused_fields:
            raise unsupported(name)

    def _check_name(self, model: str | None) -> None:
        if model is not None and not self.serves(model):
            raise ModelNotFound(f"The model {model!r} does not exist; this server has {self.name!r}.", param="model")

    async def wait(self, keep_alive: float | str | None = None) -> LoadedModel:
        """Returns the model as soon as it is loaded. Raises ModelLoading if that takes too long, and other APIErrors.

        keep_alive: as Ollama means it.
        """
        async with self._using(keep_alive=keep_alive) as loaded:
            return loaded

    # --- answers

    def stream_chat(self, request: ChatCompletionRequest) -> AsyncGenerator[ChatCompletionChunk]:
        """Yields the answers as chunks of one choice each, then a chunk with the usage. Raises APIError."""
        return self._run(request, partial(plan_chat, renderer=self._renderer), ChatCompletionChunk)

    def stream_completion(self, request: CompletionRequest) -> AsyncGenerator[Completion]:
        """Yields the answers as chunks of one choice each, then a chunk with the usage. Raises APIError."""
        return self._run(request, plan_completion, Completion)

    async def planned_chat(self, request: ChatCompletionRequest) -> AsyncGenerator[ChatCompletionChunk]:
        """Returns the same stream, with all that is wrong with the request already found. Raises APIError."""
        self._check(request)
        make_plan = partial(plan_chat, renderer=self._renderer)
        async with self._using(request.model) as loaded:
            return self._later(request, await self._planned(request, make_plan, loaded))

    async def _later(self, request: ChatCompletionRequest, plan: Plan[Any]) -> AsyncGenerator[ChatCompletionChunk]:
        async with self._using(request.model, is_stream=True, keep_alive=request.keep_alive) as loaded:
            async with aclosing(self._computed(loaded, plan, None, ChatCompletionChunk)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _run(self, request: R, make_plan: MakePlan[R], chunk_type: type[C]) -> AsyncGenerator[C]:
        self._check(request)
        async with self._using(request.model, request.stream, request.keep_alive) as loaded:
            usage = self._usage(loaded)  # not before, for a name that may not exist
            plan = await self._planned(request, make_plan, loaded)
            async with aclosing(self._computed(loaded, plan, usage, chunk_type)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def _planned(self, request: R, make_plan: MakePlan[R], loaded: LoadedModel) -> Plan[Any]:
        """Returns the plan, for which there is room."""
        plan = await make_plan(request, loaded)
        num_computed = plan.computed_per_prompt * len(plan.prompt_lengths)
        num_tokens = plan.computed_per_prompt * sum(plan.prompt_lengths)
        loaded.engine.check_room(num_computed, num_tokens, request_record.current().client)
        return plan

    async def _computed(
        self, loaded: LoadedModel, plan: Plan[Any], usage: RequestUsage | None, chunk_type: type[C]
    ) -> AsyncGenerator[C]:
        """usage: None begins to count now, for the request of which this is then the record."""
        usage = usage or self._usage(loaded)
        usage.start(plan.prompt_lengths, plan.answers_per_prompt)
        choices_of, timings = plan.reader(loaded.texts), None
        head = chunk_type(model=self._name_of(loaded), choices=[])
        async with aclosing(merge(plan.sources(loaded))) as deltas:
            async for delta in deltas:
                is_first = usage.add(delta)
                known = usage.usage if is_first else None
                for choice in choices_of(delta, is_first):
                    if usage.is_complete and choice.finish_reason is not None:
                        timings = usage.timings
                    yield head.model_copy(update={"choices": [choice], "timings": timings, "known_usage": known})
        yield head.model_copy(update={"usage": usage.usage, "timings": timings})

    def _name_of(self, loaded: LoadedModel) -> str:
        """Returns the name under which a model answers: the adapter's, if it has one."""
        return self.name if loaded.adapter is None else loaded.adapter.name

    def _usage(self, loaded: LoadedModel) -> RequestUsage:
        return RequestUsage(self._name_of(loaded), self._metrics.of(self.name))

    # --- tokens

    async def count_tokens(self, request: ChatCompletionRequest) -> int:
        """Returns the number of tokens of a chat's prompt. Raises APIError."""
        self._check(request)
        async with self._using(request.model) as loaded:
            return len((await self._renderer.render(loaded, request, tool_set_of(request))).prompt_ids)

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        self._check_name(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequest("Send either prompt or messages.", param="prompt", code="invalid_value")
        async with self._using() as loaded:
            token_ids = await self._token_ids(request, loaded)
            texts = [loaded.texts.text_of(i) for i in token_ids] if request.return_token_strs else None
            limit = loaded.engine.max_model_len
        return TokenizeResponse(count=len(token_ids), max_model_len=limit, tokens=token_ids, token_strs=texts)

    async def _token_ids(self, request: TokenizeRequest, loaded: LoadedModel) -> list[int]:
        if request.messages is not None:
            return (await self._renderer.render(loaded, request, tool_set_of(request))).prompt_ids
        check_characters(loaded, len(request.prompt or ""), "prompt")
        has_bos = request.add_special_tokens is not False
        return await asyncio.to_thread(loaded.template.render_text, request.prompt or "", has_bos)

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        self._check_name(request.model)
        async with self._using() as loaded:
            if any(token_id >= loaded.engine.num_embeddings for token_id in request.tokens):
                raise InvalidRequest(
                    f"Token ids must be less than {loaded.engine.num_embeddings}.", param="tokens", code="invalid_value"
                )
            text = await asyncio.to_thread(loaded.template.tokenizer.decode, request.tokens)
        return DetokenizeResponse(prompt=str(text))

    async def tokenizer_info(self) -> TokenizerInfo:
        return tokenizer_info(await self.wait())
