"""An answer means the same however its text is cut, and only complete calls of the request's tools are calls."""

import itertools
import json
import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from text.answer_parser import AnswerParser, CallDelta, ContentDelta, ParserOptions
from text.reasoning_format import THINK
from text.tool_calls.element_calls import GLM_XML, QWEN_XML
from text.tool_calls.gemma_calls import GEMMA_CALLS
from text.tool_calls.json_calls import LINES, MARKED, PARAMETERS
from text.tool_calls.named_calls import NAMED
from text.tool_calls.tool_format import ToolFormat

TOOLS: dict[str, dict[str, Any]] = {
    "weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    "now": {"type": "object", "properties": {}},
}


@dataclass
class Answer:
    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)  # name, arguments
    reason: str | None = None


def read(pieces: list[str], style: ToolFormat | None, **reading: Any) -> Answer:
    return fold(AnswerParser(ParserOptions(TOOLS, style, **reading)), pieces)


def fold(parser: AnswerParser, pieces: list[str], is_whole: bool = False) -> Answer:
    """is_whole: the model itself ended the answer."""
    answer, parts = Answer(), list[ContentDelta]()
    for piece in pieces:
        if not parser.is_done:
            parts += parser.put(piece)
    parts += parser.end(is_whole)
    for part in parts:
        answer.content += part.content
        answer.reasoning += part.reasoning
        if part.call is not None and part.call.name is not None:
            assert part.call.index == len(answer.calls)
            answer.calls.append([part.call.name, ""])
        if part.call is not None:
            assert part.call.index == len(answer.calls) - 1
            answer.calls[-1][1] += part.call.arguments
    answer.reason = parser.finish_reason("stop")
    return answer


def whole(text: str, style: ToolFormat | None, **reading: Any) -> Answer:
    return read([text], style, **reading)


def marked(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


PARIS = '{"city": "Paris", "days": 2}'
FAKE = json.dumps({"city": '</tool_call> <tool_call> {"name": "now"} ``` <think> } ] \\ " \n', "days": 1})
QWEN = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nPa </parameter> ris\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>"
)
GLM = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"

GEMMA = '<|tool_call>call:weather{city:<|"|>Pa"} <tool_call|>\n ris<|"|>,days:2}<tool_call|>'

CALLS: list[tuple[ToolFormat, str, str, list[tuple[str, Any]]]] = [  # format, answer, content, calls
    (MARKED, marked("weather", PARIS), "", [("weather", PARIS)]),
    (MARKED, marked("weather", FAKE), "", [("weather", FAKE)]),
    (MARKED, f"Let me see.\n\n{marked('now', '{}')}\n", "Let me see.", [("now", {})]),
    (MARKED, f"{marked('now', '{}')}\n{marked('weather', PARIS)}", "", [("now", {}), ("weather", PARIS)]),
    (MARKED, '<tool_call>{"arguments": {"city": "Oslo"}, "name": "weather"}', "", [("weather", {"city": "Oslo"})]),
    (MARKED, '<tool_call>\n[{"name": "now"}, {"name": "now", "arguments": {}}]</tool_call>', "", [("now", {})] * 2),
    (
        MARKED,
        '<tool_call>{"name": "weather", "arguments": "{\\"days\\": 3}"}</tool_call>',
        "",
        [("weather", {"days": 3})],
    ),
    (MARKED, '<tool_call>{"id": "x", "type": "function", "name": "now", "arguments": null}', "", [("now", {})]),
    (MARKED, f"{marked('now', '{}')} and then", "and then", [("now", {})]),
    (MARKED, f'{{"name": "weather", "arguments": {PARIS}}}', "", [("weather", PARIS)]),
    (MARKED, f'```json\n{{"name": "weather", "arguments": {PARIS}}}\n```', "", [("weather", PARIS)]),
    (MARKED, f"See <tool_call> and\nthis: {marked('now', '{}')}", "See <tool_call> and\nthis:", [("now", {})]),
    (MARKED, f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}\n</tool_call>', "", [("weather", PARIS)]),
    (MARKED, "<tool_call>\n{'name': 'now'}\n</tool_call>", "", [("now", {})]),
    (MARKED, f"```xml\n{marked('weather', PARIS)}\n```", "", [("weather", PARIS)]),
    (QWEN_XML, QWEN.replace("2\n", "1e9\n"), "", [("weather", {"city": "Pa </parameter> ris", "days": 1e9})]),
    (QWEN_XML, QWEN.replace("2\n", "two\n"), "", [("weather", {"city": "Pa </parameter> ris", "days": "two"})]),
    (PARAMETERS, f'{{"name": "weather", "parameters": {PARIS}}}', "", [("weather", PARIS)]),
    (PARAMETERS, '{"name": "now", "parameters": {}}; {"name": "now", "parameters": {}}', "", [("now", {})] * 2),
    (LINES, f'{{"name": "weather", "parameters": {FAKE}}}', "", [("weather", FAKE)]),
    (LINES, '{"name": "now", "parameters": {}}\n{"name": "now"}', "", [("now", {})] * 2),
    (
        LINES,
        f'I will look.\n```json\n{{"name": "weather", "parameters": {PARIS}}}\n```',
        "I will look.",
        [("weather", PARIS)],
    ),
    (LINES, '```tool_code\n[weather(city="Paris", days=2), now()]\n```', "", [("weather", PARIS), ("now", {})]),
    (LINES, '```tool_code\nprint(weather("Rome"))\n```\n', "", [("weather", {"city": "Rome"})]),
    (LINES, '```json\n[\n  {\n    "name": "now",\n    "parameters": {}\n  }\n]\n```', "", [("now", {})]),
    (NAMED, f"weather\n{PARIS}", "", [("weather", PARIS)]),
    (QWEN_XML, QWEN, "", [("weather", {"city": "Pa </parameter> ris", "days": 2})]),
    (QWEN_XML, "Well.\n<tool_call>\n<function=now>\n</function>\n</tool_call>", "Well.", [("now", {})]),
    (QWEN_XML, marked("now", "{}"), "", [("now", {})]),
    (GLM_XML, GLM, "", [("weather", {"city": "Paris"})]),
    (GLM_XML, "<tool_call>now\n</tool_call>\n" + GLM, "", [("now", {}), ("weather", {"city": "Paris"})]),
    (GEMMA_CALLS, GEMMA, "", [("weather", {"city": 'Pa"} <tool_call|>\n ris', "days": 2})]),
    (
        GEMMA_CALLS,
        f"Well.\n<|tool_call>call:now{{}}<tool_call|>{GEMMA.replace('days:2', 'days:two')}",
        "Well.",
        [("now", {}), ("weather", {"city": 'Pa"} <tool_call|>\n ris', "days": "two"})],
    ),
]


def test_the_example_in_the_parsers_docstring_is_true() -> None:
    tools = {"f": {"type": "object", "properties": {"x": {"type": "integer"}}}}
    begin, behind = ["Look: <tool", '_call>{"name": "f", '], "</tool_call> Done."
    parser = AnswerParser(ParserOptions(tools, MARKED))
    given = [parser.put(text) for text in (*begin, '"arguments": {"x": 1}}', behind)]
    call = ContentDelta(call=CallDelta(0, "f", '{"x": 1}'))
    assert given == [[ContentDelta(content="Look:")], [], [call], [ContentDelta(content=" Done.")]]
    parser = AnswerParser(ParserOptions(tools, MARKED))
    *_, undone = [parser.put(text) for text in (*begin, '"arguments": {x: 1}}')]
    assert undone == [ContentDelta(content=' <tool_call>{"name": "f", "arguments": {x: 1}}')]


@pytest.mark.parametrize(("style", "text", "content", "calls"), CALLS)
def test_calls_are_found_and_text_around_them_is_content(
    style: ToolFormat, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    answer = whole(text, style)
    wanted = [(name, json.loads(value) if isinstance(value, str) else value) for name, value in calls]
    assert [(name, json.loads(arguments)) for name, arguments in answer.calls] == wanted
    assert (answer.content, answer.reason) == (content, "tool_calls")


NO_CALLS = [
    (MARKED, marked("unknown", "{}")),
    (MARKED, "<tool_call> is how it is written"),
    (MARKED, '<tool_call>{"name": "now", "surprise": 1}</tool_call>'),
    (MARKED, "a < b <tool"),
    (MARKED, "  indented\n\n"),
    (PARAMETERS, '{"city": "Paris"}'),
    (PARAMETERS, 'In text {"name": "now", "parameters": {}} it is none'),
    (PARAMETERS, '{"name": "now"'),
    (PARAMETERS, "{}"),
    (LINES, '```js\n{"name": "now", "parameters": {}}\n```\nThat is JavaScript.'),
    (LINES, "```tool_code\nimport os\n```"),
    (LINES, "```python\nnow(**x)\n```"),
    (LINES, "``` never closed"),
    (LINES, '[1, 2]\n[{"name": 3}]\n'),
    (NAMED, "weather is nice\n{}"),
    (NAMED, "we"),
    (QWEN_XML, "<tool_call>\n<function=unknown>\n</function>\n</tool_call>"),
    (GLM_XML, "<tool_call>unknown\n</tool_call>"),
    (GEMMA_CALLS, "<|tool_call>call:unknown{}<tool_call|>"),
    (GEMMA_CALLS, "call:now is a call, and a < b <|tool"),
]


@pytest.mark.parametrize(("style", "text"), NO_CALLS)
def test_what_is_no_call_is_content_to_the_letter(style: ToolFormat, text: str) -> None:
    assert whole(text, style) == Answer(content=text, reason="stop")


CUT = [
    (MARKED, marked("weather", PARIS)),
    (PARAMETERS, f'{{"name": "weather", "parameters": {PARIS}}}'),
    (NAMED, f"weather\n{PARIS}"),
    (QWEN_XML, QWEN),
    (GLM_XML, GLM),
    (GEMMA_CALLS, GEMMA),
]


@pytest.mark.parametrize(("style", "text"), CUT)
def test_a_call_that_is_cut_short_is_not_complete(style: ToolFormat, text: str) -> None:
    complete = [end for end in range(len(text) + 1) if whole(text[:end], style).reason == "tool_calls"]
    assert complete == list(range(complete[0], len(text) + 1))
    for end in range(complete[0]):
        answer = whole(text[:end], style)
        assert answer.reason == "stop"
        assert answer.calls or answer.content == text[:end] or not text[:end].strip()


@pytest.mark.parametrize(
    "arguments",
    [
        '{"city": NaN}',
        '{"a": -Infinity}',
        "[" * 100_000,
        "{city: 1}",
        '{"city": }',
        "[1]",
        "3",
        '"text"',
        "{]",
    ],
)
def test_a_call_whose_arguments_cannot_be_read_is_content_to_the_letter(arguments: str) -> None:
    text = marked("weather", arguments)
    assert whole(text, MARKED) == Answer(content=text, reason="stop")


def test_a_text_that_never_ends_is_no_complete_call() -> None:
    answer = whole(marked("weather", '{"a": "b}'), MARKED)
    assert answer.reason == "stop" and len(answer.calls) == 1


REASONING = [
    ("<think>\nHm.\n</think>\n\nYes.", False, "Hm.", "Yes."),
    ("Hm.\n</think>\n\nYes.", True, "Hm.", "Yes."),
    ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
    ("Yes, <think> is a mark.", False, "", "Yes, <think> is a mark."),
    ("Hm, never ends", True, "Hm, never ends", ""),
    ("\n<think>Hm </thin", False, "Hm </thin", ""),
    ("<thi", False, "", "<thi"),
    ("</think>", True, "", ""),
]


@pytest.mark.parametrize(("text", "is_thinking", "reasoning", "content"), REASONING)
@pytest.mark.parametrize("style", [None, MARKED, LINES])
def test_reasoning_is_never_content(
    text: str, is_thinking: bool, reasoning: str, content: str, style: ToolFormat | None
) -> None:
    answer = whole(text, style, think=THINK, is_thinking=is_thinking)
    assert (answer.reasoning, answer.content) == (reasoning, content)


def test_calls_come_after_reasoning_and_none_in_it() -> None:
    text = f"<think>\nShould I {marked('now', '{}')}?\n</think>\n\n{marked('weather', PARIS)}"
    answer = whole(text, MARKED, think=THINK)
    assert answer.calls == [["weather", PARIS]] and "now" in answer.reasoning and not answer.content


def test_numbers_of_any_size_are_kept_as_they_were_written() -> None:
    for number in ("1" * 5000, "1e999", "0.10000000000000000555"):
        text = QWEN.replace("2\n</parameter>", f"{number}\n</parameter>")
        (call,) = whole(text, QWEN_XML).calls
        assert f'"days": {number}}}' in call[1] and whole(text, QWEN_XML).reason == "tool_calls"


@pytest.mark.parametrize(
    ("style", "text"),
    [
        (LINES, "```tool_code\nweather(city='\\ud800')\n```"),
        (LINES, "```tool_code\nweather(days=1e999)\n```"),
        (MARKED, '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"\\ud800\\"}"}</tool_call>'),
        (QWEN_XML, QWEN.replace("\n2\n", '\n["\\ud800"]\n')),
    ],
)
def test_half_characters_and_infinities_never_leave(style: ToolFormat, text: str) -> None:
    for _, arguments in whole(text, style).calls:
        arguments.encode()
        assert "Infinity" not in arguments


def test_marks_that_are_tokens_are_not_their_spelling() -> None:
    marks = {
        "\U0010ff00": "<tool_call>",
        "\U0010ff01": "</tool_call>",
        "\U0010ff02": "<think>",
        "\U0010ff03": "</think>",
    }
    own = {text: character for character, text in marks.items()}
    style = MARKED.marked(own)
    reading: dict[str, Any] = {"marks": marks, "think": THINK.marked(own), "is_thinking": True}
    call = marked("now", "{}").replace("\n", "")
    spelled = f"Is </think> a mark?\U0010ff03\nNo. {call} \U0010ff00 \U0010ff03"
    answer = whole(spelled, style, **reading)
    assert answer.reasoning == "Is </think> a mark?" and not answer.calls
    assert answer.content == f"No. {call} <tool_call> </think>"
    token = marked("weather", '{"city": "\U0010ff01"}').replace("<tool_call>", "\U0010ff00")
    called = whole(f"\U0010ff03{token.replace('</tool_call>', chr(0x10FF01))}", style, **reading)
    assert called.calls == [["weather", '{"city": "</tool_call>"}']] and called.reason == "tool_calls"


def test_beside_a_structure_only_what_begins_as_a_call_is_one() -> None:
    answer = '{"items": [\n{"name": "now", "parameters": {}}\n]}'
    for style in (MARKED, LINES, PARAMETERS, NAMED):
        assert whole(answer, style, is_structured=True) == Answer(content=answer, reason="stop")
    assert whole(marked("now", "{}"), MARKED, is_structured=True).calls
    assert whole('{"name": "now", "parameters": {}}', LINES, is_structured=True).calls


STRICT_NO_CALLS = [
    '[{"name": "now", "parameters": {}}]',
    '{"type": "function", "name": "now", "parameters": {}}',
    '{"parameters": {}, "name": "now"}',
    '{"name": "now", "arguments": {}}',
    '{"n\\u0061me": "now", "parameters": {}}',
    "```tool_code\nnow()\n```",
]


@pytest.mark.parametrize("text", STRICT_NO_CALLS)
def test_strict_calls_have_the_one_form_that_the_grammar_keeps_valid(text: str) -> None:
    assert whole(text, LINES, is_strict=True) == Answer(content=text, reason="stop")
    two = '{"name": "now", "parameters": {}}; {"name": "weather", "parameters": {"wrong": 1}}'
    assert [name for name, _ in whole(two, PARAMETERS, is_strict=True).calls] == ["now"]


def test_what_is_cut_of_forced_calls_is_no_content() -> None:
    text = f"{marked('now', '{}')}\n{marked('weather', PARIS)}"
    for end in range(len(text)):
        for style, own in ((MARKED, text), (LINES, '{"name": "now", "parameters": {}}')):
            assert not whole(own[:end], style, is_forced=True).content


def test_where_calls_are_not_parallel_the_first_one_ends_the_answer() -> None:
    for style, text in CUT:
        answer = whole(f"{text}\n{text} more", style, is_parallel=False)
        assert len(answer.calls) == 1 and not answer.content and answer.reason == "tool_calls"


EVERYTHING = (
    [(style, text, {}) for style, text, _, _ in CALLS]
    + [(style, text, {}) for style, text in NO_CALLS + CUT]
    + [(MARKED, text, {"think": THINK, "is_thinking": thinking}) for text, thinking, _, _ in REASONING]
    + [(LINES, text, {"is_strict": True}) for text in STRICT_NO_CALLS]
    + [(style, text, {"is_structured": True}) for style, text, _, _ in CALLS]
    + [(None, text, {"think": THINK, "is_thinking": thinking}) for text, thinking, _, _ in REASONING]
)


def test_every_split_of_the_text_gives_the_same() -> None:
    rng = random.Random(0)
    for style, text, reading in EVERYTHING:
        for parallel in (True, False):
            options = {**reading, "is_parallel": parallel}
            one = whole(text, style, **options)
            assert read(list(text), style, **options) == one
            for cut in range(1, len(text)):
                assert read([text[:cut], text[cut:]], style, **options) == one, (style, text[:cut])
            for _ in range(20):
                cuts = sorted(rng.choices(range(len(text) + 1), k=4))
                pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
                assert read(pieces, style, **options) == one


def test_text_of_marks_in_any_order_is_read_without_loss_or_error() -> None:
    """What is neither reasoning nor part of a call is content, whatever the model wrote."""
    pieces = [
        "<tool_call>",
        "</tool_call>",
        "<think>",
        "</think>",
        "```",
        "json",
        "\n",
        " ",
        "{",
        "}",
        '"name"',
        ":",
        '"now"',
        '"arguments"',
        "{}",
        ",",
        "[",
        "]",
        "text",
        "<function=now>",
        "</function>",
        "now",
        '"',
        "\\",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "tool_code\n",
        "now()",
        ";",
        "<parameter=",
        ">",
        "<|tool_call>call:",
        "now{",
        '<|"|>',
        "é",
    ]
    rng = random.Random(1)
    for style in (None, MARKED, PARAMETERS, LINES, NAMED, QWEN_XML, GLM_XML, GEMMA_CALLS):
        for _ in range(400):
            text = [rng.choice(pieces) for _ in range(rng.randrange(1, 14))]
            reading = {"think": rng.choice([None, THINK]), "is_thinking": False}
            one = whole("".join(text), style, **reading)
            assert read(text, style, **reading) == one == read(list("".join(text)), style, **reading)
            for word in ("text", "é"):
                shown = one.content + one.reasoning + "".join("".join(call) for call in one.calls)
                assert one.calls or shown.count(word) == "".join(text).count(word)


def test_long_arguments_are_read_in_linear_time() -> None:
    text = marked("weather", json.dumps({"city": "x" * 300_000}))
    pieces = [text[start : start + 3] for start in range(0, len(text), 3)]
    assert read(pieces, MARKED).calls[0][1].endswith('xxx"}')
