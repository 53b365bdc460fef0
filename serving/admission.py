"""Admission: requests that the engine can never answer are refused here, before anything is computed for them."""

from typing import TYPE_CHECKING

from errors import ContextLengthExceeded, InvalidRequest
from schemas import ChatCompletionRequest, CompletionRequest
from serving.loading import LoadedModel
from telemetry import request_record

if TYPE_CHECKING:
    from engine.engine import Engine

MIN_CHARACTERS = 2**20  # a prompt of so many is tokenized, however short the context is


def check_num_answers(engine: "Engine", num_answers: int, param: str) -> None:
    """Raises InvalidRequest for more answers than can ever be queued, and Overloaded for more than can be now."""
    if num_answers > engine.admission.max_sequences:
        raise InvalidRequest(
            f"You requested {num_answers} answers, but this server accepts at most "
            f"{engine.admission.max_sequences} at a time: ask for fewer.",
            param=param,
        )
    engine.check_open(num_answers, request_record.current().client)


def check_characters(loaded: LoadedModel, num_characters: int, param: str) -> None:
    """Raises ContextLengthExceeded for a text that is too long whatever its tokens are.

    Such a text is not tokenized: that would take a second per megabyte.
    """
    limit = loaded.engine.max_model_len
    if num_characters > max(limit * loaded.template.longest_token, MIN_CHARACTERS):
        raise ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens, and a prompt of {num_characters} "
            "characters is longer than that. Please reduce the length of the prompt. "
            "(context_length_exceeded)",
            param=param,
        )


def check_request(
    engine: "Engine", request: ChatCompletionRequest | CompletionRequest, prompt_ids: list[int], param: str
) -> None:
    """Raises InvalidRequest for token ids that the model does not have, and for limits beyond its context.

    Raises ContextLengthExceeded for a prompt that leaves no room for an answer. `param` is the prompt's field.
    """
    _check_prompt_ids(engine, prompt_ids, param)
    _check_token_ids(engine, request)
    limit, num_tokens = engine.max_model_len, len(prompt_ids)
    if num_tokens >= limit:
        error = ContextLengthExceeded(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{num_tokens + 1} tokens ({num_tokens} in the prompt, 1 in the completion). "
            "Please reduce the length of the prompt. (context_length_exceeded)",
            param=param,
        )
        error.counts = (num_tokens, limit)
        raise error
    _check_limits(limit, request)


def _check_prompt_ids(engine: "Engine", token_ids: list[int], param: str) -> None:
    """Raises InvalidRequest for no tokens, and for ones without an embedding, as a tokenizer may have for images."""
    if not token_ids:
        raise InvalidRequest("The prompt is empty: send at least one token.", param=param, code="invalid_value")
    if max(token_ids) >= engine.num_embeddings:
        raise InvalidRequest(
            f"The prompt has the token id {max(token_ids)}, but the model's token ids must be less "
            f"than {engine.num_embeddings}.",
            param=param,
            code="invalid_value",
        )


def _check_token_ids(engine: "Engine", request: ChatCompletionRequest | CompletionRequest) -> None:
    for name, token_ids in (("logit_bias", request.logit_bias), ("stop_token_ids", request.stop_token_ids)):
        if any(not 0 <= token_id < engine.num_embeddings for token_id in token_ids or ()):
            raise InvalidRequest(
                f"{name}: token ids must be from 0 to {engine.num_embeddings - 1}.",
                param=name,
                code="invalid_value",
            )


def _check_limits(limit: int, request: ChatCompletionRequest | CompletionRequest) -> None:
    if (request.max_tokens or 0) > limit and not request.is_capped:
        raise InvalidRequest(
            f"You requested {request.max_tokens} tokens in the completion, but this model's "
            f"maximum context length is {limit} tokens. Please ask for fewer tokens.",
            param=request.limit_field,
            code="invalid_value",
        )
    most = limit if request.max_tokens is None else request.max_tokens
    if (request.min_tokens or 0) > most:
        what = "the model's context length" if request.max_tokens is None else request.limit_field
        raise InvalidRequest(
            f"min_tokens must be at most {most} tokens, which is {what}: lower it.",
            param="min_tokens",
            code="invalid_value",
        )
