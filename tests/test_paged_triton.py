"""The kernel in Triton computes what its reference does: on a GPU where there is one, else in Triton's interpreter."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import test_int8_cache
import test_vision
import torch
from devices import DEVICE
from models import tiny_model
from test_engine import reference
from test_flash_attention import OPTIONS, answers, engine_with

from engine.attention import flash, older_gpus
from engine.attention.flash import Trial
from engine.build import build_engine
from engine.layer_spec import AttentionSpec
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

pytest.importorskip("triton", reason="Triton is not installed; torch's builds for CUDA bring it")

PLAIN = AttentionSpec(2, 32, 32, None, torch.float32, DEVICE)
MIXED = ([1, 20, 7, 1], [1, 33, 40, 32])  # queries, and tokens, of each sequence
INT8 = replace(PLAIN, key_factors=())
SINKS = replace(PLAIN, has_sinks=True)
ALL = replace(PLAIN, key_factors=(), has_sinks=True, window=20, softcap=3.0)
DECODES = ([1, 1, 1], [1, 37, 300])
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


@pytest.mark.thinned(3)
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


@pytest.mark.thinned(3)
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


@pytest.mark.thinned(2)
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


# --- int8 caches, sinks, and images whose tokens see each other


@pytest.mark.thinned(4)
@pytest.mark.parametrize("num_parts", [1, 2, 11])
@pytest.mark.parametrize("window", [None, 1, 17, 200])
@pytest.mark.parametrize(
    "spec", [INT8, SINKS, replace(INT8, has_sinks=True), ALL], ids=["int8", "sinks", "both", "all"]
)
@pytest.mark.parametrize(("counts", "lengths"), [DECODES, MIXED, ([150], [290])], ids=["decodes", "mixed", "chunk"])
def test_int8_caches_and_sinks(
    spec: AttentionSpec, window: int | None, counts: list[int], lengths: list[int], num_parts: int
) -> None:
    assert error(replace(spec, window=window), counts, lengths, num_parts=num_parts) < 1e-5


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dim", [16, 64, 80, 256, 512])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize(("counts", "lengths"), [([1, 1], [1, 37]), ([3, 1], [30, 17])], ids=["decodes", "chunks"])
def test_int8_heads_of_every_size_and_grouping(dim: int, group: int, counts: list[int], lengths: list[int]) -> None:
    assert error(replace(ALL, key_dim=dim, value_dim=dim, group=group), counts, lengths) < 1e-5


@pytest.mark.thinned(2)
@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("spec", [INT8, SINKS, ALL], ids=["int8", "sinks", "all"])
@pytest.mark.parametrize(("counts", "lengths"), [DECODES, MIXED], ids=["decodes", "chunks"])
def test_int8_caches_and_sinks_in_every_type(
    dtype: torch.dtype, spec: AttentionSpec, counts: list[int], lengths: list[int]
) -> None:
    assert error(replace(spec, dtype=dtype), counts, lengths) < ERRORS[dtype]
    assert difference(Trial.of(replace(spec, dtype=dtype), 16, [1, 70], [40, 90]).with_image(1, 30, 75)) < ERRORS[dtype]


@pytest.mark.parametrize("spec", [INT8, SINKS], ids=["int8", "sinks"])
def test_int8_caches_and_sinks_change_the_result(spec: AttentionSpec) -> None:
    """So that the comparisons can fail."""
    assert _distance(PLAIN, spec) > 1e-3


def test_small_values_of_an_int8_cache_are_not_lost_in_float16() -> None:
    """Their scales, times the weights of many keys, are smaller than float16's numbers."""
    trial = Trial.of(replace(INT8, dtype=torch.float16), 16, [1, 5], [700, 700])
    assert trial.scales is not None
    trial.scales[1].mul_(2.0**-12)
    expected, actual = trial.run(flash.reference).float(), _kernel(trial).float()
    assert (actual - expected).norm() < 2e-2 * expected.norm(), "the result itself has few bits"


def _kernel(trial: Trial) -> torch.Tensor:
    from engine.attention.paged_triton import paged_attention

    return trial.run(paged_attention)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("start", "end"), [(140, 141), (141, 160), (143, 209), (150, 280), (160, 176), (192, 256), (270, 290)]
)
@pytest.mark.parametrize("window", [None, 5, 40])
@pytest.mark.parametrize("reaches_back", [True, False])
@pytest.mark.parametrize("block_size", [16, 48])
def test_images_over_the_edges_of_tiles_and_blocks(
    start: int, end: int, window: int | None, reaches_back: bool, block_size: int
) -> None:
    """Also where its tokens see what is before their window, or only what follows."""
    spec = replace(PLAIN, window=window)
    trial = Trial.of(spec, block_size, [150], [290])
    assert difference(trial.with_image(0, start, end, reaches_back)) < 1e-5


@pytest.mark.thinned(3)
@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("spec", [PLAIN, replace(PLAIN, softcap=2.0, window=20), ALL], ids=["plain", "capped", "all"])
@pytest.mark.parametrize("group", [1, 4])
def test_several_images_beside_decodes(spec: AttentionSpec, group: int, num_parts: int) -> None:
    trial = Trial.of(replace(spec, group=group), 16, [1, 60, 1, 33], [130, 90, 32, 33])
    seen = trial.with_image(1, 31, 50).with_image(1, 50, 88).with_image(3, 0, 33)
    assert difference(seen, num_parts) < 1e-5
    assert difference(replace(trial, batch=replace(trial.batch, visible=trial.ranges)), num_parts) < 1e-5
    plain, sees = trial.run(flash.reference), seen.run(flash.reference)
    assert (plain - sees).norm() > 1e-2 * plain.norm()


@pytest.mark.parametrize("spec", [PLAIN, INT8], ids=["plain", "int8"])
@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 16, 5]])
def test_nothing_behind_the_last_token_is_read_in_an_int8_cache_or_for_an_image(
    spec: AttentionSpec, counts: list[int]
) -> None:
    trial = Trial.of(spec, 16, counts, [2, 20, 37])
    if max(counts) > 1:
        trial = trial.with_image(1, 7, 20).with_image(2, 33, 37)
    for table, length in zip(trial.batch.block_tables.tolist(), trial.batch.seq_lens.tolist(), strict=True):
        for index, block in enumerate(table):
            for part in trial.scales or (trial.keys, trial.values):
                part[block, max(0, length - 16 * index) :] = torch.nan
    assert difference(trial) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("counts", "lengths"), [DECODES, MIXED], ids=["decodes", "chunks"])
def test_tiles_of_older_gpus(dtype: torch.dtype, dim: int, counts: list[int], lengths: list[int]) -> None:
    from engine.attention.paged_triton import paged_attention, small_tiles_of

    def kernel(*arguments: Any, **options: Any) -> torch.Tensor:
        return paged_attention(*arguments, **options, tiles=tiles)

    for spec in (PLAIN, ALL):
        trial = Trial.of(replace(spec, dtype=dtype, key_dim=dim, value_dim=dim), 16, counts, lengths)
        tiles = small_tiles_of(dim, dtype.itemsize, max(counts) == 1, spec.group)
        assert tiles.stages == 1 and max(tiles.rows, tiles.keys) * dim * dtype.itemsize <= 2**14
        expected, actual = trial.run(flash.reference).float(), trial.run(kernel).float()
        assert (actual - expected).norm() < ERRORS[dtype] * expected.norm()


def test_older_gpus_try_the_kernel_in_a_process_of_its_own() -> None:
    """Where it may end the process instead of raising."""
    ends = "import os, signal; os.kill(os.getpid(), signal.SIGABRT)"
    assert not older_gpus.ends_well((sys.executable, "-c", ends))
    assert not older_gpus.ends_well((sys.executable, "-c", "raise RuntimeError"))
    assert not older_gpus.ends_well(("no such program",))
    assert older_gpus.ends_well((sys.executable, "-c", "pass"))
    assert older_gpus.ends_well(older_gpus.trial_of(ALL))
    assert not older_gpus.ends_well(older_gpus.trial_of(replace(PLAIN, dtype=torch.int32)))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs a model on the CPU, and so the interpreter")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_model_with_sinks_gives_the_tokens_of_generate(graphs: bool) -> None:
    from engine.attention.paged_triton import paged_attention

    found = answers(engine_with(tiny_model("gpt_oss"), paged_attention, graphs), 4, 12)
    assert found == answers(engine_with(tiny_model("gpt_oss"), None), 4, 12)
    prompt = [5, 17, 3, 99, 42] * 7
    assert _greedy("gpt_oss", "auto", prompt) == reference("gpt_oss", prompt, 12)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs a model on the CPU, and so the interpreter")
@pytest.mark.parametrize("family", ["gemma3", "qwen3", "gpt_oss"])
def test_a_model_with_an_int8_cache_gives_the_tokens_of_one_that_rounds(family: str) -> None:
    prompt = [5, 17, 3, 99, 42] * 7
    test_int8_cache.check(family, prompt, _greedy(family, "int8", prompt))


def _greedy(family: str, cache: str, prompt: list[int]) -> list[int]:
    from engine.attention.paged_triton import paged_attention

    model = tiny_model(family)
    engine = build_engine(model, replace(OPTIONS, kv_cache_dtype=cache), frozenset())
    engine.runner = ModelRunner(model, engine.scheduler.cache, flash=paged_attention)
    sequence = Sequence(prompt, SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True), lambda output: None)
    engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    return sequence.output_ids


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs a model on the CPU, and so the interpreter")
@pytest.mark.parametrize("name", ["one image", "text between", "across what would be the end of a chunk"])
def test_a_model_that_sees_gives_the_tokens_of_transformers(name: str) -> None:
    from engine.attention.paged_triton import paged_attention

    engine = test_vision.engine_of()
    engine.runner = ModelRunner(engine.runner.model, engine.scheduler.cache, flash=paged_attention)
    assert test_vision.finish(engine, [test_vision.sequence_of(name)]) == [test_vision.expected(name)]


def test_the_start_accepts_it() -> None:
    from engine.attention.paged_triton import paged_attention

    for spec in (PLAIN, replace(PLAIN, window=20, dtype=torch.bfloat16), replace(PLAIN, softcap=5.0, group=1), ALL):
        assert flash.agrees(paged_attention, spec, 16)
        assert flash.agrees(paged_attention, replace(spec, sees_ahead=True), 16)
