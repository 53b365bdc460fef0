"""Blocks are handed out once, come back, and fit the memory that they were planned for."""

import random

import pytest
import torch

from engine.kv_cache import FREED, CachePlan, KVCache, LayerSpec
from engine.sampling import SamplingParams
from engine.sequence import Sequence


def specs(*windows: int | None) -> dict[int, LayerSpec]:
    return {i: LayerSpec(2, 8, 8, window, torch.float32, torch.device("cpu")) for i, window in enumerate(windows)}


def sequence(num_tokens: int) -> Sequence:
    return Sequence([0] * num_tokens, SamplingParams(max_tokens=1), lambda output: None)


@pytest.mark.parametrize("windows", [(None,), (None, 16, 16, 16), (16, 16), (None, 16, 64)])
@pytest.mark.parametrize("memory", [30_000, 1_000_000])
def test_a_plan_stays_within_its_memory(windows: tuple[int | None, ...], memory: int) -> None:
    layers = specs(*windows)
    plan = CachePlan.fit(layers, memory, 4, max_num_seqs=4, step_tokens=32)
    cost = {group.window: sum(layers[i].bytes_per_token for i in group.layers) * 4 for group in plan.groups}
    assert sum(group.num_blocks * cost[group.window] for group in plan.groups) <= memory
    assert sorted(i for group in plan.groups for i in group.layers) == list(range(len(windows)))


def test_what_sliding_layers_cannot_use_goes_to_the_full_ones() -> None:
    plan = CachePlan.fit(specs(None, 16, 16, 16), 1_000_000, 4, max_num_seqs=4, step_tokens=32)
    blocks = {group.window: group.num_blocks for group in plan.groups}
    assert blocks[16] == 4 * (16 // 4 + 2) + 32 // 4
    assert blocks[None] > 10 * blocks[16] and plan.max_tokens == blocks[None] * 4


def test_blocks_are_never_shared_and_all_come_back() -> None:
    cache = KVCache(CachePlan.fit(specs(None, 8), 60_000, 4, 8, 16), specs(None, 8))
    rng = random.Random(0)
    alive: list[Sequence] = []
    for _ in range(2000):
        if rng.random() < 0.3:
            alive.append(sequence(500))
        if not alive:
            continue
        chosen = rng.choice(alive)
        if rng.random() < 0.2:
            cache.free(chosen)
            alive.remove(chosen)
        elif cache.allocate(chosen, chosen.num_computed + 5):
            chosen.num_computed += 5
            cache.free_outside_window(chosen)
        for group in range(2):
            held = [b for s in alive if s.block_tables for b in s.block_tables[group] if b != FREED]
            assert len(held) == len(set(held))
    for rest in alive:
        cache.free(rest)
    assert cache.num_used_blocks == 0


def test_a_sliding_group_keeps_its_window_and_no_more() -> None:
    cache = KVCache(CachePlan.fit(specs(None, 10), 60_000, 4, 8, 16), specs(None, 10))
    one = sequence(100)
    for computed in range(1, 100):
        assert cache.allocate(one, computed)
        one.num_computed = computed
        cache.free_outside_window(one)
        sliding, full = one.block_tables
        visible = range(max(0, computed + 1 - 10), computed)  # what the next token sees
        assert FREED not in full
        assert all(sliding[position // 4] != FREED for position in visible)
        assert sum(block != FREED for block in sliding) <= 10 // 4 + 2


def test_a_failed_allocation_takes_nothing() -> None:
    cache = KVCache(CachePlan.fit(specs(None), 16 * 2 * 16 * 4, 4, 8, 16), specs(None))
    free = cache.num_free_blocks
    assert not cache.allocate(sequence(1), 10_000)
    assert cache.num_free_blocks == free
