"""Steps that begin before the last one's tokens are known change no answer, whatever comes in between."""

import asyncio
import random
from dataclasses import replace

import pytest
from models import FAMILIES, SHARING, VOCAB, generate, tiny_model

from engine.async_runner import AsyncRunner
from engine.attention import flash
from engine.build import build_engine
from engine.engine import Engine, EngineOptions
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams

OPTIONS = EngineOptions(
    max_num_batched_tokens=24, max_num_mixed_tokens=24, max_num_seqs=8, kv_block_size=4, num_speculative_tokens=0
)


def engine_of(family: str, options: EngineOptions, ahead: bool, graphs: bool = False) -> Engine:
    engine = build_engine(tiny_model(family), options, frozenset({5}))
    assert isinstance(engine.runner, ModelRunner)
    if graphs:
        engine.runner = ModelRunner(engine.runner.model, engine.scheduler.cache, {5}, flash.reference)
        engine.runner.record_graphs(8, engine.max_model_len, record_graph=lambda run: run)
    if ahead:
        engine.runner = AsyncRunner(engine.runner, engine.is_quiet)
    return engine


def requests(count: int) -> list[tuple[list[int], SamplingParams]]:
    rng = random.Random(2)
    kinds = [
        SamplingParams(max_tokens=30, temperature=0.0),
        SamplingParams(max_tokens=50, temperature=0.9, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=1.2, top_p=0.8, stop_token_ids=(3, 9, 12, 17)),
        SamplingParams(max_tokens=35, temperature=0.8, min_tokens=20, logit_bias={5: 4.0}, num_logprobs=1),
    ]
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 60))] for _ in range(count)]
    asked = [(prompt, replace(rng.choice(kinds), seed=number)) for number, prompt in enumerate(prompts)]
    depends = SamplingParams(max_tokens=12, temperature=0.7, repetition_penalty=1.3, seed=1)
    return [*asked[:-1], (prompts[-1], depends)]


def answers(engine: Engine, count: int, delay: float) -> list[list[int | None]]:
    """Requests that come one after the other; every third one leaves early."""

    async def ask(number: int, prompt: list[int], params: SamplingParams) -> list[int | None]:
        await asyncio.sleep(delay * number)
        tokens: list[int | None] = []
        async for output in generate(engine, prompt, params):
            tokens.append(output.token_id)
            if number % 3 == 2 and len(tokens) == 7:
                break
        return tokens

    async def main() -> list[list[int | None]]:
        engine.start()
        try:
            return await asyncio.gather(*(ask(i, *request) for i, request in enumerate(requests(count))))
        finally:
            await engine.close(5)

    result = asyncio.run(main())
    assert engine.num_used_blocks == 0
    return result


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", FAMILIES | SHARING)
@pytest.mark.parametrize(("delay", "graphs"), [(0.0, False), (0.02, False), (0.02, True)])
def test_answers_are_the_same(family: str, delay: float, graphs: bool) -> None:
    ahead = engine_of(family, OPTIONS, True, graphs)
    assert answers(ahead, 12, delay) == answers(engine_of(family, OPTIONS, False), 12, delay)
    assert isinstance(ahead.runner, AsyncRunner) and ahead.runner.num_steps_kept > 0


@pytest.mark.thinned(2)
@pytest.mark.parametrize("family", ["gemma3", "llama"])
def test_scarce_blocks_and_guessed_tokens_beside_it_change_nothing(family: str) -> None:
    model = tiny_model(family)
    layers = model.config.num_hidden_layers
    for options in (
        replace(OPTIONS, kv_cache_memory=110 * 2 * layers * 2 * 16 * 4, max_model_len=100),
        replace(OPTIONS, num_speculative_tokens=4),
    ):
        ahead = engine_of(family, options, True)
        assert answers(ahead, 12, 0.0) == answers(engine_of(family, options, False), 12, 0.0)


def test_one_stream_alone_is_guessed_to_its_end() -> None:
    engine = engine_of("qwen3", OPTIONS, True)
    assert isinstance(engine.runner, AsyncRunner)
    params = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)

    async def main() -> int:
        engine.start()
        tokens = [output async for output in generate(engine, [1, 2, 3], params)]
        await engine.close()
        return len(tokens)

    assert asyncio.run(main()) == 50 and engine.runner.num_steps_kept == 49
