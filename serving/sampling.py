"""Sampling: a request's parameters over those that the model's authors recommend."""

from typing import TYPE_CHECKING

from schemas import ChatCompletionRequest, CompletionRequest
from serving.loading import LoadedModel

if TYPE_CHECKING:
    from engine.constraint import Constraint
    from engine.sampling_params import ReasoningTokens, SamplingParams


def sampling_params(
    loaded: LoadedModel,
    request: ChatCompletionRequest | CompletionRequest,
    num_prompt_tokens: int,
    *,
    default_max_tokens: int | None = None,
    grammar: "Constraint | None" = None,
    reasoning: "ReasoningTokens | None" = None,
) -> "SamplingParams":
    """Takes the request's values, else the model's recommendations, else this server's defaults.

    An answer is no longer than the context leaves room for; without `default_max_tokens` it may fill all of that.
    """
    from engine.sampling_params import SamplingParams

    left = loaded.engine.max_model_len - num_prompt_tokens
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = default_max_tokens or left
    return SamplingParams(
        **{**loaded.defaults, **request.sampling_values},
        max_tokens=min(left, max(max_tokens, 1)),  # of 0 tokens, which ask for the prompt alone, one is computed
        num_logprobs=request.num_logprobs,
        grammar=grammar,
        reasoning=reasoning,
        adapter=loaded.adapter,
    )
