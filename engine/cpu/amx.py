"""AMXBuilder: programs for processors with Advanced Matrix Extensions (AMX), whose registers hold 16 rows of 64 bytes.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, "Programming with Intel
Advanced Matrix Extensions".
"""

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Literal

from llvmlite import ir

from engine.cpu import jit
from engine.cpu.jit import I8, I16, I64, Builder

ROWS = 16  # of a tile
ROW_BYTES = 64  # at most
Dot = Literal["tdpbssd", "tdpbf16ps"]  # signed bytes to int32, four at a time; bfloat16 to float32, two at a time

_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18  # of Linux on x86-64


class AMXBuilder(Builder):
    """A function that computes with tiles. Between `configure` and `release`, which each thread calls once, the tiles
    are registers of the shapes given; a tile is named by its number."""

    def configure(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Sets the shape of each tile, from tile 0 on: rows, and bytes of a row."""
        memory = self.alloca(ir.ArrayType(I8, 64))
        memory.align = 64
        start = self.ptrtoint(memory, I64)
        self.write(jit.constant(jit.BYTES, 0), start)
        self.write(I8(1), start)  # the palette
        for tile, (rows, row_bytes) in enumerate(shapes):
            self.write(I16(row_bytes), self.add(start, I64(16 + 2 * tile)))
            self.write(I8(rows), self.add(start, I64(48 + tile)))
        self._call("ldtilecfg", self.bitcast(memory, I8.as_pointer()))

    def release(self) -> None:
        self._call("tilerelease")

    def zero(self, tile: int) -> None:
        self._call("tilezero", I8(tile))

    def load_tile(self, tile: int, address: jit.Value, stride: jit.Value) -> None:
        """Reads the rows of a tile, `stride` bytes apart."""
        self._call("tileloadd64", I8(tile), self.inttoptr(address, I8.as_pointer()), stride)

    def store_tile(self, tile: int, address: jit.Value, stride: jit.Value) -> None:
        self._call("tilestored64", I8(tile), self.inttoptr(address, I8.as_pointer()), stride)

    def dot_tiles(self, kind: Dot, sums: int, a: int, b: int) -> None:
        """Adds to each lane (row, column) of 32 bits of `sums` the products of the row `row` of `a` and the column
        `column` of `b`, whose row i holds what belongs to lane i of a row of `a`."""
        self._call(kind, I8(sums), I8(a), I8(b))

    def _call(self, name: str, *arguments: jit.Value) -> None:
        self.intrinsic(f"llvm.x86.{name}", ir.VoidType(), *arguments)


@functools.cache
def is_available() -> bool:
    """Asks Linux for the tiles, once for the process. Returns False where it has none or refuses them."""
    if not sys.platform.startswith("linux") or not {"+amx-tile", "+amx-int8", "+amx-bf16"} <= set(jit.features()):
        return False
    system_call = ctypes.CDLL(None, use_errno=True).syscall
    return bool(system_call(_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA) == 0)
