"""QuantizedFiles: the tensors of a quantised checkpoint as transformers loads them, each weight read when asked for."""

import logging
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

from engine import weight_files
from engine.cpu.packed_weight import BFLOAT16, GROUP, INT8, Format, quantize_weight
from engine.quantized import awq, compressed_tensors, fp8, gptq, records
from engine.quantized.layout import Layout
from engine.quantized.weights import StoredWeight
from errors import ModelLoadError

log = logging.getLogger(__name__)
READERS = {  # quant_method -> the layouts of its weights
    "gptq": gptq.layouts,
    "awq": awq.layouts,
    "fp8": fp8.layouts,
    "compressed-tensors": compressed_tensors.layouts,
}
EXPERT = re.compile(r"\.experts\.\d+\.")
SHARED = 128  # columns that have a scale in common, at most, on GPUs
FACTORS = 4  # bytes of a scale and a minimum for each group of columns


def can_read(scheme: Any) -> bool:
    """Returns whether this server reads a checkpoint with such a quantization_config."""
    return scheme is not None and weight_files.method_of(scheme) in READERS


def plain_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns the configuration of the model that a checkpoint was before it was quantised."""
    result: Any = deepcopy(config)
    for part in (result, result.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return cast(PreTrainedConfig, result)


class MixedExperts(ModelLoadError):
    """The weights of a mixture's experts are not all in one format, and the kernels compute them together."""


class QuantizedFiles:
    """The files of one checkpoint."""

    def __init__(self, directory: Path, scheme: Any, rounds_experts: bool = False) -> None:
        """scheme: the model's quantization_config. rounds_experts: has all experts rounded to 8 bits, so that they are
        alike. Raises ModelLoadError for a format that is not read."""
        self.rounds_experts = rounds_experts
        self.failure: ModelLoadError | None = None  # transformers says no more than that something failed
        self._experts: dict[str, tuple[int, int]] = {}  # how their records are, by the name for all experts
        self._directory = directory
        self._headers = weight_files.read_headers(directory)
        values = scheme if isinstance(scheme, dict) else scheme.to_dict()
        try:
            layouts = READERS[weight_files.method_of(scheme)](values)
        except ModelLoadError as error:
            raise ModelLoadError(f"The model in {directory} cannot be served. {error}") from error
        self._weights: dict[str, tuple[Layout, dict[str, str]]] = {}  # by the names of tensors with codes
        for name, tensor in self._headers.items():
            if not weight_files.CODES.match(tensor.dtype):
                continue
            found = ((layout, layout.parts_of(name, self._headers)) for layout in layouts)
            if first := next(((layout, parts) for layout, parts in found if parts is not None), None):
                self._weights[name] = first
        self._sizes = {
            _place(layout.target_of(name)): self._size_of(layout, parts)
            for name, (layout, parts) in self._weights.items()
        }
        self._others: Counter[Format] = Counter()  # weights that are kept in another format than the file's own
        self._check_codes()

    def _check_codes(self) -> None:
        """Raises ModelLoadError for codes without their scales, which would be taken for weights."""
        read = {part for _, parts in self._weights.values() for part in parts.values()}
        codes = [n for n, tensor in self._headers.items() if weight_files.is_codes(tensor, n) and n not in read]
        if codes:
            raise ModelLoadError(
                f"The model in {self._directory} stores {weight_files.some(codes)} as {self._headers[codes[0]].dtype} "
                "without the scales that belong to it: download the checkpoint again, or take another one."
            )

    def num_saved_bytes(self) -> int:
        """Returns how much less memory the file's own codes take than codes of 8 bits, about."""
        return sum(
            int(self._headers[name].num_bytes * 8 / layout.bits * (INT8.bytes_per_weight - layout.bits / 8))
            - int(self._headers[name].num_bytes * 8 / layout.bits * FACTORS / GROUP)
            for name, (layout, _) in self._weights.items()
        )

    def element_size(self, name: str) -> float | None:
        """Returns the bytes of a number of a parameter in the file's own codes, with its part of the factors, as GPUs
        keep them; None where it has no codes there. name: as the model has it, in which only the beginning may be
        another."""
        return self._sizes.get(_place(name))

    def _size_of(self, layout: Layout, parts: Mapping[str, str]) -> float:
        """A scale of 16 bits, and a minimum if there are zeros, belong to as many columns as share them, up to SHARED;
        symmetric codes may have zeros, too, which are then not kept."""
        codes = self._headers[parts[layout.codes]].num_bytes * 8 / layout.bits
        scales = self._headers[parts[layout.required[-1]]].num_elements
        columns = max(GROUP, min(SHARED, GROUP * int(codes / scales / GROUP)))
        has_zeros = any("zero" in part for part in parts)
        return layout.kept_bits / 8 + 2 * (1 + has_zeros) / columns

    def state_dict(self, stack: ExitStack) -> dict[str, Any]:
        """Returns all tensors, each as transformers reads those of files: when asked for. stack: closes the files."""
        slices: dict[str, Any] = {}
        for path in weight_files.weight_paths(self._directory):
            file = stack.enter_context(safe_open(path, "pt"))
            slices |= {name: file.get_slice(name) for name in file.keys()}
        taken = {part for _, parts in self._weights.values() for part in parts.values()}
        plain: dict[str, Any] = {name: value for name, value in slices.items() if name not in taken}
        stored: dict[str, Any] = {}
        for name, (layout, parts) in self._weights.items():
            target = layout.target_of(name)
            stored[target] = Stored(target, layout, {part: slices[tensor] for part, tensor in parts.items()}, self)
        experts = {_of_all(name) for name in stored if EXPERT.search(name)}
        for name in [name for name in plain if _of_all(name) in experts]:
            if not self.rounds_experts:
                raise self._mixed(name)
            stored[name] = Plain(plain.pop(name))
        stack.callback(self._log_others)
        return plain | stored

    def records_of(self, name: str, weight: StoredWeight) -> torch.Tensor:
        """Returns what transformers gets for a weight; see records.py. Raises MixedExperts."""
        is_expert = EXPERT.search(name) is not None
        if is_expert and self.rounds_experts:
            return records.of_codes(quantize_weight(weight.dequantize(torch.float32), INT8))
        codes = weight.codes_for_kernels()
        if codes is None:
            codes = weight.in_8_bits()
            self._others[INT8 if codes is not None else BFLOAT16] += 1
        result = records.of_numbers(weight.dequantize(torch.bfloat16)) if codes is None else records.of_codes(codes)
        kind = (result.shape[1], int(result[0, 0]))
        if is_expert and self._experts.setdefault(_of_all(name), kind) != kind:
            raise self._mixed(name)
        return result

    def _mixed(self, name: str) -> ModelLoadError:
        self.failure = MixedExperts(
            f"{name}: It is not in the format of the other experts, or its codes have groups of columns or scales that "
            "the CPU's kernels do not have: set QUANTIZATION=int8, which rounds all experts again."
        )
        return self.failure

    def _log_others(self) -> None:
        for fmt, count in self._others.items():
            kind = "8 bits in groups of 32" if fmt.is_quantized else "bfloat16"
            log.info("weights whose columns or scales the kernels' formats do not have, kept in %s: %d", kind, count)


def _of_all(name: str) -> str:
    """Returns a name for the weights of all experts."""
    return EXPERT.sub(".experts.*.", name)


def _place(name: str) -> str:
    """Returns a parameter's place from its layer on, the same one for all experts: what is before differs between a
    checkpoint and the model, and so may the names of experts."""
    place, experts, _ = name[max(name.rfind("layers."), 0) :].partition(".experts.")
    return place + experts


@dataclass(frozen=True)
class Stored:
    """A weight in its files, which transformers takes for one of their tensors."""

    name: str
    layout: Layout
    parts: Mapping[str, Any]
    files: QuantizedFiles

    def __getitem__(self, index: Any) -> "Stored":
        return self

    def to(self, device: Any, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weight's records; see records.py. device, dtype: those of the model's parameter."""
        with torch.inference_mode(), torch.device(device):
            weight = self.layout.read({part: value[...].to(device) for part, value in self.parts.items()})
            return self.files.records_of(self.name, weight)


@dataclass(frozen=True)
class Plain:
    """A weight that is no codes in its file, beside others that are."""

    value: Any

    def __getitem__(self, index: Any) -> "Plain":
        return self

    def to(self, device: Any, dtype: torch.dtype) -> torch.Tensor:
        with torch.inference_mode(), torch.device(device):
            return records.of_codes(quantize_weight(self.value[...].to(device).float(), INT8))
