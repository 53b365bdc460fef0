"""CacheSize: how a KV cache divides the memory of its devices, and the context and the sequences that it holds.

This is arithmetic alone: an engine (build.py) and a plan on paper (memory_plan.py) come to the same.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedConfig

from engine.engine import EngineOptions
from engine.kv_cache import CachePlan
from engine.layer_spec import LayerSpecs
from engine.recurrent.state_cache import StatePlan, most_snapshots, slot_bytes
from errors import ModelLoadError
from vision.families import vision_family_of

INT8 = "int8"  # of KV_CACHE_DTYPE
GPU_RESERVE = 0.1  # share of a GPU's memory that is kept for activations
DEFAULT_CONTEXT = 2048  # tokens, where the config has no length
BLOCK_SIZES = (16, 256)  # tokens; the first size that the device's attention takes is used
Bytes = Mapping[torch.device, int]  # what a cache may take, or takes, on each device


@dataclass(frozen=True)
class StepSizes:
    """How much a step computes at most."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_mixed_tokens: int

    @classmethod
    def choose(cls, config: PreTrainedConfig, options: EngineOptions, device_type: str) -> "StepSizes":
        """Takes what the options say, and else what suits the device: "cuda" or "cpu"."""
        default = _DEVICE_DEFAULTS[device_type]
        num_seqs = options.max_num_seqs or default.max_num_seqs
        batched = options.max_num_batched_tokens or default.max_num_batched_tokens
        batched = max(batched, num_seqs, _tokens_per_image(config))
        mixed = options.max_num_mixed_tokens or min(default.max_num_mixed_tokens, batched)
        return cls(num_seqs, batched, max(mixed, num_seqs + 1))

    @property
    def most_tokens(self) -> int:
        return max(self.max_num_batched_tokens, self.max_num_mixed_tokens)


_DEVICE_DEFAULTS = {"cpu": StepSizes(32, 512, 256), "cuda": StepSizes(256, 8192, 2048)}


def _tokens_per_image(config: PreTrainedConfig) -> int:
    """Returns the tokens that a step must hold for an image that it may not cut; 0 for a model without such images."""
    family = vision_family_of(config)
    return 0 if family is None else family.max_crop_tokens


@dataclass(frozen=True)
class CacheSize:
    """The parts of a cache: blocks of keys and values, and the states of recurrent layers, if there are any."""

    keys: CachePlan
    states: StatePlan | None
    memory: int  # bytes that keys and values were to have
    max_num_seqs: int  # that run at once

    @classmethod
    def fit(
        cls,
        specs: LayerSpecs,
        options: EngineOptions,
        *,
        steps: StepSizes,
        block_size: int,
        context: int,
        rooms: Bytes,
    ) -> "CacheSize":
        """Returns the largest cache that `rooms` hold, unless KV_CACHE_MEMORY says how large it is. Raises
        ModelLoadError.

        context: tokens of the longest sequence. rooms: bytes that each device with such layers has for them.
        """
        divide = partial(cls._divide, specs, options, steps=steps, block_size=block_size, context=context)
        if options.kv_cache_memory:
            size = divide(options.kv_cache_memory)
        elif min(rooms.values()) <= 0:
            raise ModelLoadError(
                "The model's weights leave no memory for the KV cache: "
                "use a smaller model, or set QUANTIZATION to a format with fewer bits."
            )
        else:
            useful = _useful_memory(specs, options, context + block_size, steps.max_num_seqs)
            size = divide(_largest(min(sum(rooms.values()), useful), lambda n: divide(n)._fits(specs, rooms)))
        _check_states(specs, size)
        return size

    @classmethod
    def _divide(
        cls, specs: LayerSpecs, options: EngineOptions, memory: int, *, steps: StepSizes, block_size: int, context: int
    ) -> "CacheSize":
        """Divides `memory` bytes: first the states get theirs, then keys and values."""
        states, num_seqs = None, steps.max_num_seqs
        if specs.recurrent:
            states = StatePlan.fit(
                specs,
                memory,
                max_num_seqs=num_seqs,
                max_guesses=options.num_speculative_tokens,
                context_memory=(context + block_size) * specs.bytes_per_token,
                may_shorten=options.max_model_len is None,
                snapshot_memory=options.snapshot_memory,
            )
            memory, num_seqs = memory - states.num_bytes(specs), states.num_slots
        keys = CachePlan.fit(specs.attention, max(0, memory), block_size, num_seqs, steps.most_tokens)
        return cls(keys, states, memory, num_seqs)

    def num_bytes(self, specs: LayerSpecs) -> Counter[torch.device]:
        """Returns the bytes that the cache takes on each device, without its scratch block."""
        taken: Counter[torch.device] = Counter()
        for group in self.keys.groups:
            for layer in group.layers:
                spec = specs.attention[layer]
                taken[spec.device] += group.num_blocks * self.keys.block_size * spec.bytes_per_token
        if self.states is not None:
            for state in specs.recurrent.values():
                taken[state.device] += self.states.layer_bytes(state)
        return taken

    def _fits(self, specs: LayerSpecs, rooms: Bytes) -> bool:
        return all(taken <= rooms[device] for device, taken in self.num_bytes(specs).items())


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """Returns the most bytes up to `most` that fit: one device may be full before the others are."""
    if fits(most):
        return most
    low, high = 0, most
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _useful_memory(specs: LayerSpecs, options: EngineOptions, num_tokens: int, max_num_seqs: int) -> int:
    """Returns the bytes that `max_num_seqs` sequences of `num_tokens` tokens can use."""
    per_sequence = num_tokens * specs.bytes_per_token + slot_bytes(specs, options.num_speculative_tokens)
    snapshots = options.snapshot_memory or most_snapshots(max_num_seqs) * specs.bytes_per_sequence
    return max_num_seqs * per_sequence + snapshots


def _check_states(specs: LayerSpecs, size: CacheSize) -> None:
    """Raises ModelLoadError where the states leave nothing for keys and values."""
    if size.states is not None and size.memory <= 0:
        raise ModelLoadError(
            f"The recurrent state of a sequence takes {specs.bytes_per_sequence / 2**20:.1f} MiB, and the KV cache "
            f"only {(size.memory + size.states.num_bytes(specs)) / 2**20:.1f} MiB in all: raise KV_CACHE_MEMORY."
        )


def gpu_room(free: int, capacity: int) -> int:
    """Returns the bytes that a cache may take of a GPU. free: bytes, after the weights. capacity: bytes in all."""
    return free - int(GPU_RESERVE * capacity)


def model_context(config: PreTrainedConfig, max_model_len: int | None) -> int:
    """Returns the tokens of the longest sequence: max_model_len, or else the model's context. Long-rope models stay
    within their original context, where one set of frequencies holds for all positions. Raises ModelLoadError."""
    text = config.get_text_config()
    context = int(getattr(text, "max_position_embeddings", None) or DEFAULT_CONTEXT)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        context = min(context, int(rope.get("original_max_position_embeddings") or context))
    if max_model_len is not None and max_model_len > context:
        raise ModelLoadError(
            f"MAX_MODEL_LEN={max_model_len} is larger than the model's context of {context} tokens: lower it."
        )
    return max_model_len or context


def fit_context(context: int, size: CacheSize, options: EngineOptions) -> int:
    """Shortens the context to what the cache holds. Raises ModelLoadError where the options do not allow that."""
    longest = size.keys.max_tokens
    if longest >= context:
        return context
    if options.max_model_len or longest < 2 * size.keys.block_size:
        raise ModelLoadError(
            f"A KV cache of {size.memory / 2**30:.2f} GiB holds {longest} tokens, but a context "
            f"of {context} tokens needs more: raise KV_CACHE_MEMORY or lower MAX_MODEL_LEN."
        )
    return longest
