"""Hub files: the large files of a Hub model, downloaded so that an interrupted download goes on where it ended.

Each is checked against the SHA-256 that the Hub names for it, and appears in huggingface_hub's cache only then, under
the name that huggingface_hub gives it. That library itself begins a download anew after an interruption.
"""

import fnmatch
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import errors
from checkpoints.atomic_files import locked, require_room
from checkpoints.sources import CONNECT_TIMEOUT, Sources, is_reachable
from engine.report import Report

CHUNK = 1 << 20  # bytes
READ_TIMEOUT = 30.0  # seconds
ATTEMPTS, PAUSE = 5, 1.0  # how often a broken connection is made again, and the seconds before
_SHA256 = re.compile(r"[0-9a-f]{64}")
Advance = Callable[[int], None]  # called with the bytes that were read


@dataclass(frozen=True)
class HubFile:
    path: str  # in the repository
    size: int  # bytes
    sha256: str | None  # of a large file, which the Hub stores by it


@dataclass(frozen=True)
class Listing:
    """The files of a Hub model, as they are at one commit."""

    model_id: str
    commit: str
    files: tuple[HubFile, ...]

    def matching(self, patterns: Iterable[str]) -> "Listing":
        found = [file for file in self.files if any(fnmatch.fnmatch(file.path, pattern) for pattern in patterns)]
        return Listing(self.model_id, self.commit, tuple(found))


def listing(model_id: str, sources: Sources) -> Listing:
    """Asks the Hub. Raises SourceUnreachable, or any error of huggingface_hub's."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    if not is_reachable(sources.endpoint):
        raise errors.SourceUnreachable(
            f"The Hub cannot be reached at {sources.endpoint or 'any address, because HF_HUB_OFFLINE is set'}: "
            f"{model_id} was not downloaded."
        )
    api = HfApi(endpoint=sources.endpoint)
    commit = str(api.model_info(model_id, revision="main").sha)
    tree = api.list_repo_tree(model_id, recursive=True, revision=commit)
    files = [HubFile(f.path, f.size, f.lfs.sha256 if f.lfs else None) for f in tree if isinstance(f, RepoFile)]
    for file in files:
        if file.sha256 is not None and not _SHA256.fullmatch(file.sha256):  # it becomes the name of a file
            raise errors.ModelLoadError(f"The Hub names no SHA-256 for {file.path} of {model_id}, but {file.sha256!r}.")
    return Listing(model_id, commit, tuple(files))


def cache_of(sources: Sources) -> Path:
    from huggingface_hub import constants

    return sources.hub_cache or Path(constants.HF_HUB_CACHE)


def folder_of(model_id: str, sources: Sources) -> Path:
    """Returns where huggingface_hub keeps a model's files: in `blobs`, with links in `snapshots`."""
    return cache_of(sources) / f"models--{model_id.replace('/', '--')}"


def snapshot_of(model_id: str, sources: Sources) -> Path | None:
    """Returns the directory of the commit that was downloaded last."""
    folder = folder_of(model_id, sources)
    try:
        return folder / "snapshots" / (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None


def download(wanted: Listing, sources: Sources, report: Report) -> None:
    """Puts all large files into the cache; those that are there are checked, and replaced if they are damaged.

    Raises ModelLoadError.
    """
    blobs = folder_of(wanted.model_id, sources) / "blobs"
    total = sum(file.size for file in wanted.files if file.sha256)
    missing = sum(file.size - _size(_part(blobs, file)) for file in _absent(blobs, wanted))
    require_room(blobs, missing, wanted.model_id)
    phase, done = f"downloading {wanted.model_id}", 0

    def advance(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        report(phase, min(done / max(total, 1), 1.0))

    report(phase, 0.0)
    for file in wanted.files:
        if file.sha256:
            url = f"{sources.endpoint}/{wanted.model_id}/resolve/{wanted.commit}/{quote(file.path)}"
            with locked(blobs / file.sha256, report):
                _ensure(url, blobs / file.sha256, file, advance)


def _absent(blobs: Path, wanted: Listing) -> list[HubFile]:
    return [file for file in wanted.files if file.sha256 and not (blobs / file.sha256).exists()]


def _part(blobs: Path, file: HubFile) -> Path:
    return blobs / f"{file.sha256}.incomplete"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _ensure(url: str, blob: Path, file: HubFile, advance: Advance) -> None:
    """Downloads the file to `blob`, unless it is there and right."""
    if blob.exists():
        if _digest(blob, advance).hexdigest() == file.sha256:
            return
        advance(-_size(blob))
        blob.unlink()
    part = _part(blob.parent, file)
    digest = _resume(url, part, file, advance)
    if digest.hexdigest() != file.sha256:
        part.unlink()
        raise errors.ModelLoadError(
            f"{file.path} as downloaded does not have the SHA-256 that the Hub names, and was removed: pull it again."
        )
    os.replace(part, blob)


def _resume(url: str, part: Path, file: HubFile, advance: Advance) -> "hashlib._Hash":
    """Completes `part`, with several connections where they break; returns its SHA-256."""
    import httpx2

    if _size(part) > file.size:
        part.unlink()
    digest = _digest(part, advance) if part.exists() else hashlib.sha256()
    failures = 0  # since there were new bytes
    while (start := _size(part)) < file.size:
        try:
            digest, reason = _append(url, part, file, digest, advance), "the connection ended early"
        except httpx2.HTTPStatusError as error:
            raise _failure(file, f"the Hub answers with status {error.response.status_code}") from error
        except httpx2.HTTPError as error:
            digest = _digest(part, lambda num_bytes: None) if part.exists() else hashlib.sha256()
            reason = str(error) or type(error).__name__
        if _size(part) < file.size:
            failures = 1 if _size(part) > start else failures + 1
            if failures == ATTEMPTS:
                raise _failure(file, f"{reason} (at {_size(part) / 1e6:.0f} MB, where the next pull goes on)")
            time.sleep(PAUSE * failures)
    return digest


def _failure(file: HubFile, reason: str) -> errors.SourceUnreachable:
    return errors.SourceUnreachable(f"{file.path} could not be downloaded: {reason.rstrip('.')}.")


def _append(url: str, part: Path, wanted: HubFile, digest: "hashlib._Hash", advance: Advance) -> "hashlib._Hash":
    """Reads from the end of `part` to the end of the file, or of the connection. Raises SourceUnreachable for what
    says that it is longer or shorter than the file."""
    import httpx2
    from huggingface_hub import get_token

    start = _size(part)
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-"}
    if token := get_token():
        headers["Authorization"] = f"Bearer {token}"  # not sent on to another address
    timeout = httpx2.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
    with httpx2.stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
        response.raise_for_status()
        begin = start if response.status_code == 206 else 0
        size = begin + int(response.headers.get("Content-Length", wanted.size - begin))
        if size != wanted.size:  # before what is there goes
            raise _failure(wanted, f"it should have {wanted.size} bytes, and what comes has {size}")
        if begin < start:  # the whole file, from a server that knows no ranges
            advance(-start)
            part.unlink()
            digest = hashlib.sha256()
        with part.open("ab") as file:
            for chunk in response.iter_raw():
                file.write(chunk)
                digest.update(chunk)
                advance(len(chunk))
    return digest


def _digest(path: Path, advance: Advance) -> "hashlib._Hash":
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest
