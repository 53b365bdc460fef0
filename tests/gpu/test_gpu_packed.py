"""Models whose weights stay packed choose the tokens that transformers chooses with the dequantised ones."""

import itertools
from dataclasses import dataclass
from pathlib import Path

import pytest
import quantized_checkpoints as made
import torch
from gpu_engines import CHUNKS, DTYPES, GUESSES, NUM_NEW, REPEATING, WHOLE, answers, hold, prompts, with_or_without
from gpu_models import load_on_gpu, packed_model, plain_twin
from models import tiny_model
from quantized_cases import CASES
from test_gguf import as_packed, wide
from transformers import PreTrainedModel

from engine.build import build_engine
from engine.checked_model import check_model
from engine.engine import EngineOptions
from engine.model_loader import load_model

pytest.importorskip("triton", reason="Triton is not installed; torch's builds for CUDA bring it")

ROUNDED, BLOCKS = ["int8", "int4"], ["Q4_K", "Q6_K", "Q8_0"]
CODES = ["gptq-4-128-sym", "gptq-4-32-asym", "awq-128", "fp8-blocks", "packed-4-128-sym"]
MIXTURES = ["int8", "int4", "gptq-4-128-sym", "fp8-blocks"]
WAYS = {
    "alone": (WHOLE, prompts(1)),
    "together": (WHOLE, prompts(16)),
    "chunks": (CHUNKS, prompts(16)),
    "guesses": (GUESSES, REPEATING),
}
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
    elif kind in ROUNDED:
        model = packed_model(family, kind, dtype, **made.SIZES)
    else:
        write, scheme, _ = CASES[kind]
        made.save(directory / "codes", write, scheme, family)
        model, stock = load_on_gpu(directory / "codes", dtype=dtype), stock.bfloat16().float()
    return Pair(model, plain_twin(model, stock).to(dtype))


@pytest.fixture(
    scope="module", params=[*itertools.product([*ROUNDED, *BLOCKS, *CODES], DTYPES)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    kind, dtype = request.param
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
