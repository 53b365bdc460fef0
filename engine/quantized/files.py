"""QuantizedFiles: the tensors of a quantised checkpoint as transformers loads them, each weight read when asked for."""

import logging
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
from engine.cpu.packed_weight import BFLOAT16, GROUP, INT8, Format
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


class QuantizedFiles:
    """The files of one checkpoint."""

    def __init__(self, directory: Path, scheme: Any) -> None:
        """scheme: the model's quantization_config. Raises ModelLoadError for a format that is not read."""
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

    def state_dict(self, stack: ExitStack) -> dict[str, Any]:
        """Returns all tensors, each as transformers reads those of files: when asked for. stack: closes the files."""
        slices: dict[str, Any] = {}
        for path in weight_files.weight_paths(self._directory):
            file = stack.enter_context(safe_open(path, "pt"))
            slices |= {name: file.get_slice(name) for name in file.keys()}
        taken = {part for _, parts in self._weights.values() for part in parts.values()}
        plain = {name: value for name, value in slices.items() if name not in taken}
        others = self._others
        stored = {
            layout.target_of(name): Stored(layout, {part: slices[tensor] for part, tensor in parts.items()}, others)
            for name, (layout, parts) in self._weights.items()
        }
        stack.callback(self._log_others)
        return plain | stored

    def _log_others(self) -> None:
        for fmt, count in self._others.items():
            kind = "8 bits in groups of 32" if fmt.is_quantized else "bfloat16"
            log.info("weights whose columns or scales the kernels' formats do not have, kept in %s: %d", kind, count)


@dataclass(frozen=True)
class Stored:
    """A weight in its files, which transformers takes for one of their tensors."""

    layout: Layout
    parts: Mapping[str, Any]
    others: Counter[Format]

    def __getitem__(self, index: Any) -> "Stored":
        return self

    def to(self, device: Any, dtype: torch.dtype) -> torch.Tensor:
        """Returns the weight's records; see records.py. device, dtype: those of the model's parameter."""
        with torch.inference_mode():
            return self._records(self.layout.read({part: value[...] for part, value in self.parts.items()}))

    def _records(self, weight: StoredWeight) -> torch.Tensor:
        if (codes := weight.codes_for_kernels()) is not None:
            return records.of_codes(codes)
        codes = weight.in_8_bits()
        self.others[INT8 if codes is not None else BFLOAT16] += 1
        return records.of_numbers(weight.dequantize(torch.bfloat16)) if codes is None else records.of_codes(codes)
