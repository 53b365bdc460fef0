"""Run: the whole benchmark. It measures a server under load, then single steps, and prints and writes the results.

    MODEL_PATH=... python -m bench.run

Settings are the server's own, from the environment or `.env`, except that no tokens are guessed: how many guesses are
right depends on the text. Steps are compared with the bare model in bfloat16, not quantised. With
PEERS="NAME=URL ..." other servers are measured beside this one (bench.peers).
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import load, machine, wire
from bench.server import ROOT, Server, serving
from checkpoints import checkpoint
from config import Settings
from errors import ModelLoadError
from serving.loading import engine_options

RESULTS = ROOT / "bench" / "results"
DTYPE = "bfloat16"
LEVELS = ((1, 3), (4, 8), (16, 16))  # concurrent streams, requests
MIN_SPEEDUP = 5.0  # tokens/s of 16 streams over those of one
MAX_OVERHEAD = 0.05  # share of a step outside the model's forward
MAX_STEP_RATIO = 1.15  # an engine step over the bare forward of the same batch


@contextmanager
def peak_memory(server: Server) -> Iterator[list[float]]:
    """Yields a list of one number: after the block, the highest resident memory, in MiB."""
    peak, ended = [server.memory()], threading.Event()

    def sample() -> None:
        while not ended.wait(0.05) and server.process.is_running():
            peak[0] = max(peak[0], server.memory())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def measure_server(model_path: str) -> dict[str, Any]:
    """Measures the start, the memory, and each level of concurrent streams."""
    with serving(MODEL_PATH=model_path, NUM_SPECULATIVE_TOKENS="0") as server:
        ready = server.wait_until_ready()
        print(f"ready {ready:.1f} s after the start", flush=True)
        idle = server.memory()
        base_url = f"{server.url}/v1"
        target = load.Target(base_url, asyncio.run(load.first_model(base_url)))
        first_token = _time_first_token(server, target)
        print(f"first token after {first_token:.1f} s; resident memory {idle:.0f} MiB\n\n{load.HEAD}  peak MiB")
        levels = [_measure_level(server, target, *level) for level in LEVELS]
        if os.environ.get("PEERS"):
            print()
            servers = [f"ours={base_url}", *os.environ["PEERS"].split()]
            subprocess.run([sys.executable, "-m", "bench.peers", "--curve", *servers], cwd=ROOT, check=True)
        return {
            "start_to_ready_s": ready,
            "start_to_first_token_s": first_token,
            "idle_memory_mib": idle,
            "max_tokens": target.max_tokens,
            "levels": levels,
        }


def _time_first_token(server: Server, target: load.Target) -> float:
    """Returns the seconds from the start of the process to the first token of its first answer."""
    first = asyncio.run(load.measure(target, 1, 1, "first"))
    _exit_on(load.complaints(target, first))
    return time.perf_counter() - server.started - first.wall_s + first.ttft_p50 / 1e3


def _measure_level(server: Server, target: load.Target, concurrency: int, num_requests: int) -> dict[str, Any]:
    with peak_memory(server) as peak:
        level = asyncio.run(load.measure(target, concurrency, num_requests))
    print(f"{load.row(level)}  {peak[0]:8.0f}", flush=True)
    _exit_on(load.complaints(target, level))
    return {**asdict(level), "peak_memory_mib": peak[0]}


def _exit_on(complaints: list[str]) -> None:
    if complaints:
        sys.exit(f"error: {'; '.join(complaints)}")


def measure_apart(module: str, *arguments: str) -> list[dict[str, Any]]:
    """Runs another module of the benchmark in a process of its own, and returns the rows that it measured."""
    with tempfile.TemporaryDirectory() as results:
        path = Path(results) / "results.json"
        if subprocess.run([sys.executable, "-m", module, *arguments, "--json", str(path)], cwd=ROOT).returncode:
            sys.exit(f"error: {module} failed")
        rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


@dataclass(frozen=True)
class Ratio:
    """A measured value, and its target."""

    name: str
    value: float
    target: float
    is_at_least: bool

    @property
    def is_reached(self) -> bool:
        return self.value >= self.target if self.is_at_least else self.value <= self.target

    def __str__(self) -> str:
        limit = f"{'at least' if self.is_at_least else 'at most'} {self.target:.2f}"
        return f"{self.name:36} {self.value:6.2f}   target: {limit:14} {'reached' if self.is_reached else 'missed'}"


def ratios(levels: list[dict[str, Any]], steps: list[dict[str, Any]], wires: list[dict[str, Any]]) -> list[Ratio]:
    speedup = levels[-1]["total_tokens_per_s"] / levels[0]["total_tokens_per_s"]
    return [
        Ratio(f"tokens/s, {levels[-1]['concurrency']} streams / 1 stream", speedup, MIN_SPEEDUP, True),
        *(Ratio(f"step / bare forward, batch of {s['batch']}", s["ratio"], MAX_STEP_RATIO, False) for s in steps),
        Ratio(f"step without the forward, batch of {steps[-1]['batch']}", _overhead(steps[-1]), MAX_OVERHEAD, False),
        *(Ratio(f"event loop us/token, {_of(w)}", w["loop_us_per_token"], wire.MAX_COST, False) for w in wires),
        Ratio("missed heartbeats", sum(w["missed_heartbeats"] for w in wires), 0, False),
    ]


def _overhead(step: dict[str, Any]) -> float:
    parts: dict[str, float] = step["parts"]
    return 1.0 - parts["forward"] / sum(parts.values())


def _of(wire: dict[str, Any]) -> str:
    pace = f" at {1 / wire['interval_s']:.0f}/s" if wire["interval_s"] else ""
    return f"{wire['streams']} streams{pace}"


def options_of(settings: Settings) -> dict[str, Any]:
    """Returns the settings of the engine, without where this machine keeps its files."""
    return {name: value for name, value in asdict(engine_options(settings)).items() if not isinstance(value, Path)}


def write(results: dict[str, Any]) -> Path:
    """Writes a file for this day and processor; returns its path."""
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{machine.slug(results['machine']['cpu'])}.json"
    RESULTS.mkdir(exist_ok=True)
    rounded = json.loads(json.dumps(results), parse_float=lambda text: round(float(text), 3))
    path.write_text(json.dumps(rounded, indent=1) + "\n")
    return path


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server ends too
    settings = Settings()
    model_path = settings.model_path or checkpoint.default_model_path()
    name, described = checkpoint.served_name(model_path), machine.describe()
    print(f"{name} on {described['cpu']}, {described['cores']} cores", flush=True)
    try:
        directory = checkpoint.fetch(model_path, settings.cache_dir, lambda phase, fraction: None).directory
    except ModelLoadError as error:
        sys.exit(f"error: {error}")
    server = measure_server(model_path)
    print()
    steps = measure_apart("bench.step", str(directory), "--dtype", DTYPE)
    print()
    wires = measure_apart("bench.wire")
    reached = ratios(server["levels"], steps, wires)
    print("", *reached, sep="\n")
    path = write(
        {
            "time": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "machine": described,
            "model": name,
            "settings": {**options_of(settings), "num_speculative_tokens": 0},
            "server": server,
            "steps": steps,
            "wire": wires,
            "ratios": [{**asdict(ratio), "is_reached": ratio.is_reached} for ratio in reached],
        }
    )
    print(f"\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
