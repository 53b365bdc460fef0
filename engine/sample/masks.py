"""GrammarBitmasks: the tokens that grammars allow in each row of a step.

Two threads compute them: while a GPU computes the step's logits, or on a CPU, where both would compete for the cores,
right after the logits.
"""

from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy
import torch

from engine.constraint import WORD, Matcher
from engine.cpu import sampling_kernels
from engine.sequence import Sequence

_pool = ThreadPoolExecutor(2, "masks")


class GrammarBitmasks:
    """The bitmasks of a step's rows."""

    def __init__(self, sequences: Rows[Sequence]) -> None:
        self._rows: dict[Matcher, list[tuple[int, list[int]]]] = {}  # rows, with the tokens that are not accepted yet
        for row, sequence in enumerate(sequences):
            if sequence.matcher is not None:
                ahead = sequence.output_ids[sequence.matcher.num_accepted :]
                self._rows.setdefault(sequence.matcher, []).append((row, ahead))
        self._futures: list[Future[list[tuple[int, bytes | None]]]] = []

    def start(self) -> None:
        """Begins to compute the bitmasks in the background."""
        self._futures = [_pool.submit(_masks_of, matcher, rows) for matcher, rows in self._rows.items()]

    def wait(self) -> None:
        """Waits until no thread computes them any more, since only one thread at a time may use a matcher."""
        wait(self._futures)

    def apply(self, logits: torch.Tensor) -> None:
        """Waits for the bitmasks and sets the logits of all other tokens to -inf. logits: (rows, vocab), float32."""
        if self._rows and not self._futures:
            self.start()
        masks = [(row, mask) for future in self._futures for row, mask in future.result() if mask is not None]
        if not masks:
            return
        rows = torch.tensor([row for row, _ in masks])
        words = -(-logits.shape[-1] // WORD) + 1  # one more, since kernels read whole vectors, beyond the end too
        bits = numpy.zeros((len(masks), words), dtype=numpy.int32)
        for index, (_, mask) in enumerate(masks):
            allowed = numpy.frombuffer(mask, dtype=numpy.int32)
            bits[index, : len(allowed)] = allowed[:words]
        forbid(logits, rows, torch.from_numpy(bits))


def _masks_of(matcher: Matcher, rows: list[tuple[int, list[int]]]) -> list[tuple[int, bytes | None]]:
    return [(row, matcher.mask(ahead)) for row, ahead in rows]


def forbid(logits: torch.Tensor, rows: torch.Tensor, bits: torch.Tensor) -> None:
    """Sets the logits of tokens without a bit to -inf. bits: (len(rows), words) int32; the first token has the lowest
    bit."""
    if sampling_kernels.can_argmax(logits):
        sampling_kernels.forbid(logits, rows, bits)
        return
    rows, bits = rows.to(logits.device), bits.to(logits.device)
    shifts = torch.arange(WORD, device=logits.device, dtype=torch.int32)
    allowed = ((bits[..., None] >> shifts) & 1).flatten(1)[:, : logits.shape[-1]].bool()
    logits[rows] = logits[rows].masked_fill(~allowed, -torch.inf)
