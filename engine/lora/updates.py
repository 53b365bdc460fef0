"""LowRankUpdates: what the adapters of a step add to the outputs of layers that read one input.

The matrices of all adapters of a step are stacked, so that their number hardly counts:
    hidden = x A^T, for the A of all adapters and of all layers that read x    # (tokens, layers, ranks)
    hidden[t, :, r] = 0, where r does not belong to token t's adapter
    outputs[layer] += hidden[:, layer] B^T, for each layer
"""

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from engine.cpu import activations, kernels, products
from engine.cpu.jit import LANES
from engine.cpu.packed_weight import GROUP, PackedWeight, can_pack, pack_floats
from engine.lora.adapter import Adapter, Matrices, Shape


@dataclass(frozen=True)
class Part:
    """An output of a layer, or some of its rows."""

    layer: str  # its name, as `layer_name` gives it
    rows: torch.Tensor | None = None  # None: all


class Product(Protocol):
    """The matrices of the layers of one input, for all adapters of a stack."""

    def add(self, x: torch.Tensor, outputs: Items[torch.Tensor], hidden_places: torch.Tensor) -> None:
        """Adds to the outputs, (tokens, rows) each, in place.

        x: (tokens, columns). hidden_places: (tokens, ranks), true where a rank is not of the token's adapter."""
        ...


class Stack:
    """Some adapters, whose matrices are stacked when a layer first needs them."""

    def __init__(self, adapters: Items[Adapter], dtype: torch.dtype) -> None:
        self._ranks = [adapter.rank for adapter in adapters]
        self.dtype = dtype
        self.num_ranks = -(-sum(self._ranks) // GROUP) * GROUP  # whole groups, which kernels need
        self._products: dict[int, Product | None] = {}

    def owners(self) -> torch.Tensor:
        """Returns for each rank the number of its adapter; -1 for those that pad."""
        owners = [number for number, rank in enumerate(self._ranks) for _ in range(rank)]
        return torch.tensor(owners + [-1] * (self.num_ranks - len(owners)))

    def product(self, updates: "LowRankUpdates", adapters: Items[Adapter], device: torch.device) -> Product | None:
        """Returns the matrices of some layers; None where none of the adapters changes them."""
        key = id(updates)
        if key not in self._products:
            self._products[key] = self._make_product(updates.parts, adapters, device)
        return self._products[key]

    def _make_product(self, parts: Items[Part], adapters: Items[Adapter], device: torch.device) -> Product | None:
        changed = [i for i, part in enumerate(parts) if any(part.layer in adapter.layers for adapter in adapters)]
        if not changed:
            return None
        stacked = [self._stacked(parts[index], adapters) for index in changed]
        a, b = torch.cat([matrices.a for matrices in stacked]), [matrices.b for matrices in stacked]
        if device.type == "cpu" and self.dtype == torch.bfloat16 and kernels.has_bfloat16() and can_pack(a.shape[1]):
            return PackedProduct.of(changed, a, b)
        return PlainProduct(changed, a.T.to(device), [part.T.contiguous().to(device) for part in b])

    def _stacked(self, part: Part, adapters: Items[Adapter]) -> Matrices:
        """Returns A and B of one layer for all adapters, with zeros for those that do not change it."""
        some = next(adapter.layers[part.layer] for adapter in adapters if part.layer in adapter.layers)
        num_rows = len(some.b) if part.rows is None else len(part.rows)
        a = torch.zeros(self.num_ranks, some.a.shape[1], dtype=self.dtype)
        b = torch.zeros(num_rows, self.num_ranks, dtype=self.dtype)
        start = 0
        for adapter, rank in zip(adapters, self._ranks, strict=True):
            if (own := adapter.layers.get(part.layer)) is not None:
                a[start : start + own.rank] = own.a
                b[:, start : start + own.rank] = own.b if part.rows is None else own.b[part.rows]
            start += rank
        return Matrices(a, b)


@dataclass(frozen=True)
class PlainProduct:
    """Computes with torch."""

    changed: Items[int]  # which of the outputs
    a: torch.Tensor  # (columns, layers * ranks)
    b: Items[torch.Tensor]  # (ranks, rows) of each layer

    def add(self, x: torch.Tensor, outputs: Items[torch.Tensor], hidden_places: torch.Tensor) -> None:
        hidden = (x.to(self.a.dtype) @ self.a).view(len(x), len(self.b), -1)
        hidden.masked_fill_(hidden_places[:, None], 0)
        for number, (index, b) in enumerate(zip(self.changed, self.b, strict=True)):
            if outputs[index].dtype == b.dtype:
                outputs[index].addmm_(hidden[:, number], b)
            else:
                outputs[index].add_(hidden[:, number] @ b)


@dataclass(frozen=True)
class PackedProduct:
    """Computes with the CPU's kernels for bfloat16, which read small matrices faster than torch does."""

    changed: Items[int]
    a: PackedWeight  # (layers * ranks, columns)
    b: Items[PackedWeight]  # (rows, ranks) of each layer
    zeros: torch.Tensor  # in place of a bias

    @classmethod
    def of(cls, changed: Items[int], a: torch.Tensor, b: Items[torch.Tensor]) -> "PackedProduct":
        longest = max(len(a), *(len(part) for part in b))
        return cls(changed, pack_floats(a), [pack_floats(part) for part in b], torch.zeros(longest + LANES))

    def add(self, x: torch.Tensor, outputs: Items[torch.Tensor], hidden_places: torch.Tensor) -> None:
        tokens, num_layers = len(x), len(self.b)
        grouped = activations.group(x.to(torch.bfloat16))
        hidden = products.matmul_bfloat16(grouped, self.a, self.zeros, torch.bfloat16).view(tokens, num_layers, -1)
        hidden.masked_fill_(hidden_places[:, None], 0)
        blocks = activations.group(hidden.view(tokens, -1)).split(hidden_places.shape[1] // GROUP)
        for index, part, b in zip(self.changed, blocks, self.b, strict=True):
            outputs[index].add_(products.matmul_bfloat16(part, b, self.zeros, torch.bfloat16))


@dataclass(frozen=True)
class StepAdapters:
    """The adapters of a step, and which token has which."""

    adapters: Items[Adapter]  # those of the stack, in its order
    stack: Stack
    numbers: torch.Tensor  # (rows,) the number of each token's adapter; -1 for none
    num_tokens: int  # of the step; rows beyond these are of guesses that a recurrent layer recalls
    _places: dict[torch.device, torch.Tensor] = field(default_factory=dict)

    def hidden_places(self, device: torch.device) -> torch.Tensor:
        """Returns (tokens, ranks): true where a rank is not of the token's adapter."""
        if device not in self._places:
            owners, numbers = self.stack.owners(), self.numbers[: self.num_tokens, None]
            self._places[device] = ((owners != numbers) | (numbers < 0)).to(device)
        return self._places[device]

    def of_rows(self, rows: torch.Tensor) -> "StepAdapters":
        """Returns the same for tokens in another order. rows: their rows in this one."""
        return StepAdapters(self.adapters, self.stack, self.numbers[rows.cpu()], len(rows))


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

    def __init__(self, active: ActiveAdapters, parts: Items[Part]) -> None:
        """parts: what the outputs are that are given to `add`, in their order."""
        self._active, self.parts = active, parts

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
        x, places = input_of(), step.hidden_places(device)
        rows = x.reshape(-1, x.shape[-1])
        assert len(rows) == len(places), "a layer that adapters change reads each token of the step once"
        product.add(rows, [output.view(len(rows), -1) for output in outputs], places)


@dataclass(frozen=True)
class Target:
    """Linear layers that read one input, and how they get their updates."""

    shapes: Mapping[str, Shape]  # of the layers, by their names
    parts: tuple[Part, ...]
    attach: Callable[[LowRankUpdates], object]


def single(name: str, shape: Shape, attach: Callable[[LowRankUpdates], object]) -> Target:
    """Makes the target of one layer."""
    return Target({name: shape}, (Part(name),), attach)


def several(shapes: Mapping[str, Shape], attach: Callable[[LowRankUpdates], object]) -> Target:
    """Makes the target of layers that one module computes together, in the order of its outputs."""
    return Target(shapes, tuple(map(Part, shapes)), attach)
