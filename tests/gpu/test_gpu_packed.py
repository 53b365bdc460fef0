"""Models whose weights stay packed choose the tokens that transformers chooses with the dequantised ones."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import quantized_checkpoints as made
import torch
from devices import DEVICE
from gpu_codes import FORMATS
from gpu_engines import (
    CHUNKS,
    DTYPES,
    GUESSES,
    NUM_NEW,
    REPEATING,
    WHOLE,
    answers,
    hold,
    prompts,
    runner_of,
    with_new,
    with_or_without,
)
from gpu_models import load_on_gpu, packed_model, plain_twin
from models import tiny_model
from quantized_cases import CASES
from test_gguf import as_packed, wide
from torch import nn
from transformers import PreTrainedModel

from bench.packed_model import random_weight
from engine.attention import paged
from engine.build import build_engine
from engine.checked_model import check_model
from engine.cpu.packed_weight import Format
from engine.engine import EngineOptions
from engine.gpu.packed_weight import GPUWeight
from engine.model_loader import load_model

pytest.importorskip("triton", reason="Triton is not installed; torch's builds for CUDA bring it")
from engine.gpu.packing import install  # noqa: E402

ROUNDED, BLOCKS = ["int8", "int4"], ["Q4_K", "Q6_K", "Q8_0"]
RANDOM = ["q4_k", "q6_k", "q5_0"]  # formats whose codes need no file
CODES = ["gptq-4-128-sym", "gptq-4-32-asym", "awq-128", "fp8-blocks", "packed-4-128-sym"]
MIXTURES = ["int8", "int4", "gptq-4-128-sym", "fp8-blocks"]
WAYS = {
    "alone": (WHOLE, prompts(1)),
    "together": (WHOLE, prompts(16)),
    "chunks": (CHUNKS, prompts(16)),
    "guesses": (GUESSES, REPEATING),
}
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}  # whole super-blocks
FEW = [[5, 6, 7, 8, 9, 10, 11, 12] * 4, [11]]


@dataclass(frozen=True)
class Pair:
    """A model with packed weights, and transformers' with the numbers that these stand for."""

    packed: PreTrainedModel
    plain: PreTrainedModel


def pair_of(kind: str, family: str, dtype: torch.dtype, directory: Path) -> Pair:
    stock = tiny_model(family, "eager", **made.SIZES)
    if kind in BLOCKS:
        wide(kind, directory / "tiny.gguf")
        as_packed(directory / "tiny.gguf")
        model = load_on_gpu(directory / "tiny", dtype=dtype)
        stock = load_model(check_model(directory / "tiny", "float32", "cpu"), lambda *_: None)
        stock.set_attn_implementation("eager")
    elif kind in RANDOM:
        stock, model = (tiny_model(family, way, **WIDE) for way in ("eager", paged.NAME))
        install(model.to(device=DEVICE, dtype=dtype), random_weights(model, FORMATS[kind]))
    elif kind in ROUNDED:
        model = packed_model(family, kind, dtype, **made.SIZES)
    else:
        write, scheme, _ = CASES[kind]
        made.save(directory / "codes", write, scheme, family)
        model, stock = load_on_gpu(directory / "codes", dtype=dtype), stock.bfloat16().float()
    return Pair(model, plain_twin(model, stock).to(dtype))


def random_weights(model: PreTrainedModel, fmt: Format) -> dict[str, GPUWeight]:
    """Returns weights with random codes for all linear layers, about as large as the model's own."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: random_weight(fmt, layer.out_features, layer.in_features, DEVICE) for name, layer in layers.items()}


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=[*ROUNDED, *RANDOM, *with_new(BLOCKS), *CODES])
def pair(request: pytest.FixtureRequest, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind = request.param
    return pair_of(kind, "qwen3", dtype, tmp_path_factory.mktemp("model"))


def compare(pair: Pair, options: EngineOptions, requests: list[list[int]], graphs: str) -> None:
    engine = with_or_without(graphs, build_engine(pair.packed, options, frozenset()))
    is_short = pair.plain.device.type == "cpu"  # where Triton's interpreter multiplies
    requests = FEW if is_short else requests
    hold(pair.plain, requests, answers(engine, requests, max_tokens=3 if is_short else NUM_NEW))


@pytest.mark.parametrize("way", ["alone", "together", "chunks", "guesses"])
@pytest.mark.parametrize("graphs", ["graphs", "no-graphs"])
def test_tokens_are_those_of_the_dequantised_weights(pair: Pair, way: str, graphs: str, device: torch.device) -> None:
    if device.type == "cpu" and way != "chunks":
        pytest.skip("one way is enough for the interpreter, which is slow")
    compare(pair, *WAYS[way], graphs)


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("way", ["alone", "chunks"])
@pytest.mark.parametrize("graphs", ["graphs", "no-graphs"])
def test_experts_too(kind: str, way: str, graphs: str, device: torch.device, tmp_path: Path) -> None:
    """In float32: in 16 bits a router may send a token to another expert."""
    if device.type == "cpu" and way != "chunks":
        pytest.skip("one way is enough for the interpreter, which is slow")
    compare(pair_of(kind, "qwen3_moe", torch.float32, tmp_path), *WAYS[way], graphs)


@pytest.mark.parametrize("family", ["gemma3", "gemma4_moe", "qwen2", "llama"])
def test_other_families_too(family: str, device: torch.device, tmp_path: Path, on_gpu: None) -> None:
    for kind in ROUNDED:
        compare(pair_of(kind, family, torch.float32, tmp_path), *WAYS["chunks"], "graphs")


@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe"])
def test_steps_are_recorded(kind: str, family: str, device: torch.device, on_gpu: None, tmp_path: Path) -> None:
    """Also with packed experts, and without anything that comes from the CPU."""
    pair = pair_of(kind, family, torch.bfloat16, tmp_path)
    assert runner_of(build_engine(pair.packed, WHOLE, frozenset()))._graphs is not None
