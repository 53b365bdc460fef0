"""A model directory: what must be in it before it is loaded, checked in milliseconds."""

import json
from pathlib import Path

import errors

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
PICKLE = "pickle files can run code when they are loaded, so they are refused: convert them to safetensors"


def check(directory: Path, name: str) -> None:
    """Raises ModelLoadError for an adapter, and where config.json or a file with weights is missing.

    name: the model in the error's text."""
    files = {entry.name for entry in directory.iterdir()}
    _check_adapter(directory, name, files)
    if "config.json" not in files:
        hint = "; name one of its .gguf files instead" if any(file.endswith(".gguf") for file in files) else ""
        raise errors.ModelLoadError(f"{name} is not a model directory: it has no config.json{hint}.")
    if not any(file.endswith(".safetensors") for file in files):
        reason = f"; {PICKLE}" if any(file.endswith(PICKLE_SUFFIXES) for file in files) else ""
        raise errors.ModelLoadError(f"{name} has no *.safetensors weights{reason}.")
    missing = sorted(_indexed_shards(directory) - files)
    if missing:
        raise errors.ModelLoadError(
            f"{name} is incomplete: download its missing weight files again, "
            f"{len(missing)} in all, beginning with {missing[0]}."
        )


def weights_size(directory: Path) -> int:
    """Returns the size of all safetensors files, in bytes."""
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


def _check_adapter(directory: Path, name: str, files: set[str]) -> None:
    """Raises ModelLoadError for an adapter (LoRA), which is no model: it changes another one's weights."""
    has_weights = any(file.startswith("adapter_model.") for file in files)
    if "config.json" in files and has_weights:
        raise errors.ModelLoadError(
            f"{name} has an adapter (adapter_model) beside the model, which would not be applied: move its files to a "
            "directory of their own, and name that in LORA_ADAPTERS as name=directory."
        )
    if "config.json" not in files and (has_weights or "adapter_config.json" in files):
        raise errors.ModelLoadError(
            f"{name} is an adapter for {_adapted_model(directory)}, not a model: name that model in MODEL_PATH, "
            "and the adapter in LORA_ADAPTERS as name=directory."
        )


def _adapted_model(directory: Path) -> str:
    """Returns the name of the model that an adapter was trained for."""
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        return str(config["base_model_name_or_path"] or "another model")
    except (OSError, ValueError, KeyError, TypeError):
        return "another model"


def _indexed_shards(directory: Path) -> set[str]:
    """Returns the names of the weight files that the index lists; none if there is no index."""
    index = directory / "model.safetensors.index.json"
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.exists() else set()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.ModelLoadError(f"{index} is not a valid index of safetensors files.") from error
