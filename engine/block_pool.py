"""BlockPool: the blocks of one layer group, how many sequences use each, and the keys of what they contain.

A cached block can be used by several sequences at once. It is kept when none uses it any more, until a block for new
content is needed: then the least recently used one is evicted.
"""

import heapq


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # a heap, the lowest number first, so that memory which was never needed stays untouched
        self._unused = list(range(num_blocks))
        self._idle: dict[int, None] = {}  # cached, but in use by no sequence; the least recently used first
        self._num_references = [0] * num_blocks
        self._keys: dict[int, bytes] = {}  # block -> the key of its content
        self._blocks: dict[bytes, int] = {}  # key -> block
        self.versions = [0] * num_blocks  # of what each block holds; a cached block keeps its own until it is evicted

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give, those included whose content it would evict."""
        return len(self._unused) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def allocate(self) -> int:
        """Returns a block for new content, with one reference."""
        if self._unused:
            block = heapq.heappop(self._unused)
        else:
            block = next(iter(self._idle))
            del self._idle[block], self._blocks[self._keys.pop(block)]
        self._num_references[block] = 1
        self.versions[block] += 1
        return block

    def find(self, key: bytes) -> int | None:
        """Returns the block with this content, None where there is none."""
        return self._blocks.get(key)

    def add_reference(self, block: int) -> None:
        """Adds a reference: one more sequence uses the block."""
        self._idle.pop(block, None)
        self._num_references[block] += 1

    def remove_reference(self, block: int) -> None:
        """Removes a reference; after the last one, the block is free."""
        self._num_references[block] -= 1
        if self._num_references[block]:
            return
        if block in self._keys:
            self._idle[block] = None
        else:
            heapq.heappush(self._unused, block)

    def cache(self, block: int, key: bytes) -> int:
        """Registers the block under its content's key; if that is known already, the first block is kept. Returns the
        one that is kept."""
        known = self._blocks.setdefault(key, block)
        if known == block:
            self._keys[block] = key
        return known

    def move_reference(self, block: int, other: int) -> None:
        """Has a sequence use `other`, which has the same content, in the place of `block`."""
        self.add_reference(other)
        self.remove_reference(block)

    def is_cached(self, block: int) -> bool:
        return block in self._keys

    def is_idle(self, block: int) -> bool:
        """Whether the block is cached and in use by no sequence, so that it may be evicted."""
        return block in self._idle

    def touch(self, block: int) -> None:
        """Notes that an idle block is used now, so that it is evicted last."""
        if block in self._idle:
            self._idle[block] = self._idle.pop(block)
