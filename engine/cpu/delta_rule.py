"""Kernels for Gated DeltaNet on the CPU: the short convolution before it, and the gated delta rule with its norm.

Source: Yang et al. 2024, https://arxiv.org/abs/2412.06464. Both take the runs of a step, each some tokens of one
sequence that begin from its state, and read and write each state once, in float32. A run is a row of a table: (slot,
index of its first token in `rows`, number of tokens, whether the state afterwards is written).
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch

from engine.cpu import jit
from engine.cpu.activations import DTYPES, threads_for
from engine.cpu.jit import F32, FLOATS, I32, I64, LANES, Builder, Program, constant

COLUMNS = 2 * LANES  # of a state that are computed together, so that they stay in the first-level cache
TILES = 4  # vectors of channels that a thread reads of each row
SCALARS = 8  # floats kept for each token and head: decay, beta, and the three products of its query and key
EPSILON = 1e-6  # of the length of queries and keys
UNROLLED = 4  # rows of a state in the body of a loop


@dataclass(frozen=True)
class DeltaShape:
    """The heads of a layer: several heads of values share a query and a key."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int

    @property
    def channels(self) -> int:
        """Numbers that the convolution mixes: queries, keys and values of all heads."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """(heads, tiles of columns, key_dim, COLUMNS): the columns of a tile lie together."""
        return self.num_value_heads, self.value_dim // COLUMNS, self.key_dim, COLUMNS


def can_compute(shape: DeltaShape, dtype: torch.dtype) -> bool:
    """Returns whether the kernels take such heads."""
    fits = not shape.key_dim % LANES and not shape.value_dim % COLUMNS
    return fits and dtype in DTYPES and jit.is_available() and shape.num_value_heads % shape.num_key_heads == 0


def convolve(
    x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, table: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """Computes silu(sum_j weight[j] * x[t - width + 1 + j]) for each channel and token: (tokens, channels) float32.

    x: (tokens, at least channels), its rows evenly apart. weight: (width, channels) float32. state: (slots, width - 1,
    channels), what came before. table: (runs, 4) int64. rows: int64.
    """
    width, channels = weight.shape
    assert x.dtype == state.dtype and x.stride(1) == 1 and state.is_contiguous() and weight.is_contiguous()
    output = torch.empty(len(x), channels, dtype=torch.float32)
    _convolve(x.dtype, width, TILES if channels % (TILES * LANES) == 0 else 1)(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        state.data_ptr(),
        output.data_ptr(),
        table.data_ptr(),
        rows.data_ptr(),
        len(table),
        channels,
        num_threads=threads_for(len(rows)),
    )
    return output


def apply_rule(
    shape: DeltaShape,
    mixed: torch.Tensor,
    gates: torch.Tensor,
    z: torch.Tensor,
    constants: torch.Tensor,
    norm: tuple[torch.Tensor, float],
    state: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    output: torch.Tensor,
) -> None:
    """Computes the gated delta rule, and writes norm(result) * silu(z) to output, (tokens, value heads * value_dim).

    For each token of a run and each head, with q and k of length 1, q also divided by key_dim ** 0.5:
        S *= decay = exp(-exp(A_log) * softplus(a + dt_bias))
        S += k (beta * (v - S^T k))^T, with beta = sigmoid(b)
        result = S^T q

    mixed: what `convolve` returned. gates: (tokens, 2 * value heads) float32, first all b, then all a. z: its rows
    evenly apart; tokens beyond its last row get no output. constants: (2, value heads) float32, -exp(A_log) and
    dt_bias. norm: the weight, float32, and epsilon. state: (slots, *shape.state_shape) float32.
    """
    assert z.dtype == output.dtype and mixed.dtype == gates.dtype == state.dtype == torch.float32
    assert gates.is_contiguous() and output.is_contiguous() and z.stride(1) == 1 and state.is_contiguous()
    num_pairs = shape.num_value_heads * len(table)
    threads = torch.get_num_threads() if num_pairs > 1 else 1
    scalars = torch.empty(len(mixed), shape.num_value_heads, SCALARS, dtype=torch.float32)
    results = torch.empty(len(mixed), shape.num_value_heads, shape.value_dim, dtype=torch.float32)
    scratch = torch.empty(threads, shape.key_dim, COLUMNS, dtype=torch.float32)
    weight, epsilon = norm
    _rule(output.dtype, shape, epsilon)(
        mixed.data_ptr(),
        gates.data_ptr(),
        z.data_ptr(),
        z.stride(0),
        constants.data_ptr(),
        weight.data_ptr(),
        state.data_ptr(),
        scalars.data_ptr(),
        results.data_ptr(),
        scratch.data_ptr(),
        output.data_ptr(),
        table.data_ptr(),
        rows.data_ptr(),
        len(table),
        len(z),
        num_threads=threads,
    )


# --- the programs


@functools.cache
def _convolve(dtype: torch.dtype, width: int, tiles: int) -> Program:
    """Keeps the last inputs of `tiles` vectors of channels in registers while it passes the tokens of a run."""
    names = ("x", "x_stride", "weight", "state", "output", "table", "rows", "runs", "channels")
    b = Builder("convolve", names, jit.host()[1])
    channels, size = b.argument["channels"], dtype.itemsize
    past = [[b.variable(constant(FLOATS, 0.0)) for _ in range(width - 1)] for _ in range(tiles)]
    with b.share(b.sdiv(channels, I64(tiles * LANES))) as tile, b.loop(I64(0), b.argument["runs"]) as run:
        first = [b.add(b.mul(tile, I64(tiles * LANES)), I64(LANES * index)) for index in range(tiles)]
        slot, start, count, writes = _read_run(b, run)
        states = b.add(b.argument["state"], b.mul(b.mul(slot, channels), I64((width - 1) * size)))
        place = [
            [b.add(states, b.mul(b.add(b.mul(channels, I64(j)), channel), I64(size))) for j in range(width - 1)]
            for channel in first
        ]
        for variables, addresses in zip(past, place, strict=True):
            for variable, address in zip(variables, addresses, strict=True):
                variable.set(b.read_floats(dtype, address))
        with b.loop(I64(0), count) as index:
            row = b.read(I64, b.address(b.argument["rows"], b.add(start, index), 8))
            x = b.add(b.argument["x"], b.mul(b.mul(row, b.argument["x_stride"]), I64(size)))
            output = b.add(b.argument["output"], b.mul(b.mul(row, channels), I64(4)))
            for variables, channel in zip(past, first, strict=True):
                new = b.read_floats(dtype, b.address(x, channel, size))
                inputs = [*(variable.get() for variable in variables), new]
                total = constant(FLOATS, 0.0)
                for j, value in enumerate(inputs):
                    weight = b.read(FLOATS, b.address(b.argument["weight"], b.add(b.mul(channels, I64(j)), channel), 4))
                    total = b.fused(weight, value, total)
                b.write(b.fmul(total, b.sigmoid(total)), b.address(output, channel, 4))
                for variable, value in zip(variables, inputs[1:], strict=True):
                    variable.set(value)
        with b.if_then(b.icmp_signed("!=", writes, I64(0))):
            for variables, addresses in zip(past, place, strict=True):
                for variable, address in zip(variables, addresses, strict=True):
                    b.write_floats(variable.get(), dtype, address)
    return jit.compile_program(b)


def _read_run(b: Builder, run: jit.Value) -> list[jit.Value]:
    table = b.address(b.argument["table"], run, 32)
    return [b.read(I64, b.add(table, I64(8 * column))) for column in range(4)]


_RULE = (
    *("mixed", "gates", "z", "z_stride", "constants", "norm", "state", "scalars", "results", "scratch", "output"),
    *("table", "rows", "runs", "tokens"),
)


@functools.cache
def _rule(dtype: torch.dtype, shape: DeltaShape, epsilon: float) -> Program:
    """Computes a head of a run at a time: what its tokens need of queries, keys and gates; COLUMNS of the state after
    the other, with all tokens; the norm.

    S^T k and S^T q are summed in one pass over the state, and S is changed in a second one:
        result = decay * S^T q + (q . k) * delta, where delta = beta * (v - decay * S^T k)
    """
    b = Builder("delta_rule", _RULE, jit.host()[1])
    runs, heads = b.argument["runs"], shape.num_value_heads
    with b.share(b.mul(runs, I64(heads))) as pair:
        head = _Head(b, shape, dtype, head=b.sdiv(pair, runs), run=b.srem(pair, runs))
        with head.each_token() as row:
            head.write_scalars(row)
        with b.loop(I64(0), I64(shape.value_dim // COLUMNS)) as tile:
            head.update_tile(tile)
        with head.each_token() as row, b.if_then(b.icmp_signed("<", row, b.argument["tokens"])):
            head.write_output(row, epsilon)
    return jit.compile_program(b)


class _Head:
    """Writes the parts of the program that compute one head of one run."""

    def __init__(self, b: Builder, shape: DeltaShape, dtype: torch.dtype, head: jit.Value, run: jit.Value) -> None:
        self.b, self.shape, self.dtype, self.head = b, shape, dtype, head
        slot, self.start, self.count, self.writes = _read_run(b, run)
        self.key_head = b.sdiv(head, I64(shape.num_value_heads // shape.num_key_heads))
        place = b.add(b.mul(slot, I64(shape.num_value_heads)), head)
        self.state = b.address(b.argument["state"], place, 4 * shape.key_dim * shape.value_dim)
        self.scratch = b.address(b.argument["scratch"], b.thread, 4 * shape.key_dim * COLUMNS)

    @contextmanager
    def each_token(self) -> Iterator[jit.Value]:
        """Writes the loop over the rows of the run's tokens."""
        with self.b.loop(I64(0), self.count) as index:
            yield self.b.read(I64, self.b.address(self.b.argument["rows"], self.b.add(self.start, index), 8))

    def _query_and_key(self, row: jit.Value) -> tuple[jit.Value, jit.Value]:
        b, shape = self.b, self.shape
        mixed = b.address(b.argument["mixed"], row, 4 * shape.channels)
        query = b.address(mixed, self.key_head, 4 * shape.key_dim)
        return query, b.add(query, I64(4 * shape.num_key_heads * shape.key_dim))

    def _values(self, row: jit.Value) -> jit.Value:
        b, shape = self.b, self.shape
        mixed = b.address(b.argument["mixed"], row, 4 * shape.channels)
        first = I64(8 * shape.num_key_heads * shape.key_dim)
        return b.add(b.add(mixed, first), b.mul(self.head, I64(4 * shape.value_dim)))

    def _of_head(self, name: str, row: jit.Value, size: int) -> jit.Value:
        b = self.b
        place = b.add(b.mul(row, I64(self.shape.num_value_heads)), self.head)
        return b.address(b.argument[name], place, size)

    def write_scalars(self, row: jit.Value) -> None:
        """Computes decay, beta, 1 / |k|, the scale of q, and q . k."""
        b, shape = self.b, self.shape
        query, key = self._query_and_key(row)
        sums = [constant(FLOATS, 0.0)] * 3
        for i in range(0, shape.key_dim, LANES):
            q, k = (b.read(FLOATS, b.add(start, I64(4 * i))) for start in (query, key))
            sums = [b.fused(*pair, total) for pair, total in zip(((q, q), (k, k), (q, k)), sums, strict=True)]
        qq, kk, qk = (b.total(total) for total in sums)
        lengths = [b.intrinsic("llvm.sqrt.f32", F32, b.fadd(square, F32(EPSILON))) for square in (qq, kk)]
        q_scale, k_scale = (b.fdiv(F32(1.0), length) for length in lengths)
        q_scale = b.fmul(q_scale, F32(shape.key_dim**-0.5))
        gates = b.address(b.argument["gates"], row, 8 * shape.num_value_heads)
        raw_beta, a = self._pair(gates)
        rate, bias = self._pair(b.argument["constants"])
        beta = b.extract_element(b.sigmoid(b.splat(raw_beta)), I32(0))
        decay = self._exp(b.fmul(rate, self._softplus(b.fadd(a, bias))))
        scalars = self._of_head("scalars", row, 4 * SCALARS)
        for index, value in enumerate((decay, beta, k_scale, q_scale, b.fmul(qk, b.fmul(q_scale, k_scale)))):
            b.write(value, b.add(scalars, I64(4 * index)))

    def _pair(self, start: jit.Value) -> tuple[jit.Value, jit.Value]:
        """Reads the head's numbers from two lists that have one for each head."""
        b, second = self.b, I64(4 * self.shape.num_value_heads)
        first = b.address(start, self.head, 4)
        return b.read(F32, first), b.read(F32, b.add(first, second))

    def _exp(self, x: jit.Value) -> jit.Value:
        return self.b.extract_element(self.b.exp(self.b.splat(x)), I32(0))

    def _softplus(self, x: jit.Value) -> jit.Value:
        """Computes log(1 + e**x); x itself beyond 20, as torch does."""
        b = self.b
        soft = b.intrinsic("llvm.log.f32", F32, b.fadd(F32(1.0), self._exp(x)))
        return b.select(b.fcmp_ordered(">", x, F32(20.0)), x, soft)

    def update_tile(self, tile: jit.Value) -> None:
        """Computes COLUMNS columns of the state with all tokens; in a copy, if it is not to be written."""
        b, shape = self.b, self.shape
        size = 4 * shape.key_dim * COLUMNS
        state = b.address(self.state, tile, size)
        is_copied = b.icmp_signed("==", self.writes, I64(0))
        with b.if_then(is_copied), b.loop(I64(0), I64(size), 64) as offset:
            b.write(b.read(FLOATS, b.add(state, offset)), b.add(self.scratch, offset))
        state = b.select(is_copied, self.scratch, state)
        column = b.mul(tile, I64(4 * COLUMNS))
        with self.each_token() as row:
            scalars = self._of_head("scalars", row, 4 * SCALARS)
            decay, beta, k_scale, q_scale, qk = (
                b.splat(b.read(F32, b.add(scalars, I64(4 * index)))) for index in range(5)
            )
            query, key = self._query_and_key(row)
            recalled, read = self._products(state, key, query)
            values = b.add(self._values(row), column)
            results = b.add(self._of_head("results", row, 4 * shape.value_dim), column)
            changes = []
            for index in range(COLUMNS // LANES):
                value = b.read(FLOATS, b.add(values, I64(64 * index)))
                known = b.fmul(b.fmul(recalled[index], k_scale), decay)
                delta = b.fmul(beta, b.fsub(value, known))
                result = b.fmul(qk, delta)
                result = b.fused(b.fmul(read[index], q_scale), decay, result)
                b.write(result, b.add(results, I64(64 * index)))
                changes.append(b.fmul(delta, k_scale))
            self._change(state, key, decay, changes)

    def _products(self, state: jit.Value, key: jit.Value, query: jit.Value) -> tuple[list[jit.Value], list[jit.Value]]:
        """Computes S^T k and S^T q."""
        b, num = self.b, COLUMNS // LANES
        sums = [[[b.variable(constant(FLOATS, 0.0)) for _ in range(num)] for _ in range(2)] for _ in range(2)]
        with b.loop(I64(0), I64(self.shape.key_dim), UNROLLED) as first:
            totals = [[[variable.get() for variable in part] for part in half] for half in sums]
            for offset in range(UNROLLED):
                i = b.add(first, I64(offset))
                factors = [b.splat(b.read(F32, b.address(vector, i, 4))) for vector in (key, query)]
                for index in range(num):
                    value = b.read(FLOATS, b.add(b.address(state, i, 4 * COLUMNS), I64(64 * index)))
                    for part, factor in enumerate(factors):
                        half = totals[offset % 2][part]
                        half[index] = b.fused(factor, value, half[index])
            for variables, values in zip(chain(*sums), chain(*totals), strict=True):
                for variable, value in zip(variables, values, strict=True):
                    variable.set(value)
        recalled, read = (
            [b.fadd(sums[0][part][index].get(), sums[1][part][index].get()) for index in range(num)] for part in (0, 1)
        )
        return recalled, read

    def _change(self, state: jit.Value, key: jit.Value, decay: jit.Value, changes: list[jit.Value]) -> None:
        """Computes S = decay * S + k change^T."""
        b = self.b
        with b.loop(I64(0), I64(self.shape.key_dim), UNROLLED) as first:
            for offset in range(UNROLLED):
                i = b.add(first, I64(offset))
                factor = b.splat(b.read(F32, b.address(key, i, 4)))
                for index, change in enumerate(changes):
                    place = b.add(b.address(state, i, 4 * COLUMNS), I64(64 * index))
                    b.write(b.fused(factor, change, b.fmul(decay, b.read(FLOATS, place))), place)

    def write_output(self, row: jit.Value, epsilon: float) -> None:
        """Normalises a token's result and multiplies it by silu(z)."""
        b, shape, size = self.b, self.shape, self.dtype.itemsize
        results = self._of_head("results", row, 4 * shape.value_dim)
        offsets = range(0, shape.value_dim, LANES)
        squares = constant(FLOATS, 0.0)
        for offset in offsets:
            value = b.read(FLOATS, b.add(results, I64(4 * offset)))
            squares = b.fused(value, value, squares)
        mean = b.fmul(b.total(squares), F32(1.0 / shape.value_dim))
        root = b.intrinsic("llvm.sqrt.f32", F32, b.fadd(mean, F32(epsilon)))
        scale = b.splat(b.fdiv(F32(1.0), root))
        z = b.add(b.argument["z"], b.mul(b.mul(row, b.argument["z_stride"]), I64(size)))
        z = b.address(z, self.head, shape.value_dim * size)
        output = self._of_head("output", row, shape.value_dim * size)
        for offset in offsets:
            value = b.fmul(b.read(FLOATS, b.add(results, I64(4 * offset))), scale)
            value = b.fmul(value, b.read(FLOATS, b.add(b.argument["norm"], I64(4 * offset))))
            gate = b.read_floats(self.dtype, b.add(z, I64(offset * size)))
            value = b.fmul(value, b.fmul(gate, b.sigmoid(gate)))
            b.write_floats(value, self.dtype, b.add(output, I64(offset * size)))
