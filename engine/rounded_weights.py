"""RoundedWeights: the weights that QUANTIZATION=int8 or int4 made of a model's files, kept from one start to the next.

Rounding takes a minute for a large model, reading its result seconds. Nothing is lost with a file of this cache: the
next start makes it again.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from engine import packed_loading, rounded_files
from engine.checked_model import CheckedModel, auto_class
from engine.cpu import kernels, packed_checkpoint, packed_experts, packed_layers, packed_weight, packing
from engine.cpu.packed_weight import PackedWeight
from engine.quantization import Quantization
from engine.quantized import awq, compressed_tensors, files, fp8, gptq, layout, mxfp4, records, weights
from engine.quantized.files import plain_config
from errors import ModelLoadError, first_line

log = logging.getLogger(__name__)
MAX_UNUSED = 7 * 86400.0  # seconds without use, after which what was made of other files is removed
CODE = (  # what decides the content of a file
    *(packed_checkpoint, packed_experts, packed_layers, packed_loading, packed_weight, packing),
    *(awq, compressed_tensors, files, fp8, gptq, layout, mxfp4, records, weights),
)


class RoundedWeights:
    """The file of one model in one format."""

    def __init__(self, cache_dir: Path, checked: CheckedModel, quantization: Quantization) -> None:
        self._checked = checked
        self._folder = cache_dir / rounded_files.FOLDER
        self._stem = rounded_files.stem(checked.directory, quantization.name)
        self._path = self._folder / f"{self._stem}-{_key(checked, quantization)}{rounded_files.SUFFIX}"

    def read(self, attention: Any) -> PreTrainedModel | None:
        """Returns the model, or None where it is not kept or the file is broken. attention: names of its functions."""
        if not self._path.exists():
            return None
        directory, config, dtype = self._checked.directory, plain_config(self._checked.config), self._checked.dtype
        build = partial(auto_class(config).from_config, config, dtype=dtype, attn_implementation=attention)
        try:
            model = packed_checkpoint.read(self._path, build)
            if (directory / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(directory)
            os.utime(self._path)  # which says when it was used last
        except (OSError, ValueError, KeyError, SafetensorError, ModelLoadError) as error:
            log.warning("%s cannot be read and is made again: %s", self._path, first_line(error))
            return None
        return model

    def write(self, packed: Mapping[str, PackedWeight], plain: Mapping[str, torch.Tensor]) -> None:
        """Keeps the packed weights, by the names of their layers, and all other tensors; not where the disk is full."""
        part = self._path.with_suffix(f".{os.getpid()}.part")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            packed_checkpoint.save(packed, plain, part)
            part.replace(self._path)
            self._remove_unused()
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                part.unlink()
            log.info("the rounded weights could not be kept: %s", first_line(error))

    def _remove_unused(self) -> None:
        """Removes what the same directory had before it or the code changed, and what no start used for long."""
        for other in self._folder.glob("*"):
            is_replaced = other.name.startswith(f"{self._stem}-") and other.suffix == self._path.suffix
            if other != self._path and (is_replaced or other.stat().st_mtime < time.time() - MAX_UNUSED):
                other.unlink()


def _key(checked: CheckedModel, quantization: Quantization) -> str:
    """Hashes what decides the content: the model's files, the format and data type, our code, transformers' version,
    and whether the CPU multiplies bfloat16, without which some weights are not packed."""
    files = sorted(path for path in checked.directory.iterdir() if path.suffix in (".safetensors", ".json"))
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    code = [Path(str(module.__file__)).read_text() for module in CODE]
    return rounded_files.short_hash(
        json.dumps(
            (states, str(quantization), str(checked.dtype), transformers.__version__, kernels.has_bfloat16(), code)
        )
    )
