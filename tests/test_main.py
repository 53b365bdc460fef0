"""The server process as its clients see it: the official SDK, raw requests, and people who leave."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import Template
from main_requests import HELLO, MODEL, raw_events
from models import byte_tokenizer
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from process import Server
from transformers import AutoModelForCausalLM

from text.logprobs import TokenTexts


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
    assert answer.headers["x-ignored-fields"] == "foo, mirostat, num_ctx"
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


def test_the_tokenizer_is_described_as_its_files_describe_it(server: Server) -> None:
    info, ours = server.get("/tokenizer_info").json(), byte_tokenizer()
    assert info["tokenizer_class"] == type(ours).__name__ and info["model_max_length"] == 480
    assert {name: info[name] for name in ("bos_token", "eos_token", "pad_token")} == {
        name: getattr(ours, name) for name in ("bos_token", "eos_token", "pad_token")
    }
    assert info["added_tokens_decoder"] == {str(i): str(token) for i, token in ours.added_tokens_decoder.items()}
    asked = server.post("/tokenize", prompt=info["eos_token"], add_special_tokens=False).json()
    assert asked["tokens"] == [ours.eos_token_id]
    turns = [{"role": "user", "content": "Hello"}]
    text = Template(info["chat_template"]).render(messages=turns, add_generation_prompt=True)
    rendered = server.post("/tokenize", prompt=text, add_special_tokens=False).json()
    assert rendered["tokens"] == server.post("/tokenize", messages=turns).json()["tokens"]
