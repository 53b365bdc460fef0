"""A model of this server through other protocols and back: by a translating gateway that nobody here wrote, and by the
route for OpenAI."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from process import MAIN, Server, serve
from pydantic import BaseModel, Field

MODEL = "qwen2.5-coder-0.5b"
HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three colours."}]


class Weather(BaseModel):
    """The weather of a city."""

    city: str = Field(description="the city's name")


@contextmanager
def rosetta(directory: Path, backend: str) -> Iterator[str]:
    """The Messages API in front of an OpenAI server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    provider = {"type": "openai_chat", "api_key": "none", "base_url": backend + "/v1"}
    config = {
        "config_version": 3,
        "providers": {"ours": provider},
        "models": {MODEL: {"provider": "ours", "capabilities": ["text", "tools"]}},
        "server": {"host": "127.0.0.1", "port": port, "open_on_no_keys": True, "admin_password": "x"},
    }
    (directory / "rosetta.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "llm_rosetta.gateway", "--config", str(directory / "rosetta.json")]
    process = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def relaying(demo_server: Server, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    with rosetta(tmp_path_factory.mktemp("rosetta"), demo_server.url) as url:
        keys = {"ANTHROPIC_API_KEY": "x", "OPENAI_API_KEY": "x", "OPENAI_BASE_URL": demo_server.url + "/v1"}
        with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), DTYPE="float32", ANTHROPIC_BASE_URL=url, **keys) as server:
            server.wait_until_healthy()
            with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
                yield client


@pytest.mark.thinned(2)
@pytest.mark.parametrize("prefix", ["claude", "openai"])
def test_text_comes_back_as_it_was_said(relaying: OpenAI, demo_client: OpenAI, prefix: str) -> None:
    options: dict[str, Any] = {"messages": HELLO, "temperature": 0, "max_tokens": 24}
    direct = demo_client.chat.completions.create(model=MODEL, **options)
    whole = relaying.chat.completions.create(model=f"{prefix}/{MODEL}", **options)
    assert whole.choices[0].message.content == direct.choices[0].message.content
    assert whole.choices[0].finish_reason == direct.choices[0].finish_reason
    assert whole.usage and direct.usage and whole.usage.completion_tokens == direct.usage.completion_tokens
    usage = {"include_usage": True}
    chunks = list(
        relaying.chat.completions.create(model=f"{prefix}/{MODEL}", stream=True, stream_options=usage, **options)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == direct.choices[0].message.content
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == direct.usage.completion_tokens


@pytest.mark.thinned(2)
@pytest.mark.parametrize("prefix", ["claude", "openai"])
def test_a_tool_is_called_and_its_result_is_read(relaying: OpenAI, prefix: str) -> None:
    question: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
    options: dict[str, Any] = {"model": f"{prefix}/{MODEL}", "temperature": 0, "max_tokens": 60}
    tools = [openai.pydantic_function_tool(Weather)]
    calling = {"tools": tools, "tool_choice": "required", "parallel_tool_calls": False}
    whole = relaying.chat.completions.create(messages=question, **calling, **options).choices[0]
    (call,) = whole.message.tool_calls or ()
    assert whole.finish_reason == "tool_calls" and json.loads(call.function.arguments) == {"city": "Oslo"}
    with relaying.chat.completions.stream(messages=question, **calling, **options) as stream:
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert json.loads(streamed.function.arguments) == {"city": "Oslo"}
    said = {"role": "assistant", "tool_calls": [call.model_dump()]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "snow"}
    thanks = {"role": "user", "content": "Thanks. Is it cold there?"}
    answer = relaying.chat.completions.create(messages=[*question, said, result, thanks], **options)
    assert answer.choices[0].message.content


def test_an_error_behind_two_gateways_keeps_its_meaning(relaying: OpenAI) -> None:
    for prefix in ("claude", "openai"):
        with pytest.raises(openai.APIStatusError) as refusal:
            relaying.chat.completions.create(model=f"{prefix}/nobody", messages=HELLO)
        assert refusal.value.status_code in (400, 404)
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        relaying.chat.completions.create(model=f"openai/{MODEL}", messages=HELLO, max_tokens=50_000)


def test_other_endpoints_of_openai_are_relayed_too(relaying: OpenAI, demo_client: OpenAI) -> None:
    options: dict[str, Any] = {"prompt": "def add(a, b):", "max_tokens": 8, "temperature": 0}
    direct = demo_client.completions.create(model=MODEL, **options).choices[0].text
    assert relaying.completions.create(model=f"openai/{MODEL}", **options).choices[0].text == direct
    response = relaying.responses.create(model=f"openai/{MODEL}", input="Hi", max_output_tokens=8, temperature=0)
    events = list(relaying.responses.create(model=f"openai/{MODEL}", input="Hi", max_output_tokens=8, stream=True))
    assert response.output_text and events[-1].type in ("response.completed", "response.incomplete")
    assert httpx2.get(str(relaying.base_url) + "models", timeout=10).json()["data"][0]["id"]
