"""The engines: token ids to token ids (engine.py), texts to vectors or scores (embedding/). They know no HTTP."""
