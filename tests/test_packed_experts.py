"""Mixtures of experts with packed weights compute what the stock modules compute with the same numbers."""

import copy
from pathlib import Path

import pytest
import torch
from amx_emulator import BUILDERS
from models import MIXTURES, RECURRENT, SINKS, tiny_model
from test_kernels import random_codes
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from engine import start_check
from engine.attention.paged import AttentionRecorder
from engine.build import build_engine, model_runner_of
from engine.checked_model import check_model
from engine.cpu import jit, kernels, products
from engine.cpu.activations import quantize
from engine.cpu.amx import AMXBuilder
from engine.cpu.packed_experts import PackedExperts, can_pack_experts
from engine.cpu.packed_layers import PackedLinear
from engine.cpu.packed_weight import INT8, Q6_K, Format, format_of, pack, quantize_weight, round_and_pack
from engine.cpu.packing import Packer
from engine.engine import EngineOptions
from engine.model_loader import load_model
from engine.quantization import QUANTIZATIONS

pytestmark = pytest.mark.skipif(not kernels.are_available(), reason="needs torch with GNU's OpenMP")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}


def silent(phase: str, fraction: float) -> None: ...


FAMILIES = [*MIXTURES, *(family for family in RECURRENT if family in ("qwen3_5_moe", "qwen3_next"))]


@pytest.mark.parametrize("fmt", [INT8, format_of(4)], ids=["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("threads")
def test_each_row_is_multiplied_with_its_own_expert(fmt: Format, dtype: torch.dtype) -> None:
    weights = torch.randn(5, 48, 64)
    packed, counts = round_and_pack(weights.flatten(0, 1), fmt), torch.tensor([3, 0, 150, 1, 17])
    x = quantize(torch.randn(int(counts.sum()), 64))
    rounded = (x.values.float() * x.scales[..., None]).transpose(0, 1).flatten(1)
    of_experts = packed.dequantize().view_as(weights).repeat_interleave(counts, dim=0)
    expected = torch.einsum("tc,trc->tr", rounded, of_experts)
    actual = products.matmul_experts(x, packed, counts, dtype).float()
    assert (actual - expected).norm() < (1e-5 if dtype == torch.float32 else 5e-3) * expected.norm()


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("fmt", [INT8, format_of(4), Q6_K])
def test_a_product_of_experts_with_amx_is_that_without(fmt: Format, builder: type[AMXBuilder]) -> None:
    """Tiles of sixteen rows reach into the next expert's, whose results are left out."""
    packed, counts = pack(random_codes(fmt, 3 * 48, 256)), torch.tensor([5, 150, 17])
    x = quantize(torch.randn(int(counts.sum()), 256))
    programs = (
        products.amx_matmul_program(fmt, torch.float32, *jit.host(), builder, has_experts=True),
        products.matmul_program(fmt, torch.float32, *jit.host(), has_experts=True),
    )
    product, expected = (products.matmul_experts(x, packed, counts, torch.float32, program) for program in programs)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("num_rows", [16, 40, 50, 64, 200])
@pytest.mark.parametrize("fmt", [INT8, format_of(4)], ids=["int8", "int4"])
def test_a_weight_is_the_same_packed_in_parts(fmt: Format, num_rows: int) -> None:
    weight = torch.randn(num_rows, 64)
    parts, whole = round_and_pack(weight, fmt, part=64 * 50), pack(quantize_weight(weight, fmt))
    assert parts.num_rows == num_rows and parts.parts.keys() == whole.parts.keys()
    assert all(torch.equal(parts.parts[name], part) for name, part in whole.parts.items())


def test_terms_are_summed_by_their_weights() -> None:
    rows, places, weights = torch.randn(9, 32), torch.randint(0, 9, (7, 3)), torch.rand(7, 3)
    expected = (rows[places] * weights[..., None]).sum(1)
    assert torch.allclose(kernels.combine(rows, places, weights, torch.float32), expected, atol=1e-5)


def test_other_formulas_are_left_to_the_stock_module() -> None:
    with torch.device("meta"):
        usual, other = MixtralExperts(MixtralConfig()), GptOssExperts(GptOssConfig())
    assert can_pack_experts(usual) and not can_pack_experts(other)
    changed = copy.copy(usual)
    changed.act_fn = nn.ReLU()
    assert not can_pack_experts(changed)
    odd = MixtralConfig(hidden_size=80)
    with torch.device("meta"):
        assert not can_pack_experts(MixtralExperts(odd))


class Swapped(Qwen3MoeExperts):
    """Has the halves of its first weight in the other order."""

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        twin = copy.copy(self)
        swapped = torch.cat(self.gate_up_proj.chunk(2, dim=1)[::-1], dim=1)
        twin._parameters = {**self._parameters, "gate_up_proj": nn.Parameter(swapped)}
        return Qwen3MoeExperts.forward(twin, x, index, weights)


def test_what_a_module_computes_counts_and_not_its_names() -> None:
    model = tiny_model("qwen3_moe", **SIZES)
    experts = model.model.layers[0].mlp.experts
    assert can_pack_experts(experts)
    experts.__class__ = Swapped
    assert not can_pack_experts(experts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_loaded_mixture_computes_with_its_rounded_weights(
    family: str, dtype: str, quantization: str, tmp_path: Path
) -> None:
    tiny_model(family, "eager", **SIZES).save_pretrained(tmp_path)
    checked = check_model(tmp_path, dtype, "cpu")
    model, stock = load_model(checked, silent, quantization), load_model(checked, silent, "none")
    experts = {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}
    assert len(experts) == sum(type(module).__name__.endswith("Experts") for module in stock.modules())
    for name, packed in experts.items():
        twin = stock.get_submodule(name)
        for part, weight in packed.packed.items():
            parameter = twin.get_parameter(part)
            parameter.data = weight.dequantize().view_as(parameter).to(parameter.dtype)
        x = torch.randn(50, 64).to(checked.dtype)
        chosen, weights = torch.rand(50, 6).topk(2)[1], torch.rand(50, 2)
        with torch.inference_mode():
            expected, actual = twin(x, chosen, weights.to(x.dtype)).float(), packed(x, chosen, weights).float()
        assert (actual - expected).norm() < 0.02 * expected.norm(), "inputs are rounded to 8 bits"
    assert start_check.check(build_engine(model, EngineOptions(max_num_seqs=4), frozenset()).runner, 256)


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_compute_in_float32(family: str, tmp_path: Path) -> None:
    tiny_model(family, "eager", **SIZES).bfloat16().save_pretrained(tmp_path)
    model = load_model(check_model(tmp_path, "bfloat16", "cpu"), silent, "int8")
    seen = []
    for name, module in model.named_modules():
        if name.endswith((".gate", ".router")) and any(True for _ in module.parameters()):
            assert all(p.dtype == torch.float32 for p in module.parameters())
            module.register_forward_hook(lambda module, x, output: seen.append(output[1].dtype))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[5, 6]]), use_cache=False, step=AttentionRecorder()).logits
    assert seen and {*seen} == {torch.float32} and torch.isfinite(logits).all()


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_a_second_start_reads_the_rounded_experts(family: str, tmp_path: Path) -> None:
    tiny_model(family, "eager", **SIZES).save_pretrained(tmp_path / "model")
    checked = check_model(tmp_path / "model", "float32", "cpu")
    tokens, phases = torch.tensor([[5, 6, 7, 8]]), list[str]()
    logits = []
    for _ in range(2):
        phases.clear()
        model = load_model(checked, lambda phase, fraction: phases.append(phase), "int4", tmp_path)
        with torch.inference_mode():
            logits.append(model(input_ids=tokens, use_cache=False, step=AttentionRecorder()).logits)
    assert "quantizing weights" not in phases and torch.equal(*logits)


def test_the_memory_of_packed_weights_is_known_beforehand() -> None:
    with torch.device("meta"):
        empty = tiny_model("qwen3_moe", **SIZES)
    for name in ("int8", "int4"):
        packer = Packer(empty, QUANTIZATIONS[name])
        expected, others = packer.num_packed_bytes(empty), 0
        for parameter, value in tiny_model("qwen3_moe", **SIZES).named_parameters():
            if packer.format_of(parameter):
                packer.pack(parameter, value.data)
            else:
                others += value.nbytes
        parts = sum(part.nbytes for weight in packer.packed.values() for part in weight.parts.values())
        assert expected <= parts + others < 1.1 * expected, "rows are padded to whole tiles"


@pytest.mark.parametrize("family", SINKS)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_experts_of_another_form_stay_as_they_are_among_packed_layers(
    family: str, quantization: str, tmp_path: Path
) -> None:
    tiny_model(family, "eager", hidden_size=64).save_pretrained(tmp_path)
    model = load_model(check_model(tmp_path, "bfloat16", "cpu"), silent, quantization)
    kinds = {type(module) for module in model.modules()}
    assert {PackedLinear, GptOssExperts} <= kinds and PackedExperts not in kinds and nn.Linear not in kinds
    assert start_check.check(model_runner_of(build_engine(model, EngineOptions(max_num_seqs=4), frozenset())), 256)
