"""Checkpoints whose files are missing, contradict each other or say odd things are refused, or read rightly."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import byte_tokenizer, save_tiny_checkpoint
from odd_checkpoints import Tensors, edit, ignore, save
from safetensors.torch import load_file, save_file

from checkpoints import checkpoint
from checkpoints.progress import Progress
from config import Settings
from engine.checked_model import check_model
from engine.model_loader import load_model
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence
from errors import ModelLoadError
from serving.loading import LoadedModel, load, load_template, sampling_defaults

# --- files


def split(directory: Path, index: dict[str, Any] | None, extra: Callable[[Path, Tensors], object]) -> Path:
    """In two files; index: what it has beside the places."""
    save_tiny_checkpoint(directory)
    tensors = load_file(directory / "model.safetensors")
    os.remove(directory / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, directory / file, {"format": "pt"})
    if index is not None:
        places = {name: file for file, own in parts.items() for name in own}
        (directory / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": places}))
    extra(directory, tensors)
    return directory


def consolidated(directory: Path, tensors: Tensors) -> None:
    """The same weights in Mistral's own format, with names that transformers does not know."""
    renamed = {f"consolidated.{name}": torch.full_like(value, torch.nan) for name, value in tensors.items()}
    save_file(renamed, directory / "consolidated.safetensors", {"format": "pt"})


def repeated(directory: Path, tensors: Tensors) -> None:
    first = directory / "model-00001-of-00002.safetensors"
    names = [*load_file(first), sorted(tensors)[1]]
    save_file({name: tensors[name] * 2 for name in names}, first, {"format": "pt"})


def test_a_second_copy_in_another_format_is_not_read(tmp_path: Path) -> None:
    load_model(check_model(split(tmp_path, {"metadata": {}}, consolidated), "float32", "cpu"), ignore)


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="The tensor .* is in two files, .*model-00001"):
        check_model(split(tmp_path, {"metadata": {}}, repeated), "float32", "cpu")


@pytest.mark.parametrize(
    ("index", "reason"),
    [(None, "neither model.safetensors nor model.safetensors.index.json"), ({}, 'index.json has no "metadata"')],
)
def test_parts_without_a_whole_index_are_refused_with_its_name(
    index: dict[str, Any] | None, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        check_model(split(tmp_path, index, lambda directory, tensors: None), "float32", "cpu")


def test_a_head_of_its_own_is_kept_where_the_configuration_says_tied(tmp_path: Path) -> None:
    """What the files say goes before what the configuration says."""
    directory = save(tmp_path, lambda tensors: None, {"tie_word_embeddings": True})
    model = load_model(check_model(directory, "float32", "cpu"), ignore)
    head = load_file(directory / "model.safetensors")["lm_head.weight"]
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert not torch.equal(model.get_input_embeddings().weight, head)


def test_a_missing_head_is_refused_unless_it_is_tied(tmp_path: Path) -> None:
    directory = save(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ModelLoadError, match="lacks the tensor lm_head.weight"):
        load_model(check_model(directory, "float32", "cpu"), ignore)
    edit(directory, tie_word_embeddings=True)
    model = load_model(check_model(directory, "float32", "cpu"), ignore)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("has_config", [True, False])
def test_an_adapter_is_named(has_config: bool, tmp_path: Path) -> None:
    save_tiny_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B", "r": 8}')
    checkpoint.check(str(tmp_path))  # a description alone changes nothing
    os.rename(tmp_path / "model.safetensors", tmp_path / "adapter_model.safetensors")
    if has_config:
        shutil.copy(tmp_path / "adapter_model.safetensors", tmp_path / "model.safetensors")
    else:
        os.remove(tmp_path / "config.json")
    reason = "adapter .* beside the model" if has_config else "an adapter for Qwen/Qwen3-8B, not a model: name"
    with pytest.raises(ModelLoadError, match=reason):
        checkpoint.check(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "reason"), [("tokenizer.model", "has only tokenizer.model"), (None, "has no vocabulary")]
)
def test_a_vocabulary_that_is_not_read_here_is_named(file: str | None, reason: str, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    os.remove(tmp_path / "tokenizer.json")
    if file:
        (tmp_path / file).write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(ModelLoadError, match=f"{reason}, and this server needs tokenizer.json"):
        load_template(tmp_path, "llama")


@pytest.mark.parametrize("told", [{}, {"0": {"content": "!"}}])
@pytest.mark.parametrize("content", ["{", "[", ""])
def test_a_broken_list_of_added_tokens_is_refused_in_a_sentence(
    told: dict[str, Any], content: str, tmp_path: Path
) -> None:
    """Where another file tells of added tokens, transformers does not read this one."""
    byte_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "added_tokens_decoder": told}))
    (tmp_path / "added_tokens.json").write_text(content)
    with pytest.raises(ModelLoadError, match="The tokenizer in .* cannot be loaded: ") as raised:
        load_template(tmp_path, "llama")
    assert "\n" not in str(raised.value)


def test_ids_beyond_the_vocabulary_are_never_chosen(tmp_path: Path) -> None:
    """Output layers are padded to round sizes, and what is trained nowhere can be the largest logit."""
    num_tokens = len(byte_tokenizer())
    save(tmp_path, pad_output, {"vocab_size": num_tokens + 13})
    loaded = load(str(tmp_path), Settings(cache_dir=tmp_path, dtype="float32"), Progress())
    sequence = Sequence([5, 6, 7], SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True), on_output=print)
    loaded.engine.scheduler.add(sequence)
    while loaded.engine.scheduler.has_work:
        loaded.engine.step()
    assert len(sequence.output_ids) == 30 and max(sequence.output_ids) < num_tokens


def pad_output(tensors: Tensors) -> None:
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], 50 * torch.randn(13, tensors[name].shape[1])])


# --- generation_config.json


def started(directory: Path, text: str | None, config: dict[str, Any]) -> LoadedModel:
    save(directory, lambda tensors: None, config)
    os.remove(directory / "generation_config.json")
    if text is not None:
        (directory / "generation_config.json").write_text(text)
    return load(str(directory), Settings(cache_dir=directory, dtype="float32"), Progress())


@pytest.mark.parametrize(
    ("text", "config", "expected"),
    [
        (None, {"eos_token_id": [100, 101]}, {100, 101}),
        ('{"temperature": 0.5}', {"eos_token_id": 100}, {100}),
        ('{"eos_token_id": [100, 101]}', {"eos_token_id": 102}, {100, 101}),
        ('{"eos_token_id": -1}', {}, set()),
        ('{"eos_token_id": [100, null]}', {}, {100}),
    ],
)
def test_the_tokens_that_end_an_answer_are_found_wherever_they_are_said(
    text: str | None, config: dict[str, Any], expected: set[int], tmp_path: Path
) -> None:
    loaded = started(tmp_path, text, config)
    assert loaded.engine.scheduler.eos_token_ids - {loaded.template.tokenizer.eos_token_id} == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "not a JSON object"), ("[]", "not a JSON object"), ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>'")],
)
def test_a_generation_config_that_cannot_be_read_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=reason):
        started(tmp_path, text, {})


def test_recommendations_out_of_range_are_not_followed(caplog: pytest.LogCaptureFixture) -> None:
    odd = {"temperature": "0.6", "top_p": 1.5, "top_k": -1, "min_p": 2, "repetition_penalty": 0, "num_beams": 4}
    assert sampling_defaults(SimpleNamespace(**odd)) == {"temperature": 0.7, "top_p": 1.0, "top_k": 0}
    assert "min_p" in caplog.text and "num_beams" in caplog.text
