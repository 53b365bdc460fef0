"""LocalModel: the model of this process. Prompt, engine and streamer, put together as chunks."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from checkpoints import checkpoint
from checkpoints.progress import Progress
from config import Settings
from errors import ContextLengthExceeded, InvalidRequest, ModelLoadError, ModelLoading, ModelNotFound, unsupported
from prompt_templates import RenderOptions
from schemas import (
    ChatCompletionChunk,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    DetokenizeResponse,
    Model,
    ModelPermission,
    TokenizeRequest,
    TokenizeResponse,
)
from serving.chat import ChoiceChunks, ReasoningState, compiled, reading_of, with_marks
from serving.completion import Choices, Prompt, check_suffix, num_answers
from serving.generation import GenerationRequest, OutputDelta, RequestUsage, answer, best, merge
from serving.image_fetcher import ImageFetcher
from serving.loading import LoadedModel, LoadModel, load
from serving.model_slot import ModelSlot, in_daemon_thread
from telemetry import request_record
from telemetry.metrics import Metrics
from text.structured_output import is_structured, structure_of
from text.tools import ToolSet, tool_set_of

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.sampling_params import SamplingParams
    from engine.vision import Image

log = logging.getLogger(__name__)

COMPLETION_MAX_TOKENS = 2048  # where a completion request is silent; the specification's default
FEWEST_CHARACTERS = 2**20  # that are tokenized, however short the context is
BACKGROUND = 1  # priority of what nobody is looking at


class LocalModel:
    def __init__(
        self,
        settings: Settings,
        on_failure: Callable[[str], None],
        load: LoadModel = load,
        metrics: Metrics | None = None,
    ) -> None:
        """`on_failure` gets one sentence if the model cannot be loaded, or its engine has ended."""
        self.settings = settings
        self._metrics = metrics or Metrics()
        self.progress = Progress()
        self.path = settings.model_path or checkpoint.default_model_path()
        self.name = settings.served_model_name or checkpoint.served_name(self.path)
        self._names = {name.casefold() for name in (self.name, self.path, checkpoint.served_name(self.path))}
        self._created = int(time.time())
        self._on_failure = on_failure
        self._load_model = load
        self.loaded: LoadedModel | None = None
        self._slot = ModelSlot(self.name, self._load)
        self._failure: str | None = None
        self._fetcher = ImageFetcher(settings.allow_private_image_urls, settings.image_url_hosts)

    # --- life

    def start(self) -> None:
        """Checks what can be checked at once, then loads in the background."""
        try:
            checkpoint.check(self.path)
        except ModelLoadError as error:
            self._fail(str(error))
        else:
            self._slot.start()

    async def _load(self) -> LoadedModel:
        try:
            loaded = await in_daemon_thread(partial(self._load_model, self.path, self.settings, self.progress))
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
        """Whether it can serve, and what to say about it."""
        if self._failure is not None:
            return False, {"status": "failed", "model": self.name, "message": self._failure}
        if self.loaded is None:
            progress = {"phase": self.progress.phase, "fraction": round(self.progress.fraction, 3)}
            return False, {"status": "loading", "model": self.name, "progress": progress}
        engine = self.loaded.engine
        counts = {"running": engine.num_running, "waiting": engine.num_waiting, "kv_blocks": engine.num_used_blocks}
        if engine.failure is not None or engine.is_stalled:
            return False, {"status": "failed" if engine.failure else "stalled", "model": self.name, **counts}
        return True, {"status": "ok", "model": self.name, **counts}

    @property
    def engines(self) -> "list[tuple[str, Engine]]":
        """With the name of its model; none while that loads."""
        return [] if self.loaded is None else [(self.name, self.loaded.engine)]

    # --- models

    def serves(self, model: str) -> bool:
        return model.casefold() in self._names

    def models(self) -> list[Model]:
        return [
            Model(
                id=self.name,
                created=self._created,
                permission=[ModelPermission(created=self._created)],
                root=self.name,
                **self._about_model(),
            )
        ]

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
        """The loaded model; raises InvalidRequest for a field that asks for what it does not do."""
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
        return self.loaded

    # --- answers

    async def stream_chat(self, request: ChatCompletionRequest) -> AsyncGenerator[ChatCompletionChunk]:
        loaded = self._ready_for(request)
        meter = RequestUsage(self.name, self._metrics.of(self.name))
        num_choices = request.n or 1
        _check_room(loaded.engine, num_choices, "n")
        box = tool_set_of(request)
        prompt_ids, images = await self._render(loaded, request, box)
        _check_prompt(loaded.engine, prompt_ids, "messages")
        state = loaded.template.thinking(prompt_ids)
        params = self._sampling_params(loaded, request, len(prompt_ids), None)
        params = await self._constrained(
            loaded, request, params, box, ReasoningState(state, request.thinking_token_budget)
        )
        question = GenerationRequest(
            prompt_ids,
            params,
            with_marks(request.stop_strings, loaded.template.marks),
            priority=BACKGROUND if _is_task(request) else 0,
            images=images,
            reading=reading_of(loaded.template, box, state, is_structured(request), params.grammar),
        )
        loaded.engine.check_room(num_choices, num_choices * len(prompt_ids), request_record.current().client)
        meter.start([len(prompt_ids)], num_choices)
        head = ChatCompletionChunk(model=self.name, choices=[])
        shows, is_call = request.num_logprobs is not None, box is not None and box.is_required
        wire = [ChoiceChunks(index, shows, loaded.texts, is_call) for index in range(num_choices)]
        sources = [answer(loaded, index, question.of_choice(index)) for index in range(num_choices)]
        async with aclosing(merge(sources)) as pieces:
            async for piece in pieces:
                is_first = meter.add(piece)
                for choice in wire[piece.index].of(piece, is_first):
                    is_last = meter.is_complete and choice.finish_reason is not None
                    timings = meter.timings if is_last else None
                    yield head.model_copy(update={"choices": [choice], "timings": timings})
        yield head.model_copy(update={"usage": meter.usage, "timings": timings})

    async def _render(
        self, loaded: LoadedModel, request: ChatCompletionRequest | TokenizeRequest, box: ToolSet | None
    ) -> "tuple[list[int], tuple[Image, ...]]":
        """The prompt of messages, and where its images are. A model that does not see fetches nothing."""
        messages = request.messages or []
        crops = (
            []
            if loaded.image_inputs is None
            else await loaded.image_inputs.crops_of(messages, self._fetcher, self.settings.max_images)
        )
        _check_characters(loaded, sum(len(text) for message in messages for text in message.texts), "messages")
        thinks = False if request.thinks is None and _is_task(request) else request.thinks
        options = RenderOptions(
            request.continue_final_message,
            request.add_generation_prompt,
            [[crop.num_tokens for crop in image] for image in crops],
            box.shown if box else (),
            thinks,
            request.effort,
        )
        prompt_ids = await asyncio.to_thread(loaded.template.render_chat, messages, options)
        if loaded.image_inputs is None or not crops:
            return prompt_ids, ()
        return prompt_ids, loaded.image_inputs.place(prompt_ids, [crop for image in crops for crop in image])

    async def stream_completion(self, request: CompletionRequest) -> AsyncGenerator[Completion]:
        loaded = self._ready_for(request)
        meter = RequestUsage(self.name, self._metrics.of(self.name))
        n, best_of = num_answers(request)
        check_suffix(request)
        _check_room(loaded.engine, len(request.prompts) * best_of, "prompt")
        for text in [prompt for prompt in request.prompts if isinstance(prompt, str)]:
            _check_characters(loaded, len(text), "prompt")
        prompts = [await asyncio.to_thread(Prompt.of, loaded, request.suffix, prompt) for prompt in request.prompts]
        sources: list[AsyncGenerator[OutputDelta]] = []
        num_same: Counter[tuple[int, ...]] = Counter()  # answers so far of each prompt
        for number, prompt in enumerate(prompts):
            earlier = num_same[tuple(prompt.token_ids)]
            num_same[tuple(prompt.token_ids)] += best_of
            question = self._question(loaded, request, prompt, best_of > n)
            params = await self._constrained(loaded, request, question.params, None, None)
            question = replace(question, params=params)
            first = 0 if best_of > n else number * n
            answers = [answer(loaded, first + i, question.of_choice(earlier + i)) for i in range(best_of)]
            sources += [best(answers, n, number * n)] if best_of > n else answers
        lengths = [len(prompt.token_ids) for prompt in prompts]
        loaded.engine.check_room(len(prompts) * best_of, sum(lengths) * best_of, request_record.current().client)
        meter.start(lengths, n)
        choices = Choices(request, prompts, loaded.texts)
        head = Completion(model=self.name, choices=[])
        async with aclosing(merge(sources)) as pieces:
            async for piece in pieces:
                if request.max_tokens == 0:
                    piece = replace(piece, text="", num_tokens=0, finish_reason="length", tokens=())
                choice = choices.of(piece, meter.add(piece))
                timings = meter.timings if meter.is_complete else None
                yield head.model_copy(update={"choices": [choice], "timings": timings})
        yield head.model_copy(update={"usage": meter.usage, "timings": timings})

    def _question(
        self, loaded: LoadedModel, request: CompletionRequest, prompt: Prompt, is_ranked: bool
    ) -> GenerationRequest:
        _check_prompt(loaded.engine, prompt.token_ids, "prompt")
        params = self._sampling_params(loaded, request, len(prompt.token_ids), COMPLETION_MAX_TOKENS)
        prefix = prompt.token_ids[-4:]  # how the answer's first token reads depends on these
        return GenerationRequest(prompt.token_ids, prompt.adapt(params, is_ranked), request.stop_strings, prefix)

    async def _constrained(
        self,
        loaded: LoadedModel,
        request: ChatCompletionRequest | CompletionRequest,
        params: "SamplingParams",
        box: ToolSet | None,
        thoughts: ReasoningState | None,
    ) -> "SamplingParams":
        """With what the answer must look like. Raises InvalidRequest."""
        template = loaded.template
        asked = await asyncio.to_thread(structure_of, request, box, template.tool_format, template.literals)
        constraint = None if asked is None else await compiled(loaded, asked, box is None or box.is_parallel)
        if thoughts is None:
            return replace(params, grammar=constraint)
        return replace(params, grammar=thoughts.before(constraint, loaded), thoughts=thoughts.tokens(template))

    # --- tokens

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        loaded = self._ready(self.name if request.model is None else request.model)
        template = loaded.template
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequest("Send either prompt or messages.", param="prompt", code="invalid_value")
        if request.messages is not None:
            token_ids, _ = await self._render(loaded, request, tool_set_of(request))
        else:
            _check_characters(loaded, len(request.prompt or ""), "prompt")
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

    def _sampling_params(
        self,
        loaded: LoadedModel,
        request: ChatCompletionRequest | CompletionRequest,
        prompt_tokens: int,
        default_max_tokens: int | None,
    ) -> "SamplingParams":
        """The request's values, else the model's, else the specification's; an answer is no longer than the context
        leaves. Raises ContextLengthExceeded for a prompt that fills it, InvalidRequest for a limit beyond it."""
        from engine.sampling_params import SamplingParams

        _check_token_ids(loaded.engine, request)
        limit = loaded.engine.max_model_len
        left = limit - prompt_tokens
        if left < 1:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{prompt_tokens + 1} tokens ({prompt_tokens} in the prompt, 1 in the completion). "
                "Please reduce the length of the prompt. (context_length_exceeded)",
                param="messages" if isinstance(request, ChatCompletionRequest) else "prompt",
            )
        if (request.max_tokens or 0) > limit:
            raise InvalidRequest(
                f"You requested {request.max_tokens} tokens in the completion, but this model's "
                f"maximum context length is {limit} tokens. Please ask for fewer tokens.",
                param=request.limit_field,
                code="invalid_value",
            )
        if (request.min_tokens or 0) > (limit if request.max_tokens is None else request.max_tokens):
            raise InvalidRequest("min_tokens must be at most max_tokens.", param="min_tokens", code="invalid_value")
        wanted = default_max_tokens or left if request.max_tokens is None else max(request.max_tokens, 1)  # 0: hidden
        return SamplingParams(
            **{**loaded.defaults, **request.sampling_values},
            max_tokens=min(left, wanted),
            num_logprobs=request.num_logprobs,
            num_prompt_logprobs=request.num_prompt_logprobs if isinstance(request, CompletionRequest) else None,
        )


def _check_characters(loaded: LoadedModel, num_characters: int, param: str) -> None:
    """What must be too long, whatever its tokens are, is not tokenized: that takes a second for each megabyte."""
    limit = loaded.engine.max_model_len
    if num_characters > max(limit * loaded.template.longest_token, FEWEST_CHARACTERS):
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens, and a prompt of {num_characters} "
            "characters is longer than that. Please reduce the length of the prompt. "
            "(context_length_exceeded)",
            param=param,
        )


def _is_task(request: ChatCompletionRequest | TokenizeRequest) -> bool:
    """Titles, tags and the like, which Open WebUI asks for beside a chat: they let the chat's prompt go first, and
    nobody reads what the model thinks of them."""
    content = request.messages[-1].content if request.messages else None
    is_chat = isinstance(request, ChatCompletionRequest) and not request.stream
    return is_chat and isinstance(content, str) and content.startswith("### Task:")


def _check_room(engine: "Engine", num_sequences: int, param: str) -> None:
    """Raises InvalidRequest for more sequences than could ever wait, Overloaded for more than can now; their
    tokens are not known yet."""
    if num_sequences > engine.admission.max_sequences:
        raise InvalidRequest(
            f"You requested {num_sequences} answers, but this server accepts at most "
            f"{engine.admission.max_sequences} at a time: ask for fewer.",
            param=param,
        )
    engine.check_open(num_sequences, request_record.current().client)


def _check_token_ids(engine: "Engine", request: ChatCompletionRequest | CompletionRequest) -> None:
    for name in ("logit_bias", "stop_token_ids"):
        if any(not 0 <= token_id < engine.num_embeddings for token_id in getattr(request, name) or ()):
            raise InvalidRequest(
                f"{name}: token ids must be from 0 to {engine.num_embeddings - 1}.",
                param=name,
                code="invalid_value",
            )


def _check_prompt(engine: "Engine", token_ids: list[int], param: str) -> None:
    """A tokenizer may know tokens, for images say, that the model has no embedding for."""
    if not token_ids:
        raise InvalidRequest("The prompt is empty.", param=param, code="invalid_value")
    if max(token_ids) >= engine.num_embeddings:
        raise InvalidRequest(
            f"The prompt has the token id {max(token_ids)}, but the model's token ids must be less "
            f"than {engine.num_embeddings}.",
            param=param,
            code="invalid_value",
        )
