"""Models as a GPU has them, with packed weights: on a GPU where there is one, else on the CPU, whose layers then run in
Triton's interpreter."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from devices import DEVICE
from models import tiny_model
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from engine.attention import flash
from engine.build import build_engine, model_runner_of
from engine.checked_model import CheckedModel, check_model
from engine.cpu.packing import pack_model
from engine.engine import Engine, EngineOptions
from engine.model_loader import load_model
from engine.model_runner import ModelRunner
from engine.quantization import QUANTIZATIONS

IS_OLD = Version(transformers.__version__) < Version("5.23")
NEEDS_NEW = pytest.mark.skipif(IS_OLD, reason="the engine needs a newer transformers for this; see requirements.txt")
OPTIONS = EngineOptions(max_num_batched_tokens=24, max_num_mixed_tokens=24, max_num_seqs=6, kv_block_size=8)


class OnGPU(CheckedModel):
    """Is loaded as on a GPU, whether there is one or not."""

    @property
    def is_on_cuda(self) -> bool:
        return True


def load_on_gpu(directory: Path, quantization: str = "auto", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a checkpoint; what is not packed gets `dtype`."""
    checked = check_model(directory, "auto", "cpu")
    fields = {name: getattr(checked, name) for name in CheckedModel.__dataclass_fields__}
    own = OnGPU(**{**fields, "dtype": dtype, "device_map": str(DEVICE)})
    return load_model(own, lambda phase, fraction: None, quantization)


def packed_model(
    family: str, quantization: str = "int8", dtype: torch.dtype = torch.float32, **changes: object
) -> PreTrainedModel:
    """Returns a tiny model with packed weights. dtype: of its activations."""
    from engine.gpu.packing import GPU_FORM

    model = tiny_model(family, **changes).to(device=DEVICE, dtype=dtype)
    pack_model(model, QUANTIZATIONS[quantization], form=GPU_FORM)
    return model


def plain_twin(model: PreTrainedModel, stock: PreTrainedModel) -> PreTrainedModel:
    """Returns a stock model with the numbers that a packed one's weights stand for. stock: of the same shape."""
    from engine.gpu import packed_experts, packed_layers, products

    twin = copy.deepcopy(stock).to(device=DEVICE, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            own = twin.get_submodule(name) if not isinstance(module, nn.Identity) else None
            if isinstance(module, packed_layers.PackedLinear | packed_layers.PackedEmbedding):
                weight = products.dequantised(module.packed, torch.float32)
                own.weight.data = weight
            elif isinstance(module, packed_experts.PackedExperts):
                for part, packed in module.packed.items():
                    parameter = own.get_parameter(part)
                    parameter.data = products.dequantised(packed, torch.float32).view_as(parameter)
    return twin


def engine_on_gpu(model: PreTrainedModel, is_fused: bool = True) -> Engine:
    """Returns an engine with one call of attention for all sequences, and fused layers, as a GPU has them."""
    from engine.gpu import triton_layers

    if is_fused:
        triton_layers.fuse_gpu_layers(model)
    engine = build_engine(model, OPTIONS, frozenset())
    if DEVICE.type == "cpu":
        engine.runner = ModelRunner(model, model_runner_of(engine).cache, flash=flash.reference)
    return engine
