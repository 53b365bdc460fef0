"""Adapters (LoRA): small changes to a model's weights, which each sequence of a step can have its own of."""
