"""Files of the prefix cache on disk: rows of the cache's memory, each under the key of the tokens that it holds.

A row is one block of a layer group, or one snapshot of recurrent state. A file has the rows of one part of the cache:

    8 bytes   MAGIC, with the version of this format
    4 + 4     length of the header, and its CRC-32
    header    JSON: fingerprint, part, layout, keys, and a CRC-32 for each row and its key
    payload   the rows, one after the other: of each row the bytes of all tensors

Whatever is wrong with a file is found here, and reading it raises BadFile. A file appears whole or not at all. It is
not forced to the disk: after a loss of power its sums tell what is missing, and then it is computed again.
"""

import json
import os
import re
import stat
import struct
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy
from numpy.typing import NDArray

MAGIC = b"KVROWS1\n"
KEY_SIZE = 16  # bytes
SUFFIX, TEMPORARY = ".kv", ".part"
MAX_HEADER = 2**20  # bytes
_HEAD = struct.Struct("<8sII")
_NAME = re.compile(r"[a-z0-9]+-[0-9a-f]{32}-[0-9]+\.kv")
Rows = NDArray[numpy.uint8]  # (rows, bytes)


class BadFile(ValueError):
    """The file has not what its name promises: it is truncated, corrupted or of another origin."""


@dataclass(frozen=True)
class Kind:
    """What all files of one part of a cache have in common; a file of another kind is never read."""

    fingerprint: str  # of the model and all else that decides what a row holds
    part: str
    layout: str  # data types and shapes of the tensors
    row_size: int  # bytes


@dataclass(frozen=True)
class Header:
    keys: tuple[bytes, ...]
    sums: tuple[int, ...]
    offset: int  # of the first row


def file_name(part: str, keys: Sequence[bytes]) -> str:
    return f"{part}-{keys[-1].hex()}-{len(keys)}{SUFFIX}"


def is_file_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def header_size(kind: Kind, num_rows: int) -> int:
    """Returns at least the bytes that a file has beside its rows."""
    return 512 + len(kind.layout) + 64 * num_rows


def write_rows(folder: Path, kind: Kind, keys: Sequence[bytes], rows: Rows) -> Path:
    """Writes a file, which only this user can read, and returns its path. Raises OSError, and then leaves nothing."""
    sums = [_sum(key, row) for key, row in zip(keys, rows, strict=True)]
    facts = {"fingerprint": kind.fingerprint, "part": kind.part, "layout": kind.layout, "row_size": kind.row_size}
    header = json.dumps({**facts, "keys": [key.hex() for key in keys], "sums": sums}).encode()
    path = folder / file_name(kind.part, keys)
    number, temporary = tempfile.mkstemp(TEMPORARY, dir=folder)
    try:
        with open(number, "wb", buffering=0) as file:
            _write_all(file, _HEAD.pack(MAGIC, len(header), zlib.crc32(header)) + header)
            _write_all(file, rows.data.cast("B") if rows.size else b"")
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return path


def _write_all(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def read_header(path: Path, kind: Kind) -> Header:
    """Reads what a file says of its rows. Raises BadFile, or OSError."""
    with _opened(path) as file:
        return _header(file, path, kind)


def read_rows(path: Path, kind: Kind, keys: Sequence[bytes]) -> Rows:
    """Reads the rows with these keys, which the file has. Raises BadFile, or OSError."""
    with _opened(path) as file:
        header = _header(file, path, kind)
        places = {key: index for index, key in enumerate(header.keys)}
        if not all(key in places for key in keys):
            raise BadFile("it lacks a row")
        rows = numpy.empty((len(keys), kind.row_size), numpy.uint8)
        for first, place, count in _ranges([places[key] for key in keys]):
            _read_into(file, header.offset + place * kind.row_size, rows[first : first + count])
        for key, row in zip(keys, rows, strict=True):
            if _sum(key, row) != header.sums[places[key]]:
                raise BadFile("the sum of a row is wrong")
        return rows


def _opened(path: Path) -> Any:
    """Opens a regular file; a link, a pipe or a device is none of ours."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = open(os.open(path, flags), "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BadFile("it is no regular file")
    return file


def _header(file: Any, path: Path, kind: Kind) -> Header:
    head = file.read(_HEAD.size)
    magic, length, checksum = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0, 0)
    if magic != MAGIC or length > MAX_HEADER:
        raise BadFile("it does not begin as such a file does")
    text = file.read(length)
    if len(text) != length or zlib.crc32(text) != checksum:
        raise BadFile("the sum of its header is wrong")
    header = _parsed(text, kind, offset=_HEAD.size + length)
    if path.name != file_name(kind.part, header.keys):
        raise BadFile("its name is that of another one")
    if os.fstat(file.fileno()).st_size != header.offset + len(header.keys) * kind.row_size:
        raise BadFile("its size is wrong")
    return header


def _parsed(text: bytes, kind: Kind, offset: int) -> Header:
    try:
        fields = json.loads(text)
        found = Kind(*(fields[name] for name in ("fingerprint", "part", "layout", "row_size")))
        keys = tuple(bytes.fromhex(key) for key in fields["keys"])
        sums = tuple(int(value) for value in fields["sums"])
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise BadFile("its header cannot be read") from error
    if found != kind:
        raise BadFile("it is of another model or layout")
    if not keys or len(keys) != len(sums) or any(len(key) != KEY_SIZE for key in keys):
        raise BadFile("its keys cannot be read")
    return Header(keys, sums, offset)


def _ranges(places: Sequence[int]) -> list[tuple[int, int, int]]:
    """Joins neighbours: (index of the first, its place, how many) for each range that is read at once."""
    ranges: list[tuple[int, int, int]] = []
    for index, place in enumerate(places):
        if ranges and place == ranges[-1][1] + ranges[-1][2]:
            first, begin, count = ranges[-1]
            ranges[-1] = (first, begin, count + 1)
        else:
            ranges.append((index, place, 1))
    return ranges


def _read_into(file: Any, offset: int, rows: Rows) -> None:
    file.seek(offset)
    view = rows.data.cast("B") if rows.size else memoryview(b"")
    while len(view):
        if not (count := file.readinto(view)):
            raise BadFile("it ends too early")
        view = view[count:]


def _sum(key: bytes, row: Rows) -> int:
    return zlib.crc32(cast(Any, row), zlib.crc32(key))
