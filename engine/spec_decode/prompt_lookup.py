"""PromptLookup: guesses a sequence's next tokens, which one step then checks. A guess never changes an answer.

The tokens that followed the last ones when they occurred before may follow again, as in edited code or quoted text
(Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from collections.abc import Sequence as Tokens
from typing import Protocol

from engine.sequence import Sequence

NGRAM = 3  # last tokens that must have occurred before
FIRST_LENGTH = 4  # tokens of the first guess
WORTHWHILE = 0.2  # share of guessed tokens that must be right if guessing costs nothing; below it guessing pauses
SHARE_DECAY = 0.7  # the weight of the share so far beside the latest guess
PAUSE = 8  # tokens; doubled with each pause, up to LONGEST_PAUSE
LONGEST_PAUSE = 128  # tokens


class Proposer(Protocol):
    """A source of guesses: PromptLookup, or a DraftModel."""

    def propose(self, requests: Tokens[tuple[Sequence, int]], step_time: float | None = None) -> list[tuple[int, ...]]:
        """Guesses the next tokens of each sequence, at most the number beside it; often none.

        step_time: seconds of a step without guesses, None where that is not known."""
        ...

    def note(self, sequence: Sequence, num_proposed: int, num_accepted: int) -> None:
        """Learns how many tokens of the sequence's last guess were right."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """Frees what is kept of a sequence that has ended."""
        ...


class DraftLength:
    """Says how long a sequence's next guess should be, learnt from how many tokens of the last ones were right."""

    def __init__(self) -> None:
        self._share = 0.5  # of right tokens
        self._length = FIRST_LENGTH
        self._pause = PAUSE
        self._paused_until = 0  # tokens of the sequence

    def next(self, num_tokens: int, limit: int) -> int:
        """Returns the length of the next guess, at most `limit`; 0 during a pause. num_tokens: the sequence's length
        now."""
        return 0 if num_tokens < self._paused_until else min(limit, self._length)

    def note(self, num_proposed: int, num_accepted: int, num_tokens: int, worthwhile: float = WORTHWHILE) -> None:
        """Learns from a guess. num_tokens: the sequence's length; worthwhile: the share below which guessing pauses."""
        self._share = SHARE_DECAY * self._share + (1 - SHARE_DECAY) * num_accepted / num_proposed
        self._length = 2 * self._length if num_accepted == num_proposed else max(1, num_accepted + 1)
        if self._share < worthwhile:
            self._paused_until = num_tokens + self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
            self._share = worthwhile  # so that one wrong guess after the pause begins the next one
        elif num_accepted:
            self._pause = PAUSE


class Drafter:
    """Guesses one sequence's tokens by prompt lookup."""

    def __init__(self) -> None:
        self.draft_length = DraftLength()
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram -> the position after its latest occurrence
        self._num_indexed = NGRAM

    def propose(self, token_ids: Tokens[int], limit: int) -> tuple[int, ...]:
        """Guesses at most `limit` next tokens."""
        for end in range(self._num_indexed, len(token_ids)):  # the last n-gram has no follower yet
            self._followers[tuple(token_ids[end - NGRAM : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids))
        start = self._followers.get(tuple(token_ids[-NGRAM:]))
        length = self.draft_length.next(len(token_ids), limit)
        return () if start is None else tuple(token_ids[start : start + length])


class PromptLookup:
    """A Proposer that needs no model."""

    def __init__(self) -> None:
        self._drafters: dict[Sequence, Drafter] = {}

    def propose(self, requests: Tokens[tuple[Sequence, int]], step_time: float | None = None) -> list[tuple[int, ...]]:
        return [self._drafter(sequence).propose(sequence.token_ids, limit) for sequence, limit in requests]

    def note(self, sequence: Sequence, num_proposed: int, num_accepted: int) -> None:
        self._drafter(sequence).draft_length.note(num_proposed, num_accepted, sequence.num_tokens)

    def forget(self, sequence: Sequence) -> None:
        self._drafters.pop(sequence, None)

    def _drafter(self, sequence: Sequence) -> Drafter:
        return self._drafters.setdefault(sequence, Drafter())
