"""Guesses at the next tokens, which one step of the model then checks."""
