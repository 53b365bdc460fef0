"""Plan: what the attention of prompt chunks computes with on a CPU, and where its data lie."""

from dataclasses import dataclass, replace

import torch

from engine.cpu import amx, jit
from engine.cpu.jit import LANES

KEYS = 256  # in a tile: as many as the first-level cache holds with their values
ROWS = 256  # rows of an item, for which a tile is read once; a row is one head of one query


@dataclass(frozen=True)
class Plan:
    """What a program computes with, and where an item's data lie in the scratch memory of its thread."""

    dtype: torch.dtype  # of the queries and, if that is not int8, of the cache
    dim: int
    pair: int  # 2: bfloat16, of which a lane of 32 bits holds two; 1: float32
    rows: int  # rows of queries times `key_vectors` * 16 keys are computed at once, in registers
    key_vectors: int
    value_rows: int  # rows of queries times `value_vectors` * 16 elements of values
    value_vectors: int
    has_amx: bool = False
    is_int8: bool = False  # the cache

    @classmethod
    def of(cls, dtype: torch.dtype, dim: int, has_amx: bool, is_int8: bool = False) -> "Plan":
        return replace(cls._of(dtype, dim, has_amx), is_int8=is_int8)

    @classmethod
    def _of(cls, dtype: torch.dtype, dim: int, has_amx: bool) -> "Plan":
        features = jit.host()[1]
        pair = 2 if dtype == torch.bfloat16 and "+avx512bf16" in features else 1
        if has_amx and pair == 2 and not dim % (2 * LANES):  # whole tiles
            return cls(
                dtype=dtype,
                dim=dim,
                pair=2,
                rows=amx.ROWS,
                key_vectors=2,
                value_rows=amx.ROWS,
                value_vectors=4,
                has_amx=True,
            )
        if "+avx512f" in features:  # 32 registers of 16 lanes
            return cls(dtype=dtype, dim=dim, pair=pair, rows=8, key_vectors=2, value_rows=4, value_vectors=4)
        return cls(dtype=dtype, dim=dim, pair=pair, rows=4, key_vectors=1, value_rows=4, value_vectors=1)

    @property
    def stored(self) -> torch.dtype:
        """The type of keys and values in the cache."""
        return torch.int8 if self.is_int8 else self.dtype

    @property
    def width(self) -> int:
        """Lanes of 32 bits in a head."""
        return self.dim // self.pair

    @property
    def sizes(self) -> dict[str, int]:
        """The bytes of each part of the scratch memory."""
        return {
            "queries": 4 * ROWS * self.width,  # (ROWS, width)
            "keys": 4 * self.width * KEYS,  # (width, KEYS): keys side by side
            "values": 4 * KEYS // self.pair * self.dim,  # (KEYS / pair, dim)
            "scores": 4 * self.rows * KEYS,  # (rows, KEYS), then the weights in the same place
            "factors": 64 * self.rows,  # (rows, 16): by which earlier sums are multiplied
            "sums": 4 * ROWS * self.dim,  # (ROWS, dim)
            "best": 64 * ROWS,  # (ROWS, 16): the largest score so far, in every lane
            "total": 64 * ROWS,  # (ROWS, 16): the sum of the weights so far, lane by lane
            "ranges": 16 * ROWS,  # (ROWS, 2)
            "key_scales": 4 * KEYS * self.is_int8,  # (KEYS,)
            "value_scales": 4 * KEYS * self.is_int8,
        }

    @property
    def num_bytes(self) -> int:
        return sum(self.sizes.values())
