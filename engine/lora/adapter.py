"""Adapter: the matrices of a LoRA adapter, read from PEFT's files and checked against the model that they change.

An adapter changes the weight W of a linear layer to W + scale * B A, where A is (rank, columns) and B (rows, rank).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from engine.cpu.low_rank import PackedMatrices
from engine.lora.adapter_config import AdapterConfig
from errors import ModelLoadError, first_line

FILE = "adapter_model.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.default)?\.weight")
_WRAPPERS = ("model", "language_model", "text_model")  # what a layer's name begins with depends on the model's class


class Shape(NamedTuple):
    """The size of a linear layer."""

    num_rows: int
    num_columns: int


class Matrices(NamedTuple):
    """What an adapter adds to one layer: x -> x A^T B^T."""

    a: torch.Tensor  # (rank, columns)
    b: torch.Tensor  # (rows, rank), times the scale

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter in memory. Sequences keep the one that they began with."""

    name: str
    digest: bytes  # of its weights
    layers: Mapping[str, Matrices]  # by the layers' names, as `layer_name` gives them
    packed: dict[str, PackedMatrices] = field(default_factory=dict)  # by the names of the layers of one input

    @cached_property
    def rank(self) -> int:
        """The largest rank of its matrices."""
        return max(matrices.rank for matrices in self.layers.values())


def layer_name(name: str) -> str:
    """Returns a layer's name without what depends on the class of the whole model.

    For example, a text model has `model.layers.0.mlp.up_proj`, and one that sees calls the same layer
    `model.language_model.layers.0.mlp.up_proj`."""
    parts = name.split(".")
    while parts[0] in _WRAPPERS and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


@torch.inference_mode()
def read_adapter(
    name: str, directory: Path, targets: Mapping[str, Shape], dtype: torch.dtype, max_rank: int
) -> Adapter:
    """Reads an adapter for a model with these linear layers. Raises ModelLoadError where it is damaged, unsupported, or
    for another model."""
    config = AdapterConfig.read(directory)
    path = directory / FILE
    if not path.is_file():
        pickle = " (adapter_model.bin, a pickle file, can run code when it is loaded: convert it)"
        hint = pickle if (directory / "adapter_model.bin").exists() else ""
        raise ModelLoadError(f"The adapter in {directory} has no {FILE}{hint}.")
    try:
        with safe_open(path, framework="pt") as file:
            pairs = _pairs(list(file.keys()), config, path)
            shapes = {key: tuple(file.get_slice(key).get_shape()) for keys in pairs.values() for key in keys}
            for layer, (a, b) in pairs.items():
                _check_shapes(layer, shapes[a], shapes[b], targets, config, max_rank, directory)
            layers = {
                layer_name(layer): _matrices(layer, file.get_tensor(a), file.get_tensor(b), config, dtype, directory)
                for layer, (a, b) in sorted(pairs.items())
            }
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path} is damaged: {first_line(error)}.") from error
    return Adapter(name, _digest(layers), layers)


def _pairs(keys: list[str], config: AdapterConfig, path: Path) -> dict[str, tuple[str, str]]:
    """Returns the keys of A and B for each layer, by its name in the file."""
    found: dict[str, dict[str, str]] = {}
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None:
            raise ModelLoadError(f"{path} has the tensor {key}, which is no matrix A or B of a linear layer.")
        layer, side = match.groups()
        if not config.names(layer):
            raise ModelLoadError(f"{path} has the tensor {key}, though target_modules do not name that layer.")
        found.setdefault(layer, {})[side] = key
    if not found:
        raise ModelLoadError(f"{path} has no tensors, so the adapter would change nothing.")
    lonely = [layer for layer, sides in found.items() if len(sides) < 2]
    if lonely:
        raise ModelLoadError(f"{path} has only one of the matrices A and B of {lonely[0]}.")
    return {layer: (sides["A"], sides["B"]) for layer, sides in found.items()}


def _check_shapes(
    layer: str,
    a: tuple[int, ...],
    b: tuple[int, ...],
    targets: Mapping[str, Shape],
    config: AdapterConfig,
    max_rank: int,
    directory: Path,
) -> None:
    about, rank = f"The adapter in {directory}", config.rank_of(layer)
    target = targets.get(layer_name(layer))
    if target is None:
        raise ModelLoadError(
            f"{about} changes {layer}, which the model does not have as a linear layer that adapters can change: "
            f"it was trained for {config.base}."
        )
    if rank > max_rank:
        raise ModelLoadError(f"{about} has rank {rank}, and MAX_LORA_RANK is {max_rank}: raise it to load the adapter.")
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise ModelLoadError(f"{about} has matrices of the shapes {a} and {b} for {layer}, whose rank is {rank}.")
    if (b[0], a[1]) != target:
        raise ModelLoadError(
            f"{about} is for another model ({config.base}): its {layer} turns {a[1]} numbers into {b[0]}, "
            f"and the model's turns {target.num_columns} into {target.num_rows}."
        )


def _matrices(
    layer: str, a: torch.Tensor, b: torch.Tensor, config: AdapterConfig, dtype: torch.dtype, directory: Path
) -> Matrices:
    matrices = Matrices(a.to(dtype), (b.float() * config.scale_of(layer)).to(dtype))
    if not all(bool(torch.isfinite(part).all()) for part in matrices):
        raise ModelLoadError(f"The adapter in {directory} has values that are not finite numbers for {layer}.")
    return matrices


def _digest(layers: Mapping[str, Matrices]) -> bytes:
    digest = blake2b(digest_size=16)
    for name, matrices in layers.items():
        digest.update(f"{name} {matrices.rank}\n".encode())
        for part in matrices:
            digest.update(part.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
