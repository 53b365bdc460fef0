"""What the page is tried against: the real server with its demo model, and a provider whose models do what their
names say.

It is told what to do by lines of JSON, and answers each with one: {"do": "start", "API_KEYS": "..."}, {"do": "end"},
{"do": "kill"}, {"do": "asked"}.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from process import Server, serve
from upstreams import Asked, Reply, Upstream, chunk, event, told, upstream

HOSTILE = """<img src=x onerror="document.title='owned'"> <script>document.title='owned'</script>

[one](javascript:document.title='owned') [two](data:text/html,owned) ![three](https://outside.invalid/x.png)

[four](https://example.invalid/"onmouseover="x) **<b>bold</b>**

```<img src=x onerror=alert(1)>
<svg onload="document.title='owned'">
```
"""
LONG = "\n\n".join(
    [
        "# A title",
        "A paragraph with `code`, **bold** text and [a link](https://example.invalid/).",
        "| name | value |\n|---|---|\n" + "\n".join(f"| row {i} | {'long ' * 30} |" for i in range(3)),
        "1. one\n   - inner\n2. two",
        "> a quote",
        "```python\nprint(" + "'long' + " * 60 + "'')\n```",
        "word" * 200,
    ]
)
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}


def streamed(*deltas: dict[str, Any] | float, reason: str = "stop") -> Reply:
    pieces = [delta if isinstance(delta, float) else event(chunk(delta)) for delta in deltas]
    usage = {"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19}
    last = [event(chunk({}, reason)), event({**chunk({}), "choices": [], "usage": usage}), event("[DONE]")]
    return Reply.stream(event(chunk({"role": "assistant", "content": ""})), *pieces, *last)


def thinks(body: Any) -> Reply:
    thoughts = [{"reasoning_content": "Let me think "}, 0.6, {"reasoning_content": "of **this**."}, 0.6]
    return streamed(*thoughts, {"content": "The answer is 42."})


def calls(body: Any) -> Reply:
    if body["messages"][-1]["role"] == "tool":
        return streamed({"content": f"The tool says: {body['messages'][-1]['content']}"})
    parts = [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in ('{"city":', '"Oslo"}')]
    return streamed({"tool_calls": [CALL]}, *parts, reason="tool_calls")


def sees(body: Any) -> Reply:
    content = body["messages"][-1]["content"]
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    return streamed({"content": f"{len(urls)} image(s), the first {urls[0][:22]}"})


def counts(body: Any) -> Reply:
    numbers = [part for number in range(300) for part in ({"content": f"{number} "}, 0.05)]
    return streamed(*numbers)


def breaks(body: Any) -> Reply:
    return Reply.stream(*told("Half an ", done=False)[:2], 0.2, None)


MODELS = {
    **{"thinks": thinks, "calls": calls, "sees": sees, "counts": counts, "breaks": breaks},
    "attacks": lambda body: streamed({"content": HOSTILE}),
    "writes": lambda body: streamed({"content": LONG}),
}


def answer(asked: Asked) -> Reply:
    if asked.method == "GET":
        return Reply.of({"object": "list", "data": [{"id": name} for name in MODELS]})
    return MODELS[asked.body["model"]](asked.body)


class Stage:
    """The server, whose port stays the same from one start to the next."""

    def __init__(self, provider: Upstream) -> None:
        self.provider = provider
        self.stack = ExitStack()
        self.port = "0"
        self.server: Server | None = None

    def start(self, **settings: str) -> dict[str, str]:
        self.end()
        given = {"MAX_MODEL_LEN": "4096", "PROVIDERS": f"fake={self.provider.url}/v1", "SHUTDOWN_TIMEOUT": "1"}
        command = [sys.executable, "main.py", "--port", self.port]
        self.server = self.stack.enter_context(serve(command, is_cold=True, **given, **settings))
        self.port = self.server.url.rpartition(":")[2]
        return {"url": self.server.url}

    def end(self) -> dict[str, str]:
        self.stack.close()
        return {}

    def kill(self) -> dict[str, str]:
        assert self.server is not None
        self.server.process.kill()
        return self.end()

    def asked(self) -> dict[str, Any]:
        """The last request that the provider got."""
        last = next(asked for asked in reversed(self.provider.asked) if asked.method == "POST")
        return {"body": last.body, "hasLeft": last.left_at is not None}


def main() -> None:
    with upstream(answer) as provider:
        stage = Stage(provider)
        with stage.stack:
            for line in sys.stdin:
                command = json.loads(line)
                done = getattr(stage, command.pop("do"))(**command)
                print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
