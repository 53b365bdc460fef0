"""What the cache asks of a layer's state: LayerSpec of one that grows with its tokens, such as AttentionSpec's keys and
values; RecurrentSpec of one of fixed size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy
import torch

# Of an int8 cache: it has the range of float32; numbers are divided by the scale as it was rounded, so nothing is lost
SCALES = torch.bfloat16


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
    key_factors: tuple[float, ...] | None = None  # set: the cache is int8, and keys are divided by these before
    has_sinks: bool = False  # a logit for each query head joins the softmax, without a value
    sees_ahead: bool = False  # tokens of an image see later ones of it

    @property
    def is_int8(self) -> bool:
        return self.key_factors is not None

    @property
    def without_factors(self) -> "AttentionSpec":
        """The same for all layers that a kernel computes alike: it sees keys that are divided already."""
        return replace(self, key_factors=()) if self.is_int8 else self

    @property
    def bytes_per_token(self) -> int:
        if self.is_int8:
            return self.num_kv_heads * (self.key_dim + self.value_dim + 2 * SCALES.itemsize)
        return self.num_kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def make_tensors(self, num_blocks: int, block_size: int) -> tuple[torch.Tensor, ...]:
        """Keys (num_blocks, block_size, num_kv_heads, key_dim), and values with value_dim in its place. An int8 cache
        also has the scales of keys and of values, each (num_blocks, block_size, num_kv_heads)."""
        shape = (num_blocks, block_size, self.num_kv_heads)
        dtype = torch.int8 if self.is_int8 else self.dtype
        tensors = [_zeros((*shape, dim), dtype, self.device) for dim in (self.key_dim, self.value_dim)]
        if self.is_int8:
            tensors += [_zeros(shape, SCALES, self.device) for _ in tensors]
        return tuple(tensors)

    def make_factors(self) -> torch.Tensor | None:
        """Returns what keys are divided by, (num_kv_heads, key_dim) float32; None where the cache is not int8."""
        if self.key_factors is None:
            return None
        return torch.tensor(self.key_factors, dtype=torch.float32, device=self.device).view(
            self.num_kv_heads, self.key_dim
        )


@dataclass(frozen=True)
class StateShape:
    """One tensor of a recurrent layer's state, as transformers' cache names it."""

    kind: str  # "conv" or "recurrent"
    index: int  # of several states of this kind
    shape: tuple[int, ...]  # of one sequence
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class RecurrentSpec:
    """A state of fixed size for each sequence, as the layer's own forward makes it."""

    states: tuple[StateShape, ...]
    input_width: int  # numbers that the layer reads of a token, to compute it again
    input_dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_sequence(self) -> int:
        return sum(state.num_bytes for state in self.states)

    @property
    def bytes_per_input(self) -> int:
        return self.input_width * self.input_dtype.itemsize

    def make_tensors(self, num_rows: int) -> tuple[torch.Tensor, ...]:
        """Returns the zeroed states, each (num_rows, *shape)."""
        return tuple(_zeros((num_rows, *state.shape), state.dtype, self.device) for state in self.states)

    def make_inputs(self, num_rows: int) -> torch.Tensor:
        """Returns (num_rows, input_width)."""
        return _zeros((num_rows, self.input_width), self.input_dtype, self.device)


@dataclass(frozen=True)
class LayerSpecs:
    """What a model's layers store, by their numbers. A layer may be of both kinds."""

    attention: dict[int, AttentionSpec]
    recurrent: dict[int, RecurrentSpec]
    shared: dict[int, int] = field(default_factory=dict)  # layer that stores nothing -> the one whose keys it reads

    def in_int8(self, key_factors: Mapping[int, tuple[float, ...]]) -> "LayerSpecs":
        """Returns the same layers with keys and values in 8 bits. key_factors: see AttentionSpec; where they are not
        known, 1."""
        factors = {
            i: key_factors.get(i, (1.0,) * spec.num_kv_heads * spec.key_dim) for i, spec in self.attention.items()
        }
        return replace(self, attention={i: replace(s, key_factors=factors[i]) for i, s in self.attention.items()})

    @property
    def bytes_per_token(self) -> int:
        return sum(spec.bytes_per_token for spec in self.attention.values())

    @property
    def bytes_per_sequence(self) -> int:
        """Memory for each sequence, however long it is."""
        return sum(spec.bytes_per_sequence for spec in self.recurrent.values())

    @property
    def bytes_per_guess(self) -> int:
        """Memory for each guess of a sequence, until it is known to be right."""
        return sum(spec.bytes_per_input for spec in self.recurrent.values())


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU these are the operating system's own zero pages, which take no memory until they are written."""
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(numpy.zeros(num_bytes, dtype=numpy.uint8)).view(dtype).view(shape)
