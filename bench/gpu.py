"""GPU: decode with models in true shapes and random weights, against what the device's memory allows.

    python -m bench.gpu [--models qwen3-0.6b,qwen3-8b,gemma-3-27b]

A step of one stream has to read all weights once, so the memory's bandwidth over their size is the most tokens per
second that there can be. Beside the engine: transformers' `generate`, and its continuous batching. The engine's greedy
tokens are checked against the stock model's logits.
"""

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from bench import machine
from bench.run import RESULTS
from engine import attention
from engine.engine import EngineOptions, build_engine
from engine.sampling import SamplingParams
from engine.sequence import Sequence

STREAMS = (1, 64)
PROMPT_TOKENS = 64
NEW_TOKENS = 128
NUM_CHECKED = 32  # tokens of each of a few prompts
CONTEXT = 4096

_QWEN3: dict[str, Any] = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 1e6}
SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {  # the models' config.json on the Hub
    "qwen3-0.6b": lambda: Qwen3Config(
        **_QWEN3,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": lambda: Qwen3Config(
        **_QWEN3,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    "gemma-3-27b": lambda: Gemma3TextConfig(
        vocab_size=262208,
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        query_pre_attn_scalar=168,
        sliding_window=1024,
        max_position_embeddings=131072,
    ),
    "tiny": lambda: Qwen3Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    ),
}


@dataclass(frozen=True)
class Decode:
    """Tokens per second, all streams together."""

    streams: int
    engine: float
    generate: float
    continuous_batching: float | str  # or why there is none
    share_of_limit: float | None  # of one stream


@dataclass(frozen=True)
class Result:
    model: str
    weight_gib: float  # that a token reads
    bandwidth_gb_per_s: float  # copied, reading and writing counted
    limit_tokens_per_s: float
    same_tokens: float  # share of the engine's tokens that are the stock model's first choice
    largest_difference: float  # of the others: how far below it, in standard deviations of the logits
    decodes: list[Decode]


def bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second of a copy within the device's memory."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [_seconds(lambda: target.copy_(source), device) for _ in range(10)]
    return 2 * num_bytes / statistics.median(times)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(name: str, device: torch.device) -> Any:
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(
            SHAPES[name](), dtype=torch.bfloat16, attn_implementation=attention.NAME
        ).eval()


def num_bytes_read(model: Any) -> int:
    """Of all weights but an embedding that is not the output layer too: of that, a token reads one row."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total: int = sum(parameter.nbytes for parameter in model.parameters())
    return total if embedding is head else total - int(embedding.nbytes)


def prompts_of(model: Any, count: int) -> list[list[int]]:
    rng, vocabulary = random.Random(count), model.config.get_text_config().vocab_size
    return [[rng.randrange(vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def engine_rate(model: Any, device: torch.device, count: int) -> tuple[float, list[list[int]]]:
    """Tokens per second of decoding, and the tokens."""
    options = EngineOptions(max_model_len=CONTEXT, max_num_seqs=max(count, 2), num_speculative_tokens=0)
    engine = build_engine(model, options, frozenset())
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    sequences = [Sequence(prompt, params, sink=lambda output: None) for prompt in prompts_of(model, count)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while any(sequence.num_output_tokens < 4 for sequence in sequences):
        engine.step()
    before = sum(sequence.num_output_tokens for sequence in sequences)

    def finish() -> None:
        while engine.scheduler.has_work:
            engine.step()

    seconds = _seconds(finish, device)
    return (count * NEW_TOKENS - before) / seconds, [sequence.output_ids for sequence in sequences]


def generate_rate(model: Any, device: torch.device, count: int) -> float:
    inputs = torch.tensor(prompts_of(model, count), device=device)
    config = _greedy(NEW_TOKENS)
    model.generate(inputs, generation_config=_greedy(4))
    seconds = _seconds(lambda: model.generate(inputs, generation_config=config), device)
    return count * NEW_TOKENS / seconds


def continuous_batching_rate(model: Any, device: torch.device, count: int) -> float | str:
    try:
        config = _greedy(NEW_TOKENS)
        model.generate_batch(inputs=prompts_of(model, count), generation_config=_greedy(4))
        answers: dict[str, Any] = {}
        seconds = _seconds(lambda: answers.update(model.generate_batch(prompts_of(model, count), config)), device)
        return sum(len(answer.generated_tokens) for answer in answers.values()) / seconds
    except Exception as error:  # it needs a GPU, and a version that has it
        return f"{type(error).__name__}: {error}".splitlines()[0]


def _greedy(count: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )


@torch.inference_mode()
def compare(model: Any, device: torch.device, answers: list[list[int]]) -> tuple[float, float]:
    """The share of tokens that the stock model prefers, and by how much it prefers another for the rest."""
    same, largest = [], 0.0
    for prompt, answer in list(zip(prompts_of(model, len(answers)), answers, strict=True))[:4]:
        tokens = torch.tensor([prompt + answer[:NUM_CHECKED]], device=device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        own = logits.gather(-1, tokens[0, len(prompt) :, None])[:, 0]
        short = (logits.amax(-1) - own) / logits.std(-1)
        same += (short == 0).tolist()
        largest = max(largest, float(short.max()))
    return sum(same) / len(same), largest


def measure(name: str, device: torch.device) -> Result:
    speed = bandwidth(device, 2**32 if device.type == "cuda" else 2**28)
    model = build(name, device)
    weights = num_bytes_read(model)
    rates: dict[int, float] = {}
    answers: list[list[int]] = []
    for count in STREAMS:
        rates[count], answers = engine_rate(model, device, count)
        gc.collect()
    model.set_attn_implementation("sdpa")
    same, largest = compare(model, device, answers)
    limit = speed / weights
    decodes = [
        Decode(
            count,
            rates[count],
            generate_rate(model, device, count),
            continuous_batching_rate(model, device, count),
            rates[count] / limit if count == 1 else None,
        )
        for count in STREAMS
    ]
    return Result(name, weights / 2**30, speed / 1e9, limit, same, largest, decodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="qwen3-0.6b,qwen3-8b,gemma-3-27b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--save", action="store_true", help="into bench/results")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    results = []
    for name in arguments.models.split(","):
        results.append(asdict(measure(name, device)))
        print(json.dumps(results[-1], indent=1), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if arguments.save:
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        described = {"device": gpu, **machine.describe()}
        path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-gpu-{machine.slug(gpu)}.json"
        path.write_text(json.dumps({"machine": described, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
