"""BlockPool: the blocks of one layer group, who holds them, and what they contain.

A block whose content is known by a key can be held by several sequences at once, and is kept when nobody holds it any
more, until its room is needed: the one that was not used for the longest time goes first.
"""

import heapq


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        # lowest number first: memory that nobody has needed yet stays untouched
        self._unused = list(range(num_blocks))
        self._idle: dict[int, None] = {}  # held by nobody, content known; the least recently used first
        self._num_holders = [0] * num_blocks
        self._keys: dict[int, bytes] = {}  # block -> what it contains
        self._blocks: dict[bytes, int] = {}  # and the other way round

    @property
    def num_free(self) -> int:
        """Those that can be taken; some of them may have to be forgotten for it."""
        return len(self._unused) + len(self._idle)

    @property
    def num_held(self) -> int:
        return self.num_blocks - self.num_free

    def take(self) -> int:
        """A block for new content, held once."""
        if self._unused:
            block = heapq.heappop(self._unused)
        else:
            block = next(iter(self._idle))
            del self._idle[block], self._blocks[self._keys.pop(block)]
        self._num_holders[block] = 1
        return block

    def find(self, key: bytes) -> int | None:
        """The block with this content."""
        return self._blocks.get(key)

    def hold(self, block: int) -> None:
        """For one more holder."""
        self._idle.pop(block, None)
        self._num_holders[block] += 1

    def release(self, block: int) -> None:
        self._num_holders[block] -= 1
        if self._num_holders[block]:
            return
        if block in self._keys:
            self._idle[block] = None
        else:
            heapq.heappush(self._unused, block)

    def publish(self, block: int, key: bytes) -> None:
        """From now on others may find it. Where two have computed the same, the first one stays the one to find."""
        if key not in self._blocks:
            self._blocks[key] = block
            self._keys[block] = key

    def is_published(self, block: int) -> bool:
        return block in self._keys
