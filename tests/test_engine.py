"""The engine's tokens are transformers' own, however sequences come, go and share steps."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from models import FAMILIES, MIXTURES, RECURRENT, SHARING, SINKS, VOCAB, generate, tiny_model

from engine.attention.paged import PrefillChunk
from engine.batch import Batch
from engine.build import build_engine
from engine.engine import Engine, EngineOptions
from engine.layer_probe import probe_layers
from engine.model_runner import ModelRunner
from engine.sampling_params import SampledToken, SamplingParams
from engine.sequence import TokenOutput
from errors import EngineFailure, Overloaded, Unavailable

ALL = [*FAMILIES, *RECURRENT, *MIXTURES, *SHARING, *SINKS]
NUM_TOKENS = 40
SMALL_STEPS = EngineOptions(max_num_batched_tokens=24, max_num_mixed_tokens=24, max_num_seqs=16, kv_block_size=8)


def prompts(count: int, longest: int = 120) -> list[list[int]]:
    rng = random.Random(7)
    return [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def reference(family: str, prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    return _generate(family, tuple(prompt), 60)[:num_tokens]


@cache
def _generate(family: str, prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    model = tiny_model(family, "eager")
    output = model.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False)
    return output[0, len(prompt) :].tolist()


def greedy(num_tokens: int = NUM_TOKENS) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, temperature=0)


async def answer(engine: Engine, prompt: list[int], params: SamplingParams, delay: float = 0) -> list[int]:
    await asyncio.sleep(delay)
    return [output.token_id async for output in generate(engine, prompt, params) if output.token_id is not None]


def run(engine: Engine, use: Callable[[Engine], Coroutine[Any, Any, Any]]) -> Any:
    """Runs `use(engine)` in a fresh event loop with the engine started, and checks that nothing is left behind."""

    async def main() -> Any:
        engine.start()
        try:
            result = await use(engine)
            for _ in range(200):
                if not engine.scheduler.has_work and not engine.num_used_blocks:
                    break
                await asyncio.sleep(0.01)
            return result
        finally:
            await engine.close()

    result = asyncio.run(main())
    assert engine.num_used_blocks == 0 and not engine.scheduler.has_work
    return result


def answers(engine: Engine, requests: list[list[int]], params: SamplingParams, delay: float = 0) -> list[list[int]]:
    async def use(engine: Engine) -> list[list[int]]:
        return await asyncio.gather(*(answer(engine, p, params, i * delay) for i, p in enumerate(requests)))

    return run(engine, use)


def engine_of(family: str, options: EngineOptions = SMALL_STEPS, eos: frozenset[int] = frozenset()) -> Engine:
    return build_engine(tiny_model(family), options, eos)


@pytest.mark.parametrize("family", ALL)
def test_a_sequence_alone_gives_the_tokens_of_generate(family: str) -> None:
    for prompt in prompts(3):
        expected = reference(family, prompt)
        assert len(set(expected)) > 5, "the reference is too simple to compare with"
        assert answers(engine_of(family, EngineOptions()), [prompt], greedy()) == [expected]


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("delay", [0, 0.01], ids=["at-once", "staggered"])
def test_sixteen_sequences_in_chunks_give_the_tokens_of_generate(family: str, delay: float) -> None:
    requests = prompts(16)
    expected = [reference(family, prompt) for prompt in requests]
    assert answers(engine_of(family), requests, greedy(), delay) == expected


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", ALL)
def test_preempted_sequences_give_the_tokens_of_generate(family: str) -> None:
    requests = prompts(8, longest=60)
    engine = engine_of(family, small_cache(family, num_tokens=200, max_num_batched_tokens=32))
    assert answers(engine, requests, greedy(60)) == [reference(family, prompt, 60) for prompt in requests]
    assert engine.scheduler.num_preemptions > 0, "the cache was not small enough"


@pytest.mark.parametrize("family", ALL)
def test_the_scores_of_prompts_are_those_of_the_model_also_after_a_preemption(family: str) -> None:
    requests = prompts(8, longest=60)
    params = SamplingParams(max_tokens=60, temperature=0, num_prompt_logprobs=2)

    async def use(engine: Engine) -> list[tuple[SampledToken, ...]]:
        async def scores(prompt: list[int]) -> tuple[SampledToken, ...]:
            return [output.prompt async for output in generate(engine, prompt, params)][0]

        return await asyncio.gather(*(scores(prompt) for prompt in requests))

    engine = engine_of(family, small_cache(family, num_tokens=200, max_num_batched_tokens=32))
    model = tiny_model(family, "eager")
    for prompt, tokens in zip(requests, run(engine, use), strict=True):
        with torch.inference_mode():
            rows = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert [token.token_id for token in tokens] == prompt[1:]
        for token, row in zip(tokens, rows, strict=False):
            assert token.logprob == pytest.approx(float(row[token.token_id]), abs=1e-3)
            assert token.top_logprobs[0][1] == pytest.approx(float(row.max()), abs=1e-3)
    assert engine.scheduler.num_preemptions > 0


@pytest.mark.thinned(4)
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("room", ["plenty", "scarce"])
def test_a_beginning_that_was_computed_before_gives_the_tokens_of_generate(family: str, room: str) -> None:
    """One after the other and all at once, diverging at every place, with blocks kept and blocks forgotten."""
    long, *_ = prompts(1, longest=121)
    long = (long * 120)[:120]
    requests = [
        long[:n] + other for n, other in zip((119, 120, 30, 64, 65, 100, 8, 7), prompts(8, longest=20), strict=True)
    ]
    requests = [request[:140] for request in requests]
    reused: list[int] = []

    async def use(engine: Engine) -> list[list[int]]:
        async def one(prompt: list[int]) -> list[int]:
            outputs = [output async for output in generate(engine, prompt, greedy(16))]
            reused.append(outputs[0].num_cached_tokens)
            return [output.token_id for output in outputs if output.token_id is not None]

        return [await one(prompt) for prompt in requests] + await asyncio.gather(*map(one, requests))

    tokens = {"plenty": 4000, "scarce": 330}[room]
    engine = engine_of(family, small_cache(family, num_tokens=tokens, max_num_batched_tokens=32))
    expected = [reference(family, prompt, 16) for prompt in requests]
    assert run(engine, use) == expected * 2
    # a recurrent state is known at the end of a prompt only, and where two that ran together began to differ
    least = {"plenty": 400, "scarce": 20} if family in RECURRENT else {"plenty": 900, "scarce": 50}
    assert sum(reused) > least[room]


def small_cache(family: str, num_tokens: int, **options: int) -> EngineOptions:
    """Room for `num_tokens` tokens in every layer, and for the recurrent states of eight sequences and twenty
    snapshots."""
    specs = probe_layers(tiny_model(family))
    snapshots = 20 * specs.bytes_per_sequence
    slots = 8 * (specs.bytes_per_sequence + EngineOptions().num_speculative_tokens * specs.bytes_per_guess)
    return EngineOptions(
        max_num_seqs=8,
        kv_block_size=4,
        kv_cache_memory=num_tokens * specs.bytes_per_token + slots + snapshots,
        snapshot_memory=snapshots,
        max_model_len=160,
        **options,
    )


class SeesTooLittle(ModelRunner):
    def _prefill_chunk(self, *arguments: Any) -> PrefillChunk:
        chunk = super()._prefill_chunk(*arguments)
        firsts, ends = chunk.visible.unbind(1)
        return replace(
            chunk, visible=torch.stack([torch.maximum(firsts, ends - 8), ends], dim=1), sees_only_itself=False
        )


class ForgetsTheWindow(ModelRunner):
    def _prefill_chunk(self, *arguments: Any) -> PrefillChunk:
        chunk = super()._prefill_chunk(*arguments)
        ends = chunk.visible[:, 1]
        return replace(chunk, visible=torch.stack([torch.zeros_like(ends), ends], dim=1))


@pytest.mark.parametrize("wrong", [SeesTooLittle, ForgetsTheWindow])
def test_a_wrong_mask_gives_other_tokens(wrong: type[ModelRunner]) -> None:
    """That the comparison above can fail."""
    requests = prompts(4)
    engine = engine_of("gemma3")
    engine.runner = wrong(engine.runner.model, engine.runner.cache)
    assert answers(engine, requests, greedy()) != [reference("gemma3", prompt) for prompt in requests]


@pytest.mark.parametrize("family", ALL)
def test_a_seeded_answer_is_the_same_alone_and_among_fifteen_others(family: str) -> None:
    requests = prompts(16)
    seeded = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, top_p=0.9, seed=42)
    others = [SamplingParams(max_tokens=NUM_TOKENS, temperature=t, top_k=k) for t in (0.5, 1.5, 0) for k in range(5)]
    alone = answers(engine_of(family), [requests[0]], seeded)[0]

    async def use(engine: Engine) -> list[list[int]]:
        return await asyncio.gather(*map(answer, [engine] * 16, requests, [seeded, *others]))

    assert run(engine_of(family), use)[0] == alone
    assert answers(engine_of(family), [requests[0]], SamplingParams(max_tokens=NUM_TOKENS, seed=43))[0] != alone


def test_an_answer_ends_with_its_end_of_sequence_token_or_its_limit() -> None:
    prompt = prompts(1)[0]
    expected = reference("qwen3", prompt)
    eos = expected[10]
    length = expected.index(eos)

    async def use(engine: Engine) -> list[Any]:
        return [[o async for o in generate(engine, prompt, params)] for params in (greedy(), ignoring, greedy(length))]

    ignoring = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
    stopped, ignored, limited = run(engine_of("qwen3", eos=frozenset([eos])), use)
    assert [o.token_id for o in stopped] == [*expected[:length], None] and stopped[-1].finish_reason == "stop"
    assert [o.token_id for o in ignored] == expected and ignored[-1].finish_reason == "length"
    assert [o.token_id for o in limited] == expected[:length] and limited[-1].finish_reason == "length"


def test_an_answer_ends_where_the_context_does() -> None:
    options = EngineOptions(max_model_len=50)
    [tokens] = answers(engine_of("qwen3", options), [prompts(1)[0][:30]], greedy(500))
    assert len(tokens) == 20


def test_leaving_the_iterator_frees_the_sequence_within_a_step() -> None:
    async def use(engine: Engine) -> None:
        leavers = [generate(engine, prompt, greedy(300)) for prompt in prompts(16)]
        for leaver in leavers:
            await anext(leaver)
        stay = asyncio.create_task(answer(engine, prompts(1)[0], greedy()))
        for leaver in leavers:
            await leaver.aclose()
        assert await stay == reference("qwen3", prompts(1)[0])

    run(engine_of("qwen3"), use)


class Fragile(ModelRunner):
    """Fails on batches that hold the sequence with this first token; gives no number for the next one."""

    fails, spoils = 1, 2

    def run(self, batch: Batch) -> list[list[SampledToken | None]]:
        first = [sequence.token_ids[0] for sequence in batch.sequences]
        if self.fails in first:
            raise RuntimeError("a kernel failed")
        tokens = iter(super().run(batch))
        complete = [span for span in batch.spans if span.is_complete]
        return [[None] if s.sequence.token_ids[0] == self.spoils else t for s, t in zip(complete, tokens, strict=True)]


@pytest.mark.parametrize("first", [Fragile.fails, Fragile.spoils])
def test_a_failing_step_reaches_its_requests_and_the_engine_lives_on(first: int) -> None:
    async def use(engine: Engine) -> None:
        with pytest.raises(EngineFailure):
            await answer(engine, [first, 5, 6], greedy())
        assert await answer(engine, prompts(1)[0], greedy()) == reference("qwen3", prompts(1)[0])
        assert engine.failure is None

    engine = engine_of("qwen3")
    engine.runner = Fragile(engine.runner.model, engine.runner.cache)
    run(engine, use)


def test_a_fatal_error_reaches_everybody_and_is_remembered() -> None:
    async def use(engine: Engine) -> None:
        waiting = asyncio.create_task(answer(engine, prompts(1)[0], greedy(400)))
        await asyncio.sleep(0.05)
        engine.post(lambda: (_ for _ in ()).throw(RuntimeError("scheduler bug")))
        with pytest.raises(EngineFailure):
            await waiting
        assert engine.failure is not None
        with pytest.raises(Unavailable):
            await answer(engine, prompts(1)[0], greedy())

    engine = engine_of("qwen3")

    async def main() -> None:
        engine.start()
        await use(engine)
        await engine.close()

    asyncio.run(main())


def test_what_may_run_and_wait_is_bounded() -> None:
    async def use(engine: Engine) -> None:
        tasks = [asyncio.create_task(answer(engine, prompt, greedy(60))) for prompt in prompts(6)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as refusal:
            await answer(engine, [1], greedy())
        assert refusal.value.status == 503 and refusal.value.retry_after
        assert await asyncio.gather(*tasks) == [reference("qwen3", prompt, 60) for prompt in prompts(6)]

    run(engine_of("qwen3", EngineOptions(max_num_seqs=2, max_queued_requests=4)), use)


def test_a_client_that_fills_the_queue_leaves_room_for_another() -> None:
    async def use(engine: Engine) -> None:
        def ask(client: str) -> asyncio.Task[list[TokenOutput]]:
            stream = generate(engine, [5] * 8, greedy(20), client=client)
            return asyncio.create_task(collected(stream))

        greedy_ones = [ask("a") for _ in range(20)]
        await asyncio.sleep(0)
        other = ask("b")
        outcomes = await asyncio.gather(*greedy_ones, return_exceptions=True)
        assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 20 - 9
        assert len(await other) == 20
        engine.check_room(9, 10**9, "b")  # nothing waits

    run(engine_of("qwen3", EngineOptions(max_num_seqs=2, max_queued_requests=10, num_clients=2)), use)


async def collected(stream: AsyncGenerator[TokenOutput]) -> list[TokenOutput]:
    return [output async for output in stream]


def test_the_tokens_that_wait_are_bounded() -> None:
    async def use(engine: Engine) -> None:
        tasks = [asyncio.create_task(answer(engine, [number] * 50, greedy(60))) for number in range(4, 8)]
        await asyncio.sleep(0.02)
        with pytest.raises(Overloaded) as refusal:
            engine.check_room(1, 60)
        assert refusal.value.retry_after
        engine.check_room(1, 60, "another, of whom none waits")
        assert len(await asyncio.gather(*tasks)) == 4
        engine.check_room(4, 1000)  # alone they may be more than that

    run(engine_of("qwen3", EngineOptions(max_num_seqs=1, max_queued_tokens=200)), use)


def test_closing_lets_running_answers_finish_and_refuses_new_ones() -> None:
    async def main() -> None:
        engine = engine_of("qwen3")
        engine.start()
        running = asyncio.create_task(answer(engine, prompts(1)[0], greedy()))
        await asyncio.sleep(0.02)
        closing = asyncio.create_task(engine.close(timeout=30))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await answer(engine, [1], greedy())
        assert await running == reference("qwen3", prompts(1)[0])
        await closing

    asyncio.run(main())


def test_closing_at_once_gives_running_answers_an_error() -> None:
    async def main() -> None:
        engine = engine_of("qwen3")
        engine.start()
        running = asyncio.create_task(answer(engine, prompts(1)[0], greedy(400)))
        await asyncio.sleep(0.02)
        await engine.close()
        with pytest.raises(Unavailable):
            await running

    asyncio.run(main())
