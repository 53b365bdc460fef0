"""TextQueue: texts that wait for a model, and which of them go together in a batch. It knows no model and no thread."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

J = TypeVar("J")
LEAST_FILLED = 0.5  # of a batch's longest text: shorter ones would be mostly padding


@dataclass(frozen=True, order=True)
class Item(Generic[J]):
    """One text of a job's, or a pair of texts."""

    length: int  # tokens
    serial: int
    job: J = field(compare=False)
    index: int = field(compare=False)  # in the job
    text: Any = field(compare=False)
    prompt: Hashable = field(compare=False)  # what the model is told before it


class TextQueue(Generic[J]):
    """Jobs take turns, so that a short one does not wait for a long one's end; every batch is filled up with the
    texts of nearly its first one's length, whosever they are."""

    def __init__(self, max_batch_tokens: int) -> None:
        """max_batch_tokens: padding included."""
        self.max_batch_tokens = max_batch_tokens
        self._waiting: dict[Hashable, list[Item[J]]] = {}  # by prompt; in the order of their lengths
        self._turns: deque[deque[Item[J]]] = deque()  # what each job has left, and maybe some that it has not
        self._num_added = 0

    def __bool__(self) -> bool:
        return any(self._waiting.values())

    def add(self, job: J, texts: Sequence[Any], lengths: Sequence[int], prompt: Hashable) -> None:
        waiting = self._waiting.setdefault(prompt, [])
        items: list[Item[J]] = []
        for index, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            items.append(Item(length, self._num_added, job, index, text, prompt))
            self._num_added += 1
            insort(waiting, items[-1])
        self._turns.append(deque(sorted(items, reverse=True)))

    def remove(self, jobs: Iterable[J]) -> None:
        gone = {id(job) for job in jobs}
        for prompt, waiting in list(self._waiting.items()):
            self._waiting[prompt] = [item for item in waiting if id(item.job) not in gone]
            if not self._waiting[prompt]:
                del self._waiting[prompt]
        self._forget_turns()

    def _forget_turns(self) -> None:
        """Where nothing waits, turns hold only what was computed."""
        if not self._waiting:
            self._turns.clear()

    def take(self) -> list[Item[J]]:
        """The next batch; all of one prompt. Empty where nothing waits."""
        while self._turns:
            left = self._turns.popleft()
            while left:
                first = left.popleft()
                waiting = self._waiting.get(first.prompt, [])
                place = bisect_left(waiting, first)
                if place < len(waiting) and waiting[place] is first:
                    self._turns.append(left)
                    return self._cut(first.prompt, place)
        return []

    def _cut(self, prompt: Hashable, place: int) -> list[Item[J]]:
        """The texts around that place, nearest length first, while they fit."""
        waiting = self._waiting[prompt]
        begin, end, length = place, place + 1, waiting[place].length
        while True:
            around = [step for step in (begin - 1, end) if 0 <= step < len(waiting)]
            around.sort(key=lambda step: abs(waiting[step].length - length))
            fitting = [step for step in around if self._fits(waiting, min(begin, step), max(end, step + 1))]
            if not fitting:
                break
            begin, end = min(begin, fitting[0]), max(end, fitting[0] + 1)
        batch = waiting[begin:end]
        del waiting[begin:end]
        if not waiting:
            del self._waiting[prompt]
        self._forget_turns()
        return batch

    def _fits(self, waiting: list[Item[J]], begin: int, end: int) -> bool:
        shortest, longest = waiting[begin].length, waiting[end - 1].length
        return (end - begin) * longest <= self.max_batch_tokens and shortest >= LEAST_FILLED * longest
