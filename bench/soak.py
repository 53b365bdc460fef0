"""Soak: a mix of everything that clients do, for minutes, against the real server; what must hold meanwhile and after.

    python -m bench.soak --minutes 10 --clients 16 --model demo:qwen2.5-coder-0.5b

The server is a process of its own with its usual settings. Each client sends one request after the other, of a kind
drawn at random: streams and whole answers of three endpoints, sampling, structured output, clients that leave, requests
that are wrong. Greedy answers are taken alone first and must be the same under load. With EMBEDDING_MODEL_PATH vectors
are asked for too. Where KV_CACHE_MEMORY is not set, the cache is small, so that all of it is soon in use. Prints a
table, writes JSON and a picture, and exits with 1 where something does not hold.

lost          a stream that ended neither with [DONE] nor with an error, or an answer that was cut short
mismatch      a greedy answer that is not the one that was given alone. Where two tokens are equally likely but for the
              rounding of bfloat16, the batch decides which one comes; not so with DTYPE=float32
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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from bench import load, machine
from bench.run import RESULTS, Server, serving
from checkpoints import checkpoint
from config import Settings

SAMPLE_INTERVAL, PROBE_INTERVAL = 5.0, 0.25  # seconds between looks at the process, and at /health
TIMEOUT = 120.0  # seconds for one request
IDLE_TIMEOUT = 5.0  # seconds in which the server is at rest after the last request
WARM_UP, LONGEST_WARM_UP = 0.2, 120.0  # of the time, seconds
MAX_SLOPE, MAX_GROWTH = 1.0, 2  # MB/min, files or threads
NUM_PROMPTS, MAX_TOKENS = 6, 32
KV_CACHE_MEMORY = "128MiB"  # memory that no request has needed yet stays untouched: a large cache grows for long
MB = 1e6

Object = dict[str, Any]


# --- one request


@dataclass(frozen=True)
class Ask:
    """What is sent, and what must come back."""

    kind: str
    path: str
    body: Object | bytes | None = None  # None: a GET
    status: int = 200
    answer: str | None = None  # of a greedy request, as it was given alone
    leaves_after: float | None = None  # seconds; the client then goes
    complaint: Callable[[list[Object]], str] = field(default=lambda parsed: "")  # of the answer's objects

    @property
    def is_stream(self) -> bool:
        return isinstance(self.body, dict) and bool(self.body.get("stream"))

    @property
    def content(self) -> bytes:
        """The request as it goes over the wire."""
        body = b"" if self.body is None else self.body
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        method = "GET" if self.body is None else "POST"
        head = f"{method} {self.path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text


@dataclass(frozen=True)
class Reply:
    status: int
    content: bytes
    is_whole: bool

    @classmethod
    def of(cls, raw: bytes) -> "Reply":
        head, _, rest = raw.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.1 ") else 0
        if b"transfer-encoding: chunked" in head.lower():
            return cls(status, b"".join(_chunks(rest)), rest.endswith(b"\r\n0\r\n\r\n") or rest == b"0\r\n\r\n")
        length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":-1")
        return cls(status, rest, len(rest) == int(length.partition(b":")[2]))

    @property
    def events(self) -> list[bytes]:
        lines = self.content.split(b"\n")
        return [line[6:] for line in lines if line.startswith(b"data: ")]


def _chunks(rest: bytes) -> Iterator[bytes]:
    """The pieces of a chunked body, as far as they are there."""
    at = 0
    while (end := rest.find(b"\r\n", at)) >= 0 and (size := int(rest[at:end] or b"0", 16)):
        yield rest[end + 2 : end + 2 + size]
        at = end + size + 4


async def send(port: int, ask: Ask) -> Reply | None:
    """A connection of its own; None where the client left."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(ask.content)
        await writer.drain()
        if ask.leaves_after is not None:
            await asyncio.sleep(ask.leaves_after)
            return None
        async with asyncio.timeout(TIMEOUT):
            return Reply.of(await reader.read(-1))
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


# --- what an answer says


class Lost(Exception):
    """An answer that has no end."""


def objects_of(ask: Ask, reply: Reply) -> list[Object]:
    """The answer, or a stream's chunks. Raises Lost for a stream without its end, ValueError for an error in one."""
    if not ask.is_stream:
        return [json.loads(reply.content)]
    events = reply.events
    parsed: list[Object] = [json.loads(event) for event in events if event != b"[DONE]"]
    if errors := [event for event in parsed if event.get("error") or event.get("type") in ("error", "response.failed")]:
        raise ValueError(f"in the stream: {errors[0]}")
    is_ended = bool(parsed) and parsed[-1].get("type") in ("response.completed", "response.incomplete")
    if not is_ended and events[-1:] != [b"[DONE]"]:
        raise Lost
    return parsed


def texts_of(parsed: list[Object]) -> list[str]:
    """Of each choice."""
    texts: dict[int, str] = {}
    for item in parsed:
        for index, text in _texts(item):
            texts[index] = texts.get(index, "") + text
    return list(texts.values())


def _texts(item: Object) -> Iterator[tuple[int, str]]:
    """(choice, text) of a chat completion, a completion, a response, or a chunk of one."""
    if item.get("type") == "response.output_text.delta":
        yield 0, item["delta"]
    for message in item.get("output") or ():
        yield from ((0, part["text"]) for part in message.get("content", ()) if part["type"] == "output_text")
    for choice in item.get("choices") or ():
        said = choice.get("message") or choice.get("delta") or choice
        yield choice["index"], said.get("content") or said.get("text") or ""


def verdict(ask: Ask, reply: Reply | None) -> str:
    """`ok`, `left`, or what is wrong."""
    if reply is None:
        return "left"
    if not reply.is_whole:
        return "lost"
    if reply.status != ask.status:
        return f"status {reply.status} for {ask.status}"
    try:
        parsed = objects_of(ask, reply)
        if ask.status >= 400:
            return "ok" if isinstance(parsed[0].get("error"), dict) else "no error object"
        if ask.answer is not None and any(text != ask.answer for text in texts_of(parsed)):
            return "mismatch"
        return ask.complaint(parsed) or "ok"
    except Lost:
        return "lost"
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"[:100]


def complaint_of_json(parsed: list[Object]) -> str:
    """An answer that ended by itself is what the schema says."""
    ends = [choice["finish_reason"] for item in parsed for choice in item.get("choices") or ()]
    if "stop" not in ends:
        return ""
    return "" if isinstance(json.loads(texts_of(parsed)[0]).get("n"), int) else "not what the schema says"


def complaint_of_logprobs(parsed: list[Object]) -> str:
    choices = [choice for item in parsed for choice in item.get("choices") or ()]
    scores = [token["logprob"] for choice in choices for token in (choice.get("logprobs") or {}).get("content", ())]
    return "" if scores and all(score <= 0 for score in scores) else "no logprobs"


# --- what is asked


@dataclass(frozen=True)
class World:
    """What the requests of a run are made from."""

    model: str
    prompts: list[str]
    embedding_model: str | None
    solo: dict[str, str] = field(default_factory=dict)  # path and prompt -> the greedy answer

    def chat(self, rng: random.Random, **more: Any) -> Object:
        messages = [{"role": "user", "content": rng.choice(self.prompts)}]
        return {"model": self.model, "messages": messages, "max_tokens": MAX_TOKENS, **more}

    def greedy(self, path: str, prompt: str) -> Object:
        shared = {"model": self.model, "temperature": 0}
        if path == "/v1/chat/completions":
            return {**shared, "messages": [{"role": "user", "content": prompt}], "max_tokens": MAX_TOKENS}
        name = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        return {**shared, "prompt" if name == "max_tokens" else "input": prompt, name: MAX_TOKENS}


PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
CHAT = PATHS[0]
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
WRONG: tuple[tuple[str, str, Object | bytes, int], ...] = (  # what is wrong, path, what is put into a good body, status
    ("no JSON", CHAT, b"{", 400),
    ("another model", CHAT, {"model": "nobody"}, 404),
    ("no messages", CHAT, {"messages": []}, 400),
    ("another role", CHAT, {"messages": [{"role": "nobody", "content": "x"}]}, 400),
    ("hot", CHAT, {"temperature": 3}, 400),
    ("n of 0", CHAT, {"n": 0}, 400),
    ("too long", CHAT, {"max_tokens": 10**6}, 400),
    ("a tool without a name", CHAT, {"tools": [{"type": "function", "function": {}}]}, 400),
    ("a grammar that is none", CHAT, {"guided_regex": "("}, 400),
    ("no such path", "/v1/nothing", {}, 404),
)


def greedy(world: World, rng: random.Random) -> Ask:
    path, prompt = rng.choice(PATHS), rng.choice(world.prompts)
    stream = rng.random() < 0.7
    kind = f"greedy {path.removeprefix('/v1/')} {'stream' if stream else 'whole'}"
    return Ask(kind, path, {**world.greedy(path, prompt), "stream": stream}, answer=world.solo[path + prompt])


def stopped(world: World, rng: random.Random) -> Ask:
    """At a string that the greedy answer has."""
    prompt = rng.choice(world.prompts)
    whole = world.solo[CHAT + prompt]
    stop = whole[len(whole) // 2 :][:4] or "none"
    body = {**world.greedy(CHAT, prompt), "stop": stop, "stream": rng.random() < 0.5}
    return Ask("stop string", CHAT, body, answer=whole.partition(stop)[0])


def sampled(world: World, rng: random.Random) -> Ask:
    body = world.chat(rng, seed=rng.randrange(100), temperature=0.9, top_p=0.9, stream=rng.random() < 0.5)
    return Ask("seeded sampling", CHAT, body)


def doubled(world: World, rng: random.Random) -> Ask:
    prompt = rng.choice(world.prompts)
    return Ask("n of 2", CHAT, {**world.greedy(CHAT, prompt), "n": 2}, answer=world.solo[CHAT + prompt])


def scored(world: World, rng: random.Random) -> Ask:
    prompt = rng.choice(world.prompts)
    body = {**world.greedy(CHAT, prompt), "logprobs": True, "top_logprobs": 3, "stream": True}
    return Ask("logprobs", CHAT, body, answer=world.solo[CHAT + prompt], complaint=complaint_of_logprobs)


def structured(world: World, rng: random.Random) -> Ask:
    body = world.chat(rng, response_format=FORMAT, stream=rng.random() < 0.5)
    return Ask("structured", CHAT, body, complaint=complaint_of_json)


def leaving(world: World, rng: random.Random) -> Ask:
    kind, seconds = rng.choice([("before the first byte", 0.0), ("in between", 0.3), ("late", 1.0)])
    body = world.chat(rng, stream=rng.random() < 0.5, max_tokens=128)
    return Ask(f"leaves {kind}", CHAT, body, leaves_after=seconds)


def wrong(world: World, rng: random.Random) -> Ask:
    what, path, change, status = rng.choice(WRONG)
    body = change if isinstance(change, bytes) else {**world.chat(rng), **change}
    return Ask(f"wrong: {what}", path, body, status)


def listed(world: World, rng: random.Random) -> Ask:
    return Ask("models", "/v1/models")


def embedded(world: World, rng: random.Random) -> Ask:
    if world.embedding_model is None:
        return listed(world, rng)
    texts = rng.sample(world.prompts, 2)
    return Ask("embeddings", "/v1/embeddings", {"model": world.embedding_model, "input": texts})


MIX: dict[Callable[[World, random.Random], Ask], int] = {
    **{greedy: 40, stopped: 6, sampled: 10, doubled: 5, scored: 6, structured: 6},
    **{leaving: 12, wrong: 10, listed: 2, embedded: 3},
}


# --- a run


@dataclass(frozen=True)
class Sample:
    """The server's process at a time."""

    at: float  # seconds since the begin
    rss: float  # MB
    num_files: int
    num_threads: int
    running: int
    waiting: int
    num_requests: int  # answered so far


@dataclass
class Run:
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
            said = verdict(ask, reply)
        except TimeoutError:
            said = "lost"
        except OSError as error:
            said = type(error).__name__
        self.kinds[ask.kind] += 1
        if said not in ("ok", "left"):
            self.faults[f"{ask.kind}: {said}"] += 1
            if len(self.examples) < 10:
                content = reply.content[-2000:].decode(errors="replace") if reply else ""
                told = ask.body.decode() if isinstance(ask.body, bytes) else ask.body
                self.examples.append({"said": said, "path": ask.path, "body": told, "solo": ask.answer, "got": content})

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
        said = await self.health()
        return Sample(
            time.monotonic() - self.begun,
            self.process.memory_info().rss / MB,
            self.process.num_fds(),
            self.process.num_threads(),
            said["running"],
            said["waiting"],
            self.kinds.total(),
        )

    async def rest(self) -> float | None:
        """Seconds until nothing runs any more; None if it takes too long."""
        start = time.monotonic()
        while time.monotonic() < start + IDLE_TIMEOUT:
            said = await self.health()
            if not (said["running"] or said["waiting"]):
                return time.monotonic() - start
            await asyncio.sleep(0.1)
        return None


async def answered_alone(port: int, world: World) -> None:
    """Fills `world.solo`, one request after the other."""
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
    files_at_rest: tuple[int, int]  # before, after
    threads: tuple[int, int]  # at most: in the warm-up, later
    idle_s: float | None
    client_share: float  # of one core's time
    server_share: float

    @property
    def broken(self) -> list[str]:
        """What does not hold."""
        holds = {
            "lost or unfinished answers": self.lost == 0,
            "greedy answers differ from those given alone": self.mismatches == 0,
            "other faults": self.other_faults == 0,
            f"RSS grows by {MAX_SLOPE} MB/min or more": self.rss_slope < MAX_SLOPE,
            "open files are more than before": self.files_at_rest[1] <= self.files_at_rest[0] + MAX_GROWTH,
            "threads are more than in the warm-up": self.threads[1] <= self.threads[0] + MAX_GROWTH,
            f"not at rest within {IDLE_TIMEOUT:.0f} s": self.idle_s is not None,
        }
        return [what for what, does_hold in holds.items() if not does_hold]


async def soak(server: Server, port: int, world: World, minutes: float, clients: int) -> tuple[Run, Outcome]:
    run = Run(port, server.process, world)
    await answered_alone(port, world)
    await asyncio.gather(*(run.note(maker(world, random.Random(0))) for maker in MIX))  # so that all is loaded
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
    """Seconds: of this process, of the server's."""
    return [times.user + times.system for times in (psutil.Process().cpu_times(), server.process.cpu_times())]


def outcome(
    run: Run, at_rest: tuple[Sample, Sample], minutes: float, clients: int, idle: float | None, shares: list[float]
) -> Outcome:
    warm = min(LONGEST_WARM_UP, WARM_UP * 60 * minutes)
    early, late = ([s for s in run.samples if (s.at < warm) is is_early] for is_early in (True, False))
    lost = sum(count for name, count in run.faults.items() if name.endswith(": lost"))
    mismatches = sum(count for name, count in run.faults.items() if name.endswith(": mismatch"))
    return Outcome(
        minutes,
        clients,
        run.kinds.total(),
        lost,
        mismatches,
        run.faults.total() - lost - mismatches,
        load.percentile(run.probes, 50),
        load.percentile(run.probes, 99),
        slope([(sample.at / 60, sample.rss) for sample in late]),
        (at_rest[0].num_files, at_rest[1].num_files),
        (most_threads([*early, at_rest[0]]), most_threads([*late, at_rest[1]])),
        idle,
        shares[0],
        shares[1],
    )


def most_threads(samples: list[Sample]) -> int:
    return max(sample.num_threads for sample in samples)


def slope(points: list[tuple[float, float]]) -> float:
    """Of the line nearest to the points, by least squares; 0 for fewer than two."""
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
    with serving(model_path, settings.num_speculative_tokens) as server:
        print(f"{checkpoint.served_name(model_path)} is ready after {server.wait_until_ready():.1f} s", flush=True)
        name = asyncio.run(load.first_model(f"{server.url}/v1"))
        target = load.Target(server.url, name, prompt_tokens=48)
        world = World(name, load.make_prompts(target, NUM_PROMPTS, "soak"), settings.embedding_model_path)
        port = int(server.url.rpartition(":")[2])
        run, result = asyncio.run(soak(server, port, world, arguments.minutes, arguments.clients))
    print(table(run, result))
    path = write(run, result, name, settings.dtype, arguments.results)
    print(f"\nwritten to {path.name}")
    if result.broken:
        sys.exit(f"error: {'; '.join(result.broken)}")


if __name__ == "__main__":
    main()
