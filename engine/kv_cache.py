"""KVCache: the layers' state, keys and values, in blocks. It hands out blocks and owns the tensors; others compute.

Blocks are paged as in PagedAttention (Kwon et al. 2023). Layers with the same sliding window form a group with its own
block tables, so that a sliding layer frees the blocks that its window has passed. A full block is found by a hash of
its tokens and all those before it, so that a prompt that begins like another one reuses what was computed for that.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

import torch

from engine.block_pool import BlockPool
from engine.layer_cache import LayerCache
from engine.layer_spec import AttentionSpec, LayerSpec
from engine.recurrent.state_cache import StateCache
from engine.sequence import Sequence

FREED = -1
STATE = "state"  # the part of the cache that snapshots are
_UNBOUNDED = 2**40  # tokens
IsStored = Callable[[str, bytes], bool]  # whether a row of a part, by its key, is stored outside memory


def part_of(group: int) -> str:
    """Names the part of the cache that a group's blocks are."""
    return f"kv{group}"


def in_no_file(part: str, key: bytes) -> bool:
    return False


@dataclass(frozen=True)
class LayerGroup:
    """Layers with the same window, and how many blocks each of them has."""

    window: int | None
    layers: tuple[int, ...]
    num_blocks: int


@dataclass(frozen=True)
class CachePlan:
    """The blocks of each group of layers, and the longest sequence that they hold."""

    groups: tuple[LayerGroup, ...]
    block_size: int
    max_tokens: int  # of one sequence

    @classmethod
    def fit(
        cls, specs: Mapping[int, LayerSpec], memory: int, block_size: int, max_num_seqs: int, step_tokens: int
    ) -> "CachePlan":
        """Divides `memory` bytes: every group gets the same number of blocks, but no more than its window can use."""
        windows = sorted({spec.window or _UNBOUNDED for spec in specs.values()})
        layers = {w: tuple(i for i, spec in sorted(specs.items()) if (spec.window or _UNBOUNDED) == w) for w in windows}
        cost = {w: sum(specs[i].bytes_per_token for i in layers[w]) * block_size for w in windows}  # bytes of a block
        groups = []
        for window in windows:  # ascending: what small windows cannot use goes to the larger ones
            equal = memory // sum(cost.values())
            # a window's tokens may begin and end inside a block
            usable = max_num_seqs * (-(-window // block_size) + 2) + -(-step_tokens // block_size)
            num_blocks = min(equal, usable)
            memory -= num_blocks * cost.pop(window)
            if equal < usable:  # no rest goes to larger windows, or a little more memory would give them less
                memory = num_blocks * sum(cost.values())
            groups.append(LayerGroup(None if window == _UNBOUNDED else window, layers[window], num_blocks))
        return cls(tuple(groups), block_size, cls._longest(groups, block_size, step_tokens))

    @staticmethod
    def _longest(groups: list[LayerGroup], block_size: int, step_tokens: int) -> int:
        """Returns the most tokens of one sequence. A sliding group that holds a window and a step allows any length."""
        limits = []
        for group in groups:
            needed = None if group.window is None else -(-(group.window + step_tokens) // block_size) + 2
            if needed is None or group.num_blocks < needed:
                limits.append(group.num_blocks * block_size)
        return min(limits, default=_UNBOUNDED)


class KVCache:
    """Hands out the blocks of every group of layers, and owns the tensors that they are rows of."""

    def __init__(
        self,
        plan: CachePlan,
        specs: Mapping[int, LayerSpec],
        states: StateCache | None = None,
        shared: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """states: those of the model's recurrent layers, if it has any. shared: layers that read what another one
        stores, each with that one."""
        self.plan = plan
        self.states = states
        self.specs = specs
        self.groups = plan.groups
        self.block_size = plan.block_size
        self.group_of = {layer: g for g, group in enumerate(plan.groups) for layer in group.layers}
        self.tensors: dict[int, tuple[torch.Tensor, ...]] = {}  # by layer; the first dimension is the block
        for layer, spec in specs.items():
            num_blocks = plan.groups[self.group_of[layer]].num_blocks + 1  # the last one is scratch for padding rows
            self.tensors[layer] = spec.make_tensors(num_blocks, plan.block_size)
        self.shared = shared
        for layer, owner in shared.items():
            self.group_of[layer], self.tensors[layer] = self.group_of[owner], self.tensors[owner]
        self._factors = {i: _factors(spec) for i, spec in specs.items() if isinstance(spec, AttentionSpec)}
        self._factors |= {layer: self._factors[owner] for layer, owner in shared.items() if owner in self._factors}
        self.pools = [BlockPool(group.num_blocks) for group in plan.groups]

    def layer(self, layer: int) -> LayerCache:
        """Returns the keys and values of a layer that attends."""
        keys, values, *scales = self.tensors[layer]
        key_scales, value_scales = scales or (None, None)
        return LayerCache(keys, values, key_scales, value_scales, *self._factors[layer])

    @property
    def num_used_blocks(self) -> int:
        return sum(pool.num_used for pool in self.pools)

    @property
    def num_bytes(self) -> int:
        """The memory of all blocks, and of the recurrent states."""
        own = sum(tensor.nbytes for layer in self.specs for tensor in self.tensors[layer])
        return own if self.states is None else own + self.states.num_bytes

    @property
    def num_blocks(self) -> int:
        return sum(pool.num_blocks for pool in self.pools)

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives the sequence blocks for its first `num_tokens` tokens, and a slot for its recurrent state. False, and
        nothing, where too few are free."""
        sequence.block_tables = sequence.block_tables or [[] for _ in self.groups]
        num_needed = -(-num_tokens // self.block_size)
        missing = [num_needed - len(table) for table in sequence.block_tables]
        if any(count > pool.num_free for count, pool in zip(missing, self.pools, strict=True)):
            return False
        if self.states is not None and not self.states.open(sequence):
            return False
        for table, pool, count in zip(sequence.block_tables, self.pools, missing, strict=True):
            table.extend(pool.allocate() for _ in range(count))
        return True

    def can_admit(self, sequence: Sequence, running: Iterable[Sequence], step_tokens: int) -> bool:
        """Returns whether the free blocks hold this prompt and what the running prompts still lack."""
        for index, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            reserved = sum(self._num_missing(index, group.window, other, step_tokens) for other in running)
            if reserved + self._num_missing(index, group.window, sequence, step_tokens) > pool.num_free:
                return False
        return True

    def _num_missing(self, index: int, window: int | None, sequence: Sequence, step_tokens: int) -> int:
        """Counts the blocks that a group must still get for all of the sequence's tokens and the next one."""
        held = [block for block in sequence.block_tables[index] if block != FREED] if sequence.block_tables else []
        tokens = sequence.num_tokens + 1
        if window is not None:
            tokens = min(tokens, window + step_tokens + 2 * self.block_size)
        return max(0, -(-tokens // self.block_size) - len(held))

    # --- progress

    def advance(self, sequence: Sequence, num_tokens: int, num_guesses: int = 0) -> None:
        """Notes that the sequence's first `num_tokens` tokens are computed; the last of them may be guesses."""
        sequence.num_computed = num_tokens
        if sequence.state is not None:
            sequence.state.num_tokens = num_tokens - num_guesses

    def rollback(self, sequence: Sequence, num_tokens: int) -> None:
        """Forgets all but the sequence's first `num_tokens` tokens; guesses only, if the model has recurrent layers.

        Keys and values of later tokens may stay in their blocks: no query sees them before they are written again. The
        states of recurrent layers hold no guess.
        """
        sequence.num_computed = min(sequence.num_computed, num_tokens)
        assert sequence.state is None or sequence.state.num_tokens <= sequence.num_computed, "a state cannot go back"

    # --- reuse

    @property
    def can_reuse(self) -> bool:
        """Whether a sequence can begin with what another one has computed."""
        return self.states is None or self.states.plan.num_snapshots > 0

    def keys_to_reuse(self, sequence: Sequence) -> list[bytes]:
        """Returns the keys of the blocks that a sequence can begin with."""
        return sequence.block_keys(self.block_size)[: (sequence.num_tokens - 1) // self.block_size]

    def reuse(self, sequence: Sequence) -> None:
        """Gives a sequence without blocks the cached blocks of its longest known prefix. At least one token is left
        to compute."""
        keys = self.keys_to_reuse(sequence)
        length = self.num_reusable(keys, sequence)
        if self.states is not None:  # where this prompt begins to differ from a known one, others may do so, too
            sequence.add_boundary(self._num_reusable(keys, sequence) * self.block_size)
        self.advance(sequence, length * self.block_size)
        sequence.num_cached_blocks = length
        sequence.block_tables = []
        for group, pool in zip(self.groups, self.pools, strict=True):
            first = self.first_visible(group, length)
            blocks = [pool.find(key) for key in keys[first:length]]
            for block in blocks:
                pool.add_reference(cast(int, block))
            sequence.block_tables.append([FREED] * first + cast(list[int], blocks))

    def num_reusable(self, keys: list[bytes], sequence: Sequence, is_stored: IsStored = in_no_file) -> int:
        """Returns the most leading blocks that a sequence can begin with, in memory or stored elsewhere."""
        if self.states is None:
            return self._num_reusable(keys, sequence, is_stored=is_stored)
        snapshots = self.states.snapshots
        return self._num_reusable(keys, sequence, lambda key: key in snapshots or is_stored(STATE, key), is_stored)

    def _num_reusable(
        self,
        keys: list[bytes],
        sequence: Sequence,
        is_end: Callable[[bytes], bool] | None = None,
        is_stored: IsStored = in_no_file,
    ) -> int:
        """Returns the largest number of leading blocks such that every group still has those that the next token sees.

        They never end inside an image, since its tokens see each other. is_end: tells by the key of a block whether it
        may be the last one; None: any.
        """
        runs = [
            _runs([pool.find(key) is not None or is_stored(part_of(index), key) for key in keys])
            for index, pool in enumerate(self.pools)
        ]
        for n in range(len(keys), 0, -1):
            if is_end is not None and not is_end(keys[n - 1]):
                continue
            needed = (n - self.first_visible(group, n) for group in self.groups)
            end = n * self.block_size
            splits_image = any(image.start < end for image in sequence.whole_images_in(end, end + 1))
            if not splits_image and all(run[n] >= count for run, count in zip(runs, needed, strict=True)):
                return n
        return 0

    def first_visible(self, group: LayerGroup, num_blocks: int) -> int:
        """Returns the index of the first block that the token after `num_blocks` blocks sees."""
        return 0 if group.window is None else max(0, num_blocks * self.block_size + 1 - group.window) // self.block_size

    def cache_blocks(self, sequence: Sequence, is_checked: bool) -> None:
        """Lets other sequences reuse this one's full blocks and new snapshots, unless they hold NaN.

        is_checked: logits that depend on all of them were finite, so the blocks need not be read.
        """
        if self.states is not None:
            self.states.publish(sequence, is_checked)
        num_full = sequence.num_computed // self.block_size
        if sequence.num_cached_blocks >= num_full:
            return
        keys = sequence.block_keys(self.block_size)
        for group, pool, table in zip(self.groups, self.pools, sequence.block_tables, strict=True):
            fresh = [i for i in range(sequence.num_cached_blocks, num_full) if table[i] != FREED]
            if is_checked or self._is_finite(group, [table[i] for i in fresh]):
                for index in fresh:
                    known = pool.cache(table[index], keys[index])
                    # a beginning without a snapshot was computed again: one copy of it is enough, used just now
                    if self.states is not None and known != table[index]:
                        pool.move_reference(table[index], known)
                        table[index] = known
        sequence.num_cached_blocks = num_full

    def _is_finite(self, group: LayerGroup, blocks: list[int]) -> bool:
        """Returns whether the blocks hold no NaN. Only the group's last layer is read, since a NaN stays in a token's
        state in all later layers. Of an int8 cache the scales show it. False also where there is too little memory to
        check."""
        tensors = (tensor for tensor in self.tensors[group.layers[-1]] if tensor.is_floating_point())
        try:
            return all(bool(torch.isfinite(tensor[blocks]).all()) for tensor in tensors)
        except (RuntimeError, MemoryError):  # torch raises a plain RuntimeError where memory lacks on a CPU
            return False

    # --- free

    def free_outside_window(self, sequence: Sequence) -> None:
        """Frees the blocks that no later token of the sequence can see."""
        for group, table, pool in zip(self.groups, sequence.block_tables, self.pools, strict=True):
            if group.window is None:
                continue
            first_visible = max(0, sequence.num_computed + 1 - group.window)
            for index in range(first_visible // self.block_size - 1, -1, -1):
                if table[index] == FREED:
                    break
                pool.remove_reference(table[index])
                table[index] = FREED

    def erase(self, sequence: Sequence) -> None:
        """Zeroes its recurrent state and the blocks that are not cached: a NaN in a freed block would reach its next
        owner, even masked."""
        if self.states is not None:
            self.states.erase(sequence)
        for layer, group in self.group_of.items():
            pool, table = self.pools[group], sequence.block_tables[group]
            blocks = [block for block in table if block != FREED and not pool.is_cached(block)]
            for tensor in self.tensors[layer]:
                tensor[blocks] = 0

    def free(self, sequence: Sequence) -> None:
        """Frees all its blocks, the last ones first, so that these are evicted before the prefix that others share."""
        for table, pool in zip(sequence.block_tables, self.pools, strict=False):
            for block in reversed(table):
                if block != FREED:
                    pool.remove_reference(block)
        sequence.block_tables = []
        sequence.num_cached_blocks = 0
        if self.states is not None:
            self.states.close(sequence)
        self.rollback(sequence, 0)


def _factors(spec: AttentionSpec) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Returns the factors of a layer's keys, and those of its queries, as LayerCache takes them."""
    factors = spec.make_factors()
    return factors, None if factors is None else factors[:, None, None].to(spec.dtype)


def first_visible(position: int, window: int | None) -> int:
    """Returns the position of the first token that the one at `position` sees."""
    return 0 if window is None else max(0, position + 1 - window)


def _runs(flags: list[bool]) -> list[int]:
    """Counts, for each index from 0 to len(flags), the flags set just before it without a gap."""
    runs = [0]
    for flag in flags:
        runs.append(runs[-1] + 1 if flag else 0)
    return runs
