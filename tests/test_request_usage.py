"""What a request costs, as its record and the metrics are told of it."""

import asyncio
from collections.abc import AsyncGenerator

import pytest

from engine.sampling_params import SampledToken
from serving.generation import OutputDelta, best
from serving.usage import RequestUsage
from telemetry import request_record
from telemetry.metrics import Metrics
from telemetry.request_record import RequestRecord


class Seen:
    """The usage of prompts of so many tokens, and what was told."""

    def __init__(self, prompts: list[int], answers_per_prompt: int = 1) -> None:
        self.record, self.metrics = RequestRecord(), Metrics()
        request_record.begin(self.record)
        self.usage = RequestUsage("m", self.metrics.of("m"))
        self.usage.start(prompts, answers_per_prompt)

    def value(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"llm_{name}", {"model_name": "m"})


@pytest.mark.parametrize(
    ("prompts", "n", "reused", "queries"),
    [
        ([10, 10, 10, 10], 1, [0, 8, 8, 8], 40),
        ([10, 20, 3], 1, [0, 16, 0], 33),
        ([10], 3, [0, 8, 8], 30),
        ([10, 20], 2, [8, 8, 16, 0], 60),
    ],
)
def test_each_answer_looks_for_its_own_prompt_in_the_cache(
    prompts: list[int], n: int, reused: list[int], queries: int
) -> None:
    seen = Seen(prompts, n)
    for index, num_cached_tokens in enumerate(reused):
        seen.usage.add(OutputDelta(index, "x", 1, num_cached_tokens=num_cached_tokens))
        seen.usage.add(OutputDelta(index, "x", 2, num_cached_tokens=num_cached_tokens))
    assert seen.value("prefix_cache_queries_total") == queries
    assert seen.value("prefix_cache_hits_total") == sum(reused)
    assert seen.value("prompt_tokens_total") == sum(prompts)


def test_a_record_has_of_each_prompt_what_all_of_its_answers_reused() -> None:
    seen = Seen([40, 40], 2)
    for index, num_cached_tokens in enumerate([32, 16, 32, 32]):
        seen.usage.add(OutputDelta(index, "x", 1, num_cached_tokens=num_cached_tokens))
    details = seen.usage.usage.prompt_tokens_details
    assert details is not None and seen.record.cached_tokens == details.cached_tokens == 48


def test_a_prompt_that_got_no_answer_is_not_among_the_tokens_of_prompts() -> None:
    assert Seen([10]).value("prompt_tokens_total") == 0


async def deltas(index: int) -> AsyncGenerator[OutputDelta]:
    """Sixteen tokens of one answer."""
    for number in range(1, 17):
        tokens = (SampledToken(1, -float(index + 1)),)
        yield OutputDelta(index, "x", number, tokens=tokens, queue_time=0.5 if number == 1 else 0.0)
        await asyncio.sleep(0)


def test_an_answer_that_was_chosen_among_others_says_nothing_of_when_its_tokens_came() -> None:
    seen = Seen([10])

    async def main() -> None:
        async for delta in best([deltas(index) for index in range(4)], 1, 0):
            seen.usage.add(delta)

    asyncio.run(main())
    assert seen.value("generation_tokens_total") == seen.record.completion_tokens == 64
    assert seen.value("inter_token_latency_seconds_count") == 0
    assert seen.value("time_to_first_token_seconds_count") == 0 and seen.record.first_token is None
    assert seen.value("request_queue_time_seconds_sum") == seen.record.queue_time == 0.5


def test_every_token_but_the_first_is_a_time_between_tokens() -> None:
    seen = Seen([10])
    for num_tokens in (3, 4, 8):
        seen.usage.add(OutputDelta(0, "x", num_tokens))
    assert seen.value("inter_token_latency_seconds_count") == 7
    assert seen.value("time_to_first_token_seconds_count") == 1
