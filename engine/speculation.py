"""Speculation: a guess at a sequence's next tokens, which one step then checks. A guess never changes an answer.

Prompt lookup (Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding): what followed the last tokens when
they occurred before may follow again, as in edited code or quoted text.
"""

from collections.abc import Sequence as Tokens

NGRAM = 3  # tokens that must have occurred before
FIRST_LENGTH = 4  # tokens of the first guess
WORTHWHILE = 0.2  # share of guessed tokens that must be right; below it the guessing pauses
MEMORY = 0.7  # how much the share so far counts beside the latest guess
PAUSE = 8  # tokens; doubled with each pause, up to LONGEST_PAUSE
LONGEST_PAUSE = 128


class Drafter:
    """One sequence's guesses, and how good they have been."""

    def __init__(self) -> None:
        self._followers: dict[tuple[int, ...], int] = {}  # n-gram -> the place after its latest occurrence
        self._num_indexed = NGRAM
        self._share = 0.5
        self._length = FIRST_LENGTH
        self._pause = PAUSE
        self._waits_until = 0  # tokens of the sequence

    def propose(self, token_ids: Tokens[int], most: int) -> tuple[int, ...]:
        """What may follow, up to `most` tokens; often nothing."""
        for end in range(self._num_indexed, len(token_ids)):  # the last n-gram has no follower yet
            self._followers[tuple(token_ids[end - NGRAM : end])] = end
        self._num_indexed = max(self._num_indexed, len(token_ids))
        if len(token_ids) < self._waits_until:
            return ()
        place = self._followers.get(tuple(token_ids[-NGRAM:]))
        return () if place is None else tuple(token_ids[place : place + min(most, self._length)])

    def note(self, num_proposed: int, num_right: int, num_tokens: int) -> None:
        """How many tokens of the last guess were right; num_tokens: the sequence's length now."""
        self._share = MEMORY * self._share + (1 - MEMORY) * num_right / num_proposed
        self._length = 2 * self._length if num_right == num_proposed else max(1, num_right + 1)
        if self._share < WORTHWHILE:
            self._waits_until = num_tokens + self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
            self._share = WORTHWHILE  # one wrong guess after the pause, and it pauses again
        elif num_right:
            self._pause = PAUSE
