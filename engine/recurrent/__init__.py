"""Layers that remember a sequence in a state of fixed size, such as linear attention and short convolutions."""
