"""The requests of bench.soak: what each client may ask, what must come back, and a verdict on each answer."""

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

TIMEOUT = 120.0  # seconds for one request
MAX_TOKENS = 32

Object = dict[str, Any]


@dataclass(frozen=True)
class Ask:
    """A request, and what its answer must be."""

    kind: str
    path: str
    body: Object | bytes | None = None  # None: a GET
    status: int = 200
    answer: str | None = None  # the text that a greedy request was answered with when it was alone
    leaves_after: float | None = None  # seconds after which the client disconnects
    complaint: Callable[[list[Object]], str] = field(default=lambda parsed: "")  # objects -> what is wrong, or ""

    @property
    def is_stream(self) -> bool:
        return isinstance(self.body, dict) and bool(self.body.get("stream"))

    @property
    def content(self) -> bytes:
        """The bytes of the request, with its head."""
        body = b"" if self.body is None else self.body
        text = body if isinstance(body, bytes) else json.dumps(body).encode()
        method = "GET" if self.body is None else "POST"
        head = f"{method} {self.path} HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
        return f"{head}Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text


@dataclass(frozen=True)
class Reply:
    """An answer, as far as it came."""

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
    """Yields the chunks of a chunked body, as far as it came."""
    at = 0
    while (end := rest.find(b"\r\n", at)) >= 0 and (size := int(rest[at:end] or b"0", 16)):
        yield rest[end + 2 : end + 2 + size]
        at = end + size + 4


async def send(port: int, ask: Ask) -> Reply | None:
    """Sends over a new connection. Returns None if the client left, raises TimeoutError after TIMEOUT."""
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


# --- answers


class Lost(Exception):
    """A stream ended without [DONE] or an error."""


def objects_of(ask: Ask, reply: Reply) -> list[Object]:
    """Parses an answer or a stream's chunks. Raises Lost for a stream without an end, ValueError for an error in it."""
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
    """Returns the text of each choice."""
    texts: dict[int, str] = {}
    for item in parsed:
        for index, text in _texts(item):
            texts[index] = texts.get(index, "") + text
    return list(texts.values())


def _texts(item: Object) -> Iterator[tuple[int, str]]:
    """Yields (choice, text) of a chat completion, a completion, a response, or a chunk of one."""
    if item.get("type") == "response.output_text.delta":
        yield 0, item["delta"]
    for message in item.get("output") or ():
        yield from ((0, part["text"]) for part in message.get("content", ()) if part["type"] == "output_text")
    for choice in item.get("choices") or ():
        part = choice.get("message") or choice.get("delta") or choice
        yield choice["index"], part.get("content") or part.get("text") or ""


def verdict(ask: Ask, reply: Reply | None) -> str:
    """Returns `ok`, `left`, or what is wrong."""
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
    """Returns what is wrong with an answer that must match SCHEMA, unless its length cut it."""
    ends = [choice["finish_reason"] for item in parsed for choice in item.get("choices") or ()]
    if "stop" not in ends:
        return ""
    return "" if isinstance(json.loads(texts_of(parsed)[0]).get("n"), int) else "not what the schema says"


def complaint_of_logprobs(parsed: list[Object]) -> str:
    choices = [choice for item in parsed for choice in item.get("choices") or ()]
    scores = [token["logprob"] for choice in choices for token in (choice.get("logprobs") or {}).get("content", ())]
    return "" if scores and all(score <= 0 for score in scores) else "no logprobs"


# --- kinds of requests


@dataclass(frozen=True)
class World:
    """The model and prompts that the requests of a run are made from."""

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
WRONG: tuple[tuple[str, str, Object | bytes, int], ...] = (  # name, path, change of a valid body, status
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
    """Stops at a string of the greedy answer."""
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
    name, path, change, status = rng.choice(WRONG)
    body = change if isinstance(change, bytes) else {**world.chat(rng), **change}
    return Ask(f"wrong: {name}", path, body, status)


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
