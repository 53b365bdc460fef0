"""Adapters: answers are those of the model with the adapter in its weights, whatever else is in the step."""

import asyncio
import gc
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import TinyAdapter, greedy_tokens, save
from models import generate, tiny_gemma_that_sees, tiny_model
from test_engine import SMALL_STEPS, answer, greedy, prompts, run
from transformers import PreTrainedModel

from engine.attention.fused import fuse_attention
from engine.batch import Batch, Span
from engine.build import build_engine, model_runner_of
from engine.cpu import kernels
from engine.cpu.packing import pack_model
from engine.engine import Engine, EngineOptions
from engine.lora.adapter import Adapter
from engine.lora.targets import shapes_of
from engine.quantization import QUANTIZATIONS
from engine.sequence import Sequence
from errors import ModelLoadError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
LINEAR_ATTENTION = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
KINDS = {  # family -> the layers that its adapters change
    "llama": (*ATTENTION, *MLP),
    "qwen2": ("q_proj", "v_proj"),
    "qwen3": (*ATTENTION, *MLP),
    "gemma3": (*ATTENTION, *MLP),
    "gemma4": (*ATTENTION, *MLP),
    "qwen3_moe": ATTENTION,
    "qwen3_5": (*ATTENTION, *MLP, *LINEAR_ATTENTION),
    "qwen3_5_moe": (*ATTENTION, *LINEAR_ATTENTION),
    "qwen3_next": (*ATTENTION, "in_proj_qkvz", "in_proj_ba", "out_proj"),
    "lfm2": ("q_proj", "out_proj", "in_proj", "w1"),
    "granite_hybrid": ("q_proj", "in_proj", "out_proj"),
}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}  # whole groups of columns, which can be packed
NUM_TOKENS = 24


def engine_of(family: str, options: EngineOptions = SMALL_STEPS) -> Engine:
    return build_engine(tiny_model(family), options, frozenset())


def read(engine: Engine, directory: Path, name: str = "mine") -> Adapter:
    return model_runner_of(engine).adapters.read(name, directory, max_rank=64)


def answers(engine: Engine, requests: list[tuple[list[int], Adapter | None]], delay: float = 0) -> list[list[int]]:
    async def use(engine: Engine) -> list[list[int]]:
        return await asyncio.gather(
            *(
                answer(engine, prompt, replace(greedy(NUM_TOKENS), adapter=adapter), number * delay)
                for number, (prompt, adapter) in enumerate(requests)
            )
        )

    return run(engine, use)


@pytest.mark.parametrize("family", KINDS)
def test_answers_are_those_of_the_merged_model_beside_other_adapters_and_none(family: str, tmp_path: Path) -> None:
    engine, stock = engine_of(family), tiny_model(family, "eager")
    made = [
        TinyAdapter(stock, KINDS[family], rank=4, seed=1),
        TinyAdapter(stock, KINDS[family][:2], rank=3, alpha=5, seed=2, fields={"use_rslora": 1}),
    ]
    adapters = [read(engine, adapter.save(tmp_path / str(n))) for n, adapter in enumerate(made)]
    models = [*(adapter.merged() for adapter in made), stock]
    asked = prompts(6, longest=60)
    requests = [(prompt, [*adapters, None][n % 3]) for n, prompt in enumerate(asked)]
    expected = [greedy_tokens(models[n % 3], prompt, NUM_TOKENS) for n, prompt in enumerate(asked)]
    assert answers(engine, requests, delay=0.01) == expected
    assert expected[0] != greedy_tokens(stock, asked[0], NUM_TOKENS), "the adapter changes something"


def test_ranks_and_scales_can_differ_from_layer_to_layer(tmp_path: Path) -> None:
    engine, stock = engine_of("llama"), tiny_model("llama", "eager")
    odd = TinyAdapter(
        stock, (*ATTENTION, *MLP), ranks={"layers.1.self_attn.q_proj": 7, "up_proj": 2}, alphas={"v_proj": 32}
    )
    adapter = read(engine, odd.save(tmp_path))
    assert adapter.rank == 7
    prompt = prompts(1)[0]
    assert answers(engine, [(prompt, adapter)]) == [greedy_tokens(odd.merged(), prompt, NUM_TOKENS)]


@pytest.mark.parametrize("targets", [r".*layers\.[01]\..*(q|up)_proj", "all-linear"])
def test_targets_may_be_a_pattern_or_all_layers(targets: str, tmp_path: Path) -> None:
    engine, stock = engine_of("qwen3"), tiny_model("qwen3", "eager")
    ends = ("0.self_attn.q_proj", "1.mlp.up_proj")
    made = TinyAdapter(stock, ends, fields={"target_modules": targets})
    adapter = read(engine, made.save(tmp_path))
    prompt = prompts(1)[0]
    assert answers(engine, [(prompt, adapter)]) == [greedy_tokens(made.merged(), prompt, NUM_TOKENS)]


def test_an_adapter_of_the_text_model_fits_the_one_that_sees_and_the_other_way_round(tmp_path: Path) -> None:
    seeing = build_engine(tiny_gemma_that_sees(5), SMALL_STEPS, frozenset())
    (name, shape), *_ = shapes_of(model_runner_of(seeing).adapters.targets).items()
    matrices = {"A": torch.randn(4, shape.num_columns), "B": torch.randn(shape.num_rows, 4)}
    digests = set()
    for prefix in ("base_model.model.model.", "base_model.model.model.language_model.", "language_model.model.", ""):
        tensors = {f"{prefix}{name}.lora_{side}.weight": matrix for side, matrix in matrices.items()}
        config = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
        digests.add(read(seeing, save(tmp_path / prefix, tensors, config)).digest)
    assert len(digests) == 1
    assert not any("vision" in target for target in shapes_of(model_runner_of(seeing).adapters.targets))


def test_blocks_are_shared_by_prompts_of_one_adapter_alone(tmp_path: Path) -> None:
    engine, stock = engine_of("llama"), tiny_model("llama", "eager")
    first, other = (
        read(engine, TinyAdapter(stock, ATTENTION, seed=seed).save(tmp_path / str(seed)), "same") for seed in (1, 2)
    )
    again = read(engine, tmp_path / "1", "another")
    prompt = list(range(1, 81))

    async def use(engine: Engine) -> list[int]:
        cached = []
        for adapter in (first, other, None, first, again, other, None):
            params = replace(greedy(2), adapter=adapter)
            outputs = [output async for output in generate(engine, prompt, params)]
            cached.append(outputs[0].num_cached_tokens)
        return cached

    assert run(engine, use) == [0, 0, 0, 72, 72, 72, 72], "the weights count, and not the name"


def test_states_of_recurrent_layers_are_shared_by_prompts_of_one_adapter_alone(tmp_path: Path) -> None:
    engine, stock = engine_of("qwen3_5"), tiny_model("qwen3_5", "eager")
    made = TinyAdapter(stock, LINEAR_ATTENTION)
    adapter, prompt = read(engine, made.save(tmp_path)), prompts(1)[0] * 3
    expected = [greedy_tokens(model, prompt, NUM_TOKENS) for model in (made.merged(), stock)]
    assert answers(engine, [(prompt, own) for own in (adapter, None, adapter, None)], delay=0.3) == expected * 2


@pytest.mark.parametrize("name", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_5", "qwen3_next"])
def test_packed_layers_add_what_plain_ones_add(name: str, family: str, tmp_path: Path) -> None:
    """Packed weights with an adapter are about as far from the merged model as its own weights are, packed."""
    if not kernels.has_bfloat16():
        pytest.skip("this CPU does not multiply bfloat16")
    stock = tiny_model(family, **WIDE)
    made = TinyAdapter(stock, KINDS[family], rank=5)
    directory, merged = made.save(tmp_path), made.merged()
    engine, other = (packed_engine(model, name) for model in (tiny_model(family, **WIDE), made.merged()))
    expected, without = (logits_of(build_engine(model, SMALL_STEPS, frozenset())) for model in (merged, stock))
    before = logits_of(engine)
    actual = logits_of(engine, read(engine, directory))
    assert distance(actual, expected) < 1.5 * distance(logits_of(other), expected) + 0.02
    assert distance(actual, expected) < distance(actual, without)
    assert torch.equal(logits_of(engine), before), "without the adapter it computes what it did before"


def packed_engine(model: PreTrainedModel, name: str) -> Engine:
    model = model.bfloat16()
    pack_model(model, QUANTIZATIONS[name])
    fuse_attention(model)
    return build_engine(model, SMALL_STEPS, frozenset())


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("is_packed", [False, True])
def test_rows_without_an_adapter_are_computed_as_if_no_row_had_one(is_packed: bool, tmp_path: Path) -> None:
    stock = tiny_model("llama", **WIDE)
    directory = TinyAdapter(stock, KINDS["llama"]).save(tmp_path)
    engine = packed_engine(stock, "int8") if is_packed else build_engine(stock, SMALL_STEPS, frozenset())
    adapter = read(engine, directory)
    alone = logits_of(engine, None, None)
    assert torch.equal(logits_of(engine, None, adapter)[:20], alone[:20])


def logits_of(engine: Engine, *adapters: Adapter | None) -> torch.Tensor:
    """The logits of 20 tokens for each adapter, by default for none, in one step."""
    runner, sequences = model_runner_of(engine), []
    for adapter in adapters or (None,):
        params = replace(greedy(1), adapter=adapter)
        sequences.append(Sequence(list(range(20)), params, on_output=lambda output: None))
        runner.cache.allocate(sequences[-1], 20)
    try:
        return runner.logits(Batch(tuple(Span(sequence, 0, 20) for sequence in sequences))).float()
    finally:
        for sequence in sequences:
            runner.cache.free(sequence)


def test_an_adapter_that_nobody_has_any_more_is_not_kept(tmp_path: Path) -> None:
    engine, stock = engine_of("llama"), tiny_model("llama", "eager")
    adapters = [read(engine, TinyAdapter(stock, ATTENTION, seed=n).save(tmp_path / str(n))) for n in range(3)]
    answers(engine, [([1, 2, 3], adapter) for adapter in adapters])
    references = [weakref.ref(adapter) for adapter in adapters]
    del adapters
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
NAME = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = torch.ones(4, 48), torch.ones(48, 4)
GOOD = {f"{NAME}.lora_A.weight": A, f"{NAME}.lora_B.weight": B}


@pytest.mark.parametrize(
    ("tensors", "config", "reason"),
    [
        (GOOD, {"peft_type": "IA3"}, "peft_type 'IA3', and only 'LORA'"),
        (GOOD, {"use_dora": True}, r"use_dora \(DoRA\), which is not supported"),
        (GOOD, {"fan_in_fan_out": True}, "sets fan_in_fan_out"),
        (GOOD, {"bias": "all"}, "sets bias"),
        (GOOD, {"modules_to_save": ["lm_head"]}, "sets modules_to_save"),
        (GOOD, {"target_parameters": ["mlp.experts.gate_up_proj"]}, "sets target_parameters"),
        (GOOD, {"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', which changes the base"),
        (GOOD, {"r": 0}, "0 is not a positive number"),
        (GOOD, {"r": True}, "True is not a positive number"),
        (GOOD, {"target_modules": None}, "target_modules, rank_pattern or alpha_pattern is missing or wrong"),
        (GOOD, {"target_modules": "(q_proj"}, "missing or wrong"),
        (GOOD, {"rank_pattern": {"(": 3}}, "missing or wrong"),
        (GOOD, {"rank_pattern": {r"(?:[\w.]+)+!": 3}}, "repeats too much: write the names of the layers"),
        (GOOD, {"alpha_pattern": {"a*a*a*a*a*!": 3}}, "repeats too much"),
        (GOOD, {"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga', which changes the base"),
        (GOOD, {"r": 8}, r"shapes \(4, 48\) and \(48, 4\) for .*q_proj, whose rank is 8"),
        (GOOD, {"r": 65}, "has rank 65, and MAX_LORA_RANK is 64: raise it"),
        (GOOD, {"target_modules": ["v_proj"]}, "target_modules do not name that layer"),
        ({}, {}, "has no tensors, so the adapter would change nothing"),
        ({f"{NAME}.lora_A.weight": A}, {}, "only one of the matrices A and B"),
        ({**GOOD, f"{NAME}.lora_magnitude_vector": torch.ones(48)}, {}, "which is no matrix A or B"),
        (
            {**GOOD, "base_model.model.lm_head.weight": torch.ones(9, 48)},
            {},
            "lm_head.weight, which is no matrix A or B",
        ),
        ({k: v.new_full(v.shape, float("nan")) for k, v in GOOD.items()}, {}, "not finite numbers for .*q_proj"),
        (
            {k.replace("layers.0", "layers.9"): v for k, v in GOOD.items()},
            {"base_model_name_or_path": "Org/Other"},
            "layers.9.self_attn.q_proj, which the model does not have .* it was trained for Org/Other",
        ),
        (
            {f"{NAME}.lora_A.weight": torch.ones(4, 64), f"{NAME}.lora_B.weight": torch.ones(64, 4)},
            {},
            "is for another model .* turns 64 numbers into 64, and the model's turns 48 into 48",
        ),
    ],
)
def test_what_is_wrong_with_an_adapter_is_said(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    read(tiny_engine(), save(tmp_path / "good", GOOD, CONFIG))
    with pytest.raises(ModelLoadError, match=reason):
        read(tiny_engine(), save(tmp_path / "bad", tensors, CONFIG | config))


def test_no_pattern_of_an_adapter_holds_up_the_server(tmp_path: Path) -> None:
    """Its target_modules would take longer than the universe has been there to match one name."""
    config = CONFIG | {"target_modules": r"(?:[\w.]+)+[!?]"}
    assert read(tiny_engine(), save(tmp_path / "x", GOOD, config)).rank == 4


@cache
def tiny_engine() -> Engine:
    return engine_of("qwen2")


def test_files_that_are_missing_or_damaged_are_named(tmp_path: Path) -> None:
    def reason() -> str:
        with pytest.raises(ModelLoadError) as caught:
            read(tiny_engine(), tmp_path / "x")
        return str(caught.value)

    assert "x is not an adapter: it has no adapter_config.json" in reason()
    save(tmp_path / "x", GOOD, CONFIG)
    weights = tmp_path / "x" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert "adapter_model.safetensors is damaged" in reason()
    weights.rename(weights.with_suffix(".bin"))
    assert "has no adapter_model.safetensors (adapter_model.bin, a pickle file, can run code" in reason()
    for text in ("{", "[]", "\udcff"):
        (tmp_path / "x" / "adapter_config.json").write_text(text, errors="surrogateescape")
        assert "adapter_config.json" in reason()
