"""Recurrent state: one slot for each sequence, snapshots that prompts begin from, guesses that it never holds."""

import asyncio
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import RECURRENT, VOCAB, generate, tiny_model
from test_engine import answer, answers, engine_of, greedy, prompts, reference, run

from engine.batch import Batch
from engine.build import build_engine
from engine.engine import Engine, EngineOptions
from engine.layer_probe import probe_layers
from engine.model_runner import ModelRunner
from engine.recurrent.state_cache import StateCache
from engine.sampling_params import SampledToken, SamplingParams
from engine.sequence import Sequence
from errors import EngineFailure, ModelLoadError

BLOCK = 4
ROOMY = EngineOptions(max_num_seqs=16, kv_block_size=BLOCK, max_num_batched_tokens=64, max_num_mixed_tokens=64)


# --- the layers


@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.parametrize("chunk", [1, 63, 64, 65])
def test_a_prompt_may_be_cut_anywhere(family: str, chunk: int) -> None:
    prompt = prompts(1, longest=121)[0] * 2
    engine = engine_of(family, EngineOptions(max_num_batched_tokens=chunk, max_num_seqs=1, kv_block_size=16))
    assert answers(engine, [prompt[:150]], greedy(20)) == [reference(family, prompt[:150], 20)]


@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.parametrize("num_speculative_tokens", [0, 1, 8])
def test_guesses_change_no_answer(family: str, num_speculative_tokens: int) -> None:
    """Prompts that repeat themselves, and a proposer that is right for a few tokens, whatever it is asked for."""
    requests = prompts(6, longest=60)
    expected = [reference(family, prompt, 60) for prompt in requests]
    proposer = HalfRight({tuple(p): e for p, e in zip(requests, expected, strict=True)})
    for count in (1, 6):
        engine = engine_of(family, replace(ROOMY, num_speculative_tokens=num_speculative_tokens))
        engine.scheduler.proposer = proposer
        assert answers(engine, requests[:count], greedy(60)) == expected[:count]
    accepted = {num_accepted for _, num_accepted in proposer.counts}
    assert len(accepted) >= {0: 0, 1: 2, 8: 6}[num_speculative_tokens]


class HalfRight:
    """Knows the answers, and is wrong after a number of tokens that differs from guess to guess."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        self.answers, self.rng = answers, random.Random(0)
        self.counts: list[tuple[int, int]] = []

    def propose(self, requests: Any, step_time: float | None = None) -> list[tuple[int, ...]]:
        return [self.guess(sequence, limit) for sequence, limit in requests]

    def guess(self, sequence: Sequence, limit: int) -> tuple[int, ...]:
        known = self.answers[tuple(sequence.prompt_ids)][sequence.num_output_tokens :][:limit]
        right = self.rng.randrange(len(known) + 1)
        return tuple(token if i < right else (token + 1) % VOCAB for i, token in enumerate(known))

    def note(self, sequence: Sequence, num_proposed: int, num_accepted: int) -> None:
        self.counts.append((num_proposed, num_accepted))

    def forget(self, sequence: Sequence) -> None: ...


class ReadsTheNextSlot(StateCache):
    def plan_step(self, *arguments: Any) -> Any:
        step = super().plan_step(*arguments)
        runs = [replace(run, slot=(run.slot + 1) % self.plan.num_slots) for run in step.phases[0].runs]
        return replace(step, phases=(replace(step.phases[0], runs=tuple(runs)), *step.phases[1:]))


class KeepsOldStates(StateCache):
    def _zero(self, slot: int) -> None: ...


class ForgetsGuesses(StateCache):
    def plan_step(self, *arguments: Any) -> Any:
        return replace(super().plan_step(*arguments), kept=())


class RestoresNothing(StateCache):
    def _copy(self, source: int, target: int) -> None:
        self._zero(target)


@pytest.mark.parametrize("wrong", [ReadsTheNextSlot, KeepsOldStates, ForgetsGuesses, RestoresNothing])
def test_a_wrong_state_gives_other_tokens(wrong: type[StateCache]) -> None:
    """That the comparisons with `generate` can fail."""
    requests = prompts(6, longest=60)
    expected = [reference("qwen3_5", prompt, 60) for prompt in requests]
    engine = engine_of("qwen3_5", ROOMY)
    right = engine.scheduler.cache.states
    assert right is not None
    engine.scheduler.cache.states = wrong(right.plan, right.specs, BLOCK)
    engine.scheduler.proposer = HalfRight({tuple(p): e for p, e in zip(requests, expected, strict=True)})

    async def use(engine: Engine) -> list[list[int]]:
        for _ in range(3):
            tokens = await asyncio.gather(*(answer(engine, prompt, greedy(60)) for prompt in requests))
        return tokens

    assert run(engine, use) != expected


@pytest.mark.parametrize("family", RECURRENT)
def test_several_choices_begin_with_the_same_state(family: str) -> None:
    prompt, engine = prompts(1)[0], engine_of(family, ROOMY)
    params = [SamplingParams(max_tokens=30, temperature=1.0, seed=seed) for seed in range(4)]

    async def use(engine: Engine) -> list[tuple[int, list[int]]]:
        async def one(own: SamplingParams) -> tuple[int, list[int]]:
            outputs = [output async for output in generate(engine, prompt, own)]
            return outputs[0].num_cached_tokens, [o.token_id for o in outputs if o.token_id is not None]

        return await asyncio.gather(*map(one, params))

    together = run(engine, use)
    assert sorted(cached for cached, _ in together)[1:] == [(len(prompt) - 1) // BLOCK * BLOCK] * 3
    alone = [answers(engine_of(family, ROOMY), [prompt], own)[0] for own in params]
    assert [tokens for _, tokens in together] == alone


# --- beginnings


@pytest.mark.parametrize("family", RECURRENT)
def test_each_turn_of_a_conversation_computes_only_what_is_new(family: str) -> None:
    """Twenty turns, each of which appends the last answer and a result to the prompt."""
    rng = random.Random(5)
    engine = engine_of(family, replace(ROOMY, max_num_batched_tokens=48))

    async def use(engine: Engine) -> None:
        prompt, before = [rng.randrange(VOCAB) for _ in range(30)], 0
        for _ in range(20):
            outputs = [output async for output in generate(engine, prompt, greedy(7))]
            tokens = [output.token_id for output in outputs if output.token_id is not None]
            assert tokens == reference_of_turn(family, prompt)
            assert outputs[0].num_cached_tokens >= before - BLOCK
            before = len(prompt) + len(tokens) - 1  # the last token was not computed
            prompt = [*prompt, *tokens, *(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 14)))]

    run(engine, use)


def reference_of_turn(family: str, prompt: list[int]) -> list[int]:
    return reference(family, prompt, 7)


def test_a_boundary_lets_another_prompt_begin_there() -> None:
    common, engine = prompts(1)[0][:41], engine_of("qwen3_5", ROOMY)
    ends = prompts(4, longest=30)

    async def use(engine: Engine) -> list[int]:
        cached = []
        for number, end in enumerate(ends):
            boundaries = (len(common),) if number < 2 else ()
            stream = engine.stream([*common, *end], greedy(5), boundaries=boundaries)
            outputs = [output async for several in stream for output in several]
            assert [o.token_id for o in outputs] == reference("qwen3_5", [*common, *end], 5)
            cached.append(outputs[0].num_cached_tokens)
        return cached

    assert run(engine, use) == [0, 40, 40, 40]


def test_prompts_that_come_together_share_what_they_have_in_common() -> None:
    common, engine = prompts(1)[0][:41], engine_of("qwen3_5", ROOMY)
    requests = [[*common, *end] for end in prompts(5, longest=30)]

    async def use(engine: Engine) -> list[int]:
        async def one(prompt: list[int]) -> int:
            outputs = [output async for output in generate(engine, prompt, greedy(20))]
            assert [output.token_id for output in outputs] == reference("qwen3_5", prompt, 20)
            return outputs[0].num_cached_tokens

        return await asyncio.gather(*map(one, requests))

    assert run(engine, use) == [0, 40, 40, 40, 40]


def test_a_long_prompt_is_known_in_part_and_then_where_others_differ_from_it() -> None:
    common = (prompts(1, longest=121)[0] * 20)[:1000]
    engine = build_engine(tiny_model("qwen3_5", max_position_embeddings=2048), ROOMY, frozenset())

    async def use(engine: Engine) -> list[int]:
        cached = []
        for end in prompts(3, longest=60):
            outputs = [output async for output in generate(engine, [*common, *end], greedy(2))]
            cached.append(outputs[0].num_cached_tokens)
        return cached

    assert run(engine, use) == [0, 512, len(common)]
    keys = Sequence(common, greedy(), lambda output: None).block_keys(BLOCK)
    pool = engine.scheduler.cache.pools[0]
    assert len({pool.find(key) for key in keys}) == len(keys) == len(common) // BLOCK
    assert pool.num_used == 0 and len(pool._keys) < len(common) // BLOCK + 4 * 60 // BLOCK, "there is one copy of it"


# --- the memory


@pytest.mark.parametrize("max_num_seqs", [1, 2, 16])
@pytest.mark.parametrize("snapshot_memory", [None, 2**20])
def test_the_whole_context_fits_where_memory_does_not_lack(max_num_seqs: int, snapshot_memory: int | None) -> None:
    options = EngineOptions(max_num_seqs=max_num_seqs, snapshot_memory=snapshot_memory)
    for max_model_len in (None, 512):
        engine = build_engine(tiny_model("qwen3_5"), replace(options, max_model_len=max_model_len), frozenset())
        assert engine.max_model_len == 512 and engine.scheduler.limits.max_num_seqs == max_num_seqs


def test_a_cache_that_holds_no_state_is_refused() -> None:
    with pytest.raises(ModelLoadError, match=r"state of a sequence takes .* MiB.*raise KV_CACHE_MEMORY"):
        build_engine(tiny_model("qwen3_5"), EngineOptions(kv_cache_memory=10_000), frozenset())


def test_fewer_sequences_run_where_memory_lacks(caplog: pytest.LogCaptureFixture) -> None:
    specs = probe_layers(tiny_model("qwen3_5"))
    options = EngineOptions(max_num_seqs=16, kv_cache_memory=12 * specs.bytes_per_sequence, max_model_len=64)
    with caplog.at_level("INFO"):
        engine = build_engine(tiny_model("qwen3_5"), options, frozenset())
    assert engine.scheduler.limits.max_num_seqs < 16 and "raise KV_CACHE_MEMORY" in caplog.text
    requests = prompts(12, longest=30)
    assert answers(engine, requests, greedy(10)) == [reference("qwen3_5", prompt, 10) for prompt in requests]


def test_a_recurrent_model_guesses_for_no_other_one() -> None:
    with pytest.raises(ModelLoadError, match="'qwen3_5_text' cannot guess"):
        build_engine(tiny_model("qwen3"), ROOMY, frozenset(), tiny_model("qwen3_5"))


# --- faults


class Fragile(ModelRunner):
    """Fails in the middle of a step, when some layers have changed their states, or gives no number."""

    def __init__(self, *arguments: Any, fails: int = -1, spoils: int = -1, most: int = 1000) -> None:
        super().__init__(*arguments)
        self.fails, self.spoils, self.most = fails, spoils, most
        self.num_failures = 0

    def run(self, batch: Batch) -> list[list[SampledToken | None]]:
        first = [one.token_ids[0] for one in batch.sequences]
        result = super().run(batch)
        is_too_long = batch.num_tokens > self.most
        if is_too_long or self.fails in first:
            self.num_failures += 1
            raise RuntimeError("a kernel failed")
        complete = [span for span in batch.spans if span.is_complete]
        return [[None] if s.sequence.token_ids[0] == self.spoils else t for s, t in zip(complete, result, strict=True)]


@pytest.mark.parametrize("family", RECURRENT)
@pytest.mark.parametrize("fault", ["fails", "spoils", "most"])
def test_a_failed_step_is_computed_again_from_the_start(family: str, fault: str) -> None:
    requests = [[i + 1, *prompt] for i, prompt in enumerate(prompts(6, longest=60))]
    expected = [reference(family, prompt, 20) for prompt in requests]
    engine = engine_of(family, ROOMY)
    value = {"fails": 3, "spoils": 3, "most": 12}[fault]
    engine.runner = Fragile(engine.runner.model, engine.runner.cache, **{fault: value})

    async def use(engine: Engine) -> None:
        results = await asyncio.gather(*(answer(engine, p, greedy(20)) for p in requests), return_exceptions=True)
        for prompt, result, right in zip(requests, results, expected, strict=True):
            if prompt[0] == value and fault != "most":
                assert isinstance(result, EngineFailure)
            else:
                assert result == right
        states = engine.scheduler.cache.states
        assert all(torch.isfinite(t[: states.plan.num_slots]).all() for ts in states.tensors.values() for t in ts)
        assert await answer(engine, requests[0], greedy(20)) == expected[0]

    run(engine, use)
    assert engine.scheduler.cache.states.num_used_slots == 0
    if fault != "spoils":
        assert engine.runner.num_failures > 1


def test_others_go_on_while_a_failed_sequence_is_tried_with_fewer_tokens() -> None:
    """It is tried from where it failed, and each time with half as many tokens; every other step is the others'."""
    engine = build_engine(tiny_model("qwen3_5", max_position_embeddings=2048), ROOMY, frozenset())
    engine.runner = Recording(engine.runner.model, engine.runner.cache, fails=3, late=600)
    bad, good = [3, *(prompts(1, longest=121)[0] * 20)[:700]], prompts(1)[0]

    async def use(engine: Engine) -> None:
        failing = asyncio.create_task(answer(engine, bad, greedy(5)))
        assert await answer(engine, good, greedy()) == reference("qwen3_5", good)
        with pytest.raises(EngineFailure):
            await failing

    run(engine, use)
    tried = [spans for spans in engine.runner.spans if spans[0][0] == 3]
    lengths = [count for _, start, count in (spans[0] for spans in tried) if start + count > 600]
    assert lengths[-5:] == [16, 8, 4, 2, 1]
    assert len(tried) < 60, "not from the start each time, and not one token at a time"


class Recording(Fragile):
    """Fails beyond a number of tokens, and notes what each step computes: first token, start, number of tokens."""

    def __init__(self, *arguments: Any, late: int, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.late, self.spans = late, []

    def run(self, batch: Batch) -> list[list[SampledToken | None]]:
        self.spans.append([(s.sequence.token_ids[0], s.start, s.num_tokens) for s in batch.spans])
        fails = self.fails
        if not any(span.sequence.token_ids[0] == fails and span.end > self.late for span in batch.spans):
            self.fails = -1
        try:
            return super().run(batch)
        finally:
            self.fails = fails


class CountsSlots(ModelRunner):
    """Notes how many slots are taken in each step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.counts: list[int] = []

    def run(self, batch: Batch) -> list[list[SampledToken | None]]:
        self.counts.append(self.cache.states.num_used_slots)
        return super().run(batch)


def test_leaving_frees_the_slot_within_a_step() -> None:
    engine = engine_of("qwen3_5", replace(ROOMY, max_num_seqs=8, num_speculative_tokens=0))
    engine.runner = runner = CountsSlots(engine.runner.model, engine.runner.cache)

    async def use(engine: Engine) -> None:
        leavers = [generate(engine, prompt, greedy(400)) for prompt in prompts(8)]
        for leaver in leavers:
            await anext(leaver)
        for leaver in leavers:
            await leaver.aclose()
        num_before = len(runner.counts)
        assert await answer(engine, prompts(1)[0], greedy()) == reference("qwen3_5", prompts(1)[0])
        assert max(runner.counts[: num_before + 1]) == 8
        assert {*runner.counts[num_before + 1 :]} == {1}

    run(engine, use)
    assert engine.scheduler.cache.states.num_used_slots == 0
