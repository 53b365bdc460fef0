"""Pictures on their way into prompts: crops and texts are those of the genuine processors, for any size and detail."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from genuine_templates import source_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from seeing_models import KINDS, dialect_of, family_of, picture, seeing_tokenizer
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from prompt_templates import PromptTemplate, RenderOptions
from schemas import Message
from vision.gemma4 import MOST_TOKENS as GEMMA_TOKENS
from vision.qwen_vl import MOST_TOKENS as QWEN_TOKENS

PICTURE = {"type": "image_url", "image_url": {"url": "data:,"}}
USER = {"role": "user", "content": [PICTURE, {"type": "text", "text": "?"}]}
SIZES = st.tuples(st.integers(1, 300), st.integers(1, 300))


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_a_picture_is_the_genuine_processors(kind: str) -> None:
    dialect = dialect_of(kind)
    if kind.startswith("gemma"):
        before, behind = dialect.around
        processor = SimpleNamespace(boi_token=before, image_token=dialect.image, eoi_token=behind)
        expected = Gemma4Processor.replace_image_token(processor, {"num_soft_tokens_per_image": [6]}, 0)
    else:
        processor = SimpleNamespace(image_processor=SimpleNamespace(merge_size=2), image_token=dialect.image)
        grid = {"image_grid_thw": torch.tensor([[1, 4, 6]])}
        expected = Qwen3VLProcessor.replace_image_token(processor, grid, 0)
    assert family_of(kind).prompt_text([(2, 3)]) == expected


@pytest.mark.parametrize("kind", ["gemma4", "qwen3_vl"])
@given(size=SIZES, detail=st.sampled_from(["low", "auto", "high"]))
def test_crops_are_the_genuine_processors_without_padding(kind: str, size: tuple[int, int], detail: str) -> None:
    seen, told = picture(1).resize(size), KINDS[kind].details[detail]
    if kind == "qwen3_vl" and max(size) > 200 * min(size):
        with pytest.raises(ValueError, match="aspect ratio"):
            family_of(kind).crops(KINDS[kind].processor(), seen, detail)
        return
    (crop,) = family_of(kind).crops(KINDS[kind].processor(), seen, detail)
    found = KINDS[kind].processor()(seen, return_tensors="pt", **told)
    pixels = found["pixel_values"] if kind == "qwen3_vl" else found["pixel_values"][0]
    assert torch.equal(crop.pixels, pixels[: len(crop.pixels)]) and not pixels[len(crop.pixels) :].any()
    if kind == "gemma4":
        assert crop.num_tokens == found["num_soft_tokens_per_image"][0]
    else:
        assert [1, *(2 * side for side in crop.grid)] == found["image_grid_thw"][0].tolist()


@given(size=SIZES)
def test_a_picture_of_gemma_4_12b_is_cut_as_the_merged_patches_of_the_others(size: tuple[int, int]) -> None:
    """Its genuine processor, which needs torchvision, cuts small patches and joins nine of them to one."""
    seen = picture(2).resize(size)
    (crop,) = family_of("gemma4_unified").crops(KINDS["gemma4_unified"].processor(), seen, "auto")
    rows, columns = crop.grid
    small = KINDS["gemma4"].processor()(seen, return_tensors="pt")["pixel_values"][0, : 9 * rows * columns]
    whole = small.view(rows, 3, columns, 3, 8, 8, 3).permute(0, 1, 4, 2, 3, 5, 6).reshape(24 * rows, 24 * columns, 3)
    large = whole.view(rows, 24, columns, 24, 3).transpose(1, 2).reshape(rows * columns, -1)
    assert torch.equal(crop.pixels, large)


@pytest.mark.parametrize("detail", ["low", "auto", "high", "original"])
@pytest.mark.parametrize("size", [(4000, 3000), (300, 200), (1, 1), (3000, 100)])
def test_a_picture_takes_as_many_tokens_as_its_detail_allows(size: tuple[int, int], detail: str) -> None:
    seen = Image.new("RGB", size)
    config = SimpleNamespace(image_token_id=1, vision_config=SimpleNamespace(spatial_merge_size=2))
    qwen: Any = type(family_of("qwen3_vl"))(config)
    genuine = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 65536, "longest_edge": 16777216})
    (crop,) = qwen.crops(genuine, seen, detail)
    assert crop.num_tokens <= QWEN_TOKENS[detail]
    if size == (4000, 3000):
        assert crop.num_tokens > 0.9 * QWEN_TOKENS[detail]
    if size == (300, 200):
        assert abs(crop.num_tokens - 300 * 200 / 32**2) < math.hypot(10, 7)
    (crop,) = family_of("gemma4").crops(Gemma4ImageProcessorPil(), seen, detail)
    most = GEMMA_TOKENS.get(detail, 280)
    assert 0 < crop.num_tokens <= most
    if min(size) > 1 and size != (3000, 100):
        assert crop.num_tokens > 0.8 * most


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma4"])
def test_a_template_without_pictures_gets_them_in_the_familys_own_form(kind: str) -> None:
    """A tokenizer that has no template of its own, as some files have none."""
    tokenizer, genuine = seeing_tokenizer(kind), PromptTemplate(seeing_tokenizer(kind), kind, family_of(kind))
    tokenizer.chat_template = None
    plain = PromptTemplate(tokenizer, kind, family_of(kind))
    assert plain.sees and genuine.sees
    options = RenderOptions(image_grids=[[(1, 5)]])
    shown = [
        template.tokenizer.decode(template.render_chat([Message.model_validate(USER)], options))
        for template in (plain, genuine)
    ]
    turn = [text.partition("user\n")[2].partition("?")[0] for text in shown]
    assert turn[0] == turn[1] and turn[0].count(dialect_of(kind).image) == 5


def test_boundaries_are_where_another_turn_would_differ_also_beside_pictures() -> None:
    template = PromptTemplate(seeing_tokenizer("qwen3_5"), "qwen3_5", family_of("qwen3_5"))
    system, answer = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "A cat."}
    messages = [Message.model_validate(m) for m in (system, USER, answer, USER)]
    options = RenderOptions(image_grids=[[(1, 5)], [(7, 1)]])
    prompt_ids, (before, after) = template.render_turns(messages, options)
    assert prompt_ids == template.render_chat(messages, options)
    pads = "<|image_pad|>" * 7
    shown = template.tokenizer.decode(prompt_ids[before:])
    assert shown.startswith(f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>?<|im_end|>\n")
    assert template.tokenizer.decode(prompt_ids[after:]).startswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("name", ["google-gemma-4-31B-it", "google-gemma-4-31B-it-interleaved"])
def test_a_picture_in_a_result_leaves_gemma_4_its_native_calls(name: str) -> None:
    """As an agent returns a screenshot."""
    tokenizer = seeing_tokenizer("gemma4")
    tokenizer.chat_template = source_of(name)
    template = PromptTemplate(tokenizer, "gemma4", family_of("gemma4"))
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    result = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "here"}, PICTURE]}
    messages = [{"role": "user", "content": "Look."}, {"role": "assistant", "tool_calls": [call]}, result]
    tool = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
    options = RenderOptions(tools=[tool], image_grids=[[(1, 3)]])
    prompt = template.tokenizer.decode(template.render_chat([Message.model_validate(m) for m in messages], options))
    response = '<|tool_response>response:look{value:<|"|>here<|"|>}<tool_response|>'
    assert "<|tool>declaration:look" in prompt and f"<|tool_call>call:look{{}}<tool_call|>{response}" in prompt
    shown = "<|image><|image|><|image|><|image|><image|><turn|>\n<|turn>model\n"
    assert prompt.partition(response)[2].startswith(shown)
