"""What follows a grammar fits it, on every model and at every temperature, and is the same as the unconstrained
answer wherever that fits."""

import json
import random
from collections.abc import Sequence as Rows
from typing import Any

import jsonschema
import pytest
import torch
from models import FAMILIES, byte_tokenizer
from transformers import PreTrainedModel

from engine import memory
from engine.attention import paged
from engine.build import build_engine
from engine.constraint import Matcher
from engine.cpu import kernels, sampling_kernels
from engine.engine import Engine, EngineOptions
from engine.sample import grammar, masks
from engine.sample.grammar import GrammarCompiler
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from text import structured_output

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
COMPILER = GrammarCompiler(TOKENIZER.backend_tokenizer.to_str, len(TOKENIZER), {EOS})


def model_of(family: str) -> PreTrainedModel:
    model_class, config = FAMILIES[family]
    torch.manual_seed(0)
    own = type(config)(**{**config.to_dict(), "vocab_size": len(TOKENIZER)})
    return model_class._from_config(own, attn_implementation=paged.NAME).eval()


def engine_of(family: str, **options: Any) -> Engine:
    return build_engine(model_of(family), EngineOptions(**{"max_model_len": 480, **options}), frozenset({EOS}))


def finish(engine: Engine, sequences: Rows[Sequence]) -> list[tuple[str, bool]]:
    """Texts, and whether they are complete."""
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    assert engine.num_used_blocks == 0
    return [
        (
            str(TOKENIZER.decode(s.output_ids, skip_special_tokens=True)),
            s.num_output_tokens < s.params.max_tokens or bool(s.matcher and s.matcher.is_finished),
        )
        for s in sequences
    ]


def asking(text: str, **params: Any) -> Sequence:
    own = SamplingParams(**{"max_tokens": 300, "grammar": COMPILER.compile(text), **params})
    return Sequence([72, 105], own, on_output=lambda output: None)


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const"]
    kind = rng.choice(kinds if depth > 2 else [*kinds, "object", "object", "array", "anyOf"])
    if kind == "string":
        return {"type": "string", **rng.choice([{"maxLength": 9}, {"pattern": "^[a-c]{1,4}$"}, {"format": "date"}])}
    if kind in ("integer", "number"):
        return {"type": kind, **rng.choice([{}, {"minimum": 3, "maximum": 88}, {"exclusiveMinimum": -5}])}
    if kind == "enum":
        return {"enum": rng.sample(["red", 'a"b', 5, None, True, "ü世"], 3)}
    if kind == "const":
        return {"const": rng.choice(["x", 7, False])}
    if kind == "object":
        names = rng.sample(["a", "b c", "ü", "kind", "d"], rng.randrange(1, 4))
        properties = {name: random_schema(rng, depth + 1) for name in names}
        required = rng.sample(names, rng.randrange(len(names) + 1))
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": rng.randrange(2), "maxItems": 3}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    return {"type": kind}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_complete_answer_is_valid(family: str) -> None:
    engine, rng, complete = engine_of(family, num_speculative_tokens=0), random.Random(1), 0
    schemas = [random_schema(rng) for _ in range(30)]
    sequences = [
        asking(structured_output._of_json(schema), temperature=rng.choice([0.0, 1.0, 2.0]), seed=number)
        for number, schema in enumerate(schemas)
    ]
    for schema, (text, is_complete) in zip(schemas, finish(engine, sequences), strict=True):
        if is_complete:
            complete += 1
            jsonschema.validate(json.loads(text), schema)
    assert complete > 20


@pytest.mark.thinned(2)
@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_guesses_change_no_structured_answer(family: str) -> None:
    schema = {"type": "array", "items": {"enum": ["same", "same again"]}, "minItems": 12, "maxItems": 12}
    text = structured_output._of_json(schema)
    results, steps = [], []
    for count in (0, 6):
        engine = engine_of(family, num_speculative_tokens=count)
        sequences = [asking(text, temperature=temperature, seed=3) for temperature in (0.0, 0.8)]
        for sequence in sequences:
            engine.scheduler.add(sequence)
        steps.append(0)
        while engine.scheduler.has_work:
            engine.step()
            steps[-1] += 1
        results.append([sequence.token_ids for sequence in sequences])
    assert results[0] == results[1] and steps[1] < steps[0]


def test_streams_with_and_without_a_grammar_share_a_batch() -> None:
    plain = [SamplingParams(max_tokens=30, temperature=1.0, seed=seed) for seed in range(4)]
    alone = finish(engine_of("llama"), [Sequence([5, 6], own, lambda output: None) for own in plain])
    mixed = [Sequence([5, 6], own, lambda output: None) for own in plain]
    choice = asking(structured_output._of_choice(["yes", "no"]), temperature=2.0, seed=1)
    together = finish(engine_of("llama"), [choice, *mixed])
    assert together[1:] == alone and together[0][0] in ("yes", "no")


@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("regex", r"[0-9]{3}-[a-f]+x", r"[0-9]{3}-[a-f]+x"),
        ("choice", ["red", 'bl"ue', "世界"], r'red|bl"ue|世界'),
        ("grammar", 'start: "a" ("b" | "c") NUMBER\nNUMBER: /[0-9]{2}/', r"a[bc][0-9]{2}"),
        ("grammar", 'root ::= "x" item\nitem ::= [0-9] [0-9]', r"x[0-9][0-9]"),
    ],
)
def test_other_structures_hold_too(kind: str, value: Any, pattern: str) -> None:
    import re

    text = structured_output.KINDS[kind].grammar(value)
    for number, (answer, is_complete) in enumerate(
        finish(engine_of("qwen2"), [asking(text, temperature=1.5, seed=seed) for seed in range(6)])
    ):
        assert re.fullmatch(pattern, answer) or not is_complete, number


def test_an_answer_ends_where_nothing_can_follow() -> None:
    engine = engine_of("llama")
    sequence = asking(structured_output._of_choice(["done"]), ignore_eos=True, min_tokens=50)
    engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    assert TOKENIZER.decode(sequence.output_ids) == "done"


def test_preempted_answers_go_on_where_they_were() -> None:
    text = structured_output._of_json({"type": "string", "minLength": 60, "maxLength": 60})
    alone = finish(engine_of("llama"), [asking(text, temperature=0.9, seed=seed) for seed in range(3)])
    small = engine_of("llama", kv_cache_memory=10 * 16 * 2 * 3 * 2 * 12 * 4, kv_block_size=16, max_model_len=100)
    together = finish(small, [asking(text, temperature=0.9, seed=seed) for seed in range(3)])
    assert together == alone and small.scheduler.num_preemptions > 0


BAD = {
    "remote": {"$ref": "http://127.0.0.1:1/x.json"},
    "file": {"$ref": "file:///etc/passwd"},
    "unresolvable": {"$ref": "#/$defs/none"},
    "endless": {"$ref": "#"},
    "endless pair": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "type": {"type": "foo"},
    "pattern": {"type": "string", "pattern": "(["},
    "not": {"not": {"type": "string"}},
    "nothing": {"enum": []},
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.timeout(5)
def test_hostile_schemas_are_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError):
        COMPILER.compile(structured_output._of_json(BAD[name]))


@pytest.mark.parametrize(
    ("pattern", "what", "place"),
    [
        ("a([", "unclosed character class", "at character 3: '['"),
        ("(?=a)b", "look-around, including look-ahead and look-behind, is not supported", "at character 1: '(?='"),
        (r"x\1(a)", "backreferences are not supported", r"at character 2: '\\1'"),
        ("  世(", "unclosed group", "at character 4: '('"),
    ],
)
@pytest.mark.parametrize("kind", ["json", "regex", "grammar"])
def test_a_pattern_that_cannot_be_read_is_told_with_its_reason_and_place(
    kind: str, pattern: str, what: str, place: str
) -> None:
    schema = {"properties": {"x": {"pattern": pattern}}}
    value = {"json": schema, "regex": pattern, "grammar": f"start: /{pattern}/"}[kind]
    with pytest.raises(ValueError) as refusal:
        COMPILER.compile(structured_output.KINDS[kind].grammar(value))
    assert str(refusal.value) == f"the regular expression is invalid: {what}, {place}"


HUGE = {
    "a count": {"type": "string", "minLength": 10**9},
    "items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**7},
    "repetitions": {"type": "string", "pattern": "(a{1,10000}){1,10000}"},
    "catastrophic": {"type": "string", "pattern": "^(a+)+$"},
    "many": {"enum": [str(number) for number in range(20_000)]},
    "wide": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}},
    "nested": json.loads('{"anyOf":[' * 40 + '{"type":"string"}' + "]}" * 40),
}


@pytest.mark.parametrize("name", HUGE)
@pytest.mark.timeout(5)
def test_huge_schemas_are_refused_or_followed_at_once(name: str) -> None:
    try:
        matcher = COMPILER.compile(structured_output._of_json(HUGE[name])).matcher()
    except ValueError:
        return
    for _ in range(20):
        mask = matcher.mask([])
        assert mask is not None and any(mask)
        token = next(i for i in range(len(TOKENIZER)) if mask[i // 8] >> i % 8 & 1)
        matcher.accept(token)
        if matcher.is_finished:
            break


def test_compiled_grammars_are_kept_within_bounds() -> None:
    compiler = GrammarCompiler(TOKENIZER.backend_tokenizer.to_str, len(TOKENIZER), {EOS})
    texts = [structured_output._of_choice([str(number)]) for number in range(grammar.MAX_KEPT + 9)]
    first = compiler.compile(texts[0])
    assert compiler.compile(texts[0]) is first
    for text in texts:
        compiler.compile(text)
    assert compiler.compile(texts[-1]) is compiler.compile(texts[-1]) and compiler.compile(texts[0]) is not first


@pytest.mark.skipif(not memory.IS_COUNTED, reason="only GNU's C library counts what is in use")
def test_large_grammars_are_kept_within_bounds_also_where_they_take_memory_that_was_freed() -> None:
    compiler = GrammarCompiler(TOKENIZER.backend_tokenizer.to_str, len(TOKENIZER), {EOS})
    freed = [bytearray(100_000) for _ in range(2000)]
    pinned = bytearray(100_000)
    del freed
    before = memory.allocated()
    for number in range(12):  # of 12 MiB each
        compiler.compile(structured_output._of_choice([f"choice {number} of {other}" for other in range(10_000)]))
    assert memory.allocated() - before < 1.5 * grammar.MAX_MEMORY
    del pinned


@pytest.mark.skipif(not memory.IS_COUNTED, reason="only GNU's C library counts what is in use")
def test_a_grammar_too_large_to_keep_leaves_the_others() -> None:
    compiler = GrammarCompiler(TOKENIZER.backend_tokenizer.to_str, len(TOKENIZER), {EOS})
    first = compiler.compile(structured_output._of_choice(["a"]))
    large = structured_output._of_json({"enum": ["x" * 100_000]})
    assert compiler.compile(large) is not compiler.compile(large)
    assert compiler.compile(structured_output._of_choice(["a"])) is first


@pytest.mark.parametrize("vocabulary", [259, 33, 64, 4099])
@pytest.mark.usefixtures("threads")
def test_a_mask_forbids_exactly_the_others(vocabulary: int) -> None:
    rng = random.Random(vocabulary)
    logits = torch.randn(5, vocabulary)
    rows = torch.tensor([3, 0])
    words = -(-vocabulary // 32) + 1
    bits = torch.tensor([[rng.randrange(-(2**31), 2**31) for _ in range(words)] for _ in rows], dtype=torch.int32)
    expected = logits.clone()
    for place, row in enumerate(rows.tolist()):
        for token in range(vocabulary):
            if not bits[place, token // 32] >> (token % 32) & 1:
                expected[row, token] = -torch.inf
    wide = logits.double()
    masks.forbid(wide, rows, bits)  # not the kernel's type
    assert torch.equal(wide.float(), expected)
    if kernels.are_available():
        sampling_kernels.forbid(logits, rows, bits)
        assert torch.equal(logits, expected)


def test_masks_ahead_do_not_change_where_an_answer_is() -> None:
    matcher: Matcher = COMPILER.compile(structured_output._of_choice(["abc", "abd"])).matcher()
    ids = TOKENIZER("abcd", add_special_tokens=False).input_ids
    before = matcher.mask([])
    assert matcher.mask(ids[:2]) not in (None, before) and matcher.mask(ids[1:2]) is None
    assert matcher.mask([]) == before and matcher.num_accepted == 0
