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
    assert row.needs_kernels == (row.packed_bits is not None) or row is quantization.FROM_FILE
    assert (row.packed_bits is None) == (row.packed_head_bits is None)
    assert not (row.needs_kernels and row.bitsandbytes)


@pytest.mark.parametrize("row", [row for row in ROWS if row.packed_bits], ids=lambda row: row.name)
def test_the_kernels_have_a_format_for_each_number_of_packed_bits(row: quantization.Quantization) -> None:
    for bits in (row.packed_bits, row.packed_head_bits):
        assert bits is not None and format_of(bits).bits == bits
        assert format_of(bits).is_quantized == (row.name not in ("bfloat16", "float16"))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_format_of_kernels_is_refused_where_there_are_none_with_those_that_work(name: str) -> None:
    with pytest.raises(ModelLoadError, match=f"QUANTIZATION={name} needs a CPU.*: set one of nf4, bnb-8bit, bnb-4bit"):
        choose(name, "auto", kernels=None, has_packed_file=False)
    assert all(choose(name, "auto", kernels=kind, has_packed_file=True).name == name for kind in ("cpu", "gpu"))


def test_stock_layers_stay_whatever_the_machine_can() -> None:
    assert choose(quantization.STOCK, "auto", kernels="cpu", has_packed_file=True) is quantization.NONE


@pytest.mark.parametrize(
    ("kernels", "of_gguf", "of_codes", "of_others"),
    [
        ("cpu", quantization.FROM_FILE, quantization.OWN_CODES, quantization.ROUNDED),
        ("gpu", quantization.FROM_FILE, quantization.CODES_ALONE, quantization.NONE),
        (None, *[quantization.NONE] * 3),
    ],
)
def test_the_default_keeps_what_files_have_quantised_where_kernels_run(
    kernels: str | None,
    of_gguf: quantization.Quantization,
    of_codes: quantization.Quantization,
    of_others: quantization.Quantization,
) -> None:
    """And a CPU rounds what they have not."""
    assert choose("auto", "auto", kernels, has_packed_file=True) is of_gguf
    assert choose("auto", "auto", kernels, has_packed_file=False, has_own_codes=True) is of_codes
    assert choose("auto", "auto", kernels, has_packed_file=False) is of_others
    assert choose("auto", "float32", kernels, has_packed_file=True, has_own_codes=True) is quantization.NONE


def test_codes_are_rounded_where_that_is_asked_for() -> None:
    assert choose("int8", "auto", kernels="cpu", has_packed_file=False, has_own_codes=True).name == "int8"


def test_a_code_is_cut_into_fields_that_hold_all_of_its_bits() -> None:
    for bits in range(1, 9):
        fields = format_of(bits).fields
        covered = torch.zeros(bits, dtype=torch.int)
        for first, width in fields:
            covered[first : first + width] += 1
        assert (covered == 1).all() and all(8 % width == 0 for _, width in fields)
