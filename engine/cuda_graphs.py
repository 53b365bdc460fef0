"""DecodeGraphs: steps of decodes, recorded once for a few sizes, so that a GPU does not wait for Python.

A recorded step reads its tokens and tables from the same memory every time: one matrix of integers, a row for each
sequence. Rows without a sequence write to the cache's scratch block.
"""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch

from engine.attention.flash import FlashBatch, Kernel
from engine.attention.paged import GroupAttention, StepAttention
from engine.batch import Span
from engine.kv_cache import KVCache, LayerGroup, first_visible

Compute = Callable[[torch.Tensor, torch.Tensor, StepAttention], torch.Tensor]  # ids, positions, step: logits
Positions = Callable[[Span], list[list[int]]]  # of a span's tokens, for each axis
GraphRecorder = Callable[[Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]


def record_graph(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Records what `run` does on the GPU; the result repeats it.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):  # torch's own stream is one of the device that recorded first
        output = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


class DecodeGraphs:
    """Recorded steps of decodes for 1, 2, 4, ... sequences."""

    def __init__(
        self,
        compute: Compute,
        positions: Positions,
        num_axes: int,
        cache: KVCache,
        kernel: Kernel,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        record_graph: GraphRecorder = record_graph,
    ) -> None:
        """num_axes: coordinates of a position. record_graph: records a step; tests without a GPU pass their own."""
        self._cache, self._kernel = cache, kernel
        self._positions, self._num_axes = positions, num_axes
        self._sizes = [1]
        while self._sizes[-1] < max_num_seqs:
            self._sizes.append(2 * self._sizes[-1])
        self._widths = [_width(group, cache.block_size, max_model_len) for group in cache.groups]
        # A row: token, position on each axis, and for each group: slot, length, table
        places = [*itertools.accumulate((2 + width for width in self._widths), initial=1 + num_axes)]
        self._columns = [0, *places[:-1]]
        self._rows = torch.zeros(self._sizes[-1], places[-1], dtype=torch.int32, device=device)
        self._fill([], self._sizes[-1])
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self._replays = {size: record_graph(partial(self._run, compute, size)) for size in reversed(self._sizes)}

    def run(self, spans: list[Span], token_ids: torch.Tensor | None = None) -> torch.Tensor | None:
        """Computes the logits of decodes, (rows, vocab), which are valid until the next step; None for more decodes
        than were recorded.

        token_ids: (rows,), on the GPU, if the CPU does not have them yet.
        """
        size = next((size for size in self._sizes if size >= len(spans)), None)
        if size is None:
            return None
        self._fill(spans, size)
        if token_ids is not None:
            self._rows[: len(spans), 0].copy_(token_ids)
        return self._replays[size]()[: len(spans)]

    def _fill(self, spans: list[Span], size: int) -> None:
        """Copies the decodes' rows to the GPU. Beyond its length a row's table keeps old numbers, which are unread."""
        staged = torch.zeros(size, self._rows.shape[1], dtype=torch.int32, pin_memory=self._rows.is_cuda)
        rows = staged.numpy()
        for number in range(size):
            parts = self._row(spans[number]) if number < len(spans) else self._idle_row()
            for column, part in zip(self._columns, parts, strict=True):
                rows[number, column : column + len(part)] = part
        self._rows[:size].copy_(staged, non_blocking=True)

    def _row(self, span: Span) -> list[list[int]]:
        position = [axis[0] for axis in self._positions(span)]
        parts, size = [[span.token_at(span.start), *position]], self._cache.block_size
        for index, group in enumerate(self._cache.groups):
            table = span.sequence.block_tables[index]
            first = first_visible(span.start, group.window) // size
            slot = table[span.start // size] * size + span.start % size
            parts.append([slot, span.end - first * size, *table[first : span.start // size + 1]])
        return parts

    def _idle_row(self) -> list[list[int]]:
        size = self._cache.block_size
        nowhere = [0] * (1 + self._num_axes)
        return [nowhere, *([group.num_blocks * size, 1, group.num_blocks] for group in self._cache.groups)]

    def _run(self, compute: Compute, size: int) -> torch.Tensor:
        rows, column = self._rows[:size], 1 + self._num_axes
        groups = []
        starts = torch.arange(size + 1, dtype=torch.int32, device=rows.device)
        for group, width in zip(self._cache.groups, self._widths, strict=True):
            slots, lengths = rows[:, column].long(), rows[:, column + 1].contiguous()
            tables = rows[:, column + 2 : column + 2 + width].contiguous()
            column += 2 + width
            longest = width * self._cache.block_size
            batch = FlashBatch(
                cu_seqlens_q=starts,
                block_tables=tables,
                seq_lens=lengths,
                max_query_len=1,
                max_seq_len=longest,
                num_tokens=size,
                window=group.window,
            )
            groups.append(GroupAttention(slots, decodes=(), prefills=(), flash=batch))
        step = StepAttention(self._cache, groups, self._kernel)
        positions = rows[:, 1 : 1 + self._num_axes].T.long()
        return compute(rows[None, :, 0].long(), positions if len(positions) == 1 else positions[:, None], step)


def _width(group: LayerGroup, block_size: int, max_model_len: int) -> int:
    """Returns the largest number of blocks that one query sees."""
    full = -(-max_model_len // block_size)
    return full if group.window is None else min(full, -(-group.window // block_size) + 1)
