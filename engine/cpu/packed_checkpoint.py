"""A model's packed weights in a safetensors file: written once, loaded in a moment.

Either its linear layers keep the blocks of the GGUF file that it came from; the file is then beside the model's own,
under a name that transformers does not look for. Or they were rounded at a first start; see rounded_weights.py.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from engine.cpu import gguf_blocks, kernels, packed_experts, packing
from engine.cpu.packed_layers import EXACT
from engine.cpu.packed_weight import (
    INT8,
    PARTS,
    Codes,
    Format,
    PackedWeight,
    can_pack,
    concatenated,
    narrowest,
    pack,
    pack_floats,
    round_and_pack,
)
from errors import ModelLoadError

FILE = "weights.packed"
REORDERED, REORDERED_TENSOR = "linear_attn.out_proj", ".ssm_out.weight"
# whose columns are in the order of heads, in which files differ from transformers
MAPPED_BYTES = 2**26  # of a tensor that is not packed, from which on it is not copied into the process's own memory
HASHED_ROWS = 4096  # at a time


def exists(directory: Path) -> bool:
    return (directory / FILE).exists()


def size(directory: Path) -> int:
    """Returns the file's size in bytes."""
    return (directory / FILE).stat().st_size


def sizes(directory: Path) -> dict[str, int]:
    """Returns the bytes of each quantised weight, by the name of its layer or of experts' parameter, from the file's
    header alone."""
    with open(directory / FILE, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    tables = header.pop("__metadata__")
    layers, formats = json.loads(tables["layers"]), json.loads(tables["formats"])
    stored = {name: tensor["data_offsets"][1] - tensor["data_offsets"][0] for name, tensor in header.items()}
    quantised = {name: source for name, source in layers.items() if not formats[source]["dtype_name"]}
    return {name: sum(stored.get(f"{source}.{part}", 0) for part in PARTS) for name, source in quantised.items()}


def parameter_sizes(model: PreTrainedModel, directory: Path) -> dict[str, int]:
    """Returns the bytes of a model's quantised parameters, by their own names; see `sizes`."""
    stored = sizes(directory)
    layers = {name: name.removesuffix(".weight") for name, _ in model.named_parameters()}
    return {name: stored[layer] for name, layer in layers.items() if layer in stored}


# --- writing


def write(model: PreTrainedModel, gguf: Path, directory: Path) -> None:
    """Writes each linear layer, the embedding and the experts with the GGUF file's own blocks, and all else as it is.

    model: the model that transformers made from the file, in bfloat16. A layer whose tensor is not in the file stays
    in bfloat16, see `_Sources.find`, and so does one whose numbers are all in bfloat16; other floats keep their own
    precision. A layer of blocks whose columns transformers has put in another order is rounded to 8 bits, and so are
    experts whose parts have blocks of several types.
    """
    sources = _Sources(gguf)
    packed: dict[str, PackedWeight] = {}
    by_storage: dict[int, PackedWeight] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Embedding) or not can_pack(layer.weight.shape[1]):
            continue
        storage = layer.weight.data_ptr()
        if storage in by_storage:
            packed[name] = by_storage[storage]
        elif (found := sources.find(layer.weight.data)) is not None:
            if isinstance(found, Codes) or _is_finer(found, name):
                packed[name] = by_storage[storage] = pack(found) if isinstance(found, Codes) else pack_floats(found)
        elif name.endswith(REORDERED) and sources.has_blocks_of(REORDERED_TENSOR):
            packed[name] = round_and_pack(layer.weight.data, INT8)
    for name, module in model.named_modules():
        if packed_experts.can_pack_experts(module):
            packed |= _packed_experts(sources, name, module)
    plain = {name: value for name, value in model.state_dict().items() if name.removesuffix(".weight") not in packed}
    save(packed, plain, directory / FILE)


def _is_finer(weight: torch.Tensor, name: str) -> bool:
    """Returns whether bfloat16, which all other weights have, would round a layer's weight."""
    return weight.dtype != torch.bfloat16 and not EXACT.search(name)


def _packed_experts(sources: "_Sources", name: str, module: nn.Module) -> dict[str, PackedWeight]:
    """Returns the parts of a mixture's experts; none where the file has floats, which stay as they are."""
    weights = {part: module.get_parameter(part).data for part in packed_experts.PARAMETERS}
    found = {
        part: sources.find_experts(weight, num_parts=2 if part == "gate_up_proj" else 1)
        for part, weight in weights.items()
    }
    if any(isinstance(codes, torch.Tensor) for codes in found.values()):
        return {}
    return {
        f"{name}.{part}": pack(codes) if isinstance(codes, Codes) else round_and_pack(weights[part].flatten(0, 1), INT8)
        for part, codes in found.items()
    }


def save(packed: Mapping[str, PackedWeight], plain: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes packed weights, by the names of their layers, and all other tensors."""
    first: dict[int, str] = {}  # of the layers that share a weight, as tied embeddings do
    same = {name: first.setdefault(id(weight), name) for name, weight in packed.items()}
    tensors: dict[str, torch.Tensor] = {}
    formats: dict[str, dict[str, Any]] = {}
    for name in first.values():
        formats[name] = {**asdict(packed[name].format), "num_rows": packed[name].num_rows}
        tensors |= {f"{name}.{part}": tensor for part, tensor in packed[name].parts.items()}
    aliases = _aliases(plain)
    tensors |= {name: value.contiguous() for name, value in plain.items() if name not in aliases}
    tables = {"layers": same, "formats": formats, "aliases": aliases}
    save_file(tensors, path, {name: json.dumps(table) for name, table in tables.items()})


def _aliases(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Maps the name of each tensor that shares another one's memory, as tied embeddings do, to that one's name."""
    first: dict[int, str] = {}
    result = {}
    for name, tensor in tensors.items():
        source = first.setdefault(tensor.data_ptr(), name)
        if source != name:
            result[name] = source
    return result


class _Sources:
    """The GGUF file's matrices for which no layer has been found yet."""

    def __init__(self, gguf: Path) -> None:
        from gguf import GGUFReader  # only the conversion needs it

        readable = {*gguf_blocks.BLOCK_BYTES, *gguf_blocks.FLOATS}
        matrices = (t for t in GGUFReader(gguf).tensors if t.tensor_type.name in readable)
        self._waiting = [tensor for tensor in matrices if len(tensor.shape) >= 2]
        self._places: dict[str, dict[int, int]] = {}  # by the tensor's name: the hash of a row -> its number
        self._types = {tensor.name: tensor.tensor_type.name for tensor in self._waiting}

    def has_blocks_of(self, tensor: str) -> bool:
        """Returns whether the file's tensors whose names end so have blocks."""
        return any(name.endswith(tensor) and kind in gguf_blocks.BLOCK_BYTES for name, kind in self._types.items())

    def find(self, weight: torch.Tensor) -> Codes | torch.Tensor | None:
        """Returns a layer's weight as the file has it, in the order of its rows: codes, or floats in the narrowest type
        that has all of them exactly; None if the file does not have its numbers.

        weight: (rows, columns) bfloat16, as transformers dequantised it.

        Names do not help: transformers renames tensors, and moves the rows of some (Llama's queries and keys are
        interleaved for the rotation), differently for each architecture and version. But a row's numbers stay what
        they were, so each row is found by its hash:
            places = {hash of a dequantised row of the file: number of the row}
            order = [places[hash of a row] for each row of the weight]
        If all rows are found, the file's codes in this order are the weight's codes, whatever the tensor's name.
        """
        first = _hashes(weight[:1])
        for tensor in self._waiting:
            if (math.prod(tensor.shape[1:]), tensor.shape[0]) != weight.shape:
                continue
            if tensor.name not in self._places:
                self._places[tensor.name] = _places(_read(tensor, len(weight)))
            places = self._places[tensor.name]
            if first.item() not in places:
                continue
            order = [places.get(value) for value in _hashes(weight).tolist()]
            if None not in order:
                self._waiting.remove(tensor)
                return _select(_read(tensor, len(weight)), torch.tensor(order))
        return None

    def find_experts(self, weight: torch.Tensor, num_parts: int) -> Codes | torch.Tensor | None:
        """Returns all experts' rows, one expert after the other, as the file has them: codes, or the first of their
        floats. None where it does not have them, or has them in several types.

        weight: (experts, rows, columns), whose rows come from as many tensors as it has parts: gate and up are apart.
        """
        found = [self.find(part.flatten(0, 1)) for part in weight.chunk(num_parts, dim=1)]
        if floats := [part for part in found if isinstance(part, torch.Tensor)]:
            return floats[0]
        parts = [codes for codes in found if isinstance(codes, Codes)]
        if len(parts) != num_parts or len({codes.format for codes in parts}) != 1:
            return None
        rows = torch.arange(len(parts[0].codes)).view(len(weight), -1)
        order = torch.cat([rows + index * rows.numel() for index in range(num_parts)], dim=1).flatten()
        return concatenated(parts).select(order)


def _read(tensor: Any, num_rows: int) -> Codes | torch.Tensor:
    """Returns a tensor of a GGUF file: (rows, columns)."""
    data = torch.from_numpy(tensor.data.reshape(num_rows, -1).copy())
    return gguf_blocks.read(data, tensor.tensor_type.name)


def _select(weight: Codes | torch.Tensor, rows: torch.Tensor) -> Codes | torch.Tensor:
    return weight.select(rows) if isinstance(weight, Codes) else narrowest(weight[rows])


def _places(weight: Codes | torch.Tensor) -> dict[int, int]:
    """Returns the number of each row by the hash of its numbers."""
    num_rows = len(weight.codes) if isinstance(weight, Codes) else len(weight)
    hashes: list[int] = []
    for start in range(0, num_rows, HASHED_ROWS):
        rows = slice(start, start + HASHED_ROWS)
        part = weight[rows] if isinstance(weight, torch.Tensor) else weight.select(torch.arange(num_rows)[rows])
        hashes += _hashes((part if isinstance(part, torch.Tensor) else part.dequantize()).bfloat16()).tolist()
    return {value: row for row, value in enumerate(hashes)}


def _hashes(rows: torch.Tensor) -> torch.Tensor:
    """Hashes each row of bfloat16: the sum of its bits times fixed random factors, modulo 2**64."""
    factors = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=torch.Generator().manual_seed(0))
    parts = rows.contiguous().view(torch.int16).split(HASHED_ROWS)
    return torch.cat([(part.long() * factors).sum(1) for part in parts])


# --- reading


def load(directory: Path, config: PreTrainedConfig, dtype: torch.dtype, attention: Any) -> PreTrainedModel:
    """Loads the model with packed layers; all other tensors get `dtype`, and layers of bfloat16 are packed too where
    the CPU multiplies it. Raises ModelLoadError if the file does not fit the model."""

    model = read(directory / FILE, builder(config, dtype, attention), dtype)
    read_generation_config(model, directory)
    return model


def builder(config: PreTrainedConfig, dtype: torch.dtype, attention: Any) -> Callable[[], PreTrainedModel]:
    """Returns what makes a model of a GGUF file, without weights."""
    return partial(AutoModelForCausalLM.from_config, config, dtype=dtype, attn_implementation=attention)


def read_generation_config(model: PreTrainedModel, directory: Path) -> None:
    if (directory / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(directory)


def read(path: Path, build: Callable[[], PreTrainedModel], dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Returns the model in a file. Raises ModelLoadError if the file does not fit it.

    build: makes the model, without weights. dtype: of the tensors that are not packed; None: the file's own.
    """
    packed, plain = weights(path)
    with init_empty_weights(include_buffers=False):
        model = build()
    # a large table, of which few rows are read, stays in the mapped file
    moved = {id(value): value.to(dtype or value.dtype, copy=value.nbytes < MAPPED_BYTES) for value in plain.values()}
    assign_plain(model, {name: moved[id(value)] for name, value in plain.items()}, packed, path)
    packing.install(model, packed if dtype != torch.bfloat16 else _bfloat16_layers(model, set(packed)) | packed)
    return model


def assign_plain(
    model: PreTrainedModel, plain: Mapping[str, torch.Tensor], packed: Mapping[str, object], path: Path
) -> None:
    """Puts tensors that are not packed in a model without weights. Raises ModelLoadError if the file has others.

    packed: what is packed, by the names of layers. path: the file.
    """
    result = model.load_state_dict(plain, strict=False, assign=True)
    missing = [name for name in result.missing_keys if name.removesuffix(".weight") not in packed]
    if missing or result.unexpected_keys:
        raise ModelLoadError(f"{path} belongs to another model: remove {path.parent} and start again.")


def weights(path: Path, is_mapped: bool = False) -> tuple[dict[str, PackedWeight], dict[str, torch.Tensor]]:
    """Reads a file: the packed weights by the names of their layers, and all other tensors, still in the mapped file.

    is_mapped: whether the packed weights stay there, too; else they are copied into aligned memory of the process.
    """
    with safe_open(path, "pt") as file:
        tables = {name: json.loads(table) for name, table in file.metadata().items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    formats = {name: _format(tensors, name, values, is_mapped) for name, values in tables["formats"].items()}
    packed = {name: formats[source] for name, source in tables["layers"].items()}
    return packed, tensors | {name: tensors[source] for name, source in tables["aliases"].items()}


def _bfloat16_layers(model: PreTrainedModel, packed: set[str]) -> dict[str, PackedWeight]:
    """Packs the linear layers that no others are packed with."""
    if not kernels.has_bfloat16():
        return {}
    layers: dict[str, PackedWeight] = {}
    for parameter, owners in packing.layers_to_pack(model).items():
        if not packed & set(owners):
            layers |= dict.fromkeys(owners, pack_floats(model.get_parameter(parameter).data))
    return layers


def _format(tensors: dict[str, torch.Tensor], name: str, values: dict[str, Any], is_mapped: bool) -> PackedWeight:
    num_rows, names = values.pop("num_rows"), {part: f"{name}.{part}" for part in PARTS}
    parts = {part: tensors.pop(name) for part, name in names.items() if name in tensors}
    parts = parts if is_mapped else {part: tensor.clone() for part, tensor in parts.items()}
    return PackedWeight(Format(**{**values, "table": tuple(values["table"])}), num_rows, **parts)  # JSON has lists
