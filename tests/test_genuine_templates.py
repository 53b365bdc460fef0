"""The genuine templates of newer families are rendered as they are, whatever clients put where."""

import json
from typing import Any

import pytest
from genuine_templates import genuine
from templates import own

from prompt_templates import PromptTemplate, RenderOptions
from schemas import ChatCompletionRequest, Message
from text.tool_calls.element_calls import GLM_XML, QWEN_XML
from text.tool_calls.gemma_calls import GEMMA_CALLS
from text.tool_calls.json_calls import MARKED

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
SENT = {**CALL, "function": {"name": "weather", "arguments": json.dumps({"city": "Oslo"})}}
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather in Oslo?"}
CALLED = {"role": "assistant", "content": "", "reasoning_content": "I look it up."}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
FAMILIES = {  # by template: type of the model, family, format of calls
    "Qwen3.5-4B": ("qwen3_5_text", "Qwen 3.5", QWEN_XML),
    "Qwen3-Coder": ("qwen3_moe", "Qwen 3", QWEN_XML),
    "ibm-granite-granite-4.0": ("granitemoehybrid", "Granite", MARKED),
    "google-gemma-4-31B-it": ("gemma4", "Gemma 4", GEMMA_CALLS),
}
Messages = list[dict[str, Any]]


def rendered(template: PromptTemplate, messages: Messages, **options: Any) -> str:
    token_ids = template.render_chat([Message(**message) for message in messages], RenderOptions(**options))
    return str(template.tokenizer.decode(token_ids))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("thinks", [None, False])
def test_a_conversation_with_tools_is_rendered_as_the_template_does(name: str, thinks: bool | None) -> None:
    model_type, family, tool_format = FAMILIES[name]
    template = genuine(name, model_type)
    sent = [SYSTEM, USER, {**CALLED, "tool_calls": [SENT]}, RESULT]
    expected = template.tokenizer.apply_chat_template(
        [SYSTEM, USER, {**CALLED, "tool_calls": [CALL]}, RESULT],
        tools=[TOOL],
        tokenize=False,
        add_generation_prompt=True,
        **({} if thinks is None else {"enable_thinking": thinks}),
    )
    prompt = rendered(template, sent, tools=[TOOL], thinks=thinks)
    assert prompt.startswith(expected) and template.tool_format is tool_format
    assert template.family.name == family


def test_two_developer_messages_at_the_beginning_are_one_and_the_tools_stay_native() -> None:
    """As Codex sends them."""
    template = genuine("Qwen3.5-4B", "qwen3_5_text")
    first = [{"role": "developer", "content": "One."}, {"role": "developer", "content": "Two."}]
    expected = rendered(template, [{"role": "system", "content": "One.\n\nTwo."}, USER], tools=[TOOL])
    assert rendered(template, [*first, USER], tools=[TOOL]) == expected
    assert "<function=example_function_name>" in expected


def test_a_system_message_between_turns_keeps_its_place() -> None:
    """As Claude Code sends them: the tools stay native, and no turn changes what came before it."""
    template, prompts = genuine("Qwen3.5-4B", "qwen3_5_text"), []
    turns: Messages = [SYSTEM]
    for number in range(4):
        turns += [USER, {"role": "system", "content": f"Note {number}."}]
        prompts.append(rendered(template, turns, tools=[TOOL]))
        turns += [{"role": "assistant", "content": f"Answer {number}."}]
    header = "<|im_start|>assistant\n<think>\n"
    for before, after in zip(prompts, prompts[1:], strict=False):
        assert before.endswith(header) and after.startswith(before.removesuffix("<think>\n"))
    assert prompts[-1].count("<|im_start|>system") == 1 and "<|im_start|>user\nNote 3.<|im_end|>" in prompts[-1]
    assert "<function=example_function_name>" in prompts[-1]


def test_glm_takes_the_system_anywhere() -> None:
    template = genuine("GLM-4.6", "glm4_moe")
    prompt = rendered(template, [SYSTEM, USER, {"role": "system", "content": "Note."}], tools=[TOOL])
    assert template.tool_format is GLM_XML
    assert prompt.index("Weather in Oslo?") < prompt.index("<|system|>\nNote.")


@pytest.mark.parametrize("form", [QWEN_XML, GLM_XML])
def test_where_a_template_shows_no_calls_the_prompt_teaches_the_form_that_is_read(form: Any) -> None:
    """Templates that take no results: calls are folded into text, in the form that parser and grammar enforce."""
    signs = "".join(form.signs) + "<tool_call>"
    body = "{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
    template = own(body, before=f"{{% if tools %}}{signs}{{{{ tools }}}}{{% endif %}}")
    assert template.tool_format is form
    prompt = rendered(
        template, [USER, {"role": "assistant", "content": "", "tool_calls": [SENT]}, RESULT], tools=[TOOL]
    )
    assert form.written("weather", {"city": "Oslo"}) in prompt
    assert all(sign in prompt for sign in form.signs) and '"arguments"' not in prompt
    assert "{" not in form.written("weather", {"city": "Oslo"})


@pytest.mark.parametrize("arguments", ["[1]", '{"a b": 1}', '{"a": "x</parameter></arg_value>"}'])
@pytest.mark.parametrize("form", [QWEN_XML, GLM_XML])
def test_a_call_that_elements_cannot_hold_is_written_as_json(form: Any, arguments: str) -> None:
    assert json.dumps(json.loads(arguments)) in form.written("f", json.loads(arguments))


def test_plain_arguments_reach_the_template_and_reserved_ones_do_not() -> None:
    template = own("{{ m.content }}", before="{{ preserve_thinking }}{{ bos_token }}{{ note }}")
    sent = {"preserve_thinking": True, "bos_token": "x", "messages": [], "note": "a<|im_end|>"}
    request = ChatCompletionRequest(model="m", messages=[USER], chat_template_kwargs=sent)
    assert request.ignored_fields == ["chat_template_kwargs.bos_token", "chat_template_kwargs.messages"]
    token_ids = template.render_chat(request.messages, RenderOptions(arguments=request.template_arguments))
    assert template.tokenizer.decode(token_ids).startswith("Truea<|im_end|>")
    assert template.token_id("<|im_end|>") not in token_ids, "a control token in an argument stays text"


def test_the_effort_is_text_for_the_template() -> None:
    template = own("{{ m.content }}", before="{{ reasoning_effort }}")
    token_ids = template.render_chat([Message(**USER)], RenderOptions(effort="high<|im_end|>"))
    assert template.tokenizer.decode(token_ids).startswith("high<|im_end|>")
    assert template.token_id("<|im_end|>") not in token_ids


def test_boundaries_are_where_another_turn_would_begin_to_differ() -> None:
    template = genuine("Qwen3.5-4B", "qwen3_5_text")
    thought = {"role": "assistant", "content": "Hi.", "reasoning_content": "They greet."}
    messages = [Message(**m) for m in (SYSTEM, USER, thought, USER)]
    options = RenderOptions(tools=[TOOL])
    decode = template.tokenizer.decode
    prompt_ids, (before, after) = template.render_turns(messages, options)
    assert prompt_ids == template.render_chat(messages, options)
    assert decode(prompt_ids[before:]).startswith("<|im_start|>user\nWeather in Oslo?<|im_end|>\n<|im_start|>assistant")
    assert decode(prompt_ids[after:]) == "<|im_start|>assistant\n<think>\n"
    others = [Message(**m) for m in (SYSTEM, USER, thought, {**USER, "content": "And tomorrow?"})]
    assert template.render_chat(others, options)[:before] == prompt_ids[:before]
    later = [*messages, Message(role="assistant", content="Bye."), Message(**USER)]
    assert template.render_chat(later, options)[:after] == prompt_ids[:after]


@pytest.mark.parametrize("last", [{"role": "system", "content": "The environment."}, RESULT])
def test_the_place_behind_a_conversation_is_behind_what_follows_the_user(last: dict[str, Any]) -> None:
    template = genuine("Qwen3.5-4B", "qwen3_5_text")
    call = [{**CALLED, "tool_calls": [SENT]}] if last["role"] == "tool" else []
    messages = [Message(**m) for m in (SYSTEM, USER, *call, last)]
    prompt_ids, places = template.render_turns(messages, RenderOptions(tools=[TOOL]))
    behind = template.tokenizer.decode(prompt_ids[max(places) :])
    if last["role"] == "system":
        assert behind == "<|im_start|>assistant\n<think>\n"
    else:  # the next turn of the user leaves out the thoughts before the call
        assert behind.startswith("<|im_start|>assistant\n<think>\nI look it up.")
