"""LayerCache: the keys and values of one layer, as they are or in 8 bits.

In 8 bits each token's key and value have one scale for each head: number = int8 * scale. Some models' keys have a few
channels of a head that are far larger than the others, which would lose their bits to them. So each channel is divided
by a factor of its own before, and the query multiplied by it: their product stays the same. The factors are powers of
two, so that neither is rounded by this.
"""

from dataclasses import dataclass

import torch

from engine.cpu import cache_kernels

LARGEST = 127  # in 8 bits


@dataclass(frozen=True)
class LayerCache:
    keys: torch.Tensor  # (num_blocks, block_size, kv_heads, dim)
    values: torch.Tensor
    key_scales: torch.Tensor | None = None  # (num_blocks, block_size, kv_heads); None: the cache is not int8
    value_scales: torch.Tensor | None = None
    factors: torch.Tensor | None = None  # (kv_heads, dim) float32, of keys
    query_factors: torch.Tensor | None = None  # the same, (kv_heads, 1, 1, dim), in the queries' type

    @property
    def is_int8(self) -> bool:
        return self.key_scales is not None

    @property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The scales of keys and of values, as kernels take them."""
        if self.key_scales is None or self.value_scales is None:
            return None
        return self.key_scales, self.value_scales

    def scaled(self, query: torch.Tensor) -> torch.Tensor:
        """Multiplies queries by the factors that their keys are divided by. query: (kv_heads, group, tokens, dim)."""
        return query if self.query_factors is None else query * self.query_factors

    def write(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Puts the keys and values of some tokens, each (tokens, kv_heads, dim), where `slots` (tokens,) say."""
        parts = ((key, self.keys, self.key_scales, self.factors), (value, self.values, self.value_scales, None))
        for numbers, cache, scales, factors in parts:
            if scales is None:
                cache.flatten(0, 1).index_copy_(0, slots, numbers)
            elif cache_kernels.can_store(numbers, cache):
                cache_kernels.store(numbers, factors, cache, scales, slots)
            else:
                rounded, own = quantized(numbers, factors, scales.dtype)
                cache.flatten(0, 1).index_copy_(0, slots, rounded)
                scales.flatten(0, 1).index_copy_(0, slots, own)

    def gather(self, blocks: torch.Tensor, rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies blocks out of the cache: keys, to be used with `scaled` queries, and values, each (rows, kv_heads,
        tokens, dim) of `dtype`."""
        parts = ((self.keys, self.key_scales), (self.values, self.value_scales))
        key, value = (_gathered(cache, scales, blocks, rows, dtype) for cache, scales in parts)
        return key, value


def _gathered(
    cache: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor, rows: int, dtype: torch.dtype
) -> torch.Tensor:
    numbers = cache.index_select(0, blocks)
    if scales is not None:
        numbers = (numbers.float() * scales.index_select(0, blocks).float()[..., None]).to(dtype)
    return numbers.view(rows, -1, *cache.shape[2:]).transpose(1, 2)


def quantized(
    numbers: torch.Tensor, factors: torch.Tensor | None, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each head to 8 bits, to nearest, ties to even: int8 in the same shape, (..., dim), and scales (...,).

    The scale of a head with a NaN is NaN, so that it stays one.
    """
    numbers = numbers.float() if factors is None else numbers.float() / factors
    scales = (numbers.abs().amax(-1) / LARGEST).to(scale_dtype)
    divisors = scales.float().clamp(min=cache_kernels.SMALLEST)[..., None]
    rounded = (numbers / divisors).nan_to_num(0.0).round().clamp(-LARGEST, LARGEST)
    return rounded.to(torch.int8), scales
