"""Ollama's /api says what the other endpoints say, in Ollama's shapes; its own clients are asked in tests/clients."""

import asyncio
import base64
import json
import re
from collections.abc import AsyncGenerator
from datetime import datetime
from typing import Any

import httpx2
import pytest
from models import byte_tokenizer
from process import Server
from running_gateway import Gateway
from test_image_inputs import picture, url_of
from upstreams import Reply

from api.ollama.calls import with_ids
from api.ollama.schemas import OllamaChatRequest, OllamaGenerateRequest, OllamaMessage
from api.ollama.view import LineEncoder, as_chat, as_completion, collect, stream
from errors import EngineFailure
from schemas import ChatCompletionChunk, ChunkChoice, Delta, FunctionDelta, ToolCallDelta
from server.events import sse

MODEL = "Tiny-Qwen3"
HELLO = [{"role": "user", "content": "Hello"}]
OPTIONS = {"num_predict": 24, "temperature": 1, "seed": 3, "ignore_eos": True}
WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]},
}


def ask(server: Server, path: str = "chat", **body: Any) -> httpx2.Response:
    start = {"messages": HELLO} if path == "chat" else {"prompt": "Hello"}
    return server.post(f"/api/{path}", **{"model": MODEL, "options": OPTIONS, **start, **body})


def chat_text(server: Server, **body: Any) -> str:
    start = {"model": MODEL, "messages": HELLO, "max_tokens": 24, "temperature": 1, "seed": 3, "ignore_eos": True}
    answer = server.post("/v1/chat/completions", **{**start, **body}).json()
    return str(answer["choices"][0]["message"]["content"])


def lines(reply: httpx2.Response) -> list[dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/x-ndjson" and reply.text.endswith("}\n")
    return [json.loads(line) for line in reply.text.splitlines()]


# --- answers


def test_a_chat_streams_by_default_and_is_that_of_chat_completions(server: Server) -> None:
    parts, whole = lines(ask(server)), ask(server, stream=False)
    assert whole.headers["content-type"] == "application/json"
    last, answer = parts[-1], whole.json()
    assert "".join(part["message"]["content"] for part in parts) == answer["message"]["content"] == chat_text(server)
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True] and last["done_reason"] == "length"
    assert all(part["model"] == MODEL and part["message"]["role"] == "assistant" for part in parts)
    counts = ("eval_count", "prompt_eval_count", "done_reason")
    assert [last[name] for name in counts] == [answer[name] for name in counts]
    for found in (last, answer):
        durations = [found[f"{name}_duration"] for name in ("total", "load", "prompt_eval", "eval")]
        assert all(isinstance(duration, int) for duration in durations) and durations[0] >= sum(durations[2:])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", found["created_at"])
        assert abs(datetime.fromisoformat(found["created_at"]).timestamp() - datetime.now().timestamp()) < 60


def test_a_prompt_is_a_chat_of_one_turn_and_a_raw_one_a_completion(server: Server) -> None:
    parts = lines(ask(server, "generate", system="S"))
    chat = chat_text(server, messages=[{"role": "system", "content": "S"}, *HELLO])
    assert "".join(part["response"] for part in parts) == chat and parts[-1]["done"]
    raw = ask(server, "generate", raw=True, stream=False).json()
    body = {"max_tokens": 24, "temperature": 1, "seed": 3, "ignore_eos": True}
    theirs = server.post("/v1/completions", model=MODEL, prompt="Hello", **body).json()
    assert raw["response"] == theirs["choices"][0]["text"] != chat
    assert raw["prompt_eval_count"] == theirs["usage"]["prompt_tokens"] == len("Hello")


def test_thoughts_are_apart_and_can_be_left_out(thinking_server: Server) -> None:
    think, end = byte_tokenizer(has_marks=True).convert_tokens_to_ids(["<think>", "</think>"])
    options = {**OPTIONS, "num_predict": 60, "logit_bias": {think: 50, end: 4}}
    bias = {str(token): value for token, value in options["logit_bias"].items()}
    for path in ("chat", "generate"):
        whole = ask(thinking_server, path, options={**options, "logit_bias": bias}, stream=False).json()
        parts = lines(ask(thinking_server, path, options={**options, "logit_bias": bias}))
        answers = [part["message"] if path == "chat" else part for part in (whole, *parts)]
        assert answers[0]["thinking"] == "".join(part.get("thinking", "") for part in answers[1:])
    plain = ask(thinking_server, stream=False)
    for think_field, effort in ((False, "none"), (True, "high"), ("high", "high"), ("low", "low")):
        asked = ask(thinking_server, think=think_field, stream=False).json()
        theirs = thinking_server.post(
            "/v1/chat/completions", model=MODEL, messages=HELLO, max_tokens=1, reasoning_effort=effort
        ).json()
        assert asked["prompt_eval_count"] == theirs["usage"]["prompt_tokens"]
    assert "thinking" not in plain.json()["message"]


def test_a_format_holds(server: Server) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    options = {"num_predict": 200, "temperature": 1, "seed": 1}
    for path, body in (("chat", {}), ("generate", {}), ("generate", {"raw": True})):
        answer = ask(server, path, format=schema, options=options, stream=False, **body).json()
        assert json.loads(answer["message"]["content"] if path == "chat" else answer["response"]) in (
            {"n": 1},
            {"n": 2},
        )
    short = ask(server, format="json", options={**OPTIONS, "num_predict": 3}, stream=False).json()
    assert short["message"]["content"].startswith("{")
    assert ask(server, format="", stream=False).json()["message"]["content"] == chat_text(server)


def test_options_are_those_of_completions_by_other_names(server: Server) -> None:
    whole = chat_text(server)
    for options, theirs in (
        ({"repeat_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"top_k": 3.0, "min_p": 0.1, "top_p": 0.9}, {"top_k": 3, "min_p": 0.1, "top_p": 0.9}),
        ({"presence_penalty": 1.0, "frequency_penalty": 1}, {"presence_penalty": 1.0, "frequency_penalty": 1.0}),
        ({"stop": [whole[5]]}, {"stop": whole[5]}),
        ({"num_predict": 7}, {"max_tokens": 7}),
    ):
        answer = ask(server, options={**OPTIONS, **options}, stream=False).json()
        assert answer["message"]["content"] == chat_text(server, **theirs), options
    for most in (-2, -1, 0, 10**6):  # until the context is full
        answer = ask(server, options={**OPTIONS, "num_predict": most}, stream=False).json()
        assert answer["eval_count"] + answer["prompt_eval_count"] == 480 and answer["done_reason"] == "length"


def test_what_has_no_effect_is_accepted_and_what_would_have_one_is_named(server: Server) -> None:
    options = {**OPTIONS, "num_ctx": 8192, "num_gpu": 99, "use_mmap": True, "mirostat": 0, "tfs_z": 1}
    assert "x-ignored-fields" not in ask(server, options=options, keep_alive="5m").headers
    named = ask(server, options={**options, "mirostat": 2, "typical_p": 0.5, "foo": 1}, truncate=True)
    assert named.headers["x-ignored-fields"] == "options.foo, options.mirostat, options.typical_p, truncate"


def test_log_probabilities_are_those_of_the_chat(server: Server) -> None:
    answer = ask(server, top_logprobs=2, stream=False).json()
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 24, "temperature": 1, "seed": 3, "ignore_eos": True}
    theirs = server.post("/v1/chat/completions", **body, logprobs=True, top_logprobs=2).json()
    assert answer["logprobs"] == theirs["choices"][0]["logprobs"]["content"] and len(answer["logprobs"]) == 24


def test_without_a_prompt_the_model_is_loaded_or_kept(server: Server) -> None:
    for path, body, reason in (
        ("chat", {"messages": []}, "load"),
        ("chat", {"messages": None, "keep_alive": 0}, "unload"),
        ("generate", {"prompt": ""}, "load"),
        ("generate", {"prompt": None, "keep_alive": -1}, "load"),
    ):
        answer = ask(server, path, **body).json()
        assert answer["done"] is True and answer["done_reason"] == reason and "eval_count" not in answer


# --- tools


def test_calls_come_whole_with_their_arguments_as_objects(thinking_server: Server) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 300, "temperature": 1, "enable_thinking": False}
    tools = [{"type": "function", "function": WEATHER}]
    found = 0
    for seed in range(6):
        options = {"num_predict": 300, "temperature": 1, "seed": seed}
        parts = lines(ask(thinking_server, tools=tools, think=False, options=options))
        whole = ask(thinking_server, tools=tools, think=False, options=options, stream=False).json()
        theirs = thinking_server.post("/v1/chat/completions", **body, tools=tools, seed=seed).json()["choices"][0]
        expected = [
            (call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in theirs["message"].get("tool_calls", ())
            if theirs["finish_reason"] == "tool_calls"
        ]
        calls = [call["function"] for part in parts for call in part["message"].get("tool_calls", ())]
        assert [call["function"] for call in whole["message"].get("tool_calls", ())] == calls
        if expected:
            assert [(call["name"], call["arguments"]) for call in calls] == expected
            assert [call["index"] for call in calls] == list(range(len(calls)))
            assert whole["done_reason"] == "stop"
        found += len(expected)
    assert whole["message"]["content"] == theirs["message"]["content"] or found


def test_results_find_their_calls_by_name_or_in_turn() -> None:
    def message(role: str, **fields: Any) -> OllamaMessage:
        return OllamaMessage.model_validate({"role": role, **fields})

    calls = [{"function": {"name": name, "arguments": {"city": city}}} for name, city in (("a", "x"), ("b", "y"))]
    own = [{"id": "own", "function": {"name": "c", "arguments": "{}"}}]
    numbered = with_ids(
        [
            message("assistant", tool_calls=calls),
            message("tool", content="of b", tool_name="b"),
            message("tool", content="of a"),
            message("assistant", tool_calls=own),
            message("tool", content="of c", tool_call_id="own"),
            message("tool", content="of none", tool_name="b"),
        ]
    )
    first, second = numbered[0].tool_calls or ()
    assert [m.tool_call_id for m in numbered[1:]] == [second["id"], first["id"], None, "own", None]
    assert first["function"] == {"name": "a", "arguments": '{"city": "x"}'} and first["type"] == "function"
    assert numbered[3].tool_calls == [{"id": "own", "type": "function", "function": own[0]["function"]}]


def request(**fields: Any) -> OllamaChatRequest:
    return OllamaChatRequest.model_validate({"model": "m", "messages": HELLO, **fields})


def call(index: int, arguments: str, name: str | None = None) -> ToolCallDelta:
    identity = None if name is None else f"c{index}"
    return ToolCallDelta(index=index, id=identity, function=FunctionDelta(name=name, arguments=arguments))


async def chunks(*deltas: Delta, reason: Any = "stop", error: Exception | None = None) -> AsyncGenerator[Any]:
    for delta in deltas:
        yield ChatCompletionChunk(model="m", choices=[ChunkChoice(index=0, delta=delta)])
    if error is not None:
        raise error
    yield ChatCompletionChunk(model="m", choices=[ChunkChoice(index=0, delta=Delta(), finish_reason=reason)])


def test_a_call_that_was_cut_is_left_out() -> None:
    deltas = [Delta(tool_calls=[call(0, "", "a")]), Delta(tool_calls=[call(0, '{"x": '), call(0, "1}")])]
    deltas += [Delta(tool_calls=[call(1, '{"y": ', "b")])]
    answer: Any = asyncio.run(collect(stream(request(), chunks(*deltas, reason="length"))))
    assert [found.function.arguments for found in answer.message.tool_calls] == [{"x": 1}]
    assert answer.done_reason == "length"


@pytest.mark.parametrize(
    "arguments", ["[1]", "5", '{"x": NaN}', '{"x": ' + "[" * 300 + "]" * 300 + "}", "[" * 9999, "{"]
)
def test_arguments_that_are_no_object_of_json_are_left_out(arguments: str) -> None:
    deltas = [Delta(content="a", tool_calls=[call(0, "", "a")]), Delta(tool_calls=[call(0, arguments)])]
    answer: Any = asyncio.run(collect(stream(request(), chunks(*deltas))))
    assert answer.message.tool_calls is None and answer.message.content == "a" and answer.model_dump_json()


def test_an_error_in_the_middle_is_the_last_line() -> None:
    async def sent() -> bytes:
        answers = stream(request(), chunks(Delta(content="a"), error=EngineFailure("max_tokens failed.")))
        return b"".join([part async for part in sse(answers, LineEncoder())])

    first, last = asyncio.run(sent()).splitlines()
    assert json.loads(first)["message"]["content"] == "a"
    assert json.loads(last) == {"error": "options.num_predict failed."}


def test_a_model_that_sees_is_shown_the_images(seeing_server: Server) -> None:
    name, url = seeing_server.get("/api/tags").json()["models"][0]["name"], url_of(picture(1))
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Hello"}]
    body = {"model": name.removesuffix(":latest"), "messages": [{"role": "user", "content": parts}], "max_tokens": 8}
    theirs = seeing_server.post("/v1/chat/completions", **body, temperature=0).json()
    images = [url.partition(",")[2]]
    options = {"num_predict": 8, "temperature": 0}
    for path, shown in (("chat", {"messages": [{**HELLO[0], "images": images}]}), ("generate", {"images": images})):
        answer = ask(seeing_server, path, model=name, options=options, stream=False, **shown).json()
        text = answer["message"]["content"] if path == "chat" else answer["response"]
        assert text == theirs["choices"][0]["message"]["content"]
        assert answer["prompt_eval_count"] == theirs["usage"]["prompt_tokens"]


def test_images_are_parts_of_the_message() -> None:
    image = base64.b64encode(b"image").decode()
    chat = as_chat(request(messages=[{**HELLO[0], "images": [image, f"data:image/jpeg;base64,{image}"]}]), "m")
    *shown, text = chat.model_dump(exclude_none=True)["messages"][0]["content"]
    urls = [part["image_url"]["url"] for part in shown]
    assert urls == [f"data:image/png;base64,{image}", f"data:image/jpeg;base64,{image}"] and text["text"] == "Hello"
    generate = OllamaGenerateRequest.model_validate({"model": "m", "prompt": "Hello", "images": [image]})
    assert (
        as_chat(generate, "m").messages[0].model_dump()
        == as_chat(request(messages=[{**HELLO[0], "images": [image]}]), "m").messages[0].model_dump()
    )
    filled = as_completion(OllamaGenerateRequest.model_validate({"model": "m", "prompt": "a", "suffix": "b"}), "m")
    assert (filled.prompt, filled.suffix) == ("a", "b")


# --- models


def test_models_are_listed_with_a_tag_and_found_with_or_without_one(server: Server) -> None:
    [model] = server.get("/api/tags").json()["models"]
    assert model["name"] == model["model"] == f"{MODEL}:latest" and re.fullmatch("[0-9a-f]{64}", model["digest"])
    assert model["size"] > 0 and model["details"]["family"] == "qwen3" and model["details"]["format"] == "safetensors"
    [running] = server.get("/api/ps").json()["models"]
    assert running["name"] == model["name"] and running["context_length"] == 480
    assert datetime.fromisoformat(running["expires_at"]) > datetime.now().astimezone()
    shown = server.post("/api/show", model=MODEL).json()
    assert shown["model_info"]["general.architecture"] == "qwen3" and shown["details"] == model["details"]
    assert shown["model_info"]["qwen3.context_length"] == 480 and shown["capabilities"] == ["completion", "tools"]
    for name in (f"{MODEL}:latest", f"{MODEL}:8b", MODEL.lower()):
        assert server.post("/api/show", model=name).json() == shown == server.post("/api/show", name=name).json()
        assert ask(server, model=name, stream=False).json()["model"] == name


def test_capabilities_are_the_models(thinking_server: Server, seeing_server: Server) -> None:
    assert "thinking" in thinking_server.post("/api/show", model=MODEL).json()["capabilities"]
    name = seeing_server.get("/api/tags").json()["models"][0]["name"]
    assert "vision" in seeing_server.post("/api/show", model=name).json()["capabilities"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat", {"model": "other"}, 404, "model 'other' not found"),
        ("generate", {"model": "other:7b"}, 404, "model 'other:7b' not found"),
        ("show", {"model": "other"}, 404, "model 'other' not found"),
        ("embed", {"model": "other", "input": "x"}, 404, "model 'other' not found"),
        ("embed", {"model": "all-minilm-l6-v2", "input": ["a", ""]}, 400, "input"),
        ("embeddings", {"model": "other"}, 404, "model 'other' not found"),
        ("chat", {"messages": [{"role": "nobody", "content": "x"}]}, 400, "messages[0].role"),
        ("chat", {"messages": [{**HELLO[0], "images": ["aGk="]}]}, 400, "images"),
        ("chat", {"options": {"temperature": -1}}, 400, "options.temperature"),
        ("chat", {"options": {"num_predict": "many"}}, 400, "options.num_predict"),
        ("chat", {"format": "yaml"}, 400, "format"),
        ("chat", {"format": {"type": "nothing"}}, 400, "format"),
        ("chat", {"tools": [{"function": {}}]}, 400, "tools[0].function.name"),
        ("generate", {"template": "{{ .Prompt }}"}, 400, "template"),
        ("generate", {"context": [1]}, 400, "context"),
        ("generate", {"suffix": "x"}, 400, "suffix"),
        ("generate", {"raw": True, "system": "x"}, 400, "system"),
        ("pull", {"model": "x"}, 501, "huggingface/"),
        ("nothing", {}, 404, "/api/nothing"),
    ],
)
def test_what_is_wrong_is_said_in_ollamas_shape(
    server: Server, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    refusal = ask(server, path, **body)
    assert refusal.status_code == status and refusal.json().keys() == {"error"} and words in refusal.json()["error"]


@pytest.mark.parametrize("path", ["chat", "generate"])
def test_more_images_than_a_message_has_room_for_are_refused(server: Server, path: str) -> None:
    images = [""] * 10_000
    bodies = {
        "generate": {"images": images},
        "chat": {"messages": [{"role": "user", "content": "x", "images": images}]},
    }
    reply = ask(server, path, **bodies[path])
    assert reply.status_code == 400 and "10000 items" in reply.json()["error"], reply.text


def test_a_body_is_json_whatever_its_type_says_but_not_from_a_web_page(server: Server) -> None:
    body = json.dumps({"model": MODEL, "prompt": "Hi", "stream": False, "options": {"num_predict": 2}})
    for kind in ({}, {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "text/plain"}):
        reply = httpx2.post(f"{server.url}/api/generate", content=body, headers=kind, timeout=30)
        assert reply.status_code == 200 and reply.json()["done"]
        page = {**kind, "origin": "https://evil.example"}
        assert httpx2.post(f"{server.url}/api/generate", content=body, headers=page, timeout=30).status_code == 400


# --- other providers


@pytest.mark.parametrize(
    ("model", "provider", "there"),
    [
        ("openai/gpt-5", "openai", "gpt-5"),
        ("openai/gpt-5:latest", "openai", "gpt-5"),
        ("ollama/llama3:8b", "ollama", "llama3:8b"),
        ("claude/claude-x:latest", "claude", "claude-x"),
        ("old-gpt", "openai", "gpt-new"),
        ("old-gpt:latest", "openai", "gpt-new"),
    ],
)
def test_models_of_providers_answer(gateway: Gateway, model: str, provider: str, there: str) -> None:
    gateway.reset()
    for path in ("chat", "generate"):
        parts = lines(ask(gateway.server, path, model=model))
        texts = [part["message"]["content"] if path == "chat" else part["response"] for part in parts]
        assert "".join(texts) == "Hi!" and parts[-1]["done_reason"] == "stop" and parts[-1]["eval_duration"] > 0
        assert gateway.providers[provider].asked[-1].body["model"] == there
    whole = ask(gateway.server, model=model, stream=False)
    assert whole.json()["message"]["content"] == "Hi!" and whole.headers["x-gateway-provider"] == provider
    refusal = ask(gateway.server, "generate", model=model, raw=True)
    assert refusal.status_code == 400 and "raw" in refusal.json()["error"]


def test_a_failing_provider_gives_way_to_the_next_model(gateway: Gateway) -> None:
    gateway.reset()
    gateway.providers["openai"].script = lambda asked: Reply.of({"error": {"message": "busy"}}, status=503)
    for name in ("openai/lands", "openai/lands:latest"):
        reply = ask(gateway.server, model=name, stream=False)
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-gateway-fallback-from"] == "openai/lands"
    failed = ask(gateway.server, model="openai/other")
    assert failed.status_code >= 500 and failed.json().keys() == {"error"}


def test_models_of_providers_are_listed_and_shown(gateway: Gateway) -> None:
    gateway.reset()
    names = [model["name"] for model in gateway.server.get("/api/tags").json()["models"]]
    assert f"{MODEL}:latest" in names and "openai/two:latest" in names
    shown = gateway.server.post("/api/show", model="openai/two:latest").json()
    assert shown["capabilities"] == ["completion", "tools"]
