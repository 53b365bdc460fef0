"""Tiny models that see, of Qwen 3 VL, Qwen 3.5 and Gemma 4, through the server: answers are transformers' own."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from PIL import Image
from process import MAIN, Server, serve
from seeing_models import generated, picture, processed, save_seeing_checkpoint
from test_agent_conversation import CITIES, TOOL

KINDS = ("qwen3_vl", "qwen3_5", "gemma4_small", "gemma4")
MODEL = "Tiny"
COUNT = 12  # tokens of an answer
Seeing = tuple[str, Path, Server]  # the kind of model, its folder, and the server that has loaded it


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Seeing]]:
    """Starts the server of a kind of model when it is first asked for."""
    with ExitStack() as stack:

        @cache
        def start(kind: str) -> Seeing:
            directory = save_seeing_checkpoint(tmp_path_factory.mktemp("models") / MODEL, kind)
            settings = {"MODEL_PATH": str(directory), "DTYPE": "float32", "MAX_MODEL_LEN": "2048"}
            server = stack.enter_context(serve(MAIN, **settings))
            server.wait_until_healthy()
            return kind, directory, server

        yield start


@pytest.fixture(params=KINDS)
def seeing(request: pytest.FixtureRequest, opened: Callable[[str], Seeing]) -> Seeing:
    return opened(request.param)


@pytest.fixture(params=[kind for kind in KINDS if kind.startswith("gemma")])
def gemma(request: pytest.FixtureRequest, opened: Callable[[str], Seeing]) -> Server:
    return opened(request.param)[2]


def url_of(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def seen(number: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(number)}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": [text("What is this?"), seen(1)]}],
    "alone": [{"role": "user", "content": [seen(2)]}],
    "several": [{"role": "user", "content": [text("Compare"), seen(1), text("with"), seen(2), seen(1), text("!")]}],
    "turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [seen(1), text("What is this?")]},
        {"role": "assistant", "content": "A picture."},
        {"role": "user", "content": [text("And this?"), seen(3)]},
    ],
}


def sent(messages: list[dict[str, Any]], **options: str) -> Any:
    """The same conversation with data URLs."""

    def part(one: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": url_of(one["image"]), **options}} if "image" in one else one

    return [
        {**m, "content": [part(one) for one in m["content"]]} if isinstance(m["content"], list) else m for m in messages
    ]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_answers_are_transformers_own(seeing: Seeing, name: str) -> None:
    kind, directory, server = seeing
    inputs = processed(kind, CONVERSATIONS[name])
    expected = generated(kind, directory, inputs, COUNT)
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": MODEL, "messages": sent(CONVERSATIONS[name]), "max_tokens": COUNT, "temperature": 0}
        answer = client.chat.completions.create(**asked)
        assert answer.choices[0].message.content == expected
        assert answer.usage and answer.usage.prompt_tokens == inputs["input_ids"].shape[1]
        chunks = client.chat.completions.create(**asked, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected


def test_responses_see_the_same(seeing: Seeing) -> None:
    kind, directory, server = seeing
    expected = generated(kind, directory, processed(kind, CONVERSATIONS["one"]), COUNT)
    given: Any = [
        {"type": "input_text", "text": "What is this?"},
        {"type": "input_image", "image_url": url_of(picture(1)), "detail": "auto"},
    ]
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        response = client.responses.create(
            model=MODEL, input=[{"role": "user", "content": given}], max_output_tokens=COUNT, temperature=0
        )
    assert response.output_text == expected


def test_a_second_turn_takes_over_the_first_ones_picture(seeing: Seeing) -> None:
    """As Open WebUI sends it: a streamed chat, the pictures of all turns again, text beside them, and no detail."""
    _, _, server = seeing
    first = sent([{"role": "user", "content": [text("What colour? " * 20), seen(7)]}])
    asked: Any = {"model": MODEL, "max_tokens": 5, "temperature": 0, "stream": True}
    asked["stream_options"] = {"include_usage": True}
    with OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        *_, one = client.chat.completions.create(messages=first, **asked)
        turns = [*first, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Sure?"}]
        *_, two = client.chat.completions.create(messages=turns, **asked)
    assert one.usage and two.usage and two.usage.prompt_tokens_details
    assert (two.usage.prompt_tokens_details.cached_tokens or 0) >= one.usage.prompt_tokens - 48


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, "video_url"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}, "input_audio"),
        ({"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA"}}, "file"),
    ],
)
def test_other_kinds_of_parts_are_refused_by_name(seeing: Seeing, part: dict[str, Any], name: str) -> None:
    _, _, server = seeing
    messages = [{"role": "user", "content": [text("What is this?"), part]}]
    answer = server.post("/v1/chat/completions", model=MODEL, messages=messages)
    error = answer.json()["error"]
    assert answer.status_code == 400 and name in error["message"]
    assert error["param"] == "messages[0].content[1]"


def test_extreme_pictures_are_answered_or_refused_and_the_server_lives_on(seeing: Seeing) -> None:
    kind, _, server = seeing

    def ask(size: tuple[int, int], detail: str = "auto") -> Any:
        messages = sent([{"role": "user", "content": [{"image": picture(1).resize(size)}]}], detail=detail)
        return server.post("/v1/chat/completions", model=MODEL, messages=messages, max_tokens=3, temperature=0)

    before = ask((40, 30)).json()["choices"]
    for size in ((1, 1), (1, 150), (150, 1), (3000, 20), (1, 199)):
        assert ask(size).status_code == 200, size
    for size in ((1, 20000), (20000, 1)):
        answer = ask(size)
        assert answer.status_code == (200 if kind.startswith("gemma") else 400), answer.text
        if answer.status_code == 400:
            assert answer.json()["error"]["code"] == "invalid_image"
            assert answer.json()["error"]["param"] == "messages[0].content[0]"
    assert ask((40, 30), "best").json()["error"]["param"] == "messages[0].content[0].detail"
    assert ask((40, 30)).json()["choices"] == before


def test_pictures_that_do_not_fit_are_refused_before_they_are_encoded(seeing: Seeing) -> None:
    kind, _, server = seeing
    detail = "high" if kind.startswith("gemma") else "auto"
    parts = [{"image": Image.effect_noise((256, 200 + n), 90).convert("RGB")} for n in range(16)]
    messages = sent([{"role": "user", "content": [*parts, text("word " * 400)]}], detail=detail)
    answer = server.post("/v1/chat/completions", model=MODEL, messages=messages, max_tokens=3)
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded", answer.text


def test_a_placeholder_in_a_raw_prompt_is_only_a_token(seeing: Seeing) -> None:
    """Also beside requests with pictures, whose steps it shares."""
    kind, directory, server = seeing
    mark = "<|image|>" if kind.startswith("gemma") else "<|image_pad|>"
    raw = {"model": MODEL, "prompt": f"{mark} x", "max_tokens": COUNT, "temperature": 0}
    alone = server.post("/v1/completions", **raw).json()["choices"][0]["text"]
    inputs = processed(kind, CONVERSATIONS["one"])
    expected = generated(kind, directory, inputs, COUNT)
    messages = sent(CONVERSATIONS["one"])
    chat = {"model": MODEL, "messages": messages, "max_tokens": COUNT, "temperature": 0}
    with ThreadPoolExecutor(8) as pool:
        raws = [pool.submit(server.post, "/v1/completions", **raw) for _ in range(4)]
        chats = [pool.submit(server.post, "/v1/chat/completions", **chat) for _ in range(4)]
    assert {answer.result().json()["choices"][0]["text"] for answer in raws} == {alone}
    assert {answer.result().json()["choices"][0]["message"]["content"] for answer in chats} == {expected}


# --- tools and thoughts of Gemma 4


def test_gemma_4_is_a_family_whose_calls_are_its_own(gemma: Server) -> None:
    """A picture, a forced call, its result, and the turn that goes on behind it."""
    (listed,) = gemma.get("/v1/models").json()["data"]
    assert listed["family"] == "Gemma 4"
    asked: Any = {"model": MODEL, "tools": [TOOL], "temperature": 0, "max_tokens": 200}
    messages = [*sent(CONVERSATIONS["one"])]
    for _ in range(2):
        with OpenAI(base_url=gemma.url + "/v1", api_key="none", max_retries=0) as client:
            answer = client.chat.completions.create(messages=messages, tool_choice="required", **asked)
            chunks = list(
                client.chat.completions.create(messages=messages, tool_choice="required", stream=True, **asked)
            )
        calls = answer.choices[0].message.tool_calls
        assert calls and answer.choices[0].finish_reason == "tool_calls"
        arguments = json.loads(calls[0].function.arguments)
        assert arguments["city"] in CITIES and 1 <= arguments["days"] <= 9
        pieces = [call for chunk in chunks if chunk.choices for call in chunk.choices[0].delta.tool_calls or ()]
        streamed = "".join(piece.function.arguments or "" for piece in pieces if piece.index == 0 and piece.function)
        assert json.loads(streamed) == arguments
        messages.append(answer.choices[0].message.model_dump(exclude_none=True))
        messages += [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
    tokens = gemma.post("/tokenize", model=MODEL, messages=messages, tools=[TOOL], return_token_strs=True).json()
    prompt = "".join(tokens["token_strs"])
    assert prompt.count("<|tool_response>response:weather{") == prompt.count("<|tool_call>call:weather{") >= 2
    assert prompt.endswith("<tool_response|>") and "<|tool>declaration:weather{" in prompt


@pytest.mark.parametrize(
    ("body", "thinks"),
    [
        ({}, False),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "high"}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
    ],
)
def test_gemma_4_thinks_where_it_is_asked_to(gemma: Server, body: dict[str, Any], thinks: bool) -> None:
    messages = sent(CONVERSATIONS["turns"])
    tokens = gemma.post("/tokenize", model=MODEL, messages=messages, return_token_strs=True, **body).json()
    prompt = "".join(tokens["token_strs"])
    assert ("<|turn>system\n<|think|>\nBe brief.<turn|>" in prompt) == thinks
    assert prompt.endswith("<|turn>model\n" if thinks else "<|turn>model\n<|channel>thought\n<channel|>")
