"""What fails in the engine, or beneath it, has exactly one outcome for each request, and leaves nothing behind.

The faults are drawn from a seed, so that what was found once can be run again.
"""

import asyncio
import random
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from models import generate
from process import ROOT, Server, serve
from test_engine import SMALL_STEPS, answer, engine_of, greedy, prompts, reference, run

from engine.batch import Batch
from engine.engine import Engine
from engine.model_runner import ModelRunner
from engine.sampling_params import SampledToken
from errors import EngineFailure, Unavailable
from telemetry.metrics import Metrics

Tokens = list[list[SampledToken | None]]
Fault = Callable[[Batch], BaseException | None]
POISON = 1  # the first token of a sequence that no step survives


class Faulty(ModelRunner):
    """The model, but for what `fault` says of a batch: before it is computed, or when its values are written."""

    fault: Fault = staticmethod(lambda batch: None)
    is_late = False

    def run(self, batch: Batch) -> Tokens:
        tokens = super().run(batch) if self.is_late else []
        error = self.fault(batch)
        if error is not None:
            raise error
        return tokens or super().run(batch)


def engine_with(fault: Fault, is_late: bool = False, family: str = "qwen3") -> Engine:
    engine = engine_of(family)
    faulty = Faulty(engine.runner.model, engine.runner.cache)
    faulty.fault, faulty.is_late = fault, is_late
    engine.runner = faulty
    return engine


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("is_late", [False, True])
def test_a_step_that_fails_once_is_nobodys_failure(is_late: bool) -> None:
    """Whichever step it is."""
    requests = prompts(6, longest=60)
    expected = [reference("qwen3", prompt, 12) for prompt in requests]
    for number in range(1, 18):  # it takes no fewer steps
        left = [number]

        def fault(batch: Batch, left: list[int] = left) -> Exception | None:
            left[0] -= 1
            return RuntimeError("a kernel failed") if left[0] == 0 else None

        async def use(engine: Engine) -> list[list[int]]:
            return await asyncio.gather(*(answer(engine, prompt, greedy(12)) for prompt in requests))

        engine = engine_with(fault, is_late)
        assert run(engine, use) == expected, number
        assert engine.num_failed_steps == 1 and left[0] < 1


def test_what_a_failed_step_held_is_free_before_the_next_try() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fault(batch: Batch) -> Exception | None:
        if held:
            assert held[0]() is None
            return None
        activations = torch.empty(1000)
        held.append(weakref.ref(activations))
        raise out_of_memory()

    async def use(engine: Engine) -> list[int]:
        return await answer(engine, [1, 2, 3], greedy())

    engine = engine_with(fault)
    assert run(engine, use) == reference("qwen3", [1, 2, 3])
    assert engine.num_failed_steps == 1


def test_a_failed_step_is_counted_and_its_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    errors: list[Exception] = [RuntimeError("a kernel failed\nand said much about it")]

    async def use(engine: Engine) -> list[int]:
        return await answer(engine, [1, 2, 3], greedy())

    engine, metrics = engine_with(lambda batch: errors.pop() if errors else None), Metrics()
    metrics.watch(lambda: [("m", engine)])
    run(engine, use)
    assert metrics.registry.get_sample_value("llm_failed_steps_total", {"model_name": "m"}) == 1
    assert "failed: RuntimeError: a kernel failed\n" in caplog.text


def test_the_sequence_that_no_step_survives_fails_alone() -> None:
    def fault(batch: Batch) -> Exception | None:
        return RuntimeError("poison") if any(s.token_ids[0] == POISON for s in batch.sequences) else None

    requests = [prompt for prompt in prompts(9) if prompt[0] != POISON]

    async def use(engine: Engine) -> list[Any]:
        all_of_them = [*requests[:4], [POISON, 5, 6], *requests[4:]]
        tasks = [answer(engine, prompt, greedy()) for prompt in all_of_them]
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = run(engine_with(fault), use)
    assert isinstance(outcomes.pop(4), EngineFailure)
    assert outcomes == [reference("qwen3", prompt) for prompt in requests]


def test_what_a_failed_sequence_wrote_does_not_reach_the_next_owner_of_its_blocks() -> None:
    """qwen2's heads are of a size that no kernel takes, and a masked NaN is still one in torch's attention."""

    def fault(batch: Batch) -> Exception | None:
        poisoned = [sequence for sequence in batch.sequences if sequence.token_ids[0] == POISON]
        for layer, group in engine.scheduler.cache.group_of.items():
            for sequence in poisoned:
                engine.scheduler.cache.tensors[layer][1][sequence.block_tables[group]] = torch.nan
        return RuntimeError("poison") if poisoned else None

    async def use(engine: Engine) -> list[int]:
        with pytest.raises(EngineFailure):
            await answer(engine, [POISON] * 12, greedy())
        return await answer(engine, [5, 6, 7], greedy())

    engine = engine_with(fault, family="qwen2")
    assert run(engine, use) == reference("qwen2", [5, 6, 7])


@pytest.mark.slow
@pytest.mark.parametrize("error", [out_of_memory, lambda: MemoryError(), lambda: RuntimeError("can't allocate memory")])
def test_a_step_that_takes_too_much_memory_is_computed_in_parts(error: Callable[[], Exception]) -> None:
    engine = engine_with(lambda batch: error() if len(batch.spans) > 3 else None)

    async def use(engine: Engine) -> list[list[int]]:
        return await asyncio.gather(*(answer(engine, prompt, greedy()) for prompt in prompts(10)))

    assert run(engine, use) == [reference("qwen3", prompt) for prompt in prompts(10)]
    assert engine.num_failed_steps > 0


@pytest.mark.thinned(4)
@pytest.mark.parametrize("seed", range(12))
def test_whatever_fails_every_request_has_one_outcome_and_nothing_is_left(seed: int) -> None:
    rng = random.Random(seed)
    kinds: list[Callable[[], BaseException | None]] = [
        out_of_memory,
        lambda: RuntimeError("a kernel failed"),
        lambda: time.sleep(0.02),
        lambda: None,
    ]
    weights = [rng.random() * 0.15, rng.random() * 0.15, 0.05, 1.0]
    engine = engine_with(lambda batch: rng.choices(kinds, weights)[0]())
    requests = [(prompt, rng.randrange(1, 40), rng.random() * 0.1, rng.random() < 0.2) for prompt in prompts(20)]

    async def one(engine: Engine, prompt: list[int], num_tokens: int, delay: float, leaves: bool) -> Any:
        await asyncio.sleep(delay)
        if not leaves:
            return await answer(engine, prompt, greedy(num_tokens))
        stream = generate(engine, prompt, greedy(num_tokens))
        try:
            await anext(stream)
        finally:
            await stream.aclose()
        return None

    async def use(engine: Engine) -> list[Any]:
        async with asyncio.timeout(60):
            outcomes = await asyncio.gather(*(one(engine, *request) for request in requests), return_exceptions=True)
        while engine.failure is None:  # it answers afterwards
            try:
                assert await answer(engine, requests[0][0], greedy(5)) == reference("qwen3", requests[0][0], 5)
                break
            except EngineFailure:
                continue
        return outcomes

    for (prompt, num_tokens, _, leaves), outcome in zip(requests, run(engine, use), strict=True):
        if not isinstance(outcome, EngineFailure):
            assert outcome == (None if leaves else reference("qwen3", prompt, num_tokens))
    assert engine.failure is None


@pytest.mark.parametrize("error", [torch.AcceleratorError("an illegal access"), SystemExit(), KeyboardInterrupt()])
def test_what_no_step_can_follow_ends_the_engine_and_everybody_is_told(error: BaseException) -> None:
    told: list[int] = []
    num_steps = iter(range(1000))
    engine = engine_with(lambda batch: error if next(num_steps) > 4 else None)
    engine.on_failure = lambda: told.append(1)

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(answer(engine, prompt, greedy())) for prompt in prompts(6)]
        await asyncio.sleep(0)  # each has handed its prompt over: none comes after the engine has ended
        engine.start()
        async with asyncio.timeout(20):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        with pytest.raises(Unavailable) as refusal:
            await answer(engine, prompts(1)[0], greedy())
        assert refusal.value.status == 503 and refusal.value.retry_after
        await engine.close()
        return outcomes

    outcomes = asyncio.run(main())
    assert {type(outcome) for outcome in outcomes} == {EngineFailure} and told == [1]
    assert engine.failure is error


@pytest.mark.parametrize("place", ["the model", "the guesses", "an image"])
def test_a_step_that_never_ends_is_seen_and_does_not_keep_the_engine_from_closing(place: str) -> None:
    engine = engine_of("qwen3", replace(SMALL_STEPS, num_speculative_tokens=4))
    hang = Hang()
    hung: dict[str, Callable[[], object]] = {
        "the model": lambda: setattr(engine.runner, "run", hang),
        "the guesses": lambda: setattr(engine.scheduler.proposer, "propose", hang),
        "an image": lambda: setattr(engine.scheduler, "images_to_encode", hang),
    }
    hung[place]()
    engine.stalled_after = 0.05

    async def main() -> None:
        engine.start()
        asking = asyncio.create_task(answer(engine, [1, 2, 3], greedy()))
        async with asyncio.timeout(30):
            while not engine.is_stalled:
                await asyncio.sleep(0.01)
            await engine.close(patience=0.05)
            with pytest.raises(Unavailable):
                await asking

    try:
        asyncio.run(main())
    finally:
        hang.end.set()


class Hang:
    """Takes the place of what a step calls, and does not return until it is told to."""

    def __init__(self) -> None:
        self.end = threading.Event()

    def __call__(self, *arguments: object) -> None:
        self.end.wait(60)
        raise RuntimeError("it was given up")


# --- the process

FAULTY = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
import torch, main
from serving.loading import load

def faulty(path, settings, progress):
    loaded = load(path, settings, progress)
    run, left = loaded.engine.runner.run, [6]
    def run_or_not(batch):
        left[0] -= 1
        if left[0] < 0:
            {fault}
        return run(batch)
    loaded.engine.runner.run = run_or_not
    return loaded

sys.argv = ["main.py", "--port", "0"]
main.main(faulty)
"""

LONG_CHAT = {"model": "Tiny-Qwen3", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}
LONG_CHAT |= {"temperature": 0, "ignore_eos": True, "stream": True}  # or it may end before the engine does


@contextmanager
def faulty_server(checkpoint: Path, fault: str) -> Iterator[Server]:
    """Its seventh step, the warm-up aside, meets that statement."""
    code = FAULTY.format(tests=str(ROOT / "tests"), root=str(ROOT), fault=fault)
    settings = {"MODEL_PATH": str(checkpoint), "DTYPE": "float32", "SHUTDOWN_TIMEOUT": "1"}
    with serve([sys.executable, "-c", code], **settings) as server:
        server.wait_until_healthy()
        yield server


def test_a_process_whose_engine_died_tells_everybody_and_exits_with_a_failure(tiny_checkpoint: Path) -> None:
    with faulty_server(tiny_checkpoint, 'raise torch.AcceleratorError("an illegal access")') as server:
        answered = server.post("/v1/chat/completions", **LONG_CHAT).text
        assert '"error"' in answered and "[DONE]" not in answered and '"finish_reason":"' not in answered
        assert server.process.wait(30) == 1
        assert any("The engine of Tiny-Qwen3 stopped" in line for line in server.lines)


@pytest.mark.slow
def test_a_process_whose_step_hangs_can_be_ended(tiny_checkpoint: Path) -> None:
    with faulty_server(tiny_checkpoint, "time.sleep(1000)") as server:
        with httpx2.stream("POST", server.url + "/v1/chat/completions", json=LONG_CHAT, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert any("shutting down" in line for line in lines), "its client is told"
        assert server.process.wait(40) is not None
