"""CacheRows: one part of a KVCache, whose rows are copied to files and back: the blocks of a layer group, or snapshots.

On a CPU numpy copies, because it starts no threads: those of torch wait for each other, and cost more than the copy.

A row's version changes when it gets other content. Another thread may therefore copy rows at any time, and looks
afterwards whether they are still what they were.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy
import torch

from engine.block_pool import BlockPool
from engine.kv_cache import STATE, KVCache, part_of
from engine.prefix_files import Kind, Rows
from engine.recurrent.state_cache import StateCache


@dataclass(frozen=True)
class Row:
    """A row with its content's key and version."""

    key: bytes
    index: int
    version: int


class Keeper(Protocol):
    """What knows which row has which content."""

    versions: list[int]

    def find(self, key: bytes) -> int | None: ...


class CacheRows(ABC):
    """The rows of one part. Those of all its tensors make up the bytes of a row."""

    def __init__(self, name: str, keeper: Keeper, tensors: Iterable[torch.Tensor]) -> None:
        self.name, self.keeper = name, keeper
        tensors = tuple(tensors)
        self.layout = _layout(tensors)
        self._tensors = [_as_bytes(tensor) for tensor in tensors]
        self.row_size = sum(tensor.shape[1] for tensor in self._tensors)

    def kind(self, fingerprint: str) -> Kind:
        return Kind(fingerprint, self.name, self.layout, self.row_size)

    def rows_of(self, keys: Iterable[bytes]) -> list[Row]:
        """Returns the rows of those contents that are in memory."""
        found = ((key, self.keeper.find(key)) for key in keys)
        return [Row(key, index, self.keeper.versions[index]) for key, index in found if index is not None]

    def is_current(self, row: Row) -> bool:
        return self.keeper.find(row.key) == row.index and self.keeper.versions[row.index] == row.version

    def copy(self, rows: Sequence[Row]) -> Rows:
        """Copies the bytes of rows, on any thread."""
        result = numpy.empty((len(rows), self.row_size), numpy.uint8)
        indices, start = [row.index for row in rows], 0
        for tensor in self._tensors:
            end = start + tensor.shape[1]
            if tensor.device.type == "cpu":
                result[:, start:end] = numpy.take(tensor.numpy(), indices, axis=0)
            else:
                result[:, start:end] = tensor[torch.tensor(indices, device=tensor.device)].cpu().numpy()
            start = end
        return result

    def split(self, rows: Rows) -> list[Rows]:
        """Returns the bytes of each tensor, as `put` takes them."""
        ends = numpy.cumsum([tensor.shape[1] for tensor in self._tensors])[:-1]
        return [numpy.ascontiguousarray(part) for part in numpy.split(rows, ends, axis=1)]

    @torch.inference_mode()
    def put(self, keys: Sequence[bytes], parts: Sequence[Rows]) -> None:
        """Stores rows under their keys, on the engine's thread, unless they are known by now or no row is free."""
        fresh = [number for number, key in enumerate(keys) if self.keeper.find(key) is None]
        taken = [(number, index) for number in fresh if (index := self._take()) is not None]
        if not taken:
            return
        numbers, indices = (list(column) for column in zip(*taken, strict=True))
        for tensor, part in zip(self._tensors, parts, strict=True):
            content = part if len(taken) == len(keys) else part[numbers]
            if tensor.device.type == "cpu":
                tensor.numpy()[indices] = content
            else:
                tensor[torch.tensor(indices, device=tensor.device)] = torch.from_numpy(content).to(tensor.device)
        for number, index in taken:
            self._add(keys[number], index)

    @abstractmethod
    def num_lacking(self, keys: Sequence[bytes], num_promised: int = 0) -> int:
        """Returns how many rows too few are free for these contents to be in memory together. num_promised: rows that
        are free and will be taken by others."""

    @abstractmethod
    def touch(self, keys: Sequence[bytes]) -> None:
        """Notes that these contents are used now."""

    @abstractmethod
    def _take(self) -> int | None:
        """Returns a free row; None if there is none."""

    @abstractmethod
    def _add(self, key: bytes, index: int) -> None:
        """Lets others find a row's content by its key."""


class BlockRows(CacheRows):
    """The blocks of a layer group."""

    def __init__(self, name: str, pool: BlockPool, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__(name, pool, tensors)
        self._pool = pool

    def num_lacking(self, keys: Sequence[bytes], num_promised: int = 0) -> int:
        found = [self._pool.find(key) for key in keys]
        in_use = sum(block is not None and not self._pool.is_idle(block) for block in found)
        return max(0, len(keys) - in_use - max(0, self._pool.num_free - num_promised))

    def touch(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if (block := self._pool.find(key)) is not None:
                self._pool.touch(block)

    def _take(self) -> int | None:
        return self._pool.allocate() if self._pool.num_free else None

    def _add(self, key: bytes, index: int) -> None:
        self._pool.cache(index, key)
        self._pool.remove_reference(index)


class SnapshotRows(CacheRows):
    """The snapshots of recurrent state."""

    def __init__(self, states: StateCache) -> None:
        super().__init__(STATE, states, (tensor for tensors in states.tensors.values() for tensor in tensors))
        self._states = states

    def num_lacking(self, keys: Sequence[bytes], num_promised: int = 0) -> int:
        return 0  # the one that was used least recently makes room

    def touch(self, keys: Sequence[bytes]) -> None:
        """Does nothing: a prompt that begins with a snapshot notes its use."""

    def _take(self) -> int | None:
        return self._states.take()

    def _add(self, key: bytes, index: int) -> None:
        self._states.add(key, index)


def rows_of(cache: KVCache) -> list[CacheRows]:
    """Returns the parts of a cache: first the blocks of each group, then the snapshots, if it has any."""
    parts: list[CacheRows] = [
        BlockRows(part_of(index), pool, (tensor for layer in group.layers for tensor in cache.tensors[layer]))
        for index, (group, pool) in enumerate(zip(cache.groups, cache.pools, strict=True))
    ]
    return parts if cache.states is None else [*parts, SnapshotRows(cache.states)]


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Views a tensor as (rows, bytes)."""
    assert tensor.is_contiguous()
    return tensor.view(len(tensor), -1).view(torch.uint8)


def _layout(tensors: Sequence[torch.Tensor]) -> str:
    """Describes the tensors of a row, such as `48*bfloat16[16, 2, 64]`."""
    shapes = (f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape[1:])}" for tensor in tensors)
    return " ".join(f"{len(list(same))}*{shape}" for shape, same in groupby(shapes))
