"""Products with packed weights on GPUs, y = x W^T + b, by kernels in Triton that dequantise in registers.

For a token or two a program multiplies a few rows of the weight number by number: reading the weight takes all the
time. For more tokens a program takes a tile of tokens and one of rows, and the tensor cores multiply them; where there
are too few tiles to fill the device, the columns are divided into parts, which a second kernel adds up. For a long
prompt that would dequantise a weight many times: so it is dequantised once, some rows at a time, and torch multiplies.
From how many tokens on each way is the faster one is measured at the start, see product_limits.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from engine.cpu.packed_weight import SUPER_BLOCK
from engine.gpu.packed_weight import GPUWeight, groups_of
from engine.gpu.product_kernels import dequantise_kernel, numbers_kernel, tiles_kernel, total_kernel
from engine.gpu.triton_tools import IS_INTERPRETED, num_processors, on_its_device, precision, widens

DEQUANTISED = 2**26  # numbers of a weight that are dequantised at a time
MAX_PARTS = 16
PROGRAMS_PER_PROCESSOR = 2  # columns are divided into parts until there are so many
FEWEST_PASSES = 4  # of a part
INTERPRETED_ROWS = 512


@dataclass(frozen=True)
class Tiles:
    """What one program computes."""

    tokens: int
    rows: int
    depth: int  # columns that are multiplied at a time, in whole groups
    warps: int = 4
    stages: int = 3  # passes whose weights are loaded ahead
    most_groups: int = 8  # of a chunk: what more of them need does not fit into the registers


# Their state is in registers, as ptxas says for compute capability 8.0 and 9.0; see tests/test_triton_compiles.py
ONE_TOKEN = Tiles(tokens=1, rows=4, depth=512)
SEVERAL_TOKENS = (  # the first one that holds all tokens, else the last
    Tiles(tokens=16, rows=32, depth=64),
    Tiles(tokens=32, rows=64, depth=32),
    Tiles(tokens=64, rows=64, depth=32, warps=8, most_groups=2),
)
DEQUANTISING = Tiles(tokens=1, rows=8, depth=128)


@on_its_device
def multiply_numbers(
    x: torch.Tensor,
    weight: GPUWeight,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    tiles: Tiles | None = None,
) -> None:
    """Computes a product number by number. x: (tokens, columns); output: (tokens, rows), whose rows may be apart."""
    tiles = tiles or _usual(ONE_TOKEN)
    numbers_kernel[triton.cdiv(weight.num_rows, tiles.rows), len(x)](  # the first of a grid's sizes may be the largest
        *(x, output, bias, *_tensors(weight), weight.num_rows, weight.num_columns, weight.num_chunks),
        *(x.stride(0), output.stride(0)),
        ROWS=tiles.rows,
        CHUNKS=_chunks(weight, tiles),
        **_meaning(weight),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


@on_its_device
def multiply_tiles(
    x: torch.Tensor,
    weight: GPUWeight,
    bias: torch.Tensor | None,
    output: torch.Tensor,
    starts: torch.Tensor | None = None,
    num_parts: int | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Computes a product by tiles, as `multiply_numbers`.

    starts: (experts + 1,) int32, where the tokens of each expert begin; the weight then has the rows of all experts,
    and the output those of one. num_parts: the number of parts that the columns are divided into; None: as many as fill
    the device. tiles: None chooses them by the number of tokens.
    """
    num_experts = 1 if starts is None else len(starts) - 1
    num_rows = weight.num_rows // num_experts
    tiles = tiles or _usual(tiles_for(weight, -(-len(x) // num_experts)))
    chunks = _chunks(weight, tiles)
    grid = len(x) // tiles.tokens + num_experts, triton.cdiv(num_rows, tiles.rows)
    num_passes = triton.cdiv(weight.num_chunks, chunks)
    if num_parts is None:
        num_parts = parts_of(min(grid[0], len(x)) * grid[1], num_passes, num_processors(x.device))
    partial = output
    if num_parts > 1:
        partial = torch.empty(num_parts, len(x), num_rows, dtype=torch.float32, device=x.device)
    tiles_kernel[(*grid, num_parts)](
        *(x, partial, bias if num_parts == 1 else None, *_tensors(weight), starts),
        *(num_rows, weight.num_columns, weight.num_chunks, len(x), num_experts, triton.cdiv(num_passes, num_parts)),
        *(x.stride(0), partial.stride(-2), partial.stride(0) if num_parts > 1 else 0),
        TOKENS=tiles.tokens,
        ROWS=tiles.rows,
        CHUNKS=chunks,
        PRECISION=precision(x.device),
        WIDENS=widens(x.dtype),
        **_meaning(weight),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if num_parts > 1:
        size = 256
        total_kernel[len(x), triton.cdiv(num_rows, size)](
            *(partial, output, bias, num_parts, len(x), num_rows, output.stride(0)), SIZE=size
        )


@on_its_device
def multiply_dequantised(x: torch.Tensor, weight: GPUWeight, bias: torch.Tensor | None, output: torch.Tensor) -> None:
    """Computes a product as `multiply_numbers`, by torch."""
    for start, part in _dequantised_parts(weight, x.dtype):
        rows = slice(start, start + len(part))
        if bias is None:
            torch.mm(x, part.T, out=output[:, rows])
        else:
            torch.addmm(bias[rows], x, part.T, out=output[:, rows])


def dequantised(weight: GPUWeight, dtype: torch.dtype, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the numbers of a weight, (rows, columns) of `dtype`. ids: (any,), the rows that are wanted; None: all."""
    num_rows = weight.num_rows if ids is None else len(ids)
    output = torch.empty(num_rows, weight.num_columns, dtype=dtype, device=weight.quants.device)
    _dequantise(output, weight, ids)
    return output


@on_its_device
def _dequantise(output: torch.Tensor, weight: GPUWeight, ids: torch.Tensor | None) -> None:
    num_rows, tiles = len(output), _usual(DEQUANTISING)
    chunks = _chunks(weight, tiles)
    dequantise_kernel[triton.cdiv(num_rows, tiles.rows), triton.cdiv(weight.num_chunks, chunks)](
        *(output, ids, *_tensors(weight), num_rows, weight.num_columns, weight.num_chunks),
        ROWS=tiles.rows,
        CHUNKS=chunks,
        **_meaning(weight),
        num_warps=tiles.warps,
    )


def tiles_for(weight: GPUWeight, num_tokens: int) -> Tiles:
    """Returns the tiles for so many tokens."""
    able = [tiles for tiles in SEVERAL_TOKENS if groups_of(weight.format) <= tiles.most_groups]
    return next((tiles for tiles in able if tiles.tokens >= num_tokens), able[-1])


def _usual(tiles: Tiles) -> Tiles:
    """Returns what a device takes: Triton's interpreter few large programs, which take it as long as small ones."""
    return replace(tiles, rows=INTERPRETED_ROWS) if IS_INTERPRETED else tiles


def parts_of(num_programs: int, num_passes: int, num_processors: int) -> int:
    """Returns the number of parts that fills the device, of at least FEWEST_PASSES passes each."""
    enough = PROGRAMS_PER_PROCESSOR * num_processors // num_programs
    return max(1, min(enough, num_passes // FEWEST_PASSES, MAX_PARTS))


def _dequantised_parts(weight: GPUWeight, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    step = max(1, DEQUANTISED // weight.num_columns)
    for start in range(0, weight.num_rows, step):
        yield start, dequantised(weight.rows(start, min(start + step, weight.num_rows)), dtype)


def _tensors(weight: GPUWeight) -> tuple[torch.Tensor | None, ...]:
    return weight.quants, weight.scales, weight.minimums, weight.supers, weight.table


def _chunks(weight: GPUWeight, tiles: Tiles) -> int:
    """Returns the chunks of a pass; a power of two."""
    most = triton.next_power_of_2(weight.num_chunks)
    return int(max(1, min(tiles.depth // weight.format.group, most)))


def _meaning(weight: GPUWeight) -> dict[str, Any]:
    """Returns what the kernels are compiled for: how codes are stored, and what they mean."""
    fmt = weight.format
    return {
        "BITS": fmt.bits,
        "GROUPS": groups_of(fmt),
        "GROUP": fmt.group,
        "SHARED": weight.groups_per_scale,
        "OFFSET": fmt.offset,
        "SUPERS": 0 if weight.supers is None else weight.supers.shape[2],
        "PER_SUPER": SUPER_BLOCK // fmt.group,
        "HAS_MINIMUM": fmt.has_minimum,
        "HAS_TABLE": bool(fmt.table),
        "IS_FLOAT": fmt.is_float,
    }
