"""The check at start: compares a model's logits with transformers' own, for a prompt and for the tokens after it.

Attention is the only part of a model that the engine computes in its own way, with its own cache. Some models use
attention in a way that cannot be seen from outside: everything starts, and the text is wrong. So the same weights
compute the same tokens twice, once through the engine and once with transformers' own attention and cache. Packed
layers compute in both, so that the rounding of weights does not count. Each side takes two forwards, one for the prompt
and one for the tokens after it: each reads all weights once, which is what the check costs.
"""

import hashlib
import importlib.metadata
import json
import logging
import platform
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from engine.batch import Batch, Span
from engine.cpu import kernels
from engine.cpu.packed_layers import FusedMLP, PackedLinear, SharedLinear
from engine.gpu.half_layers import HalfLinear, multiplies_halves
from engine.layer_probe import forward_of, placeholders
from engine.model_runner import ModelRunner
from engine.report import Report
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from errors import ModelLoadError

log = logging.getLogger(__name__)

FOLDER = "checked"
LIBRARIES = (  # those that compute, or read weights
    *("torch", "transformers", "accelerate", "bitsandbytes", "compressed-tensors", "gptqmodel", "kernels"),
    *("triton", "flash-attn", "torchao"),
)
PROMPT_TOKENS = 16
BEYOND_WINDOW = 8  # tokens that the prompt is longer than a sliding window
LARGEST_WINDOW = 64  # tokens; the prompt is not made longer for a larger one
COMPARED = 8  # tokens at the prompt's end
NUM_DECODES = 4  # tokens after the prompt, computed in one step as guesses are
PHASE = "comparing with transformers"
# How far logits may be apart, as a part of their own spread. A rounding to bfloat16 changes a value by 1/256 at most,
# to float16 by 1/2048, and quantized layers round what goes in to about 1/254. A model of 80 layers rounds its state
# 160 times at random: 160 ** 0.5 / 256 = 0.05, which the layers may double or triple. 100 tiny architectures differ by
# 2e-6 in float32 and by 0.11 in 16 or 8 bits at most, Qwen 2.5 0.5B by 0.03; those that attend in another way by 0.15
# to 1.4. A model's own formulas in 16 bits (EAGER) round the scores too: there Qwen 2.5 0.5B differs by 0.11.
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.15}
QUANTIZED_TOLERANCE = 0.15
EAGER, SDPA = "eager", "sdpa"  # transformers' names
EAGER_FACTOR = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 2}


@dataclass(frozen=True)
class Difference:
    """How far the engine's logits are from the stock forward's: 0 where they are equal, about 1 where they have nothing
    in common. It is a median, since in a mixture of experts rounding alone can send a token to another expert."""

    prompt: float  # over its last tokens, which see all others, or those in the sliding window
    decodes: float  # over the tokens after it

    @classmethod
    def between(cls, engine: torch.Tensor, stock: torch.Tensor) -> "Difference":
        """Compares logits, both of shape (COMPARED + NUM_DECODES, vocab)."""
        engine, stock = (logits - logits.mean(-1, keepdim=True) for logits in (engine, stock))
        differences = ((engine - stock).norm(dim=-1) / stock.norm(dim=-1).clamp(min=1e-6)).nan_to_num(torch.inf)
        return cls(float(differences[:-NUM_DECODES].median()), float(differences[-NUM_DECODES:].median()))

    def faults(self, tolerance: float) -> list[str]:
        """Says in words what is beyond the tolerance."""
        values = {"a prompt": self.prompt, "the tokens after a prompt": self.decodes}
        return [f"{name} by {value:.0%}" for name, value in values.items() if not value <= tolerance]


def check(runner: ModelRunner, max_model_len: int, report: Report = lambda phase, fraction: None) -> bool:
    """Compares the model with transformers. Raises ModelLoadError where they differ. Returns False where they cannot be
    compared: transformers itself fails, or the cache has no room for a few tokens."""
    began = time.perf_counter()
    token_ids, model_type = _tokens(runner, max_model_len), runner.model.config.model_type
    if len(token_ids) <= COMPARED + NUM_DECODES or not _fits(runner, len(token_ids)):
        log.warning(
            "the KV cache is too small to compare the model with transformers: raise MAX_MODEL_LEN or KV_CACHE_MEMORY"
        )
        return False
    report(PHASE, 0.0)
    try:
        stock = _stock_logits(runner, token_ids)
    except Exception as error:  # a model that has to be called in another way can raise anything
        log.warning("models of type %r could not be compared with transformers: %s", model_type, error)
        return False
    report(PHASE, 0.5)
    difference = Difference.between(_engine_logits(runner, token_ids), stock)
    report(PHASE, 1.0)
    tolerance = tolerance_of(runner)
    if faults := difference.faults(tolerance):
        raise ModelLoadError(
            f"Models of type {model_type!r} are not supported: the engine's logits differ from transformers' for "
            f"{' and '.join(faults)} of their spread, and rounding explains at most {tolerance:.0%}."
        )
    log.info(
        "the model was compared with transformers in %.0f ms: a prompt differs by %.2g of the "
        "logits' spread, later tokens by %.2g",
        (time.perf_counter() - began) * 1000,
        difference.prompt,
        difference.decodes,
    )
    return True


def _tokens(runner: ModelRunner, max_model_len: int) -> list[int]:
    """Chooses ids from the whole vocabulary, without placeholders for images and the like; more than a small window."""
    windows = [group.window for group in runner.cache.groups if group.window and group.window <= LARGEST_WINDOW]
    count = max([PROMPT_TOKENS, *(window + BEYOND_WINDOW for window in windows)]) + NUM_DECODES
    count = min(count, max_model_len)
    unfit = placeholders(runner.model)
    spread = torch.linspace(0, runner.num_embeddings - 1, 2 * count, dtype=torch.float32).long().tolist()
    return [token for token in spread if token not in unfit][:: 2 if len(unfit) < count else 1][:count]


def reference_of(runner: ModelRunner) -> str:
    """Names transformers' implementation to compare with: the more exact one, if it computes all that the layers ask
    for."""
    specs = runner.cache.specs.values()
    has_softcap = any(getattr(spec, "softcap", None) is not None for spec in specs)
    return SDPA if runner.model._supports_sdpa and not has_softcap else EAGER


def tolerance_of(runner: ModelRunner) -> float:
    """Returns the largest difference that rounding explains. Where some layers round their inputs to 8 bits, or the
    cache rounds keys and values, these decide."""
    model = runner.model
    rounds = any(isinstance(layer, PackedLinear | SharedLinear | FusedMLP) for layer in model.modules())
    rounds = rounds or any(getattr(spec, "key_factors", None) is not None for spec in runner.cache.specs.values())
    is_rounded = rounds or getattr(model, "hf_quantizer", None) is not None
    is_halved = any(isinstance(layer, HalfLinear) for layer in model.modules()) or multiplies_halves(runner.device)
    dtype = torch.float16 if runner.dtype == torch.float32 and is_halved else runner.dtype
    tolerance = QUANTIZED_TOLERANCE if is_rounded else TOLERANCE[dtype]
    return tolerance * EAGER_FACTOR[dtype] if reference_of(runner) == EAGER else tolerance


def _fits(runner: ModelRunner, num_tokens: int) -> bool:
    block_size = runner.cache.block_size
    return all(pool.num_free * block_size >= num_tokens for pool in runner.cache.pools)


@torch.inference_mode()
def _engine_logits(runner: ModelRunner, token_ids: list[int]) -> torch.Tensor:
    """Computes (COMPARED + NUM_DECODES, vocab) in float32: a step for the prompt, and one for the tokens after it. With
    recurrent layers, which take one token after the other, more steps: two for the prompt, and one for each token."""
    length = len(token_ids) - NUM_DECODES
    sequence = Sequence(token_ids[:length], SamplingParams(max_tokens=NUM_DECODES), on_output=lambda output: None)
    sequence.token_ids = list(token_ids)
    decodes = [Span(sequence, position, 1) for position in range(length, len(token_ids))]
    steps = [[Span(sequence, 0, length)], decodes]
    if runner.cache.states is not None:
        cut = length - COMPARED
        steps = [[Span(sequence, 0, cut)], [Span(sequence, cut, COMPARED)], *([span] for span in decodes)]
    logits = []
    try:
        runner.cache.allocate(sequence, len(token_ids))
        for spans in steps:
            logits.append(runner.logits(Batch(tuple(spans)), num_kept=COMPARED))
            runner.cache.advance(sequence, spans[-1].end)
        return torch.cat(logits)[-COMPARED - NUM_DECODES :].float()
    finally:
        runner.cache.free(sequence)


@torch.inference_mode()
def _stock_logits(runner: ModelRunner, token_ids: list[int]) -> torch.Tensor:
    """Computes the same with transformers' attention and cache. The decodes go through the filled cache too, since some
    models compute them in another way."""
    inputs = torch.tensor([token_ids], device=runner.device)
    positions = torch.arange(len(token_ids), device=runner.device)[None]
    cuts = (len(token_ids) - NUM_DECODES,)
    rows, past, forward = [], None, forward_of(runner.model)
    with _attention(runner.model, reference_of(runner)):
        for part, places in zip(inputs.tensor_split(cuts, dim=1), positions.tensor_split(cuts, dim=1), strict=True):
            kept = min(part.shape[1], COMPARED)
            # some models count the tokens of a cache wrongly if its first layer is recurrent
            said: dict[str, Any] = {} if past is None or runner.cache.states is None else {"position_ids": places}
            output = forward(input_ids=part, past_key_values=past, use_cache=True, logits_to_keep=kept, **said)
            past = output.past_key_values
            rows.append(output.logits[0].float())
    return torch.cat(rows)


@contextmanager
def _attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Lets the model use one of transformers' implementations meanwhile."""
    config: Any = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = implementation
    try:
        yield
    finally:
        config._attn_implementation = before


# --- what is remembered


@dataclass(frozen=True)
class PassedChecks:
    """Remembers the checkpoints that have passed, as empty files, so that later starts do not compare them again."""

    directory: Path | None  # None: nothing is remembered

    def contains(self, key: str) -> bool:
        return self.directory is not None and (self.directory / FOLDER / key).exists()

    def add(self, key: str) -> None:
        if self.directory is None:
            return
        try:
            folder = self.directory / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            (folder / key).touch()
        except OSError as error:
            log.info("the result of the check at start could not be saved: %s", error)


def key_of(directory: Path, runner: ModelRunner, options: dict[str, Any]) -> str:
    """Hashes all that decides the check's outcome: the files, the libraries, our code, the options. These may leave
    choices to the machine, so the layers that were chosen count too."""
    files = sorted(path for path in directory.iterdir() if path.suffix in (".safetensors", ".packed", ".json"))
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    layers = Counter(f"{type(layer).__module__}.{type(layer).__qualname__}" for layer in runner.model.modules())
    facts = (stats, _versions(), _code(), _machine(runner.device), str(runner.dtype), options, sorted(layers.items()))
    return hashlib.sha256(json.dumps([str(directory.resolve()), facts], default=str).encode()).hexdigest()


def _machine(device: torch.device) -> tuple[Any, ...]:
    """Returns what the device's kernels are chosen by."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    features = (kernels.are_available(), kernels.has_bfloat16(), torch.backends.cpu.get_cpu_capability())
    return (name, platform.machine(), *features)


@cache
def _versions() -> dict[str, str | None]:
    """Returns the libraries' versions, None where one is not installed."""
    versions: dict[str, str | None] = dict.fromkeys(LIBRARIES)
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@cache
def _code() -> str:
    """Returns a hash of the code that computes: the engine's, and that of models that see."""
    digest, own = hashlib.sha256(), Path(__file__).parent
    for folder in (own, own.parent / "vision"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
