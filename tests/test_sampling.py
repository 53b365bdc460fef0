"""The sampler draws from the distribution of transformers' logits processors, and rows do not touch each other."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.sample.sampler import CANDIDATES, Sampler
from engine.sampling_params import SamplingParams, uniform
from engine.sequence import Sequence

PARAMS = [
    SamplingParams(max_tokens=9),
    SamplingParams(max_tokens=9, temperature=0.3, top_p=0.9),
    SamplingParams(max_tokens=9, temperature=1.7, top_k=5),
    SamplingParams(max_tokens=9, temperature=0.8, min_p=0.1),
    SamplingParams(max_tokens=9, temperature=2.0, top_k=20, top_p=0.7, min_p=0.05),
    SamplingParams(max_tokens=9, temperature=0.9, repetition_penalty=1.3),
]


def draw(logits: torch.Tensor, rows: list[Sequence]) -> list[int | None]:
    return [token and token.token_id for token in Sampler().choose(logits.clone(), rows).read()]


def sequence(params: SamplingParams, prompt: list[int], output: list[int] | None = None) -> Sequence:
    result = Sequence(prompt, params, lambda output: None)
    result.token_ids += output or []
    return result


def probabilities(logits: torch.Tensor, params: SamplingParams, token_ids: list[int]) -> torch.Tensor:
    """By transformers' processors, in the order in which `generate` applies them."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.repetition_penalty != 1.0:
        processors.insert(0, RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    return processors(torch.tensor([token_ids]), logits[None].clone()).softmax(-1)[0]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("params", PARAMS)
def test_frequencies_are_those_of_transformers_processors(params: SamplingParams) -> None:
    torch.manual_seed(1)
    logits = torch.randn(50) * 2
    num_draws = 20_000
    rows = [sequence(replace(params, seed=seed), [3, 7, 7]) for seed in range(num_draws)]
    drawn = torch.tensor(draw(logits.expand(num_draws, -1), rows))
    counts = torch.bincount(drawn, minlength=50).double()
    expected = probabilities(logits, params, [3, 7, 7]).double() * num_draws
    assert (counts[expected == 0] == 0).all()
    assert chi_square_p(counts, expected) > 1e-3


def chi_square_p(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's test: how likely counts at least this far from the expected ones are. Rare outcomes count as one."""
    is_common = expected >= 5
    counts = torch.cat([counts[is_common], counts[~is_common].sum()[None]])
    expected = torch.cat([expected[is_common], expected[~is_common].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(expected) == 1:
        return 1.0
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


def test_the_test_of_frequencies_finds_a_wrong_distribution() -> None:
    expected = torch.full((10,), 2000.0).double()
    torch.manual_seed(0)
    drawn = torch.bincount(torch.randint(10, (20_000,)), minlength=10).double()
    assert chi_square_p(drawn, expected) > 1e-3
    assert chi_square_p(drawn + torch.tensor([300.0, -300] + [0] * 8), expected) < 1e-6


def test_top_p_beyond_the_first_candidates_is_exact() -> None:
    """A flat distribution over a large vocabulary needs nearly all of it."""
    vocab = 8 * CANDIDATES
    logits = torch.linspace(0, 1e-3, vocab)
    rows = [sequence(SamplingParams(max_tokens=1, top_p=0.99, seed=seed), [0]) for seed in range(500)]
    drawn = [token for token in draw(logits.expand(500, -1), rows) if token is not None]
    expected = probabilities(logits, rows[0].params, [0])
    assert (expected[drawn] > 0).all()
    assert min(drawn) < vocab / 10 and max(drawn) > vocab * 9 / 10


def test_penalties_are_openais_formula_over_the_answer_alone() -> None:
    logits = torch.zeros(4)
    params = SamplingParams(max_tokens=9, temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    row = sequence(params, prompt=[3, 3, 3], output=[0, 0, 1])
    penalized = logits[None].clone()
    Sampler()._penalize(penalized, [row])
    assert penalized[0].tolist() == [-1.0, -0.75, 0.0, 0.0]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(2)
    logits = torch.randn(64, 5000) * 3
    rng = random.Random(3)
    rows = [
        sequence(replace(rng.choice(PARAMS), seed=rng.getrandbits(60), presence_penalty=rng.choice([0, 1.5])), [i], [i])
        for i in range(64)
    ]
    together = draw(logits, rows)
    assert together == [draw(logits[i : i + 1], rows[i : i + 1])[0] for i in range(64)]


def test_greedy_rows_take_the_best_token_among_sampled_ones() -> None:
    logits = torch.randn(4, 100)
    rows = [sequence(SamplingParams(max_tokens=9, temperature=t), [0]) for t in (0, 2, 0, 2)]
    drawn = draw(logits, rows)
    assert [drawn[0], drawn[2]] == logits.argmax(-1)[[0, 2]].tolist()


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_without_numbers_is_told_apart(temperature: float) -> None:
    logits = torch.randn(3, 10)
    logits[1, 4] = torch.nan
    rows = [sequence(SamplingParams(max_tokens=9, temperature=temperature), [0]) for _ in range(3)]
    assert [token is None for token in draw(logits, rows)] == [False, True, False]


def test_random_numbers_are_uniform_and_depend_on_seed_and_position_alone() -> None:
    numbers = torch.tensor([[uniform(seed, position) for position in range(200)] for seed in range(-100, 100)])
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert abs(numbers.mean() - 0.5) < 0.01 and abs(numbers.var() - 1 / 12) < 0.005
    for pairs in (numbers[:, :2], numbers[:2].T):  # neither positions nor seeds follow one another
        assert abs(torch.corrcoef(pairs.T)[0, 1]) < 0.25
    assert uniform(5, 9) == uniform(5, 9)


def test_a_bias_is_added_to_the_logits_and_can_ban_or_force() -> None:
    logits = torch.zeros(5)
    params = SamplingParams(max_tokens=1, logit_bias={2: 100.0, 4: -100.0})
    assert draw(logits.expand(50, -1), [sequence(params, [0]) for _ in range(50)]) == [2] * 50
    soft = SamplingParams(max_tokens=1, logit_bias={1: 1.0})
    rows = [sequence(replace(soft, seed=seed), [0]) for seed in range(4000)]
    share = draw(logits.expand(4000, -1), rows).count(1) / 4000
    assert abs(share - torch.tensor([0.0, 1, 0, 0, 0]).softmax(-1)[1]) < 0.03


@pytest.mark.parametrize("temperature", [0, 1])
def test_no_end_before_min_tokens(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0, 50.0]] * 2)
    params = SamplingParams(max_tokens=9, temperature=temperature, min_tokens=2)
    rows = [sequence(params, [0], output) for output in ([0], [0, 0])]
    early, late = Sampler(eos_token_ids=[2]).choose(logits, rows).read()
    assert early is not None and early.token_id != 2 and late is not None and late.token_id == 2


def test_log_probabilities_are_the_models_own_whatever_is_drawn() -> None:
    torch.manual_seed(3)
    logits = torch.randn(3, 40)
    params = SamplingParams(max_tokens=9, temperature=1.5, logit_bias={7: 100.0}, num_logprobs=4, frequency_penalty=2)
    rows = [sequence(params, [0], [1, 1]), sequence(replace(params, num_logprobs=0), [0]), sequence(PARAMS[0], [0])]
    full, chosen_only, none = Sampler().choose(logits.clone(), rows).read()
    expected = logits.log_softmax(-1)
    assert full is not None and full.token_id == 7 and full.logprob == pytest.approx(float(expected[0, 7]))
    assert [token for token, _ in full.top_logprobs] == expected[0].topk(4).indices.tolist()
    assert [value for _, value in full.top_logprobs] == pytest.approx(expected[0].topk(4).values.tolist())
    assert chosen_only is not None and chosen_only.logprob is not None and chosen_only.top_logprobs == ()
    assert none is not None and none.logprob is None


@pytest.mark.parametrize("vocab", [40, 9000, 50_000])
@pytest.mark.parametrize("spread", [1.0, 4.0])
@pytest.mark.usefixtures("threads")
def test_kernels_draw_what_torch_draws(vocab: int, spread: float) -> None:
    """Which draws on GPUs, and where kernels cannot run."""
    kinds: list[dict[str, Any]] = [
        *({}, {"min_p": 0.05}, {"top_k": 20}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02}),
        *({"top_k": 1500}, {"top_p": 0.999}, {"temperature": 2.0, "top_p": 0.95}, {"temperature": 0.2, "top_k": 5}),
    ]
    same, number = 0, 0
    for seed in range(12):
        torch.manual_seed(seed)
        logits = torch.randn(len(kinds), vocab) * spread
        logits[:, ::7] = -torch.inf
        params = [SamplingParams(**{"max_tokens": 9, "temperature": 1.0, "seed": seed, **kind}) for kind in kinds]
        rows = [Sequence([1], own, lambda output: None) for own in params]
        actual = [token.token_id for token in Sampler().choose(logits.clone(), rows).read() if token]
        expected = Sampler()._sample(logits, rows).tolist()
        same += sum(a == b for a, b in zip(actual, expected, strict=True))
        number += len(rows)
    assert same >= number - 1  # rounding may move a number across a border
