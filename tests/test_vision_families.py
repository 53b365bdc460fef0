"""Gemma 4 and Qwen's models that see, in the continuous batch: the tokens are those of transformers' own `generate`."""

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seeing_models import IMAGE, KINDS, crop, expected_tokens, family_of, picture, seeing_model
from test_vision import Unmeasured, finish

from engine.attention import flash, fused
from engine.attention.paged import PrefillChunk, visible_of
from engine.batch import Span
from engine.build import build_engine
from engine.cpu.kernels import are_available
from engine.cpu.packing import pack_model
from engine.engine import Engine, EngineOptions
from engine.layer_probe import probe_layers
from engine.model_runner import ModelRunner
from engine.quantization import BFLOAT16_KERNELS, QUANTIZATIONS
from engine.sampling_params import SamplingParams
from engine.scheduler import AHEAD_BYTES
from engine.sequence import Sequence
from engine.vision import Image, VisionEncoder

NUM_NEW = 10
SMALL_STEPS = EngineOptions(max_num_batched_tokens=24, max_num_mixed_tokens=24, max_num_seqs=8, kv_block_size=8)
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True)

# What stands between numbers of pictures is text, in tokens
LAYOUTS: dict[str, list[Any]] = {
    "one picture": [[7, 3, 9], 0, [5, 6]],
    "a picture first": [2, [5, 6, 7]],
    "two pictures": [[7], 0, [4], 1, [8, 9]],
    "the same picture twice": [[9], 1, [1, 2], 1, [3, 4]],
    "text between": [list(range(10, 40)), 0, list(range(20, 50)), 3, [3]],
    "in the second half of a chunk": [list(range(10, 28)), 2, list(range(30, 60))],
    "other text": [list(range(10, 40)), 2, list(range(20, 50)), 3, [3]],
    "many turns": [[t for i in range(5) for t in (i, i + 50)], 0, [11, 12], 1, [13], 2, list(range(60, 99)), 3, [2]],
}


def prompt_of(kind: str, layout: list[Any], detail: str = "auto") -> tuple[list[int], tuple[Image, ...]]:
    token_ids: list[int] = []
    images: list[Image] = []
    for part in layout:
        if isinstance(part, int):
            seen = crop(kind, part, detail)
            causal = family_of(kind).is_causal
            images.append(Image(seen.digest, seen.pixels, len(token_ids), seen.grid, causal))
            token_ids += [IMAGE] * seen.num_tokens
        else:
            token_ids += part
    return token_ids, tuple(images)


@cache
def expected(kind: str, name: str, detail: str = "auto") -> list[int]:
    token_ids, _ = prompt_of(kind, LAYOUTS[name], detail)
    pictures = [part for part in LAYOUTS[name] if isinstance(part, int)]
    return expected_tokens(kind, token_ids, pictures, NUM_NEW, detail)


def engine_of(kind: str, options: EngineOptions = SMALL_STEPS) -> Engine:
    return build_engine(seeing_model(kind), options, frozenset())


def sequence_of(kind: str, name: str, detail: str = "auto") -> Sequence:
    token_ids, images = prompt_of(kind, LAYOUTS[name], detail)
    return Sequence(token_ids, GREEDY, on_output=lambda output: None, images=images)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_those_of_transformers(kind: str, name: str) -> None:
    for step_tokens in (24, 512):
        options = replace(SMALL_STEPS, max_num_batched_tokens=step_tokens)
        assert finish(engine_of(kind, options), [sequence_of(kind, name)]) == [expected(kind, name)]


@pytest.mark.parametrize("kind", KINDS)
def test_requests_with_and_without_pictures_share_the_batch(kind: str) -> None:
    texts = [[(7 * i + t) % 190 for t in range(5 + 20 * i)] for i in range(3)]
    alone = [expected_tokens(kind, text, [], NUM_NEW) for text in texts]
    names = ["one picture", "text between", "many turns"]
    mates = [Sequence(text, GREEDY, on_output=lambda output: None) for text in texts]
    together = finish(engine_of(kind), [*mates, *(sequence_of(kind, name) for name in names)])
    assert together == [*alone, *(expected(kind, name) for name in names)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_encoded_once_and_found_again_by_its_content(kind: str) -> None:
    engine = engine_of(kind, replace(SMALL_STEPS, snapshot_memory=2**20))
    assert isinstance(engine.runner, ModelRunner)
    first, again = sequence_of(kind, "text between"), sequence_of(kind, "text between")
    again.add_boundary(8 * 4)
    for sequence in (first, again):
        sequence.add_boundary(8 * 8)  # a state of recurrent layers is kept there
        assert finish(engine, [sequence]) == [expected(kind, "text between")]
    assert engine.runner.vision is not None and engine.runner.vision.num_encoded == 2
    assert first.num_cached_tokens == 0 and again.num_cached_tokens >= 24
    other = sequence_of(kind, "other text")
    assert finish(engine, [other]) == [expected(kind, "other text")]
    assert other.num_cached_tokens <= other.images[0].start


@pytest.mark.parametrize("kind", KINDS)
def test_preempted_requests_are_computed_again(kind: str) -> None:
    names = ["one picture", "a picture first", "the same picture twice"] * 2
    specs = probe_layers(seeing_model(kind))
    longest = max(sequence_of(kind, name).num_tokens for name in names) + NUM_NEW
    num_preemptions = 0
    for share in (1.2, 1.6, 2.0, 2.4):  # how many of the longest sequences fit
        memory = int((share * longest + 16) * specs.bytes_per_token) + 6 * specs.bytes_per_sequence
        options = replace(SMALL_STEPS, kv_cache_memory=memory, max_model_len=longest, num_speculative_tokens=0)
        engine = engine_of(kind, replace(options, snapshot_memory=2 * specs.bytes_per_sequence or None))
        engine.scheduler.prefill_budget = Unmeasured(24)
        assert finish(engine, [sequence_of(kind, name) for name in names]) == [expected(kind, name) for name in names]
        num_preemptions += engine.scheduler.num_preemptions
    assert num_preemptions > 0


@pytest.mark.parametrize("detail", ["low", "high"])
@pytest.mark.parametrize("kind", KINDS)
def test_detail_decides_how_much_of_a_picture_is_seen(kind: str, detail: str) -> None:
    sequence = sequence_of(kind, "one picture", detail)
    assert finish(engine_of(kind), [sequence]) == [expected(kind, "one picture", detail)]
    if kind.startswith("gemma"):
        assert sequence.images[0].num_tokens in {"low": range(35, 71), "high": range(1000, 1121)}[detail]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("qwen3_5")])
def test_the_gpus_path_gives_the_same_tokens(kind: str) -> None:
    """In tensors on a CPU: the kernel's reference attends, and steps of decodes are recorded."""
    engine = engine_of(kind)
    runner = ModelRunner(seeing_model(kind), engine.scheduler.cache, flash=flash.reference)
    runner.record_graphs(8, engine.max_model_len, record_graph=lambda run: run)
    engine.runner = runner
    names = ["one picture", "the same picture twice", "many turns"]
    assert finish(engine, [sequence_of(kind, name) for name in names]) == [expected(kind, name) for name in names]


# --- that the comparisons can fail


class SeesAlikeInAllLayers(ModelRunner):
    """Lets the tokens of pictures see each other in all layers, or in none."""

    def _prefill_chunk(self, index: int, window: int | None, span: Any, start: int) -> PrefillChunk:
        chunk = super()._prefill_chunk(index, window, span, start)
        offset = int((visible_of(span.start, 1, window, []) - chunk.visible[:1])[0, 0])
        images = [(image.start, image.end) for image in span.sequence.images_in(span.start, span.end)]
        whole = [] if family_of(self.model.config.model_type).looks_ahead(window) else images
        visible = visible_of(span.start, span.num_tokens, window, whole, reaches_back=False)
        return replace(chunk, visible=(visible - offset), sees_only_itself=False)


class StandsInOneLine(ModelRunner):
    """Gives the tokens of pictures positions as if they were words."""

    def _positions_of(self, span: Span) -> list[list[int]]:
        return [list(range(span.start, span.end))] * self._num_axes


class SeesNothingDeeper(ModelRunner):
    """Leaves out the features that are added behind the first layers."""

    def encode(self, images: list[Image], limit: int) -> None:
        super().encode(images, limit)
        for image in images:
            if image.features is not None:
                image.features = torch.cat([image.features[:, :48], 0 * image.features[:, 48:]], dim=1)


@pytest.mark.parametrize(
    ("kind", "runner"),
    [
        ("gemma4", SeesAlikeInAllLayers),
        ("gemma4_unified", SeesAlikeInAllLayers),
        *((kind, StandsInOneLine) for kind in KINDS if kind.startswith("qwen")),
        ("qwen3_vl", SeesNothingDeeper),
        ("qwen3_vl_moe", SeesNothingDeeper),
    ],
)
def test_another_pattern_or_other_positions_give_other_tokens(kind: str, runner: type[ModelRunner]) -> None:
    engine = engine_of(kind, replace(SMALL_STEPS, max_num_batched_tokens=512))
    engine.runner = runner(seeing_model(kind), engine.scheduler.cache)
    assert finish(engine, [sequence_of(kind, "many turns")]) != [expected(kind, "many turns")]


# --- positions


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("qwen")])
@given(data=st.data())
def test_positions_are_those_of_transformers_however_a_prompt_is_cut(kind: str, data: st.DataObject) -> None:
    words = st.lists(st.just(5), min_size=1, max_size=9)
    pictures = data.draw(st.lists(st.integers(0, 3), max_size=4))  # with words between them, as in every template
    layout = [part for number in pictures for part in (data.draw(words), number)]
    token_ids, images = prompt_of(kind, [*layout, [2] * NUM_NEW])
    ids, merge = torch.tensor([token_ids]), 2
    grids = torch.tensor([[1, image.grid[0] * merge, image.grid[1] * merge] for image in images])
    found, _ = seeing_model(kind).model.get_rope_index(
        ids, mm_token_type_ids=(ids == IMAGE).long(), image_grid_thw=grids if images else None
    )
    cuts = sorted({0, len(token_ids), *data.draw(st.lists(st.integers(0, len(token_ids)), max_size=6))})
    pieces = [family_of(kind).positions(start, end, images) for start, end in pairwise(cuts)]
    assert [sum((piece[axis] for piece in pieces), []) for axis in range(3)] == found[:, 0].tolist()


# --- packed weights


@pytest.mark.skipif(not are_available(), reason="needs torch with GNU's OpenMP")
@pytest.mark.parametrize("bits", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_model_sees_too(kind: str, bits: str) -> None:
    """Its features are near those of the stock model, and it answers."""
    model = seeing_model.__wrapped__(kind).to(torch.bfloat16 if bits == "bfloat16" else torch.float32)
    with torch.inference_mode():
        pack_model(model, BFLOAT16_KERNELS if bits == "bfloat16" else QUANTIZATIONS[bits])
    fused.fuse_attention(model)
    encoder, stock = VisionEncoder(model), VisionEncoder(seeing_model(kind))
    seen = crop(kind, 0)
    one, other = (Image(seen.digest, seen.pixels, 0, seen.grid, True) for _ in range(2))
    encoder.encode([one])
    stock.encode([other])
    assert one.features is not None and other.features is not None
    assert (one.features - other.features).norm() < 0.1 * other.features.norm()
    engine = build_engine(model, SMALL_STEPS, frozenset())
    assert len(finish(engine, [sequence_of(kind, "many turns")])[0]) == NUM_NEW


def test_the_features_of_waiting_prompts_are_few() -> None:
    """Beyond their limit only those of the next prompt are made ahead."""
    engine = engine_of("qwen3_vl", replace(SMALL_STEPS, max_num_seqs=8))
    sequences = [sequence_of("qwen3_vl", "many turns") for _ in range(4)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    waiting = [image for sequence in sequences for image in sequence.images]
    assert len(engine.scheduler.images_to_encode()) == len(waiting)
    first = sequences[0].images
    first[0].features = torch.empty(AHEAD_BYTES // 4 + 1, 1)  # memory that is never written
    assert engine.scheduler.images_to_encode() == [*first[1:]]


@pytest.mark.parametrize("kind", ["gemma4", "qwen3_vl"])
def test_pixels_are_not_rounded_before_the_tower_scales_them(kind: str) -> None:
    model: Any = seeing_model.__wrapped__(kind, "eager").bfloat16()
    seen = KINDS[kind].processor()(picture(0), return_tensors="pt")
    with torch.inference_mode():
        places = seen[KINDS[kind].places]
        expected = model.get_image_features(seen["pixel_values"], places, return_dict=True).pooler_output[0]
    image = Image(b"0", crop(kind, 0).pixels, 0, crop(kind, 0).grid, True)
    VisionEncoder(model).encode([image])
    assert image.features is not None
    difference = (image.features[:, : expected.shape[1]] - expected).float().norm() / expected.float().norm()
    assert difference < 0.005  # 0.0103 where they are; padding alone makes 0.0024
