import time

import pytest
import torch
from models import tiny_model

from engine.attention import paged
from engine.layer_probe import probe_layers
from engine.step_cost import FEWEST, MOST, choose_num_seqs, decode_seconds


def test_a_fast_model_computes_as_many_sequences_as_the_memory_holds() -> None:
    model = tiny_model("qwen2", paged.NAME)
    specs = probe_layers(model)
    of_sequence = 512 * specs.bytes_per_token
    assert choose_num_seqs(model, specs, 10**12) == MOST
    assert choose_num_seqs(model, specs, 100 * of_sequence) == 64
    assert choose_num_seqs(model, specs, of_sequence) == FEWEST


class Slow(torch.nn.Module):
    """A layer that takes as long as so many rows are said to."""

    def __init__(self, layer: torch.nn.Module, per_row: float) -> None:
        super().__init__()
        self.layer, self.per_row = layer, per_row

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.per_row * x.shape[-2])
        return self.layer(x)


@pytest.mark.parametrize(("per_row", "expected"), [(0.002, 64), (0.02, FEWEST)])
def test_a_step_takes_no_longer_than_people_read(per_row: float, expected: int) -> None:
    model = tiny_model("qwen2", paged.NAME)
    model.model.norm = Slow(model.model.norm, per_row)
    assert choose_num_seqs(model, probe_layers(model), 10**12) == expected


def test_layers_with_windows_can_be_measured() -> None:
    model = tiny_model("gemma3", paged.NAME)
    assert decode_seconds(model, probe_layers(model), 5) > 0
