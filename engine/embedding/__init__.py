"""Texts in, vectors or scores out: the engine of embedding models and rerankers."""
