"""KVCache: steps at long contexts with each choice of KV_CACHE_DTYPE, which take turns, step by step.

    python -m bench.kv_cache DIRECTORY [--contexts 1024,4096,8192] [--sequences 1,4]

Prints a line of JSON for each workload: the milliseconds of a step of the whole model, and the ratio of int8 to auto. A
step is a decode of each sequence, or a chunk of 512 tokens of one prompt. Times are medians of one thread's processor
time, which other work on the machine disturbs least. The cache is filled with random numbers, as computing the
contexts would take minutes.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from engine.batch import Batch, Span
from engine.build import ModelDefaults, load_engine
from engine.checked_model import check_model
from engine.engine import Engine, EngineOptions
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

CACHES = ("auto", "int8")
CHUNK = 512  # tokens
NUM_STEPS = {1: 80, CHUNK: 4}  # of each cache, by the tokens of a sequence


def load(directory: Path, cache: str, memory: int) -> Engine:
    options = EngineOptions(quantization="auto", device_map="cpu", kv_cache_dtype=cache, kv_cache_memory=memory)
    checked = check_model(directory, options.dtype, options.device_map)
    engine, _ = load_engine(checked, options, ModelDefaults, lambda what, fraction: None)
    for tensors in engine.scheduler.cache.tensors.values():
        for tensor in tensors:
            if tensor.dtype == torch.int8:
                tensor.random_(-127, 128)
            else:
                tensor.normal_(std=0.01 if len(tensors) > 2 else 1)
    return engine


def batch_of(engine: Engine, context: int, count: int, chunk: int) -> Batch:
    """Returns a step of `count` sequences, each with `context` computed tokens; chunk: tokens of each to compute."""
    spans = []
    for _ in range(count):
        params = SamplingParams(max_tokens=2, temperature=0.0)
        sequence = Sequence([1] * (context + chunk), params, on_output=lambda output: None)
        assert engine.scheduler.cache.allocate(sequence, sequence.num_tokens), "raise --memory"
        engine.scheduler.cache.advance(sequence, context)
        spans.append(Span(sequence, context, chunk))
    return Batch(tuple(spans))


def seconds(engine: Engine, batch: Batch) -> float:
    assert isinstance(engine.runner, ModelRunner)
    start = time.process_time()
    engine.runner.run(batch)
    return time.process_time() - start


def compare(engines: dict[str, Engine], context: int, count: int, chunk: int) -> dict[str, object]:
    batches = {name: batch_of(engine, context, count, chunk) for name, engine in engines.items()}
    taken: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(NUM_STEPS[chunk]):
        for name, engine in engines.items():
            taken[name].append(seconds(engine, batches[name]))
    for name, batch in batches.items():
        for span in batch.spans:
            engines[name].scheduler.cache.free(span.sequence)
    times = {name: 1000 * statistics.median(values) for name, values in taken.items()}
    ratio = round(times["int8"] / times["auto"], 3)
    rounded = {name: round(value, 2) for name, value in times.items()}
    return {"context": context, "sequences": count, "tokens": chunk, "milliseconds": rounded, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="of the model: safetensors, config.json, tokenizer")
    parser.add_argument("--contexts", default="1024,4096,8192")
    parser.add_argument("--sequences", default="1,4", help="decodes in a step")
    parser.add_argument("--memory", type=int, default=2**30, help="bytes of each cache")
    arguments = parser.parse_args()
    engines = {cache: load(arguments.directory, cache, arguments.memory) for cache in CACHES}
    torch.set_num_threads(1)
    for context in map(int, arguments.contexts.split(",")):
        for count in map(int, arguments.sequences.split(",")):
            print(json.dumps(compare(engines, context, count, chunk=1)), flush=True)
        print(json.dumps(compare(engines, context, 1, CHUNK)), flush=True)


if __name__ == "__main__":
    main()
