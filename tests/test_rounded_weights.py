import os
import time
from pathlib import Path

import pytest
import torch
from models import FAMILIES, tiny_model
from transformers import PreTrainedModel

from engine.attention.paged import AttentionRecorder
from engine.checked_model import check_model
from engine.cpu import kernels
from engine.cpu.packed_checkpoint import MAPPED_BYTES
from engine.model_loader import load_model
from engine.rounded_files import FOLDER
from engine.rounded_weights import MAX_UNUSED

pytestmark = pytest.mark.skipif(not kernels.are_available(), reason="needs torch with GNU's OpenMP")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


def save(directory: Path, family: str = "qwen2", **changes: object) -> Path:
    tiny_model(family, **{**SIZES, **changes}).save_pretrained(directory)
    return directory


def load(directory: Path, cache_dir: Path, phases: list[str], quantization: str = "int8") -> PreTrainedModel:
    checked = check_model(directory, "float32", "cpu")
    return load_model(checked, lambda phase, fraction: phases.append(phase), quantization, cache_dir)


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[5, 6, 7, 8]]), use_cache=False, step=AttentionRecorder()).logits


def files(cache_dir: Path) -> list[Path]:
    return sorted((cache_dir / FOLDER).iterdir())


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_second_start_reads_what_the_first_has_rounded(
    family: str, tied: bool, quantization: str, tmp_path: Path
) -> None:
    directory, phases = save(tmp_path / "model", family, tie_word_embeddings=tied), list[str]()
    first = load(directory, tmp_path, phases, quantization)
    assert "quantizing weights" in phases
    phases.clear()
    second = load(directory, tmp_path, phases, quantization)
    assert "quantizing weights" not in phases
    assert torch.equal(logits_of(second), logits_of(first))
    assert {type(m).__name__ for m in second.modules()} == {type(m).__name__ for m in first.modules()}
    assert second.generation_config.to_dict() == first.generation_config.to_dict()
    assert not second.training and len(files(tmp_path)) == 1


def test_a_large_table_stays_in_the_file(tmp_path: Path) -> None:
    """The embeddings that Gemma 4 has for each layer are larger than all else, and few of them are read."""
    rows = 2 * MAPPED_BYTES // (4 * 6 * 8)
    directory = save(tmp_path / "model", "gemma4", vocab_size_per_layer_input=rows)
    load(directory, tmp_path, [])
    model = load(directory, tmp_path, [])
    address = model.get_submodule("model.embed_tokens_per_layer").weight.data_ptr()
    (kept,) = files(tmp_path)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(kept))]
    ranges = [[int(end, 16) for end in place.split("-")] for place, *_ in maps]
    assert any(start <= address < end for start, end in ranges)


def test_other_weights_types_and_formats_are_rounded_anew(tmp_path: Path) -> None:
    directory, phases = save(tmp_path / "model"), list[str]()
    before = logits_of(load(directory, tmp_path, phases))
    load(directory, tmp_path, phases, "int4")
    changed = tiny_model("qwen2", **SIZES)
    changed.lm_head.weight.data += 1
    changed.save_pretrained(directory)
    os.utime(directory / "model.safetensors", (1, 1))
    phases.clear()
    after = logits_of(load(directory, tmp_path, phases))
    assert "quantizing weights" in phases and not torch.equal(before, after)
    assert len(files(tmp_path)) == 2, "what was made of the files before is removed"


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, None])
def test_a_broken_file_is_made_again(content: bytes | None, tmp_path: Path) -> None:
    directory, phases = save(tmp_path / "model"), list[str]()
    expected = logits_of(load(directory, tmp_path, phases))
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    phases.clear()
    assert torch.equal(logits_of(load(directory, tmp_path, phases)), expected)
    assert "quantizing weights" in phases
    phases.clear()
    load(directory, tmp_path, phases)
    assert "quantizing weights" not in phases


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("not a folder")
    phases: list[str] = []
    assert logits_of(load(save(tmp_path / "model"), tmp_path, phases)).isfinite().all()


def test_what_was_not_used_for_long_is_removed(tmp_path: Path) -> None:
    phases: list[str] = []
    load(save(tmp_path / "old"), tmp_path, phases)
    (old,) = files(tmp_path)
    os.utime(old, (time.time() - 2 * MAX_UNUSED,) * 2)
    load(save(tmp_path / "new"), tmp_path, phases)
    assert [path.name.startswith("new-int8") for path in files(tmp_path)] == [True]
