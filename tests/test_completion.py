"""Text completions: what is echoed, scored and filled in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import byte_tokenizer, save_tiny_checkpoint
from openai import OpenAI
from openai.types import Completion
from process import MAIN, Server, serve
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

MODEL = "Tiny-Qwen3"
PROMPT = "Größe 世界 of a prompt that is longer than a chunk of sixty-four tokens, so that it is computed in several"


def expected_logprobs(checkpoint: Path, token_ids: list[int]) -> list[float]:
    """Of each token but the first, by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        rows = model(torch.tensor([token_ids])).logits[0, :-1].log_softmax(-1)
    return rows.gather(-1, torch.tensor(token_ids[1:])[:, None])[:, 0].tolist()


def test_echoed_log_probabilities_are_those_of_transformers(
    client: OpenAI, server: Server, tiny_checkpoint: Path
) -> None:
    token_ids = byte_tokenizer()(PROMPT).input_ids
    expected = expected_logprobs(tiny_checkpoint, token_ids)
    for prompt in (PROMPT, token_ids):
        choice = client.completions.create(model=MODEL, prompt=prompt, echo=True, logprobs=2, max_tokens=0).choices[0]
        assert choice.text == PROMPT and choice.finish_reason == "length" and choice.logprobs is not None
        [first, *others] = choice.logprobs.token_logprobs or []
        assert first is None and others == pytest.approx(expected, abs=1e-3)
        assert choice.logprobs.top_logprobs is not None and choice.logprobs.top_logprobs[0] is None


def test_no_new_tokens_are_one_step_and_one_end(server: Server) -> None:
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    *events, done, _ = server.post("/v1/completions", **body, echo=True, logprobs=0).text.split("\n\n")
    text, usage = (json.loads(event.removeprefix("data: ")) for event in events)
    assert text["choices"][0]["text"] == PROMPT and text["choices"][0]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 0 and usage["timings"]["predicted_n"] == 0
    refusal = server.post("/v1/completions", model=MODEL, prompt="x", max_tokens=0, min_tokens=1)
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == "min_tokens"
    assert refusal.json()["error"]["message"] == "min_tokens must be at most 0 tokens, which is max_tokens: lower it."


def test_several_prompts_are_scored_while_others_decode(server: Server, tiny_checkpoint: Path) -> None:
    prompts = [PROMPT[i:] for i in range(0, 60, 10)]
    body = {
        "model": MODEL,
        "prompt": prompts,
        "n": 2,
        "echo": True,
        "logprobs": 0,
        "max_tokens": 20,
        "ignore_eos": True,
    }
    answer = server.post("/v1/completions", **body).json()
    assert [c["index"] for c in answer["choices"]] == list(range(12))
    for choice in answer["choices"]:
        token_ids = byte_tokenizer()(prompts[choice["index"] // 2]).input_ids
        logprobs = choice["logprobs"]
        assert len(logprobs["token_logprobs"]) == len(token_ids) + 20 == len(logprobs["tokens"])
        # as OpenAI sends it, though the SDK's model says numbers
        assert logprobs["token_logprobs"].pop(0) is None and logprobs["top_logprobs"].pop(0) is None
        expected = expected_logprobs(tiny_checkpoint, token_ids)
        assert logprobs["token_logprobs"][: len(expected)] == pytest.approx(expected, abs=1e-3)
    assert Completion.model_validate(answer)


def test_text_offsets_are_the_places_of_the_tokens_in_the_text(server: Server) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "echo": True, "logprobs": 0, "max_tokens": 10, "logit_bias": {"64": 100}}
    choice = server.post("/v1/completions", **body).json()["choices"][0]
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[-1] == len(choice["text"]) - 1
    for token, offset in zip(choice["logprobs"]["tokens"], offsets, strict=True):
        assert token.startswith("bytes:") or choice["text"][offset] == token


def test_what_best_of_computed_itself_is_not_counted_as_cached(server: Server) -> None:
    prompt = "A prompt that no other test sends, and that is some blocks of sixteen tokens long."
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 4, "temperature": 2, "ignore_eos": True}
    for seed, cached in ((1, 0), (2, (len(prompt) - 1) // 16 * 16)):
        usage = server.post("/v1/completions", **body, best_of=6, seed=seed).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == cached and usage["completion_tokens"] == 24


def test_an_echo_is_the_beginning_of_the_stream_and_stop_strings_do_not_cut_it(server: Server, client: OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": "a stop b", "echo": True, "stop": "stop", "temperature": 0}
    body |= {"logit_bias": {"64": 100}, "max_tokens": 6, "logprobs": 1}
    whole = server.post("/v1/completions", **body).json()["choices"][0]
    assert whole["text"] == "a stop b" + "a" * 6
    extra = {"extra_body": {"echo": True}}
    del body["echo"]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**body, **extra, stream=True)]
    assert chunks[0].text.startswith("a stop b") and "".join(c.text for c in chunks) == whole["text"]
    streamed = [value for c in chunks if c.logprobs for value in c.logprobs.token_logprobs or []]
    assert streamed == whole["logprobs"]["token_logprobs"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"echo": 1}, "echo"),
        ({"suffix": "x", "echo": True}, "suffix"),
        ({"suffix": "x", "prompt": [5, 6]}, "suffix"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(server: Server, body: dict[str, Any], param: str) -> None:
    refusal = server.post("/v1/completions", **{"model": MODEL, "prompt": "x", **body})
    assert refusal.status_code == 400 and refusal.json()["error"]["param"] == param


def test_a_model_with_the_marks_fills_in_the_middle(tmp_path: Path) -> None:
    marks = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    directory = save_tiny_checkpoint(tmp_path / "Filler")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks])
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    with serve(MAIN, MODEL_PATH=str(directory), DTYPE="float32") as server:
        server.wait_until_healthy()
        options = {"model": "Filler", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
        ids = tokenizer.convert_tokens_to_ids(marks)
        banned = {"logit_bias": dict.fromkeys(ids, -100)}  # they would end the answer
        filled = server.post("/v1/completions", prompt="def f(", suffix="): pass", **options, **banned).json()
        written = f"{marks[0]}def f({marks[1]}): pass{marks[2]}"
        by_hand = server.post("/v1/completions", prompt=written, **options, **banned).json()
        assert filled["choices"][0]["text"] == by_hand["choices"][0]["text"]
        assert filled["usage"]["prompt_tokens"] == len("def f(): pass") + 3
        ended = server.post("/v1/completions", prompt="a", suffix="b", **options, logit_bias={ids[0]: 100}).json()
        assert ended["usage"]["completion_tokens"] == 1 and ended["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_choices_of_neighbouring_seeds_do_not_repeat_each_other(server: Server, path: str) -> None:
    question = {"prompt": "x"} if path == "completions" else {"messages": [{"role": "user", "content": "x"}]}
    body = {"model": MODEL, **question, "max_tokens": 12, "temperature": 1.5, "ignore_eos": True, "n": 4}
    found = [
        choice["text"] if path == "completions" else choice["message"]["content"]
        for seed in range(4)
        for choice in server.post(f"/v1/{path}", **body, seed=seed).json()["choices"]
    ]
    assert len(set(found)) == len(found) == 16
