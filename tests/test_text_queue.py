"""Properties of text_queue.py: every text comes once, in batches that fit, and nobody waits for a crowd's end."""

import random
import weakref

from engine.embedding.text_queue import TextQueue


def drained(queue: TextQueue[str]) -> list[list[tuple[str, int, int]]]:
    batches = []
    while batch := queue.take():
        batches.append([(item.job, item.index, item.length) for item in batch])
    return batches


def add(queue: TextQueue[str], job: str, lengths: list[int], prompt: str = "") -> None:
    queue.add(job, [f"{job}{number}" for number in range(len(lengths))], lengths, prompt)


def test_every_text_comes_once_and_batches_fit_with_padding() -> None:
    rng = random.Random(0)
    queue: TextQueue[str] = TextQueue(100)
    jobs = {f"job{number}": [rng.randint(1, 120) for _ in range(rng.randint(1, 40))] for number in range(20)}
    for job, lengths in jobs.items():
        add(queue, job, lengths)
    batches = drained(queue)
    seen = sorted(entry for batch in batches for entry in batch)
    assert seen == sorted((job, i, length) for job, lengths in jobs.items() for i, length in enumerate(lengths))
    for batch in batches:
        sizes = [length for _, _, length in batch]
        assert len(batch) == 1 or max(sizes) * len(batch) <= 100
        assert min(sizes) >= max(sizes) / 2
    assert not queue


def test_texts_of_several_jobs_share_a_batch() -> None:
    queue: TextQueue[str] = TextQueue(100)
    for job in "abc":
        add(queue, job, [10])
    assert [{job for job, _, _ in batch} for batch in drained(queue)] == [{"a", "b", "c"}]


def test_a_short_job_does_not_wait_for_a_long_ones_end() -> None:
    queue: TextQueue[str] = TextQueue(100)
    add(queue, "long", [50] * 100)
    queue.take()
    add(queue, "short", [3])
    batches = drained(queue)
    assert ("short", 0, 3) in batches[0] + batches[1]


def test_texts_with_different_prompts_are_not_mixed() -> None:
    queue: TextQueue[str] = TextQueue(100)
    add(queue, "a", [5], "query: ")
    add(queue, "b", [5])
    assert [len(batch) for batch in drained(queue)] == [1, 1]


def test_a_queue_that_is_empty_holds_nothing() -> None:
    queue: TextQueue[object] = TextQueue(100)
    for number in range(50):
        queue.add(job := Held(), ["text"], [number + 1], "")
        gone = weakref.ref(job)
        del job
    while queue.take():
        pass
    assert gone() is None
    queue.add(job := Held(), ["text"], [1], "")
    gone = weakref.ref(job)
    queue.remove([job])
    del job
    assert gone() is None


class Held:
    """Something that a reference can be followed to."""


def test_what_is_removed_does_not_come() -> None:
    queue: TextQueue[str] = TextQueue(100)
    add(queue, "a", [5, 80, 90])
    add(queue, "b", [5])
    queue.remove(["a"])
    assert drained(queue) == [[("b", 0, 5)]]
