"""Whatever a client sends is taken or refused by name."""

import json
from functools import partial
from typing import Any

import pytest
from fastapi.responses import JSONResponse
from fuzz_inputs import JSON, TEXT, allows, json_of, mixed, object_of, shaped
from hypothesis import assume, example, given
from hypothesis import strategies as st
from models import CHATML, MARKS, SPECIAL, byte_tokenizer
from profiles import examples
from pydantic import ValidationError

import schemas
from api.answers import ignored_fields_header
from api.cohere import schemas as cohere_schemas
from api.error_handlers import invalid_request_of
from api.messages import input as message_input
from api.messages.schemas import MessagesRequest
from api.ollama import schemas as ollama_schemas
from api.responses.requests import ResponsesRequest
from api.responses.view import as_chat
from errors import APIError
from prompt_templates import TOOL_FORMATS, PromptTemplate, RenderOptions
from server.error_formats import OPENAI
from serving.cl100k import Cl100k
from setting_values import parse_bytes, parse_fallbacks, parse_pairs
from text.canonical_messages import canonical
from text.structured_output import structure_of
from text.tool_calls.json_calls import LINES
from text.tool_calls.lark import Literals
from text.tool_calls.tool_format import ToolFormat
from text.tools import tool_set_of


def nested(depth: int, key: str = "a") -> Any:
    """As deep JSON as a request or an answer may be."""
    value: Any = {}
    for _ in range(depth):
        value = {key: [value]}
    return value


REQUESTS = {
    schemas.ChatCompletionRequest: {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
    schemas.CompletionRequest: {"model": "m", "prompt": "Hi"},
    ResponsesRequest: {"model": "m", "input": "Hi"},
    schemas.EmbeddingRequest: {"model": "m", "input": "Hi"},
    schemas.RerankRequest: {"model": "m", "query": "Hi", "documents": ["a"]},
    schemas.TokenizeRequest: {"messages": [{"role": "user", "content": "Hi"}]},
    schemas.DetokenizeRequest: {"tokens": [1]},
    ollama_schemas.OllamaChatRequest: {"model": "m", "messages": [{"role": "user", "content": "Hi"}]},
    ollama_schemas.OllamaGenerateRequest: {"model": "m", "prompt": "Hi"},
    ollama_schemas.OllamaEmbedRequest: {"model": "m", "input": "Hi"},
    cohere_schemas.CohereEmbedRequest: {"model": "m", "texts": ["Hi"]},
    cohere_schemas.CohereRerankRequest: {"model": "m", "query": "Hi", "documents": ["a"]},
    MessagesRequest: {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5},
}
WORDS = (
    "role user assistant tool system content type text image_url url name function parameters arguments tool_calls id "
    "properties required items enum string object integer $ref #/$defs/x $defs anyOf strict json_schema schema json "
    "regex choice grammar auto none low effort format input_text output_text message function_call "
    "function_call_output call_id output input a b 1 -1 include_usage"
)


def told(error: ValidationError, body: Any) -> APIError:
    """The problem as a client hears of it."""
    return invalid_request_of([{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()], body)


def tried(kind: Any, body: dict[str, Any]) -> Any:
    """The request; None where it is refused, in a sentence that can be sent."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        assert JSONResponse(OPENAI.body(told(error, body))).body
    return None


@pytest.mark.parametrize("kind", REQUESTS)
@examples(60)
@given(st.data())
def test_any_value_of_any_field_is_taken_or_refused(kind: Any, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(list(kind.model_fields)), max_size=3) | TEXT.map(lambda text: [text]))
    body = {**REQUESTS[kind], **{name: data.draw(json_of(WORDS)) for name in names}}
    request = tried(kind, body)
    if request is not None:
        assert request.refused_fields is not None and ignored_fields_header(request.ignored_fields) is not None


@pytest.mark.parametrize("kind", REQUESTS)
@pytest.mark.parametrize("value", [nested(400), [[[[]]]] * 100, 10**400, 1e400, float("nan"), "\ud800", {"\ud800": 1}])
def test_odd_values_of_every_field_are_taken_or_refused(kind: Any, value: Any) -> None:
    for name in [*kind.model_fields, "other", "\ud800"]:
        request = tried(kind, {**REQUESTS[kind], name: value})
        assert request is None or isinstance(ignored_fields_header(request.ignored_fields), dict)


@examples(80)
@given(object_of(WORDS + " instructions reasoning text tools tool_choice include"), st.data())
def test_a_response_is_asked_for_as_a_chat_or_refused(fields: dict[str, Any], data: Any) -> None:
    item = object_of("role user assistant content type message function_call function_call_output call_id output name")
    request = tried(ResponsesRequest, {"model": "m", "input": data.draw(st.lists(item, max_size=3) | TEXT), **fields})
    chat = request and allows(lambda: as_chat(request), APIError)
    assert chat is None or isinstance(chat, schemas.ChatCompletionRequest)


BLOCKS = "tool_use tool_result thinking redacted_thinking image base64 source media_type data tool_use_id id input any"


@examples(80)
@given(object_of(f"{WORDS} {BLOCKS} system tools tool_choice thinking output_config stop_sequences"), st.data())
def test_a_message_is_asked_for_as_a_chat_or_refused(fields: dict[str, Any], data: Any) -> None:
    block = object_of(f"type text {BLOCKS}")
    content = st.lists(block, max_size=3) | TEXT
    turn = shaped(role=st.sampled_from(["user", "assistant", "system"]), content=content)
    messages = data.draw(st.lists(turn, max_size=4))
    request = tried(MessagesRequest, {"model": "m", "max_tokens": 5, "messages": messages, **fields})
    chat = request and allows(lambda: message_input.as_chat(request), APIError)
    assert chat is None or isinstance(chat, schemas.ChatCompletionRequest)


@pytest.mark.parametrize("count", [9_999, 10_000])
def test_a_conversation_whose_results_become_too_many_messages_is_refused(count: int) -> None:
    results = [{"type": "tool_result", "tool_use_id": "t", "content": "x"}] * count
    messages = [{"role": "user", "content": results}]
    request = tried(MessagesRequest, {"model": "m", "max_tokens": 5, "messages": messages, "system": "S"})
    if count < schemas.MAX_MESSAGES:
        assert len(message_input.as_chat(request).messages) == count + 1
    else:
        with pytest.raises(APIError, match="messages"):
            message_input.as_chat(request)


@pytest.mark.parametrize("count", [9_999, 10_000, 10_001])
def test_a_response_of_many_messages_is_asked_for_or_refused(count: int) -> None:
    item = {"role": "user", "content": "x"}
    request = tried(ResponsesRequest, {"model": "m", "input": [item] * count, "instructions": "y"})
    assert request is None or len(as_chat(request).messages) == count + 1


SCHEMA = shaped(
    type=st.sampled_from(["object", "string", "integer"]),
    properties=st.dictionaries(st.sampled_from(["a", "b c", "<"]), json_of(WORDS), max_size=2),
    required=st.lists(json_of(WORDS), max_size=2),
    additionalProperties=st.booleans(),
    enum=st.lists(JSON, max_size=2),
)
TOOL = shaped(
    type=st.just("function"),
    function=shaped(name=st.sampled_from(["now", "weather"]), parameters=SCHEMA, strict=st.booleans()),
)
GOOD_TOOL = st.builds(lambda schema: {"type": "function", "function": {"name": "f", "parameters": schema}}, SCHEMA)
ASKED = shaped(
    tools=st.lists(GOOD_TOOL | TOOL, max_size=2),
    tool_choice=st.sampled_from(["auto", "required", "none"])
    | json_of("type function name f allowed_tools mode tools"),
    response_format=shaped(type=st.sampled_from(["json_schema", "json_object"]), json_schema=shaped(schema=SCHEMA)),
    guided_json=SCHEMA,
    guided_regex=TEXT,
    guided_choice=st.lists(TEXT, max_size=3),
    guided_grammar=TEXT,
    structured_outputs=shaped(json=SCHEMA, regex=TEXT, choice=st.lists(TEXT), grammar=TEXT),
)


@examples(80)
@given(ASKED, st.sampled_from([LINES, *TOOL_FORMATS]), st.booleans())
@example({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"required": [[]]}}}],
          "tool_choice": "required"}, TOOL_FORMATS[0], True)  # fmt: skip
@example({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"minimum": 10**400}}}]},
         LINES, False)  # fmt: skip
@example({"structured_outputs": {"\ud800": 1}}, LINES, True)
def test_what_an_answer_must_look_like_is_a_grammar_or_refused(
    fields: dict[str, Any], style: ToolFormat, has_tokens: bool
) -> None:
    request = tried(schemas.ChatCompletionRequest, {**REQUESTS[schemas.ChatCompletionRequest], **fields})
    assume(request is not None)
    literals = Literals({"<tool_call>", "</tool_call>"} if has_tokens else ())
    try:
        assert structure_of(request, tool_set_of(request), style, literals) is not False
    except APIError as error:
        assert error.status == 400 and JSONResponse(OPENAI.body(error)).body


CONTROL = mixed(
    [*SPECIAL, *MARKS, "<|im_", "start|>", "<", "|", "im_end", " ", "\n", "\ufdd0", "{{ 1 }}", "{%", "x"], 8
)
ROLES = ["system", "developer", "user", "assistant", "tool", "function"]
TOOLED = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}{{ '<tool_call>' }}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{{ '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def template(chat_template: str | None, model_type: str = "qwen3") -> PromptTemplate:
    tokenizer = byte_tokenizer(has_marks=True)
    tokenizer.chat_template = chat_template
    return PromptTemplate(tokenizer, model_type)


TEMPLATES = {
    "chatml": template(CHATML),
    "tooled": template(TOOLED),
    "family": template(None),
    "gemma": template(None, "gemma3"),
    "generic": template(None, "mamba"),
}
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": CONTROL}, optional={"name": CONTROL})
CALL = st.builds(
    lambda name, arguments: {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}},
    CONTROL | JSON,
    CONTROL | JSON | JSON.map(json.dumps),
)
ANY_MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES)},
    optional={
        "content": CONTROL | TEXT | st.lists(shaped(type=st.just("text"), text=CONTROL), max_size=2),
        "tool_calls": st.lists(CALL | object_of("function name arguments id"), max_size=2),
        "function_call": object_of("name arguments"),
        "name": TEXT,
        "tool_call_id": TEXT,
        "reasoning_content": CONTROL,
    },
)


@pytest.mark.parametrize("kind", TEMPLATES)
@examples(40)
@given(st.lists(ANY_MESSAGE, min_size=1, max_size=2), st.lists(GOOD_TOOL, max_size=1), st.booleans() | st.none())
def test_messages_are_a_prompt_or_refused(kind: str, given_messages: list[Any], tools: list[Any], thinks: Any) -> None:
    body = {"model": "m", "messages": given_messages, "tools": tools}
    request = tried(schemas.ChatCompletionRequest, body)
    assume(request is not None and allows(lambda: tool_set_of(request) or True, APIError))
    options = RenderOptions(tools=tools, thinks=thinks)
    token_ids = allows(lambda: TEMPLATES[kind].render_chat(request.messages, options), APIError)
    assert token_ids is None or len(token_ids) > 0
    assert allows(lambda: canonical(request.messages, "x"), APIError) is not False


@pytest.mark.parametrize("kind", TEMPLATES)
def test_calls_of_any_depth_are_a_prompt_or_refused(kind: str) -> None:
    for depth in [1, 50, *range(100, 500, 20)]:
        calls = [{"type": "function", "function": {"name": "f", "arguments": nested(depth)}}]
        asked = [schemas.Message(role="assistant", tool_calls=calls), schemas.Message(role="user", content="x")]
        allows(partial(TEMPLATES[kind].render_chat, asked), APIError)


def harmless(message: dict[str, str]) -> dict[str, str]:
    """Another text, blank if that is."""
    return {name: text if name == "role" or not text.strip() else "x" for name, text in message.items()}


@pytest.mark.parametrize("kind", TEMPLATES)
@examples(100)
@given(st.lists(MESSAGE, min_size=1, max_size=4))
def test_no_text_becomes_a_control_token(kind: str, given_messages: list[dict[str, str]]) -> None:
    subject = TEMPLATES[kind]
    ids = {subject.token_id(token) for token in SPECIAL}

    def controls(some: list[dict[str, str]]) -> list[int]:
        rendered = subject.render_chat([schemas.Message.model_validate(message) for message in some])
        return [token_id for token_id in rendered if token_id in ids]

    assert controls(given_messages) == controls([harmless(message) for message in given_messages])


@examples(100)
@given(st.lists(MESSAGE.filter(lambda message: message["role"] != "assistant"), min_size=1, max_size=4))
def test_only_the_assistants_text_has_marks_that_are_tokens(given_messages: list[dict[str, str]]) -> None:
    subject = TEMPLATES["tooled"]
    rendered = subject.render_chat([schemas.Message.model_validate(message) for message in given_messages])
    assert not {subject.token_id(mark) for mark in MARKS} & set(rendered)


@given(TEXT | mixed(["4", "Gi", "B", "K", ".", "-", " ", "e", "1" * 30, "inf", "nan", "٣", "_"], 5) | JSON)
@example("1e999g")
@example("9" * 5000)
def test_sizes_are_numbers_or_refused(value: Any) -> None:
    size = allows(lambda: parse_bytes(value), ValueError)
    assert size is None or isinstance(size, int) or not isinstance(value, str)


@given(mixed(["a", "b", "=", ",", ";", " ", "#", " # x"]) | JSON)
def test_lists_of_names_are_read_or_refused(value: Any) -> None:
    for parse in (parse_pairs, parse_fallbacks):
        read_value = allows(partial(parse, value), ValueError)
        assert not isinstance(value, str) or read_value is None or all(read_value.keys())


@given(st.dictionaries(st.integers(0, 50), st.binary(max_size=4)), st.lists(st.integers(0, 50)))
def test_token_ids_are_text_or_unknown(tokens: dict[int, bytes], token_ids: list[int]) -> None:
    text = allows(lambda: Cl100k(tokens).decode(token_ids), KeyError)
    assert (text is None) == any(token_id not in tokens for token_id in token_ids) and (text or "").encode() is not None
