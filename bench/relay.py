"""Relay: what this server adds to each chunk of another provider's stream.

    python -m bench.relay

A provider in a process of its own sends chunks with the time in them, to many clients at once, who read them directly
and through this server, in turns. Nothing but the relay is measured: the model behind this server is not used.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time

import httpx2

STREAMS, CHUNKS, PAUSE, ROUNDS = 100, 40, 0.05, 3  # seconds between the chunks of a stream


async def provider() -> None:
    """Serves until it is ended; prints its port."""

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
    """Of every chunk of all streams, from its sending to its arrival, in ms."""
    found: list[float] = []

    async def read(client: httpx2.AsyncClient, number: int) -> None:
        await asyncio.sleep(PAUSE * number / STREAMS)  # not all at the same moment
        body = {"model": "openai/m", "messages": [{"role": "user", "content": "Hi"}], "stream": True}
        async with client.stream("POST", f"{url}/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    sent = int(json.loads(line[6:])["choices"][0]["delta"]["content"])
                    found.append((time.perf_counter_ns() - sent) / 1e6)

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=60, limits=limits) as client:
        await asyncio.gather(*(read(client, number) for number in range(STREAMS)))
    assert len(found) == STREAMS * CHUNKS
    return found


def quantiles(values: list[float]) -> tuple[float, float]:
    return statistics.median(values), statistics.quantiles(values, n=100)[98]


def main() -> None:
    own = [sys.executable, "-m", "bench.relay", "provider"]
    with subprocess.Popen(own, stdout=subprocess.PIPE, text=True) as upstream:
        assert upstream.stdout is not None
        direct = f"http://127.0.0.1:{upstream.stdout.readline().strip()}/v1"
        keys = {"OPENAI_API_KEY": "x", "OPENAI_BASE_URL": direct, "PORT": "18099", "HOST": "127.0.0.1"}
        server = subprocess.Popen(
            [sys.executable, "main.py"],
            env={**os.environ, **keys},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while True:
                time.sleep(0.5)
                try:
                    if httpx2.get("http://127.0.0.1:18099/health").status_code == 200:
                        break
                except httpx2.HTTPError:
                    continue
            for _ in range(ROUNDS):
                alone, relayed = asyncio.run(delays(direct)), asyncio.run(delays("http://127.0.0.1:18099/v1"))
                (a, a99), (b, b99) = quantiles(alone), quantiles(relayed)
                print(f"{STREAMS} streams: direct {a:.2f} ms (p99 {a99:.1f}), relayed {b:.2f} ms (p99 {b99:.1f}), "
                      f"added {b - a:.2f} ms", flush=True)  # fmt: skip
        finally:
            server.terminate()
            server.wait()
            upstream.terminate()


if __name__ == "__main__":
    asyncio.run(provider()) if sys.argv[1:] == ["provider"] else main()
