"""Generation: the engine's tokens for one prompt become text, piece by piece; several at once; the best of many."""

import asyncio
from bisect import bisect_left
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Protocol, TypeVar

from schemas import FinishReason
from serving.loading import LoadedModel
from telemetry import request_record
from text.answer_parser import AnswerParser, ContentDelta, ParserOptions
from text.detokenizer import Detokenizer, StopFinder, TextDecoder
from text.lenient_json import BLANKS
from text.logprobs import TokenTexts

if TYPE_CHECKING:
    from engine.sampling_params import SampledToken, SamplingParams
    from engine.sequence import TokenOutput
    from engine.vision import Image


Choice = TypeVar("Choice", covariant=True)
PLAIN_TEXT = ParserOptions()  # the whole answer is content


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt, how its answer is generated, and how that is read."""

    prompt_ids: list[int]
    params: "SamplingParams"
    stop: Sequence[str]
    prefix: Sequence[int] = ()  # the prompt's end, if the answer continues its text
    priority: int = 0  # a smaller one goes first
    images: "tuple[Image, ...]" = ()
    boundaries: Sequence[int] = ()  # numbers of tokens after which other prompts may go on differently
    parser_options: ParserOptions = PLAIN_TEXT

    def of_choice(self, number: int) -> "GenerationRequest":
        """Gives a seeded choice a seed of its own, which depends on the request's seed and the number alone.

        Choice 0 keeps the request's seed.
        """
        if self.params.seed is None or number == 0:
            return self
        digest = blake2b(f"{self.params.seed} {number}".encode(), digest_size=8).digest()
        return replace(self, params=replace(self.params, seed=int.from_bytes(digest, "big")))


@dataclass(frozen=True)
class OutputDelta:
    """The new text and tokens of one choice."""

    index: int
    text: str
    num_tokens: int  # generated so far
    finish_reason: FinishReason | None = None
    stopped_by: str | None = None  # the stop string that ended it
    tokens: tuple["SampledToken", ...] = ()  # those that the text came from
    offsets: tuple[int, ...] = ()  # characters of the answer before each of them
    prompt: tuple["SampledToken", ...] = ()  # the prompt's, from its second token on, if they are scored
    num_cached_tokens: int = 0  # tokens of the prompt that were not computed; in the first delta
    parts: tuple[ContentDelta, ...] = ()  # the text as content, reasoning and tool calls
    num_reasoning: int = 0  # tokens of reasoning, among `num_tokens`
    queue_time: float = 0.0  # seconds until its prompt began to be computed; in the first delta
    is_ranked: bool = False  # it came whole, as the best of several: the times between its tokens are unknown


class Plan(Protocol[Choice]):
    """What a request asks of the engine, for one or several prompts, and how its deltas become choices of chunks."""

    @property
    def prompt_lengths(self) -> list[int]: ...  # tokens

    @property
    def answers_per_prompt(self) -> int: ...

    @property
    def computed_per_prompt(self) -> int: ...  # answers, of which the best are kept

    def sources(self, loaded: LoadedModel) -> list[AsyncGenerator[OutputDelta]]:
        """Returns the answers, which begin to be generated when they are iterated over."""
        ...

    def reader(self, texts: TokenTexts) -> Callable[[OutputDelta, bool], Iterator[Choice]]:
        """Returns a function that takes each delta, and whether it is the first one of its choice."""
        ...


class ChoiceReader:
    """Turns one choice's tokens into text and its parts. A stop string ends content, and does not end reasoning."""

    def __init__(self, detokenizer: Detokenizer, byte_ids: Collection[int], request: GenerationRequest) -> None:
        options = request.parser_options
        self._decoder = TextDecoder(detokenizer, request.prefix, byte_ids)
        self._stops, self._has_stops = StopFinder(request.stop), bool(request.stop)
        self._parser = AnswerParser(options)
        self._marks = options.marks
        self._think, self._min_tokens = options.think, request.params.min_tokens
        self._is_at_start = self._think is not None and not options.is_thinking
        self._is_thinking = options.is_thinking
        self._is_after_reasoning = False  # blanks there are not searched for stop strings
        self._blanks = ""  # held back: reasoning may follow them
        self.num_tokens = self.num_reasoning = 0  # tokens so far, and those of them that are reasoning
        self.num_characters = self.num_released = 0  # decoded so far, and those of them that were taken or can be
        self._text = ""  # not taken yet
        self._parts: list[ContentDelta] = []

    @property
    def is_done(self) -> bool:
        """Whether the answer has ended: tokens that follow are not part of it."""
        return self._stops.is_stopped or self._parser.is_done

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string ended the answer; it is cut off."""
        return self._stops.is_stopped

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended the answer, as the request has it."""
        stop = self._stops.stopped_by
        return stop and "".join(self._marks.get(character, character) for character in stop)

    def put(self, token_id: int | None) -> None:
        """Reads the next token; None stands for the end-of-sequence token, which has no text."""
        self.num_tokens += 1
        was_reasoning = self._parser.is_reasoning
        if token_id is not None:
            self._add(self._decoder.put(token_id))
        self.num_reasoning += was_reasoning or self._parser.is_reasoning

    def end(self, is_whole: bool) -> None:
        """Releases the text that was held back, unless the answer ended before it.

        is_whole: the model itself ended the answer.
        """
        if not self.is_done:
            self._add(self._decoder.end())
        if not self.is_done:
            self._release(self._stops.put(self._blanks, self._may_stop))
        if not self.is_done:
            self._release(self._stops.end())
        self._parts += self._parser.end(is_whole and not self.is_done)

    def take(self) -> tuple[str, list[ContentDelta]]:
        """Returns the text and the parts that are new since the last call."""
        text, parts, self._text, self._parts = self._text, self._parts, "", []
        return text, parts

    def finish_reason(self, reason: FinishReason) -> FinishReason:
        return self._parser.finish_reason("stop" if self.is_stopped else reason)

    @property
    def _may_stop(self) -> bool:
        return self.num_tokens >= self._min_tokens

    def _add(self, new: str) -> None:
        self.num_characters += len(new)
        if self._is_at_start or self._is_thinking or self._is_after_reasoning:
            new = self._content_of(new)
        self._release(self._stops.put(new, self._may_stop) if self._has_stops else new)

    def _content_of(self, new: str) -> str:
        """Releases reasoning and the blanks around it, and returns the rest, which is content."""
        new, self._blanks = self._blanks + new, ""
        if self._is_at_start and (beginning := new.lstrip(BLANKS)[:1]):
            self._is_at_start, self._is_thinking = False, self._think is not None and beginning == self._think.begin
        if self._is_at_start:
            self._blanks = new
            return ""
        if self._is_thinking:
            new = self._after_reasoning(new)
        return self._after_blanks(new) if self._is_after_reasoning else new

    def _after_reasoning(self, new: str) -> str:
        """Returns the text after the mark that ends reasoning; the parser knows whether something else has ended it."""
        assert self._think is not None
        reasoning, end, rest = new.partition(self._think.end)
        self._release(reasoning)
        self._is_thinking = not end and (self._parser.is_reasoning or not reasoning)
        self._release(self._stops.put(end, self._may_stop))
        self._is_after_reasoning = bool(end) and not self._stops.is_holding
        return rest

    def _after_blanks(self, new: str) -> str:
        rest = new.lstrip(BLANKS)
        self._release(new[: len(new) - len(rest)])
        self._is_after_reasoning = not rest
        return rest

    def _release(self, text: str) -> None:
        if text:
            self.num_released += len(text)
            self._text += text
            self._parts += self._parser.put(text)


class Generation:
    """One choice in progress: takes the engine's outputs, and returns what is new for the client."""

    def __init__(self, index: int, reader: ChoiceReader) -> None:
        self._index, self._reader = index, reader
        self._tokens: list[SampledToken] = []  # those whose text is held back
        self._offsets: list[int] = []  # characters of the answer before each of them

    def add(self, outputs: "Sequence[TokenOutput]") -> OutputDelta | None:
        """Reads outputs that came together; None if they have no text yet, as half of a character.

        The first delta of a choice comes with its first outputs, the last one has a finish reason.
        """
        is_first = not self._reader.num_tokens
        reason = self._read(outputs)
        text, parts = self._reader.take()
        if not (text or reason or is_first):
            return None
        tokens, offsets = self._take_tokens(is_end=reason is not None)
        return OutputDelta(
            index=self._index,
            text=text,
            num_tokens=self._reader.num_tokens,
            finish_reason=reason and self._reader.finish_reason(reason),
            stopped_by=self._reader.stopped_by if reason else None,
            tokens=tokens,
            offsets=offsets,
            prompt=outputs[0].prompt,
            num_cached_tokens=outputs[0].num_cached_tokens,
            parts=tuple(parts),
            num_reasoning=self._reader.num_reasoning,
            queue_time=outputs[0].queue_time,
        )

    def _read(self, outputs: "Sequence[TokenOutput]") -> FinishReason | None:
        """Reads up to the end of the answer, and returns why it ended; None if it goes on."""
        reader = self._reader
        for output in outputs:
            if output.sampled is not None:
                self._tokens.append(output.sampled)
                self._offsets.append(reader.num_characters)
            reader.put(output.token_id)
            reason: FinishReason | None = "stop" if reader.is_done else output.finish_reason
            if reason:
                reader.end(is_whole=reason == "stop" and not reader.is_done)
                return reason
        return None

    def _take_tokens(self, is_end: bool) -> "tuple[tuple[SampledToken, ...], tuple[int, ...]]":
        """Returns the tokens whose text has begun to show, with their offsets; at the end all but what was cut off."""
        if not self._tokens:  # log-probabilities were not asked for
            return (), ()
        num_shown = bisect_left(self._offsets, self._reader.num_released)
        if is_end and not self._reader.is_stopped:
            num_shown = len(self._tokens)
        tokens, offsets = tuple(self._tokens[:num_shown]), tuple(self._offsets[:num_shown])
        del self._tokens[:num_shown], self._offsets[:num_shown]
        return tokens, offsets


async def generate(loaded: LoadedModel, index: int, request: GenerationRequest) -> AsyncGenerator[OutputDelta]:
    """Generates one choice, until it ends or a stop string comes. Raises what `Engine.stream` raises."""
    template = loaded.template
    detokenizer = template.marking_detokenizer if request.parser_options.marks else template.detokenizer
    generation = Generation(index, ChoiceReader(detokenizer, loaded.texts.byte_ids, request))
    client = request_record.current().client
    stream = loaded.engine.stream(
        request.prompt_ids,
        request.params,
        priority=request.priority,
        images=request.images,
        client=client,
        boundaries=request.boundaries,
    )
    async with aclosing(stream):
        async for outputs in stream:
            delta = generation.add(outputs)
            if delta is not None:
                yield delta
                if delta.finish_reason:
                    return


async def best(sources: Sequence[AsyncGenerator[OutputDelta]], n: int, first_index: int) -> AsyncGenerator[OutputDelta]:
    """Yields the `n` answers whose tokens have the highest mean log-probability, best first, each as one delta.

    The first one's `num_tokens` includes the tokens of the discarded answers, which were computed too. Tokens of the
    prompt count as cached if no answer had to compute them.
    """
    wholes: dict[int, OutputDelta] = {}
    async with aclosing(merge(sources)) as deltas:
        async for delta in deltas:
            whole = wholes.get(delta.index, delta)
            wholes[delta.index] = delta if whole is delta else _joined(whole, delta)
    ranked = sorted(wholes.values(), key=_mean_logprob, reverse=True)
    discarded = sum(delta.num_tokens for delta in ranked[n:])
    num_cached_tokens = min(delta.num_cached_tokens for delta in ranked)
    for rank, delta in enumerate(ranked[:n]):
        extra = 0 if rank else discarded
        num_tokens = delta.num_tokens + extra
        yield replace(
            delta, index=first_index + rank, num_tokens=num_tokens, num_cached_tokens=num_cached_tokens, is_ranked=True
        )


def _joined(whole: OutputDelta, delta: OutputDelta) -> OutputDelta:
    tokens, offsets = whole.tokens + delta.tokens, whole.offsets + delta.offsets
    joined = replace(delta, text=whole.text + delta.text, tokens=tokens, offsets=offsets)
    return replace(joined, prompt=whole.prompt, num_cached_tokens=whole.num_cached_tokens, queue_time=whole.queue_time)


def _mean_logprob(delta: OutputDelta) -> float:
    values = [token.logprob for token in delta.tokens if token.logprob is not None]
    return sum(values) / len(values) if values else 0.0


def merge(sources: Sequence[AsyncGenerator[OutputDelta]]) -> AsyncGenerator[OutputDelta]:
    """Yields the deltas of all sources as they come. Closing it closes them all; the first error ends it."""
    return sources[0] if len(sources) == 1 else _merge(sources)


async def _merge(sources: Sequence[AsyncGenerator[OutputDelta]]) -> AsyncGenerator[OutputDelta]:
    items: asyncio.Queue[OutputDelta | BaseException | None] = asyncio.Queue()

    async def pump(source: AsyncGenerator[OutputDelta]) -> None:
        try:
            async with aclosing(source):
                async for delta in source:
                    items.put_nowait(delta)
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
