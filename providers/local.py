"""LocalProvider: the model of this process. Prompt, engine and streamer, put together as chunks."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import checkpoint
from config import Settings
from errors import ContextLengthExceeded, InvalidRequest, ModelLoadError, ModelLoading, ModelNotFound
from logprobs import Scored, TokenTexts
from progress import Progress
from providers.loading import Loaded, in_daemon_thread, load
from schemas import (
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Delta,
    DetokenizeRequest,
    DetokenizeResponse,
    FinishReason,
    Model,
    ModelPermission,
    TokenizeRequest,
    TokenizeResponse,
    Usage,
)
from streaming import TextStreamer

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.sampling import SampledToken, SamplingParams

log = logging.getLogger(__name__)

COMPLETION_MAX_TOKENS = 2048  # where a completion request is silent; the specification's default


@dataclass(frozen=True)
class Piece:
    """What one output of the engine means for one choice."""

    index: int
    text: str
    num_tokens: int  # generated so far
    finish_reason: FinishReason | None = None
    tokens: tuple["SampledToken", ...] = ()  # those that the text came from

    @property
    def scored(self) -> list[tuple[Scored, Sequence[Scored]]]:
        """The tokens whose log-probabilities were asked for."""
        return [((t.token_id, t.logprob), t.top_logprobs) for t in self.tokens if t.logprob is not None]


class LocalProvider:
    def __init__(self, settings: Settings, on_failure: Callable[[str], None]) -> None:
        """`on_failure` gets one sentence if the model cannot be loaded."""
        self.settings = settings
        self.progress = Progress()
        self.path = settings.model_path or checkpoint.default_model_path()
        self.name = settings.served_model_name or checkpoint.served_name(self.path)
        self._names = {name.casefold() for name in (self.name, self.path, checkpoint.served_name(self.path))}
        self._created = int(time.time())
        self._on_failure = on_failure
        self._loaded: Loaded | None = None
        self._loading: asyncio.Task[None] | None = None
        self._failure: str | None = None

    # --- life

    def start(self) -> None:
        """Checks what can be checked at once, then loads in the background."""
        try:
            checkpoint.check(self.path)
        except ModelLoadError as error:
            self._fail(str(error))
        else:
            self._loading = asyncio.create_task(self._load())

    async def _load(self) -> None:
        begin = time.monotonic()
        try:
            self._loaded = await in_daemon_thread(partial(load, self.path, self.settings, self.progress))
        except ModelLoadError as error:
            self._fail(str(error))
        except Exception as error:
            log.debug("loading failed", exc_info=True)
            self._fail(f"The model {self.path} cannot be loaded: {type(error).__name__}: {error}")
        else:
            self._loaded.engine.start()
            log.info("%s is ready after %.1f s", self.name, time.monotonic() - begin)

    def _fail(self, sentence: str) -> None:
        self._failure = sentence
        self._on_failure(sentence)

    async def close(self, timeout: float) -> None:
        if self._loading is not None:
            self._loading.cancel()
        if self._loaded is not None:
            await self._loaded.engine.close(timeout)

    @property
    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether it can serve, and what to say about it."""
        if self._failure is not None:
            return False, {"status": "failed", "model": self.name, "message": self._failure}
        if self._loaded is None:
            progress = {"phase": self.progress.phase, "fraction": round(self.progress.fraction, 3)}
            return False, {"status": "loading", "model": self.name, "progress": progress}
        engine = self._loaded.engine
        counts = {"running": engine.num_running, "waiting": engine.num_waiting, "kv_blocks": engine.num_used_blocks}
        if engine.failure is not None:
            return False, {"status": "failed", "model": self.name, **counts}
        return True, {"status": "ok", "model": self.name, **counts}

    # --- models

    def serves(self, model: str) -> bool:
        return model.casefold() in self._names

    def models(self) -> list[Model]:
        return [
            Model(
                id=self.name,
                created=self._created,
                permission=[ModelPermission(created=self._created)],
                root=self.path,
                max_model_len=self._loaded.engine.max_model_len if self._loaded else None,
            )
        ]

    def _ready(self, model: str) -> Loaded:
        if not self.serves(model):
            raise ModelNotFound(f"The model {model!r} does not exist; this server has {self.name!r}.", param="model")
        if self._loaded is None:
            percent = round(100 * self.progress.fraction)
            raise ModelLoading(f"The model is loading ({self.progress.phase}: {percent} %).", retry_after=5)
        return self._loaded

    # --- answers

    async def stream_chat(self, request: ChatCompletionRequest) -> AsyncGenerator[ChatCompletionChunk]:
        loaded = self._ready(request.model)
        num_choices = request.n or 1
        _check_room(loaded.engine, num_choices, "n")
        prompt_ids = await asyncio.to_thread(loaded.template.render_chat, request.messages)
        _check_prompt(loaded.engine, prompt_ids, "messages")
        params = self._sampling_params(loaded, request, len(prompt_ids), None)
        choices = [
            _answer(loaded, index, prompt_ids, _of_choice(params, index), request.stop_strings)
            for index in range(num_choices)
        ]
        head = ChatCompletionChunk(model=self.name, choices=[])
        counts = [0] * num_choices
        begun: set[int] = set()
        async with aclosing(merge(choices)) as pieces:
            async for piece in pieces:
                counts[piece.index] = piece.num_tokens
                for choice in _chunk_choices(piece, piece.index not in begun, loaded.texts):
                    yield head.model_copy(update={"choices": [choice]})
                begun.add(piece.index)
        yield head.model_copy(update={"usage": _usage(len(prompt_ids), sum(counts))})

    async def stream_completion(self, request: CompletionRequest) -> AsyncGenerator[Completion]:
        loaded = self._ready(request.model)
        n = request.n or 1
        _check_room(loaded.engine, len(request.prompts) * n, "prompt")
        prompts = [await asyncio.to_thread(_completion_prompt, loaded, prompt) for prompt in request.prompts]
        choices = []
        for number, prompt_ids in enumerate(prompts):
            params = self._sampling_params(loaded, request, len(prompt_ids), COMPLETION_MAX_TOKENS)
            tail = loaded.template.tail(prompt_ids)
            for i in range(n):
                choice_params = _of_choice(params, i)
                choices.append(_answer(loaded, number * n + i, prompt_ids, choice_params, request.stop_strings, tail))
        head = Completion(model=self.name, choices=[])
        counts = [0] * len(choices)
        offsets = [0] * len(choices)  # characters, for the legacy log-probabilities
        async with aclosing(merge(choices)) as pieces:
            async for piece in pieces:
                counts[piece.index] = piece.num_tokens
                scored = piece.scored
                logprobs = loaded.texts.completion(scored, offsets[piece.index]) if scored else None
                offsets[piece.index] += len(piece.text)
                choice = CompletionChoice(
                    index=piece.index, text=piece.text, logprobs=logprobs, finish_reason=piece.finish_reason
                )
                yield head.model_copy(update={"choices": [choice]})
        yield head.model_copy(update={"usage": _usage(sum(map(len, prompts)), sum(counts))})

    # --- tokens

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        loaded = self._ready(request.model or self.name)
        template = loaded.template
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequest("Send either prompt or messages.", param="prompt", code="invalid_value")
        if request.messages is not None:
            token_ids = await asyncio.to_thread(template.render_chat, request.messages)
        else:
            token_ids = await asyncio.to_thread(template.render_text, request.prompt or "")
        texts = [loaded.texts.text_of(i) for i in token_ids] if request.return_token_strs else None
        limit = loaded.engine.max_model_len
        return TokenizeResponse(count=len(token_ids), max_model_len=limit, tokens=token_ids, token_strs=texts)

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        loaded = self._ready(request.model or self.name)
        if any(token_id >= loaded.engine.num_embeddings for token_id in request.tokens):
            raise InvalidRequest(
                f"Token ids are below {loaded.engine.num_embeddings}.", param="tokens", code="invalid_value"
            )
        text = await asyncio.to_thread(loaded.template.tokenizer.decode, request.tokens)
        return DetokenizeResponse(prompt=str(text))

    def _sampling_params(
        self,
        loaded: Loaded,
        request: ChatCompletionRequest | CompletionRequest,
        prompt_tokens: int,
        default_max_tokens: int | None,
    ) -> "SamplingParams":
        """The request's values, else the model's, else the specification's; raises ContextLengthExceeded."""
        from engine.sampling import SamplingParams

        _check_bias(loaded.engine, request)
        limit = loaded.engine.max_model_len
        wanted = request.max_tokens
        if prompt_tokens + (wanted or 1) > limit:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{prompt_tokens + (wanted or 1)} tokens ({prompt_tokens} in the prompt, {wanted or 1} in the "
                "completion). Please reduce the length of the prompt or of the completion.",
                param="messages" if isinstance(request, ChatCompletionRequest) else "prompt",
            )
        if (request.min_tokens or 0) > (wanted or limit):
            raise InvalidRequest("min_tokens is larger than max_tokens.", param="min_tokens", code="invalid_value")
        left = limit - prompt_tokens
        given = {field.name: getattr(request, field.name) for field in fields(SamplingParams)}
        values = {**loaded.defaults, **{name: value for name, value in given.items() if value is not None}}
        return SamplingParams(**{**values, "max_tokens": wanted or min(left, default_max_tokens or left)})


def _completion_prompt(loaded: Loaded, prompt: str | list[int]) -> list[int]:
    token_ids = loaded.template.render_text(prompt) if isinstance(prompt, str) else prompt
    _check_prompt(loaded.engine, token_ids, "prompt")
    return token_ids


def _check_room(engine: "Engine", num_sequences: int, param: str) -> None:
    """Raises InvalidRequest for more sequences than could ever wait, Overloaded for more than can now."""
    if num_sequences > engine.max_live:
        raise InvalidRequest(
            f"{num_sequences} answers are asked for, and this server takes {engine.max_live} at a time.", param=param
        )
    engine.check_open(num_sequences)


def _check_bias(engine: "Engine", request: ChatCompletionRequest | CompletionRequest) -> None:
    if any(not 0 <= token_id < engine.num_embeddings for token_id in request.logit_bias or ()):
        raise InvalidRequest(
            f"logit_bias: the model's token ids are from 0 to {engine.num_embeddings - 1}.",
            param="logit_bias",
            code="invalid_value",
        )


def _check_prompt(engine: "Engine", token_ids: list[int], param: str) -> None:
    """A tokenizer may know tokens, for images say, that the model has no embedding for."""
    if not token_ids:
        raise InvalidRequest("The prompt is empty.", param=param, code="invalid_value")
    if max(token_ids) >= engine.num_embeddings:
        raise InvalidRequest(
            f"The prompt holds the token id {max(token_ids)}; the model's are below {engine.num_embeddings}.",
            param=param,
            code="invalid_value",
        )


def _of_choice(params: "SamplingParams", index: int) -> "SamplingParams":
    """The choices of a seeded request differ, and each is repeatable."""
    return params if params.seed is None or index == 0 else replace(params, seed=params.seed + index)


async def _answer(
    loaded: Loaded,
    index: int,
    prompt_ids: list[int],
    params: "SamplingParams",
    stop: Sequence[str],
    prefix: Sequence[int] = (),
) -> AsyncGenerator[Piece]:
    """One choice: the engine's tokens as text, until it ends or a stop string comes."""
    streamer = TextStreamer(loaded.template.tokenizer, stop, prefix)
    num_tokens = 0
    pending: list[SampledToken] = []  # their text is not out yet
    async with aclosing(loaded.engine.generate(prompt_ids, params)) as outputs:
        async for output in outputs:
            num_tokens += 1
            if output.sampled is not None:
                pending.append(output.sampled)
            text = "" if output.token_id is None else streamer.put([output.token_id])
            reason = output.finish_reason
            if reason and not streamer.is_stopped:
                text += streamer.end()
            if streamer.is_stopped:
                reason = "stop"
                pending = _visible(pending, text, loaded.texts)
            if text or reason:
                yield Piece(index, text, num_tokens, reason, tuple(pending))
                pending = []
            elif num_tokens == 1:
                yield Piece(index, "", num_tokens)
            if reason:
                return


def _visible(tokens: list["SampledToken"], text: str, texts: TokenTexts) -> list["SampledToken"]:
    """The tokens before a stop string: as many as it takes to cover the text that is left of theirs."""
    length = len(text.encode())
    covered, visible = 0, []
    for token in tokens:
        if covered >= length:
            break
        visible.append(token)
        covered += len(texts.bytes_of(token.token_id))
    return visible


def _chunk_choices(piece: Piece, is_first: bool, texts: TokenTexts) -> Iterator[ChunkChoice]:
    """The chunks that a piece becomes: the role once, text, and the finish reason with an empty delta."""
    if is_first:
        yield ChunkChoice(index=piece.index, delta=Delta(role="assistant", content=""))
    scored = piece.scored
    if piece.text or scored:
        logprobs = texts.chat(scored) if scored else None
        yield ChunkChoice(index=piece.index, delta=Delta(content=piece.text), logprobs=logprobs)
    if piece.finish_reason:
        yield ChunkChoice(index=piece.index, delta=Delta(), finish_reason=piece.finish_reason)


def _usage(prompt_tokens: int, completion_tokens: int) -> Usage:
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
    )


async def merge(sources: Sequence[AsyncGenerator[Piece]]) -> AsyncGenerator[Piece]:
    """The items of all sources as they come; leaving it leaves them all. The first error ends it."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:
            async for piece in source:
                yield piece
        return
    items: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def pump(source: AsyncGenerator[Piece]) -> None:
        try:
            async with aclosing(source):
                async for piece in source:
                    items.put_nowait(piece)
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    tasks = [asyncio.create_task(pump(source)) for source in sources]
    try:
        pending = len(tasks)
        while pending:
            item = await items.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                pending -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
