"""Layers whose steps one Triton kernel computes on a GPU."""
