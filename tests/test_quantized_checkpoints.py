"""Quantised checkpoints keep their own codes on the CPU: packed weights are the dequantised ones, and so are logits."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_checkpoints as made
import torch
from models import tiny_model
from odd_checkpoints import ignore
from quantized_cases import CASES, Scheme
from quantized_checkpoints import Tensors
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from engine.attention.paged import AttentionRecorder
from engine.checked_model import check_model
from engine.cpu import kernels
from engine.cpu.packed_weight import BFLOAT16, INT8, PARTS, Format, PackedWeight, round_and_pack
from engine.cpu.packing import Packer
from engine.model_loader import load_model
from engine.quantization import OWN_CODES
from engine.quantized import mxfp4
from engine.quantized.files import QuantizedFiles
from engine.rounded_files import FOLDER
from errors import ModelLoadError

pytestmark = pytest.mark.skipif(not kernels.are_available(), reason="needs torch with GNU's OpenMP")


def load(directory: Path, quantization: str = "auto", cache_dir: Path | None = None) -> PreTrainedModel:
    return load_model(check_model(directory, "auto", "cpu"), ignore, quantization, cache_dir)


def packed_weights(directory: Path, quantization: str = "auto") -> dict[str, PackedWeight]:
    """Returns the packed weights of a checkpoint, by the names of their layers or of experts' parameters, as they are
    kept for the next start."""
    load(directory, quantization, directory / "cache")
    (path,) = (directory / "cache" / FOLDER).iterdir()
    with safe_open(path, "pt") as file:
        tables = {name: json.loads(table) for name, table in file.metadata().items()}
    tensors, result = load_file(path), {}
    for name, values in tables["formats"].items():
        num_rows = values.pop("num_rows")
        parts = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
        table = tuple(values.pop("table"))  # JSON has lists
        result[name] = PackedWeight(Format(**values, table=table), num_rows, **parts)
    return result


def whole(expected: Tensors, name: str) -> torch.Tensor:
    """The weight of a layer: that of the file, or those of all experts, one after the other."""
    if f"{name}.weight" in expected:
        return expected[f"{name}.weight"]
    stem, _, part = name.rpartition(".")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[part]
    numbers = range(sum(key.startswith(f"{stem}.") and key.endswith(f"{parts[0]}.weight") for key in expected))
    return torch.cat([expected[f"{stem}.{number}.{one}.weight"] for number in numbers for one in parts])


def logits(model: nn.Module, **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(input_ids=torch.tensor([[5, 6, 7, 8, 50, 90]]), use_cache=False, **options).logits
    return result.float().log_softmax(-1)


def check_weights(directory: Path, expected: Tensors, fmt: Format, quantized: str = "_proj") -> None:
    """Holds each weight of a quantised layer to what its tensors stand for, up to the rounding of a float16."""
    packed = packed_weights(directory)
    kept = {name: weight for name, weight in packed.items() if quantized in name}
    assert kept and {weight.format for weight in kept.values()} == {fmt}
    for name, weight in kept.items():
        value = whole(expected, name)
        limit = 2**-10 * value.abs().amax(1, keepdim=True)
        assert ((weight.dequantize() - value).abs() <= limit).all(), name


@pytest.mark.parametrize("name", CASES)
def test_packed_weights_are_the_checkpoints_own(name: str, tmp_path: Path) -> None:
    write, scheme, fmt = CASES[name]
    check_weights(tmp_path, made.save(tmp_path, write, scheme), fmt)


MIXED = ("gptq-4-128-sym", "gptq-4-32-asym", "gptq-8-128-asym", "awq-64", "packed-4-128-sym", "int8", "fp8-blocks")


@pytest.mark.parametrize("name", MIXED)
def test_experts_are_the_checkpoints_own(name: str, tmp_path: Path) -> None:
    """Their files have a weight for each expert, which transformers joins to two parameters."""
    write, scheme, fmt = CASES[name]
    expected = made.save(tmp_path, write, scheme, "qwen3_moe")
    check_weights(tmp_path, expected, fmt, "experts.")
    check_weights(tmp_path, expected, fmt, "self_attn")


@pytest.mark.parametrize(
    ("family", "is_tied"), [("qwen3", False), ("qwen3", True), ("llama", False), ("qwen3_moe", False)]
)
@pytest.mark.parametrize("name", [*MIXED, "mxfp4", "float-rows"])
def test_logits_are_those_of_the_dequantized_weights(name: str, family: str, is_tied: bool, tmp_path: Path) -> None:
    """As near as activations of 8 bits allow, which move them as far with weights that are rounded to 8 bits."""
    write, scheme, _ = CASES[name]
    expected = made.save(tmp_path / "model", write, scheme, family, tie_word_embeddings=is_tied)
    made.save_plain(tmp_path / "plain", tmp_path / "model", expected)
    stock = load_model(check_model(tmp_path / "plain", "float32", "cpu"), ignore)
    exact = logits(stock, step=AttentionRecorder())
    rounded = logits(load(tmp_path / "plain", "int8"), step=AttentionRecorder())
    actual = logits(load(tmp_path / "model"), step=AttentionRecorder())
    spread = (exact - exact.mean(-1, keepdim=True)).norm()
    assert (actual - exact).norm() < max(0.05 * spread, 1.5 * (rounded - exact).norm())


def test_a_second_start_reads_what_the_first_has_packed(tmp_path: Path) -> None:
    write, scheme, _ = CASES["gptq-4-32-asym"]
    made.save(tmp_path / "model", write, scheme)
    phases = list[str]()
    checked, results = check_model(tmp_path / "model", "auto", "cpu"), []
    for _ in range(2):
        phases.clear()
        model = load_model(checked, lambda phase, fraction: phases.append(phase), "auto", tmp_path)
        results.append(logits(model, step=AttentionRecorder()))
    assert "quantizing weights" not in phases and torch.equal(*results)
    assert not hasattr(model.config, "quantization_config")


# --- what the kernels' formats do not have


@pytest.mark.parametrize(("bits", "fmt"), [(4, INT8), (8, BFLOAT16)])
def test_groups_of_scattered_columns_are_not_rounded_coarser_than_the_file(
    bits: int, fmt: Format, tmp_path: Path
) -> None:
    """`desc_act`: neither format is coarser, and 8 bits are smaller."""
    if fmt is BFLOAT16 and not kernels.has_bfloat16():
        pytest.skip("needs a CPU that multiplies bfloat16")
    scheme = {"quant_method": "gptq", "bits": bits, "group_size": 64, "desc_act": True}
    expected = made.save(tmp_path, made.gptq(bits, 64, True, act_order=True), scheme)
    kept = {name: weight for name, weight in packed_weights(tmp_path).items() if "_proj" in name}
    assert {weight.format for weight in kept.values()} == {fmt}
    for name, weight in kept.items():
        value = whole(expected, name)
        assert ((weight.dequantize() - value).abs() <= value.abs().amax(1, keepdim=True) / 200).all()


def test_experts_with_scattered_columns_of_8_bits_are_refused_with_what_helps(tmp_path: Path) -> None:
    scheme = {"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": True}
    made.save(tmp_path, made.gptq(8, 64, True, act_order=True), scheme, "qwen3_moe")
    with pytest.raises(ModelLoadError, match=r"cannot be loaded\. .*experts.*groups of columns.*set QUANTIZATION=int8"):
        load(tmp_path)
    assert logits(load(tmp_path, "int8"), step=AttentionRecorder()).isfinite().all()


def some(write: made.Write, change: Callable[[torch.Tensor], torch.Tensor]) -> made.Write:
    """Changes every seventh weight before it is written."""
    counter = itertools.count(1)
    return lambda weight: write(change(weight) if next(counter) % 7 == 0 else weight)


def with_outlier(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.clone()
    weight[3, 5] = weight.abs().max() * 10
    return weight


@pytest.mark.parametrize("is_plain", [False, True])
def test_experts_that_are_not_alike_are_refused_with_what_helps(is_plain: bool, tmp_path: Path) -> None:
    """Some with codes that the kernels do not have, or some that the quantizer left as they were."""
    write = made.gptq(4, 64, True, act_order=not is_plain)
    scheme = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": not is_plain}
    numbers = "[012]" if is_plain else r"\d+"
    layers = rf"(self_attn\.\w+proj|experts\.{numbers}\.\w+)$"
    expected = made.save(tmp_path, some(write, with_outlier), scheme, "qwen3_moe", layers=layers)
    with pytest.raises(
        ModelLoadError, match=r"cannot be loaded\. .*experts\.\d.*set QUANTIZATION=int8, which rounds all"
    ):
        load(tmp_path)
    experts = {name: weight for name, weight in packed_weights(tmp_path, "int8").items() if "experts" in name}
    for name, weight in experts.items():
        value = whole(expected, name)
        assert weight.format == INT8
        assert ((weight.dequantize() - value).abs() <= value.abs().amax(1, keepdim=True) / 200).all()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_weight_of_zeros_keeps_its_codes_whatever_its_scale_is(family: str, tmp_path: Path) -> None:
    """As an expert that never had a token."""
    for name, scale in (("fp8-blocks", ".weight_scale_inv"), ("int8", ".weight_scale")):
        write, scheme, fmt = CASES[name]

        def dead(weight: torch.Tensor, write: made.Write = write, scale: str = scale) -> tuple[Tensors, torch.Tensor]:
            tensors, value = write(weight)
            if not value.any():
                tensors[scale] = torch.full_like(tensors[scale], 1e-12 / 448)
            return tensors, value

        check_weights(tmp_path / name, made.save(tmp_path / name, some(dead, torch.zeros_like), scheme, family), fmt)


def test_a_group_in_the_order_of_its_columns_is_none_of_scattered_ones(tmp_path: Path) -> None:
    """Most files with `desc_act` of false have a g_idx, too, and some have one whose groups are whole."""
    write, scheme, fmt = CASES["gptq-4-32-sym"]

    def reordered(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        tensors, value = write(weight)
        order = torch.arange(len(tensors[".scales"])).flip(0)
        tensors[".g_idx"] = tensors[".g_idx"].flip(0).contiguous()
        return {**tensors, **{part: tensors[part][order].contiguous() for part in (".scales", ".qzeros")}}, value

    check_weights(tmp_path, made.save(tmp_path, reordered, {**scheme, "desc_act": True}), fmt)


def test_scales_beyond_float16_are_kept_in_bfloat16(tmp_path: Path) -> None:
    def small(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        return made.int8()(weight * 1e-6)

    expected = made.save(tmp_path, small, CASES["int8"][1])
    for name, weight in packed_weights(tmp_path).items():
        if "_proj" in name:
            assert weight.format == BFLOAT16
            torch.testing.assert_close(weight.dequantize(), whole(expected, name), rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", ["gptq-4-32-sym", "fp8-rows", "int8"])
def test_columns_that_no_block_holds_are_numbers(name: str, tmp_path: Path) -> None:
    write, scheme, _ = CASES[name]
    sizes = {"hidden_size": 80, "intermediate_size": 176, "head_dim": 16}
    if name == "gptq-4-32-sym":
        write = made.gptq(4, 16, True)
    expected = made.save(tmp_path, write, scheme, **sizes)
    model = load(tmp_path)
    layer = model.get_submodule("model.layers.0.mlp.gate_proj")
    assert type(layer) is nn.Linear
    torch.testing.assert_close(
        layer.weight.float(), expected["model.layers.0.mlp.gate_proj.weight"], rtol=2**-8, atol=0
    )


def test_a_router_that_is_quantized_is_numbers(tmp_path: Path) -> None:
    write, scheme, _ = CASES["int8"]
    expected = made.save(tmp_path, write, scheme, "qwen3_moe", layers=r"(proj|gate|experts\.\d+\.\w+)$")
    gate = load(tmp_path).get_submodule("model.layers.0.mlp.gate").weight
    torch.testing.assert_close(gate.float(), expected["model.layers.0.mlp.gate.weight"], rtol=2**-8, atol=0)


# --- settings


@pytest.mark.parametrize(
    ("name", "quantization", "bits"),
    [
        ("gptq-4-32-sym", "int8", 4),
        ("gptq-8-32-sym", "int8", 8),
        ("fp8-blocks", "int8", 8),
        ("gptq-4-32-sym", "int4", 4),
        ("gptq-8-32-sym", "int4", 4),
        ("fp8-blocks", "int4", 4),
    ],
)
def test_codes_of_more_bits_than_asked_for_are_rounded_again(
    name: str, quantization: str, bits: int, tmp_path: Path
) -> None:
    write, scheme, fmt = CASES[name]
    made.save(tmp_path, write, scheme)
    kept = packed_weights(tmp_path, quantization)
    found = {weight.format for layer, weight in kept.items() if "_proj" in layer}
    assert {one.bits for one in found} == {bits} and kept["lm_head"].format == INT8
    assert not any(one.is_float for one in found)
    if fmt.bits <= bits and not fmt.is_float:
        assert found == {fmt}


@pytest.mark.parametrize("quantization", ["none", "stock"])
def test_without_quantization_transformers_reads_the_checkpoint(quantization: str, tmp_path: Path) -> None:
    for name in ("gptq-4-32-sym", "fp8-blocks"):
        write, scheme, _ = CASES[name]
        made.save(tmp_path / name, write, scheme)
    with pytest.raises(ModelLoadError, match="not installed.*with QUANTIZATION=auto and DTYPE=auto"):
        load(tmp_path / "gptq-4-32-sym", quantization)
    assert logits(load(tmp_path / "fp8-blocks", quantization), step=AttentionRecorder()).isfinite().all()


def test_what_a_checkpoint_left_as_it_was_is_rounded_as_in_plain_ones(tmp_path: Path) -> None:
    write, scheme, fmt = CASES["gptq-4-32-sym"]
    expected = made.save(tmp_path, write, scheme, layers=r"mlp\.\w+_proj$")
    kept = packed_weights(tmp_path)
    assert {weight.format for layer, weight in kept.items() if ".mlp." in layer} == {fmt}
    assert {weight.format for layer, weight in kept.items() if ".mlp." not in layer} == {INT8}
    for layer, weight in kept.items():
        if ".mlp." not in layer:
            assert torch.equal(weight.dequantize(), round_and_pack(whole(expected, layer), INT8).dequantize())


def test_the_layers_of_a_model_that_sees_keep_their_codes(tmp_path: Path) -> None:
    """Their names in files differ from those in the model."""
    write, scheme, fmt = CASES["float-rows"]
    expected = made.save_seeing(tmp_path, write, scheme)
    kept = packed_weights(tmp_path)
    layers = {name: weight for name, weight in kept.items() if "language_model" in name and "_proj" in name}
    assert layers and {weight.format for weight in layers.values()} == {fmt}
    for name, weight in layers.items():
        value = expected[f"{name.replace('model.language_model', 'language_model.model')}.weight"]
        assert ((weight.dequantize() - value).abs() <= 2**-10 * value.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("name", ["input_scale", "activation_scale"])
def test_scales_of_activations_are_left_unread(name: str, tmp_path: Path) -> None:
    write, scheme, _ = CASES["fp8-tensor"]
    made.save(tmp_path, write, scheme)
    made.change(tmp_path, lambda tensors: tensors.update({f"{PROJ}.{name}": torch.ones(1)}))
    load(tmp_path)


def test_the_memory_of_the_files_own_codes_is_known_beforehand(tmp_path: Path) -> None:
    """A little more than they will take; never as much as codes of 8 bits would."""
    for name in ("gptq-4-32-sym", "gptq-4-32-asym", "int8", "fp8-blocks"):
        write, scheme, fmt = CASES[name]
        made.save(tmp_path / name, write, scheme)
        config = check_model(tmp_path / name, "auto", "cpu").config
        with torch.device("meta"):
            empty = tiny_model("qwen3", **made.SIZES).bfloat16()
        packer = Packer(empty, OWN_CODES)
        expected = (
            packer.num_packed_bytes(empty)
            - QuantizedFiles(tmp_path / name, config.quantization_config).num_saved_bytes()
        )
        codes = packed_weights(tmp_path / name)
        others = sum(p.nbytes for n, p in empty.named_parameters() if packer.format_of(n) is None)
        actual = others + sum(part.nbytes for weight in codes.values() for part in weight.parts.values())
        assert actual <= 1.02 * expected and expected <= 1.2 * actual


# --- refusals

PROJ = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "removed", "reason"),
    [
        ("gptq-4-32-sym", ".scales", rf"{PROJ}\.(g_idx|qweight)"),
        ("awq-32", ".qzeros", rf"{PROJ}\.(scales|qweight)"),
        ("int8", ".weight_scale", rf"{PROJ}.weight as I8 without the scales"),
        ("fp8-blocks", ".weight_scale_inv", rf"{PROJ}.weight as F8_E4M3 without the scales"),
    ],
)
def test_a_weight_without_its_scales_is_refused_by_name(name: str, removed: str, reason: str, tmp_path: Path) -> None:
    write, scheme, _ = CASES[name]
    made.save(tmp_path, write, scheme)
    made.change(tmp_path, lambda tensors: tensors.pop(PROJ + removed))
    with pytest.raises(ModelLoadError, match=reason):
        load(tmp_path)


@pytest.mark.parametrize("name", ["gptq-4-32-sym", "awq-32", "int8", "fp8-blocks"])
def test_a_tensor_that_belongs_to_no_weight_is_refused_by_name(name: str, tmp_path: Path) -> None:
    write, scheme, _ = CASES[name]
    made.save(tmp_path, write, scheme)
    made.change(tmp_path, lambda tensors: tensors.update({f"{PROJ}.weight_global_scale": torch.ones(1)}))
    with pytest.raises(ModelLoadError, match="weight_global_scale, which its architecture does not use"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["gptq-4-32-sym", "int8", "fp8-rows"])
def test_a_weight_of_another_size_than_the_configuration_says_is_refused(name: str, tmp_path: Path) -> None:
    write, scheme, _ = CASES[name]
    made.save(tmp_path, write, scheme)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 512}))
    with pytest.raises(ModelLoadError, match=r"config.json says \(.*512.*\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "for one kind of GPU"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "'gemv'.*order gemm"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized.*not read"),
        ({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}}, "rotated"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparse-24-bitmask",
        ),
    ],
)
def test_what_is_not_read_is_refused_in_a_sentence(scheme: Scheme, reason: str, tmp_path: Path) -> None:
    made.save(tmp_path, made.gptq(4, 32, True), scheme)
    with pytest.raises(ModelLoadError, match=reason) as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


def test_experts_in_one_tensor_are_refused_in_a_sentence(tmp_path: Path) -> None:
    made.save(tmp_path, CASES["fp8-blocks"][0], CASES["fp8-blocks"][1], "qwen3_moe", layers="none of them")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    whole = {name: torch.ones(6, 256, 128).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(6, 2, 1)}
    made.change(tmp_path, lambda tensors: tensors.update(whole))
    with pytest.raises(ModelLoadError, match="one tensor.*take a checkpoint with a tensor for each expert"):
        load(tmp_path)


# --- against others' readers


def test_gpt_oss_numbers_are_those_that_transformers_reads() -> None:
    blocks = torch.randint(0, 256, (3, 64, 4, 16), dtype=torch.uint8)
    scales = torch.randint(110, 135, (3, 64, 4), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2).flatten(0, 1)
    weight = mxfp4.read(blocks.flatten(0, 1).flatten(1), scales.flatten(0, 1))
    codes = weight.codes_for_kernels()
    assert codes is not None and torch.equal(codes.dequantize(), expected)
    assert torch.equal(weight.dequantize(torch.float32), expected)


def test_a_row_of_zeros_is_zero(tmp_path: Path) -> None:
    """Quantizers write a scale of zero for it, or any other."""
    write, scheme, _ = CASES["gptq-4-32-sym"]

    def dead(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        weight[3] = 0
        tensors, value = write(weight)
        tensors[".scales"][:, 3] = 0
        return tensors, value

    made.save(tmp_path, dead, scheme)
    for name, weight in packed_weights(tmp_path).items():
        assert weight.dequantize().isfinite().all() and ("_proj" not in name or not weight.dequantize()[3].any())
