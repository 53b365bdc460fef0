import pytest

from engine.prefill_budget import FEWEST_TOKENS, FIRST_TOKENS, MIXED_STEPS, STRETCH, PrefillBudget

DECODE = 0.03  # seconds of a step of decodes


def settle(pace: PrefillBudget, seconds_per_token: float, num_decodes: int = 4, num_prompts: int = 1) -> float:
    """Steps with prompts on a machine that takes so long; what the last one took, in steps of decodes alone."""
    for _ in range(3):
        pace.note(num_decodes, 0, DECODE)
    seconds = 0.0
    for _ in range(60):
        num_tokens = pace.budget(num_decodes, num_prompts)
        seconds = DECODE + num_tokens * seconds_per_token
        pace.note(num_decodes, num_tokens, seconds)
    return seconds / DECODE


@pytest.mark.parametrize("seconds_per_token", [0.0006, 0.001, 0.002])
def test_steps_with_prompts_take_as_long_as_allowed(seconds_per_token: float) -> None:
    assert settle(PrefillBudget(64), seconds_per_token) == pytest.approx(STRETCH * 1.25, rel=0.1)


def test_many_that_wait_for_one_stream_may_delay_it_more() -> None:
    assert settle(PrefillBudget(512), 0.001, num_decodes=1, num_prompts=1) < settle(
        PrefillBudget(512), 0.001, num_decodes=1, num_prompts=9
    )
    assert settle(PrefillBudget(512), 0.001, num_decodes=9, num_prompts=1) < STRETCH * 1.2


def test_prompts_come_on_however_slow_the_machine_and_never_beyond_the_limit() -> None:
    slow, fast = PrefillBudget(64), PrefillBudget(64)
    settle(slow, 1.0)
    settle(fast, 1e-6)
    assert slow.budget(4, 1) == FEWEST_TOKENS and fast.budget(4, 1) == 64 and PrefillBudget(3).budget(1, 1) == 3


def test_the_budget_recovers_when_steps_become_faster() -> None:
    pace = PrefillBudget(64)
    settle(pace, 0.01)
    assert pace.budget(4, 1) < 10
    settle(pace, 0.0001)
    assert pace.budget(4, 1) == 64


def test_batches_of_other_sizes_are_compared_with_their_own_like() -> None:
    pace = PrefillBudget(64)
    settle(pace, 0.001, num_decodes=2)
    before = pace.budget(2, 1)
    for _ in range(20):
        pace.note(16, 0, 4 * DECODE)
    assert pace.budget(2, 1) == before < 64
    assert pace.budget(16, 8) == 64  # 2.4 times the longer step


def test_a_size_without_a_measurement_is_measured_first() -> None:
    pace = PrefillBudget(64)
    assert pace.budget(4, 1) == 64  # it knows nothing, as where nobody measures
    pace.note(0, 512, 9.0)
    pace.note(4, 64, 9.0)  # nothing to compare with yet
    assert pace.budget(4, 1) == 0
    pace.note(4, 0, DECODE)
    assert pace.budget(4, 1) == FIRST_TOKENS and pace.budget(8, 1) == 0


def test_decodes_alone_are_measured_again_after_some_mixed_steps() -> None:
    pace = PrefillBudget(64)
    pace.note(4, 0, DECODE)
    budgets = []
    for _ in range(3 * MIXED_STEPS):
        budgets.append(pace.budget(4, 1))
        pace.note(4, budgets[-1], 2 * DECODE)
    assert [place for place, budget in enumerate(budgets) if not budget] == [MIXED_STEPS, 2 * MIXED_STEPS + 1]


@pytest.mark.parametrize("num_prompts", [64, 200])
def test_a_crowd_decodes_together_before_its_answers_of_128_tokens_end(num_prompts: int) -> None:
    """Each row of a step takes as long, a decode or a token of a prompt; a step of one row takes that of 12 more."""
    pace, num_tokens = PrefillBudget(256), 60
    left, num_steps = num_prompts * num_tokens - 60, 0
    pace.note(0, 60, 0.06)
    while left > 0:
        num_decodes = num_prompts - -(-left // num_tokens)
        chunk = min(left, pace.budget(num_decodes, -(-left // num_tokens)))
        pace.note(num_decodes, chunk, 0.0008 * (12 + num_decodes + chunk))
        left, num_steps = left - chunk, num_steps + 1
    assert num_steps < 128
