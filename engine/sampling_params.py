"""SamplingParams: how the tokens of one answer are chosen. SampledToken: a token that was chosen."""

import random
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass

from engine.constraint import Constraint
from engine.lora.adapter import Adapter

MIN_TEMPERATURE = 1e-5  # below it the division would overflow, and the answer is the greedy one anyway
_MASK64 = 2**64 - 1


@dataclass(frozen=True)
class ReasoningTokens:
    """The tokens that begin and end a model's reasoning, which comes before its answer."""

    begin: int
    end: int
    is_open: bool  # the prompt ends inside the reasoning

    def are_open(self, output_ids: Rows[int]) -> bool:
        """Returns whether the output ends inside the reasoning. One token, such as a line break, may come before its
        begin."""
        return self.end not in output_ids and (self.is_open or self.begin in output_ids[:2])


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, and when to stop. Field names are those of the request.

    Source: https://platform.openai.com/docs/api-reference/chat/create; top_k, min_p and repetition_penalty as in
    transformers' logits processors, in their order.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: Rows[int] = ()  # end the answer as the model's own end-of-sequence tokens do
    ignore_eos: bool = False
    min_tokens: int = 0  # until then no end-of-sequence token can be chosen
    logit_bias: Mapping[int, float] | None = None  # token id -> the value added to its logit
    num_logprobs: int | None = None  # best tokens to report for each chosen one; None: no log-probabilities
    num_prompt_logprobs: int | None = None  # the same for the prompt's tokens, from its second one on
    grammar: Constraint | None = None  # which tokens may follow which
    reasoning: ReasoningTokens | None = None  # inside the reasoning, stop_token_ids do not end the answer
    adapter: Adapter | None = None  # which changes the model for this answer, from its prompt on

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def is_independent(self) -> bool:
        """Whether a token's choice depends only on how many tokens of the answer came before it, not on which."""
        return (
            self.grammar is None
            and not self.presence_penalty
            and not self.frequency_penalty
            and self.repetition_penalty == 1.0
        )

    @property
    def needs_sorting(self) -> bool:
        return self.top_p < 1.0 or self.top_k > 0


@dataclass(frozen=True)
class SampledToken:
    """A token with its log-probability: the model's own, in float32, before penalties, bias and temperature."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, log-probability), best first


def uniform(seed: int, position: int) -> float:
    """Returns a number in [0, 1) that depends on the seed and the position alone, not on the batch.

    Source: SplitMix64 (Steele, Lea, Flood 2014), its output used as the next round's input.
    """
    state = seed & _MASK64
    for word in (position, 0x5851F42D4C957F2D):
        state = (state + word * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return (state >> 11) / 2**53


def fresh_seed() -> int:
    return random.SystemRandom().getrandbits(64)
