"""Text completions: prompts of text or tokens, fill-in-the-middle, and choices that may begin with their prompt."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from errors import InvalidRequest
from schemas import CompletionChoice, CompletionRequest
from serving.admission import check_characters, check_num_answers, check_request
from serving.constraints import constraint_of
from serving.generation import GenerationRequest, OutputDelta, best, generate
from serving.loading import LoadedModel
from serving.sampling import sampling_params
from text.logprobs import TokenTexts

if TYPE_CHECKING:
    from engine.constraint import Constraint
    from engine.sampling_params import SampledToken, SamplingParams

MAX_TOKENS = 2048  # of an answer, where the request sets no max_tokens; this server's own default
PREFIX_TOKENS = 4  # at a prompt's end: how the answer's first token reads depends on them


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request, as text and as tokens."""

    text: str  # as `echo` shows it
    token_ids: list[int]
    num_hidden: int = 0  # characters of a first token that the text does not show
    stop_token_ids: tuple[int, ...] = ()  # in addition to the model's and the request's

    @classmethod
    def of(cls, loaded: LoadedModel, suffix: str | None, prompt: str | list[int]) -> "Prompt":
        """Tokenizes a prompt, which takes milliseconds, more for long ones. Raises InvalidRequest."""
        tokenizer = loaded.template.tokenizer
        if isinstance(prompt, list):
            is_too_long = len(prompt) >= loaded.engine.max_model_len  # check_request refuses it
            return cls("" if is_too_long else str(tokenizer.decode(prompt)), prompt)
        if suffix:
            token_ids, ends = loaded.template.render_fill_in_the_middle(prompt, suffix)
            return cls(prompt, token_ids, stop_token_ids=tuple(ends))
        token_ids = loaded.template.render_text(prompt)
        bos = str(tokenizer.bos_token or "")
        is_hidden = token_ids[:1] == [tokenizer.bos_token_id] and not prompt.startswith(bos)
        return cls(prompt, token_ids, len(bos) if is_hidden else 0)

    def tokens(self, delta: OutputDelta) -> "tuple[SampledToken, ...]":
        """Returns its tokens with their log-probabilities; the first one has none."""
        from engine.sampling_params import SampledToken  # not at the top: the server answers before torch is imported

        return (SampledToken(self.token_ids[0]), *delta.prompt)

    def offsets(self, texts: TokenTexts) -> list[int]:
        """Returns the character of the text at which each token begins; a token may begin inside of one."""
        offsets, num_characters = [], -self.num_hidden
        for token_id in self.token_ids:
            starts = [byte & 0xC0 != 0x80 for byte in texts.bytes_of(token_id)]  # the bytes that begin a character
            is_inside = bool(starts) and not starts[0]
            offsets.append(max(num_characters - 1 if is_inside else num_characters, 0))
            num_characters += sum(starts)
        return offsets

    def adapt(self, params: "SamplingParams", request: CompletionRequest) -> "SamplingParams":
        """Adds the prompt's own stop tokens, and the log-probabilities that are shown or, to rank answers, needed."""
        n, best_of = num_answers(request)
        return replace(
            params,
            stop_token_ids=(*params.stop_token_ids, *self.stop_token_ids),
            num_logprobs=0 if best_of > n and params.num_logprobs is None else params.num_logprobs,
            num_prompt_logprobs=request.num_prompt_logprobs,
        )


def num_answers(request: CompletionRequest) -> tuple[int, int]:
    """Returns how many answers each prompt gets, and how many are computed to choose from. Raises InvalidRequest."""
    n = request.n or 1
    best_of = request.best_of or n
    if best_of < n:
        raise InvalidRequest("best_of must be at least n.", param="best_of", code="invalid_value")
    if best_of > n and request.stream:
        raise InvalidRequest(
            "best_of greater than n cannot be streamed: the best answers are known only at the end.",
            param="best_of",
            code="invalid_value",
        )
    return n, best_of


def check_suffix(request: CompletionRequest) -> None:
    """Raises InvalidRequest for a suffix together with a prompt of tokens or with echo."""
    if request.suffix and (request.echo or not all(isinstance(prompt, str) for prompt in request.prompts)):
        raise InvalidRequest(
            "suffix needs a prompt of text, and cannot be combined with echo.", param="suffix", code="unsupported_value"
        )


@dataclass(frozen=True)
class CompletionPlan:
    """Everything about a completion that is known before the engine is asked."""

    body: CompletionRequest
    prompts: list[Prompt]
    requests: list[GenerationRequest]  # of each prompt
    answers_per_prompt: int
    computed_per_prompt: int  # more, if the best are chosen

    @property
    def prompt_lengths(self) -> list[int]:
        return [len(prompt.token_ids) for prompt in self.prompts]

    def sources(self, loaded: LoadedModel) -> list[AsyncGenerator[OutputDelta]]:
        """Returns a generator for each answer; where the request has a seed, equal prompts get different ones."""
        sources: list[AsyncGenerator[OutputDelta]] = []
        num_same: Counter[tuple[int, ...]] = Counter()  # answers so far of each prompt
        for number, request in enumerate(self.requests):
            earlier, first = num_same[tuple(request.prompt_ids)], number * self.answers_per_prompt
            num_same[tuple(request.prompt_ids)] += self.computed_per_prompt
            choices = [request.of_choice(earlier + i) for i in range(self.computed_per_prompt)]
            if self.computed_per_prompt > self.answers_per_prompt:
                answers = [generate(loaded, i, choice) for i, choice in enumerate(choices)]
                sources.append(best(answers, self.answers_per_prompt, first))
            else:
                sources += [generate(loaded, first + i, choice) for i, choice in enumerate(choices)]
        return [_without_tokens(source) for source in sources] if self.body.max_tokens == 0 else sources

    def reader(self, texts: TokenTexts) -> Callable[[OutputDelta, bool], Iterator[CompletionChoice]]:
        return CompletionChoices(self, texts).of


async def plan_completion(request: CompletionRequest, loaded: LoadedModel) -> CompletionPlan:
    """Checks the request, tokenizes its prompts and compiles what its answers must look like. Raises APIError."""
    n, best_of = num_answers(request)
    check_suffix(request)
    check_num_answers(loaded.engine, len(request.prompts) * best_of, "prompt")
    for text in [prompt for prompt in request.prompts if isinstance(prompt, str)]:
        check_characters(loaded, len(text), "prompt")
    prompts = [await asyncio.to_thread(Prompt.of, loaded, request.suffix, prompt) for prompt in request.prompts]
    for prompt in prompts:
        check_request(loaded.engine, request, prompt.token_ids, "prompt")
    constraint = await constraint_of(loaded, request, None)
    requests = [_generation_request(request, loaded, prompt, constraint) for prompt in prompts]
    return CompletionPlan(
        body=request, prompts=prompts, requests=requests, answers_per_prompt=n, computed_per_prompt=best_of
    )


def _generation_request(
    request: CompletionRequest, loaded: LoadedModel, prompt: Prompt, constraint: "Constraint | None"
) -> GenerationRequest:
    length = len(prompt.token_ids)
    params = sampling_params(loaded, request, length, default_max_tokens=MAX_TOKENS, grammar=constraint)
    return GenerationRequest(
        prompt_ids=prompt.token_ids,
        params=prompt.adapt(params, request),
        stop=request.stop_strings,
        prefix=prompt.token_ids[-PREFIX_TOKENS:],
    )


async def _without_tokens(source: AsyncGenerator[OutputDelta]) -> AsyncGenerator[OutputDelta]:
    """Hides the answer of a request for 0 tokens; what is left is the prompt's own part."""
    async with aclosing(source):
        async for delta in source:
            yield replace(delta, text="", num_tokens=0, finish_reason="length", tokens=())


class CompletionChoices:
    """Turns deltas into the choices of chunks; with `echo`, the first one of each choice begins with its prompt."""

    def __init__(self, plan: CompletionPlan, texts: TokenTexts) -> None:
        self._echoes, self._shows_logprobs = bool(plan.body.echo), plan.body.logprobs is not None
        self._prompts: Sequence[Prompt] = plan.prompts
        self._answers_per_prompt = plan.answers_per_prompt
        self._texts = texts

    def of(self, delta: OutputDelta, is_first: bool) -> Iterator[CompletionChoice]:
        echoed = self._prompts[delta.index // self._answers_per_prompt] if self._echoes else None
        start = len(echoed.text) if echoed else 0
        text, tokens, offsets = delta.text, delta.tokens, [start + offset for offset in delta.offsets]
        if is_first and echoed:
            text = echoed.text + text
            tokens, offsets = (*echoed.tokens(delta), *tokens), [*echoed.offsets(self._texts), *offsets]
        logprobs = self._texts.completion(tokens, offsets) if self._shows_logprobs else None
        yield CompletionChoice(index=delta.index, text=text, logprobs=logprobs, finish_reason=delta.finish_reason)
