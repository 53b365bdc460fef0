"""Calls that a grammar forces are valid, in every format, on every model and at every temperature; others are free."""

import json
import random
from typing import Any

import jsonschema
import pytest
import torch
from models import FAMILIES, byte_tokenizer
from tokenizers import AddedToken

from engine.attention import paged
from engine.build import build_engine
from engine.constraint import Constraint
from engine.engine import Engine, EngineOptions
from engine.sample.grammar import GrammarCompiler, TriggeredGrammar
from engine.sample.thinking import Thinking
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from errors import InvalidRequest
from schemas import ChatCompletionRequest
from text.answer_parser import AnswerParser, ParserOptions
from text.structured_output import structure_of
from text.tool_calls.element_calls import GLM_XML, QWEN_XML, ElementFormat
from text.tool_calls.gemma_calls import GEMMA_CALLS
from text.tool_calls.json_calls import LINES, MARKED, PARAMETERS, JsonFormat
from text.tool_calls.lark import Literals
from text.tool_calls.named_calls import NAMED
from text.tool_calls.tool_format import ToolFormat
from text.tools import tool_set_of

FORMATS = {style.name: style for style in (MARKED, PARAMETERS, LINES, NAMED, QWEN_XML, GLM_XML, GEMMA_CALLS)}
TOKENIZER = byte_tokenizer(has_marks=True)
TOKENIZER.add_tokens([AddedToken(mark, normalized=False) for mark in ("<arg_key>", "</arg_key>", "</arg_value>")])
EOS, BEGIN, END, CALL = TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<think>", "</think>", "<tool_call>"])
COMPILER = GrammarCompiler(TOKENIZER.backend_tokenizer.to_str, len(TOKENIZER), {EOS})
PLAIN = byte_tokenizer()
PLAIN_COMPILER = GrammarCompiler(PLAIN.backend_tokenizer.to_str, len(TOKENIZER), {EOS})
MARKS = Literals(["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "</arg_value>"])
NO_MARKS = Literals([])

SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"enum": ["celsius", 'it\'s "°F"</parameter>']},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "at": {"type": "string", "pattern": "^[0-9]{2}:[0-9]{2}$"},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "code": {"type": ["string", "null"], "maxLength": 9},
            "size": {"anyOf": [{"enum": ["small", "large"]}, {"type": "null"}]},
            "near": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "additionalProperties": False}},
    },
    "get.now": {"type": "object", "properties": {}, "additionalProperties": False},
    "either": {"anyOf": [{"properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}]},
}


def request(**body: Any) -> ChatCompletionRequest:
    tools = [{"type": "function", "function": {"name": name, "parameters": own}} for name, own in SCHEMAS.items()]
    start = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools}
    return ChatCompletionRequest.model_validate({**start, **body})


def engine_of(family: str, **options: Any) -> Engine:
    model_class, config = FAMILIES[family]
    torch.manual_seed(0)
    own = type(config)(**{**config.to_dict(), "vocab_size": len(TOKENIZER)})
    model = model_class._from_config(own, attn_implementation=paged.NAME).eval()
    return build_engine(model, EngineOptions(**{"max_model_len": 480, **options}), frozenset({EOS}))


def answers(engine: Engine, constraint: Constraint | None, count: int = 8, **params: Any) -> list[tuple[str, bool]]:
    """Texts, and whether the model ended them."""
    sequences = [
        Sequence([72, 105], SamplingParams(**{"max_tokens": 400, "seed": seed, **params}, grammar=constraint), print)
        for seed in range(count)
    ]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    return [(str(TOKENIZER.decode(s.output_ids, skip_special_tokens=True)), s.num_tokens < 402) for s in sequences]


def read(text: str, style: ToolFormat, is_forced: bool = True) -> tuple[str | None, str, list[tuple[str, str]]]:
    """The finish reason, the content and the calls, read in one piece and by characters."""
    found = []
    for pieces in ([text], list(text)):
        parser = AnswerParser(ParserOptions(SCHEMAS, style, is_forced=is_forced))
        parts = [part for piece in pieces for part in parser.put(piece)] + parser.end()
        calls: list[list[str]] = []
        for call in [part.call for part in parts if part.call]:
            calls += [[call.name, ""]] if call.name else []
            calls[-1][1] += call.arguments
        content = "".join(part.content for part in parts)
        found.append((parser.finish_reason("stop"), content, [(name, arguments) for name, arguments in calls]))
    assert found[0] == found[1]
    return found[0]


def check(calls: list[tuple[str, str]]) -> None:
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.thinned(12)
@pytest.mark.parametrize(
    ("literals", "compiler"), [(MARKS, COMPILER), (NO_MARKS, PLAIN_COMPILER)], ids=["tokens", "text"]
)
@pytest.mark.parametrize("name", FORMATS)
def test_forced_calls_are_valid(name: str, literals: Literals, compiler: GrammarCompiler) -> None:
    style, num_complete, most = FORMATS[name], 0, 0
    families = random.Random(name).sample(sorted(FAMILIES), 2)
    for family, temperature in zip(families, (2.0, 1.0), strict=True):
        body = request(tool_choice="required")
        structure = structure_of(body, tool_set_of(body), style, literals)
        assert structure is not None and structure.trigger is None
        constraint = compiler.compile(structure.text)
        for text, is_complete in answers(engine_of(family), constraint, temperature=temperature):
            reason, content, calls = read(text, style)
            assert not content and calls
            check(calls if is_complete else calls[:-1])
            assert (reason == "tool_calls") or not is_complete
            num_complete += is_complete
            most = max(most, len(calls))
    assert num_complete > 4 and (most > 1 or style.is_whole_answer)


@pytest.mark.parametrize("name", FORMATS)
def test_calls_as_models_write_them_follow_the_grammar(name: str) -> None:
    written = {
        "XML": "<tool_call>\n<function=weather>\n<parameter=city>\nNew\nYork <x>\n</parameter>\n<parameter=unit>\n"
        "celsius\n</parameter>\n<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "arg_key": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>New\nYork</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>",
        "Gemma's notation": '<|tool_call>call:weather{at:"10:30",city:<|"|>New\nYork<|"|>,days:3,near:[{x:1}]}'
        "<tool_call|>",
    }
    style, arguments = FORMATS[name], {"city": "New\nYork", "days": 3, "at": "10:30", "near": [{"x": 1}]}
    call = written.get(name) or style.written("weather", arguments)
    body = request(tool_choice="required")
    structure = structure_of(body, tool_set_of(body), style, MARKS)
    assert structure is not None
    grammar = COMPILER.compile(structure.text)
    assert follows(grammar, call) and read(call, style)[0] == "tool_calls"
    check(read(call, style)[2])
    if not style.is_whole_answer:
        assert follows(grammar, f"{call}{style.between}{call}") and follows(grammar, call + "\n")


ODD_SCHEMAS: list[dict[str, Any]] = [
    {"properties": {"a": {"enum": ["x", "yy"], "maxLength": 1}, "b": {"type": "string"}}, "required": ["b"]},
    {"properties": {"a>b": {"type": "string"}, "c d": {"type": "string"}}, "required": ["a>b"]},
    {"properties": {"a": {"$ref": "#/properties/b"}, "b": {"type": "string"}}, "required": ["a"]},
    {"properties": {"a": {"enum": ["\x7f", 'q"', "\n", "</parameter>"]}}, "required": ["a"]},
    {"properties": {}, "required": ["x"], "additionalProperties": {"type": "integer"}},
    {"properties": {"a": True}, "required": ["a"]},
    {"description": "anything"},
]


@pytest.mark.thinned(7)
@pytest.mark.parametrize("name", ["XML", "arg_key", "marked JSON"])
@pytest.mark.parametrize("number", range(len(ODD_SCHEMAS)))
def test_odd_schemas_are_kept_too(name: str, number: int) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": ODD_SCHEMAS[number]}}
    body = request(tools=[tool], tool_choice="required", parallel_tool_calls=False)
    box = tool_set_of(body)
    structure = structure_of(body, box, FORMATS[name], MARKS)
    assert structure is not None and box is not None
    for text, is_complete in answers(engine_of("llama"), COMPILER.compile(structure.text), 4, temperature=1.0):
        parser = AnswerParser(ParserOptions(box.schemas, FORMATS[name], is_forced=True))
        parts = parser.put(text) + parser.end()
        if is_complete:
            assert parser.finish_reason("stop") == "tool_calls"
            arguments = "".join(part.call.arguments for part in parts if part.call)
            jsonschema.validate(json.loads(arguments), {"type": "object", **ODD_SCHEMAS[number]})


@pytest.mark.parametrize("parameters", [{"properties": ["a"]}, {"required": 5}, {"properties": {"a": 3}}])
@pytest.mark.parametrize("name", FORMATS)
def test_a_malformed_schema_is_refused_in_every_format(name: str, parameters: dict[str, Any]) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    body = request(tools=[tool], tool_choice="required")
    structure = structure_of(body, tool_set_of(body), FORMATS[name], MARKS)
    assert structure is not None
    for text in (structure.text, structure.fields["tools[0].function.parameters"]):
        with pytest.raises(ValueError):
            COMPILER.compile(text)


@pytest.mark.parametrize("is_repeated", [True, False])
def test_masks_ahead_are_those_that_come_one_by_one(is_repeated: bool) -> None:
    body = request()
    structure = structure_of(body, tool_set_of(body), MARKED, MARKS)
    assert structure is not None
    triggered = TriggeredGrammar(COMPILER.compile(structure.text), CALL, is_repeated)
    call = '<tool_call>\n{"name": "get.now", "arguments": {}}\n</tool_call>'
    token_ids = TOKENIZER(f"Hi {call}\n{call} there", add_special_tokens=False).input_ids
    for constraint in (triggered, thinking(is_open=False, answer=triggered)):
        for start in range(0, len(token_ids), 3):
            matcher, one_by_one = constraint.matcher(), constraint.matcher()
            for token_id in token_ids[:start]:
                matcher.accept(token_id)
                one_by_one.accept(token_id)
            for count in range(min(12, len(token_ids) - start)):
                if one_by_one.is_finished:
                    break
                assert matcher.mask(token_ids[start : start + count]) == one_by_one.mask([]), (start, count)
                one_by_one.accept(token_ids[start + count])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_calls_the_function_that_is_named_and_once(family: str) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    body = request(tool_choice=choice)
    for style in FORMATS.values():
        structure = structure_of(body, tool_set_of(body), style, MARKS)
        assert structure is not None
        for text, is_complete in answers(engine_of(family), COMPILER.compile(structure.text), 3, temperature=2.0):
            _, _, calls = read(text, style)
            assert [called for called, _ in calls] == ["weather"]
            check(calls if is_complete else [])


def test_where_a_call_has_a_mark_it_is_valid_from_there_on_and_text_is_free() -> None:
    body = request(parallel_tool_calls=False)
    box = tool_set_of(body)
    structure = structure_of(body, box, MARKED, MARKS)
    assert structure is not None and structure.trigger == "<tool_call>" and not structure.is_needed
    free = answers(engine_of("qwen3"), None, temperature=1.0)
    triggered = TriggeredGrammar(COMPILER.compile(structure.text), CALL, is_repeated=False)
    for (text, _), (same, _) in zip(free, answers(engine_of("qwen3"), triggered, temperature=1.0), strict=True):
        before = text.partition("<tool_call>")[0]
        assert same.startswith(before)
    marked = answers(engine_of("qwen3"), triggered, temperature=1.0, logit_bias={CALL: 40.0})
    for text, is_complete in marked:
        reason, _, calls = read(text, MARKED, is_forced=False)
        if is_complete:
            check(calls)
            assert reason == "tool_calls" and len(calls) == 1 and text.endswith("</tool_call>")
    assert sum(is_complete for _, is_complete in marked) > 4


@pytest.mark.parametrize("style", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("literals", [MARKS, NO_MARKS], ids=["tokens", "text"])
def test_strict_tools_are_called_validly_wherever_the_parser_sees_a_call(style: ToolFormat, literals: Literals) -> None:
    body = request()
    loose = structure_of(body, tool_set_of(body), style, literals)
    assert loose is None or (loose.trigger and not loose.is_needed)
    body.tools[0]["function"]["strict"] = True
    structure = structure_of(body, tool_set_of(body), style, literals)
    assert structure is not None and structure.is_needed and structure.trigger is None
    own = TOKENIZER if literals is MARKS else PLAIN
    grammar = (COMPILER if literals is MARKS else PLAIN_COMPILER).compile(structure.text)
    good = {"weather": {"city": "x", "days": 3}, "get.now": {}, "either": {"a": 1}}
    bare = JsonFormat(name="bare", prompt="", key=style.key) if isinstance(style, JsonFormat) else style
    for name, arguments in good.items():
        for form in (bare, style) if not isinstance(style, ElementFormat) else (bare,):
            call = form.written(name, arguments)
            assert follows(grammar, call, own) and read(call, style, is_forced=False)[0] == "tool_calls"
            assert not follows(grammar, form.written(name, {"wrong": True}), own)
            if not style.is_whole_answer:
                assert follows(grammar, f"I will look.\n{call}\nSo.", own)
                assert not follows(grammar, f"I will look.\n{form.written(name, {'wrong': True})}", own)
                assert not follows(grammar, f"```json\n{form.written(name, {'wrong': True})}", own)
    for text in ("Hello.\nThere {}", '{"name": "other"}', "we", "weather is nice", "```json\n{}\n```", "<tool> 1"):
        assert follows(grammar, text, own)


def follows(grammar: Constraint, text: str, tokenizer: Any = TOKENIZER) -> bool:
    """Whether a text is a complete answer."""
    matcher = grammar.matcher()
    for token_id in tokenizer(text, add_special_tokens=False).input_ids:
        mask = matcher.mask([])
        if mask is None or not mask[token_id // 8] >> token_id % 8 & 1:
            return False
        matcher.accept(token_id)
    mask = matcher.mask([])
    return matcher.is_finished or (mask is not None and bool(mask[EOS // 8] >> EOS % 8 & 1))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", FORMATS)
def test_tools_and_a_structure_give_calls_or_the_structure(name: str) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    body = request(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    structure = structure_of(body, tool_set_of(body), FORMATS[name], MARKS)
    assert structure is not None and set(structure.fields) > {"response_format"}
    grammar = COMPILER.compile(structure.text)
    assert follows(grammar, '{"n": 1}') and not follows(grammar, '{"n": 3}') and not follows(grammar, "text")
    for text, is_complete in answers(engine_of("llama"), grammar, temperature=1.0):
        _, content, calls = read(text, FORMATS[name], is_forced=False)
        if is_complete:
            check(calls)
            assert calls or json.loads(content) in ({"n": 1}, {"n": 2})


# --- thinking


def thinking(**changes: Any) -> Thinking:
    closing = (*TOKENIZER("\n").input_ids, END, *TOKENIZER("\n\n").input_ids)
    return Thinking(**{"begin": BEGIN, "end": END, "closing": closing, "is_open": True,
                       "num_tokens": len(TOKENIZER), **changes})  # fmt: skip


@pytest.mark.parametrize("guesses", [0, 6])
@pytest.mark.parametrize("is_open", [True, False])
def test_a_grammar_holds_from_the_end_of_the_thoughts_on(is_open: bool, guesses: int) -> None:
    answer = COMPILER.compile(structure_of(
        request(tools=None, guided_json={"enum": ["same", "same again"]}), None, MARKED, MARKS
    ).text)  # fmt: skip
    after = tuple(TOKENIZER("\n\n").input_ids)
    constraint = thinking(is_open=is_open, answer=answer, after=after, budget=40, forbidden=frozenset({EOS}))
    found = answers(engine_of("qwen3", num_speculative_tokens=guesses), constraint, 10, temperature=1.5)
    for text, is_complete in found:
        thoughts, _, rest = text.rpartition("</think>\n\n")
        assert is_complete and json.loads(rest) in ("same", "same again")
        assert thoughts.startswith("<think>") != is_open or (not is_open and not thoughts)
    assert is_open or {text.startswith("<think>") for text, _ in found} == {True, False}


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_thoughts_end_with_their_budget(budget: int) -> None:
    params = SamplingParams(30, 1.0, logit_bias={END: -100.0, EOS: -100.0}, grammar=thinking(budget=budget))
    sequence, engine = Sequence([72, 105], params, print), engine_of("llama")
    engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    closing = [*TOKENIZER("\n").input_ids, END, *TOKENIZER("\n\n").input_ids]
    assert sequence.output_ids[budget : budget + 4] == closing and sequence.num_output_tokens == 30


def test_a_budget_that_is_not_spent_changes_nothing() -> None:
    free = answers(engine_of("llama"), None, temperature=1.0, max_tokens=30)
    assert answers(engine_of("llama"), thinking(budget=1000), temperature=1.0, max_tokens=30) == free


# --- requests


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": 1}}]}, "tools[0].function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "array"}}}]},
         "tools[0].function.parameters"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "custom": {"name": "a b"}}]}, "tools[0].custom.name"),
        ({"tools": [{"type": "custom", "custom": {"name": "x", "format": {"type": "y"}}}]},
         "tools[0].custom.format.type"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": f"n{i}"}} for i in range(600)]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "x", "description": "d" * 300_000}}]}, "tools"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_tools_is_named(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        tool_set_of(request(**body))
    assert refusal.value.param == field


def test_no_more_properties_are_called_with_than_are_listed() -> None:
    listed = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    bare = {"type": "function", "function": {"name": "g"}}
    free = {
        "type": "function",
        "function": {"name": "h", "parameters": {"properties": {}, "additionalProperties": True}},
    }
    body = request(tools=[listed, bare, free], tool_choice="required")
    structure = structure_of(body, tool_set_of(body), MARKED, MARKS)
    assert structure is not None
    grammar = COMPILER.compile(structure.text)
    for name, arguments, fits in (
        ("f", {}, True),
        ("f", {"a": 1}, False),
        ("g", {}, True),
        ("g", {"a": 1}, False),
        ("h", {"a": 1}, True),
    ):
        assert follows(grammar, MARKED.written(name, arguments)) == fits, (name, arguments)


def test_the_tools_that_are_allowed_are_those_that_may_be_called() -> None:
    choice = {"mode": "required", "tools": [{"type": "function", "function": {"name": "get.now"}}]}
    box = tool_set_of(request(tool_choice={"type": "allowed_tools", "allowed_tools": choice}))
    assert box is not None and box.is_required and list(box.schemas) == ["get.now"] and len(box.shown) == 3
