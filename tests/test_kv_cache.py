"""Blocks are handed out once, come back, and fit the memory that they were planned for."""

import ast
import random
from typing import Any

import pytest
import torch
from process import ROOT

from engine.kv_cache import FREED, CachePlan, KVCache
from engine.layer_spec import AttentionSpec
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence


def specs(*windows: int | None) -> dict[int, AttentionSpec]:
    return {i: AttentionSpec(2, 8, 8, window, torch.float32, torch.device("cpu")) for i, window in enumerate(windows)}


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
            cache.advance(chosen, chosen.num_computed + 5)
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
        cache.advance(one, computed)
        cache.free_outside_window(one)
        sliding, full = one.block_tables
        visible = range(max(0, computed + 1 - 10), computed)  # what the next token sees
        assert FREED not in full
        assert all(sliding[position // 4] != FREED for position in visible)
        assert sum(block != FREED for block in sliding) <= 10 // 4 + 2


def test_a_failed_allocation_takes_nothing() -> None:
    cache = KVCache(CachePlan.fit(specs(None), 16 * 2 * 16 * 4, 4, 8, 16), specs(None))
    free = cache.pools[0].num_free
    assert not cache.allocate(sequence(1), 10_000)
    assert cache.pools[0].num_free == free


def numbered(num_tokens: int, first: int = 0, shared: int = 0) -> Sequence:
    """`shared` tokens that all have, then tokens of its own."""
    own = range(1000 * first, 1000 * first + num_tokens - shared)
    return Sequence([*range(shared), *own], SamplingParams(max_tokens=1), lambda output: None)


def compute(cache: KVCache, one: Sequence, is_checked: bool = True) -> None:
    assert cache.allocate(one, one.num_tokens)
    cache.advance(one, one.num_tokens)
    cache.cache_blocks(one, is_checked)
    cache.free_outside_window(one)


@pytest.mark.parametrize("windows", [(None,), (None, 10), (10, 30)])
def test_what_was_computed_is_taken_over_as_far_as_the_tokens_agree(windows: tuple[int | None, ...]) -> None:
    cache = KVCache(CachePlan.fit(specs(*windows), 60_000, 4, 8, 16), specs(*windows))
    first = numbered(43, first=1, shared=39)
    assert cache.allocate(first, 43)
    tables = [list(table) for table in first.block_tables]
    compute(cache, first)
    other = numbered(60, first=2, shared=39)
    cache.reuse(other)
    assert other.num_computed == 36  # nine full blocks
    for group, table, own in zip(cache.groups, other.block_tables, tables, strict=True):
        visible = 0 if group.window is None else max(0, 36 + 1 - group.window) // 4
        assert table == [FREED] * visible + own[visible:9]
    used = cache.num_used_blocks
    cache.free(first)
    cache.free(other)
    assert 0 < used and cache.num_used_blocks == 0
    again = numbered(39, shared=39)
    cache.reuse(again)
    assert again.num_computed == 36, "they are kept while there is room"
    same = numbered(36, shared=36)
    cache.reuse(same)
    assert same.num_computed == 32, "at least one token is computed"


def test_what_was_not_used_for_the_longest_time_is_forgotten_first() -> None:
    cache = KVCache(CachePlan.fit(specs(None), 12 * 4 * 128, 4, 8, 16), specs(None))
    conversation, small = numbered(17, first=1), numbered(9, first=2)
    for one in (conversation, small):
        compute(cache, one)
        cache.free(one)
    known = numbered(17, first=1)
    cache.reuse(known)  # used again
    cache.free(known)
    large = numbered(25, first=3)
    compute(cache, large)
    cache.free(large)
    again, gone = numbered(17, first=1), numbered(9, first=2)
    cache.reuse(again)
    cache.reuse(gone)
    assert again.num_computed == 16 and gone.num_computed < 8


def test_what_is_no_number_is_never_taken_over() -> None:
    cache = KVCache(CachePlan.fit(specs(None, None), 60_000, 4, 8, 16), specs(None, None))
    bad = numbered(20, first=1)
    assert cache.allocate(bad, 20)
    cache.tensors[1][1][bad.block_tables[0][2]] = torch.nan
    cache.advance(bad, 20)
    cache.cache_blocks(bad, is_checked=False)
    other = numbered(20, first=1)
    cache.reuse(other)
    assert other.num_computed == 0
    cache.erase(bad)
    assert torch.isfinite(cache.tensors[1][1]).all()


class Scarce(torch.Tensor):
    """Its copies are read as far as memory allows, which it does not."""

    error: Exception = torch.OutOfMemoryError("CUDA out of memory.")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.isfinite:
            raise cls.error
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("error", [Scarce.error, MemoryError(), RuntimeError("can't allocate memory")])
def test_what_memory_lacks_to_look_at_is_not_taken_over_and_nobodys_failure(error: Exception) -> None:
    cache = KVCache(CachePlan.fit(specs(None), 60_000, 4, 8, 16), specs(None))
    keys, values = cache.tensors[0]
    cache.tensors[0] = keys.as_subclass(type("Own", (Scarce,), {"error": error})), values
    compute(cache, numbered(20, first=1), is_checked=False)
    other = numbered(20, first=1)
    cache.reuse(other)
    assert other.num_computed == 0
    cache.tensors[0] = keys, values
    compute(cache, other, is_checked=False)
    again = numbered(20, first=1)
    cache.reuse(again)
    assert again.num_computed == 16


def test_blocks_of_random_traffic_hold_what_their_sequences_have() -> None:
    """Each block is marked with the tokens that it stands for, and read back by whoever takes it over."""
    layers = specs(None, 12)
    cache = KVCache(CachePlan.fit(layers, 40_000, 4, 8, 16), layers)
    rng = random.Random(3)
    alive: list[Sequence] = []
    num_cached_tokens = 0
    for _ in range(3000):
        if rng.random() < 0.3 and len(alive) < 6:
            tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 60))]
            one = Sequence(tokens, SamplingParams(max_tokens=1), lambda output: None)
            cache.reuse(one)
            num_cached_tokens += one.num_computed
            check(cache, one)
            alive.append(one)
        if alive:
            one = rng.choice(alive)
            step = min(rng.randrange(1, 9), one.num_uncomputed)
            if rng.random() < 0.15 or not step:
                cache.free(one)
                alive.remove(one)
            elif cache.allocate(one, one.num_computed + step):
                for position in range(one.num_computed, one.num_computed + step):
                    for layer in layers:
                        block = one.block_tables[cache.group_of[layer]][position // 4]
                        cache.tensors[layer][0][block, position % 4] = mark(one, position)
                cache.advance(one, one.num_computed + step)
                cache.cache_blocks(one, is_checked=rng.random() < 0.5)
                cache.free_outside_window(one)
                check(cache, one)
    for one in alive:
        check(cache, one)
        cache.free(one)
    assert cache.num_used_blocks == 0 and num_cached_tokens > 1000


def mark(one: Sequence, position: int) -> float:
    return float(hash(tuple(one.token_ids[: position + 1])) % 10_007)


def check(cache: KVCache, one: Sequence) -> None:
    for layer, group in cache.group_of.items():
        window = cache.groups[group].window or 10**6
        for position in range(max(0, one.num_computed + 1 - window), one.num_computed):
            block = one.block_tables[group][position // 4]
            assert (cache.tensors[layer][0][block, position % 4] == mark(one, position)).all()


def test_going_back_forgets_what_is_behind_and_going_on_computes_it_again() -> None:
    cache = KVCache(CachePlan.fit(specs(None), 60_000, 4, 8, 16), specs(None))
    one = numbered(20, first=1)
    assert cache.allocate(one, 20)
    cache.advance(one, 10)
    cache.rollback(one, 7)
    assert one.num_computed == 7 and one.num_uncomputed == 13
    cache.rollback(one, 9)
    assert one.num_computed == 7, "what is not computed cannot be gone back to"
    cache.advance(one, 20)
    cache.cache_blocks(one, is_checked=True)
    cache.free(one)
    assert one.num_computed == 0


def test_only_the_cache_says_how_much_of_a_sequence_is_computed() -> None:
    """A layer whose state cannot be cut at any token has one place where it is told to go back, and one to go on."""
    places = set()
    for path in (ROOT / "engine").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                places |= {
                    (path.name, function.name)
                    for node in ast.walk(function)
                    if isinstance(node, ast.Attribute)
                    and node.attr == "num_computed"
                    and isinstance(node.ctx, ast.Store)
                }
    assert places == {("kv_cache.py", "advance"), ("kv_cache.py", "rollback")}


def test_another_kind_of_state_is_a_class_of_its_own() -> None:
    """The cache asks a layer's spec for its tensors, and knows nothing of keys and values."""

    class Sums:
        """One running sum for each block, as a layer without keys might keep."""

        window, device, bytes_per_token = None, torch.device("cpu"), 4

        def make_tensors(self, num_blocks: int, block_size: int) -> tuple[torch.Tensor, ...]:
            return (torch.zeros(num_blocks, block_size),)

    layers = {**specs(None), 1: Sums()}
    cache = KVCache(CachePlan.fit(layers, 60_000, 4, 8, 16), layers)
    assert [len(cache.tensors[layer]) for layer in layers] == [2, 1]
    bad = numbered(20, first=1)
    assert cache.allocate(bad, 20)
    cache.tensors[1][0][bad.block_tables[0][2]] = torch.nan
    cache.advance(bad, 20)
    cache.cache_blocks(bad, is_checked=False)
    other = numbered(20, first=1)
    cache.reuse(other)
    assert other.num_computed == 0, "its last layer's state has been looked at"
    cache.erase(bad)
    assert torch.isfinite(cache.tensors[1][0]).all()
