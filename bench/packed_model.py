"""Models in true shapes whose weights are random codes, made on the device: nothing is read, and nothing rounded."""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from engine.attention import paged
from engine.cpu.packed_weight import INT4, INT8, Q4_K, Q6_K, SUPER_BLOCK, Codes, Format
from engine.gpu.packed_weight import GPUWeight, joined, pack

FORMATS = {  # as checkpoints have them -> of the layers, and of the output layer
    "int8": (INT8, INT8),
    "int4": (INT4, INT8),
    "q4_k": (Q4_K, Q6_K),
}
SPREAD = 0.02  # of the weights, as models are initialised
WHOLE = 32  # about the middle of the scales of super-blocks
PART = 2**26  # numbers of a weight that are made at a time


def random_weight(fmt: Format, num_rows: int, num_columns: int, device: torch.device) -> GPUWeight:
    """Returns a packed weight, about PART numbers of which are made at a time."""
    step = max(1, PART // num_columns)
    starts = range(0, num_rows, step)
    return joined([pack(_random_codes(fmt, min(step, num_rows - start), num_columns, device)) for start in starts])


def _random_codes(fmt: Format, num_rows: int, num_columns: int, device: torch.device) -> Codes:
    """Returns codes whose numbers are spread around zero as SPREAD says; no two scales need be alike."""
    scale, middle = SPREAD * 12**0.5 / 2**fmt.bits, (2**fmt.bits - 1) / 2
    codes = torch.randint(0, 2**fmt.bits, (num_rows, num_columns), dtype=torch.uint8, device=device)
    factors = 0.5 + torch.rand(num_rows, num_columns // fmt.group, device=device)
    if not fmt.has_super_blocks:
        scales = (factors * scale).half()
        return Codes(fmt, codes, scales, -middle * scales if fmt.has_minimum else None)
    assert num_columns % SUPER_BLOCK == 0, "rows are whole super-blocks"
    wholes = (factors * WHOLE).to(torch.int8)
    sizes = torch.tensor([scale, -middle * scale][: 1 + fmt.has_minimum], device=device) / WHOLE
    supers = sizes.half().repeat(num_rows, num_columns // SUPER_BLOCK, 1)
    return Codes(fmt, codes, wholes, wholes if fmt.has_minimum else None, supers)


def build(config: PreTrainedConfig, quantization: str, device: torch.device) -> Any:
    """Returns a model in bfloat16 whose linear layers are packed; an embedding that is the output layer too, likewise.
    quantization: one of FORMATS."""
    from engine.gpu.packing import install

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=paged.NAME).eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    inner, outer = FORMATS[quantization]
    packed = {
        name: random_weight(outer if layer is head else inner, layer.out_features, layer.in_features, device)
        for name, layer in layers.items()
    }
    if embedding.weight is head.weight:
        names = {module: name for name, module in model.named_modules()}
        packed[names[embedding]] = packed[names[head]]
    install(model, packed)
    _fill(model, device)
    return model


def _fill(model: Any, device: torch.device) -> None:
    """Gives the other parameters the numbers that training begins with."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device=device)
            module.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    model.to(device)
    model.apply(model._init_weights)


def num_bytes_of(model: Any) -> int:
    """Returns the bytes of the packed weights, each counted once."""
    weights = {id(module.packed): module.packed for module in model.modules() if hasattr(module, "packed")}
    return sum(weight.num_bytes for weight in weights.values())
