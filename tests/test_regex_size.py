"""Counts in regular expressions, written out."""

import time

import pytest

from text.regex_size import expanded_size, is_too_large


@pytest.mark.parametrize(
    ("pattern", "size"),
    [
        ("", 0),
        ("abc", 3),
        ("a{5}", 5),
        ("a{2,7}b", 8),
        ("a{3,}", 3),
        ("a{0}", 1),
        (r"\d{4}-\d{2}", 7),
        ("[a-z]{1,200}@x", 202),
        (r"[\]{}()]{3}", 3),
        ("(ab{3}c){10}", 50),
        ("((a{10}){10}){10}", 1000),
        ("(a{10}|b){2}", 24),
        ("(a+){100}", 100),
        ("a)b{3}", 5),
        ("((a{3}", 3),
    ],
)
def test_the_size_is_that_of_the_pattern_written_out(pattern: str, size: int) -> None:
    assert expanded_size(pattern) == size


@pytest.mark.parametrize("pattern", ["(a{1000}){1000}", "root ::= /(a{1000}){1000}/", "(((((a{99}){99}){99})+)?){99}"])
def test_bombs_are_too_large(pattern: str) -> None:
    assert is_too_large(pattern)


@pytest.mark.parametrize("pattern", [r"[\w.]{1,64}@[\w-]{1,63}(\.[a-z]{2,24}){1,3}", "x" * 100_000, "a{10000}"])
def test_what_people_write_is_not(pattern: str) -> None:
    assert not is_too_large(pattern)


@pytest.mark.parametrize("text", ["[" * 200_000, "(" * 200_000, "{" * 200_000, "(a{9}" * 40_000, "{1," * 60_000])
def test_it_takes_linear_time(text: str) -> None:
    begin = time.process_time()  # of this process alone, on a machine that may do other things
    expanded_size(text)
    assert time.process_time() - begin < 3
