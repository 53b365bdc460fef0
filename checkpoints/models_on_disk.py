"""Models on disk: those that are on this machine's disk, and what removes one.

Only what the server itself fetched or made can be removed: each path that goes comes from a search of the caches, and
none from the name that a user types.
"""

import dataclasses
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import errors
from checkpoints import checkpoint, gguf_parts, hub_files, hub_model, model_folder, packages
from checkpoints.demo_models import DEMO_MODELS, EMBEDDING_DEMOS
from checkpoints.sources import Sources
from engine import rounded_files

SAFETENSORS, GGUF, DEMO, CONVERTED, ROUNDED, INCOMPLETE, OTHER = (
    *("safetensors", "GGUF", "demo", "converted", "rounded", "incomplete", "other"),
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model on the disk."""

    name: str  # as MODEL_PATH takes it, where it takes it
    kind: str
    place: Path
    files: tuple[Path, ...]  # and directories, which no other model needs
    repository: str | None = None  # on the Hub
    is_ours: bool = True  # whether it can be removed

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(file.stat().st_size for file in _distinct(self.files))

    @property
    def used(self) -> float:
        """The time at which it was read or changed last."""
        states = [file.stat() for file in _distinct(self.files)]
        return max((max(state.st_atime, state.st_mtime) for state in states), default=0.0)


def _distinct(paths: Iterable[Path]) -> set[Path]:
    """Returns all files, below directories too; of links, what they lead to."""
    found = (file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]))
    return {file.resolve() for file in found if file.is_file()}


class ModelsOnDisk:
    """What is in the server's cache, in huggingface_hub's, and in the directory of models."""

    def __init__(self, cache_dir: Path, sources: Sources | None = None, models_dir: Path | None = None) -> None:
        self._cache_dir = cache_dir.expanduser().absolute()
        self._hub = hub_files.cache_of(sources or Sources()).expanduser().resolve()  # as huggingface_hub has it
        self._models_dir = models_dir and models_dir.expanduser().absolute()

    def entries(self) -> list[Entry]:
        found = [*self._demos(), *self._hub_models(), *self._local()]
        claimed = {path for entry in found for path in entry.files}
        for entry in self._made():
            if entry.place not in claimed:
                found.append(entry)
                claimed |= set(entry.files)
        return found

    def remove(self, name: str) -> tuple[list[Entry], int]:
        """Removes a model: a name of `entries`, or a Hub id for all that there is of it. Returns what was removed, and
        the bytes that this freed. Raises ModelLoadError."""
        entries = self.entries()
        chosen = [entry for entry in entries if name in (entry.name, entry.repository)]
        if not chosen:
            raise errors.ModelLoadError(f"{name} is not among the {len(entries)} models that `list` shows.")
        if any(not entry.is_ours for entry in chosen):
            raise errors.ModelLoadError(f"{name} is in MODELS_DIR, where the server only reads: delete it yourself.")
        kept = _distinct(path for entry in entries if entry not in chosen for path in entry.files)
        theirs = _distinct(path for entry in entries if not entry.is_ours for path in entry.files)
        if any(theirs & _distinct(entry.files) for entry in chosen):
            raise errors.ModelLoadError(f"MODELS_DIR has files of {name}, and they stay: move them first.")
        going = _distinct(path for entry in chosen for path in entry.files) - kept
        freed = sum(file.stat().st_size for file in going)
        for repository in {entry.repository for entry in chosen if entry.repository}:
            if all(entry in chosen for entry in entries if entry.repository == repository):
                self._remove_repository(repository)
        for path in (path for entry in chosen for path in entry.files):
            _remove(path, kept)
        return chosen, freed

    def _remove_repository(self, repository: str) -> None:
        """Removes all revisions of a Hub model with huggingface_hub's own means, which know a revision by its commit
        alone: they are shown no other model, since a mirror has the same commits."""
        cache = self._scanned()
        for repo in (repo for repo in cache.repos if (repo.repo_type, repo.repo_id) == ("model", repository)):
            revisions = (revision.commit_hash for revision in repo.revisions)
            dataclasses.replace(cache, repos=frozenset({repo})).delete_revisions(*revisions).execute()

    # --- what there is

    def _demos(self) -> Iterator[Entry]:
        for name in DEMO_MODELS:
            path = packages.gguf_path(name, self._cache_dir)
            converted = checkpoint.demo_conversions(self._cache_dir, name)
            if path.exists() or converted:
                yield Entry(name=name, kind=DEMO, place=path, files=(path, *self._with_rounded(converted)))
        for name in EMBEDDING_DEMOS:
            path = packages.directory_of(name, self._cache_dir)
            if path.exists():
                yield Entry(name=name, kind=DEMO, place=path, files=(path,))

    def _hub_models(self) -> Iterator[Entry]:
        whole = set()
        for repo in self._repositories():
            whole.add(repo.repo_path)
            yield from self._hub_entries(repo)
        for folder in sorted(self._hub.glob("models--*--*")):
            if folder not in whole:  # a download that ended before its first file was there
                name = folder.name.removeprefix("models--").replace("--", "/")
                yield Entry(name=name, kind=INCOMPLETE, place=folder, files=(folder,), repository=name)

    def _hub_entries(self, repo: Any) -> Iterator[Entry]:
        """Yields an entry for each GGUF model of a repository, and one for all else in it."""
        roots = [revision.snapshot_path for revision in repo.revisions]
        cached = {file for revision in repo.revisions for file in revision.files}
        names = {file.file_path: _name_below(roots, file.file_path) for file in cached}
        left = set(names)
        for first, parts in hub_model.files_of(set(names.values())).items():
            files = [file for file in cached if names[file.file_path] in parts]
            left -= {file.file_path for file in files}
            paths = {path for file in files for path in (file.file_path, file.blob_path)}
            converted = (c for root in roots if (root / first).exists() for c in self._conversions(root / first))
            all_paths = (*sorted(paths), *self._with_rounded(converted))
            name = f"{repo.repo_id}:{first}"
            yield Entry(name=name, kind=GGUF, place=repo.repo_path, files=all_paths, repository=repo.repo_id)
        if left:
            kind = SAFETENSORS if any(path.suffix == ".safetensors" for path in left) else OTHER
            paths = {path for f in cached if f.file_path in left for path in (f.file_path, f.blob_path)}
            rounded = (path for root in roots for path in rounded_files.of_model(self._cache_dir, root))
            yield Entry(
                name=repo.repo_id,
                kind=kind,
                place=repo.repo_path,
                files=(*sorted(paths), *rounded),
                repository=repo.repo_id,
            )

    def _conversions(self, first: Path) -> list[Path]:
        try:
            return checkpoint.conversions(self._cache_dir, gguf_parts.parts(first))
        except (OSError, errors.ModelLoadError):  # parts are missing
            return []

    def _with_rounded(self, directories: Iterable[Path]) -> Iterator[Path]:
        for directory in directories:
            yield directory
            yield from rounded_files.of_model(self._cache_dir, directory)

    def _local(self) -> Iterator[Entry]:
        """Yields the models in MODELS_DIR."""
        for found in [] if self._models_dir is None else model_folder.find_models(self._models_dir):
            place = Path(found.path)
            files, kind = ((place,), SAFETENSORS) if place.is_dir() else (gguf_parts.present_parts(place), GGUF)
            yield Entry(name=found.path, kind=kind, place=place, files=tuple(files), is_ours=False)

    def _made(self) -> Iterator[Entry]:
        """Yields what was converted, and rounded, of models that are elsewhere."""
        for path in sorted((self._cache_dir / checkpoint.CONVERTED).glob("*-v*")):
            if path.suffix not in (".lock", ".tmp"):
                files = tuple(self._with_rounded([path]))
                yield Entry(name=path.name, kind=CONVERTED, place=path, files=files)
        for path in sorted((self._cache_dir / rounded_files.FOLDER).glob(f"*{rounded_files.SUFFIX}")):
            yield Entry(name=path.stem, kind=ROUNDED, place=path, files=(path,))

    def _repositories(self) -> list[Any]:
        repos = self._scanned().repos if self._hub.is_dir() else ()
        return sorted((repo for repo in repos if repo.repo_type == "model"), key=lambda repo: repo.repo_id)

    def _scanned(self) -> Any:
        from huggingface_hub import scan_cache_dir

        return scan_cache_dir(self._hub)


def _name_below(roots: list[Path], path: Path) -> str:
    return next(path.relative_to(root).as_posix() for root in roots if path.is_relative_to(root))


def _remove(path: Path, kept: set[Path]) -> None:
    """Removes a file, a link or a directory, unless another model needs what it is."""
    if path.is_symlink() or path.is_file():
        if path.is_symlink() or path.resolve() not in kept:
            path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
