"""LayerSpec: what the cache asks of a layer's state. AttentionSpec: that of an attention layer, its keys and values."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch


class LayerSpec(Protocol):
    """What one layer remembers of a sequence, and how much memory that takes."""

    @property
    def window(self) -> int | None:
        """Tokens that the layer remembers, the current one included; None: all. Layers of one window form a group."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the layer computes, and its state has to be."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """Memory for each token of a sequence."""
        ...

    def make_tensors(self, num_blocks: int, block_size: int) -> tuple[torch.Tensor, ...]:
        """Returns the layer's state, zeroed: tensors whose first dimension is the block, of `block_size` tokens
        each."""
        ...


@dataclass(frozen=True)
class AttentionSpec:
    """Keys and values, whose shapes are seen in the model's own forward."""

    num_kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None  # tokens that a query sees, itself included; None: all
    dtype: torch.dtype
    device: torch.device
    softcap: float | None = None  # of the scores
    group: int = 2  # query heads that share a key

    @property
    def bytes_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def make_tensors(self, num_blocks: int, block_size: int) -> tuple[torch.Tensor, ...]:
        """Keys (num_blocks, block_size, num_kv_heads, key_dim), and values with value_dim in its place."""
        shape = (num_blocks, block_size, self.num_kv_heads)
        return self._zeros(*shape, self.key_dim), self._zeros(*shape, self.value_dim)

    def _zeros(self, *shape: int) -> torch.Tensor:
        """On a CPU these are the operating system's own zero pages, which take no memory until they are written."""
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=self.dtype, device=self.device)
        num_bytes = math.prod(shape) * self.dtype.itemsize
        return torch.from_numpy(numpy.zeros(num_bytes, dtype=numpy.uint8)).view(self.dtype).view(shape)
