"""Guesses come from the text so far, and never change an answer."""

import random

import pytest
import torch
from models import FAMILIES, SHARING, VOCAB, tiny_model
from transformers import PreTrainedModel

from engine.build import build_engine
from engine.engine import EngineOptions
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence, TokenOutput
from engine.spec_decode.draft_model import CATCH_UP, DraftModel
from engine.spec_decode.prompt_lookup import LONGEST_PAUSE, NGRAM, Drafter


def test_what_followed_before_is_proposed_again() -> None:
    drafter = Drafter()
    assert drafter.propose([1, 2, 3, 4, 5, 6, 7], 8) == ()
    assert drafter.propose([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], 8) == (4, 5, 6, 7)
    assert drafter.propose([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], 2) == (4, 5)
    assert drafter.propose([1, 2], 8) == () and NGRAM == 3


def test_the_latest_occurrence_is_the_one_that_counts() -> None:
    assert Drafter().propose([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3], 1) == (5,)


def test_right_guesses_make_the_next_one_longer_and_wrong_ones_shorter() -> None:
    drafter, text = Drafter(), [*range(40), 0, 1, 2]
    assert len(drafter.propose(text, 99)) == 4
    drafter.draft_length.note(4, 4, len(text))
    assert len(drafter.propose(text, 99)) == 8
    drafter.draft_length.note(8, 1, len(text))
    assert len(drafter.propose(text, 99)) == 2


def test_guessing_pauses_while_it_does_not_pay() -> None:
    drafter, proposals = Drafter(), 0
    text = [1, 2, 3] * 4
    for _ in range(600):
        text += [1, 2, 3] if len(text) % 3 == 0 else [random.randrange(5)]
        if guess := drafter.propose(text, 8):
            proposals += 1
            drafter.draft_length.note(len(guess), 0, len(text))
    assert 3 <= proposals <= 30 < LONGEST_PAUSE


# --- through the engine


def prompts(count: int, num_passages: int = 6) -> list[list[int]]:
    """With passages that come again, so that there is something to guess."""
    rng = random.Random(3)
    passages = [[rng.randrange(VOCAB) for _ in range(12)] for _ in range(3)]

    def prompt() -> list[int]:
        return [t for _ in range(num_passages) for t in rng.choice(passages)] + [rng.randrange(VOCAB)]

    return [prompt() for _ in range(count)]


def answers(
    family: str,
    num_speculative_tokens: int,
    params: list[SamplingParams],
    draft: PreTrainedModel | None = None,
    num_passages: int = 6,
    **options: int,
) -> tuple[list[list[TokenOutput]], int]:
    """What each of the prompts' sinks would get, and the number of steps."""
    settings = EngineOptions(num_speculative_tokens=num_speculative_tokens, kv_block_size=4, **options)
    engine = build_engine(tiny_model(family), settings, frozenset(), draft)
    asked = zip(prompts(len(params), num_passages), params, strict=True)
    sequences = [Sequence(prompt, own, lambda output: None) for prompt, own in asked]
    outputs: dict[Sequence, list[TokenOutput]] = {sequence: [] for sequence in sequences}
    for sequence in sequences:
        engine.scheduler.add(sequence)
    steps = 0
    while engine.scheduler.has_work:
        batch = engine.scheduler.schedule()
        with torch.inference_mode():
            sampled = engine.runner.run(batch)
        for sequence, output in engine.scheduler.update(batch, sampled):
            outputs[sequence].append(output)
        steps += 1
    assert engine.num_used_blocks == 0
    if isinstance(engine.scheduler.proposer, DraftModel):
        assert engine.scheduler.proposer.num_used_blocks == 0
    return list(outputs.values()), steps


def assert_same(actual: list[list[TokenOutput]], expected: list[list[TokenOutput]]) -> None:
    """But for log-probabilities' last digits: kernels for more rows round differently."""
    for own, other in zip(actual, expected, strict=True):
        assert [(o.token_id, o.finish_reason) for o in own] == [(o.token_id, o.finish_reason) for o in other]
        for one, two in zip(own, other, strict=True):
            if one.sampled is None or one.sampled.logprob is None:
                assert one.sampled == two.sampled
            else:
                assert two.sampled is not None and one.sampled.logprob == pytest.approx(two.sampled.logprob, abs=1e-3)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("family", FAMILIES | SHARING)
@pytest.mark.parametrize("count", [1, 3])
def test_greedy_answers_are_the_same_in_fewer_steps(family: str, count: int) -> None:
    few = dict.fromkeys((5, 6, 7), 60.0)  # so that the answer repeats itself
    params = [SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True, logit_bias=few)] * count
    with_guesses, fewer = answers(family, 8, params)
    without, steps = answers(family, 0, params)
    assert_same(with_guesses, without)
    assert fewer < steps


@pytest.mark.thinned(2)
@pytest.mark.parametrize("family", FAMILIES | SHARING)
def test_sampled_answers_with_all_parameters_are_the_same(family: str) -> None:
    params = [
        SamplingParams(max_tokens=60, temperature=0.3, seed=1, num_logprobs=2),
        SamplingParams(max_tokens=61, temperature=0.8, seed=2, top_k=5, repetition_penalty=1.2),
        SamplingParams(max_tokens=62, temperature=0.5, seed=3, frequency_penalty=0.4, presence_penalty=0.2),
        SamplingParams(max_tokens=63, temperature=0.4, seed=4, min_p=0.1, min_tokens=50, stop_token_ids=(3, 5, 7)),
    ]
    assert_same(answers(family, 4, params)[0], answers(family, 0, params)[0])


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_an_end_among_the_guesses_ends_the_answer_there(family: str, every: int) -> None:
    """Whatever token ends it, and however many blocks there are."""
    plain = SamplingParams(max_tokens=60, temperature=0.0)
    (text,), _ = answers(family, 0, [plain])
    for stop in sorted({output.token_id or 0 for output in text[5:]})[::every]:
        params = [SamplingParams(max_tokens=60, temperature=0.0, stop_token_ids=(stop,))] * 2
        assert_same(answers(family, 8, params)[0], answers(family, 0, params)[0])


def test_scarce_blocks_and_the_context_bound_the_guesses() -> None:
    params = [SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)] * 3
    options = {"max_model_len": 120, "kv_cache_memory": 240 * 2 * 3 * 2 * 16 * 4}
    assert_same(answers("qwen3", 8, params, **options)[0], answers("qwen3", 0, params, **options)[0])


# --- with a draft model

VARIED = [
    SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=60, temperature=0.9, seed=1, num_logprobs=2),
    SamplingParams(max_tokens=61, temperature=0.8, seed=2, top_k=5, repetition_penalty=1.2),
    SamplingParams(max_tokens=63, temperature=0.4, seed=4, min_p=0.1, min_tokens=50, stop_token_ids=(3, 5, 7)),
]


def other_model(family: str) -> PreTrainedModel:
    """Of the same vocabulary, with weights that are nearly those of the large one, so that it is sometimes right."""
    model = tiny_model(family)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.03 * parameter.data.std() * torch.randn_like(parameter.data)
    return model


@pytest.mark.parametrize("family", FAMILIES | SHARING)
def test_a_model_that_guesses_right_saves_steps(family: str) -> None:
    for params in ([VARIED[0]], VARIED):
        alike, fewer = answers(family, 4, params, draft=tiny_model(family))
        without, steps = answers(family, 0, params)
        assert_same(alike, without)
        assert fewer < 0.5 * steps


@pytest.mark.thinned(2)
@pytest.mark.parametrize("family", FAMILIES | SHARING)
def test_a_model_that_is_often_wrong_changes_no_answer(family: str) -> None:
    with_guesses, fewer = answers(family, 4, VARIED, draft=other_model(family))
    without, steps = answers(family, 0, VARIED)
    assert_same(with_guesses, without)
    assert fewer < steps


@pytest.mark.parametrize("num_passages", [21, 22, 30])
def test_a_long_prompt_is_read_by_the_draft_model_in_parts(num_passages: int) -> None:
    assert 12 * 21 < CATCH_UP < 12 * 22
    params = [SamplingParams(max_tokens=60, temperature=0.9, seed=seed, ignore_eos=True) for seed in (1, 2)]
    alike, fewer = answers("gemma3", 4, params, tiny_model("gemma3"), num_passages)
    without, steps = answers("gemma3", 0, params, None, num_passages)
    assert_same(alike, without)
    assert fewer < 0.6 * steps


@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_a_draft_model_lives_with_scarce_blocks_and_a_short_context(family: str) -> None:
    params = [SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)] * 3
    options = {"max_model_len": 120, "kv_cache_memory": 240 * 2 * 7 * 2 * 16 * 4}
    alike = answers(family, 8, params, draft=tiny_model(family), **options)[0]
    assert_same(alike, answers(family, 0, params, **options)[0])


def test_a_draft_model_that_fails_is_done_without() -> None:
    draft = tiny_model("llama")
    forward, calls = draft.forward, []

    def failing(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) > 10:
            raise RuntimeError("out of memory")
        return forward(*arguments, **options)

    draft.forward = failing
    alike, _ = answers("llama", 4, VARIED, draft=draft)
    assert_same(alike, answers("llama", 0, VARIED)[0])
    assert len(calls) == 11
