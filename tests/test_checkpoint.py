"""Properties of checkpoint.py: what is refused at once, and that conversions are kept and used again."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_sources import ignore, left_over
from gguf_files import write_tiny_gguf
from process import ROOT

from checkpoints import checkpoint, demo_models
from errors import ModelLoadError


def directory_with(path: Path, *names: str) -> str:
    path.mkdir()
    for name in names:
        (path / name).write_text("{}")
    return str(path)


@pytest.mark.parametrize(
    ("model_path", "name"),
    [
        ("~/llms/Qwen3-0.6B/", "Qwen3-0.6B"),
        ("google/gemma-3-27b-it", "gemma-3-27b-it"),
        ("/x/foo.gguf", "foo"),
        ("foo.Q4_K_M.GGUF", "foo.Q4_K_M"),
        ("demo:gemma-3-270m", "gemma-3-270m"),
        (".", Path.cwd().name),
    ],
)
def test_served_name_is_the_base_name(model_path: str, name: str) -> None:
    assert checkpoint.served_name(model_path) == name


def test_default_is_a_model_that_passes_the_check() -> None:
    assert checkpoint.DEFAULT_DEMO in demo_models.DEMO_MODELS
    checkpoint.check(checkpoint.default_model_path())


@pytest.mark.parametrize("model_path", ["google/gemma-3-27b-it", "org/name_with.dots-1", *demo_models.DEMO_MODELS])
def test_names_that_may_be_fetched_pass_the_check(model_path: str) -> None:
    checkpoint.check(model_path)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["model.safetensors"], "no config.json"),
        (["x.gguf"], "name one of its .gguf files"),
        (["config.json"], "has no .*safetensors weights"),
        (["config.json", "pytorch_model.bin"], "can run code .* convert"),
        (["config.json", "model.pt"], "can run code .* convert"),
        (["config.json", "model.safetensors", "model.safetensors.index.json"], "not a valid index"),
    ],
)
def test_unusable_directory_is_refused_in_one_sentence(tmp_path: Path, names: list[str], reason: str) -> None:
    model = directory_with(tmp_path / "model", *names)
    with pytest.raises(ModelLoadError, match=reason) as raised:
        checkpoint.check(model)
    assert "\n" not in str(raised.value) and model in str(raised.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x.gguf", "not a GGUF"), ("x.bin", "can run code"), ("x.pt", "can run code"), ("x.safetensors", "neither")],
)
def test_unusable_file_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps("weights"))
    with pytest.raises(ModelLoadError, match=reason):
        checkpoint.check(str(tmp_path / name))


@pytest.mark.parametrize(
    "model_path", ["/no/such", "./no/such", "../no/such", "~/no-such/x", "name", "no/x.gguf", "a/b/c", ""]
)
def test_what_can_only_be_a_path_must_exist(model_path: str) -> None:
    with pytest.raises(ModelLoadError, match="does not exist|no config.json"):
        checkpoint.check(model_path)


def test_unknown_demo_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ModelLoadError, match=re.escape(checkpoint.DEFAULT_DEMO)):
        checkpoint.check("demo:nope")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    model = directory_with(tmp_path / "model", "config.json", "a.safetensors")
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match="b.safetensors"):
        checkpoint.check(model)


def test_local_directory_is_used_where_it_is(tmp_path: Path) -> None:
    model = directory_with(tmp_path / "model", "config.json", "model.safetensors")
    assert checkpoint.fetch(model, tmp_path / "cache", ignore).directory == Path(model)
    assert not (tmp_path / "cache").exists()


def test_gguf_is_converted_once_and_keeps_weights_template_and_end_of_sequence(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = write_tiny_gguf(tmp_path / "tiny.gguf")
    reports: list[tuple[str, float]] = []
    directory = checkpoint.fetch(
        str(tmp_path / "tiny.gguf"), tmp_path / "cache", lambda *report: reports.append(report)
    ).directory
    assert reports[0] == ("converting tiny.gguf", 0.0) and reports[-1] == ("converting tiny.gguf", 1.0)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    for name, ours in [
        ("token_embd", model.model.embed_tokens),
        ("blk.1.ffn_down", model.model.layers[1].mlp.down_proj),
    ]:
        assert torch.equal(ours.weight, torch.tensor(weights[f"{name}.weight"]).bfloat16())
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tokenizer.decode(tokenizer.encode("grüße")) == "grüße"
    assert "<|im_start|>" in tokenizer.chat_template
    eos_token_ids = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    assert eos_token_ids == [258, 260]  # `<|im_end|>`, too

    reports.clear()
    checkpoint.fetch(str(tmp_path / "tiny.gguf"), tmp_path / "cache", lambda *report: reports.append(report))
    assert reports == []


def test_what_other_versions_converted_is_removed_at_every_start_once_nobody_uses_it(tmp_path: Path) -> None:
    demo = demo_models.DEMO_MODELS["demo:smollm2-135m"]
    stem = tmp_path / "safetensors" / f"smollm2-135m-{demo.sha256[:16]}"
    own, fresh, unused = (Path(f"{stem}-{version}") for version in (checkpoint.converter_version(), "v1", "v0"))
    for directory in (own, fresh, unused, Path(f"{unused}.0123.tmp")):
        directory.mkdir(parents=True)
    locks = [Path(f"{path}.lock") for path in (own, fresh, unused, Path(f"{stem}-vgone"), Path(f"{stem}-vmaking"))]
    for lock in locks:
        lock.touch()
    for path in (unused, *tmp_path.rglob("*.tmp"), *locks[:-1]):
        os.utime(path, (0, 0))
    assert checkpoint.fetch("demo:smollm2-135m", tmp_path, ignore).directory == own
    assert {*stem.parent.iterdir()} == {own, locks[0], fresh, locks[1], locks[-1]}


def test_gguf_that_cannot_be_converted_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 and then no more")
    with pytest.raises(ModelLoadError, match="cut.gguf could not be converted") as raised:
        checkpoint.fetch(str(tmp_path / "cut.gguf"), tmp_path / "cache", ignore)
    assert "\n" not in str(raised.value) and left_over(tmp_path / "cache") == []


def test_import_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'httpx2', 'gguf', 'numpy'}"
    script = f"import sys, checkpoints.checkpoint; assert not {heavy} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
