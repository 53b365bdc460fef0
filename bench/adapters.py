"""Adapters: how long a decode step takes whose sequences have several adapters, compared with one of the model alone.

    python -m bench.adapters [MODEL]

The two take turns, step by step, so that noise meets both; the ratio is the median over pairs. The adapters have random
weights for all linear layers of the model's text part.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from checkpoints import checkpoint
from engine.batch import Batch, Span
from engine.build import ModelDefaults, load_engine, model_runner_of
from engine.checked_model import check_model
from engine.engine import EngineOptions
from engine.lora.adapter import Adapter
from engine.lora.targets import shapes_of
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

PROMPT_TOKENS = 64
CACHE = Path("~/.cache/gemma3-server").expanduser()


@dataclass
class Decodes:
    """Sequences that are decoded together."""

    runner: ModelRunner
    sequences: list[Sequence]

    @classmethod
    def start(cls, runner: ModelRunner, adapters: Items[Adapter | None], batch: int, num_steps: int) -> "Decodes":
        """Computes the prompts."""
        rng, sequences = random.Random(0), []
        for number in range(batch):
            prompt = [rng.randrange(runner.num_embeddings // 2) for _ in range(PROMPT_TOKENS)]
            adapter = adapters[number % len(adapters)]
            params = SamplingParams(max_tokens=num_steps + 2, temperature=0.0, ignore_eos=True, adapter=adapter)
            sequences.append(Sequence(prompt, params, on_output=lambda output: None))
            runner.cache.allocate(sequences[-1], PROMPT_TOKENS + num_steps + 2)
        decodes = cls(runner, sequences)
        for sequence in sequences:
            decodes.compute([Span(sequence, 0, PROMPT_TOKENS)])
        return decodes

    def step(self) -> float:
        """Computes a token of each; returns the seconds."""
        start = time.perf_counter()
        self.compute([Span(sequence, sequence.num_computed, 1) for sequence in self.sequences])
        return time.perf_counter() - start

    def compute(self, spans: list[Span]) -> None:
        for span, (token,) in zip(spans, self.runner.run(Batch(tuple(spans))), strict=True):
            assert token is not None, "a logit is not a number"
            self.runner.cache.advance(span.sequence, span.end)
            span.sequence.token_ids.append(token.token_id)


def load(model: str, batch: int) -> ModelRunner:
    directory = checkpoint.fetch(model, CACHE, lambda what, fraction: None).directory
    options = EngineOptions(max_model_len=2048, max_num_seqs=2 * batch, quantization="auto", cache_dir=CACHE)
    checked = check_model(directory, options.dtype, options.device_map)
    engine, _ = load_engine(checked, options, ModelDefaults, lambda what, fraction: None)
    return model_runner_of(engine)


def random_adapter(runner: ModelRunner, rank: int, number: int) -> Adapter:
    """Makes an adapter of all layers that an adapter can change."""
    random_numbers, tensors = torch.Generator().manual_seed(number), {}
    for name, shape in shapes_of(runner.adapters.targets).items():
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, shape.num_columns, generator=random_numbers) * 0.02
        tensors[f"{name}.lora_B.weight"] = torch.randn(shape.num_rows, rank, generator=random_numbers) * 0.02
    with TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
        (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
        return runner.adapters.read(f"adapter-{number}", Path(folder), max_rank=rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo:qwen2.5-coder-0.5b")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    runner = load(arguments.model, arguments.batch)
    adapters = [random_adapter(runner, arguments.rank, number) for number in range(arguments.adapters)]
    alone, adapted = (Decodes.start(runner, of, arguments.batch, arguments.steps + 2) for of in ([None], adapters))
    for decodes in (alone, adapted, alone, adapted):
        decodes.step()  # what is compiled at first use
    pairs = [(alone.step(), adapted.step()) for _ in range(arguments.steps)]
    base, other = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(with_adapters / without for without, with_adapters in pairs)
    print(f"model alone {base:.1f} ms, {arguments.adapters} adapters {other:.1f} ms, median ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
