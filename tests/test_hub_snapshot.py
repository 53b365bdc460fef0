"""Models from the Hub: without pickles and code, within their bounds, and usable offline afterwards."""

import json
from pathlib import Path

import pytest
from fake_sources import TINY_CONFIG, http_server, hub_model, ignore

from checkpoints import checkpoint, hub_snapshot
from checkpoints.sources import Sources
from errors import ModelLoadError

HUB_MODEL = {
    "config.json": json.dumps(TINY_CONFIG).encode(),
    "model.safetensors": b"weights" * 1000,
    "tokenizer.json": b"{}",
    "merges.txt": b"",
    "pytorch_model.bin": b"pickle",
    "modeling.py": b"raise SystemExit",
}


def test_hub_model_comes_without_pickles_and_code_and_stays_usable_offline(tmp_path: Path) -> None:
    fractions: list[float] = []
    with http_server(hub_model("org/tiny", HUB_MODEL)) as endpoint:
        sources = Sources(endpoint=endpoint, hub_cache=tmp_path)
        online = checkpoint.fetch("org/tiny", tmp_path, lambda what, done: fractions.append(done), sources).directory
    assert {path.name for path in online.iterdir()} == HUB_MODEL.keys() - {"pytorch_model.bin", "modeling.py"}
    assert (online / "model.safetensors").read_bytes() == HUB_MODEL["model.safetensors"]
    assert all(0.0 <= fraction <= 1.0 for fraction in fractions)
    for unreachable in (endpoint, None):
        sources = Sources(endpoint=unreachable, hub_cache=tmp_path)
        assert checkpoint.fetch("org/tiny", tmp_path, ignore, sources).directory == online


@pytest.mark.parametrize(
    ("model_id", "files", "reason"),
    [
        ("org/gated", {}, "org/gated is gated"),
        ("org/nothing", {}, "org/nothing is neither a local directory nor on the Hub"),
        ("org/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"}, "org/pickled has no .*safetensors"),
    ],
)
def test_unusable_hub_model_is_refused_in_one_sentence(
    tmp_path: Path, model_id: str, files: dict[str, bytes], reason: str
) -> None:
    with http_server(hub_model(model_id, files) if files else {}) as endpoint:
        with pytest.raises(ModelLoadError, match=reason) as raised:
            checkpoint.fetch(model_id, tmp_path, ignore, Sources(endpoint=endpoint, hub_cache=tmp_path))
    assert "\n" not in str(raised.value)


def test_a_hub_model_beyond_its_bound_is_refused_before_it_is_downloaded(tmp_path: Path) -> None:
    size = len(HUB_MODEL["model.safetensors"])
    with http_server(hub_model("org/tiny", HUB_MODEL)) as endpoint:
        sources = Sources(endpoint=endpoint, hub_cache=tmp_path)
        with pytest.raises(ModelLoadError, match="org/tiny takes .* GiB, but SETTING is"):
            hub_snapshot.fetch("org/tiny", ignore, sources, hub_snapshot.MemoryBound("SETTING", size - 1))
        assert not list(tmp_path.rglob("*.safetensors"))
        found = hub_snapshot.fetch("org/tiny", ignore, sources, hub_snapshot.MemoryBound("SETTING", size))
    assert (found / "model.safetensors").exists()


def test_unreachable_hub_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="org/name .* the Hub cannot be reached"):
        checkpoint.fetch("org/name", tmp_path, ignore, Sources("http://127.0.0.1:9", hub_cache=tmp_path))
