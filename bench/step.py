"""Step: how long the engine's decode step takes, compared with the stock model's bare forward on the same weights.

    python -m bench.step DIRECTORY

The two take turns, token by token, so that noise meets both, and compute the same tokens at the same positions. The
bare forward is transformers' own with SDPA and a DynamicCache. No server, event loop or text is involved.
"""

import argparse
import copy
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import DynamicCache, PreTrainedModel

from engine.build import build_engine
from engine.checked_model import check_model
from engine.engine import Engine, EngineOptions
from engine.model_loader import load_model
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

BATCHES = (1, 4, 16)
PROMPT_TOKENS = 64
NUM_STEPS = 64
NUM_WARM_UP = 4  # steps before those that count
MAX_SECONDS = 60.0  # for a batch; on a busy machine, the steps after that are left out


@dataclass(frozen=True)
class StepCost:
    """The cost of a batch's step: medians, in ms."""

    batch: int
    step: float
    bare_forward: float
    ratio: float
    same_tokens: float  # share of tokens that both choose, to show that they compute the same
    parts: dict[str, float]  # of the step


class Parts:
    """Times the parts of an engine's steps: it wraps the functions of the engine's objects."""

    def __init__(self, engine: Engine) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)  # of the current step
        self._wrap(engine.scheduler, "schedule", "update")
        runner = cast(ModelRunner, getattr(engine.runner, "runner", engine.runner))
        self._wrap(runner, "run")
        self._wrap(runner.model, "forward")
        self._wrap(runner.sampler, "choose")

    def _wrap(self, owner: object, *names: str) -> None:
        for name in names:
            setattr(owner, name, partial(self._call, name, getattr(owner, name)))

    def _call(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        self._seconds[name] += time.perf_counter() - start
        return result

    def take(self, step: float) -> dict[str, float]:
        """Returns the seconds of each part of the step that has ended."""
        spent, self._seconds = self._seconds, defaultdict(float)
        parts = {name: spent[name] for name in ("schedule", "forward", "choose", "update")}
        parts["build tensors"] = spent["run"] - spent["forward"] - spent["choose"]
        parts["other"] = step - spent["schedule"] - spent["run"] - spent["update"]
        return parts


class BareModel:
    """The stock model: it shares the engine's weights, and has transformers' attention and cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared)
        self.model.set_attn_implementation("sdpa")
        self.device: torch.device = model.device

    def start(self, prompts: list[list[int]]) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.forward(torch.tensor(prompts, device=self.device))

    @torch.inference_mode()
    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(batch, tokens) -> logits of the last token, (batch, vocab)."""
        output = self.model(input_ids=token_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return cast(torch.Tensor, output.logits[:, -1])


def measure(engine: Engine, bare: BareModel, parts: Parts, batch: int) -> StepCost:
    sequences = _prefill(engine, bare, batch)
    steps: list[float] = []
    forwards: list[float] = []
    spent: list[dict[str, float]] = []
    same = 0
    deadline = time.monotonic() + MAX_SECONDS
    while len(steps) < NUM_WARM_UP + NUM_STEPS and (len(steps) <= NUM_WARM_UP or time.monotonic() < deadline):
        last = torch.tensor([[sequence.token_ids[-1]] for sequence in sequences], device=bare.device)
        start = time.perf_counter()
        logits = bare.forward(last)
        forwards.append(time.perf_counter() - start)
        best = logits.argmax(-1).tolist()
        start = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - start)
        spent.append(parts.take(steps[-1]))
        same += sum(sequence.token_ids[-1] == token for sequence, token in zip(sequences, best, strict=True))
    _check_and_remove(engine, sequences, len(steps))
    return _summarize(
        batch, steps[NUM_WARM_UP:], forwards[NUM_WARM_UP:], spent[NUM_WARM_UP:], same / len(steps) / batch
    )


def _prefill(engine: Engine, bare: BareModel, batch: int) -> list[Sequence]:
    """Takes both past the prompts, which have one length and are computed in one step."""
    rng = random.Random(batch)
    vocabulary = engine.runner.num_embeddings
    prompts = [[rng.randrange(vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(batch)]
    params = SamplingParams(max_tokens=NUM_WARM_UP + NUM_STEPS + 2, temperature=0.0, ignore_eos=True)
    sequences = [Sequence(prompt, params, on_output=lambda output: None) for prompt in prompts]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    engine.step()
    bare.start(prompts)
    return sequences


def _check_and_remove(engine: Engine, sequences: list[Sequence], num_steps: int) -> None:
    if any(sequence.num_output_tokens != 1 + num_steps for sequence in sequences):
        raise RuntimeError("a step failed or was not a decode of the whole batch")
    for sequence in sequences:
        engine.scheduler.remove(sequence)


def _summarize(
    batch: int, steps: list[float], forwards: list[float], spent: list[dict[str, float]], same: float
) -> StepCost:
    step, bare_forward = statistics.median(steps), statistics.median(forwards)
    parts = {name: 1e3 * statistics.median(times[name] for times in spent) for name in spent[0]}
    return StepCost(batch, step * 1e3, bare_forward * 1e3, step / bare_forward, same, parts)


def row(cost: StepCost) -> str:
    parts = ", ".join(f"{name} {ms:.2f}" for name, ms in cost.parts.items())
    return (
        f"{cost.batch:5}  {cost.step:7.1f}  {cost.bare_forward:15.1f}  {cost.ratio:5.2f}"
        f"  {cost.same_tokens:11.0%}  {parts}"
    )


HEAD = "batch  step ms  bare forward ms  ratio  same tokens  parts of the step, ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="of the model: safetensors, config.json")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    model = load_model(check_model(arguments.directory, arguments.dtype, "auto"), lambda what, fraction: None)
    bare = BareModel(model)
    options = EngineOptions(max_num_batched_tokens=max(BATCHES) * PROMPT_TOKENS, num_speculative_tokens=0)
    engine = build_engine(model, options, frozenset())
    parts = Parts(engine)
    print(HEAD)
    costs = []
    for batch in BATCHES:
        costs.append(measure(engine, bare, parts, batch))
        print(row(costs[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1))


if __name__ == "__main__":
    main()
