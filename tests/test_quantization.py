"""The table of quantizations: each row says in one way how weights are loaded, and the settings take their names."""

from typing import get_args

import pytest
import torch

from config import Settings
from engine import quantization
from engine.cpu.packed_weight import format_of
from engine.quantization import QUANTIZATIONS, ROWS, SETTINGS, choose
from errors import ModelLoadError


def test_names_are_unique_and_those_that_can_be_set_are_choices_of_the_setting() -> None:
    assert len(QUANTIZATIONS) == len(ROWS)
    assert get_args(Settings.model_fields["quantization"].annotation) == SETTINGS
    assert SETTINGS == ("auto", "none", "int8", "int4", "nf4", "bnb-8bit", "bnb-4bit")


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_weights_are_packed_or_loaded_by_bitsandbytes_or_kept(name: str) -> None:
    row = QUANTIZATIONS[name]
    assert row.needs_cpu_kernels == (row.packed_bits is not None) or row is quantization.FROM_FILE
    assert (row.packed_bits is None) == (row.packed_head_bits is None)
    assert not (row.needs_cpu_kernels and row.bitsandbytes)


@pytest.mark.parametrize("row", [row for row in ROWS if row.packed_bits], ids=lambda row: row.name)
def test_the_kernels_have_a_format_for_each_number_of_packed_bits(row: quantization.Quantization) -> None:
    for bits in (row.packed_bits, row.packed_head_bits):
        assert bits is not None and format_of(bits).bits == bits
        assert format_of(bits).is_quantized == (row.name != "bfloat16")


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_format_of_the_cpus_kernels_is_refused_elsewhere_with_those_that_work(name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"QUANTIZATION={name} needs a CPU.*: set one of nf4, bnb-8bit, bnb-4bit"):
        choose(name, "auto", has_cpu_kernels=False, has_packed_file=False)


def test_stock_layers_stay_whatever_the_machine_can() -> None:
    assert choose(quantization.STOCK, "auto", has_cpu_kernels=True, has_packed_file=True) is quantization.NONE


def test_the_default_keeps_a_checkpoints_own_codes_where_the_kernels_run() -> None:
    choices = [
        choose("auto", dtype, has_cpu_kernels, has_packed_file=False, has_own_codes=True).name
        for dtype, has_cpu_kernels in [("auto", True), ("auto", False), ("float32", True)]
    ]
    assert choices == ["checkpoint", "none", "none"]
    assert choose("int8", "auto", has_cpu_kernels=True, has_packed_file=False, has_own_codes=True).name == "int8"


def test_a_code_is_cut_into_fields_that_hold_all_of_its_bits() -> None:
    for bits in range(1, 9):
        fields = format_of(bits).fields
        covered = torch.zeros(bits, dtype=torch.int)
        for first, width in fields:
            covered[first : first + width] += 1
        assert (covered == 1).all() and all(8 % width == 0 for _, width in fields)
