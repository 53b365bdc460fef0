"""Answers: the engine's tokens for one prompt as text, piece by piece; several at once; the best of many."""

import asyncio
import time
from bisect import bisect_left
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING

from schemas import CompletionTokensDetails, FinishReason, PromptTokensDetails, Timings, Usage
from serving.loading import LoadedModel
from telemetry import request_record
from telemetry.metrics import ModelMetrics
from text.answer_parser import AnswerParser, ContentDelta, ParserOptions
from text.detokenizer import Detokenizer, StopFinder, TextDecoder
from text.lenient_json import BLANKS

if TYPE_CHECKING:
    from engine.sampling_params import SampledToken, SamplingParams
    from engine.vision import Image


TEXT = ParserOptions({})  # all of it is content


@dataclass(frozen=True)
class GenerationRequest:
    """What the engine is asked."""

    prompt_ids: list[int]
    params: "SamplingParams"
    stop: Sequence[str]
    prefix: Sequence[int] = ()  # the prompt's end, if the answer continues its text
    priority: int = 0  # a smaller one goes first
    images: "tuple[Image, ...]" = ()
    reading: ParserOptions = TEXT

    def of_choice(self, number: int) -> "GenerationRequest":
        """The choices of a seeded request are independent, also of those of other seeds, and each is repeatable; the
        first one has the request's own seed."""
        if self.params.seed is None or number == 0:
            return self
        digest = blake2b(f"{self.params.seed} {number}".encode(), digest_size=8).digest()
        return replace(self, params=replace(self.params, seed=int.from_bytes(digest, "big")))


@dataclass(frozen=True)
class OutputDelta:
    """What one output of the engine means for one choice."""

    index: int
    text: str
    num_tokens: int  # generated so far
    finish_reason: FinishReason | None = None
    tokens: tuple["SampledToken", ...] = ()  # those that the text came from
    offsets: tuple[int, ...] = ()  # characters of the answer before each of them
    prompt: tuple["SampledToken", ...] = ()  # the prompt's, from its second token on, if they are scored
    num_cached_tokens: int = 0  # tokens of the prompt that were not computed; with the first piece
    parts: tuple[ContentDelta, ...] = ()  # what the text is
    num_reasoning: int = 0  # of the tokens
    queue_time: float = 0.0  # seconds until its prompt began to be computed; with the first piece
    is_ranked: bool = False  # it was chosen when it was whole: when its tokens came means nothing


class RequestUsage:
    """What a request costs: tokens and time. It tells the request's record, and the metrics through it."""

    def __init__(self, model: str = "", metrics: ModelMetrics | None = None) -> None:
        self._record = request_record.current()
        self._record.model, self._record.metrics = model, metrics
        self._begin = time.perf_counter()
        self._last: dict[int, float] = {}  # when each choice's last token came
        self._first: float | None = None
        self._prompts: list[int] = []  # tokens of each
        self._counts: dict[int, int] = {}  # tokens of each choice
        self._reasoning: dict[int, int] = {}  # of these
        self._num_unfinished = 0
        self._answers_per_prompt = 1
        self._reused: dict[int, int] = {}  # tokens of each prompt, by the answer that reused the fewest

    def start(self, prompt_tokens: list[int], answers_per_prompt: int) -> None:
        self._prompts, self._answers_per_prompt = prompt_tokens, answers_per_prompt
        self._num_unfinished = len(prompt_tokens) * answers_per_prompt
        self._record.prompt_tokens = self._prompt_tokens

    def add(self, piece: OutputDelta) -> bool:
        """Whether the piece is its choice's first."""
        now = time.perf_counter()
        is_first = piece.index not in self._counts
        if is_first:
            self._begin_choice(piece)
        self._tell(piece, now, is_first)
        self._first = self._first or now
        self._counts[piece.index] = piece.num_tokens
        self._reasoning[piece.index] = piece.num_reasoning
        self._num_unfinished -= piece.finish_reason is not None
        self._record.is_complete = self.is_complete
        return is_first

    def _begin_choice(self, piece: OutputDelta) -> None:
        """Each answer looks for its prompt in the cache, also where several have the same one."""
        prompt, own = piece.index // self._answers_per_prompt, self._record.metrics
        if own is not None:
            own.queue.observe(piece.queue_time)
            own.prefix_queries.inc(self._prompts[prompt])
            own.prefix_hits.inc(piece.num_cached_tokens)
            own.prompt_tokens.inc(0 if prompt in self._reused else self._prompts[prompt])
        self._reused[prompt] = min(piece.num_cached_tokens, self._reused.get(prompt, piece.num_cached_tokens))
        self._record.cached_tokens = sum(self._reused.values())

    def _tell(self, piece: OutputDelta, now: float, is_first: bool) -> None:
        seen, own = self._record, self._record.metrics
        num_new = piece.num_tokens - self._counts.get(piece.index, 0)
        seen.completion_tokens += num_new
        if piece.finish_reason is not None:
            seen.finish_reasons.append(piece.finish_reason)
        if self._first is None:
            seen.queue_time = piece.queue_time
        if own is not None:
            own.generation_tokens.inc(num_new)
        if not piece.is_ranked:
            self._tell_times(piece.index, num_new, now, is_first)

    def _tell_times(self, index: int, num_new: int, now: float, is_first: bool) -> None:
        own = self._record.metrics
        if self._first is None:
            self._record.first_token = now - self._begin
        if own is not None:
            if self._first is None:
                own.first_token.observe(now - self._begin)
            for _ in range(num_new - is_first):  # those that came together share the time since the last
                own.between_tokens.observe((now - self._last.get(index, now)) / num_new)
        self._last[index] = now

    @property
    def _prompt_tokens(self) -> int:
        return sum(self._prompts)

    @property
    def is_complete(self) -> bool:
        return not self._num_unfinished

    @property
    def usage(self) -> Usage:
        completion_tokens = sum(self._counts.values())
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self._prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._reused.values())),
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=sum(self._reasoning.values())),
        )

    @property
    def timings(self) -> Timings:
        now = time.perf_counter()
        first = self._first or now
        queue_time, generated = max(first - self._begin, 1e-6), max(now - first, 1e-6)
        num_tokens = sum(self._counts.values())
        return Timings(
            prompt_n=self._prompt_tokens,
            prompt_ms=queue_time * 1000,
            prompt_per_second=self._prompt_tokens / queue_time,
            predicted_n=num_tokens,
            predicted_ms=generated * 1000,
            predicted_per_second=max(num_tokens - len(self._counts), 0) / generated,
        )


class ChoiceReader:
    """Reads one choice's tokens: their text, and what it is. Stop strings end the content, and not the thoughts."""

    def __init__(self, detokenizer: Detokenizer, byte_ids: Collection[int], question: GenerationRequest) -> None:
        self._decoder = TextDecoder(detokenizer, question.prefix, byte_ids)
        self._stops, self._has_stops = StopFinder(question.stop), bool(question.stop)
        self._parser = AnswerParser(question.reading)
        self._think, self._min_tokens = question.reading.think, question.params.min_tokens
        self._is_at_start = self._think is not None and not question.reading.is_thinking
        self._is_thinking = question.reading.is_thinking
        self._is_behind_thoughts = False  # blanks there are no content, which stop strings are looked for in
        self._blanks = ""  # before what may be thoughts
        self.num_tokens = self.num_reasoning = 0  # tokens so far, and of them those of the thoughts
        self.num_characters = self.num_released = 0  # decoded so far, and of them those that are out
        self._text = ""  # not taken yet
        self._parts: list[ContentDelta] = []

    @property
    def is_done(self) -> bool:
        """Nothing that follows belongs to the answer."""
        return self._stops.is_stopped or self._parser.is_done

    @property
    def is_stopped(self) -> bool:
        """A stop string came, and is cut off."""
        return self._stops.is_stopped

    def put(self, token_id: int | None) -> None:
        """None: the token that ends the answer, which is not shown."""
        self.num_tokens += 1
        was_reasoning = self._parser.is_reasoning
        if token_id is not None:
            self._add(self._decoder.put(token_id))
        self.num_reasoning += was_reasoning or self._parser.is_reasoning

    def end(self, is_whole: bool) -> None:
        """What was held back comes, unless the answer was over before. is_whole: the model itself ended the answer."""
        if not self.is_done:
            self._add(self._decoder.end())
        if not self.is_done:
            self._release(self._stops.put(self._blanks, self._may_stop))
        if not self.is_done:
            self._release(self._stops.end())
        self._parts += self._parser.end(is_whole and not self.is_done)

    def take(self) -> tuple[str, list[ContentDelta]]:
        """What came since it was asked last."""
        text, parts, self._text, self._parts = self._text, self._parts, "", []
        return text, parts

    def finish_reason(self, reason: FinishReason) -> FinishReason:
        return self._parser.finish_reason("stop" if self.is_stopped else reason)

    @property
    def _may_stop(self) -> bool:
        return self.num_tokens >= self._min_tokens

    def _add(self, new: str) -> None:
        self.num_characters += len(new)
        if self._is_at_start or self._is_thinking or self._is_behind_thoughts:
            new = self._content_of(new)
        self._release(self._stops.put(new, self._may_stop) if self._has_stops else new)

    def _content_of(self, new: str) -> str:
        """Without what may be thoughts, or blanks around them."""
        new, self._blanks = self._blanks + new, ""
        if self._is_at_start and (beginning := new.lstrip(BLANKS)[:1]):
            self._is_at_start, self._is_thinking = False, self._think is not None and beginning == self._think[0]
        if self._is_at_start:
            self._blanks = new
            return ""
        if self._is_thinking:
            new = self._without_thoughts(new)
        return self._without_blanks(new) if self._is_behind_thoughts else new

    def _without_thoughts(self, new: str) -> str:
        """What is behind the mark of their end; the parser knows whether something else has ended them."""
        assert self._think is not None
        thoughts, end, rest = new.partition(self._think[1])
        self._release(thoughts)
        self._is_thinking = not end and (self._parser.is_reasoning or not thoughts)
        self._release(self._stops.put(end, self._may_stop))
        self._is_behind_thoughts = bool(end) and not self._stops.is_holding
        return rest

    def _without_blanks(self, new: str) -> str:
        rest = new.lstrip(BLANKS)
        self._release(new[: len(new) - len(rest)])
        self._is_behind_thoughts = not rest
        return rest

    def _release(self, text: str) -> None:
        if text:
            self.num_released += len(text)
            self._text += text
            self._parts += self._parser.put(text)


async def answer(loaded: LoadedModel, index: int, question: GenerationRequest) -> AsyncGenerator[OutputDelta]:
    """One choice, until it ends or a stop string comes."""
    template = loaded.template
    detokenizer = template.marking_detokenizer if question.reading.marks else template.detokenizer
    reader = ChoiceReader(detokenizer, loaded.texts.byte_ids, question)
    pending: list[SampledToken] = []  # their text is not out yet
    offsets: list[int] = []
    async with aclosing(
        loaded.engine.stream(
            question.prompt_ids, question.params, question.priority, question.images, request_record.current().client
        )
    ) as lists:
        async for outputs in lists:
            reason, is_first = None, not reader.num_tokens
            for output in outputs:
                if output.sampled is not None:
                    pending.append(output.sampled)
                    offsets.append(reader.num_characters)
                reader.put(output.token_id)
                reason = "stop" if reader.is_done else output.finish_reason
                if reason:
                    reader.end(is_whole=reason == "stop" and not reader.is_done)
                    break
            text, parts = reader.take()
            num_shown = bisect_left(offsets, reader.num_released)  # their text has begun to show
            if reason and not reader.is_stopped:
                num_shown = len(pending)
            if text or reason or is_first:
                yield OutputDelta(
                    index,
                    text,
                    reader.num_tokens,
                    reason and reader.finish_reason(reason),
                    tuple(pending[:num_shown]),
                    tuple(offsets[:num_shown]),
                    outputs[0].prompt,
                    outputs[0].num_cached_tokens,
                    tuple(parts),
                    reader.num_reasoning,
                    outputs[0].queue_time,
                )
                pending, offsets = pending[num_shown:], offsets[num_shown:]
            if reason:
                return


async def best(sources: Sequence[AsyncGenerator[OutputDelta]], n: int, first_index: int) -> AsyncGenerator[OutputDelta]:
    """The `n` answers whose tokens have the highest mean log-probability, best first, each as one piece.

    The first one's `num_tokens` counts the discarded answers too: they were computed; and what one of them computed
    of the prompt was not reused, whichever is kept.
    """
    wholes: dict[int, OutputDelta] = {}
    async with aclosing(merge(sources)) as pieces:
        async for piece in pieces:
            whole = wholes.get(piece.index, piece)
            wholes[piece.index] = piece if whole is piece else _joined(whole, piece)
    ranked = sorted(wholes.values(), key=_mean_logprob, reverse=True)
    discarded = sum(piece.num_tokens for piece in ranked[n:])
    num_cached_tokens = min(piece.num_cached_tokens for piece in ranked)
    for rank, piece in enumerate(ranked[:n]):
        extra = 0 if rank else discarded
        num_tokens = piece.num_tokens + extra
        yield replace(
            piece, index=first_index + rank, num_tokens=num_tokens, num_cached_tokens=num_cached_tokens, is_ranked=True
        )


def _joined(whole: OutputDelta, piece: OutputDelta) -> OutputDelta:
    tokens, offsets = whole.tokens + piece.tokens, whole.offsets + piece.offsets
    joined = replace(piece, text=whole.text + piece.text, tokens=tokens, offsets=offsets)
    return replace(joined, prompt=whole.prompt, num_cached_tokens=whole.num_cached_tokens, queue_time=whole.queue_time)


def _mean_logprob(piece: OutputDelta) -> float:
    values = [token.logprob for token in piece.tokens if token.logprob is not None]
    return sum(values) / len(values) if values else 0.0


def merge(sources: Sequence[AsyncGenerator[OutputDelta]]) -> AsyncGenerator[OutputDelta]:
    """The items of all sources as they come; leaving it leaves them all. The first error ends it."""
    return sources[0] if len(sources) == 1 else _merge(sources)


async def _merge(sources: Sequence[AsyncGenerator[OutputDelta]]) -> AsyncGenerator[OutputDelta]:
    items: asyncio.Queue[OutputDelta | BaseException | None] = asyncio.Queue()

    async def pump(source: AsyncGenerator[OutputDelta]) -> None:
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
