"""DraftModel: a small model of the same vocabulary guesses the tokens that the large one will choose.

This is speculative decoding (Leviathan et al. 2023) that keeps only tokens which the large model itself chooses. The
small one samples with the same parameters and random numbers, so that it often chooses the same.
"""

import logging
import time
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field, replace
from typing import Protocol

from engine.batch import Batch, Span
from engine.kv_cache import KVCache
from engine.prefill_budget import moving_average
from engine.sampling_params import SampledToken
from engine.sequence import Sequence
from engine.spec_decode.prompt_lookup import WORTHWHILE, DraftLength, PromptLookup

log = logging.getLogger(__name__)

CATCH_UP = 256  # tokens of a prompt that the small model computes in a step


class BatchRunner(Protocol):
    """What computes the small model's batches."""

    def run(self, batch: Batch) -> list[list[SampledToken | None]]: ...


@dataclass
class DraftSequence:
    """The small model's copy of a sequence: its tokens, and guesses that the large model has not checked yet."""

    sequence: Sequence
    draft_length: DraftLength = field(default_factory=DraftLength)
    num_original: int = 0  # leading tokens that are the original's; the others are guesses
    num_to_guess: int = 0  # tokens

    @classmethod
    def of(cls, original: Sequence) -> "DraftSequence":
        params = replace(
            original.params,
            num_logprobs=None,
            num_prompt_logprobs=None,
            grammar=None,
            seed=original.seed,
            adapter=None,  # it is for the large model; the guesses are checked with it
        )
        return cls(Sequence(original.prompt_ids, params, on_output=lambda output: None))

    def follow(self, original: Sequence, cache: KVCache) -> None:
        """Takes over the original's new tokens, and takes back the guesses that were wrong."""
        guessed, actual, num_accepted = self.sequence.token_ids, original.token_ids, self.num_original
        while num_accepted < min(len(guessed), len(actual)) and guessed[num_accepted] == actual[num_accepted]:
            num_accepted += 1
        guessed[num_accepted:] = actual[num_accepted:]
        cache.rollback(self.sequence, num_accepted)
        self.num_original = len(actual)

    @property
    def guess(self) -> tuple[int, ...]:
        return tuple(self.sequence.token_ids[self.num_original :])


class DraftModel:
    """A Proposer: guesses by prompt lookup where that finds something, since it costs nothing, else with the model."""

    def __init__(self, runner: BatchRunner, cache: KVCache, num_embeddings: int, max_model_len: int) -> None:
        """num_embeddings: the large model's; max_model_len: the small model's longest sequence, in tokens."""
        self._runner, self._cache = runner, cache
        self._num_embeddings, self._max_model_len = num_embeddings, max_model_len
        self._lookup = PromptLookup()
        self._drafts: dict[Sequence, DraftSequence] = {}  # original -> its copy
        self._guessed: set[Sequence] = set()  # those whose last guess came from the model
        self._token_time: float | None = None  # seconds that guessing a token takes
        self._worthwhile = WORTHWHILE
        self._is_broken = False

    @property
    def num_used_blocks(self) -> int:
        return self._cache.num_used_blocks

    def propose(self, requests: Tokens[tuple[Sequence, int]], step_time: float | None = None) -> list[tuple[int, ...]]:
        guesses = self._lookup.propose(requests)
        limits = {
            s: limit
            for (s, limit), guess in zip(requests, guesses, strict=True)
            if limit and not guess and not s.images
        }
        limits = {} if self._is_broken else limits
        drafts = [draft for s, limit in limits.items() if (draft := self._prepare(s, limit))]
        try:
            self._guess(drafts)
        except Exception:
            log.exception("the draft model failed: generation goes on without it")
            self._is_broken = True
        if step_time and self._token_time:
            self._worthwhile = min(0.9, max(WORTHWHILE, 1.2 * self._token_time / step_time))
        by_model = {s: self._drafts[s].guess for s in limits if s in self._drafts}
        self._guessed = {s for s, guess in by_model.items() if guess}
        return [by_model.get(s) or guess for (s, _), guess in zip(requests, guesses, strict=True)]

    def note(self, sequence: Sequence, num_proposed: int, num_accepted: int) -> None:
        if sequence not in self._guessed:
            self._lookup.note(sequence, num_proposed, num_accepted)
        elif sequence in self._drafts:
            draft_length = self._drafts[sequence].draft_length
            draft_length.note(num_proposed, num_accepted, sequence.num_tokens, self._worthwhile)

    def forget(self, sequence: Sequence) -> None:
        self._lookup.forget(sequence)
        draft = self._drafts.pop(sequence, None)
        self._guessed.discard(sequence)
        if draft is not None:
            self._cache.free(draft.sequence)

    def _prepare(self, original: Sequence, limit: int) -> DraftSequence | None:
        """Brings a sequence's copy up to date, with blocks for a guess; None where the model is not to guess now."""
        draft = self._drafts.get(original) or self._drafts.setdefault(original, DraftSequence.of(original))
        draft.follow(original, self._cache)
        num_tokens = original.num_tokens
        draft.num_to_guess = draft.draft_length.next(num_tokens, min(limit, self._max_model_len - num_tokens))
        if draft.num_to_guess <= 0:
            return None
        if draft.sequence.block_tables:
            self._cache.free_outside_window(draft.sequence)
        is_behind = draft.sequence.num_uncomputed > CATCH_UP
        end = draft.sequence.num_computed + CATCH_UP if is_behind else num_tokens + draft.num_to_guess
        return draft if self._cache.allocate(draft.sequence, end) else None

    def _guess(self, drafts: list[DraftSequence]) -> None:
        """Guesses one token after the other, for all sequences at once. Sequences that are still prefilling get no
        guess yet."""
        while active := [draft for draft in drafts if len(draft.guess) < draft.num_to_guess]:
            spans = [_next_span(draft.sequence) for draft in active]
            start = time.perf_counter()
            tokens = iter(self._runner.run(Batch(tuple(spans))))
            if all(span.is_decode for span in spans):
                self._token_time = moving_average(self._token_time, time.perf_counter() - start)
            for draft, span in zip(active, spans, strict=True):
                self._cache.advance(draft.sequence, span.end)
                (token,) = next(tokens) if span.is_complete else (None,)
                if token is None or token.token_id >= self._num_embeddings:
                    draft.num_to_guess = 0
                else:
                    draft.sequence.token_ids.append(token.token_id)


def _next_span(sequence: Sequence) -> Span:
    return Span(sequence, sequence.num_computed, min(CATCH_UP, sequence.num_uncomputed))
