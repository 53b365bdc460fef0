"""Attention over the blocks of the KV cache, with one implementation for each kind of device."""
