"""Kernels for the sampler on the CPU: the best logit, a draw, the best candidates and what a grammar forbids.

Each passes over a row of logits once or twice, where torch's operations would copy rows as long as a vocabulary.
"""

import functools

import torch
from llvmlite import ir

from engine.cpu import jit
from engine.cpu.jit import F32, F64, FLOATS, I32, I64, INTS, LANES, Builder, Program, constant, vector

DRAWN_BLOCK = 512  # columns whose weights are summed up in float32


def can_argmax(logits: torch.Tensor) -> bool:
    """Returns whether the kernels of this file can read these logits."""
    is_plain = logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.is_contiguous()
    return is_plain and logits.shape[-1] >= LANES and jit.is_available()


def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the largest logit of each row, or NaN if the row has one, and its first column. logits: (rows, columns)."""
    rows, columns = logits.shape
    best, index = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.long)
    threads = torch.get_num_threads() if rows > 1 else 1
    _argmax()(logits.data_ptr(), best.data_ptr(), index.data_ptr(), rows, columns, num_threads=threads)
    return best, index


def draw(
    logits: torch.Tensor,
    rows: torch.Tensor,
    best: torch.Tensor,
    temperatures: torch.Tensor,
    min_p: torch.Tensor,
    numbers: torch.Tensor,
) -> torch.Tensor:
    """Draws a column for each of these rows: the first whose cumulated weight exceeds the row's number times the sum of
    weights. A weight is exp((logit - best) / temperature), or 0 if that is less than min_p.

    logits: accepted by `can_argmax`; rows: int64; best: the largest logit of each of them; numbers: float64 in
    [0, 1); all (len(rows),).
    """
    columns, drawn = logits.shape[-1], torch.empty(len(rows), dtype=torch.long)
    blocks = -(-columns // DRAWN_BLOCK)
    threads = torch.get_num_threads() if len(rows) > 1 else 1
    sums = torch.empty(threads, blocks, dtype=torch.float64)
    tensors = (logits, rows, best.contiguous(), 1.0 / temperatures, min_p, numbers, sums, drawn)
    addresses = [tensor.data_ptr() for tensor in tensors]
    _draw()(*addresses, len(rows), columns, blocks, num_threads=threads)
    return drawn


def collect(
    logits: torch.Tensor,
    rows: torch.Tensor,
    best: torch.Tensor,
    temperatures: torch.Tensor,
    least: torch.Tensor,
    limit: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Collects the logits of these rows that are not below `least`.

    Returns the first `limit` of each row, as values and columns, (len(rows), limit), in the order of the columns,
    filled up with -inf; the number of all that are not below `least`; and the sum of exp((logit - best) / temperature)
    over all columns, float64.

    logits: accepted by `can_argmax`; the others (len(rows),), rows int64.
    """
    count, columns = len(rows), logits.shape[-1]
    values = torch.full((count, limit + LANES), -torch.inf, dtype=torch.float32)
    places = torch.zeros(count, limit + LANES, dtype=torch.int32)
    counts, totals = torch.empty(count, dtype=torch.long), torch.empty(count, dtype=torch.float64)
    threads = torch.get_num_threads() if count > 1 else 1
    tensors = (logits, rows, best.contiguous(), 1.0 / temperatures, least.contiguous())
    addresses = [tensor.data_ptr() for tensor in (*tensors, values, places, counts, totals)]
    _collect()(*addresses, count, columns, limit, num_threads=threads)
    return values[:, :limit], places[:, :limit], counts, totals


def forbid(logits: torch.Tensor, rows: torch.Tensor, bits: torch.Tensor) -> None:
    """Sets the logits of these rows to -inf, in place, for tokens whose bit is 0. logits: accepted by `can_argmax`;
    rows: int64; bits: (len(rows), words) int32, with one word more than the tokens need."""
    num_rows, words = bits.shape
    addresses = (logits.data_ptr(), rows.data_ptr(), bits.data_ptr())
    threads = torch.get_num_threads() if num_rows > 1 else 1
    _forbid()(*addresses, num_rows, words, logits.shape[-1], num_threads=threads)


# --- the programs


@functools.cache
def _argmax() -> Program:
    b = Builder("argmax", ("x", "best", "index", "rows", "columns"), jit.host()[1])
    columns = b.argument["columns"]
    best, index = b.variable(constant(FLOATS, 0.0)), b.variable(constant(INTS, 0))
    lanes = ir.Constant(INTS, list(range(LANES)))
    with b.share(b.argument["rows"]) as row:
        start = b.address(b.argument["x"], b.mul(row, columns), 4)

        def add(column: jit.Value) -> None:
            value = b.read(FLOATS, b.address(start, column, 4))
            place = b.add(b.splat(b.trunc(column, I32)), lanes)
            index.set(b.select(b.fcmp_ordered(">", value, best.get()), place, index.get()))
            best.set(b.intrinsic("llvm.maximum.v16f32", FLOATS, best.get(), value))

        best.set(constant(FLOATS, float("-inf")))
        index.set(constant(INTS, 0))
        last = b.sub(columns, I64(LANES))
        with b.loop(I64(0), last, LANES) as column:
            add(column)
        add(last)  # it ends with the row, so some columns are read twice
        top = b.intrinsic("llvm.vector.reduce.fmaximum.v16f32", F32, best.get())
        is_best = b.fcmp_ordered("==", best.get(), b.splat(top))
        places = b.select(is_best, index.get(), constant(INTS, 2**31 - 1))
        first = b.intrinsic("llvm.vector.reduce.smin.v16i32", I32, places)
        b.write(top, b.address(b.argument["best"], row, 4))
        b.write(b.sext(first, I64), b.address(b.argument["index"], row, 8))
    return jit.compile_program(b)


_DRAW = ("x", "rows", "best", "inverse", "min_p", "numbers", "sums", "drawn", "count", "columns", "blocks")


@functools.cache
def _draw() -> Program:
    """Draws with a pass over all columns of a row, and one over the block of columns that the number falls into.

        for each block of DRAWN_BLOCK columns: sums[block] = sum of its weights    # float32, then float64
        target = number * sum(sums)                                                # number: in [0, 1)
        block = the first one whose cumulated sum exceeds the target
        column = the first one in the block whose cumulated weight exceeds the target,
                 but at most the block's last column with a weight

    The last line is for rounding: the block's sum was rounded in another order than its weights one by one. A row's
    last vector is read so that it ends with the row; the columns that it repeats have no weight.
    """
    b = Builder("draw", _DRAW, jit.host()[1])
    columns, blocks = b.argument["columns"], b.argument["blocks"]
    zero = constant(FLOATS, 0.0)
    lanes = ir.Constant(vector(I64), list(range(LANES)))
    part = b.variable(zero)
    cumulated, total = b.variable(F64(0.0)), b.variable(F64(0.0))
    block_drawn, before = b.variable(I64(0)), b.variable(F64(0.0))
    drawn, last_weight = b.variable(I64(0)), b.variable(I64(0))
    row_sums = b.add(b.argument["sums"], b.mul(b.mul(b.thread, blocks), I64(8)))
    with b.share(b.argument["count"]) as place:
        row = b.read(I64, b.address(b.argument["rows"], place, 8))
        start = b.address(b.argument["x"], b.mul(row, columns), 4)
        best, inverse, least = (
            b.splat(b.read(F32, b.address(b.argument[name], place, 4))) for name in ("best", "inverse", "min_p")
        )

        def weights(column: jit.Value) -> tuple[jit.Value, jit.Value]:
            """Sixteen weights from `column` on, or the row's last sixteen, and the column where they begin."""
            first = b.smaller(column, b.sub(columns, I64(LANES)))
            value = b.exp(b.fmul(b.fsub(b.read(FLOATS, b.address(start, first, 4)), best), inverse))
            is_new = b.icmp_signed(">=", b.add(b.splat(first), lanes), b.splat(column))
            return b.select(b.and_(is_new, b.fcmp_ordered(">=", value, least)), value, zero), first

        def ends(block: jit.Value) -> tuple[jit.Value, jit.Value]:
            begin = b.mul(block, I64(DRAWN_BLOCK))
            return begin, b.smaller(b.add(begin, I64(DRAWN_BLOCK)), columns)

        total.set(F64(0.0))
        with b.loop(I64(0), blocks) as block:
            part.set(zero)
            with b.loop(*ends(block), LANES) as column:
                part.set(b.fadd(part.get(), weights(column)[0]))
            amount = b.fpext(b.total(part.get()), F64)
            b.write(amount, b.address(row_sums, block, 8))
            total.set(b.fadd(total.get(), amount))
        target = b.fmul(b.read(F64, b.address(b.argument["numbers"], place, 8)), total.get())
        for variable, value in ((cumulated, F64(0.0)), (before, F64(0.0)), (block_drawn, I64(0))):
            variable.set(value)
        with b.loop(I64(0), b.sub(blocks, I64(1))) as block:
            cumulated.set(b.fadd(cumulated.get(), b.read(F64, b.address(row_sums, block, 8))))
            is_past = b.fcmp_ordered("<=", cumulated.get(), target)
            block_drawn.set(b.select(is_past, b.add(block, I64(1)), block_drawn.get()))
            before.set(b.select(is_past, cumulated.get(), before.get()))
        cumulated.set(before.get())
        begin, end = ends(block_drawn.get())
        drawn.set(begin)
        last_weight.set(begin)
        with b.loop(begin, end, LANES) as column:
            values, first = weights(column)
            for lane in range(LANES):
                weight, index = b.extract_element(values, I32(lane)), b.add(first, I64(lane))
                cumulated.set(b.fadd(cumulated.get(), b.fpext(weight, F64)))
                has_weight = b.fcmp_ordered(">", weight, F32(0.0))
                last_weight.set(b.select(has_weight, index, last_weight.get()))
                is_past = b.and_(b.fcmp_ordered("<=", cumulated.get(), target), b.icmp_signed(">=", index, drawn.get()))
                drawn.set(b.select(is_past, b.add(index, I64(1)), drawn.get()))
        b.write(b.smaller(drawn.get(), last_weight.get()), b.address(b.argument["drawn"], place, 8))
    return jit.compile_program(b)


_COLLECT = (
    *("x", "rows", "best", "inverse", "least", "values", "places", "counts", "totals"),
    *("count", "columns", "limit"),
)


@functools.cache
def _collect() -> Program:
    b = Builder("collect", _COLLECT, jit.host()[1])
    columns, limit = b.argument["columns"], b.argument["limit"]
    width, lanes = b.add(limit, I64(LANES)), ir.Constant(INTS, list(range(LANES)))
    part, total, num_found = b.variable(constant(FLOATS, 0.0)), b.variable(F64(0.0)), b.variable(I64(0))
    with b.share(b.argument["count"]) as place:
        row = b.read(I64, b.address(b.argument["rows"], place, 8))
        start = b.address(b.argument["x"], b.mul(row, columns), 4)
        best, inverse, least = (
            b.splat(b.read(F32, b.address(b.argument[name], place, 4))) for name in ("best", "inverse", "least")
        )
        kept = {name: b.address(b.argument[name], b.mul(place, width), 4) for name in ("values", "places")}
        total.set(F64(0.0))
        num_found.set(I64(0))
        with b.loop(I64(0), columns, DRAWN_BLOCK) as begin:
            part.set(constant(FLOATS, 0.0))
            with b.loop(begin, b.smaller(b.add(begin, I64(DRAWN_BLOCK)), columns), LANES) as column:
                first = b.smaller(column, b.sub(columns, I64(LANES)))  # the last vector ends with the row
                value = b.read(FLOATS, b.address(start, first, 4))
                index = b.add(b.splat(b.trunc(first, I32)), lanes)
                is_new = b.icmp_signed(">=", index, b.splat(b.trunc(column, I32)))
                weight = b.exp(b.fmul(b.fsub(value, best), inverse))
                part.set(b.fadd(part.get(), b.select(is_new, weight, constant(FLOATS, 0.0))))
                is_kept = b.and_(is_new, b.fcmp_ordered(">=", value, least))
                slot = b.smaller(num_found.get(), limit)
                b.compress(value, is_kept, b.address(kept["values"], slot, 4))
                b.compress(index, is_kept, b.address(kept["places"], slot, 4))
                count = b.intrinsic("llvm.ctpop.i16", jit.I16, b.bitcast(is_kept, jit.I16))
                num_found.set(b.add(num_found.get(), b.zext(count, I64)))
            total.set(b.fadd(total.get(), b.fpext(b.total(part.get()), F64)))
        b.write(num_found.get(), b.address(b.argument["counts"], place, 8))
        b.write(total.get(), b.address(b.argument["totals"], place, 8))
    return jit.compile_program(b)


@functools.cache
def _forbid() -> Program:
    b = Builder("forbid", ("x", "rows", "bits", "count", "words", "columns"), jit.host()[1])
    columns = b.argument["columns"]
    flags = ir.VectorType(ir.IntType(1), LANES)
    with b.share(b.argument["count"]) as place:
        row = b.read(I64, b.address(b.argument["rows"], place, 8))
        start = b.address(b.argument["x"], b.mul(row, columns), 4)
        mask = b.address(b.argument["bits"], b.mul(place, b.argument["words"]), 4)

        def cut(column: jit.Value) -> None:
            word = b.read(I32, b.add(mask, b.lshr(column, I64(3))))
            bits = b.trunc(b.lshr(word, b.trunc(b.and_(column, I64(7)), I32)), jit.I16)
            address = b.address(start, column, 4)
            allowed = b.bitcast(bits, flags)
            b.write(b.select(allowed, b.read(FLOATS, address), constant(FLOATS, float("-inf"))), address)

        last = b.sub(columns, I64(LANES))
        with b.loop(I64(0), last, LANES) as column:
            cut(column)
        cut(last)  # it ends with the row, so some columns are cut twice
    return jit.compile_program(b)
