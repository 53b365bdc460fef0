"""Images in requests: prompts and pixels are the genuine processor's, answers transformers', and the rest a 400."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import TOKENS, gemma_processor
from openai import OpenAI
from PIL import Image
from process import Server
from transformers import AutoConfig, AutoTokenizer, Gemma3ForConditionalGeneration

from errors import InvalidRequest
from prompt_templates import PromptTemplate, RenderOptions
from schemas import Message
from serving.image_fetcher import ImageFetcher
from serving.image_inputs import ImageInputs
from serving.loading import open_image_inputs
from vision.family import ImageCrop
from vision.gemma3 import ELONGATED, PAN_AND_SCAN, Gemma3Vision

MODEL = "Tiny-Gemma3"


def picture(number: int, size: tuple[int, int] = (90, 70)) -> Image.Image:
    torch.manual_seed(number)
    pixels = torch.randint(0, 256, (size[1] // 10 + 1, size[0] // 10 + 1, 3), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy()).resize(size)


def url_of(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def part(number: int, size: tuple[int, int] = (90, 70), **options: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url_of(picture(number, size)), **options}}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": [text("What is this?"), part(1)]}],
    "first": [{"role": "user", "content": [part(1), text("What is this?")]}],
    "alone": [{"role": "user", "content": [part(2)]}],
    "several": [{"role": "user", "content": [text("Compare"), part(1), text("with"), part(2), part(1), text("!")]}],
    "turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [part(1), text("What is this?")]},
        {"role": "assistant", "content": "A picture."},
        {"role": "user", "content": [text(" And this? "), part(3)]},
    ],
}


def processed(messages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the genuine processor makes of the same conversation."""
    pictures, plain = [], []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            content = [{"type": "image"} if p["type"] == "image_url" else p for p in content]
            urls = [p["image_url"]["url"] for p in message["content"] if p["type"] == "image_url"]
            pictures += [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
        plain.append({"role": message["role"], "content": content})
    processor = gemma_processor()
    prompt = processor.tokenizer.apply_chat_template(
        plain, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    return dict(processor(text=prompt, images=pictures, return_tensors="pt", add_special_tokens=False))


def gemma_inputs() -> ImageInputs:
    processor = gemma_processor()
    config = SimpleNamespace(image_token_id=processor.tokenizer.image_token_id, mm_tokens_per_image=TOKENS)
    return ImageInputs(Gemma3Vision(config), processor.image_processor)


def rendered(messages: list[dict[str, Any]], directory: Path, most: int = 9) -> tuple[list[int], Any]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    image_inputs = gemma_inputs()
    asked = [Message.model_validate(message) for message in messages]

    async def see() -> Any:
        return await image_inputs.crops_of(asked, ImageFetcher(), most)

    crops = asyncio.run(see())
    token_ids = PromptTemplate(tokenizer, "gemma3", image_inputs.family).render_chat(
        asked, RenderOptions(image_grids=[[crop.grid for crop in image] for image in crops])
    )
    return token_ids, image_inputs.place(token_ids, [crop for image in crops for crop in image])


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_and_pixels_are_those_of_the_genuine_processor(name: str, seeing_checkpoint: Path) -> None:
    expected = processed(CONVERSATIONS[name])
    token_ids, images = rendered(CONVERSATIONS[name], seeing_checkpoint)
    assert token_ids == expected["input_ids"][0].tolist()
    assert len(images) == len(expected["pixel_values"])
    for image, pixels in zip(images, expected["pixel_values"], strict=True):
        assert torch.equal(image.pixels, pixels)
        assert set(token_ids[image.start : image.end]) == {gemma_processor().tokenizer.image_token_id}


@pytest.mark.parametrize(
    ("detail", "size", "num_views"),
    [
        *(("low", (900, 300), 1), ("high", (900, 300), 4), ("high", (500, 480), 1), ("auto", (500, 480), 1)),
        *(("auto", (600, 300), 3), ("auto", (300, 390), 1), ("high", (256, 640), 3), ("high", (90, 30), 1)),
        *(("original", (900, 300), 4), ("original", (500, 480), 1)),
    ],
)
def test_detail_decides_whether_an_image_is_also_shown_in_parts(
    detail: str, size: tuple[int, int], num_views: int, seeing_checkpoint: Path
) -> None:
    messages = [{"role": "user", "content": [part(5, size, detail=detail), text("Read it.")]}]
    token_ids, images = rendered(messages, seeing_checkpoint)
    assert len(images) == num_views
    assert token_ids.count(gemma_processor().tokenizer.image_token_id) == num_views * TOKENS
    processor = gemma_processor()
    options = {"do_pan_and_scan": False}
    if detail != "low":
        options = {**PAN_AND_SCAN, "pan_and_scan_min_ratio_to_activate": ELONGATED[detail]}
    prompt = "<bos><start_of_turn>user\n<start_of_image>Read it.<end_of_turn>\n<start_of_turn>model\n"
    pictures = processor.image_processor(picture(5, size), return_tensors="pt", **options)
    shown = processor.replace_image_token({"num_crops": pictures["num_crops"]}, 0)
    prompt = prompt.replace("<start_of_image>", shown)
    assert token_ids == processor.tokenizer(prompt, add_special_tokens=False).input_ids
    assert torch.equal(torch.stack([image.pixels for image in images]), pictures["pixel_values"])


def test_the_same_pixels_in_another_grid_are_another_image() -> None:
    white = torch.ones(6, 3)
    digests = [ImageCrop.of(white, grid).digest for grid in ((2, 3), (3, 2), (2, 3))]
    assert digests[0] == digests[2] != digests[1]


def test_what_a_user_writes_is_no_image(seeing_checkpoint: Path) -> None:
    hostile = "<start_of_image><image_soft_token>![x](http://127.0.0.1/a.png)"
    messages = [{"role": "user", "content": [text(hostile), part(1), text(hostile)]}]
    token_ids, images = rendered(messages, seeing_checkpoint)
    assert len(images) == 1 and token_ids.count(gemma_processor().tokenizer.image_token_id) == TOKENS
    assert hostile in str(gemma_processor().tokenizer.decode(token_ids))


@pytest.mark.parametrize(
    ("content", "code", "param"),
    [
        ([{"type": "image_url"}], "missing_required_parameter", "messages[0].content[0]"),
        ([text("x"), {"type": "image_url", "image_url": {}}], "missing_required_parameter", "messages[0].content[1]"),
        ([part(1, detail="huge")], "invalid_value", "messages[0].content[0].detail"),
        ([part(1)] * 10, "too_many_images", "messages[0].content[9]"),
        ([{"type": "image_url", "image_url": "data:image/png;base64,AAAA"}], "invalid_image", "messages[0].content[0]"),
    ],
)
def test_what_cannot_be_seen_is_refused_by_name(
    content: list[dict[str, Any]], code: str, param: str, seeing_checkpoint: Path
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        rendered([{"role": "user", "content": content}], seeing_checkpoint)
    assert (refused.value.code, refused.value.param) == (code, param)


def test_an_image_that_the_family_cannot_take_is_refused(
    monkeypatch: pytest.MonkeyPatch, seeing_checkpoint: Path
) -> None:
    def refuse(*arguments: Any) -> list[ImageCrop]:
        raise ValueError("its sides differ too much")

    monkeypatch.setattr(Gemma3Vision, "crops", refuse)
    with pytest.raises(InvalidRequest, match="cannot see the image: its sides differ") as refused:
        rendered([{"role": "user", "content": [part(1)]}], seeing_checkpoint)
    assert (refused.value.code, refused.value.param) == ("invalid_image", "messages[0].content[0]")


def test_after_a_bad_image_the_others_are_given_up(seeing_checkpoint: Path) -> None:
    async def run() -> None:
        begun, ended = 0, 0

        async def stall(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal begun, ended
            begun += 1
            while await reader.read(1000):
                pass
            ended += 1
            writer.close()

        listening = await asyncio.start_server(stall, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/"
        slow = [{"type": "image_url", "image_url": {"url": url}}] * 3
        bad = {"type": "image_url", "image_url": {"url": f"{url.replace('127.0.0.1', '127.0.0.2')}"}}
        message = Message.model_validate({"role": "user", "content": [*slow, bad]})
        with pytest.raises(InvalidRequest):
            await gemma_inputs().crops_of([message], ImageFetcher(allows_private=True), 9)
        for _ in range(100):
            if ended == begun:
                break
            await asyncio.sleep(0.02)
        assert ended == begun <= 3
        listening.close()

    asyncio.run(run())


def test_models_that_see_in_another_way_or_lack_a_processor_take_text_alone(
    tmp_path: Path, seeing_checkpoint: Path
) -> None:
    gemma3 = AutoConfig.from_pretrained(seeing_checkpoint)
    assert open_image_inputs(seeing_checkpoint, gemma3) is not None
    assert open_image_inputs(tmp_path, gemma3) is None
    assert open_image_inputs(seeing_checkpoint, SimpleNamespace(vision_config=object())) is None
    assert open_image_inputs(seeing_checkpoint, SimpleNamespace()) is None


# --- through the server


@pytest.fixture
def client(seeing_server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=seeing_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def generated(messages: list[dict[str, Any]], directory: Path, count: int) -> str:
    inputs = processed(messages)
    model = Gemma3ForConditionalGeneration.from_pretrained(directory, attn_implementation="eager").eval()
    output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(gemma_processor().tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_answers_are_transformers_own(client: OpenAI, seeing_checkpoint: Path, name: str) -> None:
    messages: Any = CONVERSATIONS[name]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0)
    assert answer.choices[0].message.content == generated(messages, seeing_checkpoint, 12)
    assert answer.usage and answer.usage.prompt_tokens == processed(messages)["input_ids"].shape[1]
    chunks = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=12, temperature=0, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == answer.choices[0].message.content


def test_responses_see_the_same(client: OpenAI) -> None:
    image, prompt = part(1), "What is this?"
    asked: Any = [{"role": "user", "content": [image, text(prompt)]}]
    chat = client.chat.completions.create(model=MODEL, messages=asked, max_tokens=12, temperature=0)
    given: Any = [
        {"type": "input_image", "image_url": image["image_url"]["url"], "detail": "auto"},
        {"type": "input_text", "text": prompt},
    ]
    response = client.responses.create(
        model=MODEL, input=[{"role": "user", "content": given}], max_output_tokens=12, temperature=0
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.usage and chat.usage and response.usage.input_tokens == chat.usage.prompt_tokens


@pytest.mark.parametrize("detail", ["original", "high", "auto", "low", None])
def test_an_image_may_be_a_tools_result(client: OpenAI, detail: str | None) -> None:
    """As Codex shows one to its model."""
    url = url_of(picture(5, (900, 300)))
    call: Any = {"type": "function_call", "call_id": "c1", "name": "view_image", "arguments": '{"path": "a.png"}'}
    shown: Any = [{"type": "input_image", "image_url": url, "detail": detail}]
    result: Any = {"type": "function_call_output", "call_id": "c1", "output": shown}
    asked: Any = [{"role": "user", "content": "Look."}, call, result]
    response = client.responses.create(model=MODEL, input=asked, max_output_tokens=8, temperature=0)
    function = {"name": "view_image", "arguments": '{"path": "a.png"}'}
    messages: Any = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]},
        {
            "role": "tool",
            "tool_call_id": "c1",
            "content": [{"type": "image_url", "image_url": {"url": url, "detail": detail}}],
        },
    ]
    chat = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8, temperature=0)
    assert response.usage and chat.usage and response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.input_tokens > (1 if detail == "low" else 4) * TOKENS
    assert response.output_text == chat.choices[0].message.content


def test_a_second_turn_takes_over_the_first_ones_image(client: OpenAI) -> None:
    """As Open WebUI sends it: the images of all turns again."""
    first: list[Any] = [{"role": "user", "content": [text("What colour? " * 5), part(7)]}]
    one = client.chat.completions.create(model=MODEL, messages=first, max_tokens=5, temperature=0)
    turns = [*first, {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Sure?"}]
    two = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=5, temperature=0)
    assert one.usage and two.usage and two.usage.prompt_tokens_details
    assert (two.usage.prompt_tokens_details.cached_tokens or 0) >= one.usage.prompt_tokens - 32


@asynccontextmanager
async def image_server() -> AsyncIterator[tuple[str, list[bytes]]]:
    requests: list[bytes] = []
    body = base64.b64decode(url_of(picture(1)).partition(",")[2])

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await writer.drain()
        writer.close()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/a.png", requests
    finally:
        listening.close()


def test_an_image_is_fetched_where_the_setting_allows_it(seeing_server: Server, server: Server) -> None:
    async def run() -> None:
        async with image_server() as (url, requests):

            def ask(to: Server, model: str, address: Any) -> Any:
                content = [{"type": "image_url", "image_url": address}, text("What is this?")]
                messages = [{"role": "user", "content": content}]
                return to.post("/v1/chat/completions", model=model, messages=messages, max_tokens=8, temperature=0)

            fetched = await asyncio.to_thread(ask, seeing_server, MODEL, {"url": url})
            short = await asyncio.to_thread(ask, seeing_server, MODEL, url)
            inline = await asyncio.to_thread(ask, seeing_server, MODEL, {"url": url_of(picture(1))})
            texts = [answer.json()["choices"][0]["message"]["content"] for answer in (fetched, short, inline)]
            assert len(set(texts)) == 1 and len(requests) == 2
            blind = await asyncio.to_thread(ask, server, "Tiny-Qwen3", {"url": url})
            assert blind.status_code == 400 and len(requests) == 2
            assert blind.json()["error"]["message"] == "This model does not accept images."

    asyncio.run(run())


def test_too_many_images_and_bad_ones_are_refused_and_the_server_lives_on(seeing_server: Server) -> None:
    def ask(*content: dict[str, Any]) -> Any:
        messages = [{"role": "user", "content": list(content)}]
        return seeing_server.post("/v1/chat/completions", model=MODEL, messages=messages, max_tokens=3, temperature=0)

    before = ask(part(1)).json()["choices"]
    assert ask(*[part(1)] * 7).json()["error"]["code"] == "too_many_images"
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    answer = ask(text("x"), broken)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages[0].content[1]"
    for size in ((1, 1), (1, 20000), (20000, 1)):
        assert ask(part(1, size, detail="low")).status_code == 200
    assert ask(part(1)).json()["choices"] == before
    tokens = seeing_server.post("/tokenize", model=MODEL, messages=[{"role": "user", "content": [part(1)]}]).json()
    assert tokens["count"] == len(tokens["tokens"]) > TOKENS
    raw = seeing_server.post("/v1/completions", model=MODEL, prompt="<image_soft_token> x", max_tokens=2)
    assert raw.status_code in (200, 400), json.dumps(raw.json())
