"""Calls are read from the tokens of genuine tokenizers, and grammars take what models write in them."""

import json
from functools import cache
from typing import Any

import pytest
from call_forms import BARE_FORMS, GEMMA_FORMS, GLM_FORMS, JSON_FORMS, TOOLS, XML_FORMS, called, gemma, marked, xml
from genuine_templates import gemma_4
from test_answer_parser import Answer, fold
from test_genuine_prompts import MODELS, fetch
from transformers import AutoTokenizer

from engine.constraint import Constraint
from engine.sample.grammar import Grammar, GrammarCompiler
from prompt_templates import PromptTemplate
from schemas import ChatCompletionRequest
from serving.chat import parser_options_of
from text.answer_parser import AnswerParser, ParserOptions
from text.detokenizer import TextDecoder
from text.structured_output import Structure, structure_of
from text.tool_calls.element_calls import GLM_XML, QWEN_XML
from text.tool_calls.gemma_calls import GEMMA_CALLS
from text.tool_calls.json_calls import LINES, MARKED, PARAMETERS
from text.tool_calls.tool_format import ToolFormat
from text.tools import ToolSet, tool_set_of

XML_TEMPLATE = (
    "{% if tools %}<tools>{{ tools }}</tools> <tool_call>\n<function=name>\n<parameter=key>\n{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}<think></think>"
)
GLM_TEMPLATE = XML_TEMPLATE.replace("<function=name>\n<parameter=key>", "<arg_key>k</arg_key> <arg_value>v</arg_value>")
BOX = ToolSet(shown=(), schemas=TOOLS, fields={}, is_required=False, is_parallel=True, is_strict=False)


@cache
def template_of(model: str, style: ToolFormat) -> PromptTemplate:
    if style is GEMMA_CALLS:
        return gemma_4()
    tokenizer = AutoTokenizer.from_pretrained(fetch(model))
    if style in (QWEN_XML, GLM_XML):
        tokenizer.chat_template = XML_TEMPLATE if style is QWEN_XML else GLM_TEMPLATE
    return PromptTemplate(tokenizer, MODELS[model])


@cache
def compiler_of(template: PromptTemplate) -> GrammarCompiler:
    tokenizer = template.tokenizer
    return GrammarCompiler(tokenizer.backend_tokenizer.to_str, len(tokenizer), {tokenizer.eos_token_id})


def through_tokens(
    template: PromptTemplate, text: str, state: Any = "closed", box: ToolSet = BOX, grammar: Constraint | None = None
) -> Answer:
    """As the server reads an answer."""
    reading = parser_options_of(template, box, state, False, grammar)
    decoder, token_ids = TextDecoder(template.marking_detokenizer), template.encode(text)
    return fold(AnswerParser(reading), [*(decoder.put(token_id) for token_id in token_ids), decoder.end()], True)


MODEL_FORMS = [
    *(("qwen3", QWEN_XML, *form) for form in XML_FORMS),
    *(("qwen3", MARKED, *form) for form in JSON_FORMS),
    *(("qwen3", GLM_XML, *form) for form in GLM_FORMS),
    *(("qwen2_5", MARKED, *form) for form in JSON_FORMS),
    *(("llama3_2", PARAMETERS, *form) for form in BARE_FORMS),
    *(("gemma3", LINES, *form) for form in BARE_FORMS),
    *(("gemma4", GEMMA_CALLS, *form) for form in GEMMA_FORMS),
]


@pytest.mark.thinned(4)
@pytest.mark.parametrize(("model", "style", "text", "content", "calls"), MODEL_FORMS)
def test_calls_are_read_from_the_tokens_of_genuine_models(
    model: str, style: ToolFormat, text: str, content: str, calls: list[tuple[str, Any]]
) -> None:
    template = template_of(model, style)
    assert template.tool_format is style
    answer = through_tokens(template, text)
    assert (called(answer), answer.content, answer.reason) == (calls, content, "tool_calls")
    if template.think is not None and style.begin and text.startswith(style.begin):
        answer = through_tokens(template, f"Hm.\n\n{text}", "open")
        assert (answer.reasoning, called(answer), answer.reason) == ("Hm.", calls, "tool_calls")
        answer = through_tokens(template, f"Hm. I call it: {text}", "open")
        assert (answer.reasoning, called(answer), answer.reason) == ("Hm. I call it:", calls, "tool_calls")


LONG = "a > b\nin a line </parameter> and </function> are text"


CHOICES = ["auto", "required", {"type": "function", "function": {"name": "f"}}]


def guard_of(template: PromptTemplate, schemas: dict[str, Any], choice: Any) -> tuple[ToolSet, Structure, Grammar]:
    """What the server makes of a request with these tools."""
    tools = [{"type": "function", "function": {"name": name, "parameters": own}} for name, own in schemas.items()]
    message = {"role": "user", "content": "x"}
    body = ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [message], "tools": tools, "tool_choice": choice}
    )
    box = tool_set_of(body)
    structure = structure_of(body, box, template.tool_format, template.literals)
    assert structure is not None and box is not None
    return box, structure, compiler_of(template).compile(structure.text)


def is_taken(template: PromptTemplate, structure: Structure, grammar: Grammar, text: str) -> bool:
    """Whether the grammar takes each of the text's tokens."""
    token_ids = template.encode(text)
    assert structure.trigger in (None, template.tokenizer.decode(token_ids[0]))
    matcher = grammar.matcher()
    for token_id in token_ids[structure.trigger is not None :]:
        mask = matcher.mask([])
        if mask is not None and not mask[token_id // 8] >> token_id % 8 & 1:
            return False
        matcher.accept(token_id)
    return True


@pytest.mark.thinned(3)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize(("style", "text"), [(QWEN_XML, marked(xml(("x", LONG), ("n", "2")))), (MARKED, marked(
    json.dumps({"name": "f", "arguments": {"x": LONG, "n": 2}}))), (GEMMA_CALLS, gemma(f"n:2,x:~{LONG}~"))],
    ids=["XML", "JSON", "Gemma"])  # fmt: skip
def test_grammars_take_what_genuine_models_write_and_it_is_read_as_it_comes(
    style: ToolFormat, text: str, choice: Any
) -> None:
    template = template_of("qwen3", style)
    box, structure, grammar = guard_of(template, TOOLS, choice)
    assert is_taken(template, structure, grammar, text)
    assert called(through_tokens(template, text, box=box, grammar=grammar)) == [("f", {"x": LONG, "n": 2})]
    parser, parts = AnswerParser(parser_options_of(template, box, "closed", False, grammar)), 0
    for token_id in template.encode(text):
        parts += len(parser.put(template.marking_detokenizer.decode([token_id])))
    assert parts > 2  # it is guarded, so it need not be held


OPTIONAL = {"anyOf": [{"type": "string"}, {"type": "null"}]}  # as pydantic writes `str | None`
WRITTEN: list[tuple[Any, str, Any]] = [  # a parameter's schema, what a model writes, what it is
    *((OPTIONAL, text, text) for text in ("123", "true", "a\\nb", '"a"', "a\n\nb", "{", "[1", "None of it")),
    (OPTIONAL, "null", None),
    *(({**own, "description": "x"}, "123", "123") for own in (
        {"type": ["string", "null"]}, {"type": "string", "nullable": True}, {"$ref": "#/$defs/text"},
        {"allOf": [{"$ref": "#/$defs/text"}]}, {"anyOf": [{"$ref": "#/$defs/text"}, {"type": "null"}]},
        {"oneOf": [{"type": "string"}, {"type": "null"}]}, {"type": "string"}, {"type": ["string", "integer"]})),
    ({"type": ["integer", "string"]}, "5", 5),
    ({"type": ["integer", "string"]}, "5 or 6", "5 or 6"),
    ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}, '["a"]', ["a"]),
    ({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}, "a, b", "a, b"),
    ({}, "some text", "some text"),
    ({}, '{"a": 1}', {"a": 1}),
    *(({"anyOf": [{"enum": ["a", "b c"]}, {"type": "null"}]}, text, value) for text, value in (
        ("a", "a"), ("b c", "b c"), ("null", None))),
    ({"enum": ["a", None]}, "null", None),
    ({"const": "a"}, "a", "a"),
    ({"$ref": "#/$defs/choice"}, "b", "b"),
    ({"type": "string", "minLength": 2}, '"1\\n2"', "1\n2"),
    ({"type": ["string", "null"], "maxLength": 9}, '"null"', "null"),
    ({"type": "string", "pattern": "^[0-9]+$"}, '"123"', "123"),
    ({"type": "string", "format": "date"}, '"2026-11-27"', "2026-11-27"),
    ({"anyOf": [{"type": "string", "minLength": 1}, {"type": "null"}]}, "null", None),
    ({"anyOf": [{"type": "integer", "minimum": 3}, {"type": "string"}]}, '"1"', "1"),
    ({"type": "integer", "minimum": 1}, "5", 5),
    ({"type": "array", "items": {"type": "string"}}, '["a"]', ["a"]),
]  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES[:2])
@pytest.mark.parametrize("style", [QWEN_XML, GLM_XML])
def test_a_guarded_value_is_written_as_models_are_taught_and_read_as_it_was_meant(
    style: ToolFormat, choice: Any
) -> None:
    template = template_of("qwen3", style)
    definitions = {"text": {"type": "string"}, "choice": {"enum": ["a", "b"]}}
    for schema, text, value in WRITTEN:
        tools = {"f": {"type": "object", "properties": {"v": schema}, "required": ["v"], "$defs": definitions}}
        box, structure, grammar = guard_of(template, tools, choice)
        glm = f"f\n<arg_key>v</arg_key>\n<arg_value>{text}</arg_value>"
        call = marked(xml(("v", text))) if style is QWEN_XML else f"<tool_call>{glm}\n</tool_call>"
        assert is_taken(template, structure, grammar, call), (schema, text)
        assert called(through_tokens(template, call, box=box, grammar=grammar)) == [("f", {"v": value})], schema


def test_a_mark_that_a_guarded_call_forgets_ends_the_value_all_the_same() -> None:
    number, limited = {"type": "integer"}, {"type": "integer", "minimum": 1}
    for n, choice in ((number, "auto"), (number, "required"), (limited, "auto")):
        tools = {"f": {"type": "object", "properties": {"x": OPTIONAL, "n": n, "m": number}, "required": ["x"]}}
        for style in (QWEN_XML, GLM_XML):
            template = template_of("qwen3", style)
            box, structure, grammar = guard_of(template, tools, choice)
            for numbers, arguments in (
                ([("n", "5")], {"x": "a.py", "n": 5}),
                ([("n", "5"), ("m", "6")], {"x": "a.py", "n": 5, "m": 6}),
                ([("n", "many")], None),
            ):
                values = [("x", "a.py"), *numbers]
                if style is QWEN_XML:
                    text = xml(*values).replace("</parameter>\n<", "<", 1)
                    inside = text.partition("=x>\n")[2].partition("\n</parameter>")[0]
                else:
                    parts = [f"<arg_key>{key}</arg_key>\n<arg_value>{own}</arg_value>\n" for key, own in values]
                    text = "f\n" + "".join(parts).replace("</arg_value>\n", "", 1)
                    inside = text.partition("<arg_value>")[2].partition("</arg_value>")[0]
                call = marked(text) if style is QWEN_XML else f"<tool_call>{text}</tool_call>"
                assert is_taken(template, structure, grammar, call)
                answer = called(through_tokens(template, call, box=box, grammar=grammar))
                assert answer == [("f", arguments or {"x": inside})], call


def test_what_a_json_string_quotes_of_calls_is_its_text() -> None:
    """A grammar wants JSON where a string has limits, so nothing can be forgotten in it."""
    limited = {"type": "string", "maxLength": 99}
    tools = {"f": {"type": "object", "properties": {"x": limited, "n": {"type": "string"}}, "required": ["x"]}}
    template, text = template_of("qwen3", GLM_XML), "<arg_key>n</arg_key>\\n<arg_value>5"
    call = f'<tool_call>f\n<arg_key>x</arg_key>\n<arg_value>"{text}"</arg_value>\n</tool_call>'
    box, structure, grammar = guard_of(template, tools, "auto")
    assert is_taken(template, structure, grammar, call)
    assert called(through_tokens(template, call, box=box, grammar=grammar)) == [("f", {"x": json.loads(f'"{text}"')})]


def test_what_a_grammar_asks_for_again_counts() -> None:
    """It has taken what is behind the forgotten mark for text, and wants the argument, which is required."""
    reading = ParserOptions({"f": {**TOOLS["f"], "required": ["x", "n"]}}, QWEN_XML, is_guarded=True)
    text = marked(xml(("x", "a"), ("n", "5"), ("n", "6")).replace("</parameter>\n<", "<", 1))
    for pieces in (list(text), [text]):
        assert called(fold(AnswerParser(reading), pieces, True)) == [("f", {"x": "a", "n": 6})]


def test_marks_that_other_tokens_spell_are_text() -> None:
    template = template_of("qwen3", QWEN_XML)
    assert set(template.marks) == {"<tool_call>", "</tool_call>", "<think>", "</think>"}
    assert ">" in template.tokenizer.get_vocab() and len(template.encode(">\n")) == 1
    assert "<arg_key>" not in template_of("qwen3", GLM_XML).marks
