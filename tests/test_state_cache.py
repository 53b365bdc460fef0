"""StateCache: slots that no two sequences share, snapshots that are kept while they are of use, and their memory."""

import random
from typing import Any

import torch

from engine.batch import Span
from engine.layer_spec import LayerSpecs, RecurrentSpec, StateShape
from engine.recurrent.state_cache import StateCache, StatePlan
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

BLOCK = 4
SPEC = RecurrentSpec(
    (StateShape("conv", 0, (3,), torch.float32), StateShape("recurrent", 0, (2, 2), torch.float32)),
    input_width=5,
    input_dtype=torch.float32,
    device=torch.device("cpu"),
)


def sequence(tokens: list[int]) -> Sequence:
    return Sequence(tokens, SamplingParams(max_tokens=10), lambda output: None)


def compute(cache: StateCache, one: Sequence, end: int, is_checked: bool = True) -> None:
    """A step up to `end` that writes the number of tokens into the state."""
    span = Span(one, one.num_computed, end - one.num_computed)
    step = cache.plan_step([span], {(one.number, p): i for i, p in enumerate(range(span.start, span.end))})
    done = one.num_computed
    for phase in step.phases:
        for run_ in phase.runs:
            done += len(run_.rows)
            for tensor in cache.tensors[0]:
                tensor[run_.slot] = done
        for slot, row in phase.saves:
            for tensor in cache.tensors[0]:
                tensor[row] = tensor[slot]
    one.num_computed = end
    assert one.state is not None
    one.state.num_tokens = end
    cache.publish(one, is_checked)


def test_slots_are_never_shared_and_all_come_back() -> None:
    cache, rng = StateCache(StatePlan(4, 3, 2), {0: SPEC}, BLOCK), random.Random(0)
    alive: list[Sequence] = []
    num_begun = 0
    for _ in range(2000):
        if rng.random() < 0.3:
            one = sequence([rng.randrange(2) for _ in range(rng.randrange(1, 12))])
            keys = one.block_keys(BLOCK)[: (one.num_tokens - 1) // BLOCK]
            known = max((n for n in range(1, len(keys) + 1) if keys[n - 1] in cache.snapshots), default=0)
            one.num_computed = BLOCK * known
            num_begun += bool(known)
            if cache.open(one):
                assert all((tensor[one.state.slot] == BLOCK * known).all() for tensor in cache.tensors[0])
                alive.append(one)
            else:
                assert len(alive) == 4
        for one in list(alive):
            if rng.random() < 0.2 or not one.num_uncomputed:
                cache.close(one)
                alive.remove(one)
            else:
                compute(cache, one, one.num_computed + rng.randrange(1, one.num_uncomputed + 1))
        slots = [one.state.slot for one in alive]
        assert len(slots) == len(set(slots)) == cache.num_used_slots
        assert cache.num_snapshots <= 3
    assert num_begun > 30


def test_the_snapshot_that_was_used_last_is_kept() -> None:
    cache = StateCache(StatePlan(1, 2, 0), {0: SPEC}, BLOCK)
    ones = [sequence([number] * 9) for number in range(3)]
    for one in ones[:2]:
        assert cache.open(one)
        compute(cache, one, 9)
        cache.close(one)
    again = sequence([0] * 9)
    again.num_computed = 8
    assert cache.open(again)
    cache.close(again)
    assert cache.open(ones[2])
    compute(cache, ones[2], 9)
    assert [one.block_keys(BLOCK)[1] in cache.snapshots for one in ones] == [True, False, True]


def test_a_state_that_is_no_number_is_no_snapshot_and_does_not_stay() -> None:
    cache = StateCache(StatePlan(1, 2, 0), {0: SPEC}, BLOCK)
    bad = sequence([1] * 9)
    assert cache.open(bad)
    compute(cache, bad, 4, is_checked=False)
    assert cache.num_snapshots == 0, "not at a boundary"
    for tensor in cache.tensors[0]:
        tensor[:] = torch.nan
    span = Span(bad, 4, 4)
    cache.plan_step([span], {(bad.number, p): p - 4 for p in range(4, 8)})
    cache.publish(bad, is_checked=False)
    assert cache.num_snapshots == 0
    cache.erase(bad)
    assert all(torch.isfinite(tensor[bad.state.slot]).all() for tensor in cache.tensors[0])
    cache.close(bad)
    assert cache.num_used_slots == 0


def fitted(memory: int, **options: Any) -> StatePlan:
    specs = LayerSpecs({}, {0: SPEC, 1: SPEC})
    assert specs.bytes_per_sequence == 56
    plan = StatePlan.fit(specs, memory, **{"max_num_seqs": 8, "max_guesses": 2, "context_memory": 500, **options})
    assert plan.num_bytes(specs) <= memory
    return plan


def test_slots_come_first_and_bound_the_sequences() -> None:
    roomy = fitted(100_000)
    assert roomy.num_slots == 8 and roomy.num_snapshots == 32, "more are of no use"
    assert fitted(1000).num_slots == 3
    assert fitted(100_000, snapshot_memory=1000).num_snapshots == 17


def test_snapshots_leave_room_for_the_longest_sequence() -> None:
    rest = 3000 - 8 * (56 + 2 * 40)
    assert fitted(3000, context_memory=rest - 100).num_snapshots == rest // 4 // 56
    assert fitted(3000, context_memory=rest - 100, may_shorten=False).num_snapshots == 1
    assert fitted(3000, context_memory=10 * rest, may_shorten=False).num_snapshots == 0
