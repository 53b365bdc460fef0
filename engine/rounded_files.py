"""The files that rounded weights are kept in, by their names; see rounded_weights.py. It needs no torch."""

import glob
import hashlib
from pathlib import Path

FOLDER, SUFFIX = "rounded", ".safetensors"


def stem(directory: Path, quantization: str) -> str:
    """Returns how the names of a model's files in one format begin."""
    place = directory.resolve()
    return f"{place.name}-{quantization}-{short_hash(str(place))}"


def of_model(cache_dir: Path, directory: Path) -> list[Path]:
    """Returns what is kept of a model, in all formats."""
    place = directory.resolve()
    pattern = f"{glob.escape(place.name)}-*-{short_hash(str(place))}-*{SUFFIX}"
    return sorted((cache_dir / FOLDER).glob(pattern))


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
