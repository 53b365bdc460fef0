"""The kernel in Triton computes what its reference does: on a GPU where there is one, else in Triton's interpreter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from devices import DEVICE
from models import tiny_model
from test_flash_attention import answers, engine_with

from engine.attention import flash
from engine.attention.flash import Trial
from engine.layer_spec import AttentionSpec

pytest.importorskip("triton", reason="Triton is not installed; torch's builds for CUDA bring it")

PLAIN = AttentionSpec(2, 32, 32, None, torch.float32, DEVICE)
MIXED = ([1, 20, 7, 1], [1, 33, 40, 32])  # queries, and tokens, of each sequence
ERRORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # of the result's norm


def error(
    spec: AttentionSpec, counts: list[int], lengths: list[int], block_size: int = 16, num_parts: int | None = None
) -> float:
    """How far the kernel is from its reference, of the result's norm."""
    return difference(Trial.of(spec, block_size, counts, lengths), num_parts)


def difference(trial: Trial, num_parts: int | None = None) -> float:
    from engine.attention import paged_triton

    def kernel(*arguments: Any, **options: Any) -> torch.Tensor:
        return paged_triton.paged_attention(*arguments, **options, num_parts=num_parts)

    expected, actual = trial.run(flash.reference).float(), trial.run(kernel).float()
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256, 512])
@pytest.mark.parametrize(("num_kv_heads", "group"), [(2, 1), (1, 4), (1, 7), (1, 8), (1, 20)])
@pytest.mark.parametrize(("counts", "lengths"), [([1, 1], [1, 37]), ([3, 1], [30, 17])], ids=["decodes", "chunks"])
def test_heads_of_every_size_and_grouping(
    dim: int, num_kv_heads: int, group: int, counts: list[int], lengths: list[int]
) -> None:
    assert (
        error(AttentionSpec(num_kv_heads, dim, dim, None, torch.float32, DEVICE, None, group), counts, lengths) < 1e-5
    )


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize(("counts", "lengths"), [([1, 1], [1, 137]), MIXED], ids=["decodes", "chunks"])
def test_every_type_of_numbers(dtype: torch.dtype, counts: list[int], lengths: list[int]) -> None:
    assert error(replace(PLAIN, dtype=dtype), counts, lengths) < ERRORS[dtype]


@pytest.mark.parametrize("window", [None, 1, 5, 16, 17, 200])
@pytest.mark.parametrize("block_size", [16, 48, 256])
@pytest.mark.parametrize(
    ("counts", "lengths"), [([1, 1, 1], [1, 37, 300]), MIXED, ([150], [290])], ids=["decodes", "mixed", "chunk"]
)
def test_windows_and_blocks(window: int | None, block_size: int, counts: list[int], lengths: list[int]) -> None:
    assert error(replace(PLAIN, window=window), counts, lengths, block_size) < 1e-5


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("count", [1, 2, 1000])
def test_lengths_at_the_edges_of_blocks_and_passes(length: int, count: int) -> None:
    assert error(PLAIN, [min(count, length)], [length]) < 1e-5


@pytest.mark.parametrize("num_parts", [2, 11])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("counts", "lengths"), [([1, 1], [700, 3]), ([1, 9, 70], [130, 9, 300])], ids=["1", "many"])
def test_keys_in_parts(num_parts: int, window: int | None, counts: list[int], lengths: list[int]) -> None:
    """Also where there are fewer passes than parts, and where a query sees nothing of a part."""
    assert error(replace(PLAIN, window=window), counts, lengths, num_parts=num_parts) < 1e-5


@pytest.mark.parametrize("num_parts", [1, 3])
def test_soft_caps_and_values_of_another_size(num_parts: int) -> None:
    capped = replace(PLAIN, softcap=2.0)
    for spec in (capped, replace(PLAIN, softcap=50.0, window=20), replace(PLAIN, key_dim=48, value_dim=24)):
        assert error(spec, *MIXED, num_parts=num_parts) < 1e-5
        assert error(spec, [1, 1], [1, 300], num_parts=num_parts) < 1e-5
    assert difference(Trial.of(capped, 16, *MIXED)) < 1e-5 < _distance(capped, PLAIN)


def _distance(spec: AttentionSpec, other: AttentionSpec) -> float:
    first, second = (Trial.of(s, 16, *MIXED).run(flash.reference) for s in (spec, other))
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 16, 5]])
def test_what_lies_behind_the_last_token_is_not_read(counts: list[int]) -> None:
    trial = Trial.of(PLAIN, 16, counts, [2, 20, 37])
    for table, length in zip(trial.batch.block_tables.tolist(), trial.batch.seq_lens.tolist(), strict=True):
        for index, block in enumerate(table):
            for cache in (trial.keys, trial.values):
                cache[block, max(0, length - 16 * index) :] = torch.nan
    assert difference(trial) < 1e-5


@pytest.mark.parametrize(("counts", "lengths"), [([1, 1], [1, 37]), MIXED], ids=["decodes", "chunks"])
def test_a_query_may_lie_with_its_heads_first(counts: list[int], lengths: list[int]) -> None:
    """As the models hand it over."""
    trial = Trial.of(PLAIN, 16, counts, lengths)
    assert difference(replace(trial, query=trial.query.transpose(0, 1).contiguous().transpose(0, 1))) < 1e-5


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs a model on the CPU, and so the interpreter")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_model_gives_the_same_tokens(graphs: bool) -> None:
    """Prefixes in common, chunks beside decodes, windows that blocks have left; recorded with idle rows."""
    from engine.attention.paged_triton import paged_attention

    model = tiny_model("gemma3", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])
    expected = answers(engine_with(model, None), 3, 12)
    assert answers(engine_with(model, paged_attention, graphs), 3, 12) == expected


def test_parts_fill_the_device_and_are_not_too_short() -> None:
    from engine.attention.paged_triton import parts_of

    assert parts_of(8, 32768, 132) * 8 >= 2 * 132
    assert parts_of(4096, 32768, 132) == 1
    assert parts_of(8, 200, 132) == 1
    assert 1 <= parts_of(1, 2**20, 132) <= 64


def test_the_start_accepts_it() -> None:
    from engine.attention.paged_triton import paged_attention

    for spec in (PLAIN, replace(PLAIN, window=20, dtype=torch.bfloat16), replace(PLAIN, softcap=5.0, group=1)):
        assert flash.agrees(paged_attention, spec, 16)
