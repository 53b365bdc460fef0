"""A soak: requests of all kinds at once, some of which leave. Nothing fails, stays behind, or changes an answer.

SOAK_SECONDS: how long; two minutes on a GPU if it is not set."""

import asyncio
import gc
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import test_vision
import torch
from gpu_engines import runner_of
from lora_files import TinyAdapter
from models import byte_tokenizer, tiny_gemma_that_sees
from test_gpu_choices import KINDS

from engine.build import build_engine
from engine.engine import Engine, EngineOptions
from engine.layer_probe import probe_layers
from engine.lora.adapter import Adapter
from engine.sample.grammar import GrammarCompiler
from engine.sampling_params import SamplingParams
from engine.vision import Image

TEXT = 190  # ids below stand for no image
CLIENTS, VARIANTS = 12, 6  # requests at once; of each kind
CACHED = 420  # tokens that the cache holds: fewer than the clients' requests have, so that some are preempted
MAX_GROWTH = 2**20  # bytes
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}, "on": {"type": "boolean"}}, "required": ["n"]}
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Request:
    kind: str
    prompt: list[int]
    params: SamplingParams
    images: Callable[[], tuple[Image, ...]] = tuple  # new ones each time: the engine changes them


@dataclass
class Soak:
    """An engine, what it is asked, and what it answers to requests that it computes alone."""

    engine: Engine
    requests: list[Request]
    alone: list[list[int]]
    counts: Counter[str]

    async def answer(self, number: int, most: int = 10_000) -> list[int]:
        """Returns the tokens of an answer, of which the client leaves after `most`."""
        request, tokens = self.requests[number], list[int]()
        stream = self.engine.stream(request.prompt, request.params, images=request.images())
        async with aclosing(stream) as lists:
            async for outputs in lists:
                tokens += [output.token_id for output in outputs if output.token_id is not None]
                if len(tokens) >= most:
                    break
        return tokens

    async def client(self, seed: int, until: float) -> None:
        rng = random.Random(seed)
        while time.monotonic() < until:
            number, leaves = rng.randrange(len(self.requests)), rng.random() < 0.2
            request, expected = self.requests[number], self.alone[number]
            found = await self.answer(number, rng.randrange(1, 20) if leaves else 10_000)
            self.counts[request.kind + (", left" if leaves else "")] += 1
            if request.params.is_greedy:
                assert found == (expected[: len(found)] if leaves else expected), request.kind

    async def run(self, seconds: float) -> None:
        """Has all clients ask for that long, and waits until the engine is at rest."""
        until = time.monotonic() + seconds
        await asyncio.gather(*(self.client(seed, until) for seed in range(CLIENTS)))
        deadline = time.monotonic() + 10
        while self.engine.scheduler.has_work and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert self.engine.num_used_blocks == 0


def requests_of(adapters: list[Adapter], compiler: GrammarCompiler) -> list[Request]:
    grammar = compiler.compile(f"start: %json {json.dumps(SCHEMA)}")
    made = []
    for number in range(VARIANTS):
        rng = random.Random(number)
        text = [rng.randrange(TEXT) for _ in range(rng.randrange(1, 200))]
        seeded = replace(GREEDY, seed=number, **KINDS[number % len(KINDS)])
        by_grammar = replace(GREEDY, max_tokens=60, grammar=grammar, ignore_eos=False, temperature=float(number % 2))
        made += [
            Request("greedy", text, GREEDY),
            Request("long", [rng.randrange(TEXT) for _ in range(300)], replace(GREEDY, max_tokens=9)),
            Request("repeating", text[:9] * 8, replace(GREEDY, max_tokens=120)),
            Request("sampled", text[::-1], replace(seeded, max_tokens=30)),
            Request("grammar", [*text[:5], 1], by_grammar),
            Request("adapter", text, replace(GREEDY, adapter=adapters[number % len(adapters)])),
            Request("scores", text[:20], replace(GREEDY, num_logprobs=3, num_prompt_logprobs=2)),
        ]
    for name in test_vision.LAYOUTS:
        prompt, _ = test_vision.prompt_of(test_vision.LAYOUTS[name])
        made.append(Request("images", prompt, GREEDY, partial(images_of, name)))
    return made


def images_of(name: str) -> tuple[Image, ...]:
    return test_vision.prompt_of(test_vision.LAYOUTS[name])[1]


def allocated(device: torch.device) -> int:
    """Returns the bytes of all tensors on a GPU; 0 for a CPU."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@pytest.mark.timeout(600)
def test_nothing_fails_or_stays_behind_or_changes_an_answer(device: torch.device, tmp_path: Path) -> None:
    seconds = float(os.environ.get("SOAK_SECONDS", "120" if device.type == "cuda" else "5"))
    tokenizer = byte_tokenizer()
    eos, size = tokenizer.eos_token_id, len(tokenizer)
    model = tiny_gemma_that_sees(test_vision.IMAGE, vocab_size=size, eos_token_id=eos)
    text = model.model.language_model
    made = [
        TinyAdapter(text, ADAPTED, seed=seed).save(tmp_path / str(seed), "base_model.model.model.") for seed in (1, 2)
    ]
    model = model.to(device)
    memory = CACHED * probe_layers(model).bytes_per_token
    options = EngineOptions(max_num_seqs=8, max_num_batched_tokens=128, kv_cache_memory=memory, max_model_len=360)
    engine = build_engine(model, options, frozenset({eos}))
    adapters = [runner_of(engine).adapters.read(path.name, path, max_rank=8) for path in made]
    compiler = GrammarCompiler(tokenizer.backend_tokenizer.to_str, size, {eos})
    soak = Soak(engine, requests_of(adapters, compiler), [], Counter())

    async def run() -> int:
        engine.start()
        for number in range(len(soak.requests)):
            soak.alone.append(await soak.answer(number))
        await soak.run(seconds / 5)  # what is made at first use is there after it
        before = allocated(device)
        await soak.run(seconds)
        growth = allocated(device) - before
        await engine.close(timeout=5)
        return growth

    growth = asyncio.run(run())
    print(json.dumps({"seconds": seconds, "growth": growth, "preempted": engine.num_preemptions, **soak.counts}))
    assert engine.failure is None and engine.num_failed_steps == 0
    assert growth <= MAX_GROWTH
    assert engine.num_preemptions > 0, "the cache was not small enough"
