"""Relay: what this server adds to each chunk of another provider's stream.

    python -m bench.relay

A provider in a process of its own sends chunks that hold the time of sending. Many clients at once read them directly,
and then through this server. Only the relay is measured: this server's model is loaded, but not used.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time

import httpx2

from bench.server import serving

STREAMS, CHUNKS, PAUSE, ROUNDS = 100, 40, 0.05, 3  # seconds between the chunks of a stream


async def provider() -> None:
    """Prints its port, and serves until the process is ended."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
        )
        await reader.readexactly(length)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n")
        for _ in range(CHUNKS):
            await asyncio.sleep(PAUSE)
            choice = {"index": 0, "delta": {"content": f"{time.perf_counter_ns()} "}, "finish_reason": None}
            chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            writer.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


async def delays(url: str) -> list[float]:
    """Returns the time from sending to arrival of every chunk of all streams, in ms."""
    times: list[float] = []

    async def read(client: httpx2.AsyncClient, number: int) -> None:
        await asyncio.sleep(PAUSE * number / STREAMS)  # not all at the same moment
        body = {"model": "openai/m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        async with client.stream("POST", f"{url}/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    sent = int(json.loads(line[6:])["choices"][0]["delta"]["content"])
                    times.append((time.perf_counter_ns() - sent) / 1e6)

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=60, limits=limits) as client:
        await asyncio.gather(*(read(client, number) for number in range(STREAMS)))
    assert len(times) == STREAMS * CHUNKS
    return times


def quantiles(values: list[float]) -> tuple[float, float]:
    """Returns the median and the 99th percentile."""
    return statistics.median(values), statistics.quantiles(values, n=100)[98]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", action="store_true", help="be the provider")
    if parser.parse_args().provider:
        asyncio.run(provider())
    else:
        measure()


def measure() -> None:
    command = [sys.executable, "-m", "bench.relay", "--provider"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as upstream:
        assert upstream.stdout is not None
        direct = f"http://127.0.0.1:{upstream.stdout.readline().strip()}/v1"
        try:
            with serving(OPENAI_API_KEY="x", OPENAI_BASE_URL=direct) as server:
                server.wait_until_ready()
                for _ in range(ROUNDS):
                    compare(direct, f"{server.url}/v1")
        finally:
            upstream.terminate()


def compare(direct: str, relay: str) -> None:
    alone, relayed = asyncio.run(delays(direct)), asyncio.run(delays(relay))
    (a, a99), (b, b99) = quantiles(alone), quantiles(relayed)
    print(
        f"{STREAMS} streams: direct {a:.2f} ms (p99 {a99:.1f}), relayed {b:.2f} ms (p99 {b99:.1f}), "
        f"added {b - a:.2f} ms",
        flush=True,
    )


if __name__ == "__main__":
    main()
