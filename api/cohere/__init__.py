"""Cohere's embed and rerank as views of embeddings and ranks."""
