"""Real faults of a GPU: memory that is not there, and an error after which nothing can be computed."""

import subprocess
import sys
from dataclasses import replace

import torch
from gpu_engines import answers, finish
from models import tiny_model
from process import ROOT

from engine.build import build_engine
from engine.engine import EngineOptions, release_memory
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

OPTIONS = EngineOptions(max_num_seqs=8, kv_cache_memory=2**26, num_speculative_tokens=0)
LENGTH = 12_000  # tokens whose activations are more than a GPU's smallest allocation


def test_a_step_that_runs_out_of_memory_is_computed_in_parts(device: torch.device, on_gpu: None) -> None:
    """Or its request fails; the others, and those that come after, are answered."""
    model = tiny_model("qwen3", max_position_embeddings=2 * LENGTH, intermediate_size=2048).to(device)
    options = replace(OPTIONS, max_num_batched_tokens=LENGTH, kv_cache_memory=2**28)
    engine = build_engine(model, options, frozenset())
    [expected] = answers(engine, [[5, 6, 7]])
    long = [number % 190 for number in range(LENGTH)]
    plenty = answers(build_engine(model, options, frozenset()), [long])
    release_memory(RuntimeError())
    capacity = torch.cuda.get_device_properties(device).total_memory
    cap = torch.cuda.memory_reserved(device) + 60 * 2**20  # of the about 100 that a layer takes
    torch.cuda.set_per_process_memory_fraction(cap / capacity, device)
    try:
        asked = [
            Sequence(p, SamplingParams(max_tokens=40, temperature=0.0), lambda output: None) for p in (long, [5, 6, 7])
        ]
        finish(engine, asked)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert engine.num_failed_steps > 0
    assert asked[1].output_ids == expected
    assert asked[0].output_ids in ([], plenty[0])
    assert answers(engine, [[5, 6, 7], long]) == [expected, plenty[0]]


BROKEN = """
import asyncio, sys
sys.path[:0] = ["tests", "tests/gpu"]
import torch
from gpu_engines import engine_of, runner_of
from models import generate
from engine.engine import EngineOptions
from engine.sampling_params import SamplingParams
from errors import EngineFailure, Unavailable

device = torch.device("cuda")
engine = engine_of("qwen3", torch.float32, device, EngineOptions(kv_cache_memory=2**24))
runner = runner_of(engine)

async def main():
    told = asyncio.Event()
    engine.on_failure = told.set
    engine.start()
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    assert len([output async for output in generate(engine, [1, 2, 3], params)]) >= 4
    compute = runner._compute
    def broken(*arguments):
        torch.zeros(4, device=device)[torch.tensor([99], device=device)]  # stops all kernels of this process
        return compute(*arguments)
    runner._compute, runner._graphs = broken, None
    try:
        [output async for output in generate(engine, [4, 5, 6], params)]
    except EngineFailure:
        print("told")
    await asyncio.wait_for(told.wait(), 20)
    try:
        engine.check_open(1)
    except Unavailable:
        print("closed")

asyncio.run(main())
"""


def test_an_error_of_the_device_ends_the_engine_and_everybody_is_told(on_gpu: None) -> None:
    result = subprocess.run(
        [sys.executable, "-c", BROKEN], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.stdout.split() == ["told", "closed"], result.stdout + result.stderr
