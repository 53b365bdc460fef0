"""Grammars: which texts an answer may be, compiled once and then followed token by token, by llguidance."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine import memory
from engine.constraint import Matcher

MAX_KEPT, MAX_MEMORY = 128, 32 * 2**20  # compiled grammars that are kept, and their bytes
LIMITS = LLParserLimits(max_grammar_size=200_000, initial_lexer_fuel=2_000_000)  # about 100 ms to compile one
INDENT, MAX_QUOTED = 4, 40  # characters before the pattern in llguidance's message, and of the pattern in ours


class GrammarMatcher:
    """A Matcher: the answer follows a grammar from its beginning to its end."""

    decides_end = True

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.num_accepted = 0

    def accept(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self.num_accepted += 1

    def can_accept(self, token_id: int) -> bool:
        return bool(self._matcher.validate_tokens([token_id]))

    def copy(self) -> "GrammarMatcher":
        return GrammarMatcher(self._matcher.deep_copy())

    @property
    def is_finished(self) -> bool:
        return bool(self._matcher.is_stopped())

    def mask(self, ahead: list[int]) -> bytes | None:
        num_taken = self._matcher.try_consume_tokens(ahead) if ahead else 0
        mask = self._matcher.compute_bitmask() if num_taken == len(ahead) else None
        if num_taken:
            self._matcher.rollback(num_taken)
        return mask


class Grammar:
    """A compiled grammar, which is a Constraint."""

    def __init__(self, prototype: LLMatcher) -> None:
        self._prototype = prototype

    def matcher(self) -> GrammarMatcher:
        return GrammarMatcher(self._prototype.deep_copy())


@dataclass(frozen=True)
class TriggeredGrammar:
    """A Constraint: a grammar holds from each trigger token to the grammar's end; the rest of the answer is free."""

    grammar: Grammar
    trigger: int  # token id
    is_repeated: bool  # False: the answer ends with the grammar's end

    def matcher(self) -> Matcher:
        return TriggeredGrammarMatcher(self)


class TriggeredGrammarMatcher:
    """A Matcher that follows the grammar after a trigger, and allows everything before and behind it."""

    decides_end = False

    def __init__(self, triggered: TriggeredGrammar) -> None:
        self._triggered = triggered
        self._inner: GrammarMatcher | None = None
        self.num_accepted = 0
        self.is_finished = False

    def accept(self, token_id: int) -> None:
        self.num_accepted += 1
        if self._inner is None:
            is_trigger = token_id == self._triggered.trigger
            self._inner = self._triggered.grammar.matcher() if is_trigger else None
            return
        self._inner.accept(token_id)
        if self._inner.is_finished:
            self._inner, self.is_finished = None, not self._triggered.is_repeated

    def mask(self, ahead: list[int]) -> bytes | None:
        if not ahead:
            return None if self._inner is None else self._inner.mask([])
        other = TriggeredGrammarMatcher(self._triggered)
        other._inner = None if self._inner is None else self._inner.copy()
        for token_id in ahead:
            if other.is_finished or (other._inner is not None and not other._inner.can_accept(token_id)):
                return None
            other.accept(token_id)
        return other.mask([])


class GrammarCompiler:
    """Compiles grammars for a model's vocabulary. Its methods may be called from any thread."""

    def __init__(self, tokenizer: Callable[[], str], num_tokens: int, eos_token_ids: Iterable[int]) -> None:
        """tokenizer: returns the JSON of a fast tokenizer; num_tokens: columns of the logits."""
        self._tokenizer, self._num_tokens = tokenizer, num_tokens
        self._eos_token_ids = sorted(eos_token_ids)
        self._compiler: LLTokenizer | None = None
        # text -> grammar and its bytes; the least recently used first
        self._grammars: OrderedDict[str, tuple[Grammar, int]] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, text: str) -> Grammar:
        """Compiles a grammar, in milliseconds; the first one takes a second. Raises ValueError for a text that is no
        grammar, or too large a one."""
        with self._lock:
            if text in self._grammars:
                self._grammars.move_to_end(text)
                return self._grammars[text][0]
            if self._compiler is None:
                slices = LLTokenizer.json_slices()
                self._compiler = LLTokenizer(self._tokenizer(), self._num_tokens, self._eos_token_ids, slices)
            compiler = self._compiler
        before = memory.allocated()
        prototype = LLMatcher(compiler, text, log_level=0, limits=LIMITS)
        if prototype.is_error():
            raise ValueError(_reason(prototype.get_error()))
        grammar = Grammar(prototype)
        first = int.from_bytes(grammar.matcher().mask([]) or b"", "little")
        if not first & ~sum(1 << token_id for token_id in self._eos_token_ids):
            raise ValueError("no output can satisfy it")
        self._keep(text, grammar, max(0, memory.allocated() - before))
        return grammar

    def _keep(self, text: str, grammar: Grammar, num_bytes: int) -> None:
        """num_bytes: the grammar's size, measured while other threads took and freed memory too."""
        freed = 0
        if num_bytes <= MAX_MEMORY:
            with self._lock:
                self._grammars[text] = grammar, num_bytes
                while len(self._grammars) > MAX_KEPT or sum(size for _, size in self._grammars.values()) > MAX_MEMORY:
                    freed += self._grammars.popitem(last=False)[1][1]
        memory.trim_after(max(freed, num_bytes))  # compiling takes more than the grammar itself


def _reason(error: str) -> str:
    """Shortens llguidance's message to one line. For a regular expression, the message has the pattern's lines, a mark
    `^` below the place, and `error: ` with the cause."""
    lines = error.splitlines()
    at = next((number for number, line in enumerate(lines) if line.startswith("error: ")), None)
    marks = [number for number in range(at or 0) if set(lines[number].strip()) == {"^"}]
    if at is None or not marks:
        return lines[0] if at is None else f"{lines[0].rstrip(':')}: {lines[at].removeprefix('error: ')}"
    pattern, mark = lines[marks[0] - 1], lines[marks[0]]
    start, what = mark.index("^"), lines[at].removeprefix("error: ")
    cause = pattern[start : len(mark)][:MAX_QUOTED]
    return f"the regular expression is invalid: {what}, at character {start - INDENT + 1}: {cause!r}"
