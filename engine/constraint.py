"""Constraint and Matcher: what an answer must look like, as the sampler asks for it.

Grammars and thinking budgets are constraints.
"""

from typing import Protocol

WORD = 32  # tokens in a word of a mask


class Matcher(Protocol):
    """One answer on its way through what it must look like."""

    num_accepted: int
    decides_end: bool  # else the answer may end as others do

    def accept(self, token_id: int) -> None: ...

    @property
    def is_finished(self) -> bool:
        """The answer is complete, and nothing can follow; or it left the grammar, which masks do not let happen."""
        ...

    def mask(self, ahead: list[int]) -> bytes | None:
        """A bit for each token that may come after those; None if all may, or if they may not come themselves."""
        ...


class Constraint(Protocol):
    """What an answer must look like; any number of answers can follow it at a time."""

    def matcher(self) -> Matcher: ...
