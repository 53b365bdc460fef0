"""The layouts of quantised checkpoints that are tested: how a weight is written, what config.json says, and the format
that the kernels keep it in."""

from typing import Any

import quantized_checkpoints as made
from quantized_checkpoints import Write

from engine.cpu.packed_weight import E4M3, INT8, Format

Scheme = dict[str, Any]
Case = tuple[Write, Scheme, Format]


def gptq(bits: int, group: int, is_symmetric: bool, is_v2: bool = False) -> Case:
    scheme = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": is_symmetric, "desc_act": False}
    symmetric = Format(bits, offset=2 ** (bits - 1))
    other = Format(bits, offset=128 if bits == 8 else 0, has_minimum=True)
    return (
        made.gptq(bits, group, is_symmetric, is_v2),
        {**scheme, "checkpoint_format": "gptq_v2" if is_v2 else "gptq"},
        symmetric if is_symmetric else other,
    )


def awq(group: int) -> Case:
    scheme = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return made.awq(group), scheme, Format(4, has_minimum=True)


def compressed(write: Write, name: str, fmt: Format, **weights: Any) -> Case:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    scheme = {"quant_method": "compressed-tensors", "format": name, "config_groups": groups, "ignore": ["lm_head"]}
    return write, scheme, fmt


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCK = (128, 128)
CASES: dict[str, Case] = {
    **{
        f"gptq-{bits}-{group}-{'sym' if is_symmetric else 'asym'}": gptq(bits, group, is_symmetric)
        for bits, group, is_symmetric in [
            *[(4, group, is_symmetric) for group in (32, 64, 128, -1) for is_symmetric in (True, False)],
            *[(8, 32, True), (8, 128, False), (8, -1, True), (2, 64, True)],
        ]
    },
    "gptq-v2": gptq(4, 64, False, is_v2=True),
    **{f"awq-{group}": awq(group) for group in (32, 64, 128)},
    **{
        f"packed-{bits}-{group}-{'sym' if is_symmetric else 'asym'}": compressed(
            made.packed(bits, group, is_symmetric),
            "pack-quantized",
            gptq(bits, group, is_symmetric)[2],
        )
        for bits, group, is_symmetric in [(4, 32, True), (4, 128, True), (4, -1, True), (4, 64, False), (8, 64, False)]
    },
    "int8": compressed(made.int8(), "int-quantized", INT8),
    "fp8-blocks": (made.fp8(".weight_scale_inv", BLOCK), {**FP8, "weight_block_size": [*BLOCK]}, E4M3),
    "fp8-tensor": (made.fp8(".weight_scale", None), FP8, E4M3),
    "fp8-rows": (made.fp8(".weight_scale", None, per_row=True), FP8, E4M3),
    "float-tensor": compressed(made.fp8(".weight_scale", None), "float-quantized", E4M3),
    "float-rows": compressed(made.fp8(".weight_scale", None, per_row=True), "float-quantized", E4M3),
    "float-blocks": compressed(
        made.fp8(".weight_scale", BLOCK), "float-quantized", E4M3, strategy="block", block_structure=[*BLOCK]
    ),
    "mxfp8": compressed(made.mxfp8, "mxfp8-quantized", E4M3),
    "mxfp4": compressed(made.mxfp4, "mxfp4-pack-quantized", Format(5, offset=16)),
}
