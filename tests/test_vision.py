"""Images in the continuous batch: the tokens are those of transformers' own Gemma 3, however images come and share."""

import random
import weakref
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from models import SIDE, TOKENS, VOCAB, tiny_gemma_that_sees

from engine.attention import flash, fused
from engine.attention.flash import Kernel
from engine.attention.paged import PrefillChunk, visible_of
from engine.build import build_engine
from engine.cpu.kernels import are_available
from engine.cpu.packing import pack_model
from engine.engine import Engine, EngineOptions
from engine.model_runner import ModelRunner
from engine.prefill_budget import PrefillBudget
from engine.quantization import QUANTIZATIONS
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from engine.vision import Image, VisionEncoder
from vision.gemma3 import Gemma3Vision

GRID = (4, 4)  # rows and columns of an image's tokens
IMAGE = VOCAB - 1  # the placeholder's id
NUM_NEW = 12
SMALL_STEPS = EngineOptions(max_num_batched_tokens=24, max_num_mixed_tokens=24, max_num_seqs=8, kv_block_size=8)
GREEDY = SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True)


def pixels(number: int) -> torch.Tensor:
    return torch.randn(3, SIDE, SIDE, generator=torch.Generator().manual_seed(number))


# What stands between numbers of images is text, in tokens
LAYOUTS: dict[str, list[Any]] = {
    "one image": [[7, 3, 9], 0, [5, 6]],
    "an image first": [0, [5, 6, 7]],
    "two images side by side": [[7], 0, 1, [8, 9]],
    "text between": [list(range(10, 40)), 0, list(range(20, 50)), 1, [3]],
    "in the second half of a chunk": [list(range(10, 28)), 0, list(range(30, 60))],
    "across what would be the end of a chunk": [list(range(10, 25)), 0, [4], 2, [5, 5, 5]],
    "the same image twice": [[9], 0, [1, 2], 0, [3, 4]],
    "many turns": [[t for i in range(5) for t in (i, i + 50)], 0, [11, 12], 1, [13], 2, list(range(60, 99)), 3, [2]],
}


def prompt_of(layout: list[Any]) -> tuple[list[int], tuple[Image, ...]]:
    token_ids: list[int] = []
    images: list[Image] = []
    for part in layout:
        if isinstance(part, int):
            images.append(Image(bytes([part]), pixels(part), len(token_ids), GRID))
            token_ids += [IMAGE] * TOKENS
        else:
            token_ids += part
    return token_ids, tuple(images)


@cache
def expected(name: str) -> list[int]:
    token_ids, images = prompt_of(LAYOUTS[name])
    ids = torch.tensor([token_ids])
    output = tiny_gemma_that_sees(IMAGE, "eager").generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        token_type_ids=(ids == IMAGE).long(),
        pixel_values=torch.stack([image.pixels for image in images]),
        max_new_tokens=NUM_NEW,
        do_sample=False,
    )
    return output[0, len(token_ids) :].tolist()


def engine_of(options: EngineOptions = SMALL_STEPS) -> Engine:
    return build_engine(tiny_gemma_that_sees(IMAGE), options, frozenset())


def sequence_of(name: str) -> Sequence:
    token_ids, images = prompt_of(LAYOUTS[name])
    return Sequence(token_ids, GREEDY, on_output=lambda output: None, images=images)


def finish(engine: Engine, sequences: list[Sequence]) -> list[list[int]]:
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    assert engine.num_used_blocks == 0
    return [sequence.output_ids for sequence in sequences]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("step_tokens", [24, 64, 512])
def test_the_tokens_are_those_of_transformers(name: str, step_tokens: int) -> None:
    options = replace(SMALL_STEPS, max_num_batched_tokens=step_tokens)
    assert finish(engine_of(options), [sequence_of(name)]) == [expected(name)]


def test_requests_with_and_without_images_share_the_batch() -> None:
    texts = [[random.Random(i).randrange(VOCAB - 1) for _ in range(5 + 20 * i)] for i in range(4)]
    alone = [finish(engine_of(), [Sequence(t, GREEDY, lambda output: None)])[0] for t in texts]
    sequences = [sequence_of(name) for name in LAYOUTS]
    mates = [Sequence(text, GREEDY, on_output=lambda output: None) for text in texts]
    together = finish(engine_of(), [*sequences[:4], *mates, *sequences[4:]])
    assert together == [*map(expected, list(LAYOUTS)[:4]), *alone, *map(expected, list(LAYOUTS)[4:])]


def test_an_image_is_encoded_once_and_its_blocks_are_found_again() -> None:
    engine = engine_of()
    assert isinstance(engine.runner, ModelRunner)
    first, again = sequence_of("text between"), sequence_of("text between")
    assert finish(engine, [first]) == finish(engine, [again]) == [expected("text between")]
    assert engine.runner.vision is not None and engine.runner.vision.num_encoded == 2
    assert (
        first.num_cached_tokens == 0 and again.num_cached_tokens == 72
    )  # a prompt of 93 that ends with an image from 76 on


@pytest.mark.parametrize("block_size", [3, 8, 16])
def test_another_image_in_the_same_place_shares_only_what_comes_before(block_size: int) -> None:
    engine = engine_of(replace(SMALL_STEPS, kv_block_size=block_size))
    for name in ("one image", "text between", "across what would be the end of a chunk"):
        finish(engine, [sequence_of(name)])
        layout = [part + 1 if isinstance(part, int) else part for part in LAYOUTS[name]]
        LAYOUTS["other"] = layout
        expected.cache_clear()
        other = sequence_of("other")
        assert finish(engine, [other]) == [expected("other")]
        assert other.num_cached_tokens <= other.images[0].start
    del LAYOUTS["other"]


class Unmeasured(PrefillBudget):
    """Has prompts in steps whatever the time of earlier ones, so that steps are the same on a busy machine."""

    def note(self, num_decodes: int, num_prompt_tokens: int, seconds: float) -> None:
        pass


def test_preempted_requests_are_computed_again() -> None:
    layers, per_token = 7, 2 * 2 * 32 * 4
    options = replace(SMALL_STEPS, kv_cache_memory=150 * layers * per_token, max_model_len=140)
    engine = engine_of(options)
    engine.scheduler.prefill_budget = Unmeasured(24)
    names = ["one image", "an image first", "the same image twice"] * 3
    assert finish(engine, [sequence_of(name) for name in names]) == [expected(name) for name in names]
    assert engine.scheduler.num_preemptions > 0


def unable_to_see_ahead(*arguments: Any, **options: Any) -> torch.Tensor:
    """Stands in for a kernel without the argument `visible`, such as torch's."""
    return flash.reference(*arguments, **options)


def recorded_engine(kernel: Kernel = flash.reference) -> Engine:
    engine = engine_of()
    runner = ModelRunner(tiny_gemma_that_sees(IMAGE), engine.scheduler.cache, flash=kernel)
    runner.record_graphs(8, engine.max_model_len, record_graph=lambda run: run)
    engine.runner = runner
    return engine


@pytest.mark.parametrize("kernel", [flash.reference, unable_to_see_ahead])
def test_the_gpus_path_gives_the_same_tokens(kernel: Kernel) -> None:
    engine = recorded_engine(kernel)
    assert finish(engine, [sequence_of(name) for name in LAYOUTS]) == [expected(name) for name in LAYOUTS]


def test_recorded_steps_stand_where_the_family_says(monkeypatch: pytest.MonkeyPatch) -> None:
    def crowded(family: Gemma3Vision, start: int, end: int, images: Any) -> list[list[int]]:
        return [[position // 2 for position in range(start, end)]]

    monkeypatch.setattr(Gemma3Vision, "positions", crowded)
    recorded, plain = (finish(engine, [sequence_of("one image")]) for engine in (recorded_engine(), engine_of()))
    assert recorded == plain != [expected("one image")]


def test_an_image_whose_tokens_see_only_what_is_before_them_may_be_cut() -> None:
    """Steps of 9 tokens cut images of 16, and blocks end inside of them; the tokens are those of whole images."""

    def answered(step_tokens: int) -> list[list[int]]:
        sequences = [sequence_of(name) for name in LAYOUTS]
        for image in [image for sequence in sequences for image in sequence.images]:
            image.is_causal = True
        engine = engine_of(replace(SMALL_STEPS, max_num_batched_tokens=512))
        engine.scheduler.limits = replace(engine.scheduler.limits, max_num_batched_tokens=step_tokens)
        return finish(engine, sequences)

    assert answered(9) == answered(512) != [expected(name) for name in LAYOUTS]


class SeesNoLaterTokens(ModelRunner):
    def _prefill_chunk(self, index: int, window: int | None, span: Any, start: int) -> PrefillChunk:
        chunk = super()._prefill_chunk(index, window, span, start)
        causal = visible_of(span.start, span.num_tokens, window, [])
        first = int((visible_of(span.start, 1, window, []) - chunk.visible[:1])[0, 0])
        return replace(chunk, visible=causal - first)


def test_a_causal_mask_gives_other_tokens() -> None:
    """That the comparisons above can fail."""
    engine = engine_of()
    assert isinstance(engine.runner, ModelRunner)
    engine.runner = SeesNoLaterTokens(engine.runner.model, engine.scheduler.cache)
    assert finish(engine, [sequence_of("many turns")]) != [expected("many turns")]


class Diary(ModelRunner):
    """Notes what is done between steps."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.notes: list[str] = []

    def encode(self, images: list[Image], most: int) -> None:
        before = 0 if self.vision is None else self.vision.num_encoded
        super().encode(images, most)
        assert self.vision is not None
        if count := self.vision.num_encoded - before:
            self.notes.append(f"encode {count}")

    def run(self, batch: Any) -> Any:
        spans = [(span.start, span.end, span.sequence) for span in batch.spans if not span.is_decode]
        for start, end, sequence in spans:  # none begins or ends inside an image
            assert all(start <= image.start and image.end <= end for image in sequence.images_in(start, end))
        self.notes.append("decode" if batch.num_decodes else "prefill")
        return super().run(batch)


def test_running_streams_wait_for_one_image_at_a_time() -> None:
    engine = engine_of()
    assert isinstance(engine.runner, ModelRunner)
    diary = engine.runner = Diary(engine.runner.model, engine.scheduler.cache)
    running = Sequence([1, 2, 3], SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True), lambda output: None)
    engine.scheduler.add(running)
    engine.step()
    engine.step()
    diary.notes.clear()
    finish(engine, [sequence_of("many turns"), sequence_of("two images side by side")])
    assert diary.notes.count("encode 1") >= 4
    for one, two in zip(diary.notes, diary.notes[1:], strict=False):
        assert not (one.startswith("encode") and two.startswith("encode"))
    idle = engine_of()
    assert isinstance(idle.runner, ModelRunner)
    diary = idle.runner = Diary(idle.runner.model, idle.scheduler.cache)
    finish(idle, [sequence_of("many turns")])
    assert diary.notes[0] == "encode 4"


@pytest.mark.thinned(4)
@pytest.mark.parametrize("num_before", range(20, 48))
def test_a_chunk_of_one_token_before_an_image_is_not_taken_for_a_decode(num_before: int) -> None:
    """Beside a running stream, and with text that invites guesses."""
    engine = engine_of(replace(SMALL_STEPS, max_num_mixed_tokens=9))
    running = Sequence([5, 6, 7], SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True), lambda output: None)
    engine.scheduler.add(running)
    engine.step()
    LAYOUTS["padded"] = [([1, 2, 3, 4] * 12)[:num_before], 0, [1, 2, 3, 4, 1, 2, 3]]
    expected.cache_clear()
    assert finish(engine, [sequence_of("padded")]) == [expected("padded")]
    assert running.num_output_tokens == 60
    del LAYOUTS["padded"]


def test_an_image_that_cannot_be_encoded_fails_its_request_alone() -> None:
    engine = engine_of()
    broken = sequence_of("one image")
    broken.images[0].digest, broken.images[0].pixels = b"broken", torch.zeros(3, 5, 5)
    results = finish(engine, [broken, sequence_of("an image first")])
    assert results == [[], expected("an image first")]


class FailsOnImages(ModelRunner):
    error: Exception

    def encode(self, images: list[Image], most: int) -> None:
        activations = torch.empty(1000)
        self.held = weakref.ref(activations)
        raise self.error


def engine_that_fails_on_images(error: Exception) -> tuple[Engine, FailsOnImages]:
    engine = engine_of()
    runner = engine.runner = FailsOnImages(engine.runner.model, engine.runner.cache)
    runner.error = error
    return engine, runner


def test_what_a_failed_image_held_is_given_back() -> None:
    """Also while the error is kept."""
    engine, runner = engine_that_fails_on_images(torch.OutOfMemoryError("CUDA out of memory."))
    assert finish(engine, [sequence_of("one image")]) == [[]]
    assert runner.held() is None


def test_an_image_after_which_nothing_can_be_computed_is_no_failure_of_its_request_alone() -> None:
    engine, _ = engine_that_fails_on_images(torch.AcceleratorError("an illegal access"))
    with pytest.raises(torch.AcceleratorError):
        finish(engine, [sequence_of("one image")])


def test_features_are_kept_within_bounds() -> None:
    encoder = VisionEncoder(tiny_gemma_that_sees(IMAGE), memory=3 * TOKENS * 64 * 4)
    images = [Image(bytes([number]), pixels(number), 0, GRID) for number in range(5)]
    encoder.encode(images)
    assert all(image.features is not None for image in images)
    later = [Image(bytes([number]), pixels(number), 0, GRID) for number in range(5)]
    for image in later:
        encoder.recall(image)
    assert [image.features is not None for image in later] == [False, False, True, True, True]


@pytest.mark.skipif(not are_available(), reason="needs torch with GNU's OpenMP")
def test_a_quantized_model_sees_too() -> None:
    """Its features and its answer are near those of the stock model: the first token's logits are."""
    model = tiny_gemma_that_sees(IMAGE)
    with torch.inference_mode():
        pack_model(model, QUANTIZATIONS["int8"])
    fused.fuse_attention(model)
    encoder, stock = VisionEncoder(model), VisionEncoder(tiny_gemma_that_sees(IMAGE))
    one, other = (Image(b"0", pixels(0), 0, GRID) for _ in range(2))
    encoder.encode([one])
    stock.encode([other])
    assert one.features is not None and other.features is not None
    assert (one.features - other.features).norm() < 0.05 * other.features.norm()
    engine = build_engine(model, SMALL_STEPS, frozenset())
    assert len(finish(engine, [sequence_of("many turns")])[0]) == NUM_NEW
