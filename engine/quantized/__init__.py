"""Checkpoints that others have quantised: what their tensors mean, and how their codes are packed."""
