"""Fused layers compute what the stock ones do: on a GPU where there is one, else in Triton's interpreter."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from devices import DEVICE
from lora_files import TinyAdapter, greedy_tokens
from models import FAMILIES, tiny_model
from test_flash_attention import OPTIONS

from engine.async_runner import AsyncRunner
from engine.attention import flash
from engine.build import build_engine, model_runner_of
from engine.engine import Engine
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

pytest.importorskip("triton", reason="Triton is not installed; torch's builds for CUDA bring it")


def engine_of(family: str, is_fused: bool) -> Engine:
    """With one call of attention for all sequences, as a GPU has it."""
    from engine.gpu import triton_layers

    model = tiny_model(family).to(DEVICE)
    if is_fused:
        num_layers = model.config.num_hidden_layers
        without_norms = 2 * num_layers if family in ("qwen2", "llama") else 0
        assert triton_layers.fuse_gpu_layers(model) >= 4 * num_layers + 1 - without_norms
    engine = build_engine(model, OPTIONS, frozenset())
    inner = engine.runner.runner if isinstance(engine.runner, AsyncRunner) else engine.runner
    if DEVICE.type == "cpu":
        assert isinstance(inner, ModelRunner)
        engine.runner = ModelRunner(model, inner.cache, flash=flash.reference)
    return engine


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_give_the_same_tokens(family: str) -> None:
    found = []
    for is_fused in (False, True):
        engine, params = engine_of(family, is_fused), SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
        sequences = [Sequence(prompt, params, lambda output: None) for prompt in ([5, 6, 7, 8, 9], [11])]
        for sequence in sequences:
            engine.scheduler.add(sequence)
        while engine.scheduler.has_work:
            engine.step()
        found.append([sequence.output_ids for sequence in sequences])
    assert found[0] == found[1]


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_fused_layers_apply_the_adapter_of_each_sequence(family: str, tmp_path: Path) -> None:
    stock = tiny_model(family, "eager")
    ends = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    made, engine, prompt = TinyAdapter(stock, ends), engine_of(family, is_fused=True), [5, 6, 7, 8, 9]
    adapter = model_runner_of(engine).adapters.read("mine", made.save(tmp_path), max_rank=8)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    owners = [replace(params, adapter=adapter), params]
    sequences = [Sequence(prompt, own, lambda output: None) for own in owners]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    expected = [greedy_tokens(model, prompt, 4) for model in (made.merged(), stock)]
    assert [sequence.output_ids for sequence in sequences] == expected and expected[0] != expected[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [16, 48, 5376])
def test_a_norm_is_that_of_torch(columns: int, dtype: torch.dtype) -> None:
    from engine.gpu import triton_layers

    x = torch.randn(2, 5, columns, device=DEVICE).to(dtype)
    factor = torch.randn(columns, device=DEVICE)
    expected = torch.nn.functional.rms_norm(x.float(), (columns,), factor, 1e-6)
    own = triton_layers.rms_norm(x, factor, 1e-6)
    assert own.dtype == dtype and torch.allclose(own.float(), expected, rtol=1e-2 if dtype.itemsize == 2 else 1e-4)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # to infinity, on a GPU in silence
@pytest.mark.parametrize("is_gelu", [False, True])
def test_activations_are_those_of_torch(is_gelu: bool) -> None:
    from engine.gpu import triton_layers

    joined = 4 * torch.randn(1, 3, 2 * 1100, device=DEVICE)
    joined[..., :4] = torch.tensor([-1000.0, -100.0, 100.0, 1000.0])
    gate, up = joined.chunk(2, dim=-1)
    gate = torch.nn.functional.gelu(gate, approximate="tanh") if is_gelu else torch.nn.functional.silu(gate)
    assert torch.allclose(triton_layers.activate(joined, is_gelu), gate * up, atol=1e-5)
