"""Report: how long work, such as loading a model, says how far it is."""

from collections.abc import Callable

Report = Callable[[str, float], None]  # what is being done, and its fraction from 0 to 1; any thread may call it
