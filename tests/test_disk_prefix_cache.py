"""The prefix cache on disk: an engine that starts again computes less, and never anything else."""

import asyncio
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_vision
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import VOCAB, generate
from test_engine import ALL, answers, engine_of, greedy, reference, run, small_cache

from engine.build import open_disk
from engine.disk_prefix_cache import DiskPrefixCache
from engine.engine import Engine, EngineOptions
from engine.prefix_files import Rows
from engine.prefix_folder import PrefixFolder

BLOCK = 4
OPTIONS = EngineOptions(max_num_batched_tokens=24, max_num_mixed_tokens=24, max_num_seqs=16, kv_block_size=BLOCK)
FAMILIES = ["llama", "gemma3", "qwen3_5", "lfm2", "gemma4"]  # full, sliding, recurrent, convolutions, shared layers


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


def engine_with(folder: Path, family: str = "llama", model: str = "model", **changes: Any) -> Engine:
    options = replace(OPTIONS, prefix_cache_dir=folder, **changes)
    engine = engine_of(family, options)
    open_disk(engine, model, options)
    return engine


def disk_of(engine: Engine) -> DiskPrefixCache:
    assert engine.scheduler.disk is not None
    return engine.scheduler.disk


async def ask(engine: Engine, prompt: list[int], num_tokens: int = 12) -> tuple[list[int], int]:
    """Returns the answer, and how many tokens of the prompt were not computed."""
    outputs = [output async for output in generate(engine, prompt, greedy(num_tokens))]
    return [output.token_id for output in outputs if output.token_id is not None], outputs[0].num_cached_tokens


def asked(engine: Engine, *prompts: list[int]) -> list[tuple[list[int], int]]:
    """Asks one after the other, in a process that then ends."""

    async def use(engine: Engine) -> list[tuple[list[int], int]]:
        return [await ask(engine, prompt) for prompt in prompts]

    return run(engine, use)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("family", ALL)
def test_a_prompt_is_not_computed_again_after_a_start(family: str, tmp_path: Path) -> None:
    prompt = prompt_of(101)
    expected = reference(family, prompt, 12)
    assert asked(engine_with(tmp_path, family), prompt) == [(expected, 0)]
    assert asked(engine_with(tmp_path, family), prompt) == [(expected, 100)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_turn_after_a_start_computes_what_is_new(family: str, tmp_path: Path) -> None:
    prompt = prompt_of(90)
    [(answer, _)] = asked(engine_with(tmp_path, family), prompt)
    turn = [*prompt, *answer, *prompt_of(9, seed=1)]
    [(after, num_cached)] = asked(engine_with(tmp_path, family), turn)
    assert after == reference(family, turn, 12)
    assert num_cached == 100  # whole blocks of the 101 tokens that were computed
    assert asked(engine_with(tmp_path, family), turn) == [(after, 108)]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_that_begin_alike_share_what_is_on_disk(family: str, tmp_path: Path) -> None:
    """Several come at once; where a state is needed, its place is where they were seen to differ."""
    beginning = prompt_of(80)
    requests = [[*beginning, *prompt_of(13, seed=seed)] for seed in range(1, 6)]
    expected = [reference(family, prompt, 12) for prompt in requests]
    assert [answer for answer, _ in asked(engine_with(tmp_path, family), *requests[:2])] == expected[:2]

    async def use(engine: Engine) -> list[tuple[list[int], int]]:
        return await asyncio.gather(*(ask(engine, prompt) for prompt in requests))

    results = run(engine_with(tmp_path, family), use)
    assert [answer for answer, _ in results] == expected
    assert all(num_cached >= 80 for _, num_cached in results)


def test_without_the_setting_nothing_is_written(tmp_path: Path) -> None:
    engine = engine_of("llama", OPTIONS)
    open_disk(engine, "model", OPTIONS)
    assert engine.scheduler.disk is None


def test_what_memory_has_is_not_read_and_what_the_disk_has_is_not_written_again(tmp_path: Path) -> None:
    prompt = prompt_of(101)
    engine = engine_with(tmp_path)
    assert [num_cached for _, num_cached in asked(engine, prompt, prompt, prompt)] == [0, 100, 100]
    assert engine.num_disk_tokens == 0 and engine.num_disk_bytes > 0
    before = [(path, path.read_bytes()) for path in files_in(tmp_path)]
    again = engine_with(tmp_path)
    assert [num_cached for _, num_cached in asked(again, prompt, prompt)] == [100, 100]
    assert again.num_disk_tokens == 100
    assert [(path, path.read_bytes()) for path in files_in(tmp_path)] == before


def test_what_was_evicted_from_memory_is_read(tmp_path: Path) -> None:
    """The cache holds two of these prompts, and six take turns."""
    requests = [prompt_of(100 + seed, seed=seed) for seed in range(6)]
    specs = engine_of("llama", OPTIONS).scheduler.cache.specs
    memory = 75 * BLOCK * sum(spec.bytes_per_token for spec in specs.values())
    engine = engine_with(tmp_path, kv_cache_memory=memory, max_model_len=200)

    async def use(engine: Engine) -> list[tuple[list[int], int]]:
        results = []
        for prompt in [*requests, *requests]:
            results.append(await ask(engine, prompt))
            await written(engine)
        return results

    results = run(engine, use)
    expected = [reference("llama", prompt, 12) for prompt in requests]
    assert [answer for answer, _ in results] == [*expected, *expected]
    assert [num_cached for _, num_cached in results[6:]] == [(len(p) - 1) // BLOCK * BLOCK for p in requests]
    assert engine.num_disk_tokens >= 400


@pytest.mark.parametrize("block_size", [3, 8])
@pytest.mark.parametrize("name", ["text between", "many turns"])
def test_images_are_part_of_what_is_found(name: str, block_size: int, tmp_path: Path) -> None:
    """Another image in the same place has other keys, and what is read never ends inside an image."""

    def answered(layout: list[Any]) -> tuple[list[int], int]:
        options = replace(test_vision.SMALL_STEPS, prefix_cache_dir=tmp_path, kv_block_size=block_size)
        engine = test_vision.engine_of(options)
        open_disk(engine, "model", options)
        prompt, images = test_vision.prompt_of(layout)

        async def use(engine: Engine) -> tuple[list[int], int]:
            outputs = [each async for some in engine.stream(prompt, test_vision.GREEDY, images=images) for each in some]
            return [each.token_id for each in outputs if each.token_id is not None], outputs[0].num_cached_tokens

        return run(engine, use)

    layout = test_vision.LAYOUTS[name]
    other = [part + 1 if isinstance(part, int) else part for part in layout]
    assert answered(layout) == (test_vision.expected(name), 0)
    again, num_cached = answered(layout)
    assert again == test_vision.expected(name) and num_cached > 0
    first = test_vision.prompt_of(other)[1][0].start
    assert answered(other)[1] <= first


async def written(engine: Engine) -> None:
    while disk_of(engine).has_writes:
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("change", ["model", "kv_block_size", "family"])
def test_what_another_model_or_layout_wrote_is_never_read(change: str, tmp_path: Path) -> None:
    prompt = prompt_of(101)
    asked(engine_with(tmp_path), prompt)
    other: dict[str, Any] = {"model": "other", "kv_block_size": 8, "family": "qwen3"}
    family = other["family"] if change == "family" else "llama"
    engine = engine_with(tmp_path, **{change: other[change]})
    assert asked(engine, prompt) == [(reference(family, prompt, 12), 0)]
    assert len({path.parent for path in files_in(tmp_path)}) == 2, "both are kept"


def damaged(path: Path, kind: str, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[place] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[place:]
    elif kind == "zero":
        content[place:] = bytes(len(content) - place)
    elif kind == "longer":
        content += b"x" * data.draw(st.integers(1, 100))
    else:
        content[:] = data.draw(st.binary(max_size=200))
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["flip", "cut", "zero", "longer", "foreign"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_costs_time_and_nothing_else(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, prompt = tmp_path_factory.mktemp("cache"), prompt_of(101)
    family = data.draw(st.sampled_from(["llama", "gemma3", "qwen3_5"]))
    asked(engine_with(folder, family), prompt)
    path = data.draw(st.sampled_from(files_in(folder)))
    engine = engine_with(folder, family) if data.draw(st.booleans()) else None  # it knows the file as it was
    damaged(path, kind, data)
    [(answer, _)] = asked(engine or engine_with(folder, family), prompt)
    assert answer == reference(family, prompt, 12)
    assert [answer for answer, _ in asked(engine_with(folder, family), prompt)] == [answer]


def test_files_that_vanish_are_no_failure(tmp_path: Path) -> None:
    prompt = prompt_of(101)
    [(expected, _)] = asked(engine_with(tmp_path), prompt)
    engine = engine_with(tmp_path)
    for path in files_in(tmp_path):
        path.unlink()
    assert asked(engine, prompt) == [(expected, 0)]


def test_two_processes_share_what_they_write(tmp_path: Path) -> None:
    one, other = engine_with(tmp_path), engine_with(tmp_path)
    for disk in (disk_of(one), disk_of(other)):
        disk.idle_refresh, disk.folder.refreshed = 0.01, 0.0
    requests = [prompt_of(101, seed) for seed in range(4)]

    async def use(one: Engine) -> None:
        other.start()
        try:
            for index, prompt in enumerate(requests):
                first, second = (one, other) if index % 2 else (other, one)
                expected = reference("llama", prompt, 12)
                assert await ask(first, prompt) == (expected, 0)
                await written(first)
                await asyncio.sleep(0.2)
                assert await ask(second, prompt) == (expected, 100)
            same = prompt_of(90, seed=9)
            results = await asyncio.gather(ask(one, same), ask(other, same))
            assert [answer for answer, _ in results] == [reference("llama", same, 12)] * 2
        finally:
            await other.close()

    run(one, use)


@pytest.mark.parametrize("limit", [60_000, 150_000])
def test_the_files_stay_within_the_bound_and_what_was_used_last_stays(limit: int, tmp_path: Path) -> None:
    often = prompt_of(60, seed=99)

    def size() -> int:
        return sum(path.stat().st_size for path in files_in(tmp_path))

    for seed in range(8):
        engine = engine_with(tmp_path, model=f"model {seed % 2}", prefix_cache_size=limit)
        prompt = prompt_of(60, seed)
        assert [answer for answer, _ in asked(engine, prompt, often)] == [
            reference("llama", prompt, 12),
            reference("llama", often, 12),
        ]
        assert size() <= limit
    assert size() > limit / 4
    engine = engine_with(tmp_path, model="model 1", prefix_cache_size=limit)
    assert asked(engine, often)[0][1] > 0


def test_a_bound_smaller_than_a_file_keeps_nothing(tmp_path: Path) -> None:
    prompt = prompt_of(60)
    assert asked(engine_with(tmp_path, prefix_cache_size=1000), prompt) == [(reference("llama", prompt, 12), 0)]
    assert files_in(tmp_path) == []


def test_only_this_user_can_read_the_files(tmp_path: Path) -> None:
    asked(engine_with(tmp_path / "new"), prompt_of(60))
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files_in(tmp_path))
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    mine = [tmp_path / "notes.txt", tmp_path / ("0" * 32), tmp_path / "photos" / "kv0-1.kv"]
    mine[2].parent.mkdir()
    for path in mine:
        path.write_text("mine")
    for seed in range(6):
        asked(engine_with(tmp_path, prefix_cache_size=30_000), prompt_of(60, seed))
    assert [path.read_text() for path in mine] == ["mine"] * 3


def is_file(path: Path) -> None:
    path.write_text("a file")


def is_unwritable(path: Path) -> None:
    path.mkdir(mode=0o500)


def is_below_a_file(path: Path) -> None:
    path.parent.joinpath("file").write_text("")
    path.symlink_to(path.parent / "file" / "below")


@pytest.mark.parametrize("spoil", [is_file, is_unwritable, is_below_a_file])
def test_a_directory_that_cannot_be_written_is_no_failure(
    spoil: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, prompt = tmp_path / "cache", prompt_of(60)
    spoil(folder)
    expected = reference("llama", prompt, 12)
    assert asked(engine_with(folder), prompt, prompt) == [(expected, 0), (expected, 56)]
    if spoil is not is_unwritable or os.getuid():  # root writes everywhere
        assert sum("cannot write" in record.message for record in caplog.records) == 1


def test_one_who_leaves_while_it_waits_for_the_disk_is_no_trouble(tmp_path: Path) -> None:
    prompt = prompt_of(200)
    asked(engine_with(tmp_path), prompt)

    async def use(engine: Engine) -> None:
        for delay in (0.0, 0.001, 0.003, 0.01):
            task = asyncio.create_task(ask(engine, prompt))
            await asyncio.sleep(delay)
            task.cancel()
        assert (await ask(engine, prompt))[0] == reference("llama", prompt, 12)

    run(engine_with(tmp_path), use)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_5"])
def test_a_burst_that_the_cache_cannot_hold_at_once_reads_each_beginning_and_none_in_vain(
    family: str, tmp_path: Path
) -> None:
    requests = [prompt_of(101, seed) for seed in range(8)]
    expected = [reference(family, prompt, 12) for prompt in requests]
    asked(engine_with(tmp_path, family), *requests)
    options = small_cache(family, num_tokens=400)
    engine = engine_with(tmp_path, family, kv_cache_memory=options.kv_cache_memory)

    async def use(engine: Engine) -> list[tuple[list[int], int]]:
        leaves = asyncio.create_task(ask(engine, requests[0]))
        tasks = [asyncio.create_task(ask(engine, prompt)) for prompt in requests[1:]]
        await asyncio.sleep(0.005)
        leaves.cancel()
        return await asyncio.gather(*tasks)

    results = run(engine, use)
    assert [answer for answer, _ in results] == expected[1:]
    assert [num_cached for _, num_cached in results] == [100] * 7


class HangingFolder(PrefixFolder):
    """Knows what its files have, and does not get at it until `ends` is set."""

    def __init__(self, other: PrefixFolder) -> None:
        super().__init__(other.root, other.kinds, other.limit)
        self.ends = threading.Event()
        self.refresh()

    def read(self, *arguments: Any) -> Iterator[tuple[list[bytes], Rows]]:
        self.ends.wait(20)
        return iter(())


def test_others_go_on_while_one_waits_for_the_disk(tmp_path: Path) -> None:
    """A disk that hangs holds up none but those who wait for it, and them for no longer than they have patience."""
    prompt, other = prompt_of(101), prompt_of(50, seed=1)
    asked(engine_with(tmp_path), prompt)
    engine = engine_with(tmp_path)
    disk = disk_of(engine)
    disk.patience, disk.folder = 1.0, (folder := HangingFolder(disk.folder))

    async def use(engine: Engine) -> None:
        waiting = asyncio.create_task(ask(engine, prompt))
        await asyncio.sleep(0.02)
        assert await ask(engine, other) == (reference("llama", other, 12), 0)
        assert not waiting.done()
        assert await waiting == (reference("llama", prompt, 12), 0)
        folder.ends.set()

    run(engine, use)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_traffic_over_a_small_cache_and_a_small_disk_gives_the_right_answers(
    family: str, tmp_path: Path
) -> None:
    rng = random.Random(3)
    beginnings = [prompt_of(rng.randrange(20, 90), seed) for seed in range(4)]
    for start in range(3):
        requests = [[*rng.choice(beginnings), *prompt_of(rng.randrange(1, 20), rng.randrange(6))] for _ in range(12)]
        engine = engine_with(tmp_path, family, max_num_seqs=4, max_model_len=200, prefix_cache_size=3_000_000)
        expected = [reference(family, prompt, 12) for prompt in requests]
        assert answers(engine, requests, greedy(12), delay=0.01 * start) == expected
    assert engine.num_disk_tokens > 0
