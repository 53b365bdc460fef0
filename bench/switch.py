"""Switch: clients that ask different models of one server, of which only some fit into memory at a time.

    MODELS_DIR=/models MODELS_MEMORY=2GiB python -m bench.switch --clients 8 --requests 200

Each client draws a model and a kind of request: a whole answer, a stream, or the list of models. Greedy answers are
taken first, one model after the other, and must be the same later. A 503 with Retry-After is waited out and counted;
anything else that is not an answer is an error. Prints the memory of the process after each round. Exits with 1 after
an error.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx2
import psutil

from bench.server import serving

TIMEOUT = 600.0  # seconds
LOG_TAIL = 60000  # characters
QUESTION = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 16, "temperature": 0}
MB = 1e6


@dataclass
class Outcome:
    counts: Counter[str] = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


async def ask(client: httpx2.AsyncClient, model: str, outcome: Outcome, stream: bool = False) -> str:
    """Returns the text of an answer; waits as long as a 503 says."""
    while True:
        answer = await client.post("/v1/chat/completions", json={"model": model, "stream": stream, **QUESTION})
        if answer.status_code != 503:
            break
        outcome.counts["503 with Retry-After"] += 1
        await asyncio.sleep(float(answer.headers["retry-after"]))
    answer.raise_for_status()
    outcome.counts["streams" if stream else "whole answers"] += 1
    return _streamed(answer.text) if stream else str(answer.json()["choices"][0]["message"]["content"])


def _streamed(events: str) -> str:
    assert events.rstrip().endswith("data: [DONE]"), "a stream was cut"
    chunks = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: {")]
    assert not any("error" in chunk for chunk in chunks), events[-500:]
    return "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])


async def names(client: httpx2.AsyncClient) -> list[str]:
    listed = (await client.get("/v1/models")).json()["data"]
    return [model["id"] for model in listed if model.get("kind") == "chat"]


async def one_client(
    client: httpx2.AsyncClient, draw: random.Random, num_requests: int, expected: dict[str, str], outcome: Outcome
) -> None:
    for _ in range(num_requests):
        model, begin = draw.choice([*expected]), time.monotonic()
        try:
            if draw.random() < 0.1:
                assert set(await names(client)) >= set(expected)
                outcome.counts["lists"] += 1
            elif await ask(client, model, outcome, stream=draw.random() < 0.5) != expected[model]:
                outcome.errors.append(f"{model}: another answer")
        except (httpx2.HTTPError, AssertionError, KeyError) as error:
            outcome.errors.append(f"{model}: {type(error).__name__}: {error}")
        outcome.seconds.append(time.monotonic() - begin)


async def run(url: str, process: psutil.Process, num_clients: int, num_requests: int, rounds: int) -> Outcome:
    outcome = Outcome()
    async with httpx2.AsyncClient(base_url=url, timeout=TIMEOUT) as client:
        expected = {model: await ask(client, model, outcome) for model in await names(client)}
        print(f"{len(expected)} models: {', '.join(expected)}")
        for number in range(rounds):
            draws = [random.Random(f"{number} {each}") for each in range(num_clients)]
            share = num_requests // num_clients
            await asyncio.gather(*(one_client(client, draw, share, expected, outcome) for draw in draws))
            print(f"round {number + 1}: {process.memory_info().rss / MB:.0f} MB, {len(process.threads())} threads")
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200, help="in each round")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    with serving() as server:
        server.wait_until_ready()
        outcome = asyncio.run(run(server.url, server.process, options.clients, options.requests, options.rounds))
        log = server.output.read_text()
        if server.process.poll() is not None:
            sys.exit(f"error: the server ended with status {server.process.returncode}\n{log[-LOG_TAIL:]}")
        swaps = log.count(" was unloaded")
    waits = sorted(outcome.seconds)
    print(f"{dict(outcome.counts)}, {swaps} models unloaded")
    print(f"median {waits[len(waits) // 2]:.2f} s, longest {waits[-1]:.1f} s")
    for error in outcome.errors:
        print("error:", error)
    sys.exit(bool(outcome.errors))


if __name__ == "__main__":
    main()
