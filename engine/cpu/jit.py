"""Small programs for this machine's CPU: written as LLVM's intermediate representation, compiled when first used.

They run on torch's own OpenMP threads, since two pools of threads would fight for the cores. It knows no models.
"""

import ctypes
import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import llvmlite.binding as llvm
import torch
from llvmlite import ir

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
LANES = 16  # numbers of 32 bits in the vectors that the programs compute with

Value = Any  # a value of llvmlite, which has no types for mypy
Program = Callable[..., None]


def vector(element: Value, count: int = LANES) -> Value:
    return ir.VectorType(element, count)


class _BFloat(ir.types.Type):  # type: ignore[misc]  # llvmlite has no types
    """LLVM's bfloat, which llvmlite lacks."""

    def _to_string(self) -> str:
        return "bfloat"


FLOATS, INTS, BYTES = vector(F32), vector(I32), vector(I8, 4 * LANES)
PAIRS = vector(_BFloat(), 2 * LANES)
EXP2 = (0.07802452, 0.22606716, 0.69583354, 0.99992522)  # of 2**r, 0 <= r < 1, from the third power down


class Builder(ir.IRBuilder):  # type: ignore[misc]  # llvmlite has no types
    """A function under construction. Addresses and counts are int64; vectors have 16 lanes unless said otherwise."""

    def __init__(self, name: str, arguments: tuple[str, ...], features: str) -> None:
        self.name = name
        self.program = ir.Module(name)
        self.program.triple = llvm.get_process_triple()
        self.features = features
        self.names = arguments
        signature = ir.FunctionType(ir.VoidType(), [I64.as_pointer(), I64, I64])
        function = ir.Function(self.program, signature, "run")
        super().__init__(function.append_basic_block())
        values, self.thread, self.num_threads = function.args
        self.argument = {name: self.load(self.gep(values, [I64(i)])) for i, name in enumerate(arguments)}

    # --- control

    @contextmanager
    def loop(self, start: Value, stop: Value, step: Value | int = 1) -> Iterator[Value]:
        """Writes the loop `for i in range(start, stop, step)` around the code that the caller writes."""
        step = I64(step) if isinstance(step, int) else step
        before = self.block
        head, body, after = (self.append_basic_block(name) for name in ("head", "body", "after"))
        self.branch(head)
        self.position_at_end(head)
        index = self.phi(I64)
        index.add_incoming(start, before)
        self.cbranch(self.icmp_signed("<", index, stop), body, after)
        self.position_at_end(body)
        yield index
        index.add_incoming(self.add(index, step), self.block)
        self.branch(head)
        self.position_at_end(after)

    @contextmanager
    def share(self, count: Value) -> Iterator[Value]:
        """Writes the loop over this thread's part of range(count)."""
        first = self.sdiv(self.mul(count, self.thread), self.num_threads)
        last = self.sdiv(self.mul(count, self.add(self.thread, I64(1))), self.num_threads)
        with self.loop(first, last) as index:
            yield index

    # --- memory

    def address(self, base: Value, index: Value, size: int) -> Value:
        """Returns the address of element `index` of an array at `base` whose elements have `size` bytes."""
        return self.add(base, self.mul(index, I64(size)))

    def read(self, type_: Value, address: Value, align: int = 1) -> Value:
        return self.load(self.inttoptr(address, type_.as_pointer()), align=align)

    def write(self, value: Value, address: Value, align: int = 1) -> None:
        self.store(value, self.inttoptr(address, value.type.as_pointer()), align=align)

    def compress(self, value: Value, flags: Value, address: Value) -> None:
        """Writes the lanes whose flag is set, of 16 lanes of 32 bits, one after the other."""
        pointer = self.inttoptr(address, value.type.element.as_pointer())
        suffix = "f32" if value.type == FLOATS else "i32"
        self.intrinsic(f"llvm.masked.compressstore.v16{suffix}", ir.VoidType(), value, pointer, flags)

    def read_floats(self, dtype: torch.dtype, address: Value, count: int = LANES) -> Value:
        """Reads a vector of `dtype` and converts it to float32."""
        if dtype == torch.float32:
            return self.read(vector(F32, count), address)
        if dtype == torch.float16:
            return self.fpext(self.read(vector(F16, count), address), vector(F32, count))
        if dtype == torch.int8:
            whole = self.sext(self.read(vector(I8, count), address), vector(I32, count))
            return self.sitofp(whole, vector(F32, count))
        bits = self.zext(self.read(vector(I16, count), address), vector(I32, count))
        return self.bitcast(self.shl(bits, constant(bits.type, 16)), vector(F32, count))

    def read_float(self, dtype: torch.dtype, address: Value) -> Value:
        """Reads one number of `dtype`, float32 or bfloat16, as a float32."""
        if dtype == torch.float32:
            return self.read(F32, address)
        return self.bitcast(self.shl(self.zext(self.read(I16, address), I32), I32(16)), F32)

    def write_floats(self, value: Value, dtype: torch.dtype, address: Value) -> None:
        """Rounds floats to `dtype`, to nearest, ties to even, and writes them. A bfloat16 is a float32's upper half."""
        if dtype == torch.bfloat16:
            bits = self.bitcast(value, INTS)
            odd = self.and_(self.lshr(bits, constant(INTS, 16)), constant(INTS, 1))
            bits = self.add(bits, self.add(odd, constant(INTS, 0x7FFF)))
            value = self.trunc(self.lshr(bits, constant(INTS, 16)), vector(I16))
        elif dtype == torch.float16:
            value = self.fptrunc(value, vector(F16))
        self.write(value, address)

    def variable(self, initial: Value) -> "Variable":
        """Returns a variable that loops can change; the compiler keeps it in a register."""
        return Variable(self, initial)

    def scratch(self, num_vectors: int) -> Value:
        """Reserves float vectors on the thread's stack and gives their address. Call it outside of loops."""
        memory = self.alloca(FLOATS, num_vectors)
        memory.align = 64
        return self.ptrtoint(memory, I64)

    # --- arithmetic

    def smaller(self, a: Value, b: Value) -> Value:
        return self.select(self.icmp_signed("<", a, b), a, b)

    def larger(self, a: Value, b: Value) -> Value:
        return self.select(self.icmp_signed("<", a, b), b, a)

    def splat(self, value: Value, count: int = LANES) -> Value:
        """Returns a vector with the scalar `value` in every lane."""
        empty = ir.Constant(vector(value.type, count), ir.Undefined)
        one = self.insert_element(empty, value, I32(0))
        return self.shuffle_vector(one, empty, constant(vector(I32, count), 0))

    def intrinsic(self, name: str, result: Value, *arguments: Value) -> Value:
        """Calls LLVM's own function of that name: https://llvm.org/docs/LangRef.html#intrinsic-functions."""
        function = self.program.globals.get(name)
        if function is None:
            function = ir.Function(self.program, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.call(function, list(arguments))

    def fused(self, a: Value, b: Value, c: Value) -> Value:
        """Computes a * b + c with one rounding."""
        return self.intrinsic(f"llvm.fma.{_suffix(c.type)}", c.type, a, b, c)

    def prefetch(self, address: Value) -> None:
        """Asks the processor to read the line of memory into all levels of its cache."""
        pointer = self.inttoptr(address, I8.as_pointer())
        self.intrinsic("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(3), I32(1))

    def total(self, value: Value) -> Value:
        """Returns the sum of a vector's floats, in any order."""
        name = f"llvm.vector.reduce.fadd.{_suffix(value.type)}"
        function = self.program.globals.get(name)
        if function is None:
            function = ir.Function(self.program, ir.FunctionType(F32, [F32, value.type]), name)
        return self.call(function, [F32(0.0), value], fastmath=("reassoc",))

    def round(self, x: Value, scale: Value) -> tuple[Value, Value]:
        """Rounds x * scale, within 2**22, to the nearest integer, as floats and as integers. NaN gives any number."""
        shift = constant(FLOATS, 1.5 * 2**23)  # leaves no bits behind the point, and the integer in the lowest ones
        shifted = self.fused(x, scale, shift)
        return self.fsub(shifted, shift), self.sub(self.bitcast(shifted, INTS), constant(INTS, 0x4B400000))

    def exp(self, x: Value) -> Value:
        """Computes e**x of a vector of 16 to about one unit in the last place; 0 below -87; NaN stays NaN.

        e**x = 2**n * e**r with |r| <= ln 2 / 2, and e**r by the polynomial of Cephes' expf,
        https://www.netlib.org/cephes.
        """
        high, low = constant(FLOATS, 88.0), constant(FLOATS, -87.0)
        underflows = self.fcmp_ordered("<", x, low)
        x = self.select(self.fcmp_ordered(">", x, high), high, x)
        x = self.select(underflows, low, x)
        n, exponent = self.round(x, constant(FLOATS, 1.4426950408889634))
        r = self.fused(n, constant(FLOATS, -0.693359375), x)
        r = self.fused(n, constant(FLOATS, 2.12194440e-4), r)
        y = constant(FLOATS, 1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0):
            y = self.fused(y, r, constant(FLOATS, c))
        scale = self.bitcast(self.shl(self.add(exponent, constant(INTS, 127)), constant(INTS, 23)), FLOATS)
        return self.select(underflows, constant(FLOATS, 0.0), self.fmul(y, scale))

    def exp2(self, x: Value) -> Value:
        """Computes 2**x of a vector of 16 with a relative error of 1e-4, as bfloat16 needs; NaN stays NaN. The CPU must
        have AVX512-DQ.

        2**x = 2**floor(x) * 2**r with r from 0 to 1, and 2**r by its polynomial of degree 3 with the least relative
        error (Remez).
        """
        every, down = ir.IntType(16)(-1), I32(9)  # all lanes; x - floor(x), without exceptions
        r = self.intrinsic("llvm.x86.avx512.mask.reduce.ps.512", FLOATS, x, down, x, every, I32(4))
        y = constant(FLOATS, EXP2[0])
        for c in EXP2[1:]:
            y = self.fused(y, r, constant(FLOATS, c))
        return self.intrinsic("llvm.x86.avx512.mask.scalef.ps.512", FLOATS, y, x, y, every, I32(4))

    def pack_bfloat16(self, low: Value, high: Value) -> Value:
        """Rounds two vectors of floats to bfloat16, one after the other: a vector of 16 integers."""
        packed = self.intrinsic("llvm.x86.avx512bf16.cvtne2ps2bf16.512", PAIRS, high, low)
        return self.bitcast(packed, INTS)

    def largest(self, value: Value) -> Value:
        """Returns the largest of a vector's floats; NaN are ignored where there are others."""
        return self.intrinsic("llvm.vector.reduce.fmax.v16f32", F32, value)

    def sigmoid(self, x: Value) -> Value:
        one = constant(FLOATS, 1.0)
        return self.fdiv(one, self.fadd(one, self.exp(self.fneg(x))))

    def sigmoid_bfloat16(self, x: Value) -> Value:
        """Computes `sigmoid` with a relative error of 2e-4, as bfloat16 needs. The CPU must have AVX512-DQ."""
        e = self.exp2(self.fmul(x, constant(FLOATS, -1.4426950408889634)))
        e, every = self.fadd(e, constant(FLOATS, 1.0)), ir.IntType(16)(-1)
        return self.intrinsic("llvm.x86.avx512.rcp14.ps.512", FLOATS, e, e, every)

    def look_up(self, table: Sequence[int], index: Value) -> Value:
        """Returns table[i] for each i of 64 bytes, all less than 16. table: 16 bytes."""
        if "+avx512bw" in self.features:
            return self.intrinsic("llvm.x86.avx512.pshuf.b.512", BYTES, ir.Constant(BYTES, [*table] * 4), index)
        if "+avx2" in self.features:
            half = vector(I8, 32)
            lanes = [ir.Constant(vector(I32, 32), list(range(first, first + 32))) for first in (0, 32)]
            parts = [self.shuffle_vector(index, index, places) for places in lanes]
            found = [
                self.intrinsic("llvm.x86.avx2.pshuf.b", half, ir.Constant(half, [*table] * 2), part) for part in parts
            ]
            return self.shuffle_vector(*found, ir.Constant(vector(I32, 64), list(range(64))))
        numbers = [constant(BYTES, number) for number in table]
        for bit in range(4):  # on any processor: each bit of the index halves what is left of the table
            is_set = self.icmp_unsigned("!=", self.and_(index, constant(BYTES, 1 << bit)), constant(BYTES, 0))
            pairs = zip(numbers[::2], numbers[1::2], strict=True)
            numbers = [self.select(is_set, odd, even) for even, odd in pairs]
        return numbers[0]

    def dot4(self, sums: Value, unsigned: Value, signed: Value) -> Value:
        """Adds to each of 16 lanes the products of its 4 unsigned and 4 signed bytes."""
        if "+avx512vnni" in self.features:
            return self.intrinsic("llvm.x86.avx512.vpdpbusd.512", INTS, sums, unsigned, signed)
        if "+avxvnni" in self.features:
            halves = [self._dot4_half(sums, unsigned, signed, half) for half in (0, 1)]
            return self.shuffle_vector(*halves, ir.Constant(vector(I32), list(range(16))))
        # On any processor: bytes 0 and 2 of a lane, then 1 and 3, as pairs of 16 bits, which LLVM multiplies and adds
        wide, eight = vector(I16, 2 * LANES), constant(vector(I16, 2 * LANES), 8)
        u, s = self.bitcast(unsigned, wide), self.bitcast(signed, wide)
        pairs = (
            (self.and_(u, constant(wide, 255)), self.ashr(self.shl(s, eight), eight)),
            (self.lshr(u, eight), self.ashr(s, eight)),
        )
        for a, b in pairs:
            product = self.mul(self.sext(a, vector(I32, 32)), self.sext(b, vector(I32, 32)))
            for parity in (0, 1):
                every_other = ir.Constant(vector(I32), list(range(parity, 32, 2)))
                sums = self.add(sums, self.shuffle_vector(product, product, every_other))
        return sums

    def dot2(self, sums: Value, a: Value, b: Value) -> Value:
        """Adds to each of 16 lanes the products of its 2 bfloat16 in `a` and `b`, vectors of 16 integers."""
        operands = (self.bitcast(a, PAIRS), self.bitcast(b, PAIRS))
        return self.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, sums, *operands)

    def _dot4_half(self, sums: Value, unsigned: Value, signed: Value, half: int) -> Value:
        lanes = ir.Constant(vector(I32, 8), list(range(8 * half, 8 * half + 8)))
        octets = ir.Constant(vector(I32, 32), list(range(32 * half, 32 * half + 32)))
        parts = (self.shuffle_vector(v, v, at) for v, at in ((sums, lanes), (unsigned, octets), (signed, octets)))
        return self.intrinsic("llvm.x86.avx512.vpdpbusd.256", vector(I32, 8), *parts)


class Variable:
    """A variable of a program under construction; see `Builder.variable`."""

    def __init__(self, b: Builder, initial: Value) -> None:
        self._builder = b
        with b.goto_entry_block():  # only there the compiler turns memory into registers
            self._memory = b.alloca(initial.type)
        self.set(initial)

    def set(self, value: Value) -> None:
        self._builder.store(value, self._memory)

    def get(self) -> Value:
        return self._builder.load(self._memory)


def constant(type_: Value, value: float) -> Value:
    """Returns a vector of type `type_` with `value` in every lane."""
    return ir.Constant(type_, [value] * type_.count)


def _suffix(type_: Value) -> str:
    return f"v{type_.count}f32"


# --- compiling and running


@functools.cache
def _openmp() -> ctypes.CDLL | None:
    """Returns the OpenMP library that torch has loaded, if it is GNU's."""
    paths = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    paths += sorted((Path(torch.__file__).parent.parent / "torch.libs").glob("libgomp*"))
    if not paths:
        return None
    library = ctypes.CDLL(str(paths[0]))
    library.GOMP_parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    library.GOMP_parallel.restype = None
    for name in ("omp_get_thread_num", "omp_get_num_threads"):
        llvm.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    return library


def is_available() -> bool:
    """Returns whether programs run well here: Linux, a torch that brings GNU's OpenMP, and on x86 a CPU since 2013 or
    so."""
    return _openmp() is not None and (platform.machine() != "x86_64" or "+avx2" in host()[1])


@functools.cache
def host() -> tuple[str, str]:
    """Returns the CPU's name and its features as LLVM writes them: `+avx2,+avx512vnni,-amx...`."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def features() -> list[str]:
    """Returns the features one by one."""
    return host()[1].split(",")


def has_dot2(features: str) -> bool:
    """Returns whether a CPU with these features multiplies bfloat16 in one instruction."""
    return "+avx512bf16" in features


_engines: list[Any] = []  # compiled code lives as long as these


def compile_program(builder: Builder, cpu: str | None = None) -> Program:
    """Compiles the program for a CPU, this machine's unless named. The result is called with the program's arguments,
    which are integers, and `num_threads`."""
    builder.ret_void()
    _add_parallel_entry(builder.program)
    module = llvm.parse_assembly(str(builder.program))
    module.verify()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=cpu or host()[0], features=builder.features, opt=2
    )
    tuning = llvm.create_pipeline_tuning_options(speed_level=1)
    tuning.loop_unrolling = False  # the programs are unrolled as far as registers reach
    llvm.create_pass_builder(machine, tuning).getModulePassManager().run(
        module, llvm.create_pass_builder(machine, tuning)
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    return _launcher(engine, len(builder.names))


def _add_parallel_entry(module: Value) -> None:
    """Adds the function `parallel(values)`, which each OpenMP thread calls."""
    entry = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), "parallel")
    body = ir.IRBuilder(entry.append_basic_block())
    names = ("omp_get_thread_num", "omp_get_num_threads")
    functions = [ir.Function(module, ir.FunctionType(I32, []), name) for name in names]
    numbers = [body.zext(body.call(function, []), I64) for function in functions]
    body.call(module.get_global("run"), [entry.args[0], *numbers])
    body.ret_void()


def _launcher(engine: Any, num_arguments: int) -> Program:
    library = cast(ctypes.CDLL, _openmp())
    values_type = ctypes.c_int64 * num_arguments
    alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(engine.get_function_address("run"))
    together = engine.get_function_address("parallel")
    in_parallel = library.GOMP_parallel

    def run(*arguments: int, num_threads: int) -> None:
        values = values_type(*arguments)
        if num_threads == 1:
            alone(ctypes.addressof(values), 0, 1)
        else:
            in_parallel(together, ctypes.addressof(values), num_threads, 0)

    return run
