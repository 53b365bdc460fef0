"""`pull`, `list` and `rm`: models come whole or not at all, and only what was fetched can go."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_sources import TINY_CONFIG, http_server, hub_model, left_over
from gguf_twins import LLAMA_TWIN
from process import ROOT

from checkpoints import checkpoint
from checkpoints import hub_model as hub_names
from checkpoints.models_on_disk import ModelsOnDisk
from checkpoints.sources import Sources
from config import Settings
from engine import rounded_files
from errors import ModelLoadError
from serving import commands

WEIGHTS, GGUF = b"weights" * 300_000, b"GGUF" + bytes(range(256)) * 1000
SAFE = {"config.json": json.dumps(TINY_CONFIG).encode(), "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}
PARTS = [f"big-Q8_0-0000{number}-of-00002.gguf" for number in (1, 2)]
FILES = {"tiny-Q4_K_M.gguf": GGUF, "tiny-Q2_K.gguf": GGUF[:999], "mmproj-tiny-Q8_0.gguf": b"GGUF"}
FILES |= dict(zip(PARTS, (GGUF + b"1", GGUF + b"2"), strict=True))
SAFE_HUB = hub_model("org/tiny", SAFE, ("model.safetensors",))
GGUF_HUB = hub_model("org/tiny-GGUF", FILES, tuple(FILES))


def run(cache: Path, endpoint: str | None, *arguments: str, **settings: object) -> int:
    sources = Sources(endpoint=endpoint, hub_cache=cache / "hub")
    return commands.run(list(arguments), Settings(_env_file=None, cache_dir=cache / "own", **settings), sources)


def names(cache: Path) -> list[str]:
    return [entry.name for entry in ModelsOnDisk(cache / "own", Sources(None, cache / "hub")).entries()]


# --- pull


def test_a_model_is_pulled_listed_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with http_server(SAFE_HUB) as endpoint:
        assert run(tmp_path, endpoint, "pull", "org/tiny") == 0
        assert "org/tiny is in" in capsys.readouterr().out
        offline = checkpoint.fetch("org/tiny", tmp_path, lambda what, done: None, Sources(None, tmp_path / "hub"))
        assert (offline.directory / "model.safetensors").read_bytes() == WEIGHTS
    assert run(tmp_path, None, "list") == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["NAME", "KIND", "SIZE"] and row.split()[:4] == ["org/tiny", "safetensors", "2.1", "MB"]
    assert run(tmp_path, None, "rm", "org/tiny") == 0
    assert "removed org/tiny: 2.1 MB are free again" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.safetensors")) and names(tmp_path) == []


def test_an_interrupted_download_goes_on_where_it_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, str | None]] = []
    with http_server(SAFE_HUB, broken_at=100_000) as endpoint:
        assert run(tmp_path, endpoint, "pull", "org/tiny") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line == "error: model.safetensors could not be downloaded: the Hub answers with status 503."
    assert names(tmp_path) == ["org/tiny"]  # incomplete, and can be removed
    with http_server(SAFE_HUB, asked) as endpoint:
        assert run(tmp_path, endpoint, "pull", "org/tiny") == 0
        assert ("model.safetensors", "bytes=100000-") in asked
        assert [name for name, _ in asked].count("model.safetensors") == 1
        assert run(tmp_path, endpoint, "pull", "org/tiny") == 0  # nothing is left to do
        assert [name for name, _ in asked].count("model.safetensors") == 1
    assert next(tmp_path.rglob("model.safetensors")).read_bytes() == WEIGHTS


def test_a_file_with_a_wrong_sha256_is_refused_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = {path: body[:-1] + b"!" if path.endswith(".safetensors") else body for path, body in SAFE_HUB.items()}
    with http_server(paths) as endpoint:
        assert run(tmp_path, endpoint, "pull", "org/tiny") == 1
    assert "does not have the SHA-256 that the Hub names, and was removed" in capsys.readouterr().err
    assert left_over(tmp_path) == []


def test_a_page_that_comes_instead_of_a_file_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the login page of a network answers for every address."""
    asked: list[tuple[str, str | None]] = []
    paths = {path: b"<html>" if path.endswith(".safetensors") else body for path, body in SAFE_HUB.items()}
    with http_server(SAFE_HUB, broken_at=100_000) as endpoint:
        assert run(tmp_path, endpoint, "pull", "org/tiny") == 1
    with http_server(paths, asked, has_ranges=False) as endpoint:
        assert run(tmp_path, endpoint, "pull", "org/tiny") == 1
    assert f"it should have {len(WEIGHTS)} bytes, and what comes has 6" in capsys.readouterr().err
    assert [name for name, _ in asked].count("model.safetensors") == 1
    (part,) = tmp_path.rglob("*.incomplete")
    assert part.read_bytes() == WEIGHTS[:100_000]
    with http_server(SAFE_HUB, has_ranges=False) as endpoint:
        assert run(tmp_path, endpoint, "pull", "org/tiny") == 0
    assert next(tmp_path.rglob("model.safetensors")).read_bytes() == WEIGHTS


@pytest.mark.parametrize("digest", ["../../precious", "{tmp_path}/precious", "A" * 64])
def test_no_digest_of_a_hub_leads_out_of_its_cache(
    digest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").write_text("mine")
    named = digest.format(tmp_path=tmp_path)
    real = hashlib.sha256(WEIGHTS).hexdigest()
    paths = {path: body.replace(real.encode(), named.encode()) for path, body in SAFE_HUB.items()}
    with http_server(paths) as endpoint:
        assert run(tmp_path, endpoint, "pull", "org/tiny") == 1
    assert f"The Hub names no SHA-256 for model.safetensors of org/tiny, but '{named}'" in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_file_that_was_damaged_on_the_disk_is_downloaded_again(tmp_path: Path) -> None:
    with http_server(SAFE_HUB) as endpoint:
        assert run(tmp_path, endpoint, "pull", "org/tiny") == 0
        file = next(tmp_path.rglob("model.safetensors"))
        file.resolve().write_bytes(b"?" * len(WEIGHTS))
        assert run(tmp_path, endpoint, "pull", "org/tiny") == 0
    assert file.read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("name", "endpoint", "reason"),
    [
        ("org/tiny", "http://127.0.0.1:9", "The Hub cannot be reached at http://127.0.0.1:9: org/tiny was not downloa"),
        ("org/tiny", None, "The Hub cannot be reached at any address, because HF_HUB_OFFLINE is set: org/tiny was not"),
        ("../../etc/passwd", None, "../../etc/passwd cannot be downloaded: name a Hub id, OWNER/NAME:FILE.gguf or"),
        ("demo:nothing", None, "demo:nothing cannot be downloaded: name a Hub id"),
    ],
)
def test_what_cannot_be_pulled_is_one_sentence(
    name: str, endpoint: str | None, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, endpoint, "pull", name) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {reason}")
    assert left_over(tmp_path) == []


# --- one GGUF file of the Hub


@pytest.mark.parametrize("wanted", ["Q4_K_M", "q4_k_m", "tiny-Q4_K_M", "tiny-Q4_K_M.gguf"])
def test_one_gguf_file_is_pulled(wanted: str, tmp_path: Path) -> None:
    with http_server(GGUF_HUB) as endpoint:
        assert run(tmp_path, endpoint, "pull", f"org/tiny-GGUF:{wanted}") == 0
    assert {path.name for path in tmp_path.rglob("*.gguf")} == {"tiny-Q4_K_M.gguf"}
    assert names(tmp_path) == ["org/tiny-GGUF:tiny-Q4_K_M.gguf"]
    offline = Sources(None, tmp_path / "hub")
    found = hub_names.fetch_file(f"org/tiny-GGUF:{wanted}", offline, lambda what, done: None)
    assert found.read_bytes() == GGUF


@pytest.mark.parametrize("wanted", ["Q8_0", PARTS[1]])
def test_a_split_file_comes_with_all_its_parts(wanted: str, tmp_path: Path) -> None:
    with http_server(GGUF_HUB) as endpoint:
        assert run(tmp_path, endpoint, "pull", f"org/tiny-GGUF:{wanted}") == 0
    assert {path.name for path in tmp_path.rglob("*.gguf")} == set(PARTS)
    assert names(tmp_path) == [f"org/tiny-GGUF:{PARTS[0]}"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("org/tiny-GGUF:Q3_K", "org/tiny-GGUF has no GGUF file of the name Q3_K: name one of big-Q8_0-00001-of-00002."),
        ("org/tiny-GGUF", "org/tiny-GGUF has GGUF files: name one, as in org/tiny-GGUF:big-Q8_0-00001-of-00002.gguf."),
    ],
)
def test_a_gguf_file_must_be_named(name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with http_server(GGUF_HUB) as endpoint:
        assert run(tmp_path, endpoint, "pull", name) == 1
    assert f"error: {reason}" in capsys.readouterr().err


def test_one_gguf_file_of_a_model_is_removed_and_the_others_stay(tmp_path: Path) -> None:
    with http_server(GGUF_HUB) as endpoint:
        for wanted in ("Q4_K_M", "Q2_K"):
            assert run(tmp_path, endpoint, "pull", f"org/tiny-GGUF:{wanted}") == 0
    assert run(tmp_path, None, "rm", "org/tiny-GGUF:tiny-Q2_K.gguf") == 0
    assert names(tmp_path) == ["org/tiny-GGUF:tiny-Q4_K_M.gguf"]
    assert next(tmp_path.rglob("tiny-Q4_K_M.gguf")).read_bytes() == GGUF
    assert len(list((tmp_path / "hub").glob("models--*/blobs/" + "?" * 64))) == 1
    assert run(tmp_path, None, "rm", "org/tiny-GGUF") == 0
    assert names(tmp_path) == [] and not list((tmp_path / "hub").glob("models--*"))


def test_a_gguf_file_of_the_hub_is_a_model_to_serve_and_goes_with_what_was_converted(tmp_path: Path) -> None:
    LLAMA_TWIN.write(tmp_path / "tiny-F32.gguf")
    content = (tmp_path / "tiny-F32.gguf").read_bytes()
    with http_server(hub_model("org/tiny-GGUF", {"tiny-F32.gguf": content}, ("tiny-F32.gguf",))) as endpoint:
        sources = Sources(endpoint, tmp_path / "hub")
        checkpoint.check("org/tiny-GGUF:F32")
        served = checkpoint.fetch("org/tiny-GGUF:F32", tmp_path / "own", lambda what, done: None, sources).directory
    assert (served / "config.json").exists() and checkpoint.served_name("org/tiny-GGUF:F32") == "tiny-GGUF:F32"
    offline = Sources(None, tmp_path / "hub")
    again = checkpoint.fetch("org/tiny-GGUF:F32", tmp_path / "own", lambda what, done: None, offline)
    assert again.directory == served and names(tmp_path) == ["org/tiny-GGUF:tiny-F32.gguf"]
    assert run(tmp_path, None, "rm", "org/tiny-GGUF:tiny-F32.gguf") == 0
    assert not served.exists() and names(tmp_path) == []


def test_a_gguf_file_that_is_nowhere_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        ModelLoadError, match="org/tiny-GGUF:F32 is not in the local Hub cache, and the Hub cannot be re"
    ):
        checkpoint.fetch("org/tiny-GGUF:F32", tmp_path, lambda what, done: None, Sources(None, tmp_path / "hub"))


# --- rm


def test_a_cache_behind_a_link_is_the_same_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "hub").symlink_to(tmp_path / "real", target_is_directory=True)
    with http_server(SAFE_HUB | GGUF_HUB) as endpoint:
        assert run(tmp_path, endpoint, "pull", "org/tiny") == 0
        assert run(tmp_path, endpoint, "pull", "org/tiny-GGUF:Q4_K_M") == 0
    assert names(tmp_path) == ["org/tiny", "org/tiny-GGUF:tiny-Q4_K_M.gguf"]
    capsys.readouterr()
    assert run(tmp_path, None, "rm", "org/tiny-GGUF:tiny-Q4_K_M.gguf") == 0
    assert f"{len(GGUF) / 1e6:.1f} MB are free again" in capsys.readouterr().out
    assert not list((tmp_path / "real").glob("models--org--tiny-GGUF/blobs/*"))


@pytest.mark.parametrize("gone", ["org/tiny", "mirror/tiny"])
def test_a_mirror_with_the_same_commits_stays(gone: str, tmp_path: Path) -> None:
    with http_server(SAFE_HUB | hub_model("mirror/tiny", SAFE, ("model.safetensors",))) as endpoint:
        for name in ("org/tiny", "mirror/tiny"):
            assert run(tmp_path, endpoint, "pull", name) == 0
    assert run(tmp_path, None, "rm", gone) == 0
    assert names(tmp_path) == [name for name in ("mirror/tiny", "org/tiny") if name != gone]
    assert next(tmp_path.rglob("model.safetensors")).read_bytes() == WEIGHTS
    assert not (tmp_path / "hub" / f"models--{gone.replace('/', '--')}").exists()


def test_what_was_rounded_of_a_converted_file_goes_with_it(tmp_path: Path) -> None:
    converted = tmp_path / "own" / checkpoint.CONVERTED / "x-0123456789abcdef-v9"
    rounded = tmp_path / "own" / rounded_files.FOLDER
    converted.mkdir(parents=True)
    rounded.mkdir()
    (converted / "model.safetensors").write_bytes(WEIGHTS)
    (rounded / f"{rounded_files.stem(converted, 'int8')}-0.safetensors").write_bytes(WEIGHTS)
    assert names(tmp_path) == [converted.name]
    assert run(tmp_path, None, "rm", converted.name) == 0
    assert names(tmp_path) == [] and not list(rounded.iterdir())


def test_what_was_made_of_a_model_goes_with_it(tmp_path: Path) -> None:
    with http_server(SAFE_HUB) as endpoint:
        assert run(tmp_path, endpoint, "pull", "org/tiny") == 0
    snapshot = next(tmp_path.rglob("model.safetensors")).parent
    rounded = tmp_path / "own" / "rounded"
    rounded.mkdir(parents=True)
    of_model, other = (rounded / f"{stem}-0.safetensors" for stem in (rounded_files.stem(snapshot, "int8"), "x-int8-1"))
    demo = tmp_path / "own" / "gguf" / "smollm2-135m.gguf"
    converted = tmp_path / "own" / "safetensors" / "smollm2-135m-b179c9523d0e6a0f-v0"
    for path in (of_model, other, demo, converted / "config.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    assert names(tmp_path) == ["demo:smollm2-135m", "org/tiny", "x-int8-1-0"]
    assert run(tmp_path, None, "rm", "org/tiny") == 0
    assert not of_model.exists() and other.exists() and demo.exists()
    assert run(tmp_path, None, "rm", "demo:smollm2-135m") == 0
    assert not demo.exists() and not converted.exists() and names(tmp_path) == ["x-int8-1-0"]


@pytest.mark.parametrize("name", ["..", "../own", "/etc", "*", "", ".", "org", "models--org--tiny", "tiny-v0/../.."])
def test_no_name_leads_out_of_the_caches(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own" / "safetensors" / "tiny-v0").mkdir(parents=True)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_bytes(b"x")
    os.symlink(kept, tmp_path / "own" / "safetensors" / "linked-v0")
    assert run(tmp_path, None, "rm", name) == 1
    assert capsys.readouterr().err.startswith(f"error: {name} is not among the 2 models")
    assert run(tmp_path, None, "rm", "linked-v0") == 0
    assert (kept / "file").exists() and names(tmp_path) == ["tiny-v0"]


def test_models_that_the_server_only_reads_are_shown_and_stay(tmp_path: Path) -> None:
    models = tmp_path / "models"
    for path in (
        models / "a" / "config.json",
        models / "a" / "model.safetensors",
        models / "b.gguf",
        models / "c-00001-of-00002.gguf",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    models_on_disk = ModelsOnDisk(tmp_path / "own", Sources(None, tmp_path / "hub"), models)
    found = {entry.name for entry in models_on_disk.entries()}
    assert found == {str(models / name) for name in ("a", "b.gguf", "c-00001-of-00002.gguf")}
    with pytest.raises(ModelLoadError, match="is in MODELS_DIR, where the server only reads"):
        models_on_disk.remove(str(models / "b.gguf"))
    assert (models / "b.gguf").exists()


# --- the process


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--help"], "python main.py pull NAME"), (["pull", "--help"], "OWNER/NAME:Q4_K_M"), (["list"], "no models yet")],
)
def test_the_commands_are_those_of_the_process(arguments: list[str], said: str, tmp_path: Path) -> None:
    environment = {**os.environ, "CACHE_DIR": str(tmp_path), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "main.py", *arguments]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and said in process.stdout and not process.stderr
