"""Kernels that are compiled for this CPU, and the packed weights that they multiply."""
