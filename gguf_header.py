"""A GGUF file's header: whether what it says of itself can be true, before a reader that believes it makes room.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It reads sizes and no weights.
"""

import mmap
from pathlib import Path
from typing import Literal

STRING, ARRAY = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of value -> bytes
MOST_ITEMS = 2**23  # in all arrays; a vocabulary has a quarter of a million tokens
MOST_DIMENSIONS = 4
MOST_NESTED = 4  # arrays


def check(path: Path) -> None:
    """Raises ValueError with a sentence; takes a second at most."""
    if path.stat().st_size < 24:
        raise ValueError("it ends within its header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _Header(content).check()


class _Header:
    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._at, self._num_items = content, 4, 0  # behind the magic bytes
        self._order: Literal["little", "big"] = "little" if int.from_bytes(content[4:6], "little") else "big"

    def check(self) -> None:
        version, num_tensors, num_values = self._number(4), self._number(8), self._number(8)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, and known are 2 and 3")
        for _ in range(num_values):
            name = self._text()
            value = self._value(self._number(4))
            if name.endswith(b".block_count") and (value or 0) > num_tensors:
                raise ValueError(f"it says that it has {value} layers, and has {num_tensors} tensors")
        for _ in range(num_tensors):
            self._tensor()

    def _tensor(self) -> None:
        self._text()
        num_dimensions = self._number(4)
        if num_dimensions > MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {num_dimensions} dimensions")
        self._skip(8 * num_dimensions + 12)  # with its type and where it is

    def _value(self, kind: int, depth: int = 0) -> int | None:
        """A number, as if it were an integer; None for all else."""
        if kind == STRING:
            self._text()
        elif kind == ARRAY:
            self._array(depth)
        elif kind in SIZES:
            return self._number(SIZES[kind])
        else:
            raise ValueError(f"a value is of type {kind}, which is not known")
        return None

    def _array(self, depth: int) -> None:
        kind, length = self._number(4), self._number(8)
        self._num_items += length
        if self._num_items > MOST_ITEMS or depth > MOST_NESTED:
            raise ValueError("its lists are too long, or too deep")
        if kind in SIZES:
            return self._skip(SIZES[kind] * length)
        for _ in range(length):
            self._value(kind, depth + 1)

    def _text(self) -> bytes:
        length = self._number(8)
        self._skip(length)
        return self._content[self._at - length : self._at]

    def _number(self, size: int) -> int:
        self._skip(size)
        return int.from_bytes(self._content[self._at - size : self._at], self._order)

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._content):
            raise ValueError("it ends within its header")
