"""How tokens are chosen on the GPU: as on the CPU, from the same logits."""

import json

import pytest
import torch
from gpu_engines import answers, engine_of, finish, prompts
from models import FAMILIES, byte_tokenizer, tiny_model
from test_sampling import sequence

from engine.build import build_engine
from engine.engine import EngineOptions
from engine.sample.grammar import GrammarCompiler
from engine.sample.sampler import Sampler
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

OPTIONS = EngineOptions(max_num_seqs=16, kv_cache_memory=2**26, max_model_len=480)
CPU = torch.device("cpu")
KINDS: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.2},
    {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"temperature": 0.6, "logit_bias": {3: 5.0, 8: -100.0}},
]


@pytest.mark.parametrize("columns", [199, 151_936])
def test_choices_are_those_of_a_cpu(columns: int, device: torch.device) -> None:
    logits = 3 * torch.randn(32 * len(KINDS), columns, generator=torch.Generator().manual_seed(1))
    kinds = [SamplingParams(max_tokens=9, seed=n, **KINDS[n % len(KINDS)]) for n in range(len(logits))]
    rows = [sequence(params, [1, 2, 3], [5, 9, 9]) for params in kinds]
    expected = [token and token.token_id for token in Sampler().choose(logits.clone(), rows).read()]
    chosen = [token and token.token_id for token in Sampler().choose(logits.to(device), rows).read()]
    same = sum(a == b for a, b in zip(expected, chosen, strict=True))
    assert same >= len(rows) - 2, "but for sums that differ in their last bits"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seeded_answer_is_the_same_alone_and_among_others(family: str, device: torch.device) -> None:
    requests, params = prompts(16), {"temperature": 1.0, "top_p": 0.9, "seed": 42}
    [alone] = answers(engine_of(family, torch.float32, device, OPTIONS), requests[:1], **params)
    assert answers(engine_of(family, torch.float32, device, OPTIONS), requests, **params)[0] == alone


def test_scores_are_those_of_a_cpu(device: torch.device) -> None:
    asked = SamplingParams(max_tokens=12, temperature=0.0, num_logprobs=3, num_prompt_logprobs=2, ignore_eos=True)
    found = []
    for place in (CPU, device):
        own = Sequence([5, 7, 11, 13, 17], asked, lambda output: None)
        finish(engine_of("qwen3", torch.float32, place, OPTIONS), [own])
        found.append([token.logprob for token in own.prompt_logprobs] + [float(len(own.output_ids))])
    assert found[1] == pytest.approx(found[0], abs=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_follows_a_grammar_fits_it(temperature: float, device: torch.device) -> None:
    tokenizer = byte_tokenizer()
    model = tiny_model("qwen3", vocab_size=len(tokenizer)).to(device)
    eos = tokenizer.eos_token_id
    compiler = GrammarCompiler(tokenizer.backend_tokenizer.to_str, len(tokenizer), {eos})
    properties = {"n": {"type": "integer"}, "kind": {"enum": ["a", "bc"]}, "on": {"type": "boolean"}}
    schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    engine = build_engine(model, OPTIONS, frozenset({eos}))
    grammar = compiler.compile(f"start: %json {json.dumps(schema)}")
    asked = [
        Sequence([72, seed], SamplingParams(max_tokens=400, temperature=temperature, grammar=grammar, seed=seed), print)
        for seed in range(1, 9)
    ]
    finish(engine, asked)
    texts = [str(tokenizer.decode(own.output_ids, skip_special_tokens=True)) for own in asked]
    complete = [text for text, own in zip(texts, asked, strict=True) if own.num_output_tokens < 400]
    assert len(complete) >= 4
    for text in complete:
        value = json.loads(text)
        assert isinstance(value["n"], int) and value["kind"] in ("a", "bc") and isinstance(value["on"], bool)
