"""Calls in Gemma's notation: what is written is read back, and what a grammar forces is valid and read as it comes."""

import itertools
import json
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import jsonschema
import pytest
from fuzz_inputs import mixed, splits
from genuine_templates import gemma_4
from hypothesis import assume, given
from hypothesis import strategies as st
from models import byte_tokenizer
from profiles import examples
from test_answer_parser import Answer, fold
from tokenizers import AddedToken

from engine.sample.grammar import Grammar, GrammarCompiler, GrammarMatcher
from prompt_templates import RenderOptions
from schemas import ChatCompletionRequest, Message
from text.answer_parser import AnswerParser, ParserOptions
from text.detokenizer import MarkingDetokenizer
from text.structured_output import Structure, structure_of
from text.tool_calls.gemma_calls import GEMMA_CALLS
from text.tool_calls.lark import Literals
from text.tools import ToolSet, tool_set_of

MARKS = ["<|tool_call>", "<tool_call|>", '<|"|>']
CHARACTERS = {mark: chr(0x10FF00 + number) for number, mark in enumerate(MARKS)}
ANY = {"f": {"type": "object"}, "g": {"type": "object"}}
NOTHING: dict[str, Any] = {}

TEXT = mixed(["<|tool_call>", "<tool_call|>", *"{}[]:,\"'\\\n", "call:f{", "null", "5"])
PLAIN_TEXT = TEXT.filter(lambda text: '<|"|>' not in text and "\x00" not in text)
KEYS = st.text("abcxyzABC_-.019é$", min_size=1, max_size=5)
SCALARS = PLAIN_TEXT | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.booleans() | st.none()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
ARGUMENTS = st.dictionaries(KEYS, VALUES, max_size=4)


def reading(has_tokens: bool, **options: Any) -> ParserOptions:
    """How answers are read in which marks are tokens or not."""
    marks = CHARACTERS if has_tokens else NOTHING
    shown = {character: mark for mark, character in marks.items()}
    return ParserOptions(**{"tools": ANY, "format": GEMMA_CALLS.marked(marks), "marks": shown, **options})


def called(answer: Answer) -> list[tuple[str, Any]]:
    return [(name, json.loads(arguments)) for name, arguments in answer.calls]


# --- what is written is read


@examples(300)
@given(st.lists(ARGUMENTS, min_size=1, max_size=3), st.booleans(), st.booleans(), st.data())
def test_what_is_written_is_read_back_however_it_comes(
    calls: list[dict[str, Any]], has_tokens: bool, is_guarded: bool, data: st.DataObject
) -> None:
    options = reading(has_tokens, is_guarded=is_guarded)
    assert options.format is not None
    text = "".join(options.format.written("f", arguments) for arguments in calls)
    pieces = data.draw(splits(st.just(text)))
    whole = fold(AnswerParser(options), [text], True)
    assert called(whole) == [("f", arguments) for arguments in calls]
    assert (whole.content, whole.reason) == ("", "tool_calls")
    assert fold(AnswerParser(options), pieces, True) == whole == fold(AnswerParser(options), list(text), True)


@examples(200)
@given(ARGUMENTS, st.booleans())
def test_what_has_been_given_of_a_guarded_call_is_the_beginning_of_what_it_is(
    arguments: dict[str, Any], has_tokens: bool
) -> None:
    options = reading(has_tokens, is_guarded=True)
    assert options.format is not None
    text = options.format.written("f", arguments)
    ((_, whole),) = fold(AnswerParser(options), [text], True).calls
    for end in range(len(text)):
        for _, cut in fold(AnswerParser(options), [text[:end]], False).calls:
            assert whole.startswith(cut), (text[:end], cut)


@examples(200)
@given(ARGUMENTS)
def test_a_history_shows_calls_as_they_are_read(arguments: dict[str, Any]) -> None:
    """The genuine template writes them, with Python's names for what is nothing."""
    assume("▁" not in json.dumps(arguments, ensure_ascii=False))  # Gemma's vocabulary has it for a space
    template = gemma_4()
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": json.dumps(arguments)}}
    messages = [Message(role="user", content="x"), Message(role="assistant", content="", tool_calls=[call])]
    token_ids = template.render_chat(messages, RenderOptions(opens=False))
    marks = {template.token_id(mark): mark for mark in MARKS}
    begin, end = (next(i for i, own in marks.items() if own == mark) for mark in MARKS[:2])
    shown = token_ids[token_ids.index(begin) : len(token_ids) - token_ids[::-1].index(end)]
    detokenizer = MarkingDetokenizer(template.detokenizer, {i: CHARACTERS[mark] for i, mark in marks.items()})
    answer = fold(AnswerParser(reading(has_tokens=True)), [detokenizer.decode(shown)], True)
    assert called(answer) == [("f", arguments)]


@pytest.mark.parametrize("key", ["a b", "a:b", "a,b", "{", '"', "'", '<|"|>', "é", "", "\n"])
@pytest.mark.parametrize("value", ['<|"|>', 'a<|"|>,n:5}<tool_call|>', [{"x": '<|"|>'}]])
def test_what_the_notation_cannot_say_is_json_in_its_place(key: str, value: Any) -> None:
    for has_tokens in (False, True):
        options = reading(has_tokens)
        assert options.format is not None
        text = options.format.written("f", {key: value, "z": "1"})
        assert called(fold(AnswerParser(options), list(text), True)) == [("f", {key: value, "z": "1"})]


PIECES = [
    *CHARACTERS.values(),
    "call:f{",
    "call:",
    "f{",
    "x",
    ":",
    ",",
    "}",
    "]",
    "[",
    "{",
    '"',
    "'",
    "\\",
    "\n",
    " ",
    "5",
    "null",
]
PIECES += [CHARACTERS['<|"|>'] + text for text in (",", "}", "x", ",x:", "]}")]


@examples(400)
@given(splits(mixed(PIECES, 20)), st.sampled_from([{}, {"is_guarded": True}, {"is_strict": True}, {"is_forced": True}]))
def test_any_answer_with_tokens_of_marks_means_the_same_however_it_comes(
    pieces: list[str], how: dict[str, Any]
) -> None:
    begun = [CHARACTERS["<|tool_call>"], "call:f{x:", *pieces]
    for own in (pieces, begun):
        answer = fold(AnswerParser(reading(True, **how)), own, True)
        assert answer == fold(AnswerParser(reading(True, **how)), ["".join(own)], True)
        if answer.reason == "tool_calls":
            assert all(isinstance(arguments, dict) for _, arguments in called(answer))
        if not answer.calls and not how:
            shown = "".join(own)
            for mark, character in CHARACTERS.items():
                shown = shown.replace(character, mark)
            assert answer.content == shown


# --- what a grammar forces


@cache
def tokens_and_compiler(has_tokens: bool) -> tuple[Any, GrammarCompiler]:
    tokenizer = byte_tokenizer()
    if has_tokens:
        tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    ids = {tokenizer.eos_token_id}
    return tokenizer, GrammarCompiler(tokenizer.backend_tokenizer.to_str, len(tokenizer), ids)


def forced(has_tokens: bool, tools: dict[str, Any], **body: Any) -> tuple[ToolSet, Structure, Grammar]:
    """What the server makes of a request with these tools."""
    functions = [{"type": "function", "function": {"name": name, **own}} for name, own in tools.items()]
    fields = {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": functions, **body}
    request = ChatCompletionRequest.model_validate(fields)
    box, literals = tool_set_of(request), Literals(MARKS if has_tokens else ())
    structure = structure_of(request, box, GEMMA_CALLS, literals)
    assert structure is not None and box is not None
    return box, structure, tokens_and_compiler(has_tokens)[1].compile(structure.text)


def follows(grammar: Grammar, text: str, has_tokens: bool) -> bool:
    """Whether a text is a complete answer."""
    tokenizer, matcher = tokens_and_compiler(has_tokens)[0], grammar.matcher()
    for token_id in tokenizer(text, add_special_tokens=False).input_ids:
        if token_id not in allowed(matcher.mask([])):
            return False
        matcher.accept(token_id)
    return matcher.is_finished or tokenizer.eos_token_id in allowed(matcher.mask([]))


def allowed(mask: bytes | None) -> list[int]:
    assert mask is not None
    return [number * 8 + bit for number, byte in enumerate(mask) if byte for bit in range(8) if byte >> bit & 1]


CLOSING = [*MARKS[1:], '"', "}", "]", ","]


def walk(
    grammar: Grammar, has_tokens: bool, rng: random.Random, likely: Sequence[str] = (), most: int = 700
) -> str | None:
    """A random answer; None if it does not end. What closes something is taken more often, lest nothing ends."""
    tokenizer, token_ids, matcher = tokens_and_compiler(has_tokens)[0], list[int](), grammar.matcher()
    closing = [tokenizer(text, add_special_tokens=False).input_ids for text in (*CLOSING, *likely)]
    closing += [[tokenizer.eos_token_id]]
    while len(token_ids) < most and not matcher.is_finished:
        short = [own for own in closing if rng.random() < 0.5 and takes(matcher, own)]
        for token_id in rng.choice(short or [[rng.choice(allowed(matcher.mask([])))]]):
            token_ids.append(token_id)
            matcher.accept(token_id)
    shown = {tokenizer.convert_tokens_to_ids(mark): CHARACTERS[mark] for mark in MARKS} if has_tokens else {}
    return MarkingDetokenizer(tokenizer, shown).decode(token_ids) if matcher.is_finished else None


def takes(matcher: GrammarMatcher, token_ids: list[int]) -> bool:
    """Whether these tokens may come next."""
    other = matcher.copy()
    for token_id in token_ids:
        if not other.can_accept(token_id):
            return False
        other.accept(token_id)
    return True


ODD = ["a", "", 'it\'s "so"', "a,b}", "<|tool_call>", "<tool_call|>", '<|"|>', "\n", "null", "5"]
LEAVES: list[dict[str, Any] | bool] = [
    {"type": "string"},
    {"type": "string", "description": "x", "default": "y"},
    {"type": "string", "maxLength": 3},
    {"type": "string", "pattern": "^[a-c]{2}$"},
    {"type": "string", "format": "date"},
    {"enum": ODD},
    {"type": "string", "enum": ["a", 1, None]},
    {"enum": ["a", 1, None, True, 2.5, ["x", {"k": "v"}]]},
    {"const": {"b": [1], "A": "x"}},
    {"type": "integer", "minimum": -3, "maximum": 40},
    {"type": "number", "exclusiveMinimum": 0},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["string", "null"]},
    {"type": ["integer", "string"], "maxLength": 4, "minimum": 5},
    {"type": ["array", "null"], "items": {"type": "boolean"}, "maxItems": 2},
    {"anyOf": [{"type": "string"}, {"type": "integer"}, {"type": "null"}]},
    {"oneOf": [{"enum": ["a", "b"]}, {"type": "integer"}]},
    {"allOf": [{"type": "string"}]},
    {
        "type": "object",
        "anyOf": [{"properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}],
    },
    {"$ref": "#/$defs/node"},
    {"$ref": "#/$defs/limited"},
    {"$ref": "#/definitions/choice", "description": "x"},
    {},
    True,
    {"type": "object"},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": True},
    {"type": "object", "properties": {"a b": {"type": "integer"}, "c:": {"type": "string"}}, "required": ["c:"]},
    {"type": "array"},
    {"type": "array", "items": {"type": "string"}, "minItems": 2, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "integer"}], "items": False},
    {"type": "array", "maxItems": 0},
    {"items": {"type": "integer"}, "maxItems": 5000, "type": "array"},
    {"properties": {"x": {"type": "integer"}}, "required": ["x"]},
]
DEFINITIONS = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["v"],
            "additionalProperties": False,
        },
        "limited": {"type": "string", "maxLength": 2},
    },
    "definitions": {"choice": {"enum": ["x", "y"]}},
}


def objects(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema of an object with some of the leaves and objects in it."""
    keys = rng.sample(["a", "B", "c_1", "d-e", "Fg", "h.i"], rng.randrange(5))
    leaves = [rng.choice(LEAVES) for _ in keys]
    inner = [objects(rng, depth - 1) if depth and rng.random() < 0.3 else leaf for leaf in leaves]
    required = [key for key in keys if rng.random() < 0.4]
    return {
        "type": "object",
        "properties": dict(zip(keys, inner, strict=True)),
        **({"required": required} if required else {}),
        **({"additionalProperties": False} if rng.random() < 0.6 else {}),
    }


@pytest.mark.parametrize("has_tokens", [True, False], ids=["tokens", "text"])
def test_forced_calls_are_valid_by_any_schema_and_read_as_they_come(has_tokens: bool) -> None:
    rng, num_complete = random.Random(7), 0
    for _ in range(60):
        schemas = {name: {**objects(rng, 2), **DEFINITIONS} for name in ("f", "g.h")}
        tools = {name: {"parameters": own} for name, own in schemas.items()}
        box, _, grammar = forced(has_tokens, tools, tool_choice="required")
        options = reading(has_tokens, tools=box.schemas, is_forced=True)
        for _ in range(4):
            text = walk(grammar, has_tokens, rng)
            if text is None:
                continue
            answer = fold(AnswerParser(options), [text], True)
            assert (answer.content, answer.reason) == ("", "tool_calls") and answer.calls, text
            assert fold(AnswerParser(options), list(text), True) == answer
            for name, arguments in called(answer):
                jsonschema.validate(arguments, schemas[name])
            num_complete += 1
    assert num_complete > 100


@pytest.mark.parametrize("has_tokens", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("number", range(len(LEAVES)))
def test_each_kind_of_value_is_valid(number: int, has_tokens: bool) -> None:
    rng, num_complete = random.Random(number), 0
    schema = {"type": "object", "properties": {"v": LEAVES[number]}, "required": ["v"], **DEFINITIONS}
    box, _, grammar = forced(has_tokens, {"f": {"parameters": schema}}, tool_choice="required")
    for _ in range(12):
        text = walk(grammar, has_tokens, rng)
        if text is not None:
            answer = fold(AnswerParser(reading(has_tokens, tools=box.schemas, is_forced=True)), [text], True)
            assert answer.reason == "tool_calls", text
            for _, arguments in called(answer):
                jsonschema.validate(arguments, schema)
            num_complete += 1
    assert num_complete


WRITTEN: list[tuple[Any, str, Any]] = [  # a parameter's schema, what a model writes, what it is
    ({"type": "string"}, "~a, b}~", "a, b}"),
    ({"type": "string", "nullable": True}, "null", None),
    ({"enum": ODD}, '~it\'s "so"~', 'it\'s "so"'),
    ({"enum": ODD}, '"<|\\"|>"', '<|"|>'),
    ({"type": ["integer", "null"]}, "-5", -5),
    ({"type": "array", "items": {"type": "string"}}, "[~a~,~b~]", ["a", "b"]),
    ({"type": "array", "items": {"type": "string"}}, "[]", []),
    ({"type": "object"}, "{k:[1,~x~,{}],z:true}", {"k": [1, "x", {}], "z": True}),
    ({}, "{k:{a:null}}", {"k": {"a": None}}),
    ({"type": "object", "properties": {"a": {"type": "string"}, "B": {"type": "integer"}}}, "{a:~x~,B:1}",
     {"a": "x", "B": 1}),
    ({"$ref": "#/$defs/node"}, "{next:{next:null,v:2},v:1}", {"v": 1, "next": {"v": 2, "next": None}}),
    ({"type": "string", "maxLength": 3}, '"a\\"b"', 'a"b'),
]  # fmt: skip


@pytest.mark.parametrize("has_tokens", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("choice", ["auto", "required", "strict"])
def test_a_grammar_takes_values_as_the_template_teaches_them(has_tokens: bool, choice: str) -> None:
    for schema, written, value in WRITTEN:
        parameters = {"type": "object", "properties": {"v": schema, "w": {"type": "integer"}}, **DEFINITIONS}
        tool = {"parameters": parameters, **({"strict": True} if choice == "strict" else {})}
        mode = {"tool_choice": "required"} if choice == "required" else {}
        if choice == "auto" and not has_tokens:  # there is nothing that a grammar could follow
            continue
        box, structure, grammar = forced(has_tokens, {"f": tool}, **mode)
        text = f"<|tool_call>call:f{{v:{written}}}<tool_call|>".replace("~", '<|"|>')
        assert (structure.trigger == "<|tool_call>") == (choice == "auto")
        assert follows(grammar, text.removeprefix(structure.trigger or ""), has_tokens), text
        read = fold(AnswerParser(reading(False, tools=box.schemas, is_strict=choice == "strict")), [text], True)
        assert called(read) == [("f", {"v": value})]


@pytest.mark.parametrize("has_tokens", [True, False], ids=["tokens", "text"])
def test_members_have_commas_between_them_whichever_are_left_out(has_tokens: bool) -> None:
    number = {"type": "integer"}
    for required in itertools.chain(itertools.combinations("abc", 2), [(), ("b",), tuple("abc")]):
        schema = {"type": "object", "properties": dict.fromkeys("cab", number), "required": [*required]}
        _, _, grammar = forced(has_tokens, {"f": {"parameters": schema}}, tool_choice="required")
        for given_keys in itertools.chain(*(itertools.combinations("abc", count) for count in range(4))):
            inner = ",".join(f"{key}:1" for key in given_keys)
            is_valid = set(required) <= set(given_keys)
            assert follows(grammar, f"<|tool_call>call:f{{{inner}}}<tool_call|>", has_tokens) == is_valid, inner
        for broken in (
            "a:1,b:1,c:1,",
            ",a:1,b:1,c:1",
            "a:1b:1c:1",
            "c:1,b:1,a:1",
            "a:1,a:1,b:1,c:1",
            "a:1,b:1,c:1,d:1",
        ):
            assert not follows(grammar, f"<|tool_call>call:f{{{broken}}}<tool_call|>", has_tokens), broken


@pytest.mark.parametrize("has_tokens", [True, False], ids=["tokens", "text"])
def test_strict_calls_are_valid_with_their_mark_and_without_and_text_is_free(has_tokens: bool) -> None:
    """`other` has a name that begins like another tool's, and a schema that the notation has no rules for."""
    number = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 5}}, "required": ["n"]}
    tools = {"f": {"parameters": number, "strict": True}, "foo": {}, "other": {"parameters": {"minProperties": 1}}}
    _, _, grammar = forced(has_tokens, {**tools, "other2": {}})
    for begin in ("", "<|tool_call>", "So:\n", "So:\n<|tool_call>", "call:foo{}\n"):
        for call in ("f{n:5}", "foo{}", 'other{"a": 1}', "other2{}"):
            assert follows(grammar, f"{begin}call:{call}", has_tokens) or (has_tokens and "<|" in begin)
            assert follows(grammar, f"{begin}call:{call}<tool_call|>", has_tokens), (begin, call)
        for call in ("f{n:6}", "f{}", "foo{a:1}", "other{}", "f{n:~5~}".replace("~", '<|"|>')):
            assert not follows(grammar, f"{begin}call:{call}<tool_call|>", has_tokens), (begin, call)
    for text in ("Hello {}", "call:f is a call", "a call:f{}", "call:", "call:x{}", "{n:1}", "f{}"):
        assert follows(grammar, text, has_tokens), text


@pytest.mark.parametrize("has_tokens", [True, False], ids=["tokens", "text"])
def test_what_the_parser_sees_as_a_call_of_strict_tools_is_valid(has_tokens: bool) -> None:
    rng, num_calls = random.Random(3), 0
    likely = ["call:f{", "call:", "<|tool_call>", "\n", " ", "g.h{", 'v:<|"|>', "```", '{"name": "f"']
    for _ in range(30):
        schemas = {name: {**objects(rng, 1), **DEFINITIONS} for name in ("f", "g.h")}
        tools = {name: {"parameters": own, "strict": True} for name, own in schemas.items()}
        box, _, grammar = forced(has_tokens, tools)
        options = reading(has_tokens, tools=box.schemas, is_strict=True, is_guarded=has_tokens)
        for _ in range(6):
            text = walk(grammar, has_tokens, rng, likely)
            if text is None:
                continue
            answer = fold(AnswerParser(options), [text], True)
            assert fold(AnswerParser(options), list(text), True) == answer
            for name, arguments in called(answer):
                jsonschema.validate(arguments, schemas[name])
                num_calls += 1
    assert num_calls > 30


def test_many_tools_with_many_parameters_are_a_grammar() -> None:
    text = {"type": "string"}
    kinds = [text, {"type": "integer"}, {"type": "array", "items": text}, {}, {"enum": ["a"]}]
    parameters = {"type": "object", "properties": {f"p{n}": kinds[n % len(kinds)] for n in range(12)}}
    tools = {f"tool_{number}": {"parameters": parameters, "strict": True} for number in range(40)}
    for has_tokens in (True, False):
        for body in ({}, {"tool_choice": "required"}):
            _, _, grammar = forced(has_tokens, tools, **body)
            call = "<|tool_call>call:tool_39{p0:~x~,p11:1}<tool_call|>".replace("~", '<|"|>')
            assert follows(grammar, call, has_tokens)
