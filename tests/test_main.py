"""The server process as its clients see it: the official SDK, raw requests, and people who leave."""

import asyncio
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from models import byte_tokenizer
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from process import MAIN, UVICORN, Server, run_to_end, serve
from transformers import AutoModelForCausalLM

from text.logprobs import TokenTexts

MODEL = "Tiny-Qwen3"
MISSING = "missing_required_parameter"
HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, 世界"}]


def raw_events(server: Server, path: str = "/v1/chat/completions", **body: Any) -> list[str]:
    body = {"model": MODEL, "stream": True, "max_tokens": 20, **body}
    with httpx2.stream("POST", server.url + path, json=body, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        return b"".join(response.iter_raw()).decode().split("\n\n")[:-1]


# --- answers


def test_the_sdk_reads_an_answer_and_its_stream_and_they_are_equal(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 100, "seed": 5, "temperature": 1.0}
    options["extra_body"] = {"ignore_eos": True}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage is not None and whole.usage.total_tokens == whole.usage.prompt_tokens + 100
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_the_async_sdk_streams_many_answers_at_once(server: Server) -> None:
    async def one(client: AsyncOpenAI, seed: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=60, stream=True, seed=seed, extra_body={"ignore_eos": True}
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def main() -> list[str]:
        async with AsyncOpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(one(client, seed) for seed in [*range(15), 0]))

    texts = asyncio.run(main())
    assert texts[0] == texts[15] and len(set(texts)) == 15


def test_every_chunk_is_valid_for_the_sdks_model_and_in_the_order_of_the_specification(server: Server) -> None:
    *events, done = raw_events(server, messages=HELLO, stream_options={"include_usage": True}, n=2, ignore_eos=True)
    assert done == "data: [DONE]"
    chunks = [ChatCompletionChunk.model_validate(json.loads(event.removeprefix("data: "))) for event in events]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 40
    for index in (0, 1):
        choices = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == index]
        assert choices[0].delta.role == "assistant" and choices[0].delta.content == ""
        assert all(choice.delta.role is None and choice.finish_reason is None for choice in choices[1:-1])
        assert choices[-1].finish_reason == "length" and choices[-1].delta.content is None


def test_streams_have_no_usage_and_no_empty_choices_unless_asked(server: Server) -> None:
    *events, _ = raw_events(server, messages=HELLO)
    assert all("usage" not in event and json.loads(event[6:])["choices"] for event in events)


def test_whole_answers_are_valid_for_the_sdks_models(server: Server) -> None:
    chat = server.post("/v1/chat/completions", model=MODEL, messages=HELLO, max_tokens=5).json()
    assert ChatCompletion.model_validate(chat) and "error" not in chat and chat["object"] == "chat.completion"
    text = server.post("/v1/completions", model=MODEL, prompt="Once", max_tokens=5).json()
    assert Completion.model_validate(text) and text["object"] == "text_completion"


def test_completions_take_texts_and_tokens_and_number_their_choices(server: Server) -> None:
    options = {"model": MODEL, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    [single] = server.post("/v1/completions", prompt="ab", **options).json()["choices"]
    both = server.post("/v1/completions", prompt=["ab", "xyz"], n=2, **options).json()
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert both["choices"][0]["text"] == both["choices"][1]["text"] == single["text"]
    counts = {"prompt_tokens": 5, "completion_tokens": 32, "total_tokens": 37}
    details = {"prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 0}}
    assert both["usage"] == {**counts, **details}  # the prompt is less than a block
    token_ids = [64, 65]  # "ab"
    assert server.post("/v1/completions", prompt=token_ids, **options).json()["choices"][0]["text"] == single["text"]
    events = raw_events(server, "/v1/completions", prompt=["ab", "xyz"], **{**options, "max_tokens": 8})
    streamed = [json.loads(event[6:])["choices"][0] for event in events[:-1]]
    assert "".join(choice["text"] for choice in streamed if choice["index"] == 0) == single["text"]


def test_a_beginning_that_was_sent_before_is_not_computed_again_and_usage_says_so(client: OpenAI) -> None:
    messages: Any = [{"role": "system", "content": "A system prompt of many words. " * 5}, *HELLO]
    options: Any = {"model": MODEL, "max_tokens": 4, "temperature": 0, "extra_body": {"ignore_eos": True}}

    def ask(last: str, n: int = 1) -> tuple[str | None, int, int]:
        answer = client.chat.completions.create(messages=[*messages, {"role": "user", "content": last}], n=n, **options)
        details = answer.usage.prompt_tokens_details if answer.usage else None
        assert answer.usage is not None and details is not None and details.cached_tokens is not None
        return answer.choices[-1].message.content, details.cached_tokens, answer.usage.prompt_tokens

    first, again, other = ask("one"), ask("one"), ask("two", n=3)
    assert first[0] == again[0] and first[1] == 0
    assert again[1] == (again[2] - 1) // 16 * 16 and 100 < other[1] < other[2]
    response = client.responses.create(model=MODEL, input=[*messages], max_output_tokens=1)
    assert response.usage is not None and response.usage.input_tokens_details.cached_tokens > 100


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": HELLO, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**options, max_tokens=200).choices[0].message.content
    assert whole is not None
    stop = whole[len(whole) // 2 :][:2]
    cut = client.chat.completions.create(**options, max_tokens=200, stop=[stop, "never"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage is not None and cut.usage.completion_tokens < 200


def test_a_silent_request_runs_to_the_end_of_the_context(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, extra_body={"ignore_eos": True})
    assert answer.usage is not None and answer.usage.total_tokens == 480
    assert answer.choices[0].finish_reason == "length"


def test_the_newer_name_of_max_tokens_works(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=3)
    assert answer.usage is not None and answer.usage.completion_tokens <= 3


def test_what_open_webui_sends_is_answered(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "\n d", "parameters": {"properties": {}}}}
    controls = {"mirostat": 0, "num_ctx": 2048, "keep_alive": "5m", "min_p": 0, "seed": 0, "stop": ["END", "\n\n"]}
    body = {"model": MODEL, "messages": HELLO, "tools": [tool], "max_tokens": 4, "foo": None, **controls}
    answer = server.post("/v1/chat/completions", **body)
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "foo, keep_alive, mirostat, num_ctx"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert server.post("/v1/chat/completions", model=MODEL, messages=parts, max_tokens=4).status_code == 200


def greedy_logprobs(checkpoint: Path, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """(tokens of the answer, vocab), by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


def test_log_probabilities_are_those_of_transformers_streamed_and_whole(
    server: Server, client: OpenAI, tiny_checkpoint: Path
) -> None:
    tokenizer = byte_tokenizer()
    options: Any = {"model": MODEL, "messages": HELLO, "max_tokens": 40, "temperature": 0, "logprobs": True}
    options |= {"top_logprobs": 3, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**options).choices[0]
    assert whole.logprobs is not None and whole.logprobs.content is not None and len(whole.logprobs.content) == 40
    prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    rows = {bytes(texts.bytes_of(i)): i for texts in [TokenTexts(tokenizer)] for i in range(len(tokenizer))}
    answer = [rows[bytes(token.bytes or [])] for token in whole.logprobs.content]
    expected = greedy_logprobs(tiny_checkpoint, prompt, answer)
    # What begins in the cache may differ by rounding from what does not: the second begins in it, as the stream does
    again = client.chat.completions.create(**options).choices[0].logprobs
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
    streamed = [token for choice in chunks if choice.logprobs for token in choice.logprobs.content or []]
    assert again is not None and again.content is not None
    for tokens in (whole.logprobs.content, again.content):
        for token, token_id, row in zip(tokens, answer, expected, strict=True):
            assert token.logprob == pytest.approx(float(row[token_id]), abs=1e-3)
            assert [top.logprob for top in token.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
    assert [token.model_dump() for token in streamed] == [token.model_dump() for token in again.content]


def test_completions_have_log_probabilities_in_the_legacy_shape(server: Server) -> None:
    options = {"model": MODEL, "prompt": "ab", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    [choice] = server.post("/v1/completions", **options, logprobs=2).json()["choices"]
    logprobs = choice["logprobs"]
    assert [len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [12] * 4
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert 2 <= len(top) <= 3 and token in top
    [bare] = server.post("/v1/completions", **options, logprobs=0).json()["choices"]
    assert bare["logprobs"]["token_logprobs"] == logprobs["token_logprobs"]
    assert bare["logprobs"]["top_logprobs"] == [{}] * 12
    [none] = server.post("/v1/completions", **options).json()["choices"]
    assert none["logprobs"] is None


def test_log_probabilities_end_before_a_stop_string(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 60, "logprobs": True}
    options |= {"logit_bias": {"64": 100}, "extra_body": {"ignore_eos": True}}  # "a", again and again
    choice = client.chat.completions.create(**options, stop="aaa").choices[0]
    assert choice.message.content == "" and not (choice.logprobs and choice.logprobs.content)
    choice = client.chat.completions.create(**options, stop="b").choices[0]
    assert choice.message.content == "a" * 60
    assert choice.logprobs is not None and len(choice.logprobs.content or []) == 60


def test_min_tokens_keeps_an_answer_from_ending(client: OpenAI) -> None:
    options: Any = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 50}
    eos = byte_tokenizer().eos_token_id
    ended = client.chat.completions.create(**options, logit_bias={str(eos): 100})
    assert ended.usage is not None and ended.usage.completion_tokens == 1 and ended.choices[0].message.content == ""
    later = client.chat.completions.create(**options, logit_bias={str(eos): 100}, extra_body={"min_tokens": 7})
    assert later.usage is not None and later.usage.completion_tokens == 8
    assert later.choices[0].finish_reason == "stop"


# --- models and health


def test_models_are_listed_and_found_by_name_alias_and_path(
    server: Server, client: OpenAI, tiny_checkpoint: Path
) -> None:
    [model] = client.models.list().data
    assert model.id == MODEL and model.object == "model" and model.owned_by == "local"
    described = server.get("/v1/models").json()["data"][0]
    assert described["max_model_len"] == 480 and described["parent"] is None and described["permission"]
    assert described["root"] == MODEL, "a path is nobody's business"
    for name in (MODEL, "tiny-qwen3", str(tiny_checkpoint)):
        assert client.models.retrieve(name).id == MODEL
        assert server.post("/v1/completions", model=name, prompt="x", max_tokens=1).status_code == 200


def test_the_documentation_is_served(server: Server) -> None:
    assert server.get("/docs").status_code == 200
    paths = server.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= paths.keys()


def test_texts_and_conversations_are_turned_into_tokens_and_back(server: Server) -> None:
    text = "Hello, 世界 😀"
    tokens = server.post("/tokenize", prompt=text, return_token_strs=True).json()
    assert tokens["tokens"] == byte_tokenizer()(text).input_ids and tokens["count"] == len(text.encode())
    assert tokens["max_model_len"] == 480 and tokens["token_strs"][0] == "H"
    assert server.post("/detokenize", tokens=tokens["tokens"]).json() == {"prompt": text}
    bare = server.post("/tokenize", messages=HELLO, add_generation_prompt=False).json()
    chat = server.post("/tokenize", model=MODEL, messages=HELLO).json()
    assert chat["count"] - bare["count"] == len("assistant\n") + 1
    answer = server.post("/v1/chat/completions", model=MODEL, messages=HELLO, max_tokens=1).json()
    assert chat["count"] == answer["usage"]["prompt_tokens"] and chat["token_strs"] is None
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ):
        refusal = server.post(path, **body)
        assert refusal.status_code == 400 and refusal.json()["error"]["param"] == param
    assert server.post("/tokenize", model="nobody", prompt="x").status_code == 404


# --- errors


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        ("chat/completions", {"model": "nobody"}, 404, "model", "model_not_found"),
        ("chat/completions", {"messages": []}, 400, "messages", "invalid_value"),
        (
            "chat/completions",
            {"messages": [{"role": "robot", "content": ""}]},
            400,
            "messages[0].role",
            "invalid_value",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": 5}]},
            400,
            "messages[0].content",
            "invalid_value",
        ),
        ("chat/completions", {"temperature": 2.1}, 400, "temperature", "invalid_value"),
        ("chat/completions", {"temperature": "hot"}, 400, "temperature", "invalid_value"),
        ("chat/completions", {"n": 129}, 400, "n", "invalid_value"),
        ("chat/completions", {"max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ("chat/completions", {"max_tokens": 9999}, 400, "max_tokens", "invalid_value"),
        (
            "chat/completions",
            {"max_tokens": 5, "max_completion_tokens": 481},
            400,
            "max_completion_tokens",
            "invalid_value",
        ),
        ("completions", {"max_tokens": 481}, 400, "max_tokens", "invalid_value"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "x" * 480}]},
            400,
            "messages",
            "context_length_exceeded",
        ),
        ("chat/completions", {"messages": [*HELLO, {"role": "user"}]}, 400, "messages[2].content", MISSING),
        *(
            ("chat/completions", {"messages": [{"role": role, "content": None}]}, 400, "messages[0].content", MISSING)
            for role in ("user", "system", "developer", "tool", "assistant")
        ),
        ("chat/completions", {"logprobs": 1}, 400, "logprobs", "invalid_value"),
        ("chat/completions", {"top_logprobs": 2}, 400, "top_logprobs", "invalid_value"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "invalid_value"),
        ("chat/completions", {"logit_bias": {"5": 101}}, 400, "logit_bias.5", "invalid_value"),
        ("chat/completions", {"logit_bias": {"99999": 1}}, 400, "logit_bias", "invalid_value"),
        ("chat/completions", {"logit_bias": {"-1": 1}}, 400, "logit_bias.-1", "invalid_value"),
        ("chat/completions", {"min_tokens": 9, "max_tokens": 8}, 400, "min_tokens", "invalid_value"),
        ("chat/completions", {"audio": {"voice": "x"}}, 400, "audio", "unsupported_value"),
        ("completions", {"prompt": None}, 400, "prompt", "invalid_value"),
        ("completions", {"prompt": ""}, 400, "prompt", "invalid_value"),
        ("completions", {"prompt": [5, 10**6]}, 400, "prompt", "invalid_value"),
        ("completions", {"prompt": "x" * 1000}, 400, "prompt", "context_length_exceeded"),
        ("completions", {"suffix": "y"}, 400, "suffix", "unsupported_value"),
        ("completions", {"best_of": 2, "n": 3}, 400, "best_of", "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests_are_refused_by_name_before_any_byte(
    server: Server, path: str, body: dict[str, Any], status: int, param: str, code: str | None, stream: bool
) -> None:
    good = {"messages": HELLO} if path.startswith("chat") else {"prompt": "x"}
    answer = server.post(f"/v1/{path}", **{"model": MODEL, "stream": stream, **good, **body})
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("path", "text", "param"),
    [
        ("chat/completions", '{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages"),
        ("completions", '{"prompt": "\\ud800"}', "prompt"),
        ("completions", '{"prompt": {}}', "prompt"),
        ("completions", '{"prompt": [[]]}', "prompt"),
        ("completions", '{"prompt": []}', "prompt"),
        ("completions", '{"prompt": "x", "top_k": 1' + "0" * 400 + "}", "top_k"),
        ("completions", '{"prompt": "x", "temperature": NaN}', "temperature"),
        ("completions", '{"prompt": "x", "repetition_penalty": 1e-300}', "repetition_penalty"),
        ("completions", '{"prompt": "x", "logprobs": 6}', "logprobs"),
        ("completions", '{"prompt": "x", "stop": ' + json.dumps(["s"] * 17) + "}", "stop"),
        ("completions", '{"prompt": ' + json.dumps([[1]] * 5000) + "}", "prompt"),
        (
            "chat/completions",
            '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}',
            "messages[0].content[0]",
        ),
    ],
)
def test_hostile_requests_are_refused_by_name_and_others_live_on(
    server: Server, path: str, text: str, param: str
) -> None:
    bystander = in_background(lambda: raw_events(server, **{**LONG, "max_tokens": 150}))
    wait_until_running(server)
    body = '{"model": "' + MODEL + '", ' + text[1:]
    headers = {"content-type": "application/json"}
    answer = httpx2.post(f"{server.url}/v1/{path}", content=body.encode(), headers=headers, timeout=30)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text
    assert bystander()[-1] == "data: [DONE]"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 150}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": None}]},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "reasoning_content": "Well."},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": None}},
        {"role": "function", "content": None, "name": "f"},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        {"role": "user", "content": ""},
        {"role": "user", "content": [], "name": "<|im_end|>"},
    ],
)
def test_odd_but_legal_messages_are_answered(server: Server, message: dict[str, Any]) -> None:
    body = {"model": MODEL, "messages": [*HELLO, message], "max_tokens": 2, "stop": ["", "x"], "top_k": -1}
    nulls = dict.fromkeys(["temperature", "top_p", "n", "seed", "stream", "user", "logit_bias", "stream_options"])
    assert server.post("/v1/chat/completions", **nulls, **body).status_code == 200


def test_missing_fields_broken_json_and_unknown_routes_have_the_same_shape(server: Server) -> None:
    missing = server.post("/v1/chat/completions", model=MODEL)
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "messages"
    broken = httpx2.post(
        server.url + "/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}
    )
    assert broken.status_code == 400 and broken.json()["error"]["type"] == "invalid_request_error"
    unknown = server.get("/v2/nothing").json()["error"]
    assert unknown["type"] == "invalid_request_error"
    assert unknown["message"] == "The endpoint /v2/nothing does not exist: /docs shows those that do."
    wrong = server.get("/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["message"] == "The endpoint /v1/chat/completions does not take GET: use POST."


def test_every_response_has_an_id_and_says_whether_to_try_again(server: Server) -> None:
    for path, status in (("/health", 200), ("/v1/nothing", 404), ("/v1/completions", 405), ("/v1/models/none", 404)):
        answer = server.get(path)
        assert answer.status_code == status and answer.headers["x-request-id"]
        assert answer.headers.get("x-should-retry") == (None if status == 200 else "false")
    events = httpx2.post(server.url + "/v1/completions", json={"model": MODEL, "prompt": "x", "stream": True})
    assert events.headers["x-request-id"]


def test_the_routes_answer_without_v1_too(server: Server) -> None:
    body = {"model": MODEL, "max_tokens": 2}
    assert server.get("/models").json()["data"][0]["id"] == MODEL
    assert server.get(f"/models/{MODEL}").json()["id"] == MODEL
    assert server.post("/chat/completions", messages=HELLO, **body).status_code == 200
    assert server.post("/completions", prompt="x", **body).status_code == 200
    assert server.get("/version").json()["version"]
    assert "/completions" not in server.get("/openapi.json").json()["paths"]


def test_the_sdk_raises_its_own_errors(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 480 tokens"):
        client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5000)


def test_pages_of_this_machine_may_call_and_others_may_not(server: Server) -> None:
    def allowed(origin: str) -> str | None:
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        reply = httpx2.options(server.url + "/v1/chat/completions", headers=headers)
        return reply.headers.get("access-control-allow-origin")

    assert allowed("http://localhost:3000") == "http://localhost:3000"
    assert allowed("http://localhost.evil.example") is None and allowed("https://evil.example") is None


# --- clients that leave


@pytest.mark.parametrize("stream", [True, False])
def test_fifty_clients_that_leave_stop_their_work(server: Server, stream: bool) -> None:
    body = {"model": MODEL, "messages": HELLO, "n": 2, "max_tokens": 400, "ignore_eos": True, "stream": stream}

    async def leave(client: httpx2.AsyncClient, number: int) -> None:
        async def request() -> None:
            async with client.stream("POST", server.url + "/v1/chat/completions", json=body) as response:
                async for _ in response.aiter_lines():
                    if number % 2:
                        return

        try:
            await asyncio.wait_for(request(), timeout=0.3 + 0.02 * number)
        except TimeoutError:
            pass

    async def main() -> None:
        async with httpx2.AsyncClient(limits=httpx2.Limits(max_connections=60), timeout=30) as client:
            await asyncio.gather(*(leave(client, number) for number in range(50)))

    before = time.monotonic()
    asyncio.run(main())
    server.wait_until_idle(timeout=5)
    assert time.monotonic() - before < 15, "their answers were computed to the end"
    assert server.post("/v1/completions", model=MODEL, prompt="x", max_tokens=1).status_code == 200


# --- life


def test_while_loading_models_answer_and_health_tells_the_progress(tiny_checkpoint: Path) -> None:
    with serve(UVICORN, is_cold=True, NANOVLLM_MODEL_PATH=str(tiny_checkpoint)) as server:
        health = server.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "loading"
        assert 0 <= health.json()["progress"]["fraction"] <= 1 and health.json()["progress"]["phase"]
        assert server.get("/v1/models").json()["data"][0]["id"] == MODEL
        early = server.post("/v1/chat/completions", model=MODEL, messages=HELLO)
        assert early.status_code == 503 and early.json()["error"]["code"] == "model_loading"
        assert int(early.headers["retry-after"]) > 0
        server.wait_until_healthy()
        assert server.get("/health").json()["status"] == "ok"


HOPELESS = [
    ("/nowhere/model", "/nowhere/model"),
    ("demo:nothing", "demo:nothing"),
    ("{tmp}/pickle", "safetensors"),
    ("{tmp}/bert", "not supported"),
    ("{tmp}/huge", "GiB"),
]


@pytest.mark.parametrize(
    ("path", "sentence", "command"),
    [
        *((*model, MAIN) for model in HOPELESS),
        (*HOPELESS[0], UVICORN),
        *(pytest.param(*model, UVICORN, marks=pytest.mark.slow) for model in HOPELESS[1:]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_a_model_that_cannot_be_served_ends_the_process_with_a_sentence(
    tmp_path: Path, path: str, sentence: str, command: list[str]
) -> None:
    write_hopeless_models(tmp_path)
    environment = {"MODEL_PATH": path.format(tmp=tmp_path), "CACHE_DIR": str(tmp_path / "cache")}
    status, log = run_to_end(command, is_cold=sentence == "/nowhere/model", **environment)
    assert status != 0
    said = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and sentence in said[0]
    assert "Traceback" not in log


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_address_in_use_ends_the_process_with_a_sentence(server: Server, host: str) -> None:
    port = server.url.rpartition(":")[2]
    status, log = run_to_end([*MAIN[:-1], port], HOST=host, MODEL_PATH="/nowhere/model")
    assert status == 1
    sentence = f"error: The server cannot listen on {host}:{port}: set another HOST or PORT, or stop what uses it."
    assert log.splitlines()[-1] == sentence
    assert "Traceback" not in log


def test_a_draft_model_changes_no_answer_and_must_have_the_same_vocabulary(
    server: Server, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 60, "seed": 5, "temperature": 0.9}
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    settings = {"MODEL_PATH": str(tiny_checkpoint), "DTYPE": "float32", "MAX_MODEL_LEN": "480"}
    with serve(MAIN, **settings, DRAFT_MODEL_PATH=str(other)) as drafting:
        drafting.wait_until_healthy()
        answers = [s.post("/v1/chat/completions", **body).json() for s in (drafting, server)]
    assert answers[0]["choices"] == answers[1]["choices"]
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer.replace('"A":', '"Alpha":'))
    status, log = run_to_end([*MAIN, "--model-path", str(tiny_checkpoint), "--draft-model-path", str(other)])
    assert status != 0 and "error: The model at DRAFT_MODEL_PATH has a different vocabulary" in log


def write_hopeless_models(directory: Path) -> None:
    def write(name: str, config: dict[str, Any], weights: str = "model.safetensors") -> None:
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps(config))
        (directory / name / weights).write_bytes((2).to_bytes(8, "little") + b"{}")

    write("pickle", {"model_type": "qwen3"}, "pytorch_model.bin")
    write("bert", {"model_type": "vit"})
    write("huge", {"model_type": "qwen3", "vocab_size": 2**40})
    (directory / "huge" / "tokenizer.json").write_text("{}")


LONG: dict[str, Any] = {"model": MODEL, "messages": HELLO, "max_tokens": 400, "ignore_eos": True}


def in_background(work: Callable[[], Any]) -> Callable[[], Any]:
    """Starts `work` in a thread; call the result to wait for what it returns."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()

    def wait() -> Any:
        thread.join(60)
        return results[0]

    return wait


def wait_until_running(server: Server, num_sequences: int = 1) -> None:
    deadline = time.monotonic() + 30
    while server.get("/health").json()["running"] < num_sequences:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("command", "status"), [(MAIN, 0), (UVICORN, -signal.SIGTERM)], ids=["main.py", "uvicorn"])
def test_a_signal_lets_running_requests_finish(tiny_checkpoint: Path, command: list[str], status: int) -> None:
    with serve(command, MODEL_PATH=str(tiny_checkpoint), SHUTDOWN_TIMEOUT="120") as server:
        server.wait_until_healthy()
        stream = in_background(lambda: raw_events(server, **LONG))
        whole = in_background(lambda: server.post("/v1/chat/completions", **LONG))
        wait_until_running(server, 2)
        server.process.terminate()
        assert stream()[-1] == "data: [DONE]" and len(stream()) > 20
        assert whole().status_code == 200 and whole().json()["usage"]["completion_tokens"] == 400
        assert server.process.wait(60) == status
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("num_signals", [1, 2], ids=["after the grace time", "at a second signal"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_does_not_finish_in_time_gets_an_error(tiny_checkpoint: Path, number: int, num_signals: int) -> None:
    timeout = "0.1" if num_signals == 1 else "60"
    with serve(MAIN, MODEL_PATH=str(tiny_checkpoint), SHUTDOWN_TIMEOUT=timeout) as server:
        server.wait_until_healthy()
        stream = in_background(lambda: raw_events(server, **LONG, n=16))
        whole = in_background(lambda: server.post("/v1/chat/completions", **LONG, n=16))
        wait_until_running(server, 32)
        for _ in range(num_signals):
            server.process.send_signal(number)
            time.sleep(0.05)
        error = json.loads(stream()[-1].removeprefix("data: "))["error"]
        assert "shutting down" in error["message"]
        assert whole().status_code == 503 and whole().json()["error"]["message"] == error["message"]
        assert server.process.wait(10) == 0
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_loading_ends_the_process_at_once(tiny_checkpoint: Path, number: int) -> None:
    with serve(MAIN, is_cold=True, MODEL_PATH=str(tiny_checkpoint)) as server:
        assert server.get("/health").status_code == 503
        server.process.send_signal(number)
        assert server.process.wait(15) == 0
        assert not any("is ready" in line for line in server.lines)
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.parametrize("command", [MAIN, UVICORN], ids=["main.py", "uvicorn"])
def test_an_open_address_without_a_key_is_warned_about(tiny_checkpoint: Path, command: list[str]) -> None:
    opened = ["0.0.0.0" if word == "127.0.0.1" else word for word in [*command, "--host", "127.0.0.1"]]
    for words, is_warned in ((command, False), (opened, True)):
        with serve(words, MODEL_PATH=str(tiny_checkpoint)) as server:
            server.wait_until_listening()
        assert any("WARNING" in line and "no key" in line for line in server.lines) is is_warned
