"""Who runs in a step: decodes always, prompts within the budget, in the order of their arrival."""

import itertools
import random

import pytest
import torch

from engine.batch import Batch, Span
from engine.kv_cache import CachePlan, KVCache
from engine.layer_spec import AttentionSpec
from engine.sampling_params import SampledToken, SamplingParams
from engine.scheduler import MAX_DEFERRALS, Limits, Scheduler
from engine.sequence import Sequence, Status

SPECS = {0: AttentionSpec(1, 4, 4, None, torch.float32, torch.device("cpu"))}


def scheduler(num_blocks: int = 100, **limits: int) -> Scheduler:
    plan = CachePlan.fit(SPECS, num_blocks * SPECS[0].bytes_per_token * 4, 4, max_num_seqs=1000, step_tokens=64)
    values = {"max_num_seqs": 8, "max_num_batched_tokens": 32, "max_num_mixed_tokens": 16, "max_model_len": 200}
    return Scheduler(KVCache(plan, SPECS), Limits(**{**values, **limits}), frozenset())


NUMBERS = itertools.count(2)


def sequence(num_tokens: int, max_tokens: int = 50) -> Sequence:
    return Sequence(
        [next(NUMBERS)] + [1] * (num_tokens - 1), SamplingParams(max_tokens=max_tokens), lambda output: None
    )


def step(scheduler: Scheduler) -> Batch:
    batch = scheduler.schedule()
    scheduler.update(batch, [[SampledToken(7)]] * sum(span.is_complete for span in batch.spans))
    return batch


def check(batch: Batch) -> None:
    """What is to be computed runs, and has a place."""
    for span in batch.spans:
        assert span.sequence.status is Status.RUNNING
        assert len(span.sequence.block_tables[0]) * 4 >= span.end


def test_a_decode_never_waits_for_a_long_prompt() -> None:
    subject = scheduler()
    short = sequence(3)
    subject.add(short)
    step(subject)
    subject.add(sequence(150))
    for _ in range(9):
        batch = step(subject)
        assert short in batch.sequences and batch.num_tokens <= 16


def test_an_idle_engine_gives_a_prompt_the_whole_budget() -> None:
    subject = scheduler()
    subject.add(sequence(70))
    assert [step(subject).num_tokens for _ in range(4)] == [32, 32, 6, 1]


def test_sequences_are_admitted_in_order_and_up_to_the_limit() -> None:
    subject = scheduler(max_num_seqs=3)
    added = [sequence(2, max_tokens=5) for _ in range(6)]
    for one in added:
        subject.add(one)
    assert step(subject).sequences == added[:3]
    for _ in range(4):
        step(subject)
    assert step(subject).sequences == added[3:]


def test_a_prompt_waits_until_it_fits_beside_what_others_still_need() -> None:
    subject = scheduler(num_blocks=30)
    first, second = sequence(100), sequence(40)
    subject.add(first)
    subject.add(second)
    step(subject)
    assert first.num_uncomputed > 0 and second not in subject.running


def test_random_traffic_ends_with_everything_free() -> None:
    rng = random.Random(1)
    subject = scheduler(num_blocks=60)
    alive = []
    for _ in range(3000):
        if rng.random() < 0.2 and len(alive) < 40:
            alive.append(sequence(rng.randrange(1, 150), rng.randrange(1, 50)))
            alive[-1].priority = rng.randrange(2)
            subject.add(alive[-1])
        if alive and rng.random() < 0.02:
            subject.remove(alive.pop(rng.randrange(len(alive))))
        batch = subject.schedule()
        check(batch)
        subject.update(batch, [[SampledToken(7)]] * sum(span.is_complete for span in batch.spans))
        assert batch.num_tokens <= 32 and bool(batch.spans) == bool(subject.has_work or batch.spans)
    for _ in range(3000):
        step(subject)
    assert not subject.has_work and subject.cache.num_used_blocks == 0 and subject.num_preemptions > 0


def urgent(num_tokens: int, priority: int) -> Sequence:
    """One that begins like no other."""
    return Sequence(
        [next(NUMBERS)] + [1] * (num_tokens - 1), SamplingParams(max_tokens=50), lambda output: None, priority
    )


def test_a_prompt_of_higher_priority_goes_before_those_that_came_first() -> None:
    subject = scheduler()
    task, chat = urgent(100, 1), urgent(70, 0)
    subject.add(task)
    step(subject)
    subject.add(chat)
    assert [step(subject).sequences for _ in range(2)] == [[chat], [chat]]
    assert step(subject).sequences == [chat, task]  # the last of the chat's prompt, and what the budget leaves
    waiting = [urgent(200, priority) for priority in (1, 0, 1, 0)]
    for one in waiting:
        subject.add(one)
    assert list(subject.waiting) == [waiting[1], waiting[3], waiting[0], waiting[2]]


def test_clients_take_turns_however_many_prompts_one_of_them_sends() -> None:
    subject = scheduler(max_num_seqs=1)
    crowd = [sequence(4, max_tokens=1) for _ in range(20)]
    for number, own in enumerate(crowd):
        own.client = "crowd"
        subject.add(own)
        if number == 10:
            others = [sequence(4, max_tokens=1) for _ in range(2)]
            for other in others:
                other.client = "other"
                subject.add(other)
    order = []
    while subject.has_work:
        order += [span.sequence.client for span in step(subject).spans]
    assert order[:5].count("other") == 2 and len(order) == 22
    waited = [own.number for own in crowd]
    assert waited == sorted(waited), "one client's prompts stay in their order"


def of_client(client: str, num_tokens: int, max_tokens: int = 1) -> Sequence:
    own = sequence(num_tokens, max_tokens)
    own.client = client
    return own


def test_a_sequence_that_left_costs_its_client_no_turn() -> None:
    subject = scheduler(max_num_seqs=1)
    crowd = [of_client("crowd", 4) for _ in range(50)]
    left = [of_client("leaver", 100) for _ in range(20)]
    for own in crowd + left:
        subject.add(own)
    stays, *rest = left
    for own in rest:
        subject.remove(own)
    later = of_client("leaver", 4)
    subject.add(later)
    order = []
    while subject.has_work:
        order += [span.sequence for span in step(subject).spans]
    order = list(dict.fromkeys(order))
    assert order.index(stays) < order.index(later), "one client's prompts stay in their order"
    assert order.index(later) < len(crowd)


@pytest.mark.parametrize("priority", [0, 1])
def test_what_leaves_the_queue_empty_leaves_no_turns(priority: int) -> None:
    subject = scheduler(max_num_seqs=1)
    subject.add(of_client("running", 4, max_tokens=100))
    step(subject)
    first = of_client("crowd", 100)
    first.priority = priority
    subject.add(first)
    subject.remove(first)
    one, other = of_client("crowd", 4), of_client("other", 4)
    for own in (one, other):
        subject.add(own)
    assert [*subject.waiting] == [one, other]


def test_clients_take_turns_by_what_is_computed_for_them_answers_included() -> None:
    subject = scheduler(max_num_seqs=1)
    shapes = {"talker": (1, 40), "reader": (40, 1)}  # tokens of prompt and answer; both always have some that wait
    computed = dict.fromkeys(shapes, 0)
    for _ in range(3000):
        waiting = [own.client for own in subject.waiting]
        for client, (num_tokens, max_tokens) in shapes.items():
            if waiting.count(client) < 2:
                subject.add(of_client(client, num_tokens, max_tokens))
        for span in step(subject).spans:
            computed[span.sequence.client] += span.num_tokens
    assert 0.5 < computed["talker"] / computed["reader"] < 2


def test_without_keys_prompts_run_in_the_order_in_which_they_came() -> None:
    subject = scheduler(max_num_seqs=1)
    came = [sequence(length, max_tokens=1) for length in (9, 1, 30, 2, 5)]
    for own in came:
        subject.add(own)
    order = []
    while subject.has_work:
        order += [span.sequence.number for span in step(subject).spans]
    assert list(dict.fromkeys(order)) == [own.number for own in came]


def test_the_least_urgent_gives_way_when_blocks_run_out() -> None:
    subject = scheduler(num_blocks=12)
    task, chat = urgent(20, 1), urgent(20, 0)
    for one in (task, chat):
        subject.add(one)
    while not subject.num_preemptions:
        step(subject)
    assert chat in subject.running and list(subject.waiting) == [task]


def test_what_is_not_urgent_gets_its_turn_in_the_end() -> None:
    subject = scheduler()
    task = urgent(40, 1)
    subject.add(task)
    for _ in range(3 * MAX_DEFERRALS):
        if len(subject.waiting) + len(subject.running) < 4:
            subject.add(sequence(60, max_tokens=1))
        step(subject)
        if task.num_output_tokens:
            return
    raise AssertionError("others always went first")


def same(num_tokens: int, max_tokens: int = 50) -> Sequence:
    return Sequence([1] * num_tokens, SamplingParams(max_tokens=max_tokens), lambda output: None)


def test_sequences_that_begin_alike_compute_that_once() -> None:
    subject = scheduler(max_num_mixed_tokens=32)
    first, second, third = same(90), same(90), same(70)
    for one in (first, second, third):
        subject.add(one)
    total = 0
    while not all(one.num_output_tokens for one in (first, second, third)):
        batch = step(subject)
        total += batch.num_tokens
    assert (second.num_cached_tokens, third.num_cached_tokens) == (88, 68)
    assert total < 90 + 2 + 2 + 20


def test_a_prompt_that_was_begun_twice_has_not_reused_what_it_computed_itself() -> None:
    subject = scheduler(num_blocks=42, max_num_mixed_tokens=4)
    decoding, prompt = sequence(4), sequence(140)
    for one in (decoding, prompt):
        subject.add(one)
    while not subject.num_preemptions:
        step(subject)
    assert prompt in subject.waiting and prompt.num_output_tokens == 0
    while prompt in subject.waiting:
        step(subject)
    assert prompt.num_computed > 16, "it found its own blocks"
    assert prompt.num_cached_tokens == 0


def test_random_traffic_of_sequences_that_begin_alike_ends_with_everything_free() -> None:
    rng = random.Random(2)
    subject = scheduler(num_blocks=60)
    alive = []
    for _ in range(3000):
        if rng.random() < 0.2 and len(alive) < 40:
            tokens = [rng.randrange(2) for _ in range(4)] * rng.randrange(1, 40)
            params = SamplingParams(max_tokens=rng.randrange(1, 40), num_prompt_logprobs=rng.choice([None, None, 0]))
            alive.append(Sequence(tokens, params, lambda output: None, rng.randrange(2)))
            subject.add(alive[-1])
        if alive and rng.random() < 0.02:
            subject.remove(alive.pop(rng.randrange(len(alive))))
        batch = subject.schedule()
        check(batch)
        assert not any(one.scores_prompt and one.num_cached_tokens for one in batch.sequences)
        subject.update(batch, [[SampledToken(7)]] * sum(span.is_complete for span in batch.spans))
    for _ in range(3000):
        step(subject)
    assert not subject.has_work and subject.cache.num_used_blocks == 0 and subject.num_preemptions > 0


def test_a_token_of_a_prompt_is_no_decode_however_the_prompt_is_cut() -> None:
    """What computes decodes may round otherwise, and then a prompt's first token would depend on the budget."""
    one, long = sequence(1), sequence(33)
    assert not Span(one, 0, 1).is_decode
    assert not any(Span(long, start, 1).is_decode for start in range(33))
    assert Span(long, 33, 1).is_decode, "also where the token is not known yet"
    subject = scheduler(max_num_batched_tokens=32)
    subject.add(long)
    counts = [(batch.num_prompt_tokens, batch.num_decodes) for batch in (step(subject) for _ in range(3))]
    assert counts == [(32, 0), (1, 0), (0, 1)]
