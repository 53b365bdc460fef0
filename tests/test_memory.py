"""What the C library has given out, and when what was freed is given back."""

import time

import pytest

from engine import memory
from engine.memory import Trimmer

PIECE, NUM_PIECES = 100_000, 500  # bytes; small enough to come from the heap


@pytest.mark.skipif(not memory.IS_COUNTED, reason="only GNU's C library counts what is in use")
def test_what_is_made_in_memory_that_was_freed_counts_too() -> None:
    def pieces() -> list[bytearray]:
        return [bytearray(PIECE) for _ in range(NUM_PIECES)]

    freed = pieces()
    pinned = bytearray(PIECE)  # what was freed below it stays with the process
    del freed
    before = memory.allocated()
    made = pieces()
    assert 0.9 < (memory.allocated() - before) / (len(made) * PIECE) < 1.5
    del made
    assert abs(memory.allocated() - before) < 10 * PIECE
    del pinned


class Trimmed(list[float]):
    """When there was trimming."""

    def __call__(self) -> None:
        self.append(time.monotonic())

    def wait(self, since: float) -> None:
        end = time.monotonic() + 10
        while not any(at >= since for at in self) and time.monotonic() < end:
            time.sleep(0.01)
        assert any(at >= since for at in self)


def test_what_was_freed_is_given_back_after_the_last_that_asked() -> None:
    trimmed = Trimmed()
    trimmer = Trimmer(trimmed, delay=0.3)
    trimmer.ask()
    time.sleep(0.2)
    last = time.monotonic()
    trimmer.ask()
    trimmed.wait(last + 0.3)


def test_a_hundred_that_ask_at_once_are_two_at_most_and_the_next_begin_anew() -> None:
    trimmed = Trimmed()
    trimmer = Trimmer(trimmed, delay=0.5)
    for most in (2, 4):
        last = time.monotonic()
        for _ in range(100):
            trimmer.ask()
        trimmed.wait(last + 0.5)
        time.sleep(1)
        assert len(trimmed) <= most
