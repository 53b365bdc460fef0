"""A token's bytes are exactly what it adds to the text."""

import pytest
from models import byte_tokenizer

from engine.sampling import SampledToken
from logprobs import UNLIKELY, TokenTexts

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


def test_the_legacy_shape_counts_characters_and_has_the_chosen_token_among_the_top() -> None:
    ids = byte_tokenizer()("abc", add_special_tokens=False).input_ids
    shape = TEXTS.completion([SampledToken(i, -2.0, ((ids[0], -0.5),)) for i in ids[1:]], offset=10)
    assert shape.tokens == ["b", "c"] and shape.text_offset == [10, 11]
    assert shape.top_logprobs == [{"a": -0.5, "b": -2.0}, {"a": -0.5, "c": -2.0}]


def test_the_legacy_shape_begins_with_what_the_text_does_not_show() -> None:
    ids = byte_tokenizer()("日b", add_special_tokens=False).input_ids
    shape = TEXTS.completion([SampledToken(258), *(SampledToken(i, -1.0) for i in ids)], offset=-len("<|im_end|>"))
    assert shape.token_logprobs == [None, -1.0, -1.0, -1.0, -1.0] and shape.top_logprobs[0] is None
    assert shape.text_offset == [0, 0, 0, 0, 1]
