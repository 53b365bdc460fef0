"""Texts as values of HTTP headers."""

import json

MAX_LENGTH = 1000  # characters


def header_value(*texts: str) -> str:
    """Returns the texts joined by commas, cut to MAX_LENGTH; headers are ASCII, so `é` becomes `\\u00e9`."""
    return ", ".join(json.dumps(text)[1:-1] for text in texts)[:MAX_LENGTH]
