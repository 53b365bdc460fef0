"""GGUF files compute what the models do that they were made of, or are refused by the name of what cannot be read."""

import dataclasses
import itertools
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from gguf_twins import (
    FIRST,
    KEYS,
    LLAMA,
    LLAMA_,
    LLAMA_TWIN,
    TWINS,
    converted,
    difference,
    refusal,
    twin,
)
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from checkpoints import (
    checkpoint,
    conversion,
    gguf_header,
    gguf_parts,
)
from engine.checked_model import check_model
from engine.cpu import gguf_blocks, packed_checkpoint
from engine.cpu.packed_experts import PackedExperts
from engine.cpu.packed_weight import PackedWeight
from engine.layer_probe import probe_layers
from engine.model_loader import load_model


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", TWINS)
def test_a_gguf_file_computes_what_its_model_does(name: str, tmp_path: Path) -> None:
    model = TWINS[name].write(tmp_path / "tiny.gguf")
    assert difference(model, converted(tmp_path / "tiny.gguf")) < 1e-3


@pytest.mark.parametrize("name", FIRST.values())
def test_each_architecture_is_served(name: str, tmp_path: Path) -> None:
    """All its layers attend through the engine, with the file's own blocks where they are kept."""
    TWINS[name].write(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    conversion.convert([tmp_path / "tiny.gguf"], tmp_path / "tiny", lambda fraction: None)
    model = load_model(check_model(tmp_path / "tiny", "auto", "cpu"), lambda what, fraction: None, "auto")
    specs = probe_layers(model)
    assert len({*specs.attention, *specs.recurrent}) == model.config.num_hidden_layers


# --- types of tensors


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_types_of_tensors_are_read(kind: str, tmp_path: Path) -> None:
    """Rounded as the type rounds, and not more."""
    model = LLAMA_TWIN.write(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType[kind])
    bound = {"F16": 1e-3, "BF16": 1e-3, "Q8_0": 3.0, "Q4_0": 30.0}[kind]
    assert difference(model, converted(tmp_path / "tiny.gguf"), 20) < bound


QWEN2_LAYERS = {  # of transformers -> of GGUF files
    "self_attn.q_proj": "attn_q",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
}


def as_packed(path: Path) -> dict[str, PackedWeight]:
    """Returns the weights with which the model in a converted directory computes, by the names of its layers."""
    conversion.convert([path], path.with_suffix(""), lambda fraction: None)
    checked = check_model(path.with_suffix(""), "auto", "cpu")
    assert load_model(checked, lambda phase, fraction: None, "auto")
    return packed_checkpoint.weights(path.with_suffix("") / packed_checkpoint.FILE)[0]


def wide(kind: str, path: Path, is_rounded: bool = True, parts: int = 0) -> dict[str, torch.Tensor]:
    """Writes a model whose rows are whole super-blocks; returns its matrices as the library of llama.cpp reads them."""
    config = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    keys = {"embedding_length": 256, "feed_forward_length": 512}
    small = TWINS["qwen2"]
    twin = dataclasses.replace(small, config=small.config | config, keys=small.keys | keys, is_rounded=is_rounded)
    twin.write(path, kind=gguf.GGMLQuantizationType[kind], parts=parts)
    paths = sorted(path.parent.glob(f"{path.stem}-*-of-*")) if parts else [path]
    tensors = [tensor for each in paths for tensor in gguf.GGUFReader(each).tensors if len(tensor.shape) == 2]
    return {t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()) for t in tensors}


@pytest.mark.parametrize("kind", gguf_blocks.BLOCK_BYTES)
def test_layers_keep_the_blocks_of_each_type(kind: str, tmp_path: Path) -> None:
    expected = wide(kind, tmp_path / "tiny.gguf")
    packed = as_packed(tmp_path / "tiny.gguf")
    assert torch.equal(packed["lm_head"].dequantize(), expected["output.weight"])
    for layer, name in itertools.product(range(2), QWEN2_LAYERS):
        weight = packed[f"model.layers.{layer}.{name}"]
        assert torch.equal(weight.dequantize(), expected[f"blk.{layer}.{QWEN2_LAYERS[name]}.weight"])


@pytest.mark.parametrize("kind", gguf_blocks.FLOATS)
def test_floats_keep_their_precision(kind: str, tmp_path: Path) -> None:
    """Weights that bfloat16 would round stay in float16 or float32; all others are in bfloat16."""
    is_rounded = kind == "BF16"
    expected = wide(kind, tmp_path / "tiny.gguf", is_rounded)
    packed = as_packed(tmp_path / "tiny.gguf")
    assert {weight.format.dtype for weight in packed.values()} == (set() if is_rounded else {gguf_blocks.FLOATS[kind]})
    for layer, name in itertools.product(range(2), [] if is_rounded else QWEN2_LAYERS):
        weight = packed[f"model.layers.{layer}.{name}"]
        assert torch.equal(weight.dequantize(), expected[f"blk.{layer}.{QWEN2_LAYERS[name]}.weight"])


# --- parts


def write_parts(path: Path) -> list[Path]:
    """As gguf-split does."""
    LLAMA_TWIN.write(path, parts=8)
    path.unlink(missing_ok=True)
    return sorted(path.parent.glob("*-of-*.gguf"))


@pytest.mark.parametrize("number", [0, 2])
def test_any_part_stands_for_all(number: int, tmp_path: Path) -> None:
    paths = write_parts(tmp_path / "tiny.gguf")
    assert len(paths) == 3
    found = gguf_parts.parts(paths[number])
    assert found == paths and gguf_parts.stem(paths[number].name) == "tiny"
    conversion.convert(found, tmp_path / "converted", lambda fraction: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", dtype=torch.float32)
    assert difference(LLAMA_TWIN.model(), model) < 1e-3
    assert not list((tmp_path / "converted").glob("*.gguf"))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q2_K", "IQ4_XS", "Q8_0"])
def test_parts_of_all_types_are_joined_as_they_are(kind: str, tmp_path: Path) -> None:
    wide(kind, tmp_path / "tiny.gguf", parts=8)
    wide(kind, tmp_path / "whole.gguf")
    gguf_parts.merge(gguf_parts.parts(tmp_path / "tiny-00002-of-00004.gguf"), tmp_path / "merged.gguf")
    merged, whole = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("merged", "whole"))
    for one, other in zip(merged, whole, strict=True):
        assert (one.name, one.tensor_type, [*one.shape]) == (other.name, other.tensor_type, [*other.shape])
        assert (one.data == other.data).all()


def test_an_empty_list_among_the_keys_of_parts_is_left_out(tmp_path: Path) -> None:
    """gguf's writer refuses it, so a list of one item loses it in the file, to the description after it."""
    keys = {"general.tags": [7], "general.description": "abcd"}
    dataclasses.replace(LLAMA_TWIN, keys={**LLAMA_TWIN.keys, **keys}).write(tmp_path / "tiny.gguf", parts=8)
    paths = sorted(tmp_path.glob("*-of-*.gguf"))
    content = paths[0].read_bytes()
    for key, old, new in (
        (b"tags", struct.pack("<IIQi", 9, 5, 1, 7), struct.pack("<IIQ", 9, 5, 0)),
        (b"description", struct.pack("<IQ", 8, 4) + b"abcd", struct.pack("<IQ", 8, 8) + b"abcdabcd"),
    ):
        assert content.count(key + old) == 1
        content = content.replace(key + old, key + new)
    paths[0].write_bytes(content)
    gguf_parts.merge(paths, tmp_path / "whole.gguf")
    merged, whole = gguf_header.read(tmp_path / "whole.gguf"), gguf_parts.read(paths)
    assert merged.tensors == whole.tensors
    assert merged.values["general.description"] == "abcdabcd" and "general.tags" not in merged.values


def test_parts_that_are_missing_are_named(tmp_path: Path) -> None:
    paths = write_parts(tmp_path / "tiny.gguf")
    paths[1].unlink()
    said = refusal(paths[0])
    assert "is one of 3 parts of a model: put the missing ones (1) into its directory: tiny-00002-of-00003.gguf" in said


# --- converted directories


def test_a_list_of_equal_numbers_for_the_layers_is_that_number(tmp_path: Path) -> None:
    number = KEYS["feed_forward_length"]
    twin(LLAMA_, LLAMA, None, {"feed_forward_length": [number, number]}).write(tmp_path / "tiny.gguf")
    conversion.convert([tmp_path / "tiny.gguf"], tmp_path / "tiny", lambda fraction: None)
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["intermediate_size"] == number


@pytest.mark.slow
def test_what_an_older_converter_made_is_made_again_and_removed_once_nobody_uses_it(tmp_path: Path) -> None:
    LLAMA_TWIN.write(tmp_path / "tiny.gguf")
    path, cache = str(tmp_path / "tiny.gguf"), tmp_path / "cache"
    directory = checkpoint.fetch(path, cache, lambda what, fraction: None).directory
    old = directory.with_name(directory.name.rpartition("-")[0] + "-v2")
    fresh = directory.with_name(directory.name.rpartition("-")[0] + "-v3")
    other = directory.with_name("tiny-0123456789abcdef-v2")
    directory.rename(old)
    for made in (fresh, other):
        made.mkdir()
    for unused in (old, other):
        os.utime(unused, (0, 0))
    assert checkpoint.fetch(path, cache, lambda what, fraction: None).directory == directory
    assert directory.exists() and fresh.exists() and other.exists() and not old.exists()


def test_the_converters_version_is_that_of_all_that_converts() -> None:
    """Else a directory that an older one wrote would be used after an update."""
    root = conversion.ROOT
    script = (
        "import sys, json;"
        "from checkpoints import conversion;"
        "sys.argv = ['', '', ''];"
        "from engine.cpu import packed_checkpoint;"
        "print(json.dumps([m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)]))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    loaded = {Path(file) for file in json.loads(run.stdout)}
    own = {str(path.relative_to(root)) for path in loaded if path.is_relative_to(root) and ".venv" not in path.parts}
    assert own - set(conversion.SOURCES) <= NOT_CONVERTING
    assert re.fullmatch("v[0-9a-f]{8}", conversion.converter_version())


NOT_CONVERTING = {  # imported by what converts, without a say in what is written
    *("errors.py", "checkpoints/__init__.py", "checkpoints/atomic_files.py", "engine/__init__.py", "engine/threads.py"),
    *("engine/memory.py", "engine/quantization.py", "engine/report.py"),
    *("engine/cpu/__init__.py", "engine/cpu/packed_layers.py", "engine/cpu/kernels.py", "engine/cpu/amx.py"),
    *("engine/cpu/activations.py", "engine/cpu/products.py", "engine/cpu/packing.py", "engine/cpu/packed_experts.py"),
    *("engine/cpu/low_rank.py", "engine/lora/__init__.py", "engine/lora/adapter.py"),
    *("engine/lora/adapter_config.py", "engine/lora/updates.py"),
}


def test_layers_whose_columns_are_reordered_are_packed_too(tmp_path: Path) -> None:
    """Qwen 3.5's heads of values are in another order in a file: rows are found there, columns are rounded anew."""
    TWINS["qwen35"].write(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    conversion.convert([tmp_path / "tiny.gguf"], tmp_path / "tiny", lambda fraction: None)
    with safe_open(tmp_path / "tiny" / packed_checkpoint.FILE, "pt") as file:
        packed = json.loads(file.metadata()["layers"])
    layers = ("in_proj_qkv", "in_proj_z", "out_proj")
    assert {f"model.layers.{n}.linear_attn.{layer}" for n in range(3) for layer in layers} <= packed.keys()


@pytest.mark.parametrize("name", ["qwen3moe", "qwen35moe"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_experts_keep_the_blocks_of_their_file(name: str, kind: str, tmp_path: Path) -> None:
    twin, path = TWINS[name], tmp_path / "tiny.gguf"
    larger = dataclasses.replace(
        twin,
        config={**twin.config, "moe_intermediate_size": 64},
        keys={**twin.keys, "expert_feed_forward_length": 64},
    )
    larger.write(path, kind=gguf.GGMLQuantizationType[kind])
    dequantized = converted(path)
    model = load_model(check_model(tmp_path / "tiny", "auto", "cpu"), lambda phase, fraction: None, "auto")
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedExperts)}
    assert len(packed) == dequantized.config.num_hidden_layers
    for path_, experts in packed.items():
        for part, weight in experts.packed.items():
            assert weight.format.bits == (8 if kind == "Q8_0" else 4)
            expected = dequantized.get_parameter(f"{path_}.{part}").flatten(0, 1)
            assert torch.equal(weight.dequantize().bfloat16().float(), expected)
