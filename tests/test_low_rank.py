"""Low-rank products on the CPU: what torch computes for each row with the matrices of its adapter."""

import pytest
import torch

from engine.cpu import kernels
from engine.cpu.low_rank import (
    PackedMatrices,
    RowGroups,
    addresses_of_a,
    addresses_of_b,
    expand,
    num_tiles,
    shrink,
)

pytestmark = pytest.mark.skipif(not kernels.has_bfloat16(), reason="this CPU does not multiply bfloat16")


def whole(rank: int) -> int:
    return 16 * num_tiles(rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("ranks", [[16], [4, 40, 16], [64, 1]])
def test_each_row_meets_the_matrices_of_its_own_adapter(
    rows: int, ranks: list[int], dtype: torch.dtype, threads: None
) -> None:
    columns, sizes = 96, [32, 16]
    a = [[torch.randn(whole(rank), columns).bfloat16() for _ in sizes] for rank in ranks]
    b = [[torch.randn(size, whole(rank)).bfloat16() for size in sizes] for rank in ranks]
    matrices = [PackedMatrices.of(*pair) for pair in zip(a, b, strict=True)]
    numbers = torch.randint(-1, len(ranks), (rows,))
    x, joined = torch.randn(rows, columns).bfloat16(), torch.randn(rows, sum(sizes) + 16).to(dtype)
    outputs = joined.split([*sizes, 16], dim=1)
    expected, groups = joined.float().clone(), RowGroups(numbers, ranks)
    for row, number in enumerate(numbers.tolist()):
        start = 0
        for layer, size in enumerate(sizes):
            if number >= 0:
                hidden = (x[row].float() @ a[number][layer].float().T).bfloat16().float()
                expected[row, start : start + size] += hidden @ b[number][layer].float().T
            start += size
    before = joined.clone()
    hidden = shrink(x, addresses_of_a(matrices), groups, 2)
    for layer in range(2):
        expand(hidden, addresses_of_b(matrices, layer), outputs[layer], groups, 2, layer)
    torch.testing.assert_close(joined.float(), expected, rtol=0.01, atol=2.0 if dtype == torch.bfloat16 else 1.0)
    assert (joined.float() - expected).norm() < 0.01 * expected.norm() + 1e-3
    assert torch.equal(joined[numbers < 0], before[numbers < 0]) and torch.equal(joined[:, 48:], before[:, 48:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
def test_a_gate_that_is_not_rounded_is_torchs(name: str, dtype: torch.dtype, threads: None) -> None:
    both = torch.randn(7, 192).to(dtype)
    stock = {
        "silu": torch.nn.functional.silu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    gate, up = both.float().chunk(2, dim=-1)
    expected = stock[name](gate) * up
    actual = kernels.gate_unrounded(both, name)
    torch.testing.assert_close(actual.float(), expected, rtol=0.01 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
