"""Scheduler: which tokens of which sequences a step computes. It admits, chunks prompts, preempts and frees.

Chunked prefill under a token budget as in Sarathi-Serve (Agrawal et al. 2024): decodes come first, so none of them
waits for a long prompt.
"""

import time
from collections import deque
from dataclasses import dataclass

from engine.batch import Batch, Span
from engine.kv_cache import KVCache
from engine.prefill_budget import PrefillBudget
from engine.sampling_params import SampledToken
from engine.sequence import FinishReason, Sequence, Status, TokenOutput
from engine.spec_decode.prompt_lookup import PromptLookup, Proposer
from engine.vision import Image

MAX_DEFERRALS = 300  # steps
SEEN_AHEAD = 4  # waiting prompts whose images are encoded already; features take memory
MOST_DRAFTED_ROWS = 16  # tokens in a step with guesses: beyond, a row costs about as much as a token is worth


@dataclass(frozen=True)
class Limits:
    """Counts per step."""

    max_num_seqs: int
    max_num_batched_tokens: int  # while nothing decodes
    max_num_mixed_tokens: int  # while sequences decode, at most: bounds how long they wait for somebody's prompt
    max_model_len: int
    num_speculative_tokens: int = 0  # of one sequence


class Scheduler:
    def __init__(
        self, cache: KVCache, limits: Limits, eos_token_ids: frozenset[int], proposer: Proposer | None = None
    ) -> None:
        self.cache = cache
        self.proposer = proposer or PromptLookup()
        self.limits = limits
        self.eos_token_ids = eos_token_ids
        self.waiting: deque[Sequence] = deque()  # in the order of priority
        self.running: list[Sequence] = []  # in the order of admission
        self.num_preemptions = 0  # since the start
        self._turn = 0  # of the sequence that was admitted last
        self._next_turns: dict[str, int] = {}  # by client
        self.prefill_budget = PrefillBudget(limits.max_num_mixed_tokens)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Behind those of its priority whose turn is before.

        Start-time fair queueing (Goyal et al. 1996): a client's next prompt has its turn as many tokens later as its
        last one had, and as its answers have had meanwhile, so that whoever takes much waits behind whoever takes
        little."""
        own = [other.turn for other in self.waiting if other.client == sequence.client]
        sequence.turn = max([self._next_turn(sequence.client), *own])
        self._next_turns[sequence.client] = sequence.turn + len(sequence.prompt_ids)
        self._insert(sequence)

    def _next_turn(self, client: str) -> int:
        return max(self._turn, self._next_turns.get(client, 0))

    def _settle(self, sequence: Sequence) -> None:
        """Once it has ended: while others wait, turns are for what was computed."""
        if not self.waiting:
            self._next_turns.clear()
            return
        taken = -len(sequence.prompt_ids) if sequence.queue_time is None else sequence.num_output_tokens
        self._next_turns[sequence.client] = self._next_turn(sequence.client) + taken

    def _insert(self, sequence: Sequence) -> None:
        place = (sequence.priority, sequence.turn)
        self.waiting.insert(sum((other.priority, other.turn) <= place for other in self.waiting), sequence)

    def schedule(self) -> Batch:
        """The next step: every decode that has a block, then prompts within the budget, those of one priority in the
        order in which they came."""
        spans: list[Span] = []
        self._promote()
        for sequence in sorted(self.running, key=lambda s: s.priority):  # whoever gives way comes after
            if sequence.num_uncomputed == 1 and self._make_room(sequence):
                spans.append(Span(sequence, sequence.num_computed, 1))
        budget = self.limits.max_num_batched_tokens
        if spans:
            num_prompts = len(self._prefilling()) + len(self.waiting)
            budget = min(
                self.prefill_budget.budget(len(spans), num_prompts), self.limits.max_num_mixed_tokens - len(spans)
            )
        prefilling, is_full = self._prefilling(), False
        for priority in sorted({s.priority for s in [*prefilling, *self.waiting]}):
            for sequence in [s for s in prefilling if s.priority == priority]:
                budget -= self._prefill(sequence, budget, spans)
            for sequence in [s for s in self.waiting if s.priority == priority]:
                if budget <= 0 or is_full or len(self.running) >= self.limits.max_num_seqs:
                    break
                if self._is_being_computed(sequence):
                    continue  # it will take that over
                is_full = not self._admit(sequence)
                budget -= self._prefill(sequence, budget, spans) if not is_full else 0
        if all(span.is_decode and span.is_complete for span in spans):  # what is computed again can be in chunks of one
            spans = self._with_drafts(spans)
        if not spans and len(self.running) > 1:  # prompts hold blocks that others of them lack
            self._preempt(self._least_urgent())
            return self.schedule()
        assert spans or not self.running, "a sequence that fits the cache alone cannot proceed"
        return Batch(tuple(spans))

    def _with_drafts(self, decodes: list[Span]) -> list[Span]:
        """Guesses at what follows, while rows of the step are left that cost little."""
        most = min(self.limits.num_speculative_tokens, MOST_DRAFTED_ROWS // max(1, len(decodes)) - 1)
        if most <= 0 or not decodes:
            return decodes
        requests = [(span.sequence, min(most, self._num_left(span.sequence) - 1)) for span in decodes]
        drafts = self.proposer.propose(requests, self.prefill_budget.decode_time(len(decodes)))
        return [self._with_draft(span, draft) for span, draft in zip(decodes, drafts, strict=True)]

    def _num_left(self, sequence: Sequence) -> int:
        """Tokens that its answer can still get, at least one."""
        left = sequence.params.max_tokens - sequence.num_output_tokens
        return min(left, self.limits.max_model_len - sequence.num_tokens)

    def _with_draft(self, span: Span, draft: tuple[int, ...]) -> Span:
        sequence = span.sequence
        if not draft or not self.cache.allocate(sequence, sequence.num_tokens + len(draft)):
            return span
        return Span(sequence, span.start, 1 + len(draft), draft)

    def _promote(self) -> None:
        """What has let others go first for PATIENCE steps is as urgent as they are."""
        for sequence in [s for s in [*self._prefilling(), *self.waiting] if s.priority > 0]:
            sequence.num_deferrals += 1
            if sequence.num_deferrals > MAX_DEFERRALS:
                sequence.priority = 0
                if sequence.status is Status.WAITING:
                    self.waiting.remove(sequence)
                    self._insert(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Lets a waiting sequence run, if there is room for its prompt."""
        if not sequence.scores_prompt:  # else every token is computed
            self.cache.reuse(sequence)
        if not self.cache.can_admit(sequence, self._prefilling(), self.limits.max_num_batched_tokens):
            self.cache.free(sequence)
            return False
        sequence.status = Status.RUNNING
        if sequence.queue_time is None:
            sequence.queue_time = time.perf_counter() - sequence.added
            sequence.num_cached_tokens = sequence.num_computed  # later, after a preemption, it may find its own blocks
        self._turn = max(self._turn, sequence.turn)
        self.waiting.remove(sequence)
        if not self.waiting:
            self._next_turns.clear()
        self.running.append(sequence)
        return True

    @property
    def num_decoding(self) -> int:
        return sum(sequence.num_uncomputed == 1 for sequence in self.running)

    def wanted_images(self) -> list[Image]:
        """Those that the prompts under way, and those next to come, wait for, the most urgent first."""
        room = min(SEEN_AHEAD, self.limits.max_num_seqs - len(self.running))
        owners = [*self._prefilling(), *list(self.waiting)[: max(1, room)]]
        images = [image for owner in owners for image in owner.images_in(owner.num_computed, owner.num_tokens)]
        return [image for image in images if image.features is None]

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether the next block of a running prompt is one of its own."""
        size = self.cache.block_size
        keys = sequence.block_keys(size)[: (sequence.num_tokens - 1) // size]
        for other in [s for s in self._prefilling() if s.priority <= sequence.priority and not s.scores_prompt]:
            index = other.num_computed // size
            if index < len(keys) and other.block_keys(size)[index : index + 1] == [keys[index]]:
                return not sequence.scores_prompt
        return False

    def _least_urgent(self) -> Sequence:
        """Among those of the lowest priority, the youngest."""
        return max(reversed(self.running), key=lambda sequence: sequence.priority)

    def _prefilling(self) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.num_uncomputed > 1]

    def _prefill(self, sequence: Sequence, budget: int, spans: list[Span]) -> int:
        """Adds the next chunk of a prompt; the number of its tokens, 0 where budget or blocks are lacking."""
        end = sequence.num_computed + min(sequence.num_uncomputed, budget)
        num_tokens = sequence.whole_chunk(end) - sequence.num_computed if budget > 0 else 0
        if num_tokens <= 0 or not self.cache.allocate(sequence, sequence.num_computed + num_tokens):
            return 0
        spans.append(Span(sequence, sequence.num_computed, num_tokens))
        return num_tokens

    def _make_room(self, sequence: Sequence) -> bool:
        """A block for the sequence's next token, taken from the youngest ones if need be."""
        while sequence.status is Status.RUNNING:
            if self.cache.allocate(sequence, sequence.num_tokens):
                return True
            self._preempt(self._least_urgent())
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Gives all its blocks back; it will be computed again from its tokens, before those that wait."""
        self._erase_unseen(sequence)
        self.cache.free(sequence)
        self.num_preemptions += 1
        sequence.status = Status.WAITING
        self.running.remove(sequence)
        self.waiting.insert(sum(other.priority < sequence.priority for other in self.waiting), sequence)

    def update(
        self, batch: Batch, sampled: list[list[SampledToken | None]]
    ) -> list[tuple[Sequence, TokenOutput | None]]:
        """Takes in a step's tokens, those of each complete span; what each gained, None where its logits were bad."""
        outputs: list[tuple[Sequence, TokenOutput | None]] = []
        tokens = iter(sampled)
        for span in batch.spans:
            sequence = span.sequence
            if not span.is_complete:
                self.cache.advance(sequence, span.end)
                self.cache.publish(sequence, is_checked=False)
                self.cache.free_outside_window(sequence)
                continue
            gained = self._append_all(span, next(tokens))
            outputs += ((sequence, output) for output in gained)
            if gained[-1] is None:
                self.cache.erase(sequence)
            else:
                self.cache.publish(sequence, is_checked=True)
                self.cache.free_outside_window(sequence)
            if gained[-1] is None or gained[-1].finish_reason:
                self.remove(sequence)
        return outputs

    def _append_all(self, span: Span, tokens: list[SampledToken | None]) -> list[TokenOutput | None]:
        """Up to the one that ends the answer. Of the span's tokens those stay computed that the answer has."""
        sequence, num_before = span.sequence, span.sequence.num_tokens
        outputs: list[TokenOutput | None] = []
        for token in tokens:
            outputs.append(None if token is None else self._append(sequence, token))
            if outputs[-1] is None or outputs[-1].finish_reason:
                break
        self.cache.advance(sequence, span.end)
        if span.draft:
            self.cache.rollback(sequence, num_before + len(outputs) - 1)
            self.proposer.note(sequence, len(span.draft), len(tokens) - 1)
        return outputs

    def _append(self, sequence: Sequence, token: SampledToken) -> TokenOutput:
        token_id = token.token_id
        sequence.token_ids.append(token_id)
        is_first = sequence.num_output_tokens == 1
        about_prompt: tuple[int, tuple[SampledToken, ...], float] = (0, (), 0.0)
        if is_first:
            about_prompt = (sequence.num_cached_tokens, tuple(sequence.prompt_logprobs), sequence.queue_time or 0.0)
        is_end = token_id in self.eos_token_ids and not sequence.params.ignore_eos
        if is_end or sequence.is_stopped:
            return TokenOutput(None, "stop", None, *about_prompt)
        reason: FinishReason | None = None
        if sequence.matcher is not None:
            sequence.matcher.accept(token_id)
            if sequence.matcher.is_finished:
                return TokenOutput(token_id, "stop", token, *about_prompt)
        if sequence.num_output_tokens >= sequence.params.max_tokens or sequence.num_tokens >= self.limits.max_model_len:
            reason = "length"
        return TokenOutput(token_id, reason, token, *about_prompt)

    def remove(self, sequence: Sequence) -> None:
        """Finishes a sequence wherever it is; nothing of it stays."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.WAITING:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        self._erase_unseen(sequence)
        self.cache.free(sequence)
        self.proposer.forget(sequence)
        self._settle(sequence)
        sequence.status = Status.FINISHED

    def _erase_unseen(self, sequence: Sequence) -> None:
        """Where nobody has seen whether a prompt's values are numbers."""
        if sequence.num_computed and not sequence.num_output_tokens:
            self.cache.erase(sequence)
