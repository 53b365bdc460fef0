"""TextQueue: texts that wait for a model, and which of them form the next batch. It knows no model and no thread."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

J = TypeVar("J")
LEAST_FILLED = 0.5  # of the longest text in a batch; shorter texts would be mostly padding


@dataclass(frozen=True, order=True)
class Item(Generic[J]):
    """One text of a job, or a pair of texts."""

    length: int  # tokens
    serial: int  # in the order of coming
    job: J = field(compare=False)
    index: int = field(compare=False)  # of the text in its job
    text: Any = field(compare=False)
    prompt: Hashable = field(compare=False)  # only texts with equal ones form a batch


class TextQueue(Generic[J]):
    """Jobs take turns, so that a short one does not wait until a long one ends. A batch begins with the longest text of
    the job whose turn it is, and is filled up with texts of similar length from any job."""

    def __init__(self, max_batch_tokens: int) -> None:
        """max_batch_tokens: tokens in a batch, padding included."""
        self.max_batch_tokens = max_batch_tokens
        self._waiting: dict[Hashable, list[Item[J]]] = {}  # prompt -> texts, shortest first
        self._turns: deque[deque[Item[J]]] = deque()  # for each job its texts, longest first; some may be taken already
        self._num_added = 0

    def __bool__(self) -> bool:
        return any(self._waiting.values())

    def add(self, job: J, texts: Sequence[Any], lengths: Sequence[int], prompt: Hashable) -> None:
        """Queues a job's texts. lengths: tokens of each."""
        waiting = self._waiting.setdefault(prompt, [])
        items: list[Item[J]] = []
        for index, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            items.append(Item(length=length, serial=self._num_added, job=job, index=index, text=text, prompt=prompt))
            self._num_added += 1
            insort(waiting, items[-1])
        self._turns.append(deque(sorted(items, reverse=True)))

    def remove(self, jobs: Iterable[J]) -> None:
        """Drops the texts of these jobs."""
        gone = {id(job) for job in jobs}
        for prompt, waiting in list(self._waiting.items()):
            self._waiting[prompt] = [item for item in waiting if id(item.job) not in gone]
            if not self._waiting[prompt]:
                del self._waiting[prompt]
        self._forget_turns()

    def _forget_turns(self) -> None:
        """Clears the turns where nothing waits: they then hold only texts that were taken."""
        if not self._waiting:
            self._turns.clear()

    def take(self) -> list[Item[J]]:
        """Takes the next batch, whose texts have one prompt. Empty where nothing waits."""
        while self._turns:
            left = self._turns.popleft()
            while left:
                first = left.popleft()
                waiting = self._waiting.get(first.prompt, [])
                index = bisect_left(waiting, first)
                if index < len(waiting) and waiting[index] is first:
                    self._turns.append(left)
                    return self._take_around(first.prompt, index)
        return []

    def _take_around(self, prompt: Hashable, index: int) -> list[Item[J]]:
        """Takes the text at `index` and its neighbours, nearest length first, while they fit a batch."""
        waiting = self._waiting[prompt]
        begin, end, length = index, index + 1, waiting[index].length
        while True:
            neighbours = [i for i in (begin - 1, end) if 0 <= i < len(waiting)]
            neighbours.sort(key=lambda i: abs(waiting[i].length - length))
            fitting = [i for i in neighbours if self._fits(waiting, min(begin, i), max(end, i + 1))]
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
