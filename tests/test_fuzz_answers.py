"""Any answer of a model is read, in linear time, and means the same however it is cut."""

import json
import time
from typing import Any

import pytest
from fuzz_inputs import mixed, splits
from hypothesis import assume, given
from hypothesis import strategies as st
from profiles import examples
from test_answer_parser import CALLS, TOOLS, read

from prompt_templates import TOOL_FORMATS
from text.answer_parser import AnswerParser, ParserOptions
from text.reasoning_format import CHANNEL, THINK
from text.tool_calls.json_calls import LINES
from text.tool_calls.tool_format import ToolFormat

STYLES: tuple[ToolFormat | None, ...] = (None, LINES, *TOOL_FORMATS)
ANSWER_PIECES = (
    *("<tool_call>", "</tool_call>", "<function=", "<function=weather>\n", "</function>", "<parameter=city>\n"),
    *("\n</parameter>\n", "weather", "now", "<arg_key>city</arg_key>", "\n<arg_value>", "</arg_value>\n"),
    *("<think>", "</think>", "```", "```json\n", "```tool_code\n", "weather('x')", '{"name": "weather"', "}", "{", "["),
    *("]", ", ", ": ", '"arguments": ', '"parameters": ', '{"city": "Paris"}', '"', "\\", "\n", " ", ";", "null"),
    *("<|tool_call>", "<tool_call|>", "call:weather{", "call:now{}", 'city:<|"|>', '<|"|>', "<|channel>", "thought\n"),
    *("<channel|>", '{"name": "now", "arguments": {}}', "\ud800", "\\ud800", "é", "\u2028", "1e999", "-", "NaN"),
)
READINGS = st.fixed_dictionaries(
    {},
    optional={
        "is_parallel": st.booleans(),
        "is_forced": st.booleans(),
        "is_strict": st.booleans(),
        "is_structured": st.booleans(),
        "think": st.sampled_from([THINK, CHANNEL]),
        "is_thinking": st.booleans(),
    },
)


@examples(500)
@given(splits(mixed(ANSWER_PIECES, 16)), st.sampled_from(STYLES), READINGS)
def test_an_answer_means_the_same_however_it_comes(
    pieces: list[str], style: ToolFormat | None, reading: dict[str, Any]
) -> None:
    answer = read(pieces, style, **reading)
    assert answer == read(["".join(pieces)], style, **reading)
    for name, arguments in answer.calls:
        assert name in TOOLS
        if answer.reason == "tool_calls":
            assert isinstance(json.loads(arguments), dict)


@examples(300)
@given(splits(mixed(ANSWER_PIECES)), st.sampled_from(STYLES), st.booleans())
def test_what_is_no_call_is_content_to_the_letter(pieces: list[str], style: ToolFormat | None, is_strict: bool) -> None:
    answer = read(pieces, style, is_strict=is_strict)
    assume(not answer.calls)
    assert answer.content == "".join(pieces)


PROSE = st.text("abc .,é", max_size=20)


@given(PROSE, PROSE, st.sampled_from(CALLS))
def test_text_around_calls_is_kept(before: str, behind: str, known: tuple[Any, ...]) -> None:
    style, text, content, calls = known
    assume(not style.is_whole_answer and style.begin)  # the others know a call by where it is
    answer = read([f"{before}\n{text}\n{behind}"], style)
    assert len(answer.calls) == len(calls)
    assert [*answer.content.split()] == [*before.split(), *content.split(), *behind.split()]


def seconds_to_read(style: ToolFormat | None, begin: str, unit: str, count: int) -> float:
    """Of the processor."""
    parser, start = AnswerParser(ParserOptions(TOOLS, style, think=THINK)), time.process_time()
    for piece in [begin, *[unit] * count]:
        parser.put(piece)
    parser.end()
    return time.process_time() - start


@pytest.mark.thinned(3)
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name if style else "none")
def test_reading_takes_linear_time(style: ToolFormat | None) -> None:
    units = ["\n", "<tool_call>", "{", '{"name": "', "```", "```\n", "<think>", '"\\', " ", "[", "now\n", "<arg_key>"]
    units += ['<|"|>', "<|tool_call>call:weather{city:", "call:now{", "city:", ",", "call:"]
    begins = ["", '{"name": "', '<tool_call>{"name": "now", "arguments": "', "```tool_code\n", "[", "now\n"]
    begins += ["<tool_call>\n<function=weather>\n<parameter=city>\n", "<tool_call>weather\n<arg_key>city</arg_key>"]
    begins += ['<|tool_call>call:weather{city:<|"|>', "<|tool_call>call:weather{", "<|tool_call>call:weather{city:"]
    slowest = max((seconds_to_read(style, begin, unit, 2_000), begin, unit) for begin in begins for unit in units)
    assert slowest[0] < 0.3, slowest
