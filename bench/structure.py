"""Structure: how much longer a step of sixteen answers takes with a grammar.

    python -m bench.structure DIRECTORY

Steps without a grammar and with one take turns, over the same prompts: a nested JSON schema in every answer, and tools
that may be called, whose grammar waits for the mark of a call.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from engine.build import ModelDefaults, load_engine
from engine.checked_model import check_model
from engine.constraint import Constraint
from engine.engine import Engine, EngineOptions
from engine.sample.grammar import GrammarCompiler, TriggeredGrammar
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from serving.loading import load_template
from text.structured_output import KINDS
from text.tool_calls.json_calls import MARKED
from text.tool_calls.lark import Literals

BATCH, NUM_STEPS, ROUNDS = 16, 50, 3
TEXT = {"type": "string"}
PERSON = {"name": TEXT, "age": {"type": "integer"}, "email": TEXT, "tags": {"type": "array", "items": TEXT}}
LIST = {"type": "array", "items": {"type": "object", "properties": PERSON, "required": list(PERSON)}, "minItems": 30}
SCHEMA = {"type": "object", "properties": {"items": LIST}, "required": ["items"], "additionalProperties": False}


def step_time(engine: Engine, prompt: list[int], constraint: Constraint | None) -> float:
    """Returns the median time of a step in ms, once all answers are decoding."""
    rng = random.Random(1)
    params = [
        SamplingParams(NUM_STEPS + 9, 0.8, seed=seed, ignore_eos=True, grammar=constraint) for seed in range(BATCH)
    ]
    sequences = [Sequence([*prompt, rng.randrange(1000, 9000)], each, lambda output: None) for each in params]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while any(sequence.num_output_tokens < 3 for sequence in sequences):
        engine.step()
    times: list[float] = []
    while len(times) < NUM_STEPS and len(engine.scheduler.running) == BATCH:
        begin = time.perf_counter()
        engine.step()
        times.append(1000 * (time.perf_counter() - begin))
    for sequence in sequences:
        engine.scheduler.remove(sequence)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    options = EngineOptions(quantization="auto", num_speculative_tokens=0)
    checked = check_model(directory, options.dtype, options.device_map)
    engine, _ = load_engine(checked, options, ModelDefaults, lambda what, fraction: None)
    tokenizer = load_template(directory, json.loads((directory / "config.json").read_text())["model_type"]).tokenizer
    ends = {tokenizer.eos_token_id}
    compiler = GrammarCompiler(tokenizer.backend_tokenizer.to_str, engine.num_embeddings, ends)
    call = MARKED.rest_of_call_grammar({"people": SCHEMA}, Literals([]))
    mark = tokenizer.get_vocab().get(MARKED.begin, 0)
    constraints: dict[str, Constraint] = {
        "schema": compiler.compile(KINDS["json"].grammar(SCHEMA)),
        "tools": TriggeredGrammar(compiler.compile(KINDS["grammar"].grammar(call)), mark, is_repeated=True),
    }
    prompt = tokenizer("List people as JSON:\n").input_ids
    for _ in range(ROUNDS):
        free = step_time(engine, prompt, None)
        others = {name: step_time(engine, prompt, constraint) for name, constraint in constraints.items()}
        ratios = ", ".join(f"{name} {value:.1f} ms ({value / free:.2f})" for name, value in others.items())
        print(f"{BATCH} answers: free {free:.1f} ms, {ratios}", flush=True)


if __name__ == "__main__":
    main()
