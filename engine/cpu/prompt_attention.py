"""Attention of prompt chunks on the CPU: FlashAttention (Dao et al. 2022) over the blocks of the paged cache.

Keys and values are read where they lie, a tile at a time, for all queries of an item; scores and their exponentials
never leave the first-level cache. It computes in bfloat16 with sums in float32 where the cache has that type and the
CPU its instructions, else in float32.
"""

import functools
import math

import torch
from llvmlite import ir

from engine.cpu import amx, jit
from engine.cpu.amx import AMXBuilder
from engine.cpu.jit import F32, FLOATS, I32, I64, INTS, LANES, Builder, Program, constant, vector
from engine.cpu.prompt_plan import KEYS, ROWS, Plan

SOFTMAX_ROWS = 4  # rows whose weights are computed side by side
LOWEST = -1e30  # below any score; unlike -inf, it can be subtracted from itself


def attend_chunk(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    ranges: torch.Tensor,
    scaling: float,
    output: torch.Tensor,
    program: tuple[Plan, Program] | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Computes attention of neighbouring queries of one sequence, and writes output.

    query: (kv_heads, group, tokens, dim), its heads evenly apart; output: (tokens, kv_heads, group, dim).
    keys, values: (blocks, block_size, kv_heads, dim). slots: `slots_of` the sequence, whose blocks hold the queries'
    own keys too. ranges: (tokens, 2) int64, the first position in the slots that each query sees, and the end; neither
    ever decreases. scales: of an int8 cache, of keys and of values, (blocks, block_size, kv_heads) bfloat16.
    """
    group, tokens, dim = query.shape[1:]
    head_stride, kv_heads, threads = query.stride(0) // group, keys.shape[2], torch.get_num_threads()
    assert output.is_contiguous() and query.stride(3) == 1 and query.stride(0) == group * head_stride
    plan, run = program or _program(query.dtype, dim, scaling, keys.dtype)
    scratch = torch.empty(threads * plan.num_bytes + 64, dtype=torch.uint8)
    run(
        query.data_ptr(),
        head_stride,
        query.stride(2),
        keys.data_ptr(),
        values.data_ptr(),
        *((0, 0) if scales is None else (part.data_ptr() for part in scales)),
        slots.data_ptr(),
        ranges.data_ptr(),
        output.data_ptr(),
        -(-scratch.data_ptr() // 64) * 64,
        tokens,
        kv_heads,
        group,
        num_threads=threads,
    )


def slots_of(table: torch.Tensor, block_size: int) -> torch.Tensor:
    """Returns where the tokens of a sequence's blocks lie in the cache: block * block_size + offset, padded to whole
    tiles with the last one. table: (num_blocks,) int64."""
    slots = (table[:, None] * block_size + torch.arange(block_size)).flatten()
    return torch.cat([slots, slots[-1:].expand(-len(slots) % KEYS)])


_ATTEND_CHUNK = (
    *("query", "head_stride", "token_stride", "keys", "values", "key_scales", "value_scales", "slots", "ranges"),
    *("output", "scratch", "tokens", "kv_heads", "group"),
)


@functools.cache
def _program(dtype: torch.dtype, dim: int, scaling: float, stored: torch.dtype) -> tuple[Plan, Program]:
    plan = Plan.of(dtype, dim, amx.is_available(), is_int8=stored == torch.int8)
    return plan, chunk_program(plan, scaling)


@functools.cache
def chunk_program(plan: Plan, scaling: float, builder: type[AMXBuilder] = AMXBuilder) -> Program:
    """Gives each thread some items: an item is ROWS rows of the queries that share one head of the keys.

    for each tile of KEYS keys that a row of the item sees:
        copy its keys side by side, and its values, into the first-level cache
        for each few rows:
            scores = queries . keys * key scales                 # -inf outside of a row's own range
            best, before = max(best, scores), best
            weights = exp(scores - best); factor = exp(before - best)
            total = total * factor + weights
            sums = sums * factor + (weights * value scales) . values
    output = sums / total
    """
    return jit.compile_program(_ChunkBuilder(plan, scaling, builder).build())


class _ChunkBuilder:
    """Writes the program; `at` has the addresses of the thread's scratch memory."""

    def __init__(self, plan: Plan, scaling: float, builder: type[AMXBuilder]) -> None:
        self.plan, self.scaling = plan, scaling
        self.b = builder("attend_chunk", _ATTEND_CHUNK, jit.host()[1])
        place = self.b.add(self.b.argument["scratch"], self.b.mul(self.b.thread, I64(plan.num_bytes)))
        self.at: dict[str, jit.Value] = {}
        for name, size in plan.sizes.items():
            self.at[name] = place
            place = self.b.add(place, I64(size))

    def build(self) -> Builder:
        b, argument = self.b, self.b.argument
        if self.plan.has_amx:
            b.configure([(amx.ROWS, amx.ROW_BYTES)] * 8)
        num_rows = b.mul(argument["tokens"], argument["group"])
        num_tiles = b.sdiv(b.add(num_rows, I64(ROWS - 1)), I64(ROWS))
        # in turn, since later items see more keys
        with b.loop(b.thread, b.mul(num_tiles, argument["kv_heads"]), b.num_threads) as index:
            first_row = b.mul(b.sdiv(index, argument["kv_heads"]), I64(ROWS))
            count = b.smaller(b.sub(num_rows, first_row), I64(ROWS))
            self._item(first_row, count, b.srem(index, argument["kv_heads"]))
        if self.plan.has_amx:
            b.release()
        return b

    def _item(self, first_row: jit.Value, count: jit.Value, kv_head: jit.Value) -> None:
        b = self.b
        padded = b.and_(b.add(count, I64(self.plan.rows - 1)), I64(-self.plan.rows))
        self._start(first_row, count, padded, kv_head)
        first, end = self._range(I64(0), b.sub(count, I64(1)))
        with b.loop(b.and_(first, I64(-KEYS)), end, KEYS) as start:
            self._copy_tile(kv_head, start, *self._within(start, first, end))
            with b.loop(I64(0), padded, self.plan.rows) as row:
                low, high = self._within(start, *self._range(row, b.add(row, I64(self.plan.rows - 1))))
                with b.if_then(b.icmp_signed("<", low, high)):
                    (self._scores_of_tiles if self.plan.has_amx else self._scores)(row, low, high)
                    if self.plan.is_int8:
                        self._scale(low, high)
                    self._mask(row, start, low, high)
                    self._softmax(row, low, high)
                    (self._add_values_of_tiles if self.plan.has_amx else self._add_values)(row, low, high)
        self._finish(first_row, count, kv_head)

    def _range(self, first: jit.Value, last: jit.Value) -> tuple[jit.Value, jit.Value]:
        """Returns the first position that one of these rows of the item sees, and the end."""
        b = self.b
        ends = b.add(b.address(self.at["ranges"], last, 16), I64(8))
        return b.read(I64, b.address(self.at["ranges"], first, 16)), b.read(I64, ends)

    def _within(self, start: jit.Value, first: jit.Value, end: jit.Value) -> tuple[jit.Value, jit.Value]:
        """Returns the part of a tile that holds the positions from `first` to `end`, in steps of the keys that are
        computed at once."""
        b, step = self.b, self.plan.key_vectors * LANES
        low = b.and_(b.larger(b.sub(first, start), I64(0)), I64(-step))
        high = b.and_(b.add(b.sub(end, start), I64(step - 1)), I64(-step))
        return low, b.smaller(high, I64(KEYS))

    # --- the parts of an item

    def _row(self, name: str, row: jit.Value, num_bytes: int) -> jit.Value:
        return self.b.address(self.at[name], row, num_bytes)

    def _place(self, first_row: jit.Value, row: jit.Value) -> tuple[jit.Value, jit.Value]:
        """Returns the token and the head, within its group, of a row of the item."""
        b, group = self.b, self.b.argument["group"]
        index = b.add(first_row, row)
        return b.sdiv(index, group), b.srem(index, group)

    def _start(self, first_row: jit.Value, count: jit.Value, padded: jit.Value, kv_head: jit.Value) -> None:
        """Copies the queries and their ranges. Rows are padded with the last one."""
        b, plan, argument, size = self.b, self.plan, self.b.argument, self.plan.dtype.itemsize
        with b.loop(I64(0), padded) as row:
            token, head = self._place(first_row, b.smaller(row, b.sub(count, I64(1))))
            head = b.add(b.mul(kv_head, argument["group"]), head)
            start = b.add(b.mul(head, argument["head_stride"]), b.mul(token, argument["token_stride"]))
            source, target = b.address(argument["query"], start, size), self._row("queries", row, 4 * plan.width)
            for i in range(0, plan.width, LANES):
                b.write(self._lanes(source, i, plan.dtype), b.add(target, I64(4 * i)))
            for i in range(0, plan.dim, LANES):
                b.write(constant(FLOATS, 0.0), b.add(self._row("sums", row, 4 * plan.dim), I64(4 * i)))
            b.write(constant(FLOATS, LOWEST), self._row("best", row, 64))
            b.write(constant(FLOATS, 0.0), self._row("total", row, 64))
            seen = b.read(vector(I64, 2), b.address(argument["ranges"], token, 16))
            b.write(seen, self._row("ranges", row, 16))

    def _lanes(self, head: jit.Value, first: int, stored: torch.dtype) -> jit.Value:
        """Reads sixteen lanes of a head of queries or keys, as floats or as pairs of bfloat16. Beyond the head's end
        they are 0."""
        b, plan = self.b, self.plan
        count = min(LANES, plan.width - first)
        address = b.add(head, I64(stored.itemsize * plan.pair * first))
        if plan.pair == 2:
            value, zeros = self._pairs(address, count, stored), constant(vector(I32, count), 0)
        else:
            value, zeros = b.read_floats(stored, address, count), constant(vector(F32, count), 0.0)
        if count == LANES:
            return value
        return b.shuffle_vector(value, zeros, ir.Constant(INTS, [i if i < count else count for i in range(LANES)]))

    def _pairs(self, address: jit.Value, count: int, stored: torch.dtype) -> jit.Value:
        """Reads neighbouring elements as pairs of bfloat16, which holds every int8."""
        b = self.b
        if stored == torch.bfloat16:
            return b.read(vector(I32, count), address)
        bits = b.bitcast(b.read_floats(stored, address, 2 * count), vector(I32, 2 * count))
        halves = b.trunc(b.lshr(bits, constant(bits.type, 16)), vector(jit.I16, 2 * count))
        return b.bitcast(halves, vector(I32, count))

    def _copy_tile(self, kv_head: jit.Value, start: jit.Value, low: jit.Value, high: jit.Value) -> None:
        b, plan = self.b, self.plan

        def place_of(position: jit.Value) -> jit.Value:
            slot = b.read(I64, b.address(b.argument["slots"], b.add(start, position), 8))
            return b.add(b.mul(slot, b.argument["kv_heads"]), kv_head)

        def head_of(cache: str, position: jit.Value) -> jit.Value:
            return b.address(b.argument[cache], place_of(position), plan.dim * plan.stored.itemsize)

        if plan.is_int8:
            with b.loop(low, high) as key:
                for name in ("key_scales", "value_scales"):
                    scale = b.read_float(torch.bfloat16, b.address(b.argument[name], place_of(key), 2))
                    b.write(scale, b.address(self.at[name], key, 4))
        with b.loop(low, high, LANES) as key:
            heads = [head_of("keys", b.add(key, I64(i))) for i in range(LANES)]
            for first in range(0, plan.width, LANES):
                columns = _transposed(b, [self._lanes(head, first, plan.stored) for head in heads])
                for i, column in enumerate(columns[: plan.width - first]):
                    b.write(column, b.add(b.address(self.at["keys"], key, 4), I64(4 * KEYS * (first + i))))
        with b.loop(low, high, plan.pair) as key:
            heads = [head_of("values", b.add(key, I64(i))) for i in range(plan.pair)]
            target = b.address(self.at["values"], b.sdiv(key, I64(plan.pair)), 4 * plan.dim)
            for i in range(0, plan.dim, LANES):
                b.write(self._value(heads, i), b.add(target, I64(4 * i)))

    def _value(self, heads: list[jit.Value], first: int) -> jit.Value:
        """Reads sixteen elements of one key's values as floats, or of two keys' as pairs of bfloat16."""
        b, stored = self.b, self.plan.stored
        offset = I64(stored.itemsize * first)
        if self.plan.pair == 1:
            return b.read_floats(stored, b.add(heads[0], offset))
        if self.plan.is_int8:
            low, high = (b.bitcast(b.read_floats(stored, b.add(head, offset)), INTS) for head in heads)
            return b.or_(b.lshr(low, constant(INTS, 16)), high)
        low, high = (b.zext(b.read(vector(jit.I16), b.add(head, offset)), INTS) for head in heads)
        return b.or_(low, b.shl(high, constant(INTS, 16)))

    def _dot(self, sums: jit.Variable, a: jit.Value, lanes: jit.Value) -> None:
        """Adds the products of `a`, 32 bits, and sixteen lanes."""
        b, splat = self.b, self.b.splat(a)
        sums.set(b.dot2(sums.get(), splat, lanes) if self.plan.pair == 2 else b.fused(splat, lanes, sums.get()))

    def _scores(self, row: jit.Value, low: jit.Value, high: jit.Value) -> None:
        b, plan = self.b, self.plan
        queries = self._row("queries", row, 4 * plan.width)
        sums = [[b.variable(constant(FLOATS, 0.0)) for _ in range(plan.key_vectors)] for _ in range(plan.rows)]
        with b.loop(low, high, plan.key_vectors * LANES) as key:
            for row_sums in sums:
                for part in row_sums:
                    part.set(constant(FLOATS, 0.0))
            with b.loop(I64(0), I64(plan.width), 8) as first:
                keys = b.add(b.address(self.at["keys"], first, 4 * KEYS), b.mul(key, I64(4)))
                for i in range(8):
                    columns = [self._read(b.add(keys, I64(4 * KEYS * i + 64 * j))) for j in range(plan.key_vectors)]
                    for r in range(plan.rows):
                        element = self._read_one(b.add(b.address(queries, first, 4), I64(4 * (plan.width * r + i))))
                        for part, column in zip(sums[r], columns, strict=True):
                            self._dot(part, element, column)
            for r in range(plan.rows):
                for j, part in enumerate(sums[r]):
                    place = b.add(b.address(self.at["scores"], key, 4), I64(4 * KEYS * r + 64 * j))
                    b.write(part.get(), place)

    def _scores_of_tiles(self, row: jit.Value, low: jit.Value, high: jit.Value) -> None:
        """Computes what `_scores` computes, of 16 queries and 32 keys at a time, with AMX."""
        b, plan = self.b, self.plan
        queries = self._row("queries", row, 4 * plan.width)
        with b.loop(low, high, 2 * LANES) as key:
            for side in (0, 1):
                b.zero(side)
            with b.loop(I64(0), I64(plan.width), LANES) as first:
                b.load_tile(2, b.address(queries, first, 4), I64(4 * plan.width))
                keys = b.add(b.address(self.at["keys"], first, 4 * KEYS), b.mul(key, I64(4)))
                for side in (0, 1):
                    b.load_tile(3 + side, b.add(keys, I64(64 * side)), I64(4 * KEYS))
                    b.dot_tiles("tdpbf16ps", side, 2, 3 + side)
            for side in (0, 1):
                place = b.add(b.address(self.at["scores"], key, 4), I64(64 * side))
                b.store_tile(side, place, I64(4 * KEYS))

    def _add_values_of_tiles(self, row: jit.Value, low: jit.Value, high: jit.Value) -> None:
        """Computes what `_add_values` computes, of 16 queries, 32 keys and 16 elements at a time, with AMX."""
        b, plan = self.b, self.plan
        row_bytes = I64(4 * plan.dim)
        sums = self._row("sums", row, 4 * plan.dim)
        with b.loop(I64(0), I64(plan.rows)) as r:
            factor = b.read(FLOATS, b.address(self.at["factors"], r, 64))
            for i in range(0, plan.dim, LANES):
                place = b.add(b.add(sums, b.mul(r, row_bytes)), I64(4 * i))
                b.write(b.fmul(factor, b.read(FLOATS, place)), place)
        for start in range(0, plan.dim, plan.value_vectors * LANES):
            elements = range(start, min(plan.dim, start + plan.value_vectors * LANES), LANES)
            for part, i in enumerate(elements):
                b.load_tile(part, b.add(sums, I64(4 * i)), row_bytes)
            with b.loop(low, high, 2 * LANES) as key:
                b.load_tile(4, b.address(self.at["scores"], key, 2), I64(4 * KEYS))
                values = b.address(self.at["values"], key, 2 * plan.dim)
                for part, i in enumerate(elements):
                    b.load_tile(5, b.add(values, I64(4 * i)), row_bytes)
                    b.dot_tiles("tdpbf16ps", part, 4, 5)
            for part, i in enumerate(elements):
                b.store_tile(part, b.add(sums, I64(4 * i)), row_bytes)

    def _read(self, address: jit.Value) -> jit.Value:
        return self.b.read(INTS if self.plan.pair == 2 else FLOATS, address)

    def _read_one(self, address: jit.Value) -> jit.Value:
        return self.b.read(I32 if self.plan.pair == 2 else F32, address)

    def _scale(self, low: jit.Value, high: jit.Value) -> None:
        """Multiplies the scores of some rows by their keys' scales."""
        b, plan = self.b, self.plan
        with b.loop(low, high, LANES) as key:
            scale = b.read(FLOATS, b.address(self.at["key_scales"], key, 4))
            for row in range(plan.rows):
                place = b.add(b.address(self.at["scores"], key, 4), I64(4 * KEYS * row))
                b.write(b.fmul(b.read(FLOATS, place), scale), place)

    def _mask(self, row: jit.Value, start: jit.Value, low: jit.Value, high: jit.Value) -> None:
        """Replaces the scores outside of each row's range by -inf, where there are any: ranges never decrease."""
        b, plan = self.b, self.plan
        last = b.add(row, I64(plan.rows - 1))
        latest, earliest = self._range(last, row)
        hides = b.or_(b.icmp_signed(">", latest, b.add(start, low)), b.icmp_signed("<", earliest, b.add(start, high)))
        with b.if_then(hides), b.loop(I64(0), I64(plan.rows)) as r:
            first, end = self._range(b.add(row, r), b.add(row, r))
            scores = b.address(self.at["scores"], r, 4 * KEYS)
            with b.loop(low, high, LANES) as key:
                place, position = b.address(scores, key, 4), b.add(start, key)
                inside = is_inside(b, position, first, end)
                b.write(b.select(inside, b.read(FLOATS, place), constant(FLOATS, float("-inf"))), place)

    def _softmax(self, row: jit.Value, low: jit.Value, high: jit.Value) -> None:
        for first in range(0, self.plan.rows, SOFTMAX_ROWS):
            self._softmax_rows(row, range(first, first + SOFTMAX_ROWS), low, high)

    def _softmax_rows(self, row: jit.Value, rows: range, low: jit.Value, high: jit.Value) -> None:
        """Replaces some rows' scores by their weights, side by side, so that none waits for another's result."""
        b, plan, scale = self.b, self.plan, constant(FLOATS, self.scaling / math.log(2))
        scores = [b.add(self.at["scores"], I64(4 * KEYS * r)) for r in rows]
        best, totals = ([self._row(name, b.add(row, I64(r)), 64) for r in rows] for name in ("best", "total"))
        before = [b.read(FLOATS, place) for place in best]
        largest = [b.variable(value) for value in before]
        with b.loop(low, high, plan.key_vectors * LANES) as key:
            for place, top in zip(scores, largest, strict=True):
                for j in range(plan.key_vectors):
                    score = b.read(FLOATS, b.add(b.address(place, key, 4), I64(64 * j)))
                    top.set(b.select(b.fcmp_ordered(">", score, top.get()), score, top.get()))
        shifts, sums = [], []
        for r, top, place, earlier, total in zip(rows, largest, best, before, totals, strict=True):
            now = b.splat(b.largest(top.get()))
            b.write(now, place)
            shifts.append(b.fneg(b.fmul(now, scale)))
            # the difference first: for a row that has seen nothing, two products with LOWEST would be rounded apart
            factor = self._exp2(b.fmul(b.fsub(earlier, now), scale))
            b.write(factor, b.add(self.at["factors"], I64(64 * r)))
            sums.append(b.variable(b.fmul(b.read(FLOATS, total), factor)))
        with b.loop(low, high, plan.pair * LANES) as key:
            for place, shift, total in zip(scores, shifts, sums, strict=True):
                weights = []
                for j in range(plan.pair):
                    score = b.read(FLOATS, b.add(b.address(place, key, 4), I64(64 * j)))
                    weights.append(self._exp2(b.fused(score, scale, shift)))
                    total.set(b.fadd(total.get(), weights[-1]))
                if plan.is_int8:
                    factors = b.address(self.at["value_scales"], key, 4)
                    weights = [b.fmul(w, b.read(FLOATS, b.add(factors, I64(64 * j)))) for j, w in enumerate(weights)]
                # two weights take the place of one score, of which both have been read
                packed = b.pack_bfloat16(*weights) if plan.pair == 2 else weights[0]
                b.write(packed, b.address(place, key, 4 // plan.pair))
        for total, place in zip(sums, totals, strict=True):
            b.write(total.get(), place)

    def _exp2(self, x: jit.Value) -> jit.Value:
        """As exact as the type that the weights are rounded to."""
        return self.b.exp2(x) if self.plan.pair == 2 else self.b.exp(self.b.fmul(x, constant(FLOATS, math.log(2))))

    def _add_values(self, row: jit.Value, low: jit.Value, high: jit.Value) -> None:
        for first in range(0, self.plan.rows, self.plan.value_rows):
            for start in range(0, self.plan.dim, self.plan.value_vectors * LANES):
                stop = min(self.plan.dim, start + self.plan.value_vectors * LANES)
                self._add_part(row, first, range(start, stop, LANES), low, high)

    def _add_part(self, row: jit.Value, first: int, elements: range, low: jit.Value, high: jit.Value) -> None:
        """Adds the weighted values of the tile to some rows' sums of some elements."""
        b, plan, unrolled = self.b, self.plan, 4
        rows = range(first, first + plan.value_rows)
        places = [self._row("sums", b.add(row, I64(r)), 4 * plan.dim) for r in rows]
        sums = []
        for r, place in zip(rows, places, strict=True):
            factor = b.read(FLOATS, b.add(self.at["factors"], I64(64 * r)))
            sums.append([b.variable(b.fmul(factor, b.read(FLOATS, b.add(place, I64(4 * i))))) for i in elements])
        with b.loop(b.sdiv(low, I64(plan.pair)), b.sdiv(high, I64(plan.pair)), unrolled) as key:
            for step in range(unrolled):
                values = b.address(self.at["values"], b.add(key, I64(step)), 4 * plan.dim)
                vectors = [self._read(b.add(values, I64(4 * i))) for i in elements]
                for r, row_sums in zip(rows, sums, strict=True):
                    weights = b.add(b.address(self.at["scores"], key, 4), I64(4 * KEYS * r + 4 * step))
                    weight = self._read_one(weights)
                    for part, values in zip(row_sums, vectors, strict=True):
                        self._dot(part, weight, values)
        for row_sums, place in zip(sums, places, strict=True):
            for i, part in zip(elements, row_sums, strict=True):
                b.write(part.get(), b.add(place, I64(4 * i)))

    def _finish(self, first_row: jit.Value, count: jit.Value, kv_head: jit.Value) -> None:
        b, plan, argument = self.b, self.plan, self.b.argument
        with b.loop(I64(0), count) as row:
            token, head = self._place(first_row, row)
            head = b.add(b.mul(b.add(b.mul(token, argument["kv_heads"]), kv_head), argument["group"]), head)
            scale = b.splat(b.fdiv(F32(1.0), b.total(b.read(FLOATS, self._row("total", row, 64)))))
            sums, target = self._row("sums", row, 4 * plan.dim), b.mul(head, I64(plan.dim))
            for i in range(0, plan.dim, LANES):
                result = b.fmul(b.read(FLOATS, b.add(sums, I64(4 * i))), scale)
                place = b.address(argument["output"], b.add(target, I64(i)), plan.dtype.itemsize)
                b.write_floats(result, plan.dtype, place)


def is_inside(b: Builder, position: jit.Value, first: jit.Value, end: jit.Value) -> jit.Value:
    """Tells which of sixteen positions are visible: the first and the last vector reach beyond the visible range."""
    positions = b.add(b.splat(position), ir.Constant(vector(I64), list(range(LANES))))
    return b.and_(b.icmp_signed(">=", positions, b.splat(first)), b.icmp_signed("<", positions, b.splat(end)))


def _transposed(b: Builder, rows: list[jit.Value]) -> list[jit.Value]:
    """Returns the columns of a square of sixteen rows: in four steps, each of which exchanges the halves of pairs of
    rows that are 8, 4, 2 and 1 apart."""
    for distance in (8, 4, 2, 1):
        upper = [i if not i & distance else i - distance + LANES for i in range(LANES)]
        lower = [i + distance if not i & distance else i + LANES for i in range(LANES)]
        exchanged = list(rows)
        for i in (i for i in range(LANES) if not i & distance):
            pair = rows[i], rows[i + distance]
            exchanged[i] = b.shuffle_vector(*pair, ir.Constant(INTS, upper))
            exchanged[i + distance] = b.shuffle_vector(*pair, ir.Constant(INTS, lower))
        rows = exchanged
    return rows
