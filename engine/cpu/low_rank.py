"""Low-rank products on the CPU: what adapters add to layers, each row of a step with the matrices of its own adapter.

Both matrices are kept in tiles of RANKS ranks. A step multiplies each tile with the rows of its adapter alone, so that
tiles of an adapter that no row has are not even read:

    shrink:  hidden[tile, row] = x[row] A[tile]^T                   # for the rows of the tile's adapter
    expand:  output[row] += sum over tiles of hidden[tile, row] B[tile]^T
"""

import functools
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch

from engine.cpu import jit
from engine.cpu.activations import FEW_ROWS
from engine.cpu.jit import FLOATS, I32, I64, INTS, LANES, Builder, Program, constant
from engine.cpu.packed_weight import BFLOAT16, GROUP, pack_floats
from engine.cpu.products import PREFETCH, ROWS

RANKS = LANES  # of a tile
PAIRS = RANKS // 2
B_TILE_BYTES = 2 * RANKS * LANES


def num_tiles(rank: int) -> int:
    return -(-rank // RANKS)


@dataclass(frozen=True)
class PackedMatrices:
    """The matrices of one adapter for layers that read one input, of bfloat16."""

    a: torch.Tensor  # (layers * tiles, blocks, bytes)
    b: Items[torch.Tensor]  # of each layer: (rows / LANES, tiles, PAIRS, LANES, 2)

    @classmethod
    def of(cls, a: Items[torch.Tensor], b: Items[torch.Tensor]) -> "PackedMatrices":
        """a: (ranks, columns) of each layer, in whole tiles; b: (rows, ranks), whose rows are whole vectors."""
        packed = [part.view(-1, LANES, part.shape[1] // RANKS, PAIRS, 2).permute(0, 2, 3, 1, 4) for part in b]
        return cls(pack_floats(torch.cat(list(a))).quants, [part.contiguous() for part in packed])

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile of A."""
        return self.a[0].numel()


class RowGroups:
    """Which rows of a step each adapter has, as the programs read it."""

    def __init__(self, numbers: torch.Tensor, ranks: Items[int]) -> None:
        """numbers: (rows,) the number of each row's adapter, -1 for none. ranks: of the adapters."""
        order = numbers.argsort(stable=True)
        counts = (numbers + 1).bincount(minlength=len(ranks) + 1).tolist()
        self.order = order[counts[0] :].contiguous()  # rows without an adapter come first
        self._counts, self._tiles = counts[1:], [num_tiles(rank) for rank in ranks]
        self._tables: dict[int, tuple[torch.Tensor, list[torch.Tensor], int]] = {}

    def tables(self, num_layers: int) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        """Returns for layers of one input: (tiles, 3) first row, number of rows, and place in `hidden` of each tile of
        A; for each layer (adapters, 4) first row, number of rows, tiles, and the first one's place in `hidden`; and the
        number of places."""
        if num_layers not in self._tables:
            self._tables[num_layers] = self._make_tables(num_layers)
        return self._tables[num_layers]

    def _make_tables(self, num_layers: int) -> tuple[torch.Tensor, list[torch.Tensor], int]:
        shrunk: list[tuple[int, int, int]] = []
        expanded: list[list[tuple[int, int, int, int]]] = [[] for _ in range(num_layers)]
        first = place = 0
        for count, tiles in zip(self._counts, self._tiles, strict=True):
            for layer in range(num_layers):
                expanded[layer].append((first, count, tiles, place))
                for _ in range(tiles):
                    shrunk.append((first, count, place))
                    place += count
            first += count
        return torch.tensor(shrunk), [torch.tensor(rows) for rows in expanded], place


def addresses_of_a(matrices: Items[PackedMatrices]) -> torch.Tensor:
    """Returns the address of each tile, in the order of RowGroups.tables."""
    starts = [(part.a.data_ptr() + index * part.tile_bytes) for part in matrices for index in range(len(part.a))]
    return torch.tensor(starts)


def addresses_of_b(matrices: Items[PackedMatrices], layer: int) -> torch.Tensor:
    return torch.tensor([part.b[layer].data_ptr() for part in matrices])


def shrink(x: torch.Tensor, addresses: torch.Tensor, groups: RowGroups, num_layers: int) -> torch.Tensor:
    """Returns `hidden`, (places, RANKS). x: (rows, columns) bfloat16, contiguous, of whole groups of columns."""
    table, _, places = groups.tables(num_layers)
    hidden = torch.empty(places, RANKS, dtype=torch.bfloat16)
    tensors = (x, addresses, table, groups.order, hidden)
    threads = torch.get_num_threads() if len(groups.order) > FEW_ROWS else 1
    _shrink()(*(t.data_ptr() for t in tensors), x.shape[1] // GROUP, len(table), num_threads=threads)
    return hidden


def expand(
    hidden: torch.Tensor, addresses: torch.Tensor, output: torch.Tensor, groups: RowGroups, num_layers: int, layer: int
) -> None:
    """Adds to the output of a layer, (rows, columns), whose rows may be apart."""
    table = groups.tables(num_layers)[1][layer]
    tensors = (hidden, addresses, table, groups.order, output)
    row_bytes, tiles = output.stride(0) * output.itemsize, output.shape[1] // LANES
    threads = torch.get_num_threads() if len(groups.order) > FEW_ROWS else 1
    _expand(output.dtype)(*(t.data_ptr() for t in tensors), row_bytes, tiles, len(table), num_threads=threads)


# --- the programs


@functools.cache
def _shrink() -> Program:
    """For each tile, up to ROWS rows at a time: their sums are kept while the tile's blocks pass."""
    b = Builder("shrink", ("x", "addresses", "table", "order", "hidden", "blocks", "tiles"), jit.host()[1])
    blocks, sums = b.argument["blocks"], b.scratch(ROWS)
    with b.share(b.argument["tiles"]) as tile:
        weights = b.read(I64, b.address(b.argument["addresses"], tile, 8))
        row = b.address(b.argument["table"], tile, 24)
        start, size, place = (b.read(I64, b.add(row, I64(8 * index))) for index in range(3))
        with b.loop(I64(0), size, ROWS) as first:
            count = b.smaller(b.sub(size, first), I64(ROWS))
            with b.loop(I64(0), count) as index:
                b.write(constant(FLOATS, 0.0), b.address(sums, index, 64), align=64)
            with b.loop(I64(0), blocks) as block:
                _add_block(b, weights, block, b.add(start, first), count, sums)
            with b.loop(I64(0), count) as index:
                total = b.read(FLOATS, b.address(sums, index, 64), align=64)
                target = b.add(b.add(place, first), index)
                b.write_floats(total, torch.bfloat16, b.address(b.argument["hidden"], target, 2 * RANKS))
    return jit.compile_program(b)


def _add_block(
    b: Builder, weights: jit.Value, block: jit.Value, first: jit.Value, count: jit.Value, sums: jit.Value
) -> None:
    """Adds the products of a block's columns to the sums of `count` rows from `first` on, in the adapters' order."""
    begin = b.address(weights, block, BFLOAT16.block_bytes)
    for line in range(0, BFLOAT16.block_bytes, 64):
        b.prefetch(b.add(begin, I64(PREFETCH + line)))
    pairs = [b.read(INTS, b.add(begin, I64(64 * pair))) for pair in range(GROUP // 2)]
    row_bytes = b.mul(b.argument["blocks"], I64(2 * GROUP))
    with b.loop(I64(0), count) as index:
        row = b.read(I64, b.address(b.argument["order"], b.add(first, index), 8))
        values = b.add(b.add(b.argument["x"], b.mul(row, row_bytes)), b.mul(block, I64(2 * GROUP)))
        address = b.address(sums, index, 64)
        total = b.read(FLOATS, address, align=64)
        for pair, weight in enumerate(pairs):
            total = b.dot2(total, weight, b.splat(b.read(I32, b.add(values, I64(4 * pair)))))
        b.write(total, address, align=64)


@functools.cache
def _expand(dtype: torch.dtype) -> Program:
    """For each vector of the output, and each row of each adapter: adds the products with all of the adapter's tiles,
    so that the output is rounded once. The first tile, often the only one, stays in registers."""
    names = ("hidden", "addresses", "table", "order", "output", "row_bytes", "vectors", "adapters")
    b = Builder("expand", names, jit.host()[1])
    total = b.variable(constant(FLOATS, 0.0))
    with b.share(b.argument["vectors"]) as vector, b.loop(I64(0), b.argument["adapters"]) as adapter:
        entry = b.address(b.argument["table"], adapter, 32)
        first, count, tiles, place = (b.read(I64, b.add(entry, I64(8 * index))) for index in range(4))
        begin = b.read(I64, b.address(b.argument["addresses"], adapter, 8))
        tile_bytes = b.mul(tiles, I64(B_TILE_BYTES))
        with b.loop(I64(0), b.smaller(count, I64(1))):  # not for an adapter without rows
            weights = b.add(begin, b.mul(vector, tile_bytes))
            for line in range(0, B_TILE_BYTES, 64):
                b.prefetch(b.add(weights, I64(PREFETCH // 2 + line)))
            kept = [b.read(INTS, b.add(weights, I64(64 * pair))) for pair in range(PAIRS)]
            with b.loop(I64(0), count) as index:
                row = b.read(I64, b.address(b.argument["order"], b.add(first, index), 8))
                output = b.add(b.argument["output"], b.mul(row, b.argument["row_bytes"]))
                output = b.address(output, vector, LANES * dtype.itemsize)
                source = b.address(b.argument["hidden"], b.add(place, index), 2 * RANKS)
                total.set(b.read_floats(dtype, output))
                _add_tile(b, total, kept, source)
                with b.loop(I64(1), tiles) as tile:
                    matrix = b.address(weights, tile, B_TILE_BYTES)
                    others = [b.read(INTS, b.add(matrix, I64(64 * pair))) for pair in range(PAIRS)]
                    _add_tile(b, total, others, b.address(source, b.mul(tile, count), 2 * RANKS))
                b.write_floats(total.get(), dtype, output)
    return jit.compile_program(b)


def _add_tile(b: Builder, total: jit.Variable, weights: list[jit.Value], hidden: jit.Value) -> None:
    for pair, weight in enumerate(weights):
        total.set(b.dot2(total.get(), weight, b.splat(b.read(I32, b.add(hidden, I64(4 * pair))))))
