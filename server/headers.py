"""Texts as values of HTTP headers."""

import json

MAX_LENGTH = 1000  # characters


def header_value(*texts: str) -> str:
    """The texts with commas between them, cut to MAX_LENGTH; headers are ASCII, so `é` is written as `\\u00e9`."""
    return ", ".join(json.dumps(text)[1:-1] for text in texts)[:MAX_LENGTH]
