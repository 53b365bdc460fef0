"""Packed models give the tokens of the same quantised weights in a stock model, and are found again in GGUF files."""

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from models import FAMILIES, tiny_model
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from engine import start_check
from engine.attention import fused, paged
from engine.attention.fused import FusedAttention
from engine.build import build_engine
from engine.checked_model import check_model
from engine.cpu import kernels, packed_checkpoint, packed_layers, packed_weight
from engine.cpu.packed_layers import FusedMLP, FusedNorm, PackedEmbedding, PackedLinear, SharedInput, SharedLinear
from engine.cpu.packed_weight import INT8, quantize_weight
from engine.cpu.packing import pack_model
from engine.engine import EngineOptions
from engine.model_loader import choose_quantization, load_model
from engine.quantization import QUANTIZATIONS
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence

pytestmark = pytest.mark.skipif(not kernels.are_available(), reason="needs torch with GNU's OpenMP")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


def model_of(family: str, implementation: str = paged.NAME, **changes: object) -> PreTrainedModel:
    return tiny_model(family, implementation, **{**SIZES, **changes})


def pack(model: PreTrainedModel, quantization: str) -> None:
    """As load_model does."""
    with torch.inference_mode():
        pack_model(model, QUANTIZATIONS[quantization])
    fused.fuse_attention(model)


class Reference(nn.Module):
    """What a PackedLinear is to compute, step by step in torch."""

    def __init__(self, layer: nn.Linear, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        groups = x.unflatten(-1, (-1, 32))
        scales = groups.abs().amax(-1, keepdim=True) / 127
        rounded = (groups / scales.clamp(min=1e-30)).round() * scales
        return nn.functional.linear(rounded.flatten(-2), self.weight, self.bias)


def reference_of(family: str, packed: PreTrainedModel, **changes: object) -> PreTrainedModel:
    """The stock model with the packed model's weights, dequantised."""
    model = model_of(family, "eager", **changes)
    weights = dequantized(packed)
    for name, layer in list(model.named_modules()):
        if name in weights and isinstance(layer, nn.Linear):
            model.set_submodule(name, Reference(layer, weights[name]))
        elif name in weights:
            layer.weight.data = weights[name]
    return model


def dequantized(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    result = {}
    for path, module in model.named_modules():
        name = path.replace("._stock", "")  # of a fused attention
        parts: dict[str, nn.Module] = {name: module}
        if isinstance(module, SharedLinear):
            parts = {name: module.shared._layers[module._index]}
        elif isinstance(module, FusedMLP):
            both = module._gate_up.packed
            half = both.num_rows // 2
            result[f"{name}.gate_proj"], result[f"{name}.up_proj"] = both.dequantize().split(half)
            parts = {f"{name}.down_proj": module._down}
        for part, layer in parts.items():
            if isinstance(layer, PackedLinear | PackedEmbedding):
                result[part] = layer.packed.dequantize()
    return result


def engine_answers(model: PreTrainedModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    engine = build_engine(model, EngineOptions(max_num_seqs=8), frozenset())
    params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
    sequences = [Sequence(prompt, params, on_output=lambda output: None) for prompt in prompts]
    for sequence in sequences:
        engine.scheduler.add(sequence)
    while engine.scheduler.has_work:
        engine.step()
    return [sequence.output_ids for sequence in sequences]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.usefixtures("threads")
def test_tokens_are_those_of_the_dequantized_weights(family: str, quantization: str, tied: bool) -> None:
    model = model_of(family, tie_word_embeddings=tied)
    pack(model, quantization)
    stock = reference_of(family, model, tie_word_embeddings=tied)
    prompts = [[7, 3, 9], list(range(20, 70)), [5]]
    exact = 0
    for prompt, answer in zip(prompts, engine_answers(model, prompts, 24), strict=True):
        embeddings = stock.get_input_embeddings()(torch.tensor([prompt + answer]))
        logits = logits_of(stock, embeddings)[len(prompt) - 1 : -1]
        short = logits.amax(-1) - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        # An activation half-way between two codes may fall to either: in the reference too, moved by a float's rounding
        moved = (logits_of(stock, embeddings * (1 + 1e-6 * torch.randn_like(embeddings))) for _ in range(8))
        noise = max(float((other[len(prompt) - 1 : -1] - logits).abs().max()) for other in moved)
        assert noise < 0.3 * logits.std()
        assert short.max() <= 2 * noise
        exact += int((short == 0).sum())
    assert exact >= 0.95 * 24 * len(prompts)


@torch.no_grad()
def logits_of(model: PreTrainedModel, embeddings: torch.Tensor) -> torch.Tensor:
    return model(inputs_embeds=embeddings).logits[0]


@pytest.mark.skipif(not kernels.has_bfloat16(), reason="needs AVX512-BF16")
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_layers_give_the_logits_of_the_stock_model(family: str) -> None:
    stock, packed = model_of(family, "eager").bfloat16(), model_of(family).bfloat16()
    with torch.inference_mode():
        pack_model(packed, QUANTIZATIONS["bfloat16"])
        probe = {"input_ids": torch.tensor([[5]]), "use_cache": False}
        expected, actual = stock(**probe).logits.float(), packed(**probe, step=paged.AttentionRecorder()).logits.float()
    assert nn.Linear not in [type(module) for module in packed.modules()]
    assert (actual - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_can_be_is_packed_or_fused(family: str) -> None:
    model = model_of(family)
    pack(model, "int8")
    kinds = [type(module) for module in model.modules()]
    layers = model.config.num_hidden_layers
    assert kinds.count(FusedMLP) == layers and kinds.count(SharedLinear) == 3 * layers
    assert nn.Linear not in kinds and not any(kind.__name__.endswith("RMSNorm") for kind in kinds)
    assert kinds.count(FusedNorm) > 2 * layers and kinds.count(FusedAttention) == layers


class Gated(nn.Module):
    """An attention module that does one thing that others do not."""

    def __init__(self, stock: nn.Module, change: str) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx", "scaling"):
            setattr(self, name, getattr(stock, name))
        self.change = change

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Any, step: Any, **others: Any) -> Any:
        cos, sin = position_embeddings
        if self.change == "position_ids":
            cos = cos * others["position_ids"].max()
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        parts = [getattr(self, f"{p}_proj")(hidden_states).view(shape).transpose(1, 2) for p in "qkv"]
        query, key, value = parts
        if self.change != "unrotated":
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
        changed = {
            "queries": (query * 1.1, key, value),
            "keys": (query, key + 0.1, value),
            "values": (query, key, -value),
        }
        query, key, value = changed.get(self.change, (query, key, value))
        softcap = 30.0 if self.change == "softcap" else None
        options = {"scaling": self.scaling, "softcap": softcap, "step": step}
        output, _ = paged.paged_attention(self, query, key, value, None, **options)
        output = self.o_proj(output.reshape(*hidden_states.shape[:-1], -1))
        return output * (0.5 if self.change == "output" else 1.0), None


CHANGES = ["unrotated", "queries", "keys", "values", "softcap", "output", "position_ids"]


@pytest.mark.parametrize("change", ["", *CHANGES])
def test_attention_that_differs_in_any_way_stays_as_it_is(change: str) -> None:
    model = model_of("llama")
    with torch.inference_mode():
        pack_model(model, QUANTIZATIONS["int8"])
        made = fused.fused_attention(Gated(model.model.layers[0].self_attn, change))
    assert (made is None) == bool(change)


def test_a_norm_with_large_weights_is_told_from_one_that_adds_one() -> None:
    model = model_of("gemma3")
    expected = copy.deepcopy(model)
    for module in (*model.modules(), *expected.modules()):
        if type(module).__name__ == "Gemma3RMSNorm":
            module.weight.data = torch.full_like(module.weight, 300.0)
    packed_layers.fuse_layers(model)
    x = torch.randn(2, 64)
    torch.testing.assert_close(model.model.norm(x), expected.model.norm(x), rtol=1e-4, atol=1e-4)


def test_columns_that_fill_no_groups_stay_as_they_are() -> None:
    model = model_of("llama", hidden_size=80, head_dim=16)
    pack(model, "int8")
    assert isinstance(model.lm_head, nn.Linear) and len(engine_answers(model, [[1, 2, 3]], 4)[0]) == 4


# --- GGUF files

TYPES = ("Q5_0", "Q8_0", "Q4_0", "Q4_1", "Q5_1")


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """The model's matrices, each of another type, under other names and with their rows moved; the model gets what
    is then in the file."""
    writer = gguf.GGUFWriter(path, "llama")
    rng = numpy.random.default_rng(0)
    for number, (_, layer) in enumerate(matrices(model)):
        kind = gguf.GGMLQuantizationType[TYPES[number % len(TYPES)]]
        weight = layer.weight.data.float().numpy()
        order = rng.permutation(len(weight))
        data = gguf.quants.quantize(weight[order], kind)
        stored = numpy.empty_like(weight)
        stored[order] = gguf.quants.dequantize(data, kind)
        layer.weight.data = torch.from_numpy(stored).to(layer.weight.dtype)
        writer.add_tensor(f"blk.{number}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def matrices(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)]
    return list({m.weight.data_ptr(): (n, m) for n, m in found}.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["gemma3", "qwen2"])
def test_a_gguf_files_blocks_are_kept_bit_by_bit(family: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(family, tie_word_embeddings=tied).bfloat16()
    write_gguf(model, tmp_path / "model.gguf")
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    packed_checkpoint.write(model, tmp_path / "model.gguf", tmp_path)
    model.save_pretrained(tmp_path)
    loaded = load_model(check_model(tmp_path, "auto", "cpu"), lambda what, fraction: None, "auto")
    weights = dequantized(loaded)
    assert len(weights) == len(matrices(model)) + tied
    for name, weight in weights.items():
        assert torch.equal(weight.bfloat16(), model.get_submodule(name).weight.data), name
    stock = reference_of(family, loaded, tie_word_embeddings=tied)
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = stock(input_ids=ids).logits
    with torch.inference_mode():
        packed = loaded(input_ids=ids, use_cache=False, step=paged.AttentionRecorder()).logits
    assert packed.shape == logits.shape and packed.isfinite().all()


def test_a_matrix_that_is_not_in_the_file_stays_as_it_is(tmp_path: Path) -> None:
    model = model_of("qwen3").bfloat16()
    write_gguf(model, tmp_path / "model.gguf")
    changed = model.model.layers[1].mlp.down_proj
    changed.weight.data[3, 5] += 1
    packed_checkpoint.write(model, tmp_path / "model.gguf", tmp_path)
    model.save_pretrained(tmp_path)
    loaded = load_model(check_model(tmp_path, "auto", "cpu"), lambda what, fraction: None, "auto")
    kept = loaded.model.layers[1].mlp.down_proj
    weight = kept.packed.dequantize().bfloat16() if isinstance(kept, PackedLinear) else kept.weight
    assert torch.equal(weight, changed.weight)
    packed = loaded.model.layers[0].mlp.down_proj
    assert isinstance(packed, PackedLinear) and packed.packed.format.is_quantized


# --- the choice


def test_the_default_keeps_what_dtype_asks_for_and_a_files_own_blocks(tmp_path: Path) -> None:
    assert choose_quantization("auto", "float32", False, tmp_path).name == "none"
    assert choose_quantization("auto", "auto", True, tmp_path).name == "none"
    assert choose_quantization("auto", "auto", False, tmp_path).name == "int8"
    (tmp_path / packed_checkpoint.FILE).touch()
    assert choose_quantization("auto", "auto", False, tmp_path).name == "from file"
    assert choose_quantization("int4", "auto", False, tmp_path).name == "int4"


def test_layers_of_any_number_of_rows_share_their_input() -> None:
    """Also where the last of those that are computed as one does not end with a tile."""
    torch.manual_seed(0)
    layers = [
        PackedLinear(packed_weight.pack(quantize_weight(torch.randn(rows, 64), INT8)), torch.randn(rows), torch.float32)
        for rows in (48, 24, 24)
    ]
    x = torch.randn(3, 64)
    expected = [layer(x) for layer in layers]
    for actual, own in zip(SharedInput(layers).outputs(x), expected, strict=True):
        assert torch.equal(actual, own)


@pytest.mark.usefixtures("threads")
def test_attention_with_gates_and_partly_rotated_heads_is_fused() -> None:
    """As in Qwen 3.5: a quarter of each head rotates, and behind each query is a gate."""
    model = model_of("qwen3_5", head_dim=128)
    pack(model, "int8")
    assert sum(isinstance(module, fused.FusedAttention) for module in model.modules()) == 1
    assert start_check.check(build_engine(model, EngineOptions(max_num_seqs=4), frozenset()).runner, 256)
