"""LowRankUpdates: what the adapters of a step add to the outputs of layers that read one input.

With torch, the matrices of all adapters of a step are stacked, so that their number hardly counts:
    hidden = x A^T, for the A of all adapters and of all layers that read x    # (tokens, layers, ranks)
    hidden[t, :, r] = 0, where r does not belong to token t's adapter
    outputs[layer] += hidden[:, layer] B^T, for each layer
With the CPU's kernels for bfloat16, each token meets the matrices of its own adapter alone; see engine/cpu/low_rank.py.
"""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from engine.cpu import kernels, low_rank
from engine.cpu.jit import LANES
from engine.cpu.low_rank import RANKS, PackedMatrices, RowGroups, num_tiles
from engine.cpu.packed_weight import can_pack
from engine.lora.adapter import Adapter, Matrices, Shape


@dataclass(frozen=True)
class Part:
    """An output of a layer, or some of its rows."""

    layer: str  # its name, as `layer_name` gives it
    shape: Shape  # of the part
    rows: torch.Tensor | None = None  # None: all

    def of(self, adapter: Adapter) -> Matrices:
        """Returns an adapter's matrices, with zeros beyond their rank to whole tiles; all zeros if it changes nothing
        here."""
        own, num_ranks = adapter.layers.get(self.layer), RANKS * num_tiles(adapter.rank)
        dtype = next(iter(adapter.layers.values())).a.dtype
        a = torch.zeros(num_ranks, self.shape.num_columns, dtype=dtype)
        b = torch.zeros(self.shape.num_rows, num_ranks, dtype=dtype)
        if own is not None:
            a[: own.rank] = own.a
            b[:, : own.rank] = own.b if self.rows is None else own.b[self.rows]
        return Matrices(a, b)


Parts = tuple[Part, ...]


class Product(Protocol):
    """The matrices of the layers of one input, for some adapters."""

    def add(self, x: torch.Tensor, outputs: Items[torch.Tensor], step: "StepAdapters") -> None:
        """Adds to the outputs, (tokens, rows) each, in place. x: (tokens, columns)."""
        ...


class PlainProduct:
    """Computes with torch."""

    def __init__(self, adapters: Items[Adapter], parts: Parts, device: torch.device) -> None:
        matrices = [[part.of(adapter) for adapter in adapters] for part in parts]
        self._a = torch.cat([own.a for of_part in matrices for own in of_part]).T.to(device)
        self._b = [torch.cat([own.b.T for own in of_part]).to(device) for of_part in matrices]

    def add(self, x: torch.Tensor, outputs: Items[torch.Tensor], step: "StepAdapters") -> None:
        hidden = (x.to(self._a.dtype) @ self._a).view(len(x), len(self._b), -1)
        hidden.masked_fill_(step.foreign_ranks(x.device)[:, None], 0)
        for number, (output, b) in enumerate(zip(outputs, self._b, strict=True)):
            if output.dtype == b.dtype:
                output.addmm_(hidden[:, number], b)
            else:
                output.add_(hidden[:, number] @ b)


class PackedProduct:
    """Computes with the CPU's kernels for bfloat16."""

    def __init__(self, adapters: Items[Adapter], parts: Parts) -> None:
        matrices = [packed(adapter, parts) for adapter in adapters]
        self._a = low_rank.addresses_of_a(matrices)
        self._b = [low_rank.addresses_of_b(matrices, layer) for layer in range(len(parts))]

    def add(self, x: torch.Tensor, outputs: Items[torch.Tensor], step: "StepAdapters") -> None:
        num_layers, groups = len(self._b), step.row_groups
        hidden = low_rank.shrink(x.to(torch.bfloat16).contiguous(), self._a, groups, num_layers)
        for layer, (output, b) in enumerate(zip(outputs, self._b, strict=True)):
            low_rank.expand(hidden, b, output, groups, num_layers, layer)


def packed(adapter: Adapter, parts: Parts) -> PackedMatrices:
    """Returns an adapter's matrices for the layers of one input as the CPU's kernels read them."""
    key = key_of(parts)
    if key not in adapter.packed:
        matrices = [part.of(adapter) for part in parts]
        adapter.packed[key] = PackedMatrices.of([own.a for own in matrices], [own.b for own in matrices])
    return adapter.packed[key]


def key_of(parts: Parts) -> str:
    """Names the layers of one input."""
    return "+".join(part.layer for part in parts)


def can_use_kernels(parts: Parts, device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether the CPU's kernels compute the updates of these layers."""
    if device.type != "cpu" or dtype != torch.bfloat16 or not kernels.has_bfloat16():
        return False
    return all(can_pack(part.shape.num_columns) and part.shape.num_rows % LANES == 0 for part in parts)


class Stack:
    """Some adapters, whose matrices are put together when a layer first needs them."""

    def __init__(self, adapters: Items[Adapter], dtype: torch.dtype) -> None:
        self.ranks = [adapter.rank for adapter in adapters]
        self._dtype = dtype
        self._products: dict[tuple[str, torch.device], Product | None] = {}

    @cached_property
    def owners(self) -> torch.Tensor:
        """For each rank, with those that fill up tiles, the number of its adapter."""
        counts = torch.tensor([RANKS * num_tiles(rank) for rank in self.ranks])
        return torch.arange(len(counts)).repeat_interleave(counts)

    def product(self, updates: "LowRankUpdates", adapters: Items[Adapter], device: torch.device) -> Product | None:
        """Returns the matrices of some layers; None where none of the adapters changes them."""
        key = (updates.key, device)
        if key not in self._products:
            self._products[key] = self._make_product(updates.parts, adapters, device)
        return self._products[key]

    def _make_product(self, parts: Parts, adapters: Items[Adapter], device: torch.device) -> Product | None:
        if not any(part.layer in adapter.layers for part in parts for adapter in adapters):
            return None
        if can_use_kernels(parts, device, self._dtype):
            return PackedProduct(adapters, parts)
        return PlainProduct(adapters, parts, device)


class StepAdapters:
    """The adapters of a step, and which token has which."""

    def __init__(self, adapters: Items[Adapter], stack: Stack, numbers: torch.Tensor, num_tokens: int) -> None:
        """adapters: those of the stack, in its order. numbers: (rows,) the number of each token's adapter, -1 for none.
        num_tokens: of the step; rows beyond these are of guesses that a recurrent layer recalls."""
        self.adapters, self.stack = adapters, stack
        self._all_numbers, self._numbers = numbers, numbers[:num_tokens]
        self._foreign: dict[torch.device, torch.Tensor] = {}

    @property
    def num_tokens(self) -> int:
        return len(self._numbers)

    @cached_property
    def row_groups(self) -> RowGroups:
        return RowGroups(self._numbers, self.stack.ranks)

    def foreign_ranks(self, device: torch.device) -> torch.Tensor:
        """Returns (tokens, ranks): true where a rank is not of the token's adapter."""
        if device not in self._foreign:
            self._foreign[device] = (self.stack.owners != self._numbers[:, None]).to(device)
        return self._foreign[device]

    def of_rows(self, rows: torch.Tensor) -> "StepAdapters":
        """Returns the same for tokens in another order. rows: their rows in this one."""
        return StepAdapters(self.adapters, self.stack, self._all_numbers[rows.cpu()], len(rows))


class ActiveAdapters:
    """What the model's layers know of the step that is being computed: its adapters, if it has any."""

    def __init__(self) -> None:
        self.step: StepAdapters | None = None

    @contextmanager
    def during(self, step: StepAdapters | None) -> Iterator[None]:
        """Lets layers apply the adapters of `step` meanwhile."""
        before, self.step = self.step, step
        try:
            yield
        finally:
            self.step = before

    @contextmanager
    def in_order(self, rows: torch.Tensor) -> Iterator[None]:
        """Lets layers see the step's tokens in another order meanwhile. rows: their rows in the step."""
        with self.during(None if self.step is None else self.step.of_rows(rows)):
            yield


class LowRankUpdates:
    """The updates of layers that read one input."""

    def __init__(self, active: ActiveAdapters, parts: Parts) -> None:
        """parts: what the outputs are that are given to `add`, in their order."""
        self._active, self.parts, self.key = active, parts, key_of(parts)

    @property
    def is_active(self) -> bool:
        """Whether the step has adapters."""
        return self._active.step is not None

    def add(self, x: torch.Tensor, outputs: Items[torch.Tensor]) -> None:
        """Adds what the adapters of the step make of x, (..., columns), to the layers' outputs, (..., rows) each."""
        self.add_lazily(x.device, lambda: x, outputs)

    def add_lazily(
        self, device: torch.device, input_of: Callable[[], torch.Tensor], outputs: Items[torch.Tensor]
    ) -> None:
        """Does the same, and computes the input only where it is needed."""
        step = self._active.step
        if step is None or (product := step.stack.product(self, step.adapters, device)) is None:
            return
        x = input_of()
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        assert len(rows) == step.num_tokens, "a layer that adapters change reads each token of the step once"
        flat = [output if output.dim() == 2 else output.view(len(rows), -1) for output in outputs]
        product.add(rows, flat, step)


@dataclass(frozen=True)
class Target:
    """Linear layers that read one input, and how they get their updates."""

    shapes: Mapping[str, Shape]  # of the layers, by their names
    parts: Parts
    attach: Callable[[LowRankUpdates], object]


def single(name: str, shape: Shape, attach: Callable[[LowRankUpdates], object]) -> Target:
    """Makes the target of one layer."""
    return Target({name: shape}, (Part(name, shape),), attach)


def several(shapes: Mapping[str, Shape], attach: Callable[[LowRankUpdates], object]) -> Target:
    """Makes the target of layers that one module computes together, in the order of its outputs."""
    return Target(shapes, tuple(Part(name, shape) for name, shape in shapes.items()), attach)
