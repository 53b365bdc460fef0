"""Compiles the kernels in Triton for GPUs that need not be there: `python tests/compile_for_gpus.py`.

The interpreter takes some programs that the compiler refuses, and knows no shared memory."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.attention import paged_triton
from engine.gpu import triton_layers

UNSPECIALIZED = ("starts", "lengths", "tables", "ranges", "table_stride")  # as in the kernel's decorator
OF_ANY_TYPE = ("query", "keys", "values", "output", "joined", "cosines", "sines")
TYPES = {"starts": "*i32", "lengths": "*i32", "tables": "*i32", "ranges": "*i32", "slots": "*i64", "sinks": "*bf16"}
FLOATS = ("factor", "cap_factor", "cap", "query_epsilon", "key_epsilon")
SCALARS = ("window", "num_parts", "num_tokens", "num_sequences", "num_heads", "num_kv_heads")


def shared_memory(kernel: Any, constants: dict[str, Any], capability: int, number: str, **options: int) -> int:
    """Compiles a kernel for an int8 cache. Returns the bytes of shared memory that a program takes.

    number: the type of queries, as Triton names it. Raises what the compiler raises.
    """
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else _type_of(name, number) for name in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(names)
        if (signature[name][0] == "*" or name.endswith("stride")) and name not in UNSPECIALIZED
    }
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return int(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared)


def _type_of(name: str, number: str) -> str:
    if name in FLOATS:
        return "fp32"
    if name in SCALARS or name.endswith("stride"):
        return "i32"
    if name in ("keys", "values"):
        return "*i8"
    if name.endswith("_scales"):
        return "*bf16"
    return f"*{number}" if name in OF_ANY_TYPE else TYPES.get(name, "*fp32")


def attention(capability: int, number: str, num_bytes: int, dim: int, is_decode: bool) -> int:
    """Compiles attention with all that it can have. Returns its shared memory in bytes."""
    group = 4
    choose = paged_triton.tiles_of if capability >= 80 else paged_triton.small_tiles_of
    tiles = choose(dim, num_bytes, is_decode, group)
    sizes = {"KEY_DIM": dim, "KEY_PAD": dim, "VALUE_DIM": dim, "VALUE_PAD": dim, "BLOCK_SIZE": 16, "GROUP": group}
    parts = {"ROWS": tiles.rows, "QUERIES": tiles.rows // group, "KEYS": tiles.keys, "IS_DECODE": is_decode}
    kinds = {"HAS_CAP": True, "HAS_SCALES": True, "HAS_RANGES": True, "HAS_SINKS": True, "WIDENS": False}
    constants = sizes | parts | kinds | {"PRECISION": "tf32x3" if capability >= 80 else "ieee"}
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return shared_memory(paged_triton._attend, constants, capability, number, **options)


def main() -> None:
    for capability, number, num_bytes in ((75, "fp16", 2), (80, "bf16", 2), (90, "bf16", 2), (80, "fp32", 4)):
        print(attention(capability, number, num_bytes, dim=128, is_decode=False))
    places = {"DIM": 64, "HAS_NORMS": True, "IS_INT8": True, "LARGEST": 127.0, "SMALLEST": 1e-37}
    print(shared_memory(triton_layers._place, places, 80, "bf16", num_warps=1))


if __name__ == "__main__":
    main()
