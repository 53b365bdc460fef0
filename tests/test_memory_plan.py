"""Properties of plans of memory, for models in true shapes, of which there are configurations alone."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import FAMILIES, MIXTURES, RECURRENT, SHARING, tiny_model
from transformers import Gemma3Config, PreTrainedConfig, Qwen3Config

from config import Settings
from engine.attention import paged
from engine.build import build_engine, model_runner_of
from engine.cache_size import CacheSize, StepSizes
from engine.cpu import packed_checkpoint
from engine.cpu.packed_weight import PackedWeight
from engine.cpu.packing import Packer
from engine.engine import EngineOptions
from engine.layer_probe import probe_layers
from engine.layer_spec import AttentionSpec, LayerSpecs
from engine.memory_plan import Device, MemoryPlan, PaperModel, meta_model, refusal
from engine.quantization import FROM_FILE, QUANTIZATIONS
from engine.recurrent.layers import RecurrentLayer, asks_for_state
from errors import ModelLoadError
from serving import commands

GIB = 2**30
OPTIONS = EngineOptions()
FORMATS = ("none", "int8", "int4")
CARDS = (16, 24, 48, 80)  # GB
_VISION = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 896,
    "patch_size": 14,
}


def gemma3(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, inner: int) -> Gemma3Config:
    text = {
        "vocab_size": 262208,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "sliding_window": 1024,
    }
    return Gemma3Config(text_config=text, vision_config=_VISION)


def qwen3(hidden: int, layers: int, heads: int, inner: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=inner,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    )


CONFIGS: dict[str, PreTrainedConfig] = {
    "Gemma 3 27B": gemma3(5376, 62, 32, 16, 128, 21504),
    "Gemma 3 12B": gemma3(3840, 48, 16, 8, 256, 15360),
    "Gemma 3 4B": gemma3(2560, 34, 8, 4, 256, 10240),
    "Qwen3 8B": qwen3(4096, 36, 32, 12288),
    "Qwen3 32B": qwen3(5120, 64, 64, 25600),
}
BILLIONS = {"Gemma 3 27B": 27.4, "Gemma 3 12B": 12.2, "Gemma 3 4B": 4.3, "Qwen3 8B": 8.2, "Qwen3 32B": 32.8}


@cache
def paper(name: str, quantization: str = "none") -> PaperModel:
    if quantization != "none":
        return paper(name).in_format(QUANTIZATIONS[quantization])
    return PaperModel.of(CONFIGS[name], torch.bfloat16)


def plan(name: str, quantization: str, *cards: float, options: EngineOptions = OPTIONS) -> MemoryPlan:
    devices = [Device.of_card(number, size) for number, size in enumerate(cards)]
    return paper(name, quantization).plan(devices, options)


# --- true shapes


@pytest.mark.parametrize("name", CONFIGS)
def test_the_shapes_are_those_of_the_models(name: str) -> None:
    assert plan(name, "none", 1000).weights / 2e9 == pytest.approx(BILLIONS[name], rel=0.02)


def test_gemma_3_27b_in_4_bits_fits_24_gb_with_8000_tokens() -> None:
    assert plan("Gemma 3 27B", "int4", 24).context >= 8000
    assert plan("Gemma 3 27B", "int4", 24, options=replace(OPTIONS, max_model_len=8000)).context == 8000


@pytest.mark.parametrize(
    ("name", "quantization", "cards", "fits"),
    [
        ("Gemma 3 27B", "none", (48,), False),
        ("Gemma 3 27B", "none", (80,), True),
        ("Gemma 3 27B", "none", (48, 48), True),
        ("Gemma 3 27B", "none", (24, 24), False),
        ("Gemma 3 27B", "int8", (24,), False),
        ("Gemma 3 27B", "int8", (48,), True),
        ("Gemma 3 27B", "int8", (24, 24), True),
        ("Gemma 3 27B", "int4", (16,), False),
        ("Gemma 3 27B", "int4", (16, 16), True),
        ("Gemma 3 12B", "none", (24,), False),
        ("Gemma 3 12B", "int8", (16,), True),
        ("Gemma 3 12B", "int8", (24,), True),
        ("Gemma 3 12B", "int4", (16,), True),
        ("Gemma 3 4B", "none", (16,), True),
        ("Qwen3 8B", "none", (16,), False),
        ("Qwen3 8B", "none", (24,), True),
        ("Qwen3 8B", "int8", (16,), True),
        ("Qwen3 32B", "none", (80,), True),
        ("Qwen3 32B", "int8", (48,), True),
        ("Qwen3 32B", "int4", (24,), True),
    ],
)
def test_what_fits_where(name: str, quantization: str, cards: tuple[int, ...], fits: bool) -> None:
    found = plan(name, quantization, *cards)
    assert found.fits == fits == bool(found.context) == (not found.missing), found.failure


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_larger_cards_and_a_second_equal_one_never_hold_less(name: str, quantization: str) -> None:
    contexts = [plan(name, quantization, card).context for card in CARDS]
    assert contexts == sorted(contexts)
    for card, context in zip(CARDS, contexts, strict=True):
        assert plan(name, quantization, card, card).context >= context


def test_an_int8_cache_holds_nearly_twice_the_context() -> None:
    """A scale of two bytes comes with 128 numbers of a byte."""
    plain, small = (
        plan("Gemma 3 27B", "int4", 24, options=replace(OPTIONS, kv_cache_dtype=dtype)).context
        for dtype in ("auto", "int8")
    )
    assert 1.9 * plain < small < 2 * plain


# --- properties for any capacity

SIZES = st.floats(1, 200)


def check_parts(found: MemoryPlan, whole: int, num_layers: int) -> None:
    assert found.elsewhere + sum(share.weights for share in found.shares) == found.weights == whole
    for share in found.shares:
        assert share.weights <= share.device.free and 0 <= share.vision <= share.weights
        parts = share.weights + share.cache + share.reserve + share.unused
        assert parts == share.device.free
        if found.fits and share.layers:
            assert share.unused >= 0 and share.cache > 0
    layers = [layer for share in found.shares for layer in share.layers]
    assert sorted(layers) == [*range(num_layers)]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMATS), st.lists(SIZES, min_size=1, max_size=3))
def test_the_parts_are_the_whole_and_no_device_gets_more_than_it_has(quantization: str, cards: list[float]) -> None:
    whole = plan("Gemma 3 27B", quantization, 1000).weights
    check_parts(plan("Gemma 3 27B", quantization, *cards), whole, 62)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FORMATS), SIZES, SIZES)
def test_more_memory_never_gives_a_shorter_context(quantization: str, one: float, other: float) -> None:
    small, large = (plan("Gemma 3 27B", quantization, size) for size in sorted((one, other)))
    assert small.context <= large.context and small.missing >= large.missing


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_cache_on_several_devices_is_as_large_as_the_fullest_allows(data: st.DataObject) -> None:
    """Windowed layers take no more than they can use, so that equal shares would overfill a device of full layers."""
    devices = [torch.device("cuda", number) for number in range(2)]
    windows = data.draw(st.lists(st.tuples(st.sampled_from([None, 64]), st.sampled_from(devices)), min_size=1))
    layers = {
        i: AttentionSpec(2, key_dim=16, value_dim=16, window=window, dtype=torch.float16, device=device)
        for i, (window, device) in enumerate(windows)
    }
    specs, steps = LayerSpecs(layers, {}), StepSizes(4, 64, 64)
    rooms = {device: data.draw(st.integers(10_000, 10_000_000)) for device in {s.device for s in layers.values()}}

    def fit(rooms: dict[torch.device, int]) -> CacheSize:
        return CacheSize.fit(specs, OPTIONS, steps=steps, block_size=16, context=4096, rooms=rooms)

    size = fit(rooms)
    taken = size.num_bytes(specs)
    assert all(taken[device] <= room for device, room in rooms.items())
    larger = fit({device: room + data.draw(st.integers(0, 1_000_000)) for device, room in rooms.items()})
    assert larger.keys.max_tokens >= size.keys.max_tokens


# --- the same as the engine

STEPS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_num_mixed_tokens": 32}


def card_with(paper: PaperModel, memory: int) -> Device:
    """A card that has `memory` bytes for a cache, after the weights and the reserve."""
    weights = paper.plan([Device("cuda:0", 0, 2**40)], OPTIONS).weights
    capacity = 2 * weights + 10 * memory
    return Device("cuda:0", capacity=capacity, free=weights + memory + int(0.1 * capacity))


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("family", [*FAMILIES, *SHARING, *MIXTURES, "lfm2", "granite_hybrid"])
@pytest.mark.parametrize("memory", [100_000, 1_500_000])
def test_the_blocks_and_the_context_are_those_of_a_built_engine(family: str, cache_dtype: str, memory: int) -> None:
    options = EngineOptions(**STEPS, kv_cache_dtype=cache_dtype, num_speculative_tokens=2)
    model = tiny_model(family)
    planned = PaperModel.of(model.config, torch.float32)
    found = planned.plan([card_with(planned, memory)], options)
    assert found.size is not None, found.failure
    kept = found.size.memory + (0 if found.size.states is None else found.size.states.num_bytes(planned.specs))
    engine = build_engine(model, replace(options, kv_cache_memory=kept), frozenset())
    cache = engine.scheduler.cache
    assert found.size.keys == cache.plan and found.context == engine.max_model_len
    assert found.size.states == (None if cache.states is None else cache.states.plan)
    assert found.max_num_seqs == engine.scheduler.limits.max_num_seqs
    scratch = sum(spec.bytes_per_token for spec in cache.specs.values()) * cache.block_size
    assert found.shares[0].cache + scratch >= cache.num_bytes >= found.shares[0].cache - 2**16
    assert model_runner_of(engine).cache is cache


@pytest.mark.parametrize("family", RECURRENT)
def test_the_states_of_recurrent_layers_are_those_of_the_stock_modules(family: str) -> None:
    """On a CPU kernels keep them in another form."""
    model = tiny_model(family)
    for name, module in list(model.named_modules()):
        if asks_for_state(module):
            model.set_submodule(name, RecurrentLayer(module, module.layer_idx))
    real, planned = probe_layers(model), probe_layers(meta_model(model.config, torch.float32))
    assert (real.bytes_per_token, real.bytes_per_sequence, real.bytes_per_guess) == (
        planned.bytes_per_token,
        planned.bytes_per_sequence,
        planned.bytes_per_guess,
    )


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_a_model_with_recurrent_layers_is_planned_with_its_states(family: str) -> None:
    planned = PaperModel.of(RECURRENT[family][1], torch.bfloat16)
    options = EngineOptions(**STEPS)
    found = planned.plan([card_with(planned, 2_000_000)], options)
    check_parts(found, found.weights, 4)
    assert found.fits and found.size is not None and found.size.states is not None
    assert found.max_num_seqs == 4 and found.shares[0].cache <= 2_000_000


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_bytes_of_weights_are_those_of_a_packed_model(quantization: str) -> None:
    changes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 192}
    model = tiny_qwen3(**changes)
    planned = PaperModel.of(model.config, torch.float32, QUANTIZATIONS[quantization])
    packer = Packer(model, QUANTIZATIONS[quantization])
    for name, parameter in model.named_parameters():
        if packer.format_of(name):
            packer.pack(name, parameter.data)
    packed = {f"{name}.weight": num_bytes(weight) for name, weight in packer.packed.items()}
    assert packed and packed == {name: planned.sizes[name] for name in packed}


def test_the_bytes_of_a_gguf_files_own_blocks_are_read_from_its_header(tmp_path: Path) -> None:
    model = tiny_qwen3(hidden_size=64, intermediate_size=128, vocab_size=192)
    packer = Packer(model, QUANTIZATIONS["int4"])
    for name, parameter in model.named_parameters():
        if packer.format_of(name):
            packer.pack(name, parameter.data)
    plain = {name: value for name, value in model.state_dict().items() if not packer.format_of(name)}
    packed_checkpoint.save(packer.packed, plain, tmp_path / packed_checkpoint.FILE)
    planned = PaperModel.of(model.config, torch.float32, FROM_FILE, tmp_path)
    assert planned.sizes == {f"{name}.weight": num_bytes(weight) for name, weight in packer.packed.items()}
    assert planned.plan([Device("cuda:0", GIB, GIB)], OPTIONS).fits


def tiny_qwen3(**changes: int) -> torch.nn.Module:
    model_class, config = FAMILIES["qwen3"]
    return model_class._from_config(type(config)(**{**config.to_dict(), **changes}), attn_implementation=paged.NAME)


def num_bytes(weight: PackedWeight) -> int:
    return sum(part.nbytes for part in weight.parts.values())


# --- before loading


def cards(*sizes: float) -> Sequence[Device]:
    return [Device.of_card(number, size) for number, size in enumerate(sizes)]


def test_what_fits_is_never_refused() -> None:
    assert refusal(paper("Gemma 3 27B", "int4"), cards(24), OPTIONS, host=0) == ""


def test_a_refusal_says_what_is_needed_and_which_format_would_fit() -> None:
    reason = refusal(paper("Gemma 3 27B"), cards(48), OPTIONS, host=0)
    assert "51.1 GiB of weights" in reason and "cuda:0 46.6 GiB" in reason and "are missing" in reason
    assert "set QUANTIZATION=int8 or set QUANTIZATION=int4" in reason
    assert "Use a smaller model" in refusal(paper("Gemma 3 27B"), cards(4), OPTIONS, host=0)


def test_a_refusal_says_which_context_would_fit() -> None:
    options = replace(OPTIONS, max_model_len=20_000)
    found = plan("Gemma 3 27B", "int4", 24)
    assert f"set MAX_MODEL_LEN={found.context}" in refusal(paper("Gemma 3 27B", "int4"), cards(24), options, host=0)


def test_weights_that_stay_in_the_machines_memory_are_not_refused() -> None:
    assert refusal(paper("Gemma 3 27B"), cards(48), OPTIONS, host=64 * GIB) == ""


def test_packed_weights_that_stay_in_the_machines_memory_are_refused() -> None:
    """No kernel computes with them there."""
    assert "GiB are missing" in refusal(paper("Gemma 3 27B", "int8"), cards(24), OPTIONS, host=64 * GIB)


def test_a_device_map_can_name_one_device() -> None:
    options = replace(OPTIONS, device_map="cuda:1")
    found = plan("Qwen3 8B", "int8", 16, 24, options=options)
    assert found.fits and [len(share.layers) for share in found.shares] == [0, 36]


def test_weights_whose_sizes_are_unknown_are_not_planned() -> None:
    with pytest.raises(ModelLoadError, match="unknown until"):
        PaperModel.of(CONFIGS["Qwen3 8B"], torch.bfloat16, QUANTIZATIONS["nf4"])


@pytest.mark.parametrize("family", ["gemma3", "qwen3_moe", "qwen3_next"])
def test_a_plan_leaves_the_configuration_as_it_was(family: str) -> None:
    """The model is loaded with it afterwards."""
    config = (FAMILIES | MIXTURES | RECURRENT)[family][1]
    before = repr(vars(config))
    PaperModel.of(config, torch.bfloat16).plan(cards(24), OPTIONS)
    assert repr(vars(config)) == before


# --- the command


def run(directory: Path, *arguments: str) -> int:
    values = Settings(_env_file=None, cache_dir=directory / "cache")
    return commands.run(["plan", str(directory), *arguments], values)


def test_the_command_prints_what_goes_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIGS["Gemma 3 27B"].save_pretrained(tmp_path)
    assert run(tmp_path, "--gpu", "16", "--gpu", "16", "--quantization", "int4") == 0
    head, first, second, last = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "GPU" and first.startswith("cuda:0") and second.startswith("cuda:1")
    assert last.startswith("It fits: the context is 15,")


def test_the_command_fails_where_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    CONFIGS["Gemma 3 27B"].save_pretrained(tmp_path)
    assert run(tmp_path, "--gpu", "24", "--context", "8000") == 1
    assert "set QUANTIZATION=int4" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing"}))
    assert run(tmp_path) == 1 and "cannot be planned" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert run(tmp_path) == 1 and "no config.json" in capsys.readouterr().err
