import pytest

from engine.pace import FEWEST_TOKENS, STRETCH, Pace

DECODE = 0.03  # seconds of a step of decodes


def settle(pace: Pace, seconds_per_token: float, steps: int = 60) -> float:
    """Steps with prompts on a machine that takes so long; what the last one took."""
    for _ in range(3):
        pace.note(4, 0, DECODE)
    seconds = 0.0
    for _ in range(steps):
        seconds = DECODE + pace.budget * seconds_per_token
        pace.note(4, pace.budget, seconds)
    return seconds


@pytest.mark.parametrize("seconds_per_token", [0.0005, 0.001, 0.003])
def test_steps_with_prompts_take_as_long_as_allowed(seconds_per_token: float) -> None:
    seconds = settle(Pace(64), seconds_per_token)
    assert STRETCH * DECODE * 0.8 < seconds <= STRETCH * DECODE * 1.05


def test_prompts_come_on_however_slow_the_machine_and_never_beyond_the_limit() -> None:
    slow, fast = Pace(64), Pace(64)
    settle(slow, 1.0)
    settle(fast, 1e-6)
    assert slow.budget == FEWEST_TOKENS and fast.budget == 64


def test_the_budget_recovers_when_steps_become_faster() -> None:
    pace = Pace(64)
    settle(pace, 0.01)
    assert pace.budget < 10
    settle(pace, 0.0001)
    assert pace.budget == 64


def test_steps_without_decodes_or_with_less_than_was_allowed_teach_nothing() -> None:
    pace = Pace(64)
    pace.note(0, 512, 9.0)
    pace.note(4, 64, 9.0)  # nothing to compare with yet
    assert pace.budget == 64
    pace.note(4, 0, DECODE)
    pace.note(4, 3, DECODE * 1.1)
    assert pace.budget == 64
