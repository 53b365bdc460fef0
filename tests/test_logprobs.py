"""A token's bytes are exactly what it adds to the text."""

import pytest
from models import byte_tokenizer

from engine.sampling_params import SampledToken
from serving.completion import Prompt
from text.logprobs import UNLIKELY, TokenTexts

TEXTS = TokenTexts(byte_tokenizer())


@pytest.mark.parametrize("text", ["plain", " naïve\n", "日本😀", "\x00\x7f\xa0\xad", "<|im_end|>"])
def test_the_bytes_of_tokens_are_the_bytes_of_their_text(text: str) -> None:
    ids = byte_tokenizer()(text, add_special_tokens=False).input_ids
    assert b"".join(map(TEXTS.bytes_of, ids)) == text.encode()


def test_a_part_of_a_character_is_shown_by_its_bytes() -> None:
    first = byte_tokenizer()("日", add_special_tokens=False).input_ids[0]
    assert TEXTS.text_of(first) == "bytes:\\xe6" and TEXTS.chat([SampledToken(first, -1.0)]).content[0].bytes == [0xE6]


def test_what_has_no_probability_is_shown_as_openai_shows_it() -> None:
    token = TEXTS.chat([SampledToken(3, float("-inf"), ((4, float("-inf")),))]).content[0]
    assert token.logprob == token.top_logprobs[0].logprob == UNLIKELY


def test_the_legacy_shape_has_the_chosen_token_among_the_top() -> None:
    ids = byte_tokenizer()("abc", add_special_tokens=False).input_ids
    scored = [SampledToken(ids[0]), *(SampledToken(i, -2.0, ((ids[0], -0.5),)) for i in ids[1:])]
    shape = TEXTS.completion(scored, [0, 1, 2])
    assert shape.tokens == ["a", "b", "c"] and shape.text_offset == [0, 1, 2]
    assert shape.token_logprobs == [None, -2.0, -2.0]
    assert shape.top_logprobs == [None, {"a": -0.5, "b": -2.0}, {"a": -0.5, "c": -2.0}]


def test_offsets_in_a_prompt_are_where_the_characters_begin() -> None:
    ids = byte_tokenizer()("日b", add_special_tokens=False).input_ids
    assert Prompt("日b", [258, *ids], num_hidden=len("<|im_end|>")).offsets(TEXTS) == [0, 0, 0, 0, 1]
