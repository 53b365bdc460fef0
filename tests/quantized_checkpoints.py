"""Tiny quantised checkpoints, in the layouts that AutoGPTQ, AutoAWQ, LLM Compressor and Qwen publish.

Each `write_*` function takes a weight and returns its tensors, as the format's own packer writes them, and the weight
that they stand for, in float32. `save` makes a checkpoint of a tiny model, and the tensors of a stock model with the
dequantised weights.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from models import tiny_gemma_that_sees, tiny_model
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Write = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]  # weight -> its tensors by what they end with, its value
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs of a word, from its lowest bits on
SIZES = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 32}


def rounded(
    weight: torch.Tensor, bits: int, group: int, is_symmetric: bool, index: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns codes (rows, columns), scales and zeros (rows, groups), and the weight that they stand for.

    index: the group of each column; None: groups of neighbours. group: -1 for one group.
    """
    columns = weight.shape[1]
    if index is None:
        index = torch.arange(columns) // (columns if group == -1 else group)
    largest, num_groups = 2**bits - 1, int(index.max()) + 1
    parts = [weight[:, index == number] for number in range(num_groups)]
    low = torch.stack([part.amin(1) for part in parts], 1).clamp(max=0)
    high = torch.stack([part.amax(1) for part in parts], 1).clamp(min=0)
    if is_symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scales = _not_zero(((high - low) / largest).half().float())
    zeros = torch.full_like(scales, 2 ** (bits - 1)) if is_symmetric else (-low / scales).round().clamp(0, largest)
    codes = (weight / scales[:, index] + zeros[:, index]).round().clamp(0, largest)
    return codes.int(), scales, zeros.int(), (codes - zeros[:, index]) * scales[:, index]


def _not_zero(scales: torch.Tensor) -> torch.Tensor:
    """Gives what is zero everywhere another scale."""
    return torch.where(scales == 0, 1.0, scales)


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs rows of codes into words of 32 bits, the lowest bits first: (rows, columns) -> (rows, words) int32."""
    per_word = 32 // bits
    parts = codes.long().unflatten(1, (-1, per_word)) << torch.arange(0, 32, bits)
    return parts.sum(-1).to(torch.uint32).view(torch.int32)


def gptq(bits: int, group: int, is_symmetric: bool, is_v2: bool = False, act_order: bool = False) -> Write:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        columns = weight.shape[1]
        index = torch.arange(columns) // (columns if group == -1 else group)
        if act_order:
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
        codes, scales, zeros, value = rounded(weight, bits, group, is_symmetric, index)
        stored = zeros if is_v2 else (zeros - 1) % 2**bits
        tensors = {
            ".qweight": words(codes, bits).T.contiguous(),
            ".qzeros": words(stored.T, bits),
            ".scales": scales.T.half().contiguous(),
            ".g_idx": index.int(),
        }
        return tensors, value

    return write


def awq(group: int) -> Write:
    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, scales, zeros, value = rounded(weight, 4, group, is_symmetric=False)
        order = torch.tensor(AWQ_ORDER)
        interleaved = [part.T.unflatten(1, (-1, 8))[..., order].flatten(1) for part in (codes, zeros)]
        return {
            ".qweight": words(interleaved[0], 4),
            ".qzeros": words(interleaved[1], 4),
            ".scales": scales.T.half().contiguous(),
        }, value

    return write


def packed(bits: int, group: int, is_symmetric: bool, dtype: torch.dtype = torch.bfloat16) -> Write:
    """compressed-tensors' pack-quantized."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        _, scales, zeros, _ = rounded(weight, bits, group, is_symmetric)
        scales = scales.to(dtype).float()
        spread = [part.repeat_interleave(weight.shape[1] // part.shape[1], 1) for part in (scales, zeros)]
        codes = (weight / spread[0] + spread[1]).round().clamp(0, 2**bits - 1)
        tensors = {
            ".weight_packed": words(codes, bits),
            ".weight_scale": scales.to(dtype),
            ".weight_shape": torch.tensor(weight.shape),
        }
        if not is_symmetric:
            tensors[".weight_zero_point"] = words(zeros.T, bits).T.contiguous()
        return tensors, (codes - spread[1]) * spread[0]

    return write


def int8(dtype: torch.dtype = torch.bfloat16) -> Write:
    """compressed-tensors' int-quantized: W8A8 with a scale for each row."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scales = _not_zero((weight.abs().amax(1, keepdim=True) / 127).to(dtype).float())
        codes = (weight / scales).round().clamp(-128, 127)
        return {".weight": codes.to(torch.int8), ".weight_scale": scales.to(dtype)}, codes * scales

    return write


def fp8(suffix: str, block: tuple[int, int] | None, per_row: bool = False) -> Write:
    """Numbers of 8 bits with scales for blocks, rows, or the tensor, in float32. suffix: of the scales' name."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        rows, columns = weight.shape
        size = block or ((1, columns) if per_row else (rows, columns))
        padded = torch.nn.functional.pad(weight, (0, -columns % size[1], 0, -rows % size[0]))
        blocks = padded.unflatten(1, (-1, size[1])).unflatten(0, (-1, size[0]))
        scales = _not_zero(blocks.abs().amax((1, 3)) / 448)
        spread = scales.repeat_interleave(size[0], 0)[:rows].repeat_interleave(size[1], 1)[:, :columns]
        codes = (weight / spread).to(torch.float8_e4m3fn)
        is_whole = block is None and not per_row
        return {".weight": codes, suffix: scales.view(1) if is_whole else scales}, codes.float() * spread

    return write


def save(
    directory: Path,
    write: Write,
    scheme: Mapping[str, Any],
    family: str = "qwen3",
    layers: str = r"(proj|experts\.\d+\.\w+)$",
    **changes: Any,
) -> Tensors:
    """Saves a tiny model whose linear layers are written by `write`, and returns the tensors of a model with the
    weights that these stand for. layers: a pattern of their names."""
    tiny_model(family, **{**SIZES, **changes}).bfloat16().save_pretrained(directory)
    return rewrite(directory, write, scheme, layers)


def save_seeing(directory: Path, write: Write, scheme: Mapping[str, Any]) -> Tensors:
    """Saves a tiny model that sees, of which the text's linear layers are quantised."""
    tiny_gemma_that_sees(190).bfloat16().save_pretrained(directory)
    return rewrite(directory, write, scheme, r"language_model.*proj$")


def rewrite(directory: Path, write: Write, scheme: Mapping[str, Any], layers: str) -> Tensors:
    """Quantises the layers of a checkpoint; see `save`."""
    tensors, expected = load_file(directory / "model.safetensors"), Tensors()
    result = dict(tensors)
    for name, value in tensors.items():
        stem = name.removesuffix(".weight")
        expected[name] = value.float()
        if stem != name and re.search(layers, stem):
            parts, expected[name] = write(value.float())
            del result[name]
            result |= {stem + part: tensor.contiguous() for part, tensor in parts.items()}
    save_file(result, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": dict(scheme)}))
    return expected


def mxfp4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' mxfp4-pack-quantized: numbers of 4 bits, and scales that are powers of two."""
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    grouped = weight.unflatten(1, (-1, 32))
    exponents = _not_zero(grouped.abs().amax(-1)).log2().floor() - 2
    scaled = grouped / exponents.exp2()[..., None]
    nearest = (scaled.abs()[..., None] - grid).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).flatten(1)
    value = (grid[nearest] * scaled.sign() * exponents.exp2()[..., None]).flatten(1)
    pairs = codes.unflatten(1, (-1, 2))
    return {
        ".weight_packed": (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8),
        ".weight_scale": (exponents + 127).to(torch.uint8),
    }, value


def save_plain(directory: Path, quantized: Path, expected: Tensors) -> None:
    """Saves the model that a quantised checkpoint stands for, in float32."""
    directory.mkdir()
    config = json.loads((quantized / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    save_file(expected, directory / "model.safetensors", {"format": "pt"})


def change(directory: Path, edit: Callable[[Tensors], object]) -> None:
    """Changes the tensors of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def mxfp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' mxfp8-quantized: E4M3 with a power of two for each 32 columns."""
    grouped = weight.unflatten(1, (-1, 32))
    exponents = (_not_zero(grouped.abs().amax(-1)) / 448).log2().ceil()
    codes = (grouped / exponents.exp2()[..., None]).flatten(1).to(torch.float8_e4m3fn)
    value = (codes.float().unflatten(1, (-1, 32)) * exponents.exp2()[..., None]).flatten(1)
    return {".weight": codes, ".weight_scale": (exponents + 127).to(torch.uint8)}, value
