"""One thread, its inbox and its steps."""

import asyncio
import threading
from collections.abc import Callable

import pytest

from engine.worker import Worker


class Countdown:
    """So many steps of work; `free` has to be set for each of them to return."""

    def __init__(self, num_left: int = 0) -> None:
        self.num_left = num_left
        self.log: list[object] = []
        self.free = threading.Event()
        self.free.set()
        self.has_ended = threading.Event()
        self.worker = Worker("countdown", lambda: self.num_left, self.step, self.end)
        self.is_in_step = threading.Event()

    def step(self) -> None:
        self.is_in_step.set()
        self.free.wait()
        self.num_left -= 1
        self.log.append("step")

    def end(self, error: BaseException | None) -> None:
        self.log.append(error)
        self.has_ended.set()

    def note(self, what: object) -> Callable[[], object]:
        return lambda: self.log.append(what)

    def fail(self) -> None:
        raise ValueError("a command fails")

    def close(self, timeout: float | None = 0, patience: float = 5.0) -> None:
        asyncio.run(self.worker.close(lambda: self.num_left, timeout, patience))


def test_it_steps_while_there_is_work_and_ends_when_closed() -> None:
    countdown = Countdown(3)
    countdown.worker.start()
    countdown.close(timeout=5)
    assert countdown.log == ["step"] * 3 + [None] and not countdown.worker.is_alive


def test_commands_are_carried_out_in_their_order_between_two_steps() -> None:
    countdown = Countdown(2)
    countdown.free.clear()
    countdown.worker.start()
    for number in range(3):
        countdown.worker.post(countdown.note(number))
    countdown.free.set()
    countdown.close(timeout=5)
    assert [entry for entry in countdown.log if isinstance(entry, int)] == [0, 1, 2]
    assert countdown.log[-1] is None and countdown.log.count("step") == 2


def test_a_command_wakes_a_thread_without_work() -> None:
    countdown, woken = Countdown(), threading.Event()
    countdown.worker.start()
    assert not countdown.worker.has_commands
    countdown.worker.post(lambda: setattr(countdown, "num_left", 2))
    countdown.worker.post(woken.set)
    assert woken.wait(5)
    countdown.close(timeout=5)
    assert countdown.log == ["step", "step", None]


def test_a_thread_without_work_sleeps() -> None:
    """It asks whether there is work once for each command, and not in between."""
    questions: list[int] = []
    worker = Worker("idle", lambda: questions.append(0), lambda: None, lambda error: None)
    worker.start()
    threading.Event().wait(0.1)
    num_asked = len(questions)
    threading.Event().wait(0.1)
    assert len(questions) == num_asked <= 2
    asyncio.run(worker.close(lambda: False, 0, 5))


def test_what_waits_while_a_step_computes_is_seen() -> None:
    countdown = Countdown(1)
    countdown.free.clear()
    countdown.worker.start()
    assert countdown.is_in_step.wait(5) and not countdown.worker.has_commands
    countdown.worker.post(countdown.note("later"))
    assert countdown.worker.has_commands
    countdown.free.set()
    countdown.close(timeout=5)
    assert not countdown.worker.has_commands


@pytest.mark.parametrize("num_steps", [0, 1])
def test_an_error_ends_the_thread_and_is_handed_over(num_steps: int) -> None:
    countdown = Countdown(num_steps)
    countdown.worker.post(countdown.fail)
    countdown.worker.start()
    assert countdown.has_ended.wait(5)
    (error,) = countdown.log
    assert isinstance(error, ValueError) and str(error) == "a command fails"
    countdown.close(timeout=5)  # although there is work left
    assert not countdown.worker.is_alive


def test_an_error_of_a_step_is_handed_over_too() -> None:
    def step() -> None:
        raise MemoryError

    errors: list[BaseException | None] = []
    worker = Worker("broken", lambda: True, step, errors.append)
    worker.post(lambda: None)
    worker.start()
    asyncio.run(worker.close(lambda: True, 5, 5))
    assert [type(error) for error in errors] == [MemoryError]


def test_work_is_left_when_the_time_is_up() -> None:
    countdown = Countdown(10**9)
    countdown.worker.start()
    countdown.close(timeout=0.05)
    assert 0 < countdown.num_left < 10**9 and countdown.log[-1] is None


def test_a_step_that_hangs_is_abandoned() -> None:
    countdown = Countdown(1)
    countdown.free.clear()
    countdown.worker.start()
    countdown.close(timeout=0.05, patience=0.05)
    assert countdown.worker.is_alive and not countdown.log
    countdown.free.set()
    assert countdown.has_ended.wait(5) and countdown.log == ["step", None]


def test_without_a_timeout_it_waits_for_the_last_step_however_long() -> None:
    countdown = Countdown(1)
    countdown.free.clear()
    countdown.worker.start()
    threading.Timer(0.2, countdown.free.set).start()
    countdown.close(timeout=None, patience=0.0)
    assert countdown.log == ["step", None] and not countdown.worker.is_alive


def test_one_that_was_never_started_can_be_closed() -> None:
    countdown = Countdown(1)
    countdown.close(timeout=5)
    assert countdown.log == []
