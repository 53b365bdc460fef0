"""Perplexity: how much accuracy each choice of QUANTIZATION and KV_CACHE_DTYPE costs, on text from the pinned packages.

    python -m bench.perplexity DIRECTORY [--choices auto,none,int8,int4] [--caches auto,int8]

The engine itself scores the text, in windows of the same tokens for every choice. A lower perplexity is better.
"""

import argparse
import gc
import itertools
import json
import math
import time
from dataclasses import asdict, dataclass
from importlib.metadata import distribution
from pathlib import Path

from transformers import AutoTokenizer

from engine.build import ModelDefaults, load_engine
from engine.checked_model import check_model
from engine.engine import Engine, EngineOptions
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

PACKAGES = ("transformers", "fastapi", "httpx2", "pydantic", "accelerate")  # their descriptions: English, some code
SOURCES = ("gguf/quants.py", "gguf/lazy.py")  # of the package gguf: code


@dataclass(frozen=True)
class Perplexity:
    choice: str
    cache: str  # KV_CACHE_DTYPE
    perplexity: float
    ratio: float  # to the first choice
    num_tokens: int
    seconds: float


def text() -> str:
    descriptions = [(distribution(name).read_text("METADATA") or "").partition("\n\n")[2] for name in PACKAGES]
    sources = [Path(str(distribution("gguf").locate_file(name))).read_text(encoding="utf-8") for name in SOURCES]
    return "\n".join([*descriptions, *sources])


def windows(directory: Path, length: int, count: int) -> list[list[int]]:
    """Returns up to `count` windows of `length` token ids, spread evenly over the text."""
    token_ids: list[int] = AutoTokenizer.from_pretrained(directory)(text()).input_ids
    stride = max(1, (len(token_ids) - length) // max(1, count - 1))
    return [token_ids[start : start + length] for start in range(0, len(token_ids) - length + 1, stride)][:count]


def score(engine: Engine, window: list[int]) -> list[float]:
    """Returns the log-probability of each token except the first."""
    params = SamplingParams(max_tokens=1, temperature=0.0, num_prompt_logprobs=0)
    sequence = Sequence(window, params, on_output=lambda output: None)
    engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    return [token.logprob or 0.0 for token in sequence.prompt_logprobs]


def measure(directory: Path, choice: str, cache: str, texts: list[list[int]], first: float | None) -> Perplexity:
    options = EngineOptions(quantization=choice, device_map="cpu", kv_cache_dtype=cache)
    checked = check_model(directory, options.dtype, options.device_map)
    engine, _ = load_engine(checked, options, ModelDefaults, lambda what, fraction: None)
    start = time.perf_counter()
    logprobs = [logprob for window in texts for logprob in score(engine, window)]
    perplexity = math.exp(-sum(logprobs) / len(logprobs))
    seconds = time.perf_counter() - start
    return Perplexity(choice, cache, perplexity, perplexity / (first or perplexity), len(logprobs), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="of the model: safetensors, config.json, tokenizer")
    parser.add_argument("--choices", default="none,auto,int8,int4", help="the first one is what others are compared to")
    parser.add_argument("--caches", default="auto", help="of KV_CACHE_DTYPE")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    texts = windows(arguments.directory, arguments.length, arguments.windows)
    results: list[Perplexity] = []
    print("choice      cache  perplexity   ratio  tokens  seconds")
    for choice, cache in itertools.product(arguments.choices.split(","), arguments.caches.split(",")):
        first = results[0].perplexity if results else None
        results.append(measure(arguments.directory, choice, cache, texts, first))
        gc.collect()
        r = results[-1]
        numbers = f"{r.perplexity:10.4f}  {r.ratio:6.4f}  {r.num_tokens:6}  {r.seconds:7.1f}"
        print(f"{r.choice:10}  {r.cache:5}  {numbers}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


if __name__ == "__main__":
    main()
