"""Layout: the tensors that make one weight in a format of quantised checkpoints, and the function that reads them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from engine.quantized.weights import StoredWeight

Parts = Mapping[str, torch.Tensor]  # the tensors of a weight, by what their names end with


@dataclass(frozen=True)
class Layout:
    """What the names of a weight's tensors end with, after what they have in common."""

    codes: str
    required: tuple[str, ...]
    read: Callable[[Parts], StoredWeight]
    optional: tuple[str, ...] = ()
    target: str = ".weight"  # what the name of the model's parameter ends with
    bits: int = 8  # of a code
    more_bits: int = 0  # that it takes in the kernels' formats

    @property
    def kept_bits(self) -> int:
        return self.bits + self.more_bits

    def parts_of(self, name: str, names: Mapping[str, object]) -> dict[str, str] | None:
        """Returns the names of the tensors that belong to one with codes, by their ends; None if `name` is none.

        names: all tensors of the checkpoint."""
        if not name.endswith(self.codes):
            return None
        stem = name.removesuffix(self.codes)
        if not all(stem + part in names for part in self.required):
            return None
        parts = (self.codes, *self.required, *self.optional)
        return {part: stem + part for part in parts if stem + part in names}

    def target_of(self, name: str) -> str:
        return name.removesuffix(self.codes) + self.target
