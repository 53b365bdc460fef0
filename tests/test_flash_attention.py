"""The GPU's path, as far as it can be shown without one: the same tokens by one call of attention for all sequences,
and by recorded steps. The kernel is stood in for by what it is compared with where there is a GPU."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import _COMMON, FAMILIES, VOCAB, tiny_model
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from engine.attention import flash, paged
from engine.attention.flash import Candidate, Kernel
from engine.build import build_engine
from engine.engine import Engine, EngineOptions
from engine.layer_spec import AttentionSpec
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

OPTIONS = EngineOptions(max_num_batched_tokens=24, max_num_mixed_tokens=24, max_num_seqs=6, kv_block_size=8)


def engine_of(family: str, is_flash: bool, graphs: bool = False, most: int = 6) -> Engine:
    return engine_with(tiny_model(family), flash.reference if is_flash else None, graphs, most)


def engine_with(model: PreTrainedModel, kernel: Kernel | None, graphs: bool = False, most: int = 6) -> Engine:
    engine = build_engine(model, OPTIONS, frozenset())
    if kernel is not None:
        runner = ModelRunner(model, engine.scheduler.cache, flash=kernel)
        if graphs:
            runner.record_graphs(most, engine.max_model_len, record_graph=lambda run: run)
        engine.runner = runner
    return engine


def answers(engine: Engine, count: int = 9, max_tokens: int = 40) -> list[list[int]]:
    """More prompts than run at once, some alike, of very different lengths."""
    rng = random.Random(1)
    common = [rng.randrange(VOCAB) for _ in range(40)]
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    sequences = []
    for number in range(count):
        own = [rng.randrange(VOCAB) for _ in range(rng.choice((1, 7, 60, 130)))]
        sequences.append(Sequence([*common, *own] if number % 2 else own, params, on_output=lambda output: None))
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    return [sequence.output_ids for sequence in sequences]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_for_all_sequences_gives_the_same_tokens(family: str) -> None:
    assert answers(engine_of(family, is_flash=True)) == answers(engine_of(family, is_flash=False))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("most", [6, 3])
def test_recorded_steps_give_the_same_tokens(family: str, most: int) -> None:
    """Also where some steps have more decodes than were recorded."""
    assert answers(engine_of(family, True, True, most)) == answers(engine_of(family, is_flash=False))


@pytest.mark.parametrize("graphs", [False, True])
def test_soft_caps_give_the_same_tokens(graphs: bool) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        **{**_COMMON, "num_hidden_layers": 2, "head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16},
        attn_logit_softcapping=0.5,
    )
    model = Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation(paged.NAME)
    assert answers(engine_with(model, flash.reference, graphs), 3) == answers(engine_with(model, None), 3)


@torch.inference_mode()
def test_a_step_reads_its_inputs_anew_and_idle_rows_write_to_nobodys_block() -> None:
    engine = engine_of("gemma3", True, True)
    tensors = [tensor for layer in engine.scheduler.cache.tensors.values() for tensor in layer]
    for tensor in tensors:
        tensor[:-1] = 7.0
    assert isinstance(engine.runner, ModelRunner) and engine.runner._graphs is not None
    graphs = engine.runner._graphs
    for size in (1, 2, 4):
        graphs._fill([], size)
        graphs._replays[size]()
    assert all((tensor[:-1] == 7.0).all() for tensor in tensors)


def test_a_model_that_cannot_be_recorded_runs_without() -> None:
    engine = engine_of("llama", True)
    assert isinstance(engine.runner, ModelRunner)

    def refuse(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine.runner.record_graphs(4, 100, record_graph=refuse)
    assert answers(engine) == answers(engine_of("llama", is_flash=False))


SPEC = AttentionSpec(2, 32, 32, None, torch.bfloat16, torch.device("cpu"))


@pytest.mark.parametrize("window", [None, 20])
def test_a_kernel_is_compared_before_it_is_used(window: int | None) -> None:
    spec = AttentionSpec(2, 32, 32, window, torch.bfloat16, torch.device("cpu"))

    def causal_to_the_left(*arguments: Any, **options: Any) -> torch.Tensor:
        return flash.reference(*arguments, **{**options, "window_size": (3, 0)})

    def broken(*arguments: object, **options: object) -> torch.Tensor:
        raise RuntimeError("page_block_size must be divisible by 256")

    assert flash.agrees(flash.reference, spec, 16)
    assert not flash.agrees(causal_to_the_left, spec, 16)
    assert not flash.agrees(broken, spec, 16)


def test_without_a_gpu_there_is_no_flash_attention() -> None:
    assert flash.find([SPEC], 16) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("block_size", [16, 256])
def test_torchs_kernel_agrees_or_is_refused(block_size: int) -> None:
    spec = AttentionSpec(8, 128, 128, None, torch.bfloat16, torch.device("cuda"))
    kernel = flash.find([spec], block_size)
    assert kernel is None or flash.agrees(kernel, spec, block_size)


def test_the_faster_one_of_the_kernels_that_agree_is_used() -> None:
    def slow(*arguments: Any, **options: Any) -> torch.Tensor:
        return flash.reference(*arguments, **options)

    def quick(*arguments: Any, **options: Any) -> torch.Tensor:
        return flash.reference(*arguments, **options)

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        return 2 * flash.reference(*arguments, **options)

    def measure(kernel: Kernel, spec: AttentionSpec, block_size: int) -> float:
        return {slow: 2.0, quick: 1.0, wrong: 0.1}[kernel]

    def known(*kernels: Kernel, can_attend: bool = True) -> list[Candidate]:
        return [Candidate(kernel.__name__, kernel, lambda spec: can_attend) for kernel in kernels]

    assert flash.find([SPEC], 16, known(slow, wrong, quick), measure) is quick
    assert flash.find([SPEC], 16, [*known(quick, can_attend=False), *known(slow)], measure) is slow
    assert flash.find([SPEC], 16, known(wrong), measure) is None


def test_a_kernel_without_soft_caps_is_not_used_for_them() -> None:
    def plain(*arguments: Any, scale: float, softcap: None = None, **options: Any) -> torch.Tensor:
        return flash.reference(*arguments, scale=scale, **options)

    capped = replace(SPEC, softcap=1.0)
    assert flash.agrees(plain, SPEC, 16)
    assert not flash.agrees(plain, capped, 16)
    assert flash.agrees(flash.reference, capped, 16)


def test_a_kernel_without_int8_caches_or_sinks_is_not_used_for_them() -> None:
    def plain(*arguments: Any, scale: float, **options: Any) -> torch.Tensor:
        return flash.reference(*arguments, scale=scale, **{**options, "scales": None, "sinks": None})

    on_gpu = replace(SPEC, device=torch.device("cuda"))
    assert flash.is_plain(on_gpu)
    for changes in ({"key_factors": (1.0,) * 64}, {"has_sinks": True}):
        special = replace(SPEC, **changes)
        assert not flash.is_plain(replace(on_gpu, **changes))
        assert flash.agrees(flash.reference, special, 16) and not flash.agrees(plain, special, 16)


def test_a_kernel_that_lets_images_see_too_much_is_refused() -> None:
    def all_alike(*arguments: Any, visible: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        return flash.reference(*arguments, **options)

    seeing = replace(SPEC, sees_ahead=True)
    assert flash.agrees(flash.reference, seeing, 16) and not flash.agrees(all_alike, seeing, 16)
    assert flash.agrees(all_alike, SPEC, 16)


def test_layers_that_differ_in_their_keys_factors_alone_are_tried_once() -> None:
    tried = []

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        tried.append(1)
        return flash.reference(*arguments, **options)

    layers = [replace(SPEC, key_factors=(2.0**n,) * 64) for n in range(5)]
    assert flash.find(layers, 16, [Candidate("counted", counted, lambda spec: True)]) is counted
    assert len(tried) == 2, "chunks and decodes"
