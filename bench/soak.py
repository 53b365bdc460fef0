"""Soak: the real server under mixed load for minutes. It checks every answer, and that memory, files and threads stay.

    python -m bench.soak --minutes 10 --clients 16 --model demo:qwen2.5-coder-0.5b

The server is a process of its own with its usual settings. Each client sends one request after the other, of a kind
drawn at random (bench.soak_requests): streams and whole answers of three endpoints, sampling, structured output,
clients that leave, wrong requests. Greedy answers are taken without load first, and must be the same under load. With
EMBEDDING_MODEL_PATH it also asks for vectors. Unless KV_CACHE_MEMORY is set, the cache is small, so that all of it is
soon in use. Prints a table, writes JSON and a picture, and exits with 1 if a check fails.

lost          a stream that ended neither with [DONE] nor with an error, or an answer that was cut short
mismatch      a greedy answer other than the one without load. If two tokens are equally likely within the rounding of
              bfloat16, the batch decides between them; with DTYPE=float32 it does not
RSS slope     MB (10**6 bytes) per minute by least squares, without the first 20 % of the time, or 2 minutes
"""

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from bench import load, machine
from bench.run import RESULTS
from bench.server import Server, serving
from bench.soak_requests import MIX, PATHS, Ask, Object, Reply, World, objects_of, send, texts_of, verdict
from checkpoints import checkpoint
from config import Settings

SAMPLE_INTERVAL, PROBE_INTERVAL = 5.0, 0.25  # seconds between looks at the process, and at /health
IDLE_TIMEOUT = 5.0  # seconds in which the server is at rest after the last request
WARM_UP, MAX_WARM_UP = 0.2, 120.0  # share of the time, seconds
MAX_SLOPE, MAX_GROWTH = 1.0, 2  # MB/min, files or threads
NUM_PROMPTS = 6
KV_CACHE_MEMORY = "128MiB"  # the system gives memory at its first use: with a large cache, RSS grows for long
MB = 1e6


# --- a run


@dataclass(frozen=True)
class Sample:
    """The state of the server's process at one time."""

    at: float  # seconds since the start of the run
    rss: float  # MB
    num_files: int
    num_threads: int
    running: int
    waiting: int
    num_requests: int  # answered so far


@dataclass
class Run:
    """The clients and probes of one run, and what they saw."""

    port: int
    process: psutil.Process
    world: World
    begun: float = field(default_factory=time.monotonic)
    kinds: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    examples: list[Object] = field(default_factory=list)  # of the first faults
    samples: list[Sample] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)  # ms

    async def client(self, number: int, until: float) -> None:
        rng = random.Random(number)
        makers, weights = list(MIX), list(MIX.values())
        while time.monotonic() < until:
            await self.note(rng.choices(makers, weights)[0](self.world, rng))

    async def note(self, ask: Ask) -> None:
        reply: Reply | None = None
        try:
            reply = await send(self.port, ask)
            outcome = verdict(ask, reply)
        except TimeoutError:
            outcome = "lost"
        except OSError as error:
            outcome = type(error).__name__
        self.kinds[ask.kind] += 1
        if outcome not in ("ok", "left"):
            self.faults[f"{ask.kind}: {outcome}"] += 1
            if len(self.examples) < 10:
                content = reply.content[-2000:].decode(errors="replace") if reply else ""
                body = ask.body.decode() if isinstance(ask.body, bytes) else ask.body
                example = {"said": outcome, "path": ask.path, "body": body, "solo": ask.answer, "got": content}
                self.examples.append(example)

    async def health(self) -> Object:
        reply = await send(self.port, Ask("health", "/health"))
        assert reply is not None
        answer: Object = json.loads(reply.content)
        return answer

    async def probe(self, until: float) -> None:
        while time.monotonic() < until:
            start = time.perf_counter()
            await self.health()
            self.probes.append(1e3 * (time.perf_counter() - start))
            await asyncio.sleep(PROBE_INTERVAL)

    async def watch(self, until: float) -> None:
        while time.monotonic() < until:
            self.samples.append(await self.sample())
            await asyncio.sleep(SAMPLE_INTERVAL)

    async def sample(self) -> Sample:
        health = await self.health()
        return Sample(
            at=time.monotonic() - self.begun,
            rss=self.process.memory_info().rss / MB,
            num_files=self.process.num_fds(),
            num_threads=self.process.num_threads(),
            running=health["running"],
            waiting=health["waiting"],
            num_requests=self.kinds.total(),
        )

    async def rest(self) -> float | None:
        """Returns the seconds until no request runs or waits; None after IDLE_TIMEOUT."""
        start = time.monotonic()
        while time.monotonic() < start + IDLE_TIMEOUT:
            health = await self.health()
            if not (health["running"] or health["waiting"]):
                return time.monotonic() - start
            await asyncio.sleep(0.1)
        return None


async def answer_alone(port: int, world: World) -> None:
    """Fills `world.solo` with the greedy answers that are given without load, one request after the other."""
    for path in PATHS:
        for prompt in world.prompts:
            ask = Ask("solo", path, world.greedy(path, prompt))
            reply = await send(port, ask)
            assert reply is not None and reply.status == 200, reply
            (world.solo[path + prompt],) = texts_of(objects_of(ask, reply))


@dataclass(frozen=True)
class Outcome:
    """Figures of a run."""

    minutes: float
    clients: int
    requests: int
    lost: int
    mismatches: int
    other_faults: int
    health_p50_ms: float
    health_p99_ms: float
    rss_slope: float  # MB/min
    files_at_rest: tuple[int, int]  # before the run, after it
    threads: tuple[int, int]  # largest number: in the warm-up, later
    idle_s: float | None
    client_share: float  # processor seconds per second
    server_share: float

    @property
    def broken(self) -> list[str]:
        """The checks that failed, in words."""
        checks = {
            "lost or unfinished answers": self.lost == 0,
            "greedy answers differ from those given alone": self.mismatches == 0,
            "other faults": self.other_faults == 0,
            f"RSS grows by {MAX_SLOPE} MB/min or more": self.rss_slope < MAX_SLOPE,
            "open files are more than before": self.files_at_rest[1] <= self.files_at_rest[0] + MAX_GROWTH,
            "threads are more than in the warm-up": self.threads[1] <= self.threads[0] + MAX_GROWTH,
            f"not at rest within {IDLE_TIMEOUT:.0f} s": self.idle_s is not None,
        }
        return [failure for failure, has_passed in checks.items() if not has_passed]


async def soak(server: Server, world: World, minutes: float, clients: int) -> tuple[Run, Outcome]:
    run = Run(server.port, server.process, world)
    await answer_alone(server.port, world)
    await asyncio.gather(*(run.note(maker(world, random.Random(0))) for maker in MIX))  # loads all code and models
    await run.rest()
    before, used = await run.sample(), _processor_times(server)
    run.begun = time.monotonic()
    until = run.begun + 60 * minutes
    probing = asyncio.gather(run.watch(until), run.probe(until))
    await asyncio.gather(*(run.client(number, until) for number in range(clients)))
    wall = time.monotonic() - run.begun
    await probing
    idle = await run.rest()
    await asyncio.sleep(1.0)  # the last connections close
    after = await run.sample()
    shares = [(now - then) / wall for now, then in zip(_processor_times(server), used, strict=True)]
    return run, outcome(run, (before, after), minutes, clients, idle, shares)


def _processor_times(server: Server) -> list[float]:
    """Returns the processor seconds of this process and of the server's."""
    return [times.user + times.system for times in (psutil.Process().cpu_times(), server.process.cpu_times())]


def outcome(
    run: Run, at_rest: tuple[Sample, Sample], minutes: float, clients: int, idle: float | None, shares: list[float]
) -> Outcome:
    warm = min(MAX_WARM_UP, WARM_UP * 60 * minutes)
    early, late = ([s for s in run.samples if (s.at < warm) is is_early] for is_early in (True, False))
    lost = sum(count for name, count in run.faults.items() if name.endswith(": lost"))
    mismatches = sum(count for name, count in run.faults.items() if name.endswith(": mismatch"))
    return Outcome(
        minutes=minutes,
        clients=clients,
        requests=run.kinds.total(),
        lost=lost,
        mismatches=mismatches,
        other_faults=run.faults.total() - lost - mismatches,
        health_p50_ms=load.percentile(run.probes, 50),
        health_p99_ms=load.percentile(run.probes, 99),
        rss_slope=slope([(sample.at / 60, sample.rss) for sample in late]),
        files_at_rest=(at_rest[0].num_files, at_rest[1].num_files),
        threads=(max_threads([*early, at_rest[0]]), max_threads([*late, at_rest[1]])),
        idle_s=idle,
        client_share=shares[0],
        server_share=shares[1],
    )


def max_threads(samples: list[Sample]) -> int:
    return max(sample.num_threads for sample in samples)


def slope(points: list[tuple[float, float]]) -> float:
    """Returns the slope of the line nearest to the points, by least squares; 0 for fewer than two points."""
    if len(points) < 2:
        return 0.0
    x_mean, y_mean = sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
    square = sum((x - x_mean) * (x - x_mean) for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / square


# --- what is shown


def table(run: Run, result: Outcome) -> str:
    lines = [f"{name:36} {count:7}" for name, count in sorted(run.kinds.items())]
    lines += ["", *(f"{name:60} {count:7}" for name, count in sorted(run.faults.items())), ""]
    lines += [f"{name:20} {_shown(value)}" for name, value in asdict(result).items()]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def plot(samples: list[Sample], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pairs = list(zip(samples, samples[1:], strict=False))
    rates = [(later.num_requests - earlier.num_requests) / (later.at - earlier.at) for earlier, later in pairs]
    rows: dict[str, list[float]] = {
        "RSS, MB": [sample.rss for sample in samples],
        "open files": [sample.num_files for sample in samples],
        "threads": [sample.num_threads for sample in samples],
        "requests/s": [0.0, *rates],
    }
    figure, axes = pyplot.subplots(len(rows), 1, figsize=(8, 8), sharex=True)
    for axis, (name, values) in zip(axes, rows.items(), strict=True):
        axis.plot([sample.at / 60 for sample in samples], values)
        axis.set(ylabel=name, ylim=(0, 1.1 * max(values) + 1))
        axis.grid(True, alpha=0.3)
    axes[0].set_title(title)
    axes[-1].set_xlabel("minutes")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def write(run: Run, result: Outcome, model: str, dtype: str, directory: Path) -> Path:
    described = machine.describe()
    ending = "" if dtype == "auto" else f"-{dtype}"
    path = directory / f"soak-{datetime.now(UTC):%Y-%m-%d}{ending}.json"
    results = {
        "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        "machine": described,
        "model": model,
        "dtype": dtype,
        "outcome": asdict(result),
        "broken": result.broken,
        "requests": dict(sorted(run.kinds.items())),
        "faults": dict(sorted(run.faults.items())),
        "examples": run.examples,
        "samples": [asdict(sample) for sample in run.samples],
    }
    rounded = json.loads(json.dumps(results), parse_float=lambda text: round(float(text), 3))
    directory.mkdir(exist_ok=True)
    path.write_text(json.dumps(rounded, indent=1) + "\n")
    plot(run.samples, f"{model}, {result.clients} clients, {described['cpu']}", path.with_suffix(".png"))
    return path


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model", help="as MODEL_PATH: a directory, a .gguf file, a demo; default: the settings' own")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON and the picture go")
    return parser.parse_args()


def main() -> None:
    os.environ.setdefault("KV_CACHE_MEMORY", KV_CACHE_MEMORY)
    arguments, settings = parse(), Settings()
    model_path = arguments.model or settings.model_path or checkpoint.default_model_path()
    with serving(MODEL_PATH=model_path) as server:
        print(f"{checkpoint.served_name(model_path)} is ready after {server.wait_until_ready():.1f} s", flush=True)
        name = asyncio.run(load.first_model(f"{server.url}/v1"))
        target = load.Target(server.url, name, prompt_tokens=48)
        world = World(name, load.make_prompts(target, NUM_PROMPTS, "soak"), settings.embedding_model_path)
        run, result = asyncio.run(soak(server, world, arguments.minutes, arguments.clients))
    print(table(run, result))
    path = write(run, result, name, settings.dtype, arguments.results)
    print(f"\nwritten to {path.name}")
    if result.broken:
        sys.exit(f"error: {'; '.join(result.broken)}")


if __name__ == "__main__":
    main()
