"""Each key of a GGUF file is honoured, without effect, or refused by its name."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy
import pytest
from gguf_twins import (
    FIRST,
    LLAMA,
    LLAMA_,
    PHI3,
    PHI3_,
    TWINS,
    YARN,
    Twin,
    converted,
    factors,
    refusal,
    twin,
)

from checkpoints import (
    gguf_architectures,
    gguf_header,
    gguf_metadata,
    gguf_tokenizer,
)
from errors import ModelLoadError


def all_keys() -> list[str]:
    """The ends of all keys that llama.cpp knows for an architecture."""
    groups = [gguf.constants.Keys]
    found = []
    while groups:
        for value in vars(groups.pop()).values():
            if isinstance(value, type):
                groups.append(value)
            elif isinstance(value, str) and value.startswith("{arch}."):
                found.append(value.removeprefix("{arch}."))
    return found


@pytest.mark.parametrize("architecture", gguf_architectures.ARCHITECTURES)
def test_no_key_is_dropped(architecture: str, tmp_path: Path) -> None:
    """Of all that llama.cpp knows: one with another value is refused, or it is in the configuration."""
    path = tmp_path / "tiny.gguf"
    TWINS[FIRST[architecture]].write(path)
    header = gguf_header.read(path)
    usual = gguf_metadata.attributes(header, {})
    names = {*all_keys(), "rope.scale_linear", "never.heard.of"} - gguf_metadata.NO_EFFECT
    for name in sorted(names):
        key = f"{architecture}.{name}"
        said = header.values.get(key)
        value = said + 1 if isinstance(said, int | float) else 5
        values = {**header.values, key: value}
        if name in ("rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast"):
            values |= {f"{architecture}.{k}": v for k, v in YARN.items() if k != name}
        try:
            found = gguf_metadata.attributes(gguf_header.Header(False, values, header.tensors), {})
        except ValueError as refusal:
            assert architecture in str(refusal), key
        else:
            assert found != usual or name in WITHOUT_SCALING | OTHER_EFFECTS.get(architecture, set()), key


WITHOUT_SCALING = {"rope.scaling.yarn_beta_slow", "rope.scaling.yarn_log_multiplier"}  # which say how to scale
OTHER_EFFECTS = {  # honoured from elsewhere, or not at all by llama.cpp
    "gpt2": {"rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast"},
    **dict.fromkeys(("qwen3moe", "qwen2moe", "minimax-m2"), {"feed_forward_length"}),  # the shapes of the experts
}


def attributes(name: str, path: Path, **keys: Any) -> dict[str, Any]:
    """Those of a twin with other keys of its architecture; `__` is a point."""
    own = {key.replace("__", "."): value for key, value in keys.items()}
    tokenizer = {key: value for key, value in own.items() if key.startswith("tokenizer.")}
    values = {key: value for key, value in own.items() if key not in tokenizer}
    dataclasses.replace(TWINS[name], keys={**TWINS[name].keys, **values}).write(
        path, tokenizer={**gguf_files.TOKENIZER, **tokenizer}
    )
    header = gguf_header.read(path)
    gguf_tokenizer.check(header)
    return gguf_metadata.attributes(header, {})


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"embedding_length_out": 64}),
        ("llama", {"interleave_moe_layer_step": 0}),
        ("llama", {"rope__scaling__type": "none", "rope__scaling__yarn_beta_fast": 16.0}),
        ("llama, linear", {"rope__scaling__yarn_beta_slow": 2.0}),
        ("llama", {"tokenizer__ggml__add_padding_token": False, "tokenizer__ggml__add_unknown_token": True}),
        ("llama", {"tokenizer__huggingface__json": "{}"}),
    ],
)
def test_keys_without_effect_are_accepted(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    assert attributes(name, tmp_path / "with.gguf", **keys) == attributes(name, tmp_path / "without.gguf")


def test_ollamas_names_for_the_bases_say_the_same(tmp_path: Path) -> None:
    theirs = {"rope__freq_base": None, "rope__freq_base_swa": None}
    theirs |= {"rope__global__freq_base": 3e6, "rope__local__freq_base": 3e4}
    expected = attributes("gemma3, bases", tmp_path / "llama_cpp.gguf")
    assert attributes("gemma3, bases", tmp_path / "ollama.gguf", **theirs) == expected
    with pytest.raises(ValueError, match=r"rope\.local\.freq_base is 20000\.0.*beside rope\.freq_base_swa"):
        attributes("gemma3, bases", tmp_path / "both.gguf", rope__local__freq_base=2e4)


def test_gemma_3_without_an_epsilon_has_ollamas(tmp_path: Path) -> None:
    found = attributes("gemma3", tmp_path / "tiny.gguf", attention__layer_norm_rms_epsilon=None)
    assert found["rms_norm_eps"] == 1e-6


def test_a_list_of_tokens_that_end_a_turn_is_honoured(tmp_path: Path) -> None:
    end = gguf_files.VOCAB - 1
    found = attributes("llama", tmp_path / "tiny.gguf", tokenizer__ggml__eos_token_ids=[end, end - 1])
    assert found["eos_token_id"] == [end, end - 1, end - 2]  # the last one is <|endoftext|>


@pytest.mark.parametrize("name", FIRST.values())
def test_a_tensor_that_nothing_takes_is_refused_by_its_name(name: str, tmp_path: Path) -> None:
    twin = TWINS[name]
    extra = {"blk.0.attn_q_extra.weight": factors([1.0] * 8)}
    Twin(twin.architecture, twin.model_type, twin.config, twin.keys, extra).write(tmp_path / "tiny.gguf")
    with pytest.raises(ModelLoadError, match=r"blk\.0\.attn_q_extra\.weight"):
        converted(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"attention.scale": 0.5}, "llama.attention.scale is 0.5"),
        ({"logit_scale": 0.125}, "llama.logit_scale is 0.125"),
        ({"expert_count": 8, "expert_used_count": 2}, "llama.expert_count is 8"),
        ({"attention.sliding_window": 32}, "llama.attention.sliding_window is 32"),
        ({"attention.causal": False}, "llama.attention.causal is False"),
        ({"rope.scaling.type": "quadratic", "rope.scaling.factor": 2.0}, "llama.rope.scaling.type is quadratic"),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count is 8"),
        ({"attention.head_count": [4, 2]}, "llama.attention.head_count is not one number for all layers"),
        ({"attention.head_count": [4, 4]}, "llama.attention.head_count is [4, 4, ...]"),
        ({"attention.head_count_kv": [2, 2]}, "llama.attention.head_count_kv is [2, 2, ...]"),
        ({"something.new": 1}, "llama.something.new is 1"),
        ({"context_length": math.inf}, "llama.context_length is inf"),
        ({"context_length": math.nan}, "llama.context_length is nan"),
        ({"rope.freq_base": math.nan}, "llama.rope.freq_base is nan"),
        ({"rope.freq_base": 0.0}, "llama.rope.freq_base is 0.0"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": -8.0}, "llama.rope.scaling.factor is -8.0"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "llama.attention.layer_norm_rms_epsilon is -1.0"),
        ({"embedding_length_out": 32}, "llama.embedding_length_out is 32"),
        ({"interleave_moe_layer_step": 2}, "llama.interleave_moe_layer_step is 2"),
        ({"attention.layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon is missing"),
        ({"general.type": "adapter"}, "LoRA adapter"),
        ({"adapter.type": "lora"}, "LoRA adapter"),
        ({"general.type": "mmproj"}, "name the file of its text model"),
        ({"general.type": "imatrix"}, "importance matrix"),
        ({"general.type": "lens"}, "general.type is lens"),
        ({"split.count": 3, "split.no": 0}, "one of 3 parts of a model"),
        ({"tokenizer.ggml.model": "none"}, "it has no tokenizer"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model is rwkv"),
        ({"tokenizer.ggml.something": 1}, "tokenizer.ggml.something is not supported"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_name(keys: dict[str, Any], reason: str, tmp_path: Path) -> None:
    own = {key: value for key, value in keys.items() if key.startswith("tokenizer.")}
    twin(LLAMA_, LLAMA, None, {key: value for key, value in keys.items() if key not in own}).write(
        tmp_path / "tiny.gguf", tokenizer={**gguf_files.TOKENIZER, **own}
    )
    assert reason in refusal(tmp_path / "tiny.gguf")


def test_a_long_context_without_its_factors_is_refused(tmp_path: Path) -> None:
    twin(PHI3_, PHI3, None, {"rope.scaling.original_context_length": 64}).write(tmp_path / "tiny.gguf")
    assert "it lacks the tensors rope_factors_long.weight" in refusal(tmp_path / "tiny.gguf")


def test_an_unknown_architecture_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "x.gguf", "mamba", {}, {"token_embd.weight": factors([1.0])})
    assert "its architecture is mamba; the supported ones are llama" in refusal(tmp_path / "x.gguf")


def test_a_file_in_the_other_order_of_bytes_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("token_embd.weight", factors([1.0] * 64))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "it is big-endian" in refusal(tmp_path / "x.gguf")


def test_a_type_of_tensor_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": numpy.ones(8, dtype=numpy.float64)}
    twin(LLAMA_, LLAMA, None, None, tensors).write(tmp_path / "tiny.gguf")
    with pytest.raises(ValueError, match=r"rope_freqs\.weight has the type F64"):
        converted(tmp_path / "tiny.gguf")
