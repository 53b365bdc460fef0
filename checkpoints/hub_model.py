"""A Hub model by its name: OWNER/NAME for its safetensors, OWNER/NAME:FILE or OWNER/NAME:Q4_K_M for one GGUF file."""

import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import errors
from checkpoints import gguf_parts, hub_files, hub_snapshot, model_directory
from checkpoints.model_folder import NOT_MODELS
from checkpoints.sources import Sources, is_reachable
from engine.report import Report

SUFFIX = ".gguf"


def parse(name: str) -> tuple[str, str | None]:
    """Returns a Hub id, and which of its GGUF files is meant, if the name says so."""
    model_id, _, wanted = name.partition(":")
    return model_id, wanted or None


def is_file_name(name: str) -> bool:
    """Returns whether a name means one GGUF file of a Hub model."""
    model_id, wanted = parse(name)
    return wanted is not None and hub_snapshot.is_hub_id(model_id)


def files_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Returns the GGUF models among files' names: of each the first file, and all its parts."""
    models: dict[str, list[str]] = {}
    for name in sorted(name for name in names if name.lower().endswith(SUFFIX)):
        path = PurePosixPath(name)
        if not NOT_MODELS.search(path.name):
            models.setdefault(str(path.parent / gguf_parts.stem(path.name)), []).append(name)
    return {parts[0]: parts for parts in models.values()}


def choose(model_id: str, wanted: str, names: Iterable[str]) -> list[str]:
    """Returns the files of the GGUF model that `wanted` means: a file, one of its parts, or the end of its name, such
    as Q4_K_M. Raises ModelLoadError."""
    models = files_of(names)
    exact = [parts for parts in models.values() if wanted in parts]
    tag = re.compile(rf"(^|[-_./]){re.escape(wanted)}$", re.IGNORECASE)
    found = exact or [parts for parts in models.values() if tag.search(gguf_parts.stem(parts[0]))]
    if len(found) != 1:
        problem = "several GGUF files" if found else "no GGUF file"
        raise errors.ModelLoadError(
            f"{model_id} has {problem} of the name {wanted}: "
            f"name one of {', '.join(list(models)[:8]) or 'another model'}."
        )
    return found[0]


def pull(name: str, sources: Sources, report: Report) -> Path:
    """Downloads a model, or what is missing of it, and checks it; returns its directory or its first GGUF file.

    Raises ModelLoadError.
    """
    model_id, wanted = parse(name)
    return _translated(model_id, functools.partial(_pull, model_id, wanted, sources, report))


def _translated(model_id: str, run: Callable[[], Path]) -> Path:
    try:
        return run()
    except errors.ModelLoadError:
        raise
    except Exception as error:  # huggingface_hub's, the HTTP client's, the disk's: all mean that there are no files
        raise hub_snapshot.load_error(model_id, error) from error


def _pull(model_id: str, wanted: str | None, sources: Sources, report: Report) -> Path:
    from huggingface_hub import snapshot_download

    listing = hub_files.listing(model_id, sources)
    names = [file.path for file in listing.files]
    patterns = hub_snapshot.HUB_FILES if wanted is None else choose(model_id, wanted, names)
    if wanted is None and (models := files_of(names)) and not any(n.endswith(".safetensors") for n in names):
        raise errors.ModelLoadError(f"{model_id} has GGUF files: name one, as in {model_id}:{next(iter(models))}.")
    hub_files.download(listing.matching(patterns), sources, report)
    cache = hub_files.cache_of(sources)
    directory = Path(
        snapshot_download(
            model_id,
            allow_patterns=patterns,
            cache_dir=cache,
            endpoint=sources.endpoint,
            tqdm_class=hub_snapshot.progress_bar("", lambda phase, fraction: None),  # only small files are left
        )
    )
    if wanted is not None:
        return directory / patterns[0]
    model_directory.check(directory, model_id)
    return directory


def fetch_file(name: str, sources: Sources, report: Report) -> Path:
    """Returns a GGUF file of a Hub model from the cache; what is not there is downloaded. Raises ModelLoadError."""
    model_id, wanted = parse(name)
    cached = _cached(model_id, wanted or "", sources)
    if cached is not None:
        return cached
    if not is_reachable(sources.endpoint):
        raise errors.SourceUnreachable(f"{name} is not in the local Hub cache, and the Hub cannot be reached.")
    return pull(name, sources, report)


def _cached(model_id: str, wanted: str, sources: Sources) -> Path | None:
    """Returns a file whose parts are all in the cache."""
    directory = hub_files.snapshot_of(model_id, sources)
    if directory is None:
        return None
    names = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    try:
        first = directory / choose(model_id, wanted, names)[0]
        gguf_parts.parts(first)
    except errors.ModelLoadError:  # it is not there, or not all of it
        return None
    return first
