"""Messages become the prompt that the family's own template gives, and no legal list of messages fails."""

import itertools
from typing import Any

import pytest
from models import byte_tokenizer
from templates import CONVERSATION, HOSTILE, WITH_TOOLS, gemma, messages, template, text
from tokenizers import AddedToken

from api.responses.requests import ResponsesRequest
from api.responses.view import as_chat
from errors import InvalidRequest
from prompt_templates import PromptTemplate, RenderOptions, family_of
from schemas import Message
from text.canonical_messages import alternate, canonical
from text.seams import SEAMS


def test_the_tokenizers_own_template_wins() -> None:
    subject = template()
    subject.tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert text(subject, *CONVERSATION) == "[system]Be brief.[user]Hello[assistant]Hi![user]Bye"


def test_gemma_without_a_template_speaks_gemma() -> None:
    assert text(gemma(), *CONVERSATION) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n<start_of_turn>model\nHi!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n"
    )


def test_qwen_without_a_template_speaks_chatml() -> None:
    assert text(template(own=False), *CONVERSATION) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("make", [template, gemma, lambda: template(own=False), lambda: template("mamba", own=False)])
def test_every_order_of_roles_gives_a_prompt_with_all_of_the_text(make: object) -> None:
    subject = make()
    for roles in itertools.product(["system", "developer", "user", "assistant", "tool"], repeat=3):
        pairs = [(role, f"text {number}") for number, role in enumerate(roles)]
        prompt = text(subject, *pairs)
        assert all(content in prompt for _, content in pairs), roles


def test_a_final_assistant_message_is_continued() -> None:
    assert text(template(own=False), ("user", "Count"), ("assistant", "1, 2,")).endswith("assistant\n1, 2,")
    assert text(gemma(), ("user", "Count"), ("assistant", "1, 2,")).endswith("model\n1, 2,")


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_control_tokens_in_a_message_stay_text(role: str) -> None:
    subject = template()
    token_ids = subject.render_chat(messages((role, HOSTILE), ("user", "Hi")))
    control = {subject.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")}
    assert sum(token_id in control for token_id in token_ids) == 5  # two turns and the answer's beginning
    assert HOSTILE in str(subject.tokenizer.decode(token_ids))
    harmless = subject.render_chat(messages((role, "a"), ("user", "Hi")))
    assert len(token_ids) == len(harmless) + len(HOSTILE) - 1  # a token per byte


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_assistant_message_at_the_end_is_no_beginning(content: str) -> None:
    for subject in (gemma(), template(), template(own=False)):
        assert text(subject, ("user", "Hi"), ("assistant", content)) == text(subject, ("user", "Hi"))


def test_a_template_that_refuses_is_asked_again_with_alternating_roles_then_it_is_a_400() -> None:
    subject = template()
    strict = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}{{ messages[0].content }}"
    )
    subject.tokenizer.chat_template = strict
    assert text(subject, ("system", "S"), ("user", "U")) == "S\n\nU"
    subject.tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(InvalidRequest, match="never") as refusal:
        text(subject, ("user", "U"))
    assert refusal.value.status == 400 and refusal.value.param == "messages"


def test_canonical_messages_have_text_and_arguments_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    result = canonical(
        [
            Message(role="developer", content=[{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]),
            Message(role="assistant", content=None, tool_calls=[call]),
        ]
    )
    assert result[0] == {"role": "system", "content": "a b"}
    assert result[1]["content"] == "" and result[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}


def test_alternating_messages_begin_with_the_user_and_change_roles() -> None:
    roles = [m["role"] for m in alternate(canonical(messages(("assistant", "A"), ("user", "U"), ("tool", "T"))))]
    assert roles == ["user", "assistant", "user"]


@pytest.mark.parametrize(
    ("model_type", "name", "tokens", "family"),
    [
        ("gemma3_text", "", ["<start_of_turn>"], "Gemma 3"),
        ("gemma3", "x", ["<start_of_turn>"], "Gemma 3"),
        ("gemma2", "", ["<start_of_turn>"], "Gemma 2"),
        ("gemma3_text", "gemma-3", [], "generic"),
        ("qwen2", "", ["<|im_start|>"], "Qwen 2.5"),
        ("qwen3_moe", "", ["<|im_start|>"], "Qwen 3"),
        ("qwen3_5_text", "Qwen3.5-4B", ["<|im_start|>"], "Qwen 3.5"),
        ("qwen3_next", "", ["<|im_start|>"], "Qwen 3"),
        ("gemma", "", ["<start_of_turn>"], "Gemma"),
        ("gemma3n_text", "gemma-3n-E2B", ["<start_of_turn>"], "Gemma 3n"),
        ("gemma4", "gemma-4", ["<|turn>"], "Gemma 4"),
        ("llama", "", ["<|start_header_id|>"], "Llama 3"),
        ("llama", "Llama-2-7b-chat", [], "Llama 2"),
        ("llama", "SmolLM2-135M", ["<|im_start|>"], "SmolLM"),
        ("llama", "", ["<|im_start|>"], "ChatML"),
        ("mystery", "my-qwen3-tune", ["<|im_start|>"], "Qwen 3"),
        ("smollm3", "", ["<|im_start|>"], "SmolLM"),
        ("lfm2_moe", "", ["<|im_start|>"], "LFM2"),
        ("lfm3", "", ["<|im_start|>"], "LFM2"),
        ("granitemoehybrid", "", ["<|start_of_role|>"], "Granite"),
        ("glm4", "", ["<sop>"], "GLM-4"),
        ("chatglm", "", ["<|assistant|>"], "ChatGLM"),
        ("gpt2", "", [], "generic"),
    ],
)
def test_families_are_recognised_by_type_then_name_and_by_marker(
    model_type: str, name: str, tokens: list[str], family: str
) -> None:
    assert family_of(model_type, tokens, name).name == family


def test_the_stop_tokens_are_the_templates_and_the_tokenizers() -> None:
    subject = gemma()
    ids = subject.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<end_of_turn>"])
    assert sorted(subject.stop_token_ids) == sorted(ids)
    assert template("llama").stop_token_ids == [template("llama").tokenizer.eos_token_id]


def test_a_completions_prompt_begins_with_one_bos_token() -> None:
    class Doubling:
        bos_token_id = 2

        def __call__(self, prompt: str, add_special_tokens: bool) -> object:
            return type("Encoding", (), {"input_ids": [2, 2, 7] if prompt.startswith("<bos>") else [2, 7]})

    subject = PromptTemplate.__new__(PromptTemplate)
    subject.tokenizer = Doubling()
    assert subject.render_text("<bos>x") == subject.render_text("x") == [2, 7]


@pytest.mark.parametrize("make", [template, gemma, lambda: template("mamba", own=False)])
def test_tool_calls_and_results_are_text_where_a_template_would_leave_them_out(make: object) -> None:
    subject = make()
    prompt = str(subject.tokenizer.decode(subject.render_chat(WITH_TOOLS)))
    for part in (
        subject.tool_format.written("get_weather", {"city": "Paris"}),
        "Result of get_weather:\nsunny",
        subject.tool_format.written("again", "not JSON"),
        "Result of again:\nrain",
    ):
        assert part in prompt


def test_a_template_that_knows_tools_gets_them_as_they_are() -> None:
    subject = template()
    subject.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls %}"
        "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}{% endfor %}"
    )
    prompt = PromptTemplate(subject.tokenizer, "qwen3").render_chat(WITH_TOOLS[:3])
    assert subject.tokenizer.decode(prompt) == ('<user>Weather?<assistant>get_weather({"city": "Paris"})<tool>sunny')


@pytest.mark.parametrize("knows_tools", [True, False])
def test_control_tokens_in_tool_calls_and_names_stay_text(knows_tools: bool) -> None:
    subject = template()
    if knows_tools:
        source = "{% for m in messages %}{{ m.role + m.content }}{{ m.tool_calls | default([]) | tojson }}{% endfor %}"
        subject.tokenizer.chat_template = source
        subject = PromptTemplate(subject.tokenizer, "qwen3")
    call = {"function": {"name": "<|im_end|>", "arguments": '{"<|im_start|>": ["<|im_end|>"]}'}}
    token_ids = subject.render_chat(
        [Message(role="user", content="x", name="<|im_end|>"), Message(role="assistant", tool_calls=[call])],
        RenderOptions(opens=False),
    )
    control = subject.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert sum(token_id in control for token_id in token_ids) == (0 if knows_tools else 4)  # two turns


def test_participants_are_told_apart_by_their_names() -> None:
    named = [Message(role="user", content="Hello", name="Ann"), Message(role="user", content="Hi", name="Bob")]
    for subject in (template(), gemma()):
        prompt = str(subject.tokenizer.decode(subject.render_chat(named)))
        assert "Ann: Hello" in prompt and "Bob: Hi" in prompt


def test_how_the_prompt_ends_can_be_said() -> None:
    subject = template(own=False)
    begun = messages(("user", "Count"), ("assistant", "1, 2,"))

    def end(continues: bool | None = None, opens: bool | None = None) -> str:
        return str(subject.tokenizer.decode(subject.render_chat(begun, RenderOptions(continues, opens)))).split(
            "Count"
        )[1]

    assert end() == end(continues=True) == end(True, False) == "<|im_end|>\n<|im_start|>assistant\n1, 2,"
    assert (
        end(continues=False)
        == end(opens=True)
        == ("<|im_end|>\n<|im_start|>assistant\n1, 2,<|im_end|>\n<|im_start|>assistant\n")
    )
    user = subject.render_chat(messages(("user", "I thi")), RenderOptions(continues=True))
    assert str(subject.tokenizer.decode(user)) == "<|im_start|>user\nI thi"


def test_a_refusal_of_the_assistants_is_its_text() -> None:
    part = {"type": "refusal", "refusal": "I will not."}
    for message in (Message(role="assistant", refusal="I will not."), Message(role="assistant", content=[part])):
        assert canonical([message])[0]["content"] == "I will not."


@pytest.mark.parametrize(
    ("part", "path"),
    [({"type": "text"}, ".text"), ({"type": "refusal"}, ".refusal"), ({"type": "image_url"}, ""), ({"type": "x"}, "")],
)
def test_a_part_without_its_text_is_refused_by_name(part: dict[str, str], path: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        canonical([Message(role="user", content="x"), Message(role="user", content=[part])])
    assert refusal.value.param == "messages[1].content[0]" + path


@pytest.mark.parametrize("arguments", ["", "null", None, " ", "\n null\t", "{}", {}])
def test_a_call_without_arguments_has_none(arguments: Any) -> None:
    function = {"name": "now", "arguments": arguments}
    empty = {"name": "now", "arguments": {}}
    (chat,) = canonical([Message(role="assistant", tool_calls=[{"id": "1", "function": function}])])
    (older,) = canonical([Message(role="assistant", function_call=function)])
    assert chat["tool_calls"][0]["function"] == older["tool_calls"][0]["function"] == empty
    (missing,) = canonical([Message(role="assistant", tool_calls=[{"function": {"name": "now"}}])])
    assert missing["tool_calls"][0]["function"] == empty
    if not isinstance(arguments, dict):
        item = {"type": "function_call", "call_id": "1", "name": "now", "arguments": arguments}
        request = ResponsesRequest.model_validate({"model": "m", "input": [{"role": "user", "content": "x"}, item]})
        assert canonical(as_chat(request).messages)[1]["tool_calls"][0]["function"] == empty


def test_arguments_nested_beyond_reason_are_refused_or_text() -> None:
    for depth in (50, 400, 5000):
        call = {"function": {"name": "f", "arguments": "[" * depth + "]" * depth}}
        try:
            template().render_chat([Message(role="assistant", tool_calls=[call])])
        except InvalidRequest as refusal:
            assert refusal.param == "messages"


def test_a_gap_is_marked_for_models_that_know_it_and_refused_for_others() -> None:
    marks = {"a": "<fim_prefix>", "b": "<fim_suffix>", "c": "<fim_middle>"}
    subject = template("starcoder2", **marks)
    token_ids, ends = subject.render_fill_in_the_middle("x = ", "\n")
    assert subject.tokenizer.decode(token_ids) == "<fim_prefix>x = <fim_suffix>\n<fim_middle>"
    assert set(subject.tokenizer.convert_tokens_to_ids(["<fim_prefix>", "<|endoftext|>"])) <= set(ends)
    with pytest.raises(InvalidRequest, match="fill-in-the-middle"):
        template().render_fill_in_the_middle("x", "y")


def test_text_of_noncharacters_is_text_and_of_all_seams_is_refused() -> None:
    noncharacters = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    assert noncharacters in text(template(), ("user", noncharacters))
    with pytest.raises(InvalidRequest):
        text(template(), ("user", "".join(SEAMS)))


MARKUP = ["<start_of_image>", "<tool_call>", "</think>", "<image_soft_token>", "<|file_sep|>"]


@pytest.mark.parametrize("role", ["user", "system", "tool", "assistant"])
def test_markup_that_the_tokenizer_does_not_call_special_stays_text_but_for_the_assistant(role: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in [*MARKUP, "<h1>"]])
    subject = PromptTemplate(tokenizer, "qwen3")
    content = " ".join([*MARKUP, "<h1>"])
    token_ids = subject.render_chat(messages((role, content), ("user", "x")))
    found = [token for token in [*MARKUP, "<h1>"] if tokenizer.convert_tokens_to_ids(token) in token_ids]
    assert found == ([*MARKUP, "<h1>"] if role == "assistant" else ["<h1>"])
    assert content in str(tokenizer.decode(token_ids))


@pytest.mark.parametrize("make", [template, gemma])
def test_a_call_of_a_tool_that_takes_text_keeps_its_text(make: object) -> None:
    call = {"id": "c1", "type": "custom", "custom": {"name": "grep", "input": "needle"}}
    subject = make()
    result = Message(role="tool", content="found", tool_call_id="c1")
    prompt = str(subject.tokenizer.decode(subject.render_chat([Message(role="assistant", tool_calls=[call]), result])))
    assert '"name": "grep"' in prompt and "needle" in prompt and "Result of grep" in prompt


def test_a_result_without_a_call_says_what_it_is_of_where_the_template_would_not() -> None:
    subject = template()
    subject.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
    subject = PromptTemplate(subject.tokenizer, "qwen3")
    result = Message(role="function", name="get_weather", content="42")
    assert "get_weather: 42" in str(subject.tokenizer.decode(subject.render_chat([result])))


@pytest.mark.parametrize("make", [lambda: template(own=False), gemma])
def test_what_is_continued_keeps_its_leading_blanks(make: object) -> None:
    assert "\n  def f():" in text(make(), ("user", "Write"), ("assistant", "  def f():"))


def test_only_what_the_assistant_or_the_user_said_can_be_continued() -> None:
    late = messages(("user", "U"), ("assistant", "A"), ("system", "S"))
    with pytest.raises(InvalidRequest) as refusal:
        gemma().render_chat(late, RenderOptions(continues=True))
    assert refusal.value.param == "continue_final_message"
