"""A GGUF file's header: its keys and the names, shapes and types of its tensors, read within bounds.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It reads no weights.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

STRING, ARRAY, BOOLEAN = 8, 9, 7
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}  # struct's codes
SIZES = {kind: struct.calcsize(f"={code}") for kind, code in NUMBERS.items()}  # bytes
MAX_ITEMS = 2**23  # of all arrays; a vocabulary has a quarter of a million tokens
MAX_KEPT = 4096  # items of one array, unless it is asked for: there may be one for each layer
MAX_DIMENSIONS = 4
MAX_DEPTH = 4  # arrays in arrays


@dataclass(frozen=True)
class Array:
    """A list; of a long one, such as the vocabulary, only the length is kept."""

    length: int
    items: "tuple[Value, ...]"


Value = int | float | bool | str | Array


@dataclass(frozen=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]  # rows before columns, as in torch
    kind: int  # ggml's number of its type


@dataclass(frozen=True)
class Header:
    is_big_endian: bool
    values: dict[str, Value]
    tensors: dict[str, TensorInfo]


def read(path: Path, keep: frozenset[str] = frozenset()) -> Header:
    """Reads a header in a second at most; keep: keys whose lists are kept however long they are.

    Raises ValueError with a sentence."""
    if path.stat().st_size < 24:
        raise ValueError("it is incomplete: it ends within its header")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Reader(content, keep).read()


class _Reader:
    def __init__(self, content: mmap.mmap, keep: frozenset[str]) -> None:
        self._content, self._at, self._num_items = content, 4, 0  # behind the magic bytes
        self._keep, self._max_kept = keep, MAX_KEPT
        self._order: Literal["little", "big"] = "little" if int.from_bytes(content[4:6], "little") else "big"

    def read(self) -> Header:
        version, num_tensors, num_values = self._size(4), self._size(8), self._size(8)
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; versions 2 and 3 are supported")
        values: dict[str, Value] = {}
        for _ in range(num_values):
            name = self._text()
            self._max_kept = MAX_ITEMS if name in self._keep else MAX_KEPT
            values[name] = value = self._value(self._size(4))
            if name.endswith(".block_count") and isinstance(value, int) and value > num_tensors:
                raise ValueError(f"it names {value} layers but holds only {num_tensors} tensors")
        tensors = [self._tensor() for _ in range(num_tensors)]
        return Header(self._order == "big", values, {tensor.name: tensor for tensor in tensors})

    def _tensor(self) -> TensorInfo:
        name, num_dimensions = self._text(), self._size(4)
        if num_dimensions > MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {num_dimensions} dimensions, and at most {MAX_DIMENSIONS} are supported")
        shape = [self._size(8) for _ in range(num_dimensions)]
        kind = self._size(4)
        self._skip(8)  # the offset of its data
        return TensorInfo(name, tuple(reversed(shape)), kind)

    def _value(self, kind: int, depth: int = 0) -> Value:
        if kind == STRING:
            return self._text()
        if kind == ARRAY:
            return self._array(depth)
        if kind not in NUMBERS:
            raise ValueError(f"a value has the unknown type {kind}")
        number = self._numbers(kind, 1)[0]
        return bool(number) if kind == BOOLEAN else number

    def _array(self, depth: int) -> Array:
        kind, length = self._size(4), self._size(8)
        self._num_items += length
        if self._num_items > MAX_ITEMS or depth > MAX_DEPTH:
            raise ValueError(f"its lists have more than {MAX_ITEMS} items, or are nested deeper than {MAX_DEPTH}")
        if kind in NUMBERS and length > self._max_kept:
            self._skip(SIZES[kind] * length)
            return Array(length, ())
        if kind in NUMBERS:
            return Array(length, self._numbers(kind, length))
        items = tuple(self._value(kind, depth + 1) for _ in range(min(length, self._max_kept)))
        for _ in range(length - len(items)):
            self._value(kind, depth + 1)
        return Array(length, items if length <= self._max_kept else ())

    def _numbers(self, kind: int, length: int) -> tuple[int | float, ...]:
        start = self._at
        self._skip(SIZES[kind] * length)
        order = "<" if self._order == "little" else ">"
        return struct.unpack_from(f"{order}{length}{NUMBERS[kind]}", self._content, start)

    def _text(self) -> str:
        length = self._size(8)
        self._skip(length)
        return self._content[self._at - length : self._at].decode("utf-8", errors="replace")

    def _size(self, num_bytes: int) -> int:
        self._skip(num_bytes)
        return int.from_bytes(self._content[self._at - num_bytes : self._at], self._order)

    def _skip(self, size: int) -> None:
        self._at += size
        if self._at > len(self._content):
            raise ValueError("it is incomplete: it ends within its header")
