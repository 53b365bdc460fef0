"""MemoryBudget: how much of each device's memory models may take together.

A model's part is estimated from its files before it is loaded: its weights in their format, and its KV cache.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import psutil

CPU = "cpu"
CPU_SHARE = 0.9  # of the memory that is free at the start
GPU_SHARE = 0.9  # of a GPU's whole memory; the engine keeps the rest for activations
Footprint = Mapping[str, int]  # device, such as cpu or cuda:0 -> bytes


@dataclass(frozen=True)
class MemoryBudget:
    """The bytes that models may take on each device."""

    limits: Footprint

    @property
    def total(self) -> int:
        return sum(self.limits.values())

    def spread(self, num_bytes: int) -> Footprint:
        """Returns the footprint of a model that is not loaded yet: evenly over the devices, as `auto` does."""
        return {device: -(-num_bytes // len(self.limits)) for device in self.limits}

    def holds(self, footprints: Iterable[Footprint]) -> bool:
        """Returns whether models with these footprints fit together. Devices without a limit are not counted."""
        taken: Counter[str] = Counter()
        for footprint in footprints:
            taken.update(footprint)
        return all(taken[device] <= limit for device, limit in self.limits.items())


@dataclass(frozen=True)
class MachineMemory:
    """Finds the budget of this machine when it is first asked for, since torch is imported for that."""

    limit: int | None  # bytes, if a setting names them; several GPUs share them evenly
    device_map: str

    @cached_property
    def budget(self) -> MemoryBudget:
        """The memory of the GPUs that torch sees, or else what is free of the machine's own."""
        gpus = {} if self.device_map == "cpu" else on_devices(self.device_map, _gpus())
        if self.limit is not None:
            return MemoryBudget({name: self.limit // len(gpus) for name in gpus} or {CPU: self.limit})
        return MemoryBudget(gpus or {CPU: int(CPU_SHARE * psutil.virtual_memory().available)})


def on_devices(device_map: str, gpus: Footprint) -> Footprint:
    """Returns the GPUs among these that a model is put on: one, where DEVICE_MAP names it."""
    named = "cuda:0" if device_map == "cuda" else device_map
    return {named: gpus[named]} if named in gpus else gpus


def _gpus() -> dict[str, int]:
    import torch

    if not torch.cuda.is_available():
        return {}
    capacities = (torch.cuda.mem_get_info(number)[1] for number in range(torch.cuda.device_count()))
    return {f"cuda:{number}": int(GPU_SHARE * capacity) for number, capacity in enumerate(capacities)}
