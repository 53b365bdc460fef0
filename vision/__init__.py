"""The kinds of models that see: what an image costs, how a prompt shows it, and how the model computes it."""
