"""A folder of models: every directory and every GGUF file below it that can be served, found without being opened.

Names come from the paths. What is wrong with a model is found when it is loaded.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from checkpoints import gguf_parts, model_directory
from checkpoints.gguf_parts import PART

Kind = Literal["chat", "embedding"]
MAX_DEPTH = 6  # folders below the first one
MAX_MODELS = 1000
NOT_MODELS = re.compile(r"(^|[-_.])(mmproj|imatrix)", re.IGNORECASE)  # GGUF files beside a model's
GENERATING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")  # how classes of models that write are called


@dataclass(frozen=True)
class FoundModel:
    name: str  # its base name, or its path below the folder where another model has the same one
    path: str
    kind: Kind
    num_bytes: int  # of the files with its weights


def find_models(folder: Path) -> list[FoundModel]:
    """Returns the models below a folder by name, at most MAX_MODELS; what cannot be read is skipped."""
    found = [path for path, _ in zip(_paths(folder), range(MAX_MODELS), strict=False)]
    names = {path: _stem(path) for path in found}
    for other in (_stem_below, _path_below):  # for those whose name another one has, too
        counts = Counter(name.casefold() for name in names.values())
        names |= {path: other(path, folder) for path, name in names.items() if counts[name.casefold()] > 1}
    return sorted((_found(path, names[path]) for path in found), key=lambda model: model.name.casefold())


def _paths(folder: Path) -> Iterator[Path]:
    """Yields model directories, below which nothing is looked for, and GGUF files, of split ones the first part."""
    seen: set[str] = set()
    for place, directories, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or len(Path(place).relative_to(folder).parts) > MAX_DEPTH:
            directories.clear()
            continue
        seen.add(real)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        if "config.json" in files and any(name.endswith(".safetensors") for name in files):
            directories.clear()
            yield Path(place)
        yield from (Path(place, name) for name in sorted(files) if _is_gguf(name))


def _is_gguf(name: str) -> bool:
    part = PART.fullmatch(name)
    is_first = part is None or int(part["number"]) == 1
    return name.lower().endswith(".gguf") and not name.startswith(".") and not NOT_MODELS.search(name) and is_first


def _stem(path: Path) -> str:
    return path.name if path.suffix.lower() != ".gguf" else gguf_parts.stem(path.name)


def _stem_below(path: Path, folder: Path) -> str:
    return (path.relative_to(folder).parent / _stem(path)).as_posix()


def _path_below(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _found(path: Path, name: str) -> FoundModel:
    is_directory = path.suffix.lower() != ".gguf" or path.is_dir()
    return FoundModel(
        name=name,
        path=str(path),
        kind=_kind(path) if is_directory else "chat",
        num_bytes=_num_bytes(path),
    )


def num_bytes_of(path: str) -> int | None:
    """Returns the bytes of the weights of a directory or GGUF file; None for a model that is not there."""
    return _num_bytes(Path(path).expanduser()) or None


def _num_bytes(path: Path) -> int:
    try:
        if path.is_dir():
            return model_directory.weights_size(path)
        return sum(part.stat().st_size for part in gguf_parts.present_parts(path))
    except OSError:
        return 0


def _kind(directory: Path) -> Kind:
    """Tells a model that makes vectors or scores by the files of sentence-transformers, else by its class."""
    if (directory / "modules.json").exists():
        return "embedding"
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        classes = [str(name) for name in config.get("architectures") or ()]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        classes = []  # loading it will say what is wrong
    return "chat" if not classes or any(name.endswith(GENERATING) for name in classes) else "embedding"
