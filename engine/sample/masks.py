"""Masks: the tokens that each row of a step may choose.

They are computed by threads of their own: while a GPU computes the step's logits, or on a CPU, where the two would
only be in each other's way, right after.
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
    """Those of a step's rows."""

    def __init__(self, sequences: Rows[Sequence]) -> None:
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
