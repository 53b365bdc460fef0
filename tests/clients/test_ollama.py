"""Ollama's own client talks to the server as to Ollama, and validates every answer with its types."""

import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import pytest
from conftest import interpreter
from openai import OpenAI
from process import Server, serve
from pydantic import BaseModel
from test_samples import run

MODEL, EMBEDDER = "qwen2.5-coder-0.5b", "all-minilm-l6-v2"
HELLO = [{"role": "user", "content": "Say hello."}]
PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc00000"
        "0301010018dd8db00000000049454e44ae426082"
    )
).decode()


class Friend(BaseModel):
    name: str
    age: int


def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


@pytest.fixture(scope="module")
def served() -> Iterator[Server]:
    """A server of its own: embedding models that were used are listed, and other tests know of one model."""
    with serve([interpreter("SERVER_PYTHON"), "main.py", "--port", "0"], MAX_MODEL_LEN="4096") as server:
        server.wait_until_healthy()
        yield server


@pytest.fixture
def client(served: Server) -> Iterator[ollama.Client]:
    with ollama.Client(host=served.url) as client:
        yield client


def test_models_are_listed_and_shown(client: ollama.Client) -> None:
    [model] = [model for model in client.list().models if model.model and model.model.startswith(MODEL)]
    assert model.model == f"{MODEL}:latest" and model.size and model.details and model.modified_at and model.digest
    assert model.details.family == "qwen2" and model.details.format == "gguf"
    for name in (MODEL, model.model, f"{MODEL}:0.5b"):
        shown = client.show(name)
        assert shown.modelinfo and shown.modelinfo["general.architecture"] == "qwen2" and shown.template
        assert shown.modelinfo["qwen2.context_length"] == 4096
        assert shown.capabilities == ["completion", "tools", "insert"]
    [running] = [model for model in client.ps().models if model.model == f"{MODEL}:latest"]
    assert running.context_length == 4096 and running.size and running.size_vram == 0 and running.expires_at


def test_a_chat_is_that_of_chat_completions(client: ollama.Client, served: Server) -> None:
    options = {"temperature": 0, "num_predict": 30, "num_ctx": 2048}
    whole = client.chat(MODEL, messages=HELLO, options=options, keep_alive="5m")
    assert whole.done and whole.done_reason in ("stop", "length") and whole.created_at
    parts = list(client.chat(MODEL, messages=HELLO, options=options, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert [part.done for part in parts[-2:]] == [False, True] and parts[-1].done_reason == whole.done_reason
    with OpenAI(base_url=served.url + "/v1", api_key="unused") as sdk:
        theirs = sdk.chat.completions.create(model=MODEL, messages=HELLO, temperature=0, max_tokens=30)
    assert theirs.usage and theirs.choices[0].message.content == whole.message.content
    for last in (whole, parts[-1]):
        assert (last.prompt_eval_count, last.eval_count) == (theirs.usage.prompt_tokens, theirs.usage.completion_tokens)
        assert last.total_duration and last.eval_duration and last.prompt_eval_duration
        assert last.total_duration >= last.eval_duration + last.prompt_eval_duration > 10**6  # nanoseconds


def test_a_round_of_tools_goes_to_its_end(client: ollama.Client) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is 3 plus 4? Use the tool add."}]
    options = {"temperature": 0, "num_predict": 200}
    answer = client.chat(MODEL, messages=messages, tools=[add], options=options)
    assert answer.message.tool_calls, answer.message.content
    [call] = answer.message.tool_calls
    assert call.function.name == "add" and dict(call.function.arguments) == {"a": 3, "b": 4}
    streamed = client.chat(MODEL, messages=messages, tools=[add], options=options, stream=True)
    found = [call for part in streamed for call in part.message.tool_calls or ()]
    assert [call.function.model_dump() for call in found] == [call.function.model_dump()]
    messages += [answer.message, {"role": "tool", "tool_name": "add", "content": str(add(**call.function.arguments))}]
    last = client.chat(MODEL, messages=messages, options=options)  # with tools, so small a model calls again
    assert "7" in (last.message.content or "")


def test_a_format_holds(client: ollama.Client) -> None:
    messages = [{"role": "user", "content": "I have a friend called Ann, who is 22 years old. Answer as JSON."}]
    options = {"temperature": 0, "num_predict": 200}
    answer = client.chat(MODEL, messages=messages, format=Friend.model_json_schema(), options=options)
    assert Friend.model_validate_json(answer.message.content or "")
    answer = client.chat(MODEL, messages=messages, format="json", options=options)
    assert isinstance(json.loads(answer.message.content or ""), dict)
    text = client.generate(MODEL, prompt="A friend:", format=Friend.model_json_schema(), options=options)
    assert Friend.model_validate_json(text.response or "")


def test_a_text_is_answered_continued_or_filled(client: ollama.Client) -> None:
    options = {"temperature": 0, "num_predict": 24}
    whole = client.generate(MODEL, prompt="Say hello.", system="Be short.", options=options)
    parts = list(client.generate(MODEL, prompt="Say hello.", system="Be short.", options=options, stream=True))
    assert whole.response and "".join(part.response or "" for part in parts) == whole.response
    chat = [{"role": "system", "content": "Be short."}, *HELLO]
    assert client.chat(MODEL, messages=chat, options=options).message.content == whole.response
    raw = client.generate(MODEL, prompt="def add(a, b):\n    return", raw=True, options=options)
    assert raw.response and raw.prompt_eval_count == 8
    filled = client.generate(
        MODEL, prompt="def add(a, b):\n    return ", suffix="\n\nprint(add(1, 2))", options=options
    )
    assert filled.response and "a + b" in filled.response


def test_a_model_is_loaded_ahead(client: ollama.Client) -> None:
    assert client.generate(MODEL, keep_alive=-1).done_reason == "load"
    assert client.chat(MODEL, messages=[], keep_alive=0).done_reason == "unload"
    assert client.chat(MODEL, messages=HELLO, options={"num_predict": 1}).done_reason == "length"


def test_more_tokens_than_the_context_has_are_a_bound(client: ollama.Client) -> None:
    schema = {"type": "object", "properties": {}, "additionalProperties": False}
    for num_predict in (-2, -1, 4096, 100_000):
        options = {"num_predict": num_predict, "temperature": 0}
        assert client.chat(MODEL, messages=HELLO, format=schema, options=options).done_reason == "stop"


def test_log_probabilities_come_along(client: ollama.Client) -> None:
    answer = client.chat(MODEL, messages=HELLO, logprobs=True, top_logprobs=2, options={"num_predict": 3})
    assert answer.logprobs and len(answer.logprobs) == 3
    assert all(token.top_logprobs and len(token.top_logprobs) == 2 for token in answer.logprobs)


def test_texts_become_vectors(client: ollama.Client, served: Server) -> None:
    texts = ["a cat", "a kitten", "a hash table"]
    answer = client.embed(EMBEDDER, input=texts)
    assert len(answer.embeddings) == 3 and answer.prompt_eval_count
    assert all(abs(math.hypot(*row) - 1) < 1e-6 for row in answer.embeddings)
    with OpenAI(base_url=served.url + "/v1", api_key="unused") as sdk:
        expected = sdk.embeddings.create(model=EMBEDDER, input=texts[0]).data[0].embedding
    for row in (answer.embeddings[0], client.embed(EMBEDDER, input=texts[0]).embeddings[0]):
        assert max(abs(a - b) for a, b in zip(row, expected, strict=True)) < 1e-5
    assert len(client.embeddings(EMBEDDER, prompt=texts[0]).embedding) == len(expected)
    assert client.show("sentence-transformers/all-MiniLM-L6-v2:latest").capabilities == ["embedding"]


def test_errors_are_its_own(client: ollama.Client) -> None:
    refusals: list[tuple[int, str, Any]] = [
        (404, "model 'other' not found", lambda: client.chat("other", messages=HELLO)),
        (404, "model 'other' not found", lambda: list(client.chat("other", messages=HELLO, stream=True))),
        (404, "model 'other' not found", lambda: client.show("other")),
        (404, "model 'other' not found", lambda: client.embed("other", input="x")),
        (400, "images", lambda: client.chat(MODEL, messages=[{**HELLO[0], "images": [PIXEL]}])),
        (400, "images", lambda: client.generate(MODEL, prompt="x", images=[PIXEL])),
        (400, "template", lambda: client.generate(MODEL, prompt="x", template="{{ .Prompt }}")),
        (400, "context", lambda: client.generate(MODEL, prompt="x", context=[1, 2])),
        (501, "huggingface/", lambda: client.pull("other")),
        (501, "huggingface/", lambda: client.delete("other")),
        (501, "huggingface/", lambda: client.copy("a", "b")),
        (501, "huggingface/", lambda: client.create("a", from_="b")),
    ]
    for status, words, ask in refusals:
        with pytest.raises(ollama.ResponseError) as refused:
            ask()
        assert refused.value.status_code == status and words in refused.value.error


async def test_the_asynchronous_client_streams(served: Server) -> None:
    client = ollama.AsyncClient(host=served.url)
    parts = await client.chat(MODEL, messages=HELLO, stream=True, options={"num_predict": 5})
    assert len([part async for part in parts]) == 6


def test_the_client_for_javascript_reads_the_same(client: ollama.Client, served: Server) -> None:
    script = str(Path(__file__).parent / "ollama_client.mjs")
    found = json.loads(run("node", script, served.url, MODEL, EMBEDDER))
    assert found["names"][0] == found["running"][0] == f"{MODEL}:latest"
    assert found["capabilities"] == ["completion", "tools", "insert"] and found["version"]
    theirs = client.chat(MODEL, messages=HELLO, options={"temperature": 0, "num_predict": 20})
    assert found["chat"]["message"]["content"] == theirs.message.content == found["chatStream"]["text"]
    assert found["generate"]["response"] == theirs.message.content == found["generateStream"]["text"]
    assert found["chatStream"]["done"] and found["chatStream"]["parts"] > 2
    assert [call["function"]["arguments"] for call in found["calls"]] == [{"a": 3, "b": 4}]
    assert found["embeddings"] == [384, 384]
    assert found["unknown"] == {"status": 404, "message": "model 'other' not found"}
    assert found["pulled"]["status"] == 501
