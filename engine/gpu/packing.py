"""GPU_FORM: how GPUs store packed weights; and the loading of what was converted from a GGUF file on GPUs.

The blocks of the file are kept as they are. On their device they change from the order of the CPU's kernels, which the
converted file has, into that of the GPU's, a layer at a time.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from engine.cpu import packed_checkpoint
from engine.cpu.packed_weight import PackedWeight
from engine.cpu.packing import PackedForm
from engine.gpu import packed_layers, packed_weight
from engine.gpu.packed_weight import GPUWeight

GPU_FORM = PackedForm(
    pack=packed_weight.pack,
    round_and_pack=packed_weight.round_and_pack,
    pack_floats=None,
    install=packed_layers.install,
)


def load(
    directory: Path, config: PreTrainedConfig, dtype: torch.dtype, attention: Any, device_map: str
) -> PreTrainedModel:
    """Loads a model from what was converted from a GGUF file; numbers without codes get `dtype`. Raises ModelLoadError
    if the file does not fit the model."""
