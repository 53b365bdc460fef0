"""Chat templates are found in all files that may have them, and the log says what they leave out."""

import json
import re
from pathlib import Path

import pytest
from models import byte_tokenizer
from templates import shown

from errors import ModelLoadError
from prompt_templates import PromptTemplate
from schemas import Message
from serving.loading import load_template


def saved(directory: Path, files: dict[str, object], **config: object) -> Path:
    """A tokenizer without a chat template of its own, but for those files and that configuration."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def named(name: str) -> str:
    tools = '{% if tools %}<tool_call>"arguments"{{ tools | tojson }}{% endif %}'
    return f"{name}: {tools}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"


NAMED = [{"name": "default", "template": named("config")}, {"name": "tool_use", "template": named("tools of config")}]
FOR_TOOLS = {"additional_chat_templates/tool_use.jinja": named("tools")}


@pytest.mark.parametrize(
    ("files", "config", "plain", "with_tools"),
    [
        ({"chat_template.jinja": named("file")}, {"chat_template": named("config")}, "file", "file"),
        ({"chat_template.json": {"chat_template": named("processor")}}, {}, "processor", "processor"),
        ({"processor_config.json": {"chat_template": named("processor")}}, {}, "processor", "processor"),
        ({"chat_template.json": {"chat_template": "x"}}, {"chat_template": named("config")}, "config", "config"),
        ({}, {"chat_template": NAMED}, "config", "tools of config"),
        ({**FOR_TOOLS, "chat_template.jinja": named("file")}, {}, "file", "tools"),
        (FOR_TOOLS, {"chat_template": named("config")}, "config", "tools"),
    ],
)
def test_the_chat_template_is_found_in_every_file_that_may_have_it(
    tmp_path: Path, files: dict[str, object], config: dict[str, object], plain: str, with_tools: str
) -> None:
    subject = load_template(saved(tmp_path, files, **config), "qwen3")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    assert subject.is_own
    assert shown(subject, Message(role="user", content="x")).startswith(f"{plain}: ")
    assert shown(subject, Message(role="user", content="x"), tools=[tool]).startswith(f"{with_tools}: ")


def test_templates_of_which_none_is_the_default_are_refused_at_the_start(tmp_path: Path) -> None:
    several = [{"name": name, "template": named(name)} for name in ("rag", "tool_use")]
    with pytest.raises(ModelLoadError, match="named rag, tool_use"):
        load_template(saved(tmp_path, {}, chat_template=several), "qwen3")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("{% if m.role != 'system' %}{{ m.content }}{% endif %}", "has no place for a system message"),
        ("{% if m.role != 'user' %}{{ m.content }}{% endif %}", "drops parts of user messages"),
        ("{{ m.content }", "chats are refused: .*unexpected '}'"),
        ("{{ m.content }}", None),
    ],
)
def test_the_log_says_at_the_start_what_a_template_leaves_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, body: str, sentence: str | None
) -> None:
    load_template(saved(tmp_path, {}, chat_template=f"{{% for m in messages %}}{body}{{% endfor %}}"), "qwen3")
    assert (sentence is None and not caplog.text) or re.search(str(sentence), caplog.text)


def test_added_tokens_that_get_another_id_than_their_files_say_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_template(saved(tmp_path, {"added_tokens.json": {"<extra>": 300, "<|im_end|>": 258}}), "qwen3")
    assert "<extra> has id 259, not 300" in caplog.text and "im_end" not in caplog.text


@pytest.mark.parametrize("end", ["<|END_OF_TURN|>", "[EOT]", ""])
def test_what_the_template_puts_behind_an_answer_ends_one(end: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|END_OF_TURN|>", "[EOT]", "[TURN]"]})
    tokenizer.chat_template = f"{{% for m in messages %}}[TURN]{{{{ m.role + m.content }}}} {end}\n{{% endfor %}}"
    subject = PromptTemplate(tokenizer, "mystery")
    ends = tokenizer.convert_ids_to_tokens(subject.stop_token_ids)
    assert ends == ["<|im_end|>", end or "[TURN]"]
