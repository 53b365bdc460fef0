"""Load: concurrent streaming requests to any OpenAI-compatible server, and the times and rates that they measure.

    python -m bench.load --base-url http://127.0.0.1:8000/v1 --concurrency 1,4,16 --requests 3,8,16

A closed loop: each of the concurrent streams sends its next request when its last one has ended. Prompts are the same
in every run, and no two of them begin with the same words. Tokens are counted by the server's usage where it sends one,
else by chunks.

TTFT          request sent -> first chunk with text
inter-token   between two successive chunks with text, over the tokens per chunk of that stream
tokens/s      of a stream: tokens after the first over the time from the first chunk with text to the end (the median
              stream's); in total: tokens of all streams over the time of the level
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx2

SENTENCE = (
    "The old lighthouse keeper|A young botanist|The village baker|The museum guide|A quiet engineer|The harbour pilot",
    "described|measured|repaired|remembered|painted|counted|followed|studied|carried|opened|watched",
    "the broken clock|a field of barley|every letter in the box|a map of the coast|three silver coins|an old bridge",
    "before the rain began|while the others slept|without a word|for the second time|with great patience|at noon",
)
TASKS = (
    "Write a long story about what happened next.",
    "Explain in detail why this mattered.",
    "Describe the place where this happened at length.",
    "Write a detailed letter that mentions all of this.",
)
TOKENS_PER_WORD = 1.12  # about, of this English; the results have the server's own count


@dataclass(frozen=True)
class Target:
    """A server, and the size of the requests that it gets."""

    base_url: str
    model: str
    api_key: str = "none"
    is_chat: bool = False
    prompt_tokens: int = 64  # about
    shared_prefix: int = 0  # tokens, about, that all prompts begin with
    max_tokens: int = 128
    timeout: float = 600.0  # seconds for one request

    @property
    def url(self) -> str:
        return f"{self.base_url.rstrip('/')}/{'chat/completions' if self.is_chat else 'completions'}"

    def body(self, prompt: str) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {
            "model": self.model,
            **({"messages": messages} if self.is_chat else {"prompt": prompt}),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "max_tokens": self.max_tokens,
            "ignore_eos": True,  # every stream gives max_tokens
        }


@dataclass
class Stream:
    """The answer to one request; times in seconds after it was sent."""

    chunk_times: list[float] = field(default_factory=list)  # of the chunks with text
    end: float = 0.0  # when the finish reason came
    prompt_tokens: int = 0
    completion_tokens: int = 0  # 0: the server sent no usage
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        return self.completion_tokens or len(self.chunk_times)

    @property
    def tokens_per_s(self) -> float:
        return (self.num_tokens - 1) / max(self.end - self.chunk_times[0], 1e-9)

    @property
    def gaps(self) -> Iterator[float]:
        tokens_per_chunk = max(1.0, (self.num_tokens - 1) / max(1, len(self.chunk_times) - 1))
        for earlier, later in zip(self.chunk_times, self.chunk_times[1:], strict=False):
            yield (later - earlier) / tokens_per_chunk

    def take(self, event: dict[str, Any], now: float) -> None:
        if event.get("error"):
            raise ValueError(f"error in the stream: {event['error']}")
        if usage := event.get("usage"):
            self.prompt_tokens, self.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or choice
            if any(delta.get(name) for name in ("content", "text", "reasoning_content", "reasoning")):
                self.chunk_times.append(now)
            if choice.get("finish_reason"):
                self.end = now


@dataclass(frozen=True)
class Level:
    """The figures of one number of concurrent streams; times in ms, without the requests that failed."""

    concurrency: int
    requests: int
    errors: dict[str, int]
    short_answers: int  # fewer tokens than were asked for
    prompt_tokens: float  # of a request, mean
    output_tokens: int
    wall_s: float
    ttft_p50: float
    ttft_p99: float
    inter_token_p50: float
    inter_token_p99: float
    stream_tokens_per_s: float
    total_tokens_per_s: float


def make_text(rng: random.Random, num_tokens: int) -> str:
    num_words = max(4, round(num_tokens / TOKENS_PER_WORD))
    words: list[str] = []
    while len(words) < num_words:
        words += (" ".join(rng.choice(part.split("|")) for part in SENTENCE) + ".").split()
    return " ".join(words[:num_words]).rstrip(".") + "."


def make_prompts(target: Target, count: int, salt: str) -> list[str]:
    """Returns the same prompts for the same salt; behind the shared prefix, no two begin with the same words."""
    prefix = make_text(random.Random("shared"), target.shared_prefix) + "\n\n" if target.shared_prefix else ""
    prompts = []
    for number in range(count):
        rng = random.Random(f"{salt}/{number}")
        task = rng.choice(TASKS)
        text = make_text(rng, target.prompt_tokens - round(len(task.split()) * TOKENS_PER_WORD) - 10)
        prompts.append(f"{prefix}{rng.randrange(10**6):06d}: {text} {task}")
    return prompts


async def send(client: httpx2.AsyncClient, target: Target, prompt: str) -> Stream:
    """Sends one request; if it fails, the result has the error."""
    stream, sent = Stream(), time.perf_counter()
    try:
        async with client.stream("POST", target.url, json=target.body(prompt)) as response:
            if response.status_code != 200:
                raise ValueError(f"HTTP {response.status_code}: {(await response.aread())[:300]!r}")
            async for event in _events(response):
                stream.take(event, time.perf_counter() - sent)
        if not stream.chunk_times or not stream.end:
            raise ValueError("the stream had no text" if stream.end else "the stream broke off")
    except (httpx2.HTTPError, ValueError, KeyError) as error:
        stream.error = f"{type(error).__name__}: {error}"
    return stream


async def _events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        data = line.removeprefix("data:").strip()
        if line.startswith("data:") and data != "[DONE]":
            yield json.loads(data)


def open_client(target: Target) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(
        headers={"Authorization": f"Bearer {target.api_key}"},
        timeout=target.timeout,
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),  # some servers close idle ones
        trust_env=False,
    )


async def measure(target: Target, concurrency: int, num_requests: int, salt: str = "") -> Level:
    prompts = iter(make_prompts(target, num_requests, f"{salt}/{concurrency}"))
    streams: list[Stream] = []
    async with open_client(target) as client:

        async def send_in_turn() -> None:
            for prompt in prompts:  # the workers share the iterator
                streams.append(await send(client, target, prompt))

        start = time.perf_counter()
        await asyncio.gather(*(send_in_turn() for _ in range(concurrency)))
        wall = time.perf_counter() - start
    return summarize(target, concurrency, streams, wall)


def summarize(target: Target, concurrency: int, streams: list[Stream], wall: float) -> Level:
    good = [stream for stream in streams if stream.error is None]
    ttft = [stream.chunk_times[0] * 1e3 for stream in good]
    gaps = [gap * 1e3 for stream in good for gap in stream.gaps]
    num_tokens = sum(stream.num_tokens for stream in good)
    return Level(
        concurrency=concurrency,
        requests=len(streams),
        errors=dict(Counter(stream.error for stream in streams if stream.error)),
        short_answers=sum(stream.num_tokens < target.max_tokens for stream in good),
        prompt_tokens=sum(stream.prompt_tokens for stream in good) / max(1, len(good)),
        output_tokens=num_tokens,
        wall_s=wall,
        ttft_p50=percentile(ttft, 50),
        ttft_p99=percentile(ttft, 99),
        inter_token_p50=percentile(gaps, 50),
        inter_token_p99=percentile(gaps, 99),
        stream_tokens_per_s=statistics.median([stream.tokens_per_s for stream in good] or [0.0]),
        total_tokens_per_s=num_tokens / wall,
    )


def percentile(values: list[float], percent: float) -> float:
    """Returns the percentile by nearest rank: the p99 of few values is their largest. 0 for no values."""
    return sorted(values)[max(0, math.ceil(percent / 100 * len(values)) - 1)] if values else 0.0


HEAD = (
    "streams  requests  TTFT p50     p99 ms  inter-token p50    p99 ms"
    "  tokens/s per stream   total  prompt tokens  wall s"
)


def row(level: Level) -> str:
    return (
        f"{level.concurrency:7}  {level.requests:8}  {level.ttft_p50:8.0f} {level.ttft_p99:10.0f}"
        f"  {level.inter_token_p50:15.1f} {level.inter_token_p99:9.1f}"
        f"  {level.stream_tokens_per_s:19.1f} {level.total_tokens_per_s:7.1f}"
        f"  {level.prompt_tokens:13.0f}  {level.wall_s:6.1f}"
    )


def complaints(target: Target, level: Level) -> list[str]:
    """Returns what was wrong with the answers, in words; empty if nothing was."""
    short = f"{level.short_answers} answers had fewer than {target.max_tokens} tokens: the server ignores ignore_eos"
    return [f"{count} x {error}" for error, count in level.errors.items()] + [short] * bool(level.short_answers)


async def first_model(base_url: str) -> str:
    """Returns the first model that a server lists; exits where it cannot be asked."""
    try:
        async with httpx2.AsyncClient(trust_env=False) as client:
            response = await client.get(f"{base_url.rstrip('/')}/models")
            return str(response.raise_for_status().json()["data"][0]["id"])
    except httpx2.HTTPError as error:
        sys.exit(f"error: {base_url}: {error}")


async def warm_up(target: Target) -> None:
    """Sends one request, and exits if it fails. The shared prefix is then in the server's prefix cache."""
    level = await measure(target, 1, 1, "warm-up")
    if level.errors:
        sys.exit(f"error: {'; '.join(complaints(target, level))}")


async def run(target: Target, arguments: argparse.Namespace) -> list[Level]:
    """Prints the row of each measurement; returns each level's median one, by total tokens/s."""
    await warm_up(target)
    print(HEAD)
    chosen = []
    for concurrency, count in zip(arguments.concurrency, arguments.requests, strict=True):
        levels = []
        for repeat in range(arguments.repeat):
            levels.append(await measure(target, concurrency, count, f"{arguments.salt}/{repeat}"))
            print(row(levels[-1]), *complaints(target, levels[-1]), sep="\n  ", flush=True)
        levels.sort(key=lambda level: (bool(level.errors), level.total_tokens_per_s))
        chosen.append(levels[-1] if levels[-1].errors else levels[len(levels) // 2])
    return chosen


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="default: the first one that the server lists")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--chat", action="store_true", help="chat completions instead of completions")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="about")
    parser.add_argument("--shared-prefix", type=int, default=0, help="tokens that all prompts begin with, about")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=numbers, default=[1, 4, 16], help="such as 1,4,16")
    parser.add_argument("--requests", type=numbers, default=[3, 8, 16], help="in all, for each concurrency")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument(
        "--salt", default="", help="another one gives other prompts: for a server whose cache has these"
    )
    parser.add_argument("--json", type=Path, help="where to write the results")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    base_url, model = arguments.base_url, arguments.model or asyncio.run(first_model(arguments.base_url))
    names = ("api_key", "prompt_tokens", "shared_prefix", "max_tokens")
    target = Target(base_url, model, is_chat=arguments.chat, **{name: getattr(arguments, name) for name in names})
    levels = asyncio.run(run(target, arguments))
    if arguments.json:
        settings = {name: value for name, value in asdict(target).items() if name != "api_key"}
        arguments.json.write_text(json.dumps({**settings, "levels": [asdict(level) for level in levels]}, indent=1))
    sys.exit(1 if any(level.errors for level in levels) else 0)


if __name__ == "__main__":
    main()
