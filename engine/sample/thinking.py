"""Thinking: a model's reasoning before its answer, between two tokens. It may have a budget; a grammar holds only after
it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from engine.constraint import WORD, Constraint, Matcher


@dataclass(frozen=True)
class Thinking:
    """A Constraint: the reasoning's tokens and budget, and the constraint of the answer."""

    begin: int  # token id
    end: int  # token id
    closing: tuple[int, ...]  # token ids that are forced when the budget is spent, `end` among them
    is_open: bool  # the prompt ends inside the reasoning
    num_tokens: int  # columns of the logits
    budget: int | None = None  # tokens
    answer: Constraint | None = None
    after: tuple[int, ...] = ()  # token ids that are forced between `end` and the answer
    forbidden: frozenset[int] = frozenset()  # token ids that would end the reasoning without an answer

    def matcher(self) -> Matcher:
        return ThinkingMatcher(self)


@dataclass(frozen=True)
class _State:
    num_thought: int | None = None  # tokens of reasoning so far; None: outside of it
    forced: tuple[int, ...] = ()  # the token ids that must come next
    is_over: bool = False  # the answer has begun


class ThinkingMatcher:
    """A Matcher that counts the tokens of reasoning, and hands those of the answer to the answer's matcher."""

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._inner = None if thinking.answer is None else thinking.answer.matcher()
        self._num_bytes = -(-thinking.num_tokens // WORD) * WORD // 8
        allowed = set(range(thinking.num_tokens)) - thinking.forbidden
        self._free = self._bits(allowed) if thinking.forbidden else None
        self._state = self._thought(0) if thinking.is_open else _State()
        self.num_accepted = 0
        self.decides_end = self._inner is not None and self._inner.decides_end

    def accept(self, token_id: int) -> None:
        self.num_accepted += 1
        self._state, is_answer = self._step(self._state, token_id)
        if self._inner is not None and is_answer:
            self._inner.accept(token_id)

    @property
    def is_finished(self) -> bool:
        return self._state.is_over and self._inner is not None and self._inner.is_finished

    def mask(self, ahead: list[int]) -> bytes | None:
        state, answer = self._state, []
        for token_id in ahead:
            state, is_answer = self._step(state, token_id)
            answer += [token_id] if is_answer else []
        if state.forced:
            return self._bits([state.forced[0]])
        if state.num_thought is not None:
            return self._free
        mask = None if self._inner is None else self._inner.mask(answer)
        if mask is None or state.is_over:
            return mask
        return _union(mask, self._bits([self._thinking.begin]))

    def _step(self, state: _State, token_id: int) -> tuple[_State, bool]:
        """Returns the state after a token, and whether the token belongs to the answer."""
        if state.is_over:
            return state, True
        if state.forced:
            return _State(forced=state.forced[1:], is_over=len(state.forced) == 1), False
        if state.num_thought is None:
            is_thought = token_id == self._thinking.begin
            return self._thought(0) if is_thought else _State(is_over=True), not is_thought
        if token_id != self._thinking.end:
            return self._thought(state.num_thought + 1), False
        return _State(forced=self._thinking.after, is_over=not self._thinking.after), False

    def _thought(self, count: int) -> _State:
        budget = self._thinking.budget
        is_spent = budget is not None and count >= budget
        return _State(num_thought=count, forced=self._thinking.closing if is_spent else ())

    def _bits(self, token_ids: Iterable[int]) -> bytes:
        bits = bytearray(self._num_bytes)
        for token_id in token_ids:
            bits[token_id // 8] |= 1 << token_id % 8
        return bytes(bits)


def _union(a: bytes, b: bytes) -> bytes:
    size = max(len(a), len(b))
    return (int.from_bytes(a, "little") | int.from_bytes(b, "little")).to_bytes(size, "little")
