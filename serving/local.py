"""LocalModel: the model of this process. Requests become plans, which the engine computes as a stream of chunks."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from checkpoints import checkpoint
from checkpoints.progress import Progress
from config import Settings
from errors import InvalidRequest, ModelLoadError, ModelLoading, ModelNotFound, unsupported
from schemas import (
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    LoadAdapterRequest,
    Model,
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
from serving.loading import LoadedModel, LoadModel, load
from serving.model_slot import ModelSlot, in_daemon_thread
from serving.tokenizer_info import tokenizer_info
from serving.usage import RequestUsage
from telemetry import request_record
from telemetry.metrics import Metrics
from text.tools import tool_set_of

if TYPE_CHECKING:
    from engine.engine import Engine

log = logging.getLogger(__name__)
R = TypeVar("R", ChatCompletionRequest, CompletionRequest)
C = TypeVar("C", ChatCompletionChunk, Completion)
MakePlan = Callable[[R, LoadedModel], Awaitable[Plan[Any]]]


class LocalModel:
    def __init__(
        self,
        settings: Settings,
        on_failure: Callable[[str], None],
        load: LoadModel = load,
        metrics: Metrics | None = None,
    ) -> None:
        """`on_failure` gets one sentence if the model cannot be loaded, or if its engine stops."""
        self.settings = settings
        self._metrics = metrics or Metrics()
        self.progress = Progress()
        self.path = settings.model_path or checkpoint.default_model_path()
        self.name = settings.served_model_name or checkpoint.served_name(self.path)
        self._names = {name.casefold() for name in (self.name, self.path, checkpoint.served_name(self.path))}
        self.adapters = ModelAdapters(settings, self.name, self._names)
        self.created = int(time.time())
        self._on_failure = on_failure
        self._load_model = load
        self.loaded: LoadedModel | None = None
        self._slot = ModelSlot(self.name, self._load)
        self._failure: str | None = None
        fetcher = ImageFetcher(settings.allow_private_image_urls, settings.image_url_hosts)
        self._renderer = ChatRenderer(fetcher, settings.max_images)

    # --- life

    def start(self) -> None:
        """Checks that the model's name or path can be right, then loads the model in the background."""
        try:
            checkpoint.check(self.path)
        except ModelLoadError as error:
            self._fail(str(error))
        else:
            self._slot.start()

    async def _load(self) -> LoadedModel:
        try:
            loaded = await in_daemon_thread(partial(self._load_model, self.path, self.settings, self.progress))
            await in_daemon_thread(partial(self.adapters.read_configured, loaded.engine))
        except ModelLoadError as error:
            self._fail(str(error))
            raise
        except Exception as error:
            log.debug("loading failed", exc_info=True)
            self._fail(f"The model {self.path} cannot be loaded: {type(error).__name__}: {error}")
            raise
        self.begin(loaded)
        return loaded

    def begin(self, loaded: LoadedModel) -> None:
        """Starts the engine of a loaded model, which answers the requests from now on."""
        loaded.engine.on_failure = partial(self._fail, f"The engine of {self.name} stopped after an error.")
        loaded.engine.start()
        self.loaded = loaded

    def _fail(self, sentence: str) -> None:
        self._failure = sentence
        self._on_failure(sentence)

    async def close(self, timeout: float) -> None:
        await self._slot.cancel()
        if self.loaded is not None:
            await self.loaded.engine.close(timeout)

    @property
    def failure(self) -> str | None:
        """Why the model cannot be served, in one sentence; None while it can, or still loads."""
        return self._failure

    @property
    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether the model can answer, and the body of /health."""
        if self._failure is not None:
            return False, {"status": "failed", "model": self.name, "message": self._failure}
        if self.loaded is None:
            progress = {"phase": self.progress.phase, "fraction": round(self.progress.fraction, 3)}
            return False, {"status": "loading", "model": self.name, "progress": progress}
        engine = self.loaded.engine
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
    def engines(self) -> "list[tuple[str, Engine]]":
        """The engine with the name of its model; empty until it is loaded."""
        return [] if self.loaded is None else [(self.name, self.loaded.engine)]

    # --- models

    def serves(self, model: str) -> bool:
        return model.casefold() in self._names or self.adapters.serves(model)

    def models(self) -> list[Model]:
        about = self._about_model()
        return [Model.of_server(self.name, self.created, **about), *self.adapters.models(**about)]

    async def load_adapter(self, request: LoadAdapterRequest) -> None:
        """Loads an adapter of this model, which becomes a model of its own. Raises APIError."""
        await self.adapters.load(self.ready.engine, request)

    def _about_model(self) -> dict[str, Any]:
        if self.loaded is None:
            return {}
        template = self.loaded.template
        return {
            "max_model_len": self.loaded.engine.max_model_len,
            "family": template.family.name,
            "chat_template": "own" if template.is_own else "family",
            "recommended_quantization": template.family.quantization,
        }

    def _ready_for(self, request: ChatCompletionRequest | CompletionRequest) -> LoadedModel:
        """Returns the loaded model. Raises InvalidRequest for a field that asks for something unsupported."""
        loaded = self._ready(request.model)
        for name in request.refused_fields:
            raise unsupported(name)
        return loaded

    def _ready(self, model: str) -> LoadedModel:
        if not self.serves(model):
            raise ModelNotFound(f"The model {model!r} does not exist; this server has {self.name!r}.", param="model")
        if self.loaded is None:
            percent = round(100 * self.progress.fraction)
            raise ModelLoading(
                f"The model is loading ({self.progress.phase}: {percent} %); try again later.", retry_after=5
            )
        adapter = self.adapters.get(model)
        return self.loaded if adapter is None else replace(self.loaded, adapter=adapter)

    @property
    def ready(self) -> LoadedModel:
        """The loaded model. Raises ModelLoading before."""
        return self._ready(self.name)

    # --- answers

    def stream_chat(self, request: ChatCompletionRequest) -> AsyncGenerator[ChatCompletionChunk]:
        """Yields the answers as chunks of one choice each, then a chunk with the usage. Raises APIError."""
        return self._run(request, partial(plan_chat, renderer=self._renderer), ChatCompletionChunk)

    def stream_completion(self, request: CompletionRequest) -> AsyncGenerator[Completion]:
        """Yields the answers as chunks of one choice each, then a chunk with the usage. Raises APIError."""
        return self._run(request, plan_completion, Completion)

    async def planned_chat(self, request: ChatCompletionRequest) -> AsyncGenerator[ChatCompletionChunk]:
        """Returns the same stream, with all that is wrong with the request already found. Raises APIError."""
        make_plan = partial(plan_chat, renderer=self._renderer)
        loaded, plan = await self._planned(request, make_plan)
        return self._computed(loaded, plan, None, ChatCompletionChunk)

    async def _run(self, request: R, make_plan: MakePlan[R], chunk_type: type[C]) -> AsyncGenerator[C]:
        usage = self._usage(self._ready_for(request))
        loaded, plan = await self._planned(request, make_plan)
        async with aclosing(self._computed(loaded, plan, usage, chunk_type)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _planned(self, request: R, make_plan: MakePlan[R]) -> tuple[LoadedModel, Plan[Any]]:
        """Returns the model and the plan, for which there is room."""
        loaded = self._ready_for(request)
        plan = await make_plan(request, loaded)
        num_computed = plan.computed_per_prompt * len(plan.prompt_lengths)
        num_tokens = plan.computed_per_prompt * sum(plan.prompt_lengths)
        loaded.engine.check_room(num_computed, num_tokens, request_record.current().client)
        return loaded, plan

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
        loaded = self._ready_for(request)
        return len((await self._renderer.render(loaded, request, tool_set_of(request))).prompt_ids)

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        loaded = self._ready(self.name if request.model is None else request.model)
        template = loaded.template
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequest("Send either prompt or messages.", param="prompt", code="invalid_value")
        if request.messages is not None:
            token_ids = (await self._renderer.render(loaded, request, tool_set_of(request))).prompt_ids
        else:
            check_characters(loaded, len(request.prompt or ""), "prompt")
            has_bos = request.add_special_tokens is not False
            token_ids = await asyncio.to_thread(template.render_text, request.prompt or "", has_bos)
        texts = [loaded.texts.text_of(i) for i in token_ids] if request.return_token_strs else None
        limit = loaded.engine.max_model_len
        return TokenizeResponse(count=len(token_ids), max_model_len=limit, tokens=token_ids, token_strs=texts)

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        loaded = self._ready(self.name if request.model is None else request.model)
        if any(token_id >= loaded.engine.num_embeddings for token_id in request.tokens):
            raise InvalidRequest(
                f"Token ids must be less than {loaded.engine.num_embeddings}.", param="tokens", code="invalid_value"
            )
        text = await asyncio.to_thread(loaded.template.tokenizer.decode, request.tokens)
        return DetokenizeResponse(prompt=str(text))

    @property
    def tokenizer_info(self) -> TokenizerInfo:
        return tokenizer_info(self.ready)
