"""Conversations in Claude Code's form: each turn computes only what is new."""

from collections.abc import Iterator
from os.path import commonprefix
from typing import Any

import httpx2
import pytest
from anthropic_requests import events, folded
from claude_code_requests import HEADERS, ClaudeCodeSession, tool_result
from genuine_templates import source_of
from models import FAMILIES, RECURRENT, byte_tokenizer
from process import MAIN, Server, serve

from api.messages.input import as_chat
from api.messages.schemas import MessagesRequest

BLOCK = 16  # tokens, of which only full ones are found in the cache
TEMPLATES = {  # family -> a genuine template of it
    "qwen2": "Qwen-Qwen2.5-7B-Instruct",
    "qwen3": "Qwen-Qwen3-0.6B",
    "qwen3_5": "Qwen3.5-4B",
    "llama": "meta-llama-Llama-3.2-3B-Instruct",
}
DEFERRED = {"DeferredToolPlaceholder"}
SHORT_THOUGHTS = {"type": "enabled", "budget_tokens": 20, "display": "updates"}
KEEPING = ("qwen2", "llama")  # whose templates write every earlier turn as it was; the others leave its thoughts out


@pytest.fixture(scope="module", params=TEMPLATES)
def agent(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[tuple[Server, bool]]:
    """A tiny model with a token per byte, and a genuine template."""
    directory, tokenizer = tmp_path_factory.mktemp(request.param), byte_tokenizer(has_marks=True)
    tokenizer.chat_template = source_of(TEMPLATES[request.param])
    model_class, config = {**FAMILIES, **RECURRENT}[request.param]
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 32768}
    model_class(type(config)(**{**config.to_dict(), **own})).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    with serve(MAIN, MODEL_PATH=str(directory), DTYPE="float32", SERVED_MODEL_NAME="m") as server:
        server.wait_until_healthy()
        yield server, request.param in KEEPING


def ask(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    reply = httpx2.post(f"{server.url}/v1/messages?beta=true", json=body, headers=HEADERS, timeout=120)
    assert reply.status_code == 200, reply.text
    assert "x-ignored-fields" not in reply.headers
    told = folded(events(reply.text))
    assert "stop_reason" in told, reply.text
    return told


def prompt_of(server: Server, body: dict[str, Any]) -> list[int]:
    """The tokens of a request's prompt, by another endpoint."""
    chat = as_chat(MessagesRequest.model_validate(body))
    tools = [tool for tool in chat.tools or () if tool["function"]["name"] not in DEFERRED]
    messages = [message.model_dump(exclude_none=True) for message in chat.messages]
    switches = {"reasoning_effort": chat.reasoning_effort, "enable_thinking": chat.enable_thinking}
    reply = server.post("/tokenize", messages=messages, tools=tools, **switches)
    return list(reply.json()["tokens"])


def test_ten_turns_find_all_but_the_new_turn_in_the_cache(agent: tuple[Server, bool]) -> None:
    """Each turn is a call, its result, and an answer in words."""
    server, keeps_all = agent
    session = ClaudeCodeSession("m", num_tools=16, scale=0.05)
    before: list[int] = []
    for turn in range(10):
        body = session.ask(f"Do the thing number {turn}. {'x' * turn}")
        for choice in ({"type": "tool", "name": "CronList"}, {"type": "auto"}):
            body |= {"tool_choice": choice, "thinking": SHORT_THOUGHTS, "max_tokens": 60, "temperature": 0}
            prompt = prompt_of(server, body)
            num_shared = len(commonprefix([before, prompt]))
            assert num_shared == len(before) or not keeps_all
            told = ask(server, body)
            usage = told["usage"]
            assert usage["input_tokens"] + usage["cache_read_input_tokens"] == len(prompt)
            known = max(0, min(num_shared, len(before) - 1)) // BLOCK * BLOCK
            assert usage["cache_read_input_tokens"] >= known, (turn, choice, num_shared, usage)
            before = prompt
            session.answered(*told["content"])
            if choice["type"] == "tool":
                (call,) = (block for block in told["content"] if block["type"] == "tool_use")
                body = session.return_results(tool_result(call, f"{turn} jobs", is_error=False))
