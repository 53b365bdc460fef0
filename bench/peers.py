"""Peers: this server and others, by URL, measured side by side in one run; ratios of medians, and a picture.

    python -m bench.peers ours=http://127.0.0.1:8000/v1 llama-server=http://127.0.0.1:9001/v1

The first one is compared with the rest. Each round measures every server in turn, so that noise meets all of them.
Prompts differ from round to round, so that no server answers from its prefix cache unless that is measured.
"""

import argparse
import asyncio
import json
import re
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import load, machine
from bench.load import Target

RESULTS = Path(__file__).parent / "results"
LEVELS = {1: 3, 4: 8, 16: 16, 32: 32, 64: 64}  # concurrent streams -> requests
CURVE = {1: 2, 2: 4, 4: 8, 8: 8, 16: 16, 32: 32, 64: 64}  # for the picture
LENGTHS = (30, 250, 1000, 2000, 4000, 7000)  # tokens of a prompt
TIMES = {2000: 3, 10000: 1}  # the longest prompt -> how often its first token is measured in a round
NEW, KNOWN = 200, 6000  # tokens of an agent's turn: what it adds, and what it has sent before
ARRIVING = 4000  # tokens of the prompt that comes while others stream
CROWD = 64  # requests that come at once


@dataclass(frozen=True)
class Measure:
    """One number of a server."""

    name: str
    run: Callable[[Target, str], Awaitable[float]]  # target, salt
    is_better_high: bool = False
    unit: str = "ms"


def total_of(concurrency: int) -> Callable[[Target, str], Awaitable[float]]:
    async def run(target: Target, salt: str) -> float:
        level = await load.measure(target, concurrency, LEVELS[concurrency], salt)
        _check(target, level)
        return level.total_tokens_per_s

    return run


async def stream_rate(target: Target, salt: str) -> float:
    level = await load.measure(target, 1, LEVELS[1], salt)
    _check(target, level)
    return level.stream_tokens_per_s


def ttft_of(prompt_tokens: int, shared_prefix: int = 0) -> Callable[[Target, str], Awaitable[float]]:
    """Measures the median of some requests, one after the other; a shared prefix is in the server's cache by then."""

    async def run(target: Target, salt: str) -> float:
        asked = replace(target, prompt_tokens=prompt_tokens, shared_prefix=shared_prefix, max_tokens=2)
        if shared_prefix:
            await load.measure(asked, 1, 1, f"{salt}/first")
        times = next(times for length, times in TIMES.items() if prompt_tokens <= length)
        level = await load.measure(asked, 1, times, f"{salt}/{prompt_tokens}/{shared_prefix}")
        _check(target, level)
        return level.ttft_p50

    return run


async def ttft_of_crowd(target: Target, salt: str) -> float:
    level = await load.measure(replace(target, max_tokens=2), CROWD, CROWD, f"{salt}/crowd")
    _check(target, level)
    return level.ttft_p50


async def disturbance(target: Target, salt: str) -> float:
    """Returns the p99 of the time between tokens of four streams while a long prompt arrives, over their p50 before."""
    running = replace(target, max_tokens=160)
    prompts = load.make_prompts(running, 4, f"{salt}/running")
    (long,) = load.make_prompts(replace(target, prompt_tokens=ARRIVING, max_tokens=2), 1, f"{salt}/long")
    async with load.open_client(target) as client:
        start = time.perf_counter()
        streams = [asyncio.ensure_future(load.send(client, running, prompt)) for prompt in prompts]
        await asyncio.sleep(2.0)
        arrived = time.perf_counter() - start
        sent = await load.send(client, replace(target, max_tokens=2), long)
        ended = arrived + (sent.chunk_times[0] if sent.chunk_times else 0.0)
        finished = await asyncio.gather(*streams)
    gaps = [(t, later - t) for s in finished for t, later in zip(s.chunk_times, s.chunk_times[1:], strict=False)]
    before = [gap for t, gap in gaps if 0.5 < t < arrived]
    during = [gap for t, gap in gaps if arrived <= t <= ended]
    return load.percentile(during, 99) / max(load.percentile(before, 50), 1e-9)


MEASURES = (
    Measure("1 stream", stream_rate, True, "tokens/s"),
    *(Measure(f"{n} streams, total", total_of(n), True, "tokens/s") for n in LEVELS if n > 1),
    *(Measure(f"TTFT, prompt of {n}", ttft_of(n)) for n in LENGTHS),
    Measure("TTFT, 1000 shared + 30, known", ttft_of(30, 1000)),
    Measure(f"TTFT, {NEW} new", ttft_of(NEW)),
    Measure(f"TTFT, {NEW} new, {KNOWN} known", ttft_of(NEW, KNOWN)),
    Measure(f"TTFT p50, {CROWD} prompts at once", ttft_of_crowd),
    Measure(f"p99/p50 while a prompt of {ARRIVING} comes", disturbance, unit="x"),
)


def _check(target: Target, level: load.Level) -> None:
    if level.errors:
        raise SystemExit(f"error: {'; '.join(load.complaints(target, level))}")


async def compare(
    servers: dict[str, Target], measures: Sequence[Measure], rounds: int, salt: str
) -> dict[str, dict[str, list[float]]]:
    """Returns measure -> server -> a value for each round."""
    values: dict[str, dict[str, list[float]]] = {m.name: {name: [] for name in servers} for m in measures}
    for target in servers.values():
        await load.warm_up(target)
    for number in range(rounds):
        for measure in measures:
            for name, target in servers.items():
                value = await measure.run(target, f"{salt}/{number}")
                values[measure.name][name].append(value)
                print(f"round {number + 1}  {measure.name:38} {name:20} {value:9.2f} {measure.unit}", flush=True)
    return values


def medians(values: dict[str, dict[str, list[float]]], measures: Sequence[Measure]) -> list[dict[str, Any]]:
    """Returns a row for each measure; ratio: how many times better the first server is than the best other one."""
    rows = []
    for measure in measures:
        middle = {name: statistics.median(all_rounds) for name, all_rounds in values[measure.name].items()}
        first, *others = middle.values()
        best = (max if measure.is_better_high else min)(others, default=0.0)
        ratio = first / best if measure.is_better_high and best else best / first if first else 0.0
        rows.append({"measure": measure.name, "unit": measure.unit, **middle, "ratio": ratio})
    return rows


async def curve(servers: dict[str, Target], salt: str) -> dict[str, list[tuple[int, float, float]]]:
    """Returns server -> (streams, total tokens/s, ms per token of a stream)."""
    points: dict[str, list[tuple[int, float, float]]] = {name: [] for name in servers}
    for concurrency, count in CURVE.items():
        for name, target in servers.items():
            level = await load.measure(replace(target, max_tokens=64), concurrency, count, f"{salt}/curve")
            points[name].append((concurrency, level.total_tokens_per_s, level.inter_token_p50))
            print(f"{name:20} {load.row(level)}", flush=True)
    return points


def plot(points: dict[str, list[tuple[int, float, float]]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, curve_points in points.items():
        streams, totals, latencies = zip(*curve_points, strict=True)
        axes.plot(latencies, totals, marker="o", label=name)
        for number, x, y in zip(streams, latencies, totals, strict=True):
            axes.annotate(str(number), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set(xscale="log", xlabel="ms between tokens of a stream (median)", ylabel="tokens/s in total", title=title)
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(rows: list[dict[str, Any]], names: list[str]) -> str:
    head = f"{'':38} {'':8} " + " ".join(f"{name:>14}" for name in names) + "   ratio"
    lines = [
        f"{row['measure']:38} {row['unit']:8} "
        + " ".join(f"{row[name]:14.1f}" for name in names)
        + f" {row['ratio']:7.2f}"
        for row in rows
    ]
    return "\n".join([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("servers", nargs="+", metavar="NAME=URL", help="the first one is compared with the others")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--salt", default=str(int(time.time())), help="another one gives other prompts")
    parser.add_argument("--curve", action="store_true", help="also 1 to 64 streams, and a PNG of them")
    parser.add_argument("--name", default="peers", help="of the files in bench/results")
    parser.add_argument("--only", default="", help="a regular expression that finds the names of the measures wanted")
    arguments = parser.parse_args()
    measures = [measure for measure in MEASURES if re.search(arguments.only, measure.name)]
    urls = dict(server.split("=", 1) for server in arguments.servers)
    servers = {name: Target(url, asyncio.run(load.first_model(url))) for name, url in urls.items()}
    rows = medians(asyncio.run(compare(servers, measures, arguments.rounds, arguments.salt)), measures)
    described = machine.describe()
    print("", table(rows, list(servers)), sep="\n")
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{arguments.name}-{machine.slug(described['cpu'])}.json"
    results: dict[str, Any] = {
        "machine": described,
        "models": {name: Path(target.model).name for name, target in servers.items()},
        "rows": rows,
    }
    if arguments.curve:
        results["curve"] = asyncio.run(curve(servers, arguments.salt))
        plot(results["curve"], f"{next(iter(servers.values())).model}, {described['cpu']}", path.with_suffix(".png"))
    rounded = json.loads(json.dumps(results), parse_float=lambda text: round(float(text), 3))
    path.write_text(json.dumps(rounded, indent=1) + "\n")
    print(f"\nwritten to {path.name}")


if __name__ == "__main__":
    main()
