"""StateCache: the slots of recurrent state, one for each running sequence, and the snapshots that prompts begin from.

A recurrent layer's state holds all tokens of a sequence in a fixed size, so it can neither be cut at an earlier token
nor shared. Therefore:

1. Every running sequence has a slot: a row of the state tensors of all layers, which each step updates in place.
2. Tokens that may be taken back, the guesses of speculative decoding, do not enter the state. What the layers read of
   them is kept for one step; the next step begins with those that were right.
3. Where another prompt may go on differently, a copy of the state is saved under the key of the KV block that ends
   there: a snapshot. A prompt that begins alike gets a copy of it in its own slot. Snapshots are rows of the same
   tensors; the least recently used one makes room for a new one.
"""

import heapq
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, zip_longest

import torch

from engine.batch import Span
from engine.layer_spec import LayerSpecs, RecurrentSpec
from engine.sequence import RecurrentState, Sequence

LEAST_SPACE, MOST_SPACED = 512, 8  # tokens between snapshots in a long prompt, and how many of them there may be
SLOTS_SHARE = 0.5  # of the cache's memory that the states of running sequences may take
SNAPSHOTS_SHARE = 0.5  # of what these leave, that snapshots may take
SCARCE_SHARE = 0.25  # of it, where it is too little for the longest sequence
SNAPSHOTS_EACH, FEWEST_SNAPSHOTS = 4, 32  # of use for each sequence that runs at once, and in all


def slot_bytes(specs: LayerSpecs, max_guesses: int) -> int:
    """Returns the memory of a running sequence's state, and of what is kept of its guesses."""
    return specs.bytes_per_sequence + max_guesses * specs.bytes_per_guess


def most_snapshots(num_slots: int) -> int:
    """Returns how many snapshots memory is taken for."""
    return max(FEWEST_SNAPSHOTS, SNAPSHOTS_EACH * num_slots)


@dataclass(frozen=True)
class StatePlan:
    """The rows of the state tensors, and the guesses that a sequence may have in a step."""

    num_slots: int
    num_snapshots: int
    max_guesses: int

    @classmethod
    def fit(
        cls,
        specs: LayerSpecs,
        memory: int,
        *,
        max_num_seqs: int,
        max_guesses: int,
        context_memory: int,
        may_shorten: bool = True,
        snapshot_memory: int | None = None,
    ) -> "StatePlan":
        """Divides `memory` bytes: first a slot for each sequence, as far as SLOTS_SHARE reaches, then snapshots, then
        keys and values.

        context_memory: bytes of the keys and values of the longest sequence, which go before snapshots. may_shorten:
        whether the context may be shortened for a few of them. snapshot_memory: their bytes; None: chosen here.
        """
        per_slot = slot_bytes(specs, max_guesses)
        num_slots = min(max_num_seqs, max(1, int(SLOTS_SHARE * memory) // per_slot))
        rest = max(0, memory - num_slots * per_slot)
        if snapshot_memory is None:
            spare = max(rest - context_memory, int(SCARCE_SHARE * rest) if may_shorten else 0)
            room = min(int(SNAPSHOTS_SHARE * rest), spare, most_snapshots(num_slots) * specs.bytes_per_sequence)
        else:
            room = min(rest, snapshot_memory)
        return cls(num_slots, room // specs.bytes_per_sequence, max_guesses)

    def num_bytes(self, specs: LayerSpecs) -> int:
        return sum(map(self.layer_bytes, specs.recurrent.values()))

    def layer_bytes(self, spec: RecurrentSpec) -> int:
        """Returns the memory of one layer's states, and of what is kept of guesses."""
        inputs = self.num_slots * self.max_guesses * spec.bytes_per_input
        return (self.num_slots + self.num_snapshots) * spec.bytes_per_sequence + inputs


@dataclass(frozen=True)
class StateRun:
    """Consecutive tokens of one sequence, computed from one state."""

    slot: int
    rows: tuple[int, ...]  # of the step's tokens; beyond these, of the guesses kept from the step before
    writes: bool  # whether the state after the last token becomes the slot's; not for guesses


@dataclass(frozen=True)
class Phase:
    """Runs of different slots, which can be computed together, and the snapshots to take after them."""

    runs: tuple[StateRun, ...]
    saves: tuple[tuple[int, int], ...] = ()  # (slot, row that gets its state)

    @cached_property
    def table(self) -> torch.Tensor:
        """The runs for kernels, (runs, 4) int64: slot, the first of its tokens in `rows`, their number, writes."""
        ends = accumulate(len(run.rows) for run in self.runs)
        pairs = zip(self.runs, ends, strict=True)
        return torch.tensor([(run.slot, end - len(run.rows), len(run.rows), run.writes) for run, end in pairs])

    @cached_property
    def rows(self) -> torch.Tensor:
        """The rows of all runs, int64."""
        return torch.tensor([row for run in self.runs for row in run.rows])

    def save(self, tensors: Iterable[torch.Tensor]) -> None:
        """Takes the snapshots of one layer. tensors: its states."""
        for tensor in tensors:
            for slot, row in self.saves:
                tensor[row] = tensor[slot]


@dataclass(frozen=True)
class StateStep:
    """What one step does with the states."""

    phases: tuple[Phase, ...]
    recalled: tuple[int, ...]  # rows of StateCache.inputs, whose tokens follow the step's own
    kept: tuple[tuple[int, int], ...]  # (the step's row of a guess, row of StateCache.inputs)


class StateCache:
    """Owns the state tensors of all recurrent layers, and says which of their rows a step reads and writes."""

    def __init__(self, plan: StatePlan, specs: Mapping[int, RecurrentSpec], block_size: int) -> None:
        self.plan, self.specs, self._block_size = plan, specs, block_size
        num_rows = plan.num_slots + plan.num_snapshots
        self.tensors = {layer: spec.make_tensors(num_rows) for layer, spec in specs.items()}
        # what the layers read of guesses: (num_slots * max_guesses, spec.input_width)
        self.inputs = {layer: spec.make_inputs(plan.num_slots * plan.max_guesses) for layer, spec in specs.items()}
        self.num_bytes = sum(t.nbytes for layer in self.tensors.values() for t in layer)
        self._free_slots = list(range(plan.num_slots))  # a heap: the lowest rows are in memory already
        self._free_rows = list(range(plan.num_slots, num_rows))  # for snapshots, likewise
        self._snapshots: dict[bytes, int] = {}  # key of the last block -> row; the least recently used first
        self.versions = [0] * num_rows  # of what each snapshot's row holds

    @property
    def num_used_slots(self) -> int:
        return self.plan.num_slots - len(self._free_slots)

    @property
    def num_snapshots(self) -> int:
        return len(self._snapshots)

    # --- slots

    def open(self, sequence: Sequence) -> bool:
        """Gives the sequence a slot with the state after its computed tokens. False where no slot is free."""
        if sequence.state is not None:
            return True
        if not self._free_slots:
            return False
        slot = heapq.heappop(self._free_slots)
        sequence.state = RecurrentState(slot, sequence.num_computed)
        if sequence.num_computed:
            key = self._key(sequence, sequence.num_computed)
            self._copy(self._snapshots[key], slot)
            self._snapshots[key] = self._snapshots.pop(key)  # used last
        else:
            self._zero(slot)
        return True

    def close(self, sequence: Sequence) -> None:
        """Takes the sequence's slot back."""
        if sequence.state is not None:
            self._cancel(sequence.state)
            heapq.heappush(self._free_slots, sequence.state.slot)
            sequence.state = None

    def erase(self, sequence: Sequence) -> None:
        """Zeroes the sequence's state, and takes no snapshot of it: a NaN would stay in it for ever."""
        if sequence.state is not None:
            self._cancel(sequence.state)
            self._zero(sequence.state.slot)

    def _copy(self, source: int, target: int) -> None:
        for tensors in self.tensors.values():
            for tensor in tensors:
                tensor[target] = tensor[source]

    def _zero(self, slot: int) -> None:
        for tensors in self.tensors.values():
            for tensor in tensors:
                tensor[slot] = 0

    # --- steps

    # NOTE: an example with blocks of 16 tokens. A prompt of 40 tokens comes, then three steps of its answer:
    #
    #   step  computes                     runs, with the number of tokens that the state holds after each
    #   1     the prompt                   0-31 writes, saved as a snapshot (32); 32-39 writes (40)
    #   2     token 40, guesses 41-43      40 writes (41); 41-43 read only, and what the layers read of them is kept
    #   3     42 is the first wrong guess: 41 from what was kept, then 42 and its guesses likewise (43)
    #   4     47 and no guess; 44-46 were right: 44-47 writes, saved as the answer's snapshot (48)

    def plan_step(self, spans: Iterable[Span], row_of: Mapping[tuple[int, int], int]) -> StateStep:
        """Says what a step of these spans does, each of another sequence. row_of: (number of a sequence, position) ->
        row of the step's tokens."""
        chains: list[list[Phase]] = []
        recalled: list[int] = []
        kept: list[tuple[int, int]] = []
        for span in spans:
            state = span.sequence.state
            assert state is not None, "every running sequence has a slot"
            assert span.start >= state.num_tokens, "the state cannot go back"
            first_kept = state.slot * self.plan.max_guesses
            before = range(first_kept, first_kept + span.start - state.num_tokens)
            rows = [len(row_of) + len(recalled) + index for index in range(len(before))]
            rows += [row_of[span.sequence.number, position] for position in range(span.start, span.end)]
            recalled += before
            guesses = rows[len(rows) - len(span.draft) :]
            kept += [(row, first_kept + index) for index, row in enumerate(guesses)]
            chains.append(self._phases(span.sequence, rows[: len(rows) - len(guesses)]))
            if guesses:
                chains[-1].append(Phase((StateRun(state.slot, tuple(guesses), writes=False),)))
        return StateStep(tuple(map(_merged, zip_longest(*chains))), tuple(recalled), tuple(kept))

    def _phases(self, sequence: Sequence, rows: list[int]) -> list[Phase]:
        """Cuts the tokens that enter the state where a snapshot is to be taken."""
        state = sequence.state
        assert state is not None
        first = start = state.num_tokens
        end = start + len(rows)
        phases = []
        saved = self._positions_to_save(sequence, start, end)
        for position in sorted({*saved, end}):
            run = StateRun(state.slot, tuple(rows[start - first : position - first]), writes=True)
            row = self._reserve(sequence, position) if position in saved else None
            phases.append(Phase((run,), () if row is None else ((state.slot, row),)))
            start = position
        return phases

    def _positions_to_save(self, sequence: Sequence, start: int, end: int) -> set[int]:
        """Returns the ends of blocks, after `start` and up to `end`, where other prompts may begin to differ: the
        sequence's boundaries, its prompt's last whole block, and its answer's; in a long prompt also a few places
        between."""
        size, num_prompt = self._block_size, len(sequence.prompt_ids)
        places = {*sequence.boundaries, num_prompt - 1}
        if num_spaced := min(MOST_SPACED, self.plan.num_snapshots // MOST_SPACED):
            places |= {*range(0, num_prompt, max(LEAST_SPACE, -(-num_prompt // num_spaced)))}
        if end > num_prompt:
            places.add(end)
        ends = {place // size * size for place in places}
        return {position for position in ends if start < position <= end}

    # --- snapshots

    @property
    def snapshots(self) -> Collection[bytes]:
        """The keys of the blocks at whose ends there are snapshots."""
        return self._snapshots.keys()

    def _key(self, sequence: Sequence, num_tokens: int) -> bytes:
        return sequence.block_keys(self._block_size)[num_tokens // self._block_size - 1]

    def _reserve(self, sequence: Sequence, num_tokens: int) -> int | None:
        """Returns a row for the state after that many tokens; None where there is to be no snapshot."""
        state = sequence.state
        assert state is not None
        if self._key(sequence, num_tokens) in self._snapshots:
            return None
        if (row := self.take()) is not None:
            state.reserved[num_tokens] = row
        return row

    def publish(self, sequence: Sequence, is_checked: bool) -> None:
        """Lets other sequences begin from the snapshots that the last step took, unless they hold NaN.

        is_checked: logits that depend on the state were finite, so it need not be read."""
        state = sequence.state
        if state is None:
            return
        for num_tokens, row in list(state.reserved.items()):
            if not is_checked and not self._is_finite(row):
                continue
            del state.reserved[num_tokens]
            key = self._key(sequence, num_tokens)
            self.add(key, row)
            if num_tokens > len(sequence.prompt_ids):  # only the latest one of an answer is of use
                self._forget(state.answer_key)
                state.answer_key = key
        self._cancel(state)

    def _is_finite(self, row: int) -> bool:
        """Looks at the last layer only, since a NaN stays in a token's values in all later layers."""
        return all(bool(torch.isfinite(tensor[row]).all()) for tensor in self.tensors[max(self.tensors)])

    def _forget(self, key: bytes | None) -> None:
        row = None if key is None else self._snapshots.pop(key, None)
        if row is not None:
            self.versions[row] += 1
            heapq.heappush(self._free_rows, row)

    def find(self, key: bytes) -> int | None:
        """Returns the row of a snapshot, None where there is none."""
        return self._snapshots.get(key)

    def take(self) -> int | None:
        """Returns a row for another snapshot, in the place of the least recently used one where none is free. None
        where there can be no snapshots."""
        if not self._free_rows and self._snapshots:
            self._forget(next(iter(self._snapshots)))
        return heapq.heappop(self._free_rows) if self._free_rows else None

    def add(self, key: bytes, row: int) -> None:
        """Lets sequences begin from the snapshot in this row, which was taken."""
        self._forget(key)
        self._snapshots[key] = row

    def ends_of(self, sequence: Sequence) -> list[bytes]:
        """Returns the keys of the sequence's snapshots where others are likely to go on: at its boundaries, at the end
        of its prompt and of its answer."""
        size, num_prompt = self._block_size, len(sequence.prompt_ids)
        places = {place // size for place in (*sequence.boundaries, num_prompt - 1)}
        places |= {*range(num_prompt // size + 1, sequence.num_computed // size + 1)}
        keys = sequence.block_keys(size)
        return [keys[n - 1] for n in sorted(places) if 0 < n <= len(keys) and keys[n - 1] in self._snapshots]

    def _cancel(self, state: RecurrentState) -> None:
        for row in state.reserved.values():
            heapq.heappush(self._free_rows, row)
        state.reserved.clear()


def _merged(phases: tuple[Phase | None, ...]) -> Phase:
    present = [phase for phase in phases if phase is not None]
    runs = tuple(run for phase in present for run in phase.runs)
    return Phase(runs, tuple(save for phase in present for save in phase.saves))
