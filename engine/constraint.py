"""Constraint and Matcher: which tokens an answer may have, as the sampler asks for it.

A grammar is a constraint, and so is a budget for reasoning.
"""

from typing import Protocol

WORD = 32  # bits in a word of a bitmask, one for each token


class Matcher(Protocol):
    """Follows one answer through its constraint."""

    num_accepted: int  # tokens
    decides_end: bool  # False: min_tokens and stop tokens apply as without a constraint

    def accept(self, token_id: int) -> None:
        """Goes on by one token of the answer."""
        ...

    @property
    def is_finished(self) -> bool:
        """Whether nothing can follow: the answer is complete, or has left the grammar, which the masks prevent."""
        ...

    def mask(self, ahead: list[int]) -> bytes | None:
        """Returns the bitmask of the tokens allowed after `ahead`; None: all are, or `ahead` itself is not allowed."""
        ...


class Constraint(Protocol):
    """What an answer must look like. Any number of answers can follow it at the same time."""

    def matcher(self) -> Matcher:
        """Returns a matcher for a new answer."""
        ...
