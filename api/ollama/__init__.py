"""Ollama's API as a view of chat completions, completions and embeddings."""
