"""A template is tried once, with texts that it must show, and gets messages in the form that it takes."""

from types import SimpleNamespace

import pytest
from models import byte_tokenizer
from templates import CALL, CLOSE, CONVERSATION, GEMMA, HOSTILE, OPEN, PARTS, WITH_TOOLS, messages, own, shown, text

from errors import InvalidRequest
from prompt_templates import PromptTemplate
from schemas import Message
from text.named_templates import chosen
from vision.gemma3 import Gemma3Vision

EITHER = "{% if m.content is string %}{{ m.content }}{% else %}" + PARTS + "{% endif %}"
TEXT_OF_ASSISTANT = "{% if m.role == 'assistant' %}{{ '' + m.content }}{% else %}" + PARTS + "{% endif %}"
TEXT_OF_USER = "{% if m.role == 'user' %}{{ '' + m.content }}{% else %}" + PARTS + "{% endif %}"
FIRST_PART = "{{ m.content[0].text }}"
MACRO = "{% macro show(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}{{ show(m.content) }}"


@pytest.mark.parametrize("body", [PARTS, EITHER, TEXT_OF_ASSISTANT, TEXT_OF_USER, FIRST_PART, MACRO, "{{ m.content }}"])
def test_a_template_gets_parts_or_text_for_each_role_as_it_wants_them(body: str) -> None:
    subject = own(body)
    assert set(subject.hidden) == {"calls", "tools"}
    expected = "<system>Be brief.</system><user>Hello</user><assistant>Hi!</assistant><user>Bye</user>"
    assert text(subject, *CONVERSATION) == expected
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert shown(subject, Message(role="user", content=parts)) == "<user>ab</user>"


def test_what_is_continued_may_be_parts() -> None:
    assert text(own(PARTS), ("user", "Count"), ("assistant", "1, 2,")) == "<user>Count</user><assistant>1, 2,"


def test_control_tokens_in_parts_stay_text() -> None:
    subject = own(PARTS)
    token_ids = subject.render_chat(messages(("user", HOSTILE)))
    assert subject.tokenizer.convert_tokens_to_ids("<|im_end|>") not in token_ids
    assert HOSTILE in str(subject.tokenizer.decode(token_ids))


NO_SYSTEM = "{% if m.role != 'system' %}{{ m.content }}{% endif %}"
NO_LATE_SYSTEM = "{% if m.role != 'system' or loop.first %}{{ m.content }}{% endif %}"
REFUSES_SYSTEM = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}"


@pytest.mark.parametrize("body", [NO_SYSTEM, REFUSES_SYSTEM])
def test_a_system_message_that_a_template_would_drop_leads_the_users(body: str) -> None:
    subject = own(body)
    assert "system" in subject.hidden
    expected = "<user>Be brief.\n\nHello</user><assistant>Hi!</assistant><user>Bye</user>"
    assert text(subject, *CONVERSATION) == expected


def test_a_late_system_message_that_a_template_would_drop_is_the_users_and_keeps_its_place() -> None:
    late = [("system", "A"), ("user", "U"), ("assistant", "B"), ("system", "C"), ("user", "V")]
    turns = "<user>U</user><assistant>B</assistant><user>C</user><user>V</user>"
    assert text(own(NO_LATE_SYSTEM), *late) == f"<system>A</system>{turns}"
    assert text(own(NO_LATE_SYSTEM), *late[1:]) == turns


def test_a_conversations_beginning_stays_the_same_whatever_the_system_says_later() -> None:
    late = [("system", "A"), ("system", "B"), ("user", "U"), ("assistant", "B"), ("system", "C"), ("user", "V")]
    for subject in (own(NO_LATE_SYSTEM), own(REFUSES_SYSTEM), own(NO_SYSTEM), own("{{ m.content }}")):
        for end in range(3, len(late)):
            before, after = (text(subject, *late[:n]) for n in (end, end + 1))
            assert after.startswith(before)


def test_a_template_that_drops_what_was_said_before_takes_one_turn_and_no_more() -> None:
    subject = own("{% if loop.last %}{{ m.content }}{% endif %}")
    assert {"user", "assistant"} <= set(subject.hidden)
    assert text(subject, ("user", "Hello")) == "<user>Hello</user>"
    with pytest.raises(InvalidRequest, match="drops parts of these messages: .*user") as refusal:
        text(subject, ("user", "Hello"), ("assistant", "Hi!"), ("user", "Bye"))
    assert refusal.value.status == 400 and refusal.value.param == "messages"


def test_a_template_that_shows_nothing_of_the_users_is_refused_by_name() -> None:
    subject = own("{% if m.role != 'user' %}{{ m.content }}{% endif %}")
    assert "user" in subject.hidden
    with pytest.raises(InvalidRequest, match="user"):
        text(subject, ("user", "Hello"))


TOOL_TURN = [*WITH_TOOLS[:3], Message(role="assistant", content="Sunny."), Message(role="user", content="Thanks")]
EACH, AS_OBJECT = "{% for c in m.tool_calls or [] %}", "[{{ c.function.name }} {{ c.function.arguments | tojson }}]"
ARGUMENTS = {
    "an object": EACH + AS_OBJECT + "{% endfor %}",
    "text": EACH + "[{{ c.function.name + ' ' + c.function.arguments }}]{% endfor %}",
    "printed": EACH + "[{{ c.function.name }} {{ c.function.arguments }}]{% endfor %}",
    "flat": EACH + "[{{ c.name }} {{ c.arguments | tojson }}]{% endfor %}",
    "short ids": (
        EACH + "{% if c.id | length != 9 %}{{ raise_exception('ids have length 9') }}{% endif %}"
        f"{AS_OBJECT}{{% endfor %}}"
    ),
}


@pytest.mark.parametrize("calls", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("content", [PARTS, "{{ m.content }}"])
def test_calls_have_their_arguments_and_ids_as_the_template_wants_them(calls: str, content: str) -> None:
    subject = own(content + calls)
    assert subject.hidden == ("tools",)
    assert shown(subject, *TOOL_TURN) == (
        '<user>Weather?</user><assistant>[get_weather {"city": "Paris"}]</assistant><tool>sunny</tool>'
        "<assistant>Sunny.</assistant><user>Thanks</user>"
    )


NO_RESULTS = "{% if m.role != 'tool' %}{{ m.content }}" + ARGUMENTS["an object"] + "{% endif %}"
NAME_ALONE = "{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}"


@pytest.mark.parametrize("body", [NO_RESULTS, NAME_ALONE, "{{ m.content }}{# tool_calls #}"])
def test_calls_and_results_are_text_where_the_template_shows_only_a_part_of_them(body: str) -> None:
    subject = own(body)
    prompt = shown(subject, *TOOL_TURN)
    assert "calls" in subject.hidden and "Result of get_weather:\nsunny" in prompt
    assert subject.tool_format.written("get_weather", {"city": "Paris"}) in prompt


TWO_CALLS = [
    Message(role="user", content="Weather?"),
    Message(role="assistant", content="I look.", tool_calls=[CALL, {**CALL, "id": "c2"}]),
    Message(role="tool", content="sunny", tool_call_id="c1"),
    Message(role="tool", content="rain", tool_call_id="c2"),
]
FIRST_CALL = (
    "{% if m.tool_calls %}[{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments | tojson }}]"
    "{% else %}{{ m.content }}{% endif %}"
)


def test_text_beside_calls_and_second_calls_that_a_template_would_drop_are_turns_of_their_own() -> None:
    call = '<assistant>[get_weather {"city": "Paris"}]</assistant>'
    assert shown(own(FIRST_CALL), *TWO_CALLS) == (
        f"<user>Weather?</user><assistant>I look.</assistant>{call}<tool>sunny</tool>{call}<tool>rain</tool>"
    )


def test_tools_that_a_template_does_not_describe_are_told_of_in_text() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "Does it.", "parameters": {"type": "object"}}}
    signs = '{# <tool_call> "arguments" #}'
    names = signs + "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    whole = signs + "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    assert "Does it." in shown(own("{{ m.content }}", names), Message(role="user", content="x"), tools=[tool])
    subject = own("{{ m.content }}", whole)
    assert shown(subject, Message(role="user", content="x"), tools=[tool]).startswith('{"type": "function"')
    assert "tools" not in subject.hidden


GEMMA_VISION = Gemma3Vision(SimpleNamespace(image_token_id=1, mm_tokens_per_image=4))


def test_images_are_refused_where_the_template_drops_the_text_beside_them() -> None:
    picture = "{% for p in m.content %}{% if p.type == 'image' %}<start_of_image>{% endif %}{% endfor %}"
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*GEMMA.values(), "<start_of_image>"]})
    for body, sees in ((picture, False), (picture + PARTS, True), (GEMMA_PARTS, True)):
        tokenizer.chat_template = f"{{% for m in messages %}}{OPEN}{body}{CLOSE}{{% endfor %}}"
        subject = PromptTemplate(tokenizer, "gemma3", GEMMA_VISION)
        assert subject.sees == sees and subject.hides_images != sees


GEMMA_PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<start_of_image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)


def test_of_named_templates_the_one_for_tools_is_taken_where_there_are_tools() -> None:
    bodies = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ tools | tojson }}{{ messages[0].content }}"}
    assert chosen(bodies, has_tools=False).startswith("D") and chosen(bodies, has_tools=True).startswith("T")
    assert chosen({"default": "D", "rag": "R"}, has_tools=True) == "D"
    assert chosen({"tool_use": "T"}, has_tools=False) == "T"
    with pytest.raises(ValueError, match="rag, tool_use"):
        chosen({"rag": "R", "tool_use": "T"}, has_tools=False)
