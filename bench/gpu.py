"""GPU: models in true shapes with random weights, compared with the limits of the device's memory and matrix units.

    python -m bench.gpu [--models qwen3-0.6b,qwen3-8b,gemma-3-27b] [--quantization none,int4] [--out DIRECTORY]

A step of one stream has to read all weights once, so the limit in tokens per second is the memory's bandwidth over
their size. The engine is also compared with transformers' `generate` and its continuous batching, and its greedy tokens
are checked against the stock model's logits. --quantization: with packed weights of random codes, see packed_model.py.
Figures are written after each part, so that it can be stopped at any time; a part that fails has its error in their
place.
"""

import argparse
import gc
import itertools
import json
import logging
import random
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from bench import machine, packed_model
from bench.run import RESULTS
from engine.async_runner import AsyncRunner
from engine.attention import paged
from engine.build import build_engine, warm_up
from engine.engine import Engine, EngineOptions
from engine.layer_probe import probe_layers
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from errors import first_line

STREAMS = (1, 64)
PROMPT_TOKENS = 64
NEW_TOKENS = 128
NUM_CHECKED = 32  # tokens of each answer that are checked
LONG_PROMPT = 8000
CONTEXT = 8448
PROFILED = 8  # steps
NUM_GENERATED = 32  # tokens that transformers generates: fewer, as it is slower
PART_SECONDS = 100
PLAIN = "none"  # of --quantization: weights in bfloat16

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


def bandwidth(device: torch.device, num_bytes: int) -> float:
    """Returns the bytes per second of a copy within the device's memory."""
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


def build(name: str, device: torch.device, quantization: str = PLAIN) -> Any:
    """Returns a model in bfloat16. quantization: of bench/packed_model.py, or "none"."""
    torch.manual_seed(0)
    if quantization != PLAIN:
        return packed_model.build(SHAPES[name](), quantization, device)
    with device:
        return AutoModelForCausalLM.from_config(
            SHAPES[name](), dtype=torch.bfloat16, attn_implementation=paged.NAME
        ).eval()


def num_bytes_read(model: Any) -> int:
    """Returns the bytes of weights that a token reads: all but an embedding that is not the output layer too."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    total: int = sum(parameter.nbytes for parameter in model.parameters()) + packed_model.num_bytes_of(model)
    return total if embedding is head else total - int(embedding.nbytes)


def prompts_of(model: Any, count: int) -> list[list[int]]:
    rng, vocabulary = random.Random(count), model.config.get_text_config().vocab_size
    return [[rng.randrange(vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def engine_of(model: Any) -> Engine:
    """Builds an engine whose cache has room for the streams and the long prompt."""
    room = LONG_PROMPT + max(STREAMS) * (PROMPT_TOKENS + NEW_TOKENS + 64)
    memory = room * probe_layers(model).bytes_per_token
    options = EngineOptions(
        max_model_len=CONTEXT, max_num_seqs=max(STREAMS), num_speculative_tokens=0, kv_cache_memory=memory
    )
    return build_engine(model, options, frozenset())


def engine_rate(engine: Engine, model: Any, device: torch.device, count: int) -> tuple[float, list[list[int]]]:
    """Returns the tokens per second of decoding, and the tokens."""
    sequences = _decoding(engine, prompts_of(model, count))
    before = sum(sequence.num_output_tokens for sequence in sequences)
    seconds = _seconds(lambda: _finish(engine), device)
    return (count * NEW_TOKENS - before) / seconds, [sequence.output_ids for sequence in sequences]


def _decoding(engine: Engine, prompts: list[list[int]]) -> list[Sequence]:
    """Computes the prompts and a few tokens of each answer; returns the sequences."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    sequences = [Sequence(prompt, params, on_output=lambda output: None) for prompt in prompts]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while any(sequence.num_output_tokens < 4 for sequence in sequences):
        engine.step()
    return sequences


def _finish(engine: Engine) -> None:
    while engine.scheduler.has_work:
        engine.step()


def _prefill(engine: Engine, model: Any, seed: int) -> None:
    """Computes a long prompt that is not cached, and its first token."""
    rng, vocabulary = random.Random(seed), model.config.get_text_config().vocab_size
    prompt = [rng.randrange(vocabulary) for _ in range(LONG_PROMPT)]
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    engine.scheduler.add(Sequence(prompt, params, on_output=lambda output: None))
    _finish(engine)


def prefill_flops(model: Any) -> float:
    """Returns the operations of the long prompt: two for each layer weight and token, and those of attention."""
    text = model.config.get_text_config()
    layers = [module for name, module in model.named_modules() if ".layers." in name]
    weights = sum(layer.in_features * layer.out_features for layer in layers if hasattr(layer, "in_features"))
    flops: float = 2.0 * weights * LONG_PROMPT
    for layer in range(text.num_hidden_layers):
        types = getattr(text, "layer_types", None) or []
        is_sliding = bool(types) and types[layer] == "sliding_attention"
        seen = min(LONG_PROMPT / 2, text.sliding_window) if is_sliding else LONG_PROMPT / 2
        flops += 4.0 * LONG_PROMPT * seen * text.num_attention_heads * text.head_dim
    return flops


def matrix_peak(device: torch.device, size: int) -> float:
    """Returns the FLOP/s of a square matrix product of random numbers in bfloat16."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    times = [_seconds(lambda: a @ b, device) for _ in range(10)]
    return 2.0 * size * size * size / statistics.median(times)


def profile_of(work: Callable[[], Any], device: torch.device) -> str:
    """Returns torch's table of the slowest operations."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        work()
        _wait(device)
    averages = recorded.key_averages()
    kind = "device" if device.type == "cuda" else "cpu"
    tables = [averages.table(sort_by=f"self_{name}_time_total", row_limit=30) for name in dict.fromkeys((kind, "cpu"))]
    return "\n".join(tables)


def generate_rate(model: Any, device: torch.device, count: int) -> float:
    inputs = torch.tensor(prompts_of(model, count), device=device)
    config = _greedy(NUM_GENERATED)
    model.generate(inputs, generation_config=_greedy(4), attention_mask=torch.ones_like(inputs))
    mask = torch.ones_like(inputs)  # else tokens with id 0 would count as padding
    seconds = _seconds(lambda: model.generate(inputs, generation_config=config, attention_mask=mask), device)
    return count * NUM_GENERATED / seconds


def continuous_batching_rate(model: Any, device: torch.device, count: int) -> float:
    """Returns the tokens per second of transformers' continuous batching, which needs a GPU and a recent version."""
    config = _greedy(NEW_TOKENS)
    model.generate_batch(inputs=prompts_of(model, count), generation_config=_greedy(4))
    answers: dict[str, Any] = {}
    seconds = _seconds(lambda: answers.update(model.generate_batch(prompts_of(model, count), config)), device)
    return float(sum(len(answer.generated_tokens) for answer in answers.values()) / seconds)


def _greedy(count: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )


@torch.inference_mode()
def compare(model: Any, device: torch.device, answers: list[list[int]]) -> tuple[float, float]:
    """Returns the share of tokens that the stock model prefers, and how far the worst one is from its best."""
    same, largest = [], 0.0
    for prompt, answer in list(zip(prompts_of(model, len(answers)), answers, strict=True))[:4]:
        tokens = torch.tensor([prompt + answer[:NUM_CHECKED]], device=device)
        logits = model(input_ids=tokens, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        own = logits.gather(-1, tokens[0, len(prompt) :, None])[:, 0]
        short = (logits.amax(-1) - own) / logits.std(-1)
        same += (short == 0).tolist()
        largest = max(largest, float(short.max()))
    return sum(same) / len(same), largest


class OutOfTime(BaseException):
    """Ends a part, also where an engine would take an Exception for a failed step and try it again."""


class Report:
    """One model's figures, in a file that is written after each part."""

    def __init__(self, path: Path, name: str, device: torch.device) -> None:
        self._path, self._name = path, name
        self.figures: dict[str, Any] = {}
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        time_now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        self._described = {"device": gpu, "time": time_now, **machine.describe(), "triton": triton_version()}

    def note(self, **figures: Any) -> None:
        rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in figures.items()}
        self.figures |= rounded
        print(self._name, json.dumps(rounded), flush=True)
        known = json.loads(self._path.read_text()) if self._path.exists() else {"machine": self._described}
        known.setdefault("results", {})[self._name] = self.figures
        self._path.write_text(json.dumps(known, indent=1) + "\n")

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Runs work that notes figures; if it fails, its error is noted under `name`."""
        try:
            with _limited(PART_SECONDS):
                work()
        except (Exception, OutOfTime) as error:  # of any type: the other parts are measured anyway
            traceback.print_exc()
            self.note(**{name: f"{type(error).__name__}: {first_line(error)}"})
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def text(self, name: str, text: str) -> None:
        """Adds a text to the file that has those of all models."""
        with self._path.with_name(f"{self._path.stem}-profiles.txt").open("a") as file:
            print(f"== {self._name} {name}", *(line.rstrip()[:240] for line in text.splitlines()), sep="\n", file=file)


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise OutOfTime(f"it takes longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def measure(name: str, device: torch.device, report: Report, quantization: str) -> None:
    """Measures the engine, then transformers."""
    on_gpu = device.type == "cuda"
    speed = bandwidth(device, 2**32 if on_gpu else 2**26)
    peak = matrix_peak(device, 8192 if on_gpu else 256)
    started = time.perf_counter()
    model = build(name, device, quantization)
    weights = num_bytes_read(model)
    report.note(
        build_s=time.perf_counter() - started,
        weight_gib=weights / 2**30,
        bandwidth_gb_per_s=speed / 1e9,
        matrix_tflops=peak / 1e12,
        limit_tokens_per_s=speed / weights,
    )
    answers: list[list[int]] = []

    def engine_parts() -> None:
        started = time.perf_counter()
        engine = engine_of(model)
        warm_up(engine)

        def steps() -> None:
            for _ in range(PROFILED):
                engine.step()

        runner = engine.runner.runner if isinstance(engine.runner, AsyncRunner) else engine.runner
        assert isinstance(runner, ModelRunner)
        kernel = getattr(runner.flash, "__name__", "none: SDPA over gathered blocks")
        report.note(start_s=time.perf_counter() - started, kernel=kernel, graphs=runner._graphs is not None)
        for count in STREAMS:
            engine_rate(engine, model, device, count)  # warm
            rate, tokens = engine_rate(engine, model, device, count)
            report.note(**{f"engine_{count}_tokens_per_s": rate})
            if count == 1:
                report.note(share_of_limit=rate * weights / speed)
            answers[:] = tokens
        _prefill(engine, model, 1)
        seconds = statistics.median(_seconds(partial(_prefill, engine, model, n), device) for n in (2, 3, 4))
        report.note(ttft_8000_s=seconds, prefill_share_of_peak=prefill_flops(model) / seconds / peak)
        for count in STREAMS:
            _decoding(engine, prompts_of(model, count))
            report.text(f"decode-{count}", profile_of(steps, device))
            _finish(engine)
        report.text("prefill", profile_of(lambda: _prefill(engine, model, 5), device))
        if on_gpu:
            report.note(peak_gib=torch.cuda.max_memory_allocated(device) / 2**30)

    report.part("engine", engine_parts)
    model.set_attn_implementation("sdpa")
    if answers:
        report.part("compared", lambda: report.note(**_compared(model, device, answers)))

    def rate_of(kind: str, measured: Callable[..., float], count: int) -> None:
        report.note(**{f"{kind}_{count}_tokens_per_s": measured(model, device, count)})

    others = {"generate": generate_rate}
    if on_gpu:  # on a CPU it takes all of the machine's memory
        others["continuous_batching"] = continuous_batching_rate
    for kind, measured in others.items():
        for count in STREAMS:
            report.part(f"{kind}_{count}_tokens_per_s", partial(rate_of, kind, measured, count))


def _compared(model: Any, device: torch.device, answers: list[list[int]]) -> dict[str, float]:
    same, largest = compare(model, device, answers)
    return {"same_tokens": same, "largest_difference": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="qwen3-0.6b,qwen3-8b,gemma-3-27b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--quantization", default=PLAIN, help=f"of {', '.join([PLAIN, *packed_model.FORMATS])}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a directory")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
    device = torch.device(arguments.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{datetime.now(UTC):%Y-%m-%d}-gpu-{machine.slug(gpu)}.json"
    for name, quantization in itertools.product(arguments.models.split(","), arguments.quantization.split(",")):
        report = Report(path, name if quantization == PLAIN else f"{name}-{quantization}", device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        report.part("failed", partial(measure, name, device, report, quantization))


if __name__ == "__main__":
    main()
