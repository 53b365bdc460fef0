"""DraftModel: a small model of the same vocabulary that guesses what the large one will say.

Speculative decoding (Leviathan et al. 2023) with a verifier that keeps only tokens which the large model itself
chooses. The small one samples with the same parameters and random numbers, so that it often chooses the same.
"""

import logging
import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field, replace
from typing import Protocol

from engine.batch import Batch, Span
from engine.kv_cache import KVCache
from engine.sampling_params import SampledToken
from engine.sequence import Sequence
from engine.spec_decode.prompt_lookup import DECAY, WORTHWHILE, DraftLength, PromptLookup

log = logging.getLogger(__name__)

CATCH_UP = 256  # tokens of a prompt that it reads beside a step


class BatchRunner(Protocol):
    def run(self, batch: Batch) -> list[list[SampledToken | None]]: ...


@dataclass
class DraftSequence:
    """A sequence as the small model has it: its tokens, and guesses that the large one has not seen yet."""

    sequence: Sequence
    confidence: DraftLength = field(default_factory=DraftLength)
    num_known: int = 0  # tokens that were the original's at the last guess
    wanted: int = 0  # tokens of the next guess

    @classmethod
    def of(cls, original: Sequence) -> "DraftSequence":
        params = replace(original.params, num_logprobs=None, num_prompt_logprobs=None, grammar=None, seed=original.seed)
        return cls(Sequence(original.prompt_ids, params, on_output=lambda output: None))

    def follow(self, original: Sequence, cache: KVCache) -> None:
        """Takes back the guesses that were wrong."""
        own, actual, place = self.sequence.token_ids, original.token_ids, self.num_known
        while place < min(len(own), len(actual)) and own[place] == actual[place]:
            place += 1
        own[place:] = actual[place:]
        cache.rollback(self.sequence, place)
        self.num_known = len(actual)

    @property
    def guess(self) -> tuple[int, ...]:
        return tuple(self.sequence.token_ids[self.num_known :])


class DraftModel:
    """A Proposer: prompt lookup where that finds something, since it costs nothing, else the model."""

    def __init__(self, runner: BatchRunner, cache: KVCache, num_embeddings: int, max_model_len: int) -> None:
        """num_embeddings: of the large model; max_model_len: of the small one, in tokens."""
        self._runner, self._cache = runner, cache
        self._num_embeddings, self._max_model_len = num_embeddings, max_model_len
        self._lookup = PromptLookup()
        self._mirrors: dict[Sequence, DraftSequence] = {}
        self._guessing: set[Sequence] = set()  # those whose last guess was the model's
        self._token_time: float | None = None  # seconds of a guessed token
        self._worthwhile = WORTHWHILE
        self._is_broken = False

    @property
    def num_used_blocks(self) -> int:
        return self._cache.num_used_blocks

    def propose(self, requests: Tokens[tuple[Sequence, int]], step_time: float | None = None) -> list[tuple[int, ...]]:
        guesses = self._lookup.propose(requests)
        wanted = {
            s: most for (s, most), guess in zip(requests, guesses, strict=True) if most and not guess and not s.images
        }
        wanted = {} if self._is_broken else wanted
        mirrors = [mirror for s, most in wanted.items() if (mirror := self._prepare(s, most))]
        try:
            self._guess(mirrors)
        except Exception:
            log.exception("the draft model failed: generation goes on without it")
            self._is_broken = True
        if step_time and self._token_time:
            self._worthwhile = min(0.9, max(WORTHWHILE, 1.2 * self._token_time / step_time))
        own = {s: self._mirrors[s].guess for s in wanted if s in self._mirrors}
        self._guessing = {s for s, guess in own.items() if guess}
        return [own.get(s) or guess for (s, _), guess in zip(requests, guesses, strict=True)]

    def note(self, sequence: Sequence, num_proposed: int, num_right: int) -> None:
        if sequence not in self._guessing:
            self._lookup.note(sequence, num_proposed, num_right)
        elif sequence in self._mirrors:
            confidence = self._mirrors[sequence].confidence
            confidence.note(num_proposed, num_right, sequence.num_tokens, self._worthwhile)

    def forget(self, sequence: Sequence) -> None:
        self._lookup.forget(sequence)
        mirror = self._mirrors.pop(sequence, None)
        self._guessing.discard(sequence)
        if mirror is not None:
            self._cache.free(mirror.sequence)

    def _prepare(self, original: Sequence, most: int) -> DraftSequence | None:
        """Its mirror with room for a guess, None where there is to be none."""
        mirror = self._mirrors.get(original) or self._mirrors.setdefault(original, DraftSequence.of(original))
        mirror.follow(original, self._cache)
        num_tokens = original.num_tokens
        mirror.wanted = mirror.confidence.length(num_tokens, min(most, self._max_model_len - num_tokens))
        if mirror.wanted <= 0:
            return None
        if mirror.sequence.block_tables:
            self._cache.free_outside_window(mirror.sequence)
        is_behind = mirror.sequence.num_uncomputed > CATCH_UP
        end = mirror.sequence.num_computed + CATCH_UP if is_behind else num_tokens + mirror.wanted
        return mirror if self._cache.allocate(mirror.sequence, end) else None

    def _guess(self, mirrors: list[DraftSequence]) -> None:
        """One token after the other, for all of them at once; who has much to catch up with gets none yet."""
        while active := [mirror for mirror in mirrors if len(mirror.guess) < mirror.wanted]:
            spans = [_next_span(mirror.sequence) for mirror in active]
            start = time.perf_counter()
            tokens = iter(self._runner.run(Batch(tuple(spans))))
            if all(span.is_decode for span in spans):
                seconds = time.perf_counter() - start
                self._token_time = DECAY * (self._token_time or seconds) + (1 - DECAY) * seconds
            for mirror, span in zip(active, spans, strict=True):
                self._cache.advance(mirror.sequence, span.end)
                (token,) = next(tokens) if span.is_complete else (None,)
                if token is None or token.token_id >= self._num_embeddings:
                    mirror.wanted = 0
                else:
                    mirror.sequence.token_ids.append(token.token_id)


def _next_span(sequence: Sequence) -> Span:
    return Span(sequence, sequence.num_computed, min(CATCH_UP, sequence.num_uncomputed))
