"""Grammars: what an answer may look like, compiled once and then followed token by token. llguidance does the work.

Masks are computed by threads of their own: while a GPU computes the step's logits, or on a CPU, where the two would
only be in each other's way, right after.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from engine import memory
from engine.cpu import sampling_kernels

if TYPE_CHECKING:
    from collections.abc import Sequence as Rows

    from engine.sequence import Sequence

MOST_KEPT, MOST_MEMORY = 128, 32 * 2**20  # compiled grammars, and bytes that they take
LIMITS = LLParserLimits(max_grammar_size=200_000, initial_lexer_fuel=2_000_000)  # 100 ms, and as much memory
INDENT, MOST_QUOTED = 4, 40  # characters before a pattern in an error's text, and of the pattern in ours
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


class GrammarMatcher:
    """Follows a grammar from its beginning to its end."""

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
    """A compiled one."""

    def __init__(self, prototype: LLMatcher) -> None:
        self._prototype = prototype

    def matcher(self) -> GrammarMatcher:
        return GrammarMatcher(self._prototype.deep_copy())


@dataclass(frozen=True)
class Triggered:
    """A grammar that holds from each trigger to its own end; everything else is free."""

    grammar: Grammar
    trigger: int  # a token
    is_repeated: bool  # else the answer ends with the grammar

    def matcher(self) -> Matcher:
        return TriggeredMatcher(self)


class TriggeredMatcher:
    decides_end = False

    def __init__(self, triggered: Triggered) -> None:
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
        other = TriggeredMatcher(self._triggered)
        other._inner = None if self._inner is None else self._inner.copy()
        for token_id in ahead:
            if other.is_finished or (other._inner is not None and not other._inner.can_accept(token_id)):
                return None
            other.accept(token_id)
        return other.mask([])


class GrammarCompiler:
    """A model's. Its methods may be called from any thread."""

    def __init__(self, tokenizer: Callable[[], str], num_tokens: int, eos_token_ids: Iterable[int]) -> None:
        """tokenizer: gives the JSON of a fast one; num_tokens: columns of the logits."""
        self._tokenizer, self._num_tokens = tokenizer, num_tokens
        self._eos_token_ids = sorted(eos_token_ids)
        self._compiler: LLTokenizer | None = None
        self._known: OrderedDict[str, tuple[Grammar, int]] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    def compile(self, text: str) -> Grammar:
        """Milliseconds, the first time a second. Raises ValueError for what is no grammar, or too large a one."""
        with self._lock:
            if text in self._known:
                self._known.move_to_end(text)
                return self._known[text][0]
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
        """num_bytes: that the grammar takes, give or take what other threads made and freed meanwhile."""
        freed = 0
        if num_bytes <= MOST_MEMORY:
            with self._lock:
                self._known[text] = grammar, num_bytes
                while len(self._known) > MOST_KEPT or sum(size for _, size in self._known.values()) > MOST_MEMORY:
                    freed += self._known.popitem(last=False)[1][1]
        if max(freed, num_bytes) > memory.LARGE:  # what compiling took is more than what is kept
            memory.trim_soon()


def _reason(error: str) -> str:
    """In one line: what is wrong, and in a pattern where. Of a pattern there are its lines, a mark below the place, and
    what is wrong there."""
    lines = error.splitlines()
    at = next((number for number, line in enumerate(lines) if line.startswith("error: ")), None)
    marks = [number for number in range(at or 0) if set(lines[number].strip()) == {"^"}]
    if at is None or not marks:
        return lines[0] if at is None else f"{lines[0].rstrip(':')}: {lines[at].removeprefix('error: ')}"
    pattern, mark = lines[marks[0] - 1], lines[marks[0]]
    start, what = mark.index("^"), lines[at].removeprefix("error: ")
    cause = pattern[start : len(mark)][:MOST_QUOTED]
    return f"the regular expression is invalid: {what}, at character {start - INDENT + 1}: {cause!r}"


_pool = ThreadPoolExecutor(2, "masks")


class Masks:
    """Those of a step's rows."""

    def __init__(self, sequences: "Rows[Sequence]") -> None:
        self._rows: dict[Matcher, list[tuple[int, list[int]]]] = {}
        for row, sequence in enumerate(sequences):
            if sequence.matcher is not None:
                ahead = sequence.output_ids[sequence.matcher.num_accepted :]
                self._rows.setdefault(sequence.matcher, []).append((row, ahead))
        self._futures: list[Future[list[tuple[int, bytes | None]]]] = []

    def start(self) -> None:
        """Begins to compute them; where a GPU computes the model, beside it."""
        self._futures = [_pool.submit(_masks_of, matcher, rows) for matcher, rows in self._rows.items()]

    def wait(self) -> None:
        """Until nothing computes them any more; a matcher is for one thread at a time."""
        wait(self._futures)

    def apply(self, logits: torch.Tensor) -> None:
        """Sets what may not come to -inf, in place; waits for the masks. logits: (rows, tokens), float32."""
        if self._rows and not self._futures:
            self.start()
        found = [(row, mask) for future in self._futures for row, mask in future.result() if mask is not None]
        if not found:
            return
        rows = torch.tensor([row for row, _ in found])
        words = -(-logits.shape[-1] // WORD) + 1  # one more, so that whole vectors can be read at the end
        bits = numpy.zeros((len(found), words), dtype=numpy.int32)
        for place, (_, mask) in enumerate(found):
            own = numpy.frombuffer(mask, dtype=numpy.int32)
            bits[place, : len(own)] = own[:words]
        forbid(logits, rows, torch.from_numpy(bits))


def _masks_of(matcher: Matcher, rows: list[tuple[int, list[int]]]) -> list[tuple[int, bytes | None]]:
    return [(row, matcher.mask(ahead)) for row, ahead in rows]


def forbid(logits: torch.Tensor, rows: torch.Tensor, bits: torch.Tensor) -> None:
    """bits: (len(rows), words) int32, the first token's in the lowest bit; sets the others' logits to -inf."""
    if sampling_kernels.can_argmax(logits):
        sampling_kernels.forbid(logits, rows, bits)
        return
    rows, bits = rows.to(logits.device), bits.to(logits.device)
    shifts = torch.arange(WORD, device=logits.device, dtype=torch.int32)
    allowed = ((bits[..., None] >> shifts) & 1).flatten(1)[:, : logits.shape[-1]].bool()
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)
