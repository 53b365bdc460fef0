"""Gemma 4's turns: thoughts, end tokens, tools and their results in the prompt, and what messages cannot spell."""

import json
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from genuine_templates import GEMMA_4_TOKENS, gemma_4
from test_answer_parser import Answer, fold, read

from engine.sample.thinking import Thinking
from prompt_templates import RenderOptions
from schemas import Message
from serving.chat import ReasoningState, parser_options_of
from text.answer_parser import AnswerParser
from text.detokenizer import TextDecoder
from text.reasoning_format import CHANNEL
from text.tool_calls.gemma_calls import GEMMA_CALLS
from text.tool_calls.tool_format import ToolFormat
from text.tools import ToolSet

INTERLEAVED = "google-gemma-4-31B-it-interleaved"
TEMPLATES = ["google-gemma-4-31B-it", INTERLEAVED]
HEADER, OFF = "<|turn>model\n", "<|channel>thought\n<channel|>"
USER, SYSTEM = {"role": "user", "content": "Weather in Oslo?"}, {"role": "system", "content": "Be brief."}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": SCHEMA}}
BOX = ToolSet(shown=(), schemas={"weather": SCHEMA, "now": {"type": "object"}}, fields={}, is_required=False,
              is_parallel=True, is_strict=False)  # fmt: skip


def call(number: int, name: str, arguments: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"c{number}", "type": "function", "function": function}


def result(number: int, content: str = "sunny") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"c{number}", "content": content}


def calls(*own: dict[str, Any], **said: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", **said, "tool_calls": [*own]}


def rendered(messages: list[dict[str, Any]], template: Any = None, **options: Any) -> str:
    template = template or gemma_4()
    token_ids = template.render_chat([Message(**message) for message in messages], RenderOptions(**options))
    return str(template.tokenizer.decode(token_ids))


# --- thoughts

THOUGHTS = [  # what is written, reasoning, content
    ("<|channel>thought\nHm.\n<channel|>Yes.", "Hm.", "Yes."),
    ("<|channel>thought\nHm.<channel|>\nYes.", "Hm.", "Yes."),
    ("<|channel>thought\n<channel|>Yes.", "", "Yes."),
    ("<|channel>thought<channel|>Yes.", "", "Yes."),
    ("<|channel><channel|>Yes.", "", "Yes."),
    ("\n<|channel>thought\n\n<channel|>\n\nYes.", "", "Yes."),
    ("<|channel>thoughtful\nmen<channel|>Yes.", "thoughtful\nmen", "Yes."),
    ("<|channel>Hm.<channel|>Yes.", "Hm.", "Yes."),
    ("Yes, <|channel> is a mark.", "", "Yes, <|channel> is a mark."),
    ("<|channel>thought\nHm, never ends", "Hm, never ends", ""),
    ("<|channel>thou", "", ""),
    ("<|channel>thought\n", "", ""),
]


@pytest.mark.parametrize(("text", "reasoning", "content"), THOUGHTS)
@pytest.mark.parametrize("style", [None, GEMMA_CALLS])
def test_thoughts_have_no_label_and_an_empty_channel_has_none(
    text: str, reasoning: str, content: str, style: ToolFormat | None
) -> None:
    for pieces in ([text], list(text)):
        answer = read(pieces, style, think=CHANNEL)
        assert (answer.reasoning, answer.content) == (reasoning, content)


@pytest.mark.parametrize("style", [None, GEMMA_CALLS])
def test_an_answer_that_is_cut_anywhere_shows_no_label(style: ToolFormat | None) -> None:
    text = "<|channel>thought\nHm, thought.\n<channel|>Yes, a thought."
    for end in range(len("<|channel>"), len(text) + 1):
        for answer in (read([text[:end]], style, think=CHANNEL), read(list(text[:end]), style, think=CHANNEL)):
            assert "Yes, a thought.".startswith(answer.content)
            assert "Hm, thought.\n<channel|>".startswith(answer.reasoning)


def answered(text: str, state: Any = "unsaid", is_special: bool = True) -> Answer:
    """As the server reads an answer of the model."""
    template = gemma_4(is_special=is_special)
    reading = parser_options_of(template, BOX, state, False, None)
    decoder, token_ids = TextDecoder(template.marking_detokenizer), template.encode(text)
    return fold(AnswerParser(reading), [*(decoder.put(token_id) for token_id in token_ids), decoder.end()], True)


@pytest.mark.parametrize("is_special", [True, False])
def test_answers_are_read_from_the_tokens(is_special: bool) -> None:
    said = 'The mark <tool_call|> and "}", it\'s\n\\n'
    one = f'<|tool_call>call:weather{{city:<|"|>{said}<|"|>}}<tool_call|>'
    thought = "<|channel>thought\nI look it up.\n<channel|>"
    for state in ("unsaid", "closed"):
        for before, reasoning in ((thought, "I look it up."), (OFF, ""), ("", "")):
            answer = answered(f"{before}{one}<|tool_call>call:now{{}}<tool_call|>", state, is_special)
            assert [(name, json.loads(own)) for name, own in answer.calls] == [("weather", {"city": said}), ("now", {})]
            assert (answer.reasoning, answer.content, answer.reason) == (reasoning, "", "tool_calls")
    answer = answered(f"{thought}call:now{{}}", "unsaid", is_special)
    assert answer.calls == [["now", "{}"]] and answer.reasoning == "I look it up."


def test_the_system_turn_switches_thoughts_and_nothing_is_added_to_the_prompt() -> None:
    template, called = gemma_4(), [USER, calls(call(1, "weather", {"city": "Oslo"})), result(1)]
    for thinks, behind, state in ((None, OFF, "closed"), (False, OFF, "closed"), (True, "", "unsaid")):
        prompt = rendered([SYSTEM, USER], thinks=thinks)
        assert prompt.endswith(f"{HEADER}{behind}") and prompt.count("<|think|>") == (thinks is True)
        token_ids = template.render_chat([Message(**USER)], RenderOptions(thinks=thinks))
        assert template.thinking(token_ids) == state
        assert rendered(called, tools=[TOOL], thinks=thinks).endswith("<tool_response|>")
        token_ids = template.render_chat([Message(**own) for own in called], RenderOptions(thinks=thinks))
        assert template.thinking(token_ids) == state


def test_every_turn_has_a_header_also_behind_text_beside_calls() -> None:
    """The template ends a turn behind such text, and goes on without a header."""
    said = {**calls(call(1, "weather", {"city": "Oslo"})), "content": "I look."}
    again = {**calls(call(2, "weather", {"city": "Rome"})), "content": "Once more."}
    prompt = rendered([USER, said, result(1), again, result(2)], tools=[TOOL], thinks=True)
    assert "I look.<turn|>\n<|turn>model\n<|tool_call>call:weather" in prompt
    assert prompt.endswith("Once more.<turn|>\n<|turn>model\n")
    ends = [at.end() for at in re.finditer(r"<turn\|>\s*", prompt)]
    assert all(prompt.startswith("<|turn>", at) for at in ends)


@pytest.mark.parametrize("budget", [None, 0, 5])
def test_nothing_stands_between_thoughts_and_the_answer(budget: int | None) -> None:
    """A budget does not count the label."""
    template, answer = gemma_4(), Thinking(begin=0, end=1, closing=(1,), is_open=True, num_tokens=9)
    scheduler = SimpleNamespace(eos_token_ids=[1])
    loaded = cast(
        Any, SimpleNamespace(template=template, engine=SimpleNamespace(num_embeddings=9, scheduler=scheduler))
    )
    whole = ReasoningState("unsaid", budget).before(answer, loaded)
    assert isinstance(whole, Thinking)
    assert (whole.closing, whole.after) == ((template.token_id("<channel|>"),), ())
    assert whole.budget == (None if budget is None else budget + len(template.encode("thought\n")))
    opened = ReasoningState("open", budget).before(answer, loaded)
    assert isinstance(opened, Thinking) and opened.budget == budget


# --- tokens


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("has_template", [True, False])
def test_answers_end_with_the_turn_and_before_results(is_special: bool, has_template: bool) -> None:
    template = gemma_4(is_special=is_special, has_template=has_template)
    assert set(template.stop_token_ids) == {template.token_id(e) for e in ("<eos>", "<turn|>", "<|tool_response>")}
    assert (template.family.name, template.tool_format, template.think) == ("Gemma 4", GEMMA_CALLS, CHANNEL)
    assert set(template.marks) == {"<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"}


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_no_message_spells_a_token(role: str, is_special: bool, has_template: bool) -> None:
    template = gemma_4(is_special=is_special, has_template=has_template)
    spelled = " ".join(GEMMA_4_TOKENS)
    ids = {template.token_id(token) for token in GEMMA_4_TOKENS}
    messages = {
        "user": [[{**USER, "content": text}] for text in (spelled, "a")],
        "system": [[{**SYSTEM, "content": text}, USER] for text in (spelled, "a")],
        "tool": [[USER, calls(call(1, "weather", {text: [text]})), result(1, text)] for text in (spelled, "a")],
    }
    hostile, harmless = (
        [i for i in template.render_chat([Message(**own) for own in one], RenderOptions(tools=[TOOL])) if i in ids]
        for one in messages[role]
    )
    assert hostile == harmless and all(token in rendered(messages[role][0], template) for token in GEMMA_4_TOKENS)


# --- tools, calls and results

NESTED = {"o": {"B": [1, "x", None], "a": {}}, "city": 'it\'s "so"', "t": True, "f": 1.5}
CONVERSATIONS = {  # the messages, and how the turn of the assistant is shown
    "one call": (
        [calls(call(1, "weather", {"city": "Oslo"})), result(1)],
        '<|tool_call>call:weather{city:~Oslo~}<tool_call|><|tool_response>response:weather{value:~sunny~}<tool_response|>',
    ),
    "nested arguments": (
        [calls(call(1, "weather", NESTED)), result(1)],
        "<|tool_call>call:weather{city:~it's \"so\"~,f:1.5,o:{a:{},B:[1,~x~,None]},t:true}<tool_call|>"
        "<|tool_response>response:weather{value:~sunny~}<tool_response|>",
    ),
    "several calls": (
        [calls(call(1, "weather", {"city": "Oslo"}), call(2, "now", {})), result(1), result(2, "noon")],
        "<|tool_call>call:weather{city:~Oslo~}<tool_call|><|tool_call>call:now{}<tool_call|>"
        "<|tool_response>response:weather{value:~sunny~}<tool_response|>"
        "<|tool_response>response:now{value:~noon~}<tool_response|>",
    ),
    "a turn that goes on": (
        [calls(call(1, "now", {})), result(1, "noon"), calls(call(2, "now", {})), result(2, "one")],
        "<|tool_call>call:now{}<tool_call|><|tool_response>response:now{value:~noon~}<tool_response|>"
        "<|tool_call>call:now{}<tool_call|><|tool_response>response:now{value:~one~}<tool_response|>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("way", CONVERSATIONS)
def test_calls_and_results_are_shown_as_the_model_was_taught_them(name: str, way: str) -> None:
    """The interleaved template knows results inside of the message of their calls alone."""
    messages, turn = CONVERSATIONS[way]
    prompt = rendered([SYSTEM, USER, *messages], gemma_4(name), tools=[TOOL], thinks=True)
    assert prompt.endswith(HEADER + turn.replace("~", '<|"|>'))
    assert prompt.count("Be brief.<|tool>declaration:weather{") == 1 and prompt.count(HEADER) == 1
    assert prompt.startswith("<bos><|turn>system\n<|think|>\nBe brief.<|tool>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_reasoning_comes_back_beside_the_calls(name: str) -> None:
    messages = [USER, calls(call(1, "now", {}), reasoning_content="I look."), result(1)]
    prompt = rendered(messages, gemma_4(name), thinks=True)
    end = "" if name == INTERLEAVED else "\n"
    assert f"{HEADER}<|channel>thought\nI look.{end}<channel|><|tool_call>call:now{{}}<tool_call|>" in prompt
    later = rendered([*messages, {"role": "assistant", "content": "Noon."}, USER], gemma_4(name))
    assert "I look." not in later and "Noon.<turn|>" in later


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("thinks", [None, True, False])
def test_a_turn_is_open_after_results_though_text_stands_beside_their_calls(name: str, thinks: bool | None) -> None:
    """The template ends the turn behind such a text, and opens no other."""
    template = gemma_4(name)
    prompt = rendered([USER, calls(call(1, "now", {}), content="I look."), result(1, "noon")], template, thinks=thinks)
    assert prompt.endswith(f"I look.<turn|>\n{HEADER}{'' if thinks else OFF}") and "noon" in prompt
    for messages in ([USER], [USER, {"role": "assistant", "content": "Yes."}, USER]):
        assert rendered(messages, template, thinks=thinks).count(HEADER) == (len(messages) + 1) // 2


def test_a_result_without_a_call_is_not_lost() -> None:
    for name in TEMPLATES:
        assert "noon" in rendered([USER, result(7, "noon")], gemma_4(name), tools=[TOOL])


# --- without a template


@pytest.mark.parametrize("thinks", [None, True, False])
def test_without_a_template_turns_look_as_those_of_the_genuine_one(thinks: bool | None) -> None:
    own = gemma_4(has_template=False)
    conversation = [USER, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": " Bye "}]
    for messages in (conversation, [SYSTEM, *conversation]):
        expected = rendered(messages, thinks=thinks)
        assert rendered(messages, own, thinks=thinks) == expected
    assert rendered([USER, {"role": "assistant", "content": "It is"}], own).endswith(f"{HEADER}It is")
    token_ids = own.render_chat([Message(**USER)], RenderOptions(thinks=thinks))
    assert own.thinking(token_ids) == ("unsaid" if thinks else "closed")


def test_without_a_template_the_prompt_teaches_the_form_that_is_read() -> None:
    own = gemma_4(has_template=False)
    prompt = rendered([SYSTEM, USER, calls(call(1, "weather", {"city": "Oslo"})), result(1)], own, tools=[TOOL])
    assert json.dumps(TOOL["function"]) in prompt and f"{HEADER}<|tool_call>call:the" not in prompt
    assert f'{HEADER}<|tool_call>call:weather{{city:<|"|>Oslo<|"|>}}<tool_call|><turn|>' in prompt
    assert "Result of weather:\nsunny<turn|>" in prompt and "<|tool_call>call:the function's name{" in prompt
