"""Wire: what the server itself costs per streamed token, with a model that computes nothing.

    python -m bench.wire

All but the forward is what users run: uvicorn, the app, templates, scheduler, detokenizer, chunks. The null model
gives each sequence the next token of a real text, at once or at fixed intervals. Measured in the server: processor time
of the event loop's thread per streamed token, and a heartbeat on the loop, missed where a tick comes after the next one
was due. At fixed intervals the loop sleeps and wakes between steps, which counts too: most with few streams.
"""

import argparse
import asyncio
import itertools
import json
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import httpx2
import torch
import uvicorn

from api.services import services_of
from bench.server import serving
from checkpoints import checkpoint
from checkpoints.progress import Progress
from config import Settings
from engine.batch import Batch
from engine.engine import Engine
from engine.kv_cache import CachePlan, KVCache
from engine.layer_spec import AttentionSpec
from engine.prefill_budget import PrefillBudget
from engine.sampling_params import SampledToken
from engine.scheduler import Limits, Scheduler
from engine.vision import Image
from main import create_app
from server.http_protocol import with_bounds
from serving.loading import LoadedModel, load_template
from text.logprobs import TokenTexts

HEARTBEAT = 0.5  # seconds
MAX_COST = 60.0  # microseconds of the event loop per token
LEVELS = (  # concurrent streams, tokens of each, seconds between two tokens of a stream
    (1, 1000, 0.0),
    (16, 1000, 0.0),
    (100, 400, 0.0),
    (16, 200, 0.05),
    (500, 100, 0.1),
)
WORDS = "The old lighthouse keeper measured the broken clock before the rain began, 安静地, and wrote it all down. "
CONTEXT = 2048


class NullRunner:
    """A model runner that gives every sequence the next token of one text, a batch per `interval` seconds."""

    def __init__(self, token_ids: list[int], num_embeddings: int) -> None:
        self.num_embeddings = num_embeddings
        self.num_tokens = 0
        self.interval = 0.0
        self._token_ids = token_ids
        self._next_step = 0.0

    def encode(self, images: list[Image], most: int) -> None:
        raise NotImplementedError

    def run(self, batch: Batch) -> list[list[SampledToken | None]]:
        time.sleep(max(0.0, self._next_step - time.monotonic()))
        self._next_step = time.monotonic() + self.interval
        complete = [span.sequence for span in batch.spans if span.is_complete]
        self.num_tokens += len(complete)
        return [[SampledToken(self._token_ids[s.num_output_tokens % len(self._token_ids)])] for s in complete]


def load_null(path: str, settings: Settings, progress: Progress) -> LoadedModel:
    """Loads the tokenizer and template of a real model, without its weights."""
    directory = checkpoint.fetch(path, settings.cache_dir, progress.report).directory
    template = load_template(directory, json.loads((directory / "config.json").read_text())["model_type"])
    token_ids = template.render_text(WORDS)
    runner = NullRunner(token_ids, len(template.tokenizer))
    specs = {0: AttentionSpec(1, 1, 1, None, torch.float32, torch.device("cpu"))}
    plan = CachePlan.fit(specs, 512 * CONTEXT * specs[0].bytes_per_token, 16, 512, CONTEXT)
    scheduler = Scheduler(KVCache(plan, specs), Limits(512, 1 << 16, 1 << 16, CONTEXT), frozenset())
    return LoadedModel(Engine(runner, scheduler), template, TokenTexts(template.tokenizer), {"temperature": 0.0})


class Gauge:
    """The event loop's processor time, and the heartbeats since the last reading."""

    def __init__(self) -> None:
        self.worst = 0.0  # largest delay of a tick, in seconds
        self.num_missed = 0

    async def beat(self) -> None:
        loop = asyncio.get_running_loop()
        for tick in itertools.count(1):
            if tick == 1:
                start = loop.time()
            await asyncio.sleep(start + tick * HEARTBEAT - loop.time())
            late = loop.time() - (start + tick * HEARTBEAT)
            self.worst = max(self.worst, late)
            self.num_missed += late > HEARTBEAT

    def read(self) -> dict[str, float]:
        reading = {"cpu_s": time.thread_time(), "worst_s": self.worst, "num_missed": self.num_missed}
        self.worst, self.num_missed = 0.0, 0
        return reading


def serve() -> None:
    """Serves the null model at HOST and PORT."""
    settings = Settings(_cli_parse_args=False, max_num_seqs=512)
    app = create_app(settings, load=load_null)
    gauge = Gauge()
    beats: list[asyncio.Task[None]] = []

    @app.get("/gauge")
    async def read(interval: float) -> dict[str, float]:
        if not beats:
            beats.append(asyncio.create_task(gauge.beat()))
        loaded = services_of(app).chat.first.loaded
        assert loaded is not None
        runner = cast(NullRunner, loaded.engine.runner)
        if interval != runner.interval:  # the budget was learned for another speed
            runner.interval = interval
            scheduler = loaded.engine.scheduler
            scheduler.prefill_budget = PrefillBudget(scheduler.limits.max_num_mixed_tokens)
        return {**gauge.read(), "num_tokens": runner.num_tokens}

    uvicorn.run(app, host=settings.host, port=settings.port, log_level="warning", http=with_bounds(settings))


@dataclass(frozen=True)
class Cost:
    streams: int
    interval_s: float
    tokens: int
    loop_us_per_token: float
    tokens_per_s: float
    worst_heartbeat_ms: float
    missed_heartbeats: int


def measure(port: int, streams: int, tokens: int, interval: float) -> Cost:
    url = f"http://127.0.0.1:{port}/gauge?interval={interval}"
    before = httpx2.get(url, trust_env=False).json()
    begin = time.perf_counter()
    _read_to_the_end([_request(port, tokens) for _ in range(streams)])
    wall = time.perf_counter() - begin
    after = httpx2.get(url, trust_env=False).json()
    counted = after["num_tokens"] - before["num_tokens"]
    cost = (after["cpu_s"] - before["cpu_s"]) / counted * 1e6
    return Cost(streams, interval, counted, cost, counted / wall, after["worst_s"] * 1e3, int(after["num_missed"]))


def _request(port: int, tokens: int) -> socket.socket:
    """Sends a streaming chat over a plain socket."""
    model = checkpoint.served_name(checkpoint.default_model_path())
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": tokens, "stream": True}
    text = json.dumps(body)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(f"{head}\r\nContent-Length: {len(text)}\r\n\r\n{text}".encode())
    connection.setblocking(False)
    return connection


def _read_to_the_end(connections: list[socket.socket]) -> None:
    """Reads all sockets every 0.2 s: a reader that is woken for each event would take the server's processor time."""
    tails = dict.fromkeys(connections, b"")
    unfinished = set(connections)
    while unfinished:
        time.sleep(0.2)
        for connection in list(unfinished):
            with suppress(BlockingIOError):
                while data := connection.recv(1 << 20):
                    tails[connection] = (tails[connection] + data)[-64:]
                unfinished.remove(connection)
                connection.close()
    failed = sum(b"data: [DONE]" not in tail for tail in tails.values())
    if failed:
        sys.exit(f"error: {failed} of {len(tails)} streams did not end with [DONE]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true", help="be the server, at HOST and PORT")
    parser.add_argument("--json", type=Path, help="where to write the results")
    arguments = parser.parse_args()
    if arguments.serve:
        return serve()
    costs = measure_all()
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(cost) for cost in costs]))


def measure_all() -> list[Cost]:
    with serving(sys.executable, "-m", "bench.wire", "--serve") as server:
        server.wait_until_ready()
        print("streams  pace s  loop us/token  tokens/s  worst heartbeat ms  missed")
        costs = []
        for level in LEVELS:
            cost = measure(server.port, *level)
            costs.append(cost)
            print(
                f"{cost.streams:7d}  {cost.interval_s:6.2f}  {cost.loop_us_per_token:13.1f}  {cost.tokens_per_s:8.0f}"
                f"  {cost.worst_heartbeat_ms:18.1f}  {cost.missed_heartbeats:6d}",
                flush=True,
            )
        return costs


if __name__ == "__main__":
    main()
