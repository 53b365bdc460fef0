"""Quantization: one row for each format that a model's weights can have in memory, and the choice among them.

Plain data without torch, so that the settings can list the names. A format is added as a row here: the loader, the
settings, their help and the log read the rest from it. How the CPU's kernels store `packed_bits` bits of a weight is
engine/cpu/packed_weight.py's matter; for those of GPUs, engine/gpu/packed_weight.py's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from errors import ModelLoadError

AUTO = "auto"  # the setting that leaves the choice to `choose`
CPU, GPU = "cpu", "gpu"  # what this server has kernels for
STOCK = "stock"  # the model's own layers, as they are: what tests and benchmarks compare with


@dataclass(frozen=True)
class Quantization:
    """A format of weights, and what it takes to load them in it."""

    name: str
    description: str  # completes "weights: ..." in the log
    is_setting: bool = True  # whether QUANTIZATION can be set to its name
    needs_kernels: bool = False  # this server's own, of the CPU or a GPU
    packed_bits: int | None = None  # bits of a weight that the loader packs for these kernels
    packed_head_bits: int | None = None  # the same for the output layer, whose rounding matters most
    keeps_codes: bool = False  # whether the codes of a quantised checkpoint stay as they are, whatever their bits
    rounds_numbers: bool = True  # whether what such a checkpoint has left as it was is rounded
    bitsandbytes: Mapping[str, Any] = field(default_factory=dict, hash=False)  # options of BitsAndBytesConfig


def _packed(name: str, description: str, bits: int, head_bits: int, is_setting: bool = True) -> Quantization:
    return Quantization(name, description, is_setting, needs_kernels=True, packed_bits=bits, packed_head_bits=head_bits)


NONE = Quantization("none", "as in the model's files, not quantized")
FROM_FILE = Quantization("from file", "the GGUF file's own blocks", is_setting=False, needs_kernels=True)
ROUNDED = _packed("int8", "8 bits in groups of 32, rounded to nearest", bits=8, head_bits=8)
OWN_CODES = replace(
    _packed("checkpoint", "the checkpoint's own codes, and 8 bits for what it left as it was", 8, 8, is_setting=False),
    keeps_codes=True,
)
CODES_ALONE = replace(OWN_CODES, description="the checkpoint's own codes", rounds_numbers=False)
BFLOAT16_KERNELS = _packed("bfloat16", "bfloat16, not quantized", bits=16, head_bits=16, is_setting=False)
HALVES = _packed("float16", "float16, with activations in float32", bits=16, head_bits=16, is_setting=False)
ROWS = (
    NONE,
    ROUNDED,
    _packed("int4", "4 bits in groups of 32, the output layer 8 bits", bits=4, head_bits=8),
    # The options of bitsandbytes: https://huggingface.co/docs/transformers/quantization/bitsandbytes
    Quantization(
        "nf4",
        "4 bits (NF4) by bitsandbytes",
        bitsandbytes={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    ),
    Quantization("bnb-8bit", "8 bits by bitsandbytes", bitsandbytes={"load_in_8bit": True}),
    Quantization(
        "bnb-4bit",
        "4 bits (FP4) by bitsandbytes",
        bitsandbytes={"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    ),
    OWN_CODES,
    BFLOAT16_KERNELS,
    HALVES,
    FROM_FILE,
)
QUANTIZATIONS = {row.name: row for row in ROWS}
SETTINGS = (AUTO, *(row.name for row in ROWS if row.is_setting))  # what QUANTIZATION can be set to


def choose(
    setting: str, dtype: str, kernels: str | None, has_packed_file: bool, has_own_codes: bool = False
) -> Quantization:
    """Returns the format that a setting of QUANTIZATION stands for.

    `auto` keeps a GGUF file's own blocks and a quantised checkpoint's own codes. On a CPU it gives other files 8 bits,
    which changes the perplexity by less than 1 %; a GPU has them as they are. A data type that DTYPE asks for is kept.
    Raises ModelLoadError for a format that this device cannot have.

    setting: one of SETTINGS, or STOCK. dtype: the setting DTYPE. kernels: CPU or GPU, of which this server has kernels
    for the device that the model will run on; None: it has none. has_packed_file: whether the model was converted from
    a GGUF file. has_own_codes: whether its files are quantised in a way that this server reads.
    """
    if setting == STOCK:
        return NONE
    if setting == AUTO:
        if kernels is None or dtype != "auto":
            return NONE
        if has_packed_file:
            return FROM_FILE
        if has_own_codes:
            return OWN_CODES if kernels == CPU else CODES_ALONE
        return ROUNDED if kernels == CPU else NONE
    row = QUANTIZATIONS[setting]
    if row.needs_kernels and kernels is None:
        others = ", ".join(other.name for other in ROWS if other.bitsandbytes)
        raise ModelLoadError(
            f"QUANTIZATION={setting} needs a CPU under Linux, or a GPU with Triton: set one of {others} on another GPU."
        )
    return row
