"""ModelAdapters: what a ModelRunner asks about adapters: which layers they can change, and what a step has of them."""

import weakref
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from engine.lora.adapter import Adapter, read_adapter
from engine.lora.targets import attach, find_targets, shapes_of
from engine.lora.updates import ActiveAdapters, Stack, StepAdapters, Target, can_use_kernels, packed

MOST_STACKS = 4  # that are kept for later steps
SPARE_RANKS = 2  # a kept stack may have so many times the ranks that a step needs

_Key = tuple[weakref.ref[Adapter], ...]


class ModelAdapters:
    """The adapters of one model. Stacks are kept from step to step; one whose adapter nobody has any more is not."""

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
        """device: of the model's input. dtype: of what the layers compute."""
        self._model, self._device, self._dtype = model, device, dtype
        self._active = ActiveAdapters()
        self._stacks: dict[_Key, Stack] = {}  # the most recently used one comes last
        self._is_attached = False

    @cached_property
    def targets(self) -> list[Target]:
        return find_targets(self._model)

    def read(self, name: str, directory: Path, max_rank: int) -> Adapter:
        """Reads an adapter for this model, which takes up to seconds. Raises ModelLoadError."""
        adapter = read_adapter(name, directory, shapes_of(self.targets), self._dtype, max_rank)
        self._pack(adapter)
        return adapter

    @torch.inference_mode()
    def _pack(self, adapter: Adapter) -> None:
        """Prepares it for the CPU's kernels now, so that no step has to wait for that."""
        for target in self.targets:
            is_changed = any(part.layer in adapter.layers for part in target.parts)
            if is_changed and can_use_kernels(target.parts, self._device, self._dtype):
                packed(adapter, target.parts)

    def during(self, owners: Items[Adapter | None], num_tokens: int) -> AbstractContextManager[None]:
        """Lets the model's layers apply these adapters meanwhile.

        owners: the adapter of each of the step's tokens, then those of guesses that recurrent layers recall.
        num_tokens: of the step, without those."""
        needed = list(dict.fromkeys(owner for owner in owners if owner is not None))
        if not needed:
            return self._active.during(None)
        if not self._is_attached:
            attach(self._model, self.targets, self._active)
            self._is_attached = True
        adapters, stack = self._stack(needed)
        number_of: dict[Adapter | None, int] = {adapter: number for number, adapter in enumerate(adapters)}
        numbers = torch.tensor([number_of.get(owner, -1) for owner in owners])
        return self._active.during(StepAdapters(adapters, stack, numbers, num_tokens))

    def _stack(self, needed: list[Adapter]) -> tuple[list[Adapter], Stack]:
        """Returns a stack with these adapters, and all that it has: a kept one if it is not much larger."""
        limit = SPARE_RANKS * sum(adapter.rank for adapter in needed)
        for key in reversed(list(self._stacks)):
            adapters = [adapter for reference in key if (adapter := reference()) is not None]
            if len(adapters) < len(key):
                del self._stacks[key]
            elif {*needed} <= {*adapters} and sum(adapter.rank for adapter in adapters) <= limit:
                self._stacks[key] = stack = self._stacks.pop(key)
                return adapters, stack
        key = tuple(map(weakref.ref, needed))
        self._stacks[key] = stack = Stack(needed, self._dtype)
        while len(self._stacks) > MOST_STACKS:
            del self._stacks[next(iter(self._stacks))]
        return needed, stack
