"""Durations as Ollama's `keep_alive` has them: how long a model stays loaded after a request.

Source: https://docs.ollama.com/faq, "How do I keep a model loaded in memory". Texts are Go's durations:
https://pkg.go.dev/time#ParseDuration.
"""

import math
import re

from errors import InvalidRequest

LONG = 1e9  # seconds; more is for good
UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_WHOLE = re.compile(rf"[+-]?(?:{_PART.pattern})+")


def seconds_of(keep_alive: float | str | None) -> float | None:
    """Returns seconds; infinity for a negative duration, which keeps a model for good; None where none is given.

    Raises InvalidRequest for what is no duration.
    """
    if keep_alive is None:
        return None
    seconds = _parsed(keep_alive)
    if math.isnan(seconds):
        raise InvalidRequest(
            f"{keep_alive!r} is not a duration: send seconds, or a text such as 5m; -1 keeps the model loaded, 0 "
            "unloads it.",
            param="keep_alive",
            code="invalid_value",
        )
    return math.inf if seconds < 0 or seconds > LONG else seconds


def _parsed(keep_alive: float | str) -> float:
    """Returns seconds; NaN for what is no duration."""
    if not isinstance(keep_alive, str):
        return float(keep_alive)
    text = keep_alive.strip()[:64]
    if re.fullmatch(r"[+-]?\d+", text):  # Ollama itself asks for a unit; its users forget it
        return float(text)
    if not _WHOLE.fullmatch(text):
        return math.nan
    size = sum(float(number) * UNITS[unit] for number, unit in _PART.findall(text))
    return -size if text.startswith("-") else size
