"""A server whose providers are fake ones on this machine."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from process import MAIN, Server, serve
from upstreams import Asked, Reply, Upstream, completion, message, message_events, told, upstream

KEYS = {name: f"sk-secret-{name.lower()}" for name in ("OPENAI", "GOOGLE", "ANTHROPIC", "DEEPSEEK", "MINMAX")}
KEYS["OLLAMA"] = "zz-SECRET0123456789"  # of no known form
KEYS["MY_GROQ"] = "zz-groq-SECRET012345"
HELLO = [{"role": "user", "content": "你好！"}]


@dataclass
class Gateway:
    server: Server
    providers: dict[str, Upstream]

    def post(
        self, path: str, timeout: float = 30, headers: dict[str, str] | None = None, **body: Any
    ) -> httpx2.Response:
        return httpx2.post(f"{self.server.url}/v1/{path}", json=body, timeout=timeout, headers=headers)

    def chat(self, model: str, **body: Any) -> httpx2.Response:
        return self.post("chat/completions", **{"model": model, "messages": HELLO, **body})

    def reset(self) -> None:
        """Providers answer what is right again, and have been asked nothing."""
        for provider in self.providers.values():
            provider.script = answer
            provider.asked.clear()


def answer(asked: Asked) -> Reply:
    """What each of them says to a request that is right."""
    if asked.method == "GET":
        return Reply.of({"object": "list", "data": [{"id": "models/one"}, {"id": "two"}]})
    if asked.path.endswith("/messages"):
        return Reply.stream(*message_events("Hi", "!")) if asked.body.get("stream") else Reply.of(message("Hi!"))
    if asked.path.endswith("/embeddings"):
        return Reply.of({"object": "list", "data": [], "model": "theirs", "usage": {}})
    return Reply.stream(*told("Hi", "!")) if asked.body.get("stream") else Reply.of(completion("Hi!"))


@contextmanager
def running_gateway(checkpoint: Path) -> Iterator[Gateway]:
    names = ("openai", "gemini", "claude", "deepseek", "deepseek-whole", "minmax", "ollama", "my-groq", "keyless")
    with ExitStack() as stack:
        found = {name: stack.enter_context(upstream(answer)) for name in names}
        settings = {
            **{f"{name}_API_KEY": key for name, key in KEYS.items()},
            "OPENAI_BASE_URL": found["openai"].url + "/v1",
            "GEMINI_BASE_URL": found["gemini"].url + "/v1beta/openai/",
            "ANTHROPIC_BASE_URL": found["claude"].url,
            "DEEPSEEK_API_URL": found["deepseek"].url,
            "DEEPSEEK_API_ENDPOINT_NONSTREAM": found["deepseek-whole"].url + "/chat/completions",
            "MINMAX_API_URL": found["minmax"].url + "/v1/text/chatcompletion_v2",
            "OLLAMA_BASEURL": found["ollama"].url + "/",
            "OLLAMA_API_KEY": KEYS["OLLAMA"],
            "OLLAMA_TIMEOUT": "2 # 秒",
            "PROVIDERS": f"my-groq={found['my-groq'].url}/openai/v1/,keyless={found['keyless'].url}/v1",
            "GATEWAY_TIMEOUT": "2",
            "MODEL_ALIASES": "old-gpt=openai/gpt-new,mine=Tiny-Qwen3,other=openai/模型",
            "MODEL_FALLBACKS": "openai/falls=claude/second;openai/lands=Tiny-Qwen3",
            "LOG_LEVEL": "info",
        }
        server = stack.enter_context(
            serve(MAIN, MODEL_PATH=str(checkpoint), MAX_MODEL_LEN="480", DTYPE="float32", **settings)
        )
        server.wait_until_healthy()
        yield Gateway(server, found)
