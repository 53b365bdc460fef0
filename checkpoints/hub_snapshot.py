"""A Hub snapshot: a model's files from the Hugging Face Hub, without pickles and code, in huggingface_hub's cache."""

import contextlib
import functools
import importlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import errors
from checkpoints import model_directory
from checkpoints.atomic_files import require_room
from checkpoints.sources import Sources, is_reachable
from engine.report import Report

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]
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
class MemoryBound:
    """How large a model's weights may be, and the setting that holds the limit."""

    setting: str
    num_bytes: int

    def check(self, name: str, size: int) -> None:
        """Raises ModelLoadError if `size`, in bytes, is beyond the limit."""
        if size > self.num_bytes:
            raise errors.ModelLoadError(
                f"{name} takes {size / 2**30:.2f} GiB, but {self.setting} is "
                f"{self.num_bytes / 2**30:.2f} GiB: raise it, or use a smaller model."
            )


def is_hub_id(name: str) -> bool:
    """Returns whether `name` has the form OWNER/NAME. Such a name never leads out of the working directory."""
    return HUB_ID.fullmatch(name) is not None and ".." not in name


def fetch(model_id: str, report: Report, sources: Sources, bound: MemoryBound | None = None) -> Path:
    """Downloads a model, or takes it from huggingface_hub's cache where the Hub is out of reach; returns its directory.

    Raises ModelLoadError; for a model that is larger than `bound` before anything is downloaded.
    """
    from huggingface_hub import constants, snapshot_download

    is_online = is_reachable(sources.endpoint)
    phase = f"downloading {model_id}" if is_online else f"looking up {model_id}"
    report(phase, 0.0)
    cache = sources.hub_cache or Path(constants.HF_HUB_CACHE)
    download = functools.partial(
        snapshot_download, model_id, allow_patterns=HUB_FILES, cache_dir=cache, endpoint=sources.endpoint
    )
    try:
        if is_online:
            _check_size(download, cache, model_id, bound)
        directory = Path(download(local_files_only=not is_online, tqdm_class=progress_bar(phase, report)))
    except errors.ModelLoadError:
        raise
    except Exception as error:  # huggingface_hub's, the HTTP client's, the disk's: all mean that there are no files
        raise load_error(model_id, error) from error
    model_directory.check(directory, model_id)
    if bound is not None:
        bound.check(model_id, model_directory.weights_size(directory))
    return directory


def load_error(model_id: str, error: Exception) -> errors.ModelLoadError:
    reasons = (HUB_ERRORS[base.__name__] for base in type(error).__mro__ if base.__name__ in HUB_ERRORS)
    unknown = f"could not be downloaded: {' '.join(str(error).split()) or type(error).__name__}"
    failure, reason = next(reasons, (errors.SourceUnreachable, unknown))
    return failure(f"{model_id} {reason.rstrip('.')}.")


def _check_size(download: Callable[..., Any], cache: Path, model_id: str, bound: MemoryBound | None) -> None:
    """Raises ModelLoadError if the weights are beyond `bound`, or the disk has too little room for the files."""
    from huggingface_hub.errors import DryRunError

    with contextlib.suppress(DryRunError):  # the download itself has the better error
        files = download(dry_run=True)
        if bound is not None:
            bound.check(model_id, sum(file.file_size for file in files if file.filename.endswith(".safetensors")))
        require_room(cache, sum(file.file_size for file in files if file.will_download), model_id)


def progress_bar(phase: str, report: Report) -> type[Any]:
    """Returns a tqdm class for huggingface_hub that reports bytes instead of drawing them."""
    tqdm: Any = importlib.import_module("tqdm").tqdm

    class Bar(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "file": io.StringIO(), "disable": False})

        def display(self, *args: Any, **options: Any) -> None:
            if self.unit == "B" and self.total:
                report(phase, min(self.n / self.total, 1.0))

    return Bar
