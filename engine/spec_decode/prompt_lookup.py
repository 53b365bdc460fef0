"""Speculation: guesses at a sequence's next tokens, which one step then checks. A guess never changes an answer.

Prompt lookup (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding): what followed the last tokens when
they occurred before may follow again, as in edited code or quoted text.
"""

from collections.abc import Sequence as Tokens
from typing import Protocol

from engine.sequence import Sequence

NGRAM = 3  # tokens that must have occurred before
FIRST_LENGTH = 4  # tokens of the first guess
WORTHWHILE = 0.2  # share of tokens that must be right if guessing costs nothing; below it the guessing pauses
DECAY = 0.7  # how much the share so far counts beside the latest guess
PAUSE = 8  # tokens; doubled with each pause, up to LONGEST_PAUSE
LONGEST_PAUSE = 128


class Proposer(Protocol):
    """Where guesses come from."""

    def propose(self, requests: Tokens[tuple[Sequence, int]], step_time: float | None = None) -> list[tuple[int, ...]]:
        """What may follow in each sequence, up to so many tokens; often nothing. step_time: seconds without guesses."""
        ...

    def note(self, sequence: Sequence, num_proposed: int, num_right: int) -> None:
        """How many tokens of the sequence's last guess were right."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        ...


class DraftLength:
    """How long the next guess should be, learnt from how good the last ones were."""

    def __init__(self) -> None:
        self._share = 0.5
        self._length = FIRST_LENGTH
        self._pause = PAUSE
        self._waits_until = 0  # tokens of the sequence

    def length(self, num_tokens: int, most: int) -> int:
        """For a sequence of so many tokens; 0 during a pause."""
        return 0 if num_tokens < self._waits_until else min(most, self._length)

    def note(self, num_proposed: int, num_right: int, num_tokens: int, worthwhile: float = WORTHWHILE) -> None:
        """num_tokens: the sequence's length now."""
        self._share = DECAY * self._share + (1 - DECAY) * num_right / num_proposed
        self._length = 2 * self._length if num_right == num_proposed else max(1, num_right + 1)
        if self._share < worthwhile:
            self._waits_until = num_tokens + self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
            self._share = worthwhile  # one wrong guess after the pause, and it pauses again
        elif num_right:
            self._pause = PAUSE


class Drafter:
    """One sequence's guesses by prompt lookup."""

    def __init__(self) -> None:
        self.confidence = DraftLength()
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram -> the place after its latest occurrence
        self._num_indexed = NGRAM

    def propose(self, token_ids: Tokens[int], most: int) -> tuple[int, ...]:
        """What may follow, up to `most` tokens."""
        for end in range(self._num_indexed, len(token_ids)):  # the last n-gram has no follower yet
            self._followers[tuple(token_ids[end - NGRAM : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids))
        place = self._followers.get(tuple(token_ids[-NGRAM:]))
        length = self.confidence.length(len(token_ids), most)
        return () if place is None else tuple(token_ids[place : place + length])


class PromptLookup:
    """A Proposer without a model."""

    def __init__(self) -> None:
        self._drafters: dict[Sequence, Drafter] = {}

    def propose(self, requests: Tokens[tuple[Sequence, int]], step_time: float | None = None) -> list[tuple[int, ...]]:
        return [self._drafter(sequence).propose(sequence.token_ids, most) for sequence, most in requests]

    def note(self, sequence: Sequence, num_proposed: int, num_right: int) -> None:
        self._drafter(sequence).confidence.note(num_proposed, num_right, sequence.num_tokens)

    def forget(self, sequence: Sequence) -> None:
        self._drafters.pop(sequence, None)

    def _drafter(self, sequence: Sequence) -> Drafter:
        return self._drafters.setdefault(sequence, Drafter())
