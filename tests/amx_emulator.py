"""AMXEmulator: AMX's instructions in plain vectors, so that programs for it are tested on every processor. BUILDERS has
the processor's own too, where it has them."""

from collections.abc import Sequence

from engine.cpu import amx, jit
from engine.cpu.amx import AMXBuilder
from engine.cpu.jit import FLOATS, I8, I32, I64, INTS, vector

SAPPHIRE_RAPIDS = "sapphirerapids"  # LLVM's name of the first processor with AMX
FEATURES = ",".join(f"+{name}" for name in ("avx512f", "avx512bw", "avx512vnni", "amx-tile", "amx-int8", "amx-bf16"))


class AMXEmulator(AMXBuilder):
    """Keeps each tile in the thread's stack, in 16 rows of 64 bytes."""

    def configure(self, shapes: Sequence[tuple[int, int]]) -> None:
        self.shapes = shapes
        self.memory = [self.scratch(amx.ROWS) for _ in shapes]

    def release(self) -> None:
        pass

    def row(self, tile: int, row: jit.Value) -> jit.Value:
        return self.address(self.memory[tile], row, amx.ROW_BYTES)

    def zero(self, tile: int) -> None:
        with self.loop(I64(0), I64(amx.ROWS)) as row:
            self.write(jit.constant(INTS, 0), self.row(tile, row))

    def load_tile(self, tile: int, address: jit.Value, stride: jit.Value) -> None:
        rows, num_bytes = self.shapes[tile]
        with self.loop(I64(0), I64(rows)) as row:
            self.write(self.read(vector(I8, num_bytes), self.add(address, self.mul(row, stride))), self.row(tile, row))

    def store_tile(self, tile: int, address: jit.Value, stride: jit.Value) -> None:
        rows, num_bytes = self.shapes[tile]
        with self.loop(I64(0), I64(rows)) as row:
            value = self.read(vector(I8, num_bytes), self.row(tile, row))
            self.write(value, self.add(address, self.mul(row, stride)))

    def dot_tiles(self, kind: amx.Dot, sums: int, a: int, b: int) -> None:
        (rows, a_bytes), (lanes, _) = self.shapes[a], self.shapes[b]
        assert a_bytes == 4 * lanes and self.shapes[sums] == (rows, amx.ROW_BYTES)
        add = self.add_bytes if kind == "tdpbssd" else self.add_bfloat16
        with self.loop(I64(0), I64(rows)) as row, self.loop(I64(0), I64(lanes)) as lane:
            one = self.splat(self.read(I32, self.address(self.row(a, row), lane, 4)))
            add(self.row(sums, row), one, self.read(INTS, self.row(b, lane)))

    def add_bytes(self, place: jit.Value, a: jit.Value, b: jit.Value) -> None:
        total = self.read(INTS, place)
        for shift in (24, 16, 8, 0):
            parts = (self.ashr(self.shl(x, jit.constant(INTS, shift)), jit.constant(INTS, 24)) for x in (a, b))
            total = self.add(total, self.mul(*parts))
        self.write(total, place)

    def add_bfloat16(self, place: jit.Value, a: jit.Value, b: jit.Value) -> None:
        total = self.read(FLOATS, place)
        for shift in (16, 0):
            upper = jit.constant(INTS, -(2**16))
            parts = (self.bitcast(self.and_(self.shl(x, jit.constant(INTS, shift)), upper), FLOATS) for x in (a, b))
            total = self.fused(*parts, total)
        self.write(total, place)


BUILDERS = (AMXEmulator, AMXBuilder) if amx.is_available() else (AMXEmulator,)
