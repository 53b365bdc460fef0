"""Scheduler: decides which tokens of which sequences a step computes. It admits, chunks prompts, preempts and frees.

Prompts are computed in chunks under a token budget, as in Sarathi-Serve (Agrawal et al. 2024): decodes come first, so
none of them waits for a long prompt.
"""

import time
from collections import deque
from dataclasses import dataclass, replace
from os.path import commonprefix  # of any sequences

from engine.batch import Batch, Span
from engine.disk_prefix_cache import DiskPrefixCache, Lookup
from engine.kv_cache import KVCache
from engine.prefill_budget import PrefillBudget
from engine.sampling_params import SampledToken
from engine.sequence import FinishReason, Sequence, Status, TokenOutput
from engine.spec_decode.prompt_lookup import PromptLookup, Proposer
from engine.vision import Image

MAX_DEFERRALS = 300  # steps after which a prompt of low priority is as urgent as any
ENCODED_AHEAD = 4  # waiting prompts whose images are encoded already; their features take memory
AHEAD_BYTES = 256 * 2**20  # of those features, beyond which only the next prompt's images are encoded
MAX_DRAFTED_ROWS = 16  # tokens in a step with guesses; more of them cost about as much as they gain


@dataclass(frozen=True)
class Limits:
    """The most that one step computes, and the longest sequence."""

    max_num_seqs: int
    max_num_batched_tokens: int  # while nothing decodes
    max_num_mixed_tokens: int  # while sequences decode: bounds how long a prompt delays them
    max_model_len: int
    num_speculative_tokens: int = 0  # guesses for one sequence


@dataclass(frozen=True)
class Suspect:
    """A sequence of a failed step, which is computed again, alone."""

    failed_at: int  # tokens before the step
    most: int  # tokens of a step from there on


class Scheduler:
    def __init__(
        self, cache: KVCache, limits: Limits, eos_token_ids: frozenset[int], proposer: Proposer | None = None
    ) -> None:
        self.cache = cache
        self.proposer = proposer or PromptLookup()
        self.limits = limits
        self.eos_token_ids = eos_token_ids
        self.waiting: deque[Sequence] = deque()  # in the order in which they will be admitted
        self.running: list[Sequence] = []  # in the order of admission
        self.num_preemptions = 0  # since the start
        self._turn = 0  # the latest one that was admitted
        self._next_turns: dict[str, int] = {}  # client -> the turn of its next prompt
        self.prefill_budget = PrefillBudget(limits.max_num_mixed_tokens)
        self._suspects: dict[Sequence, Suspect] = {}
        self.disk: DiskPrefixCache | None = None  # what continues the cache's memory
        self._loading: set[Sequence] = set()  # those that wait for it
        self._deferred: set[Sequence] = set()  # those for which it will have room after others; until the next step
        self._is_suspects_turn = False

    @property
    def has_work(self) -> bool:
        """Whether there is something to compute now; a sequence that waits for the disk is none."""
        return bool(self.running) or len(self.waiting) > len(self._loading) + len(self._deferred)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence behind those of its priority that have an earlier turn.

        Turns count tokens, as in start-time fair queueing (Goyal et al. 1996): a client's next prompt is as many turns
        later as its last prompt and its answers since then have tokens, so that a client that takes much waits behind
        one that takes little."""
        turns = [other.turn for other in self.waiting if other.client == sequence.client]
        sequence.turn = max([self._next_turn(sequence.client), *turns])
        self._next_turns[sequence.client] = sequence.turn + len(sequence.prompt_ids)
        self._insert(sequence)

    def _next_turn(self, client: str) -> int:
        return max(self._turn, self._next_turns.get(client, 0))

    def _settle(self, sequence: Sequence) -> None:
        """Corrects the client's next turn at a sequence's end: it counts the tokens that were computed."""
        if not self.waiting:
            self._next_turns.clear()
            return
        taken = -len(sequence.prompt_ids) if sequence.queue_time is None else sequence.num_output_tokens
        self._next_turns[sequence.client] = self._next_turn(sequence.client) + taken

    def _insert(self, sequence: Sequence) -> None:
        rank = (sequence.priority, sequence.turn)
        self.waiting.insert(sum((other.priority, other.turn) <= rank for other in self.waiting), sequence)

    # NOTE: an example with max_num_mixed_tokens=64 while A, B and C decode, and D comes with a prompt of 200 tokens.
    #
    #   step  spans (sequence: tokens)      budget for prompts
    #   1     A: 1, B: 1, C: 1, D: 61       64 - 3 decodes
    #   2, 3  the same again                D has 183 of its 200 tokens computed
    #   4     A: 1, B: 1, C: 1, D: 17       D's prompt is complete: the step also samples its first token
    #   5     A: 1, B: 1, C: 1, D: 1        four decodes; were the next prompt E waiting, it would get 60 tokens
    #
    # Where such a step would delay the decodes too long, PrefillBudget lowers the 61. Where a decode finds no free
    # block, the running sequence of the lowest priority that was admitted last is preempted, say D: its blocks are
    # freed, it waits first in the queue, and its prompt and answer so far are computed again, as one prompt.

    def schedule(self, has_prompts: bool = True) -> Batch:
        """Chooses what the next step computes: every decode that gets a block, then chunks of prompts within the
        budget, the most urgent first. Sequences of a failed step and all others take turns.

        has_prompts: whether there may be prompts beside decodes.
        """
        self._deferred.clear()
        self._is_suspects_turn = bool(self._suspects) and not self._is_suspects_turn
        batch = self._schedule_suspect() if self._is_suspects_turn else Batch(())
        return batch if batch.spans else self._schedule_others(has_prompts) or self._schedule_suspect()

    def _schedule_others(self, has_prompts: bool) -> Batch | None:
        """Schedules all but suspects; None where there are no others."""
        spans: list[Span] = []
        self._promote()
        for sequence in sorted(self.running, key=lambda s: s.priority):  # lowest priority last: those are preempted
            is_decode = sequence.num_uncomputed == 1 and sequence not in self._suspects
            if is_decode and self._make_room(sequence):
                spans.append(Span(sequence, sequence.num_computed, 1))
        budget = self.limits.max_num_batched_tokens
        if spans:
            num_prompts = len(self._prefilling()) + len(self.waiting)
            budget = min(
                self.prefill_budget.budget(len(spans), num_prompts), self.limits.max_num_mixed_tokens - len(spans)
            )
            budget = budget if has_prompts else 0
        prefilling, is_full = [s for s in self._prefilling() if s not in self._suspects], False
        waiting = [sequence for sequence in self.waiting if sequence not in self._suspects]
        for priority in sorted({s.priority for s in [*prefilling, *waiting]}):
            for sequence in [s for s in prefilling if s.priority == priority]:
                budget -= self._prefill(sequence, budget, spans)
            for sequence in [s for s in waiting if s.priority == priority]:
                if budget <= 0 or is_full or len(self.running) >= self.limits.max_num_seqs:
                    break
                if self._is_being_computed(sequence) or self._is_loading(sequence):
                    continue  # once that is computed or read, it can reuse it
                is_full = not self._admit(sequence)
                budget -= self._prefill(sequence, budget, spans) if not is_full else 0
        # not where a preempted sequence is computed again, whose last chunk may be of one token
        if all(span.is_decode and span.is_complete for span in spans):
            spans = self._with_drafts(spans)
        if not spans and len(self.running) > 1:  # each prompt lacks the blocks that the others hold
            self._preempt(self._least_urgent())
            return self._schedule_others(has_prompts)
        is_alone = all(sequence in self._suspects for sequence in self.running)
        assert spans or is_alone, "a sequence that fits the cache alone cannot proceed"
        return Batch(tuple(spans)) if spans or not self._suspects else None

    # --- after a failed step

    def isolate(self, batch: Batch) -> None:
        """Computes the sequences of a failed step again, each alone, from the start or a snapshot: the step may have
        changed their recurrent states. One that has failed alone is computed with fewer tokens from there on."""
        is_alone = len(batch.spans) == 1
        for span in batch.spans:
            most = span.num_tokens // 2 if is_alone else self.limits.max_num_batched_tokens
            self._suspects[span.sequence] = Suspect(span.start, max(1, most))
            span.sequence.add_boundary(span.start)  # to begin from, if it fails again
            self.cache.erase(span.sequence)  # the step may have written NaN
            self._preempt(span.sequence)

    def is_suspect(self, sequence: Sequence) -> bool:
        return sequence in self._suspects

    def _schedule_suspect(self) -> Batch:
        """Schedules the first suspect; nothing where it must wait for what others hold."""
        sequence, suspect = next(iter(self._suspects.items()))
        is_full = len(self.running) >= self.limits.max_num_seqs
        if sequence.status is Status.WAITING and (is_full or not self._admit(sequence)):
            return Batch(())
        before = suspect.failed_at - sequence.num_computed
        budget = min(before, self.limits.max_num_batched_tokens) if before > 0 else suspect.most
        spans: list[Span] = []
        self._prefill(sequence, budget, spans)
        return Batch(tuple(spans))

    def _with_drafts(self, decodes: list[Span]) -> list[Span]:
        """Adds guesses at the next tokens, up to MAX_DRAFTED_ROWS tokens in all."""
        limit = min(self.limits.num_speculative_tokens, MAX_DRAFTED_ROWS // max(1, len(decodes)) - 1)
        if limit <= 0 or not decodes:
            return decodes
        requests = [(span.sequence, min(limit, self._num_left(span.sequence) - 1)) for span in decodes]
        drafts = self.proposer.propose(requests, self.prefill_budget.decode_time(len(decodes)))
        return [self._with_draft(span, draft) for span, draft in zip(decodes, drafts, strict=True)]

    def _num_left(self, sequence: Sequence) -> int:
        """Returns how many tokens the answer can still get, at least one."""
        left = sequence.params.max_tokens - sequence.num_output_tokens
        return min(left, self.limits.max_model_len - sequence.num_tokens)

    def _with_draft(self, span: Span, draft: tuple[int, ...]) -> Span:
        sequence = span.sequence
        if not draft or not self.cache.allocate(sequence, sequence.num_tokens + len(draft)):
            return span
        return Span(sequence=sequence, start=span.start, num_tokens=1 + len(draft), draft=draft)

    def _promote(self) -> None:
        """Gives priority 0, the highest, to prompts that have waited or been prefilled for over MAX_DEFERRALS steps."""
        for sequence in [s for s in [*self._prefilling(), *self.waiting] if s.priority > 0]:
            sequence.num_deferrals += 1
            if sequence.num_deferrals > MAX_DEFERRALS:
                sequence.priority = 0
                if sequence.status is Status.WAITING:
                    self.waiting.remove(sequence)
                    self._insert(sequence)

    def _admit(self, sequence: Sequence) -> bool:
        """Lets a waiting sequence run. Returns False where the cache has no room for its prompt."""
        if not sequence.scores_prompt:  # which needs the logits of all its tokens
            self.cache.reuse(sequence)
        if not self.cache.can_admit(sequence, self._prefilling(), self.limits.max_num_batched_tokens):
            self.cache.free(sequence)
            return False
        self.cache.allocate(sequence, sequence.num_computed)  # before a snapshot that it begins from is forgotten
        sequence.status = Status.RUNNING
        if sequence.queue_time is None:
            sequence.queue_time = time.perf_counter() - sequence.added
            # not after a preemption, when it may reuse its own blocks
            sequence.num_cached_tokens = sequence.num_computed
        self._turn = max(self._turn, sequence.turn)
        self.waiting.remove(sequence)
        if not self.waiting:
            self._next_turns.clear()
        self.running.append(sequence)
        return True

    @property
    def num_decoding(self) -> int:
        return sum(sequence.num_uncomputed == 1 for sequence in self.running)

    def images_to_encode(self) -> list[Image]:
        """Images without features of the prompts that are being computed, then of the next ones that wait."""
        num_ahead = min(ENCODED_AHEAD, self.limits.max_num_seqs - len(self.running))
        ahead = list(self.waiting)[: max(1, num_ahead)]
        features = [image.features for owner in ahead for image in owner.images if image.features is not None]
        is_full = sum(rows.nbytes for rows in features) > AHEAD_BYTES
        owners = [*self._prefilling(), *ahead[: 1 if is_full else None]]
        images = [image for owner in owners for image in owner.images_in(owner.num_computed, owner.num_tokens)]
        return [image for image in images if image.features is None]

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Returns whether a running prompt is about to compute a block that this sequence could reuse.

        For example, two chats with the same system prompt of 1,000 tokens come at once: the second one waits until the
        first has computed these, then takes their blocks over."""
        if not self.cache.can_reuse:
            return False
        size = self.cache.block_size
        keys = sequence.block_keys(size)[: (sequence.num_tokens - 1) // size]
        for other in [s for s in self._prefilling() if s.priority <= sequence.priority and not s.scores_prompt]:
            index, others = other.num_computed // size, other.block_keys(size)
            if index < len(keys) and others[index : index + 1] == [keys[index]]:
                if self.cache.states is not None:  # it must keep its state there
                    other.add_boundary(size * len(commonprefix([keys, others])))
                return not sequence.scores_prompt
        return False

    def _is_loading(self, sequence: Sequence) -> bool:
        """Returns whether a part of the prompt is read from disk, or will be; it is asked before each admission."""
        if self.disk is not None and not sequence.is_looked_up and not sequence.scores_prompt:
            lookup = self.disk.load(sequence, lambda: self._loading.discard(sequence))
            if lookup is Lookup.READING:
                self._loading.add(sequence)
            elif lookup is Lookup.LATER:
                self._deferred.add(sequence)
        return sequence in self._loading or sequence in self._deferred

    def _least_urgent(self) -> Sequence:
        """Returns the running sequence to preempt next: of those with the lowest priority, the one admitted last."""
        return max(reversed(self.running), key=lambda sequence: sequence.priority)

    def _prefilling(self) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.num_uncomputed > 1]

    def _prefill(self, sequence: Sequence, budget: int, spans: list[Span]) -> int:
        """Adds the next chunk of a prompt to the spans. Returns its length, 0 where budget or blocks are lacking."""
        end = sequence.num_computed + min(sequence.num_uncomputed, budget)
        num_tokens = sequence.whole_chunk(end) - sequence.num_computed if budget > 0 else 0
        if num_tokens <= 0 or not self.cache.allocate(sequence, sequence.num_computed + num_tokens):
            return 0
        spans.append(Span(sequence, sequence.num_computed, num_tokens))
        return num_tokens

    def _make_room(self, sequence: Sequence) -> bool:
        """Allocates a block for the sequence's next token, if need be by preempting others. False: it was preempted."""
        while sequence.status is Status.RUNNING:
            if self.cache.allocate(sequence, sequence.num_tokens):
                return True
            self._preempt(self._least_urgent())
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Frees all its blocks and queues it before the others of its priority; its tokens are computed again."""
        self._erase_unchecked(sequence)
        self.cache.free(sequence)
        self.num_preemptions += 1
        sequence.status = Status.WAITING
        self.running.remove(sequence)
        self.waiting.insert(sum(other.priority < sequence.priority for other in self.waiting), sequence)

    def update(
        self, batch: Batch, sampled: list[list[SampledToken | None]]
    ) -> list[tuple[Sequence, TokenOutput | None]]:
        """Appends the tokens that a step sampled.

        sampled: for each complete span, its next token, or several where guesses were right; None instead of a token
        where the logits were not finite. Returns the outputs in the same order, None for a sequence that failed so.
        """
        outputs: list[tuple[Sequence, TokenOutput | None]] = []
        tokens = iter(sampled)
        for span in batch.spans:
            sequence = span.sequence
            if not span.is_complete:
                self.cache.advance(sequence, span.end)
                self.cache.cache_blocks(sequence, is_checked=False)
                self.cache.free_outside_window(sequence)
                continue
            self._suspects.pop(sequence, None)
            added = self._append_all(span, next(tokens))
            outputs += ((sequence, output) for output in added)
            if added[-1] is None:
                self.cache.erase(sequence)
            else:
                self.cache.cache_blocks(sequence, is_checked=True)
                self.cache.free_outside_window(sequence)
            if added[-1] is None or added[-1].finish_reason:
                self.remove(sequence)
        return outputs

    def _append_all(self, span: Span, tokens: list[SampledToken | None]) -> list[TokenOutput | None]:
        """Appends the tokens, up to the one that ends the answer, and takes back the guesses that were wrong."""
        sequence, num_before = span.sequence, span.sequence.num_tokens
        outputs: list[TokenOutput | None] = []
        for token in tokens:
            outputs.append(None if token is None else self._append(sequence, token))
            if outputs[-1] is None or outputs[-1].finish_reason:
                break
        self.cache.advance(sequence, span.end, len(span.draft))
        if span.draft:
            self.cache.rollback(sequence, num_before + len(outputs) - 1)
            self.proposer.note(sequence, len(span.draft), len(tokens) - 1)
        return outputs

    def _append(self, sequence: Sequence, token: SampledToken) -> TokenOutput:
        sequence.token_ids.append(token.token_id)
        is_end = token.token_id in self.eos_token_ids and not sequence.params.ignore_eos
        if is_end or sequence.is_stopped:
            output = TokenOutput(token_id=None, finish_reason="stop")
        else:
            reason = self._finish_reason(sequence, token.token_id)
            output = TokenOutput(token_id=token.token_id, finish_reason=reason, sampled=token)
        if sequence.num_output_tokens > 1:
            return output
        return replace(
            output,
            num_cached_tokens=sequence.num_cached_tokens,
            prompt=tuple(sequence.prompt_logprobs),
            queue_time=sequence.queue_time or 0.0,
        )

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        """Returns why the answer ends with this token, which is its last one so far; None if it goes on."""
        if sequence.matcher is not None:
            sequence.matcher.accept(token_id)
            if sequence.matcher.is_finished:
                return "stop"
        is_full = sequence.num_tokens >= self.limits.max_model_len
        return "length" if is_full or sequence.num_output_tokens >= sequence.params.max_tokens else None

    def remove(self, sequence: Sequence) -> None:
        """Ends a sequence, running or waiting, and frees all that it holds."""
        if sequence.status is Status.FINISHED:
            return
        if sequence.status is Status.WAITING:
            if sequence in self.waiting:
                self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
        self._suspects.pop(sequence, None)
        self._loading.discard(sequence)
        self._deferred.clear()
        self._erase_unchecked(sequence)
        if self.disk is not None:
            self.disk.save(sequence)
        self.cache.free(sequence)
        self.proposer.forget(sequence)
        self._settle(sequence)
        sequence.status = Status.FINISHED

    def _erase_unchecked(self, sequence: Sequence) -> None:
        """Zeroes the blocks of a prompt that has sampled nothing yet: its values were never checked for NaN."""
        if sequence.num_computed and not sequence.num_output_tokens:
            self.cache.erase(sequence)
