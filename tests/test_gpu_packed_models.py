"""Models with packed weights on a GPU compute what transformers does with the dequantised ones: on a GPU where there is
one, else in Triton's interpreter."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import quantized_checkpoints as made
import torch
from devices import DEVICE
from gguf_twins import TWINS
from gpu_codes import FORMATS, codes_of
from gpu_models import NEEDS_NEW, engine_on_gpu, load_on_gpu, packed_model, plain_twin
from lora_files import TinyAdapter, greedy_tokens
from models import byte_tokenizer, tiny_model
from quantized_cases import CASES
from test_gguf import QWEN2_LAYERS, as_packed, wide
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from engine.attention.paged import AttentionRecorder
from engine.build import model_runner_of
from engine.checked_model import check_model
from engine.cpu import gguf_blocks, packed_checkpoint
from engine.cpu.packed_weight import E4M3, Format
from engine.engine import EngineOptions
from engine.memory_plan import Device, PaperModel
from engine.model_loader import load_model
from engine.placement import check_places
from engine.quantization import CODES_ALONE, FROM_FILE
from engine.quantized.files import QuantizedFiles
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from errors import ModelLoadError

pytest.importorskip("triton", reason="Triton is not installed; torch's builds for CUDA bring it")
from engine.gpu import packed_experts, product_limits, products  # noqa: E402
from engine.gpu.packed_experts import PackedExperts  # noqa: E402
from engine.gpu.packed_layers import PackedEmbedding, PackedLinear, measure_products  # noqa: E402
from engine.gpu.packed_weight import pack  # noqa: E402

IDS = [[5, 6, 7, 8, 50, 90]]
PROMPTS = ([5, 6, 7, 8, 9, 10, 11, 12], [11], [8, 8, 8])


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of a model whose attention is computed as in the first tokens of a sequence."""
    with torch.inference_mode():
        step, device = AttentionRecorder(computes=True), model.get_input_embeddings().weight.device
        result: torch.Tensor = model(input_ids=torch.tensor(IDS, device=device), use_cache=False, step=step).logits
    return result.float().cpu()


def distance(model: PreTrainedModel, other: PreTrainedModel) -> float:
    expected = logits(other)
    return float((logits(model) - expected).norm() / expected.norm())


def packed_layers_of(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


def answers(model: PreTrainedModel, prompts: tuple[list[int], ...], count: int = 6) -> list[list[int]]:
    engine, params = engine_on_gpu(model), SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    sequences = [Sequence(prompt, params, lambda output: None) for prompt in prompts]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    return [sequence.output_ids for sequence in sequences]


# --- rounded at loading


@pytest.mark.thinned(3)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "llama", "qwen2", "qwen3_moe", "gemma4_moe"])
def test_tokens_are_those_of_the_dequantised_weights(family: str, quantization: str) -> None:
    """In an engine with fused layers, several at once, in chunks."""
    changes = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32}
    stock = tiny_model(family, "eager", **changes)
    model = packed_model(family, quantization, **changes)
    twin = plain_twin(model, stock)
    assert packed_layers_of(model)
    assert answers(model, PROMPTS) == [greedy_tokens(twin, prompt, 6) for prompt in PROMPTS]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_checkpoint_is_rounded_as_it_is_loaded(quantization: str, is_tied: bool, tmp_path: Path) -> None:
    tiny_model("qwen3", **made.SIZES, tie_word_embeddings=is_tied).save_pretrained(tmp_path)
    model = load_on_gpu(tmp_path, quantization)
    stock = load_model(check_model(tmp_path, "float32", "cpu"), lambda *_: None)
    layers = packed_layers_of(model)
    assert len(layers) == 7 * model.config.num_hidden_layers + 1
    assert {layer.packed.format.bits for layer in layers.values()} == {8, int(quantization[-1])}
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, PackedEmbedding) == is_tied
    assert not is_tied or embedding.packed is layers["lm_head"].packed
    assert distance(model, plain_twin(model, stock)) < 1e-4
    assert distance(model, stock) < (0.05 if quantization == "int8" else 0.5)


def test_files_that_are_not_quantised_stay_as_they_are(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    assert not packed_layers_of(load_on_gpu(tmp_path))


def test_experts_are_computed_with_their_own_tokens() -> None:
    """Also where some get none."""
    changes = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32}
    model = packed_model("qwen3_moe", "int8", **changes)
    twin = plain_twin(model, tiny_model("qwen3_moe", "eager", **changes))
    experts = {name: m for name, m in model.named_modules() if isinstance(m, PackedExperts)}
    assert len(experts) == model.config.num_hidden_layers
    for name, own in experts.items():
        x, chosen = torch.randn(40, 64, device=DEVICE), torch.tensor([[0, 3]] * 39 + [[2, 3]], device=DEVICE)
        weights = torch.rand(40, 2, device=DEVICE)
        with torch.inference_mode():
            expected = twin.get_submodule(name)(x, chosen, weights)
            assert torch.allclose(own(x, chosen, weights), expected, rtol=1e-3, atol=1e-4)


def test_adapters_change_packed_layers_for_their_own_sequences(tmp_path: Path) -> None:
    changes = {"hidden_size": 64, "head_dim": 16}
    model = packed_model("qwen3", "int8", **changes)
    stock = plain_twin(model, tiny_model("qwen3", "eager", **changes))
    ends = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    made_adapter, engine, prompt = TinyAdapter(stock, ends), engine_on_gpu(model), [5, 6, 7, 8, 9]
    adapter = model_runner_of(engine).adapters.read("mine", made_adapter.save(tmp_path), max_rank=8)
    plain = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    adapted = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, adapter=adapter)
    sequences = [Sequence(prompt, params, lambda output: None) for params in (adapted, plain)]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    expected = [greedy_tokens(each, prompt, 4) for each in (made_adapter.merged(), stock)]
    assert [sequence.output_ids for sequence in sequences] == expected and expected[0] != expected[1]


# --- GGUF files


@pytest.mark.thinned(3)
@NEEDS_NEW
@pytest.mark.parametrize("kind", gguf_blocks.BLOCK_BYTES)
def test_a_gguf_files_own_blocks_are_kept(kind: str, tmp_path: Path) -> None:
    """As the library of llama.cpp reads them."""
    expected = wide(kind, tmp_path / "tiny.gguf")
    as_packed(tmp_path / "tiny.gguf")
    model = load_on_gpu(tmp_path / "tiny")
    layers = packed_layers_of(model)
    for layer, name in itertools.product(range(2), QWEN2_LAYERS):
        packed = layers[f"model.layers.{layer}.{name}"].packed
        numbers = products.dequantised(packed, torch.float32).cpu()
        stored = expected[f"blk.{layer}.{QWEN2_LAYERS[name]}.weight"]
        assert torch.allclose(numbers, stored, rtol=1e-5, atol=1e-6 * float(stored.abs().max()))
        assert packed.num_bytes < 0.7 * stored.numel() * (2 if kind == "Q8_0" else 1.4)
    stock = load_model(check_model(tmp_path / "tiny", "float32", "cpu"), lambda *_: None)
    assert distance(model, plain_twin(model, stock)) < 1e-4


@NEEDS_NEW
@NEEDS_NEW
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_experts_of_a_gguf_file_keep_its_blocks_and_are_planned_by_their_sizes(kind: str, tmp_path: Path) -> None:
    twin, sizes = (
        TWINS["qwen3moe"],
        {"config": {"moe_intermediate_size": 64}, "keys": {"expert_feed_forward_length": 64}},
    )
    larger = dataclasses.replace(twin, **{name: {**getattr(twin, name), **more} for name, more in sizes.items()})
    larger.write(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType[kind])
    as_packed(tmp_path / "tiny.gguf")
    model, directory = load_on_gpu(tmp_path / "tiny"), tmp_path / "tiny"
    experts = {name: m for name, m in model.named_modules() if isinstance(m, PackedExperts)}
    assert len(experts) == model.config.num_hidden_layers
    with torch.device("meta"):
        known = packed_checkpoint.parameter_sizes(AutoModelForCausalLM.from_config(model.config), directory)
    for name, own in experts.items():
        for part, weight in own.packed.items():
            assert weight.format.bits == int(kind[1]) and abs(known[f"{name}.{part}"] - weight.num_bytes) < 64
            assert packed_experts.agrees(weight, torch.float32)


@pytest.mark.parametrize("kind", ["F16", "F32", "BF16"])
def test_a_gguf_files_floats_get_the_models_type(kind: str, tmp_path: Path) -> None:
    expected = wide(kind, tmp_path / "tiny.gguf")
    as_packed(tmp_path / "tiny.gguf")
    model = load_on_gpu(tmp_path / "tiny", dtype=torch.bfloat16)
    assert not packed_layers_of(model)
    own = model.get_parameter("model.layers.0.self_attn.v_proj.weight").cpu()
    assert own.dtype == torch.bfloat16 and torch.allclose(own.float(), expected["blk.0.attn_v.weight"], rtol=2**-8)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_packed_weights_without_a_place_on_a_gpu_are_refused(place: str) -> None:
    check_places({"model.layers.0": 0, "lm_head": 1})
    with pytest.raises(ModelLoadError, match="too little memory.* fewer bits"):
        check_places({"model.layers.0": 0, "lm_head": place})


# --- quantised checkpoints


QUANTISED = [
    *("gptq-4-128-sym", "gptq-4-32-asym", "gptq-8-128-asym", "gptq-2-64-sym", "awq-64", "awq-128"),
    *("packed-4-128-sym", "int8", "fp8-blocks", "mxfp4", "float-rows"),
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", QUANTISED)
def test_a_checkpoints_own_codes_are_kept_and_nothing_else_is_rounded(name: str, tmp_path: Path) -> None:
    write, scheme, fmt = CASES[name]
    expected = made.save(tmp_path / "model", write, scheme)
    made.save_plain(tmp_path / "plain", tmp_path / "model", expected)
    model = load_on_gpu(tmp_path / "model")
    stock = load_model(check_model(tmp_path / "plain", "float32", "cpu"), lambda *_: None)
    layers = packed_layers_of(model)
    assert {layer.packed.format for layer in layers.values()} == {fmt}
    assert layers.keys() == {n for n, m in stock.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert distance(model, stock) < (0.02 if fmt == E4M3 else 5e-3)


@pytest.mark.parametrize("name", ["gptq-4-128-sym", "awq-64", "fp8-blocks"])
def test_experts_of_a_checkpoint_keep_their_codes(name: str, tmp_path: Path) -> None:
    write, scheme, fmt = CASES[name]
    expected = made.save(tmp_path / "model", write, scheme, "qwen3_moe")
    made.save_plain(tmp_path / "plain", tmp_path / "model", expected)
    model = load_on_gpu(tmp_path / "model")
    stock = load_model(check_model(tmp_path / "plain", "float32", "cpu"), lambda *_: None)
    experts = [module for module in model.modules() if isinstance(module, PackedExperts)]
    assert len(experts) == model.config.num_hidden_layers
    assert {weight.format for own in experts for weight in own.packed.values()} == {fmt}
    assert distance(model, stock) < 0.02


@pytest.mark.parametrize("name", ["gptq-4-128-sym", "fp8-blocks"])
def test_a_quantised_checkpoint_is_rounded_where_that_is_asked_for(name: str, tmp_path: Path) -> None:
    write, scheme, _ = CASES[name]
    made.save(tmp_path, write, scheme)
    layers = packed_layers_of(load_on_gpu(tmp_path, "int8"))
    bits = {name.rpartition(".")[2]: layer.packed.format.bits for name, layer in layers.items()}
    assert bits["q_proj"] == (4 if "gptq" in name else 8) and bits["lm_head"] == 8


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_devices_are_chosen_by_the_sizes_of_the_codes(family: str, tmp_path: Path) -> None:
    write, scheme, _ = CASES["gptq-4-128-sym"]
    made.save(tmp_path, write, scheme, family)
    stored = QuantizedFiles(tmp_path, scheme)
    with torch.device("meta"):
        names = dict(tiny_model(family, **made.SIZES).named_parameters())
    sizes = {name: stored.element_size(name) for name in names}
    packed = {name for name, size in sizes.items() if size is not None}
    assert packed == {name for name in names if "proj" in name}
    assert all(0.5 <= size <= 0.63 for size in sizes.values() if size is not None)


def weights_bytes(model: PreTrainedModel) -> int:
    """Returns the memory of a model's parameters, buffers and packed weights, each counted once."""
    packed = {id(m.packed): m.packed for m in model.modules() if isinstance(m, PackedLinear | PackedEmbedding)}
    plain = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(weight.num_bytes for weight in packed.values()) + sum(tensor.nbytes for tensor in plain.values())


@pytest.mark.parametrize("name", ["gptq-4-128-sym", "awq-64", "fp8-blocks"])
def test_the_plan_of_memory_knows_the_sizes_of_a_checkpoints_codes(name: str, tmp_path: Path) -> None:
    """Up to the scales, of which it does not know how many columns share them."""
    write, scheme, _ = CASES[name]
    made.save(tmp_path, write, scheme)
    model = load_on_gpu(tmp_path, dtype=torch.bfloat16)
    paper = PaperModel.of(AutoConfig.from_pretrained(tmp_path), torch.bfloat16, CODES_ALONE, tmp_path)
    found = paper.plan([Device.of_card(0, 24)], EngineOptions()).weights
    assert weights_bytes(model) <= found <= 1.15 * weights_bytes(model)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "Q8_0"])
def test_the_plan_of_memory_knows_the_sizes_of_a_gguf_files_blocks(kind: str, tmp_path: Path) -> None:
    wide(kind, tmp_path / "tiny.gguf")
    as_packed(tmp_path / "tiny.gguf")
    model, directory = load_on_gpu(tmp_path / "tiny", dtype=torch.bfloat16), tmp_path / "tiny"
    paper = PaperModel.of(AutoConfig.from_pretrained(directory), torch.bfloat16, FROM_FILE, directory)
    found = paper.plan([Device.of_card(0, 24)], EngineOptions()).weights
    assert abs(found - weights_bytes(model)) < 0.02 * found


def test_a_packed_model_is_served_with_its_tokenizer() -> None:
    """The embedding of a packed model says how many tokens there are, and where it is."""
    model = packed_model("gemma3", hidden_size=64, vocab_size=len(byte_tokenizer()), tie_word_embeddings=True)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, PackedEmbedding) and embedding.num_embeddings == len(byte_tokenizer())
    assert embedding.weight.device.type == DEVICE.type


def test_what_an_embedding_is_multiplied_by_is_where_its_rows_are() -> None:
    """Whatever device it comes from: a copy could not be recorded."""
    weight = pack(codes_of(FORMATS["int8"], 8, 64, DEVICE))
    embedding = PackedEmbedding(weight, torch.tensor(3.0, dtype=torch.float64), torch.bfloat16)
    assert embedding.scale is not None and embedding.scale.device.type == DEVICE.type
    assert embedding.scale.dtype == torch.bfloat16
    ids = torch.tensor([[3, 5]], device=DEVICE)
    plain = PackedEmbedding(weight, None, torch.bfloat16)
    assert torch.equal(embedding(ids), plain(ids) * 3)


def test_the_fastest_way_is_measured_once_for_each_format_of_a_models_layers() -> None:
    """Numbers of bits that no other model here has."""
    model, weight = packed_model("qwen3", "int8"), pack(codes_of(Format(7, offset=64), 32, 64, DEVICE))
    for name in ("q_proj", "k_proj"):
        setattr(model.model.layers[0].self_attn, name, PackedLinear(weight, None, torch.float16))
    calls: list[Callable[[], None]] = []

    def seconds(run: Callable[[], None]) -> float:
        calls.append(run)
        return 1.0

    measure_products(model, seconds)
    assert calls
    x, count = torch.randn(3, 64, device=DEVICE).half(), len(calls)
    expected = x.float() @ products.dequantised(weight, torch.float32).T
    assert torch.allclose(product_limits.multiply(x, weight).float(), expected, rtol=1e-2, atol=1e-2)
    measure_products(model, seconds)
    assert len(calls) == count
