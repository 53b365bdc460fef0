"""Text completions: prompts of text or tokens, fill-in-the-middle, and choices that may begin with their prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from errors import InvalidRequest
from schemas import CompletionChoice, CompletionRequest
from serving.generation import OutputDelta
from serving.loading import LoadedModel
from text.logprobs import TokenTexts

if TYPE_CHECKING:
    from engine.sampling_params import SampledToken, SamplingParams


@dataclass(frozen=True)
class Prompt:
    text: str  # as `echo` shows it
    token_ids: list[int]
    num_hidden: int = 0  # characters of a first token that the text does not show
    stop_token_ids: tuple[int, ...] = ()  # beside the model's and the request's

    @classmethod
    def of(cls, loaded: LoadedModel, suffix: str | None, prompt: str | list[int]) -> "Prompt":
        """Takes milliseconds, more for long prompts; raises InvalidRequest."""
        tokenizer = loaded.template.tokenizer
        if isinstance(prompt, list):
            is_too_long = len(prompt) >= loaded.engine.max_model_len  # the caller will say so
            return cls("" if is_too_long else str(tokenizer.decode(prompt)), prompt)
        if suffix:
            token_ids, ends = loaded.template.render_gap(prompt, suffix)
            return cls(prompt, token_ids, stop_token_ids=tuple(ends))
        token_ids = loaded.template.render_text(prompt)
        bos = str(tokenizer.bos_token or "")
        is_hidden = token_ids[:1] == [tokenizer.bos_token_id] and not prompt.startswith(bos)
        return cls(prompt, token_ids, len(bos) if is_hidden else 0)

    def tokens(self, piece: OutputDelta) -> "tuple[SampledToken, ...]":
        """Its own, scored; the first one cannot be."""
        from engine.sampling_params import (
            SampledToken,  # not at the top: it takes seconds, and the server answers first
        )

        return (SampledToken(self.token_ids[0]), *piece.prompt)

    def offsets(self, texts: TokenTexts) -> list[int]:
        """Where in the text each of them begins; inside a character: where that does."""
        offsets, num_begun = [], -self.num_hidden
        for token_id in self.token_ids:
            begins = [byte & 0xC0 != 0x80 for byte in texts.bytes_of(token_id)]  # a character, in UTF-8
            offsets.append(max(num_begun - (not all(begins[:1])), 0))
            num_begun += sum(begins)
        return offsets

    def adapt(self, params: "SamplingParams", is_ranked: bool) -> "SamplingParams":
        """`is_ranked`: the answer's log-probabilities are needed, whether they are shown or not."""
        stop_token_ids = (*params.stop_token_ids, *self.stop_token_ids)
        num_logprobs = 0 if is_ranked and params.num_logprobs is None else params.num_logprobs
        return replace(params, stop_token_ids=stop_token_ids, num_logprobs=num_logprobs)


def num_answers(request: CompletionRequest) -> tuple[int, int]:
    """How many each prompt gets, and how many are computed for that; raises InvalidRequest."""
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
    if request.suffix and (request.echo or not all(isinstance(prompt, str) for prompt in request.prompts)):
        raise InvalidRequest(
            "suffix needs a prompt of text, and cannot be combined with echo.", param="suffix", code="unsupported_value"
        )


class Choices:
    """Pieces as choices."""

    def __init__(self, request: CompletionRequest, prompts: Sequence[Prompt], texts: TokenTexts) -> None:
        self._echoes, self._shows_logprobs = bool(request.echo), request.logprobs is not None
        self._prompts = prompts
        self._answers_per_prompt = request.n or 1
        self._texts = texts

    def of(self, piece: OutputDelta, is_first: bool) -> CompletionChoice:
        echoed = self._prompts[piece.index // self._answers_per_prompt] if self._echoes else None
        start = len(echoed.text) if echoed else 0
        text, tokens, offsets = piece.text, piece.tokens, [start + offset for offset in piece.offsets]
        if is_first and echoed:
            text = echoed.text + text
            tokens, offsets = (*echoed.tokens(piece), *tokens), [*echoed.offsets(self._texts), *offsets]
        logprobs = self._texts.completion(tokens, offsets) if self._shows_logprobs else None
        return CompletionChoice(index=piece.index, text=text, logprobs=logprobs, finish_reason=piece.finish_reason)
